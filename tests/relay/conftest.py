"""Fixtures that several tests of the relay share."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest

from mailsluice_relay.envelope import Envelope, Mailbox, Message, Recipient
from mailsluice_relay.spool.content import ContentWriter

MakeMessage = Callable[..., Message]


@pytest.fixture
def make_message(tmp_path: Path) -> MakeMessage:
    """Makes messages as a session would: `make_message(to=(...), body=b"...")`."""
    numbers = itertools.count(1)
    incoming = tmp_path / "taken"

    def make(
        *,
        queue_id: str | None = None,
        sender: str | None = "app@example.test",
        to: tuple[str | Recipient, ...] = ("person@example.org",),
        header: bytes = b"From: app@example.test\r\nSubject: hello\r\n",
        body: bytes = b"Hello.\r\n",
        login: str | None = "app@example.test",
        received_at: float = 1000.0,
        held: bool = False,
        **envelope: object,
    ) -> Message:
        incoming.mkdir(parents=True, exist_ok=True)
        writer = ContentWriter(incoming)
        writer.write(header + b"\r\n" + body)
        recipients = [Recipient(Mailbox(*r.rsplit("@", 1))) if isinstance(r, str) else r for r in to]
        return Message(
            queue_id=queue_id or f"TEST{next(numbers):06}",
            envelope=Envelope(
                sender=None if sender is None else Mailbox(*sender.rsplit("@", 1)),
                recipients=recipients,
                **envelope,  # type: ignore[arg-type] - a test names the fields that it means
            ),
            content=writer.finish(),
            login=login,
            listener="submission",
            client_address="192.0.2.1",
            received_at=received_at,
            held=held,
        )

    return make
