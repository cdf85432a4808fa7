"""What a spam engine is to the relay: it looks at a whole message and says how bad it is.

A new engine is a file with a class like those of `rspamd`, `spamassassin` and `clamav`, a line in `ENGINES` of `panel`,
its type in `config.EngineType`, and the same in the resource.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Protocol

from mailsluice_relay.config import ConfigurationError
from mailsluice_relay.envelope import Content, Mailbox

MAXIMUM_ANSWER: Final = 256 * 1024
"""Octets of an answer that are read; an engine that says more is broken."""


class EngineError(Exception):
    """An engine gave no verdict. The text is for the log, and holds nothing of the message."""


class UnscannableError(EngineError):
    """The engine is well, and gives no verdict about this one message."""


@dataclass(frozen=True, slots=True)
class Submission:
    """A message as engines get it: with the relay's header fields, as it will be sent."""

    content: Content
    queue_id: str
    login: str | None
    client_address: str
    hello: str
    sender: Mailbox | None
    """The reverse-path; None is `<>`."""
    recipients: tuple[Mailbox, ...]


@dataclass(frozen=True, slots=True)
class EngineVerdict:
    """What an engine found."""

    score: float = 0.0
    malware: str = ""
    """Its name; empty for none."""
    symbols: tuple[str, ...] = ()
    """Names of what weighed, for the log."""


class Engine(Protocol):
    """Asks one engine. Keeps no connection between messages, so that there is nothing to close or to find stale."""

    async def check(self, submission: Submission) -> EngineVerdict:
        """The verdict. Raises EngineError or OSError; the caller bounds the time."""
        ...


def address_of(text: str) -> tuple[str, int]:
    """Host and port. Raises ConfigurationError."""
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigurationError(f"spam.engines: {text!r} is no address; expected host:port")
    return host.strip("[]"), int(port)


async def exchange(address: tuple[str, int], pieces: Iterable[bytes]) -> bytes:
    """Send the pieces one after another, as fast as the other side reads, and read its answer to the end.

    Raises EngineError or OSError.
    """
    reader, writer = await asyncio.open_connection(*address)
    # Reading from the start: an engine may answer and hang up before it has read all, and its answer says why.
    answer = asyncio.ensure_future(_everything(reader))
    answer.add_done_callback(lambda task: task.cancelled() or task.exception())  # read, though nobody may wait for it
    try:
        with contextlib.suppress(ConnectionError):
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
            writer.write_eof()
        return await answer
    finally:
        answer.cancel()
        writer.transport.abort()


async def _everything(reader: asyncio.StreamReader) -> bytes:
    answer = bytearray()
    with contextlib.suppress(ConnectionError):  # reset after the answer: it had not read the whole message
        while piece := await reader.read(MAXIMUM_ANSWER):
            answer += piece
            if len(answer) > MAXIMUM_ANSWER:
                raise EngineError(f"its answer is longer than {MAXIMUM_ANSWER} octets")
    if not answer:
        raise EngineError("it closed the connection without an answer")
    return bytes(answer)
