"""What the queue knows of a message, and the octets that stand for it in the database. Pure.

Structs are written as arrays: a field may be added at the end with a default, and older records still read.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field, replace

import msgspec

from mailsluice_relay.envelope import BodyType, Envelope, Mailbox, Message, Notify, Recipient


class State(enum.StrEnum):
    """Of a message in the queue."""

    ACTIVE = "active"
    """Not tried yet, or being tried for the first time."""
    DEFERRED = "deferred"
    """Tried, and waiting for its next attempt."""
    HELD = "held"
    """Not to be sent before somebody releases it."""
    QUARANTINED = "quarantined"
    """Its record or body cannot be read: kept for a person to look at, and never sent."""


class Standing(enum.StrEnum):
    """Of one recipient."""

    PENDING = "pending"
    DELIVERED = "delivered"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class RecipientStatus:
    standing: Standing = Standing.PENDING
    attempts: int = 0
    reply: str = ""
    """The last answer for this recipient, as text for people."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a message has come. `recipients` has one item per recipient of the envelope, in its order."""

    recipients: tuple[RecipientStatus, ...]
    attempts: int = 0
    """Of the message: how often a delivery was tried for anybody."""
    warned: bool = False
    """The delay warning has been sent."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A message in the queue, without its content."""

    queue_id: str
    state: State
    next_attempt: float | None
    """Seconds since the epoch; None: not by itself (held, quarantined)."""
    received_at: float
    size: int
    login: str | None
    listener: str
    client_address: str
    reason: str
    envelope: Envelope
    progress: Progress
    body_file: str | None = None
    row: int = field(default=0, compare=False)
    """The database's row, for paging."""

    @property
    def pending(self) -> list[int]:
        """Positions of the recipients that still wait."""
        return [n for n, status in enumerate(self.progress.recipients) if status.standing is Standing.PENDING]

    def moved(self, state: State, next_attempt: float | None, progress: Progress) -> Entry:
        return replace(self, state=state, next_attempt=next_attempt, progress=progress)


class RecordError(ValueError):
    """The octets are no record of ours."""


class _Recipient(msgspec.Struct, array_like=True, frozen=True):
    local_part: str
    domain: str
    notify: int | None = None
    original: str | None = None


class _Record(msgspec.Struct, array_like=True, frozen=True):
    recipients: list[_Recipient]
    sender: tuple[str, str] | None = None
    body: BodyType = BodyType.SEVEN_BIT
    internationalized: bool = False
    ret: str | None = None
    envid: str | None = None
    listener: str = ""
    client_address: str = ""
    reason: str = ""


class _Status(msgspec.Struct, array_like=True, frozen=True):
    standing: Standing
    attempts: int
    reply: str


class _Progress(msgspec.Struct, array_like=True, frozen=True):
    recipients: list[_Status]
    attempts: int
    warned: bool = False


_encoder = msgspec.msgpack.Encoder()
_record_decoder = msgspec.msgpack.Decoder(_Record)
_progress_decoder = msgspec.msgpack.Decoder(_Progress)


def entry_of(message: Message, *, body_file: str | None = None) -> Entry:
    """The queue's entry for a message that has just been taken."""
    return Entry(
        queue_id=message.queue_id,
        state=State.HELD if message.held else State.ACTIVE,
        next_attempt=None if message.held else message.received_at,
        received_at=message.received_at,
        size=message.content.size,
        login=message.login,
        listener=message.listener,
        client_address=message.client_address,
        reason=message.reason,
        envelope=message.envelope,
        progress=Progress(tuple(RecipientStatus() for _ in message.envelope.recipients)),
        body_file=body_file,
    )


def encode_record(entry: Entry) -> bytes:
    """What never changes of a message while it is in the queue."""
    envelope = entry.envelope
    return _encoder.encode(
        _Record(
            recipients=[
                _Recipient(
                    r.mailbox.local_part,
                    r.mailbox.domain,
                    None if r.notify is None else r.notify.value,
                    r.original,
                )
                for r in envelope.recipients
            ],
            sender=None if envelope.sender is None else (envelope.sender.local_part, envelope.sender.domain),
            body=envelope.body,
            internationalized=envelope.internationalized,
            ret=envelope.ret,
            envid=envelope.envid,
            listener=entry.listener,
            client_address=entry.client_address,
            reason=entry.reason,
        )
    )


def encode_progress(progress: Progress) -> bytes:
    return _encoder.encode(
        _Progress(
            [_Status(s.standing, s.attempts, s.reply) for s in progress.recipients], progress.attempts, progress.warned
        )
    )


def decode(
    *,
    queue_id: str,
    state: str,
    next_attempt: float | None,
    received_at: float,
    size: int,
    login: str | None,
    record: bytes,
    progress: bytes | None,
    body_file: str | None,
    row: int,
) -> Entry:
    """The entry of a database row. Raises RecordError."""
    try:
        stored = _record_decoder.decode(record)
        recipients = [
            Recipient(Mailbox(r.local_part, r.domain), None if r.notify is None else Notify(r.notify), r.original)
            for r in stored.recipients
        ]
        if progress is None:
            came = Progress(tuple(RecipientStatus() for _ in recipients))
        else:
            written = _progress_decoder.decode(progress)
            came = Progress(
                tuple(RecipientStatus(s.standing, s.attempts, s.reply) for s in written.recipients),
                written.attempts,
                written.warned,
            )
        if not recipients or len(came.recipients) != len(recipients):
            raise RecordError(f"{len(recipients)} recipients, progress of {len(came.recipients)}")
        return Entry(
            queue_id=queue_id,
            state=State(state),
            next_attempt=next_attempt,
            received_at=received_at,
            size=size,
            login=login,
            listener=stored.listener,
            client_address=stored.client_address,
            reason=stored.reason,
            envelope=Envelope(
                sender=None if stored.sender is None else Mailbox(*stored.sender),
                body=stored.body,
                internationalized=stored.internationalized,
                ret=stored.ret,
                envid=stored.envid,
                recipients=recipients,
            ),
            progress=came,
            body_file=body_file,
            row=row,
        )
    except (msgspec.MsgspecError, UnicodeDecodeError, TypeError, ValueError) as error:
        raise RecordError(str(error)) from error
