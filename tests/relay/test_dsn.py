"""What notifications say (RFC 3464), whatever the mail and the upstream's words are."""

from __future__ import annotations

import email
import email.policy
from typing import Any

import pytest

from mailsluice_relay.dsn import MAXIMUM_RETURNED, Action, Notification, RecipientReport, build, wanted
from mailsluice_relay.envelope import BodyType, Content, Envelope, Mailbox, Notify, Recipient
from mailsluice_relay.spool.content import MemoryBody


def notification(
    *,
    recipient: str = "no@x.test",
    to: str = "app@example.test",
    header: bytes = b"Subject: x\r\n",
    body: bytes = b"secret\r\n",
    ret: str | None = None,
    **report: Any,
) -> Notification:
    settings = {"action": Action.FAILED, "status": "5.1.1", "text": "no", "reply": "550 5.1.1 no", "remote": "up.test"}
    mailbox = Mailbox(*recipient.split("@"))
    return build(
        [RecipientReport(recipient=Recipient(mailbox), **{**settings, **report})],
        original=Envelope(Mailbox("app", "example.test"), ret=ret, recipients=[Recipient(mailbox)]),
        content=Content(header, MemoryBody(body)),
        queue_id="Q1",
        received_at=1_800_000_000.0,
        retry_until=1_800_172_800.0,
        to=Mailbox(*to.split("@")),
        hostname="relay.test",
        sender="MAILER-DAEMON@relay.test",
        notification_id="N1",
        now=1_800_000_100.0,
    )


def parts(built: Notification) -> list[Any]:
    parsed = email.message_from_bytes(built.header + b"\r\n" + built.body, policy=email.policy.default)
    assert not parsed.defects
    return list(parsed.iter_parts())


def test_the_envelope_lets_nobody_answer() -> None:
    built = notification()
    assert built.envelope.sender is None
    assert built.envelope.recipients == [Recipient(Mailbox("app", "example.test"), Notify.NEVER)]
    assert b"Auto-Submitted: auto-replied\r\n" in built.header


def test_lines_end_with_crlf_and_are_not_too_long() -> None:
    built = notification(reply="550 " + "long words " * 500)
    octets = built.header + b"\r\n" + built.body
    assert octets.count(b"\n") == octets.count(b"\r\n") == octets.count(b"\r")
    assert max(map(len, octets.split(b"\r\n"))) <= 998


def test_an_upstreams_words_do_not_become_fields_of_ours() -> None:
    built = notification(reply="550 no\r\nFinal-Recipient: rfc822; other@x.test\n\nAction: delivered")
    groups = list(parts(built)[1].iter_parts())
    assert len(groups) == 2
    assert groups[1].get_all("Final-Recipient") == ["rfc822; no@x.test"]
    assert groups[1].get_all("Action") == ["failed"]


def test_the_message_comes_back_only_when_asked_for_and_small() -> None:
    assert b"secret" not in notification().body
    assert b"secret" not in notification(ret="HDRS").body
    assert parts(notification(ret="FULL"))[2].get_content_type() == "message/rfc822"
    assert b"Subject: x\r\n\r\nsecret\r\n" in notification(ret="FULL").body
    large = notification(ret="FULL", body=b"secret\r\n" * 10_000)
    assert b"secret" not in large.body
    huge = notification(header=b"Subject: x\r\n" + b"X-Filler: 0123456789\r\n" * 10_000)
    assert len(huge.body) < MAXIMUM_RETURNED + 10_000


def test_octets_of_the_original_come_back_as_they_were() -> None:
    built = notification(header=b"Subject: \xfc\xff raw\r\nX: =?utf-8?q?a?=\r\n")
    assert b"Subject: \xfc\xff raw\r\nX: =?utf-8?q?a?=\r\n" in built.body
    assert built.envelope.body is BodyType.EIGHT_BIT_MIME
    assert notification().envelope.body is BodyType.SEVEN_BIT


def test_internationalized_recipients_have_their_own_type() -> None:
    """RFC 6533 section 3."""
    built = notification(recipient="jörg@x.test")
    status = parts(built)[1]
    assert status.get_content_type() == "message/global-delivery-status"
    assert "Final-Recipient: utf-8; jörg@x.test\r\n".encode() in built.body
    assert notification(to="jörg@x.test").envelope.internationalized


def test_a_delay_says_that_nothing_needs_to_be_done() -> None:
    built = notification(action=Action.DELAYED, status="4.4.1", reply=None, text="not reached")
    words, status, _ = parts(built)
    assert "Nothing needs to be done" in words.get_content()
    (fields,) = list(status.iter_parts())[1:]
    assert fields["Action"] == "delayed"
    assert fields["Will-Retry-Until"] == "Sun, 17 Jan 2027 08:00:00 -0000"
    assert fields["Diagnostic-Code"] is None


@pytest.mark.parametrize(
    ("notify", "heard"),
    [
        (None, {Action.FAILED, Action.DELAYED}),
        (Notify.NEVER, set()),
        (Notify.SUCCESS, {Action.RELAYED}),
        (Notify.FAILURE, {Action.FAILED}),
        (Notify.SUCCESS | Notify.DELAY, {Action.RELAYED, Action.DELAYED}),
    ],
)
def test_the_sender_hears_of_what_it_asked_for(notify: Notify | None, heard: set[Action]) -> None:
    recipient = Recipient(Mailbox("a", "x.test"), notify)
    assert {action for action in Action if wanted(recipient, action)} == heard
