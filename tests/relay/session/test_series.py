"""No event makes a series: each that can exist is there from the start, so that a dashboard sees the first event."""

from __future__ import annotations

from typing import Any

import pytest

from mailsluice_relay import reply
from mailsluice_relay.auth import sasl
from mailsluice_relay.config import (
    Authentication,
    Configuration,
    Monitoring,
    RateLimit,
    RateLimitAction,
    RateLimitUnit,
    Recipients,
    Senders,
    Spam,
    User,
)
from mailsluice_relay.metrics import MESSAGE_REASONS, OFFERED_MECHANISMS, SESSION_REASONS, Metrics
from mailsluice_relay.reply import Reason, Result
from mailsluice_relay.session import VERIFIABLE

RunningRelay = Any
"""conftest's; test modules cannot import it."""
StartRelay = Any
EHLO = b"EHLO client.test"
FROM = b"MAIL FROM:<app@example.test>"
TO = b"RCPT TO:<person@example.org>"
HEADER = b"From: app@example.test\r\n"
END = b"\r\n\r\nHello.\r\n.\r\n"
LOGIN = b"AUTH PLAIN AGFwcEBleGFtcGxlLnRlc3QAcmlnaHQ="  # app@example.test, right
STOPPED = b"AUTH PLAIN AHN0b3BwZWRAZXhhbXBsZS50ZXN0AHJpZ2h0"
WRONG = b"AUTH PLAIN AGFwcEBleGFtcGxlLnRlc3QAd3Jvbmc="
SHORT = b"AUTH PLAIN AGFwcAByaWdodA=="
EXECUTABLE = (
    b'Content-Type: application/octet-stream; name="invoice.exe"\r\n'
    b'Content-Disposition: attachment; filename="invoice.exe"\r\n'
)

Dialogue = tuple[str, list[bytes]]

REFUSED: list[Dialogue] = [
    ("syntax", [b"FROB"]),
    ("syntax", [b"AUTH PLAIN !"]),
    ("bad_sequence", [TO]),
    ("bad_sequence", [FROM, TO, b"EHLO again", b"DATA"]),
    ("line_ending", [b"NOOP \0"]),
    ("line_ending", [FROM, TO, b"DATA", HEADER + b"\nbare" + END]),
    ("address_syntax", [b"MAIL FROM:<@>"]),
    ("smtputf8_required", ["MAIL FROM:<ä@example.test>".encode()]),
    ("message_too_big", [b"MAIL FROM:<app@example.test> SIZE=700000"]),
    ("message_too_big", [FROM, TO, b"DATA", HEADER + b"\r\n" + b"x" * 70 * 10_000 + END]),
    ("too_many_recipients", [FROM, TO, TO, TO, TO]),
    ("syntax", [b"FROB"] * 30),
    ("mechanism_unsupported", [b"AUTH XOAUTH2"]),
    ("authentication_aborted", [b"AUTH LOGIN", b"*"]),
    ("credentials_invalid", [WRONG]),
    ("short_login", [SHORT]),
    ("too_many_failures", [WRONG, WRONG, WRONG]),
    ("login_suspended", [STOPPED, FROM]),
    ("sender_not_owned", [LOGIN, b"MAIL FROM:<boss@elsewhere.test>"]),
    ("header_from_not_owned", [LOGIN, FROM, TO, b"DATA", b"From: boss@example.test" + END]),
    ("header_malformed", [FROM, TO, b"DATA", HEADER * 2 + END]),
    (
        "mail_loop",
        [FROM, TO, b"DATA", HEADER + b"Received: from a by b; Tue, 1 Jul 2025 10:00:00 +0000\r\n" * 200 + END],
    ),
]


def series(metrics: Metrics) -> set[tuple[str, frozenset[tuple[str, str]]]]:
    return {
        (sample.name, frozenset(sample.labels.items()))
        for family in metrics.registry.collect()
        for sample in family.samples
    }


def counted(metrics: Metrics, name: str) -> set[str]:
    """The reasons that a counter has counted."""
    return {
        sample.labels["reason"]
        for family in metrics.registry.collect()
        for sample in family.samples
        if sample.name == name and sample.value
    }


async def converse(relay: RunningRelay, commands: list[bytes], listener: str = "lenient") -> None:
    """One session, from its greeting to its end."""
    before = relay.all_sessions()
    peer = await relay.connect(listener)
    for command in (EHLO, *commands):
        await (peer.send(command) if command.endswith(b"\r\n") else peer.say(command))
    await peer.hang_up()
    await relay.eventually(lambda: relay.all_sessions() == before + 1)


@pytest.mark.parametrize(("reason", "commands"), REFUSED)
async def test_no_refusal_makes_a_series(relay: RunningRelay, reason: str, commands: list[bytes]) -> None:
    listener = "open" if b"bare" in b"".join(commands) else "lenient"
    before = series(relay.metrics)
    await converse(relay, commands, listener)
    sessions = counted(relay.metrics, "mailsluice_sessions_total")
    assert reason in sessions | counted(relay.metrics, "mailsluice_authentications_total")
    assert series(relay.metrics) - before == set()


@pytest.mark.parametrize("action", RateLimitAction)
async def test_no_limit_makes_a_series(start_relay: StartRelay, action: RateLimitAction) -> None:
    relay = await start_relay(
        rate_limits=(RateLimit(name="few", unit=RateLimitUnit.MESSAGES, limit=1, window=3600.0, action=action),)
    )
    before = series(relay.metrics)
    for _ in range(2):
        await converse(relay, [LOGIN, FROM, TO, b"DATA", HEADER + END])
    assert "rate_limited" in counted(relay.metrics, "mailsluice_messages_total")
    assert series(relay.metrics) - before == set()


@pytest.mark.parametrize("threshold", ["suspect_at", "hold_at", "reject_at"])
async def test_no_suspicion_makes_a_series(start_relay: StartRelay, threshold: str) -> None:
    relay = await start_relay(spam=Spam(**{threshold: 5.0}))
    before = series(relay.metrics)
    await converse(relay, [LOGIN, FROM, TO, b"DATA", HEADER + EXECUTABLE + END])
    assert counted(relay.metrics, "mailsluice_sessions_total") == {"executable_attachment"}
    assert counted(relay.metrics, "mailsluice_messages_total") == {"executable_attachment"}
    assert series(relay.metrics) - before == set()


async def test_no_domain_makes_a_series(start_relay: StartRelay) -> None:
    relay = await start_relay(
        senders=Senders(allowed_domains=("example.test",)), recipients=Recipients(allowed_domains=("example.org",))
    )
    before = series(relay.metrics)
    await converse(relay, [b"MAIL FROM:<app@elsewhere.test>"])
    await converse(relay, [FROM, b"RCPT TO:<person@elsewhere.test>"])
    reasons = counted(relay.metrics, "mailsluice_sessions_total")
    assert reasons == {"sender_domain_not_allowed", "recipient_domain_not_allowed"}
    assert series(relay.metrics) - before == set()


@pytest.mark.parametrize("answer", [reply.QUEUE_FULL, reply.SHUTTING_DOWN, reply.INTERNAL_ERROR])
async def test_no_trouble_of_the_queue_makes_a_series(relay: RunningRelay, answer: reply.Reply) -> None:
    before = series(relay.metrics)
    relay.dispatcher.answer = answer
    await converse(relay, [LOGIN, FROM, TO, b"DATA", HEADER + END])
    relay.dispatcher.full = answer
    await converse(relay, [FROM])
    assert len(counted(relay.metrics, "mailsluice_messages_total")) == 1
    assert series(relay.metrics) - before == set()


async def test_before_tls_and_before_login(relay: RunningRelay) -> None:
    before = series(relay.metrics)
    await converse(relay, [FROM, LOGIN], "submission")
    await converse(relay, [FROM], "submissions")
    assert counted(relay.metrics, "mailsluice_messages_total") == {"tls_required", "authentication_required"}
    assert series(relay.metrics) - before == set()


async def test_logins_beyond_the_limit_are_counted_together(
    start_relay: StartRelay, configuration: Configuration
) -> None:
    first = User(login="aaa@example.test")
    users = Authentication(
        users=(first, *configuration.authentication.users),
        allowed_networks=configuration.authentication.allowed_networks,
    )
    relay = await start_relay(authentication=users, monitoring=Monitoring(user_metrics_limit=1))
    before = series(relay.metrics)
    names = {dict(labels)["user"] for name, labels in before if name == "mailsluice_user_messages_total"}
    assert names == {"aaa@example.test", "other"}
    await converse(relay, [LOGIN, FROM, TO, b"DATA", HEADER + END])
    assert relay.metric("mailsluice_user_messages_total", user="other", result="accepted") == 1
    assert relay.metric("mailsluice_user_recipients_total", user="other") == 1
    assert series(relay.metrics) - before == set()


def test_every_mechanism_that_is_offered_has_its_series() -> None:
    assert sasl.offered(VERIFIABLE) == OFFERED_MECHANISMS


def test_every_reason_belongs_to_a_result() -> None:
    assert frozenset[Reason]().union(*SESSION_REASONS.values()) == frozenset(Reason)
    assert SESSION_REASONS.keys() == set(Result)
    for reasons in MESSAGE_REASONS.values():
        assert reasons <= frozenset(Reason) - {Reason.NONE}
