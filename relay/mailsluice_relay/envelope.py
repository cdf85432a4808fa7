"""What travels through the relay: client, envelope, content, message. Values only; no I/O of its own.

`Content` is an interface: bodies live in memory or in a file (`spool.content`), and nobody above cares which.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Mailbox:
    """A mailbox (RFC 5321 section 4.1.2). `local_part` is as it came on the wire, quotes included; `domain` too."""

    local_part: str
    domain: str

    def __str__(self) -> str:
        return f"{self.local_part}@{self.domain}" if self.domain else self.local_part

    @property
    def is_internationalized(self) -> bool:
        """Whether it needs SMTPUTF8 (RFC 6531 section 3.3)."""
        return not (self.local_part.isascii() and self.domain.isascii())


class Notify(enum.Flag):
    """RFC 3461 section 4.1. NEVER stands alone; the default of a recipient without NOTIFY is FAILURE | DELAY."""

    NEVER = 0
    SUCCESS = 1
    FAILURE = 2
    DELAY = 4


@dataclass(frozen=True, slots=True)
class Recipient:
    """One forward-path with its DSN parameters (RFC 3461 sections 4.1 and 4.2)."""

    mailbox: Mailbox
    notify: Notify | None = None
    """None: not given."""
    original: str | None = None
    """ORCPT, `addr-type;xtext`, with its case kept."""


class BodyType(enum.StrEnum):
    SEVEN_BIT = "7BIT"
    EIGHT_BIT_MIME = "8BITMIME"


@dataclass(frozen=True, slots=True)
class TLSState:
    version: str
    cipher: str


@dataclass(frozen=True, slots=True)
class Login:
    """An authenticated identity. `name` is the full login, as configured."""

    name: str
    mechanism: str
    namespace: str | None = None


@dataclass(slots=True)
class Client:
    """Who is at the other end of a session. The session keeps it current; others only read it."""

    session_id: str
    listener: str
    address: str
    """The client's IP address, without a zone."""
    port: int
    hello: str = ""
    extended: bool = False
    """EHLO and not HELO."""
    tls: TLSState | None = None
    login: Login | None = None
    authentication_failures: int = 0
    is_balancer: bool = False
    """A load balancer that names no client: a health check. Its network lets nobody in."""


@dataclass(slots=True)
class Envelope:
    """A mail transaction as far as it has come. `sender` is the reverse-path; None is `<>`."""

    sender: Mailbox | None
    body: BodyType = BodyType.SEVEN_BIT
    internationalized: bool = False
    """SMTPUTF8 was given (RFC 6531)."""
    declared_size: int | None = None
    """SIZE= (RFC 1870)."""
    ret: str | None = None
    """FULL or HDRS (RFC 3461 section 4.3)."""
    envid: str | None = None
    """xtext, with its case kept (RFC 3461 section 4.4)."""
    recipients: list[Recipient] = field(default_factory=list)


class Body(Protocol):
    """The octets after the header section's blank line."""

    @property
    def size(self) -> int: ...

    def chunks(self) -> Iterator[bytes]:
        """The octets in order, in pieces of at most 64 KiB where they come from a file."""
        ...

    def close(self) -> None:
        """Give up the memory or the file. Idempotent."""
        ...


@dataclass(frozen=True, slots=True)
class Content:
    """A message as it was taken: CRLF line ends only, dots unstuffed.

    `header` is the header section, every field ended by CRLF, without the blank line; empty when the text has none.
    """

    header: bytes
    body: Body

    @property
    def size(self) -> int:
        return len(self.header) + 2 + self.body.size

    def chunks(self) -> Iterator[bytes]:
        yield self.header + b"\r\n"
        yield from self.body.chunks()


@dataclass(frozen=True, slots=True)
class Message:
    """One mail to be made durable and delivered. The content already has the relay's header fields."""

    queue_id: str
    envelope: Envelope
    content: Content
    login: str | None
    listener: str
    client_address: str
    received_at: float
    """Seconds since the epoch."""
    held: bool = False
    """Not to be sent before somebody releases it."""
    reason: str = "accepted"
    """The name of the verdict's reason, for logs and `mailsluice queue show`."""
