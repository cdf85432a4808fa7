"""A queued message as people and `mailsluice queue` see it. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from mailsluice_relay.spool.record import Entry


@dataclass(frozen=True, slots=True)
class QueuedRecipient:
    address: str
    state: str
    """pending, delivered or failed."""
    attempts: int
    reply: str
    """The last answer for it; empty before the first attempt."""


@dataclass(frozen=True, slots=True)
class QueuedMessage:
    queue_id: str
    state: str
    """active, deferred, held or quarantined."""
    received_at: float
    next_attempt: float | None
    """Seconds since the epoch; None: not by itself."""
    attempts: int
    size: int
    login: str | None
    listener: str
    client_address: str
    reason: str
    """The verdict's: `accepted`, or why it is suspected."""
    sender: str
    """The reverse-path; empty for `<>`."""
    recipients: tuple[QueuedRecipient, ...]
    header: str | None = None
    """The header section, where one message is shown."""


def summary(entry: Entry, header: bytes | None = None) -> QueuedMessage:
    envelope, progress = entry.envelope, entry.progress
    return QueuedMessage(
        queue_id=entry.queue_id,
        state=entry.state.value,
        received_at=entry.received_at,
        next_attempt=entry.next_attempt,
        attempts=progress.attempts,
        size=entry.size,
        login=entry.login,
        listener=entry.listener,
        client_address=entry.client_address,
        reason=entry.reason,
        sender=str(envelope.sender or ""),
        recipients=tuple(
            QueuedRecipient(str(recipient.mailbox), status.standing.value, status.attempts, status.reply)
            for recipient, status in zip(envelope.recipients, progress.recipients, strict=True)
        ),
        header=None if header is None else header.decode("utf-8", "replace"),
    )


def matches(entry: Entry, sender: str | None, recipient: str | None) -> bool:
    """Whether the addresses asked for are this message's, compared without case."""
    if sender is not None and str(entry.envelope.sender or "").casefold() != sender.casefold():
        return False
    return recipient is None or any(
        str(item.mailbox).casefold() == recipient.casefold() for item in entry.envelope.recipients
    )
