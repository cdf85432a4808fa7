"""Sessions over real sockets: what clients are answered, what is queued, and how sessions are counted."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
import smtplib
from random import Random
from typing import Any

import pytest

from mailsluice_relay import reply, session
from mailsluice_relay.auth import sasl
from mailsluice_relay.config import Limits, RateLimit, RateLimitUnit, Senders
from mailsluice_relay.session import canonical_address, redacted
from mailsluice_relay.spool.errors import SpoolFull

LOGIN = b"app@example.test"
MAIL = b"MAIL FROM:<app@example.test>"
RCPT = b"RCPT TO:<person@example.org>"
TEXT = b"From: app@example.test\r\nTo: person@example.org\r\nSubject: hello\r\n\r\nHello.\r\n"
END = b"\r\n.\r\n"

Relay = Any
"""conftest's RunningRelay; test modules cannot import it."""
StartRelay = Any


def auth_plain(login: str, password: str) -> bytes:
    return b"AUTH PLAIN " + base64.b64encode(f"\0{login}\0{password}".encode())


async def eventually(condition: Any, seconds: float = 5.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - counters have no event to wait for
            await asyncio.sleep(0.005)


# --- the way that mail goes -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("listener", ["submission", "submissions"])
async def test_a_usual_client_logs_in_and_sends(relay: Relay, listener: str) -> None:
    host, port = relay.listeners.addresses[listener]

    def send() -> dict[str, tuple[int, bytes]]:
        smtp: smtplib.SMTP
        if listener == "submissions":
            smtp = smtplib.SMTP_SSL(host, port, context=relay.client_tls, timeout=10)
        else:
            smtp = smtplib.SMTP(host, port, timeout=10)
        with smtp:
            if listener == "submission":
                smtp.starttls(context=relay.client_tls)
            smtp.login("app@example.test", "right")
            return smtp.sendmail(
                "app@example.test", ["a@example.org", "b@example.org"], TEXT + b"\r\n.\r\n..dots\r\n", ["BODY=8BITMIME"]
            )

    # smtplib looks a host name up to verify it: give it the one in the certificate
    relay.client_tls.check_hostname = False
    assert await asyncio.to_thread(send) == {}
    (message,) = relay.dispatcher.messages
    assert [str(recipient.mailbox) for recipient in message.envelope.recipients] == ["a@example.org", "b@example.org"]
    assert message.login == "app@example.test"
    assert message.listener == listener
    (text,) = relay.dispatcher.texts
    assert text.endswith(b"\r\n\r\nHello.\r\n\r\n.\r\n..dots\r\n")
    await relay.ended("accepted", "accepted", listener)
    assert relay.metric("mailsluice_messages_total", result="accepted", reason="accepted") == 1
    assert relay.metric("mailsluice_recipients_total", result="accepted") == 2
    assert relay.metric("mailsluice_user_recipients_total", user="app@example.test") == 2
    assert relay.metric("mailsluice_tls_sessions_total", version="TLSv1.3") == 1


async def test_the_answer_names_the_queue_id(relay: Relay) -> None:
    peer = await relay.in_data()
    assert await peer.send(TEXT + b".\r\n") == "250 2.0.0 OK: queued as Q1"


async def test_several_messages_in_pipelined_groups(relay: Relay) -> None:
    peer = await relay.in_data()
    assert (await peer.send(TEXT + b".\r\n")).startswith("250")
    for _ in range(3):
        answers = [await peer.send(b"\r\n".join([MAIL, RCPT, b"DATA", b""]))]
        answers += [await peer.reply(), await peer.reply()]
        assert [answer[:3] for answer in answers] == ["250", "250", "354"]
        assert (await peer.send(TEXT + b".\r\n")).startswith("250")
    assert (await peer.say(b"QUIT")).startswith("221")
    assert len(relay.dispatcher.messages) == 4
    await relay.ended("accepted", "accepted")


async def test_a_long_message_goes_through_a_file_unchanged(relay: Relay) -> None:
    body = b"".join(b"%06d %s\r\n" % (n, b"x" * 60) for n in range(8000))
    peer = await relay.in_data()
    assert (await peer.send(TEXT + body + b".\r\n")).startswith("250")
    assert relay.dispatcher.texts[0].endswith(b"\r\n\r\nHello.\r\n" + body)


async def test_what_is_lenient_by_configuration_is_normalized(relay: Relay) -> None:
    peer = await relay.connect("lenient")
    await peer.say(b"EHLO client.test")
    await peer.say(MAIL, RCPT, b"DATA")
    assert (await peer.send(b"From: app@example.test\n\nbody\n.\nmore\n" + END)).startswith("250")
    assert relay.dispatcher.texts[0].endswith(b"\r\n\r\nbody\r\n.\r\nmore\r\n\r\n")


# --- login with a token -----------------------------------------------------------------------------------------------
async def test_mechanisms_that_nobody_can_verify_are_not_offered(relay: Relay) -> None:
    peer = await relay.connect("submissions")
    assert "AUTH PLAIN LOGIN\n" in (await peer.say(b"EHLO client.test"))
    for mechanism in (b"OAUTHBEARER", b"XOAUTH2", b"EXTERNAL"):
        assert (await peer.say(b"AUTH " + mechanism)).startswith("504 5.5.4")


@pytest.mark.parametrize("last", [b"", b"AQ==", b"*"])
async def test_a_refused_token_is_told_by_a_challenge_first(
    start_relay: StartRelay, monkeypatch: pytest.MonkeyPatch, last: bytes
) -> None:
    """RFC 7628 section 3.2.3; XOAUTH2 likewise. A password given as a token is none."""
    monkeypatch.setattr(session, "VERIFIABLE", frozenset({sasl.Evidence.TOKEN}))
    relay = await start_relay()
    peer = await relay.connect("submissions")
    assert "AUTH OAUTHBEARER XOAUTH2\n" in (await peer.say(b"EHLO client.test"))
    response = base64.b64encode(b"user=app@example.test\1auth=Bearer right\1\1")
    challenge = await peer.say(b"AUTH XOAUTH2 " + response)
    assert challenge.startswith("334 ")
    assert b"Bearer" in base64.b64decode(challenge[4:])
    assert (await peer.say(last)).startswith("501 5.7.0" if last == b"*" else "535 5.7.8")
    assert (await peer.say(MAIL)).startswith("530")
    await peer.hang_up()
    await relay.ended("rejected", "credentials_invalid", "submissions")


# --- replies that a person meets --------------------------------------------------------------------------------------
async def test_before_tls_and_before_login(relay: Relay) -> None:
    peer = await relay.connect("submission")
    greeting = await peer.say(b"EHLO client.test")
    assert "STARTTLS" in greeting
    assert "AUTH" not in greeting
    assert (await peer.say(MAIL)).startswith("530 5.7.0 Must issue a STARTTLS command first, then log in: configure")
    assert (await peer.say(auth_plain("app@example.test", "right"))).startswith("538 5.7.11")
    await peer.hang_up()
    await relay.ended("rejected", "tls_required", "submission")
    assert relay.metric("mailsluice_messages_total", result="rejected", reason="tls_required") == 1


async def test_without_login(relay: Relay) -> None:
    peer = await relay.connect("submissions")
    assert "AUTH PLAIN LOGIN" in await peer.say(b"EHLO client.test")
    assert (await peer.say(MAIL)).startswith("530 5.7.0 Authentication required: configure your mail client to log in")
    await peer.hang_up()
    await relay.ended("rejected", "authentication_required", "submissions")


async def test_wrong_logins_are_counted_and_end_the_connection(relay: Relay) -> None:
    peer = await relay.connect("submissions")
    await peer.say(b"EHLO client.test")
    assert (await peer.say(auth_plain("app", "right"))).startswith("535 5.7.8")
    assert "full e-mail address" in await peer.say(auth_plain("nobody", "x"))
    answer = await peer.say(auth_plain("app@example.test", "wrong"))
    assert answer.startswith("421 4.7.0")
    assert await peer.rest() == b""
    await relay.ended("rejected", "short_login", "submissions")


async def test_login_by_prompts(relay: Relay) -> None:
    peer = await relay.connect("submissions")
    await peer.say(b"EHLO client.test")
    assert await peer.say(b"AUTH LOGIN") == "334 VXNlcm5hbWU6"
    assert await peer.say(base64.b64encode(LOGIN)) == "334 UGFzc3dvcmQ6"
    assert (await peer.say(base64.b64encode(b"right"))).startswith("235")
    assert (await peer.say(MAIL)).startswith("250 2.1.0")


async def test_a_cancelled_login_can_be_tried_again(relay: Relay) -> None:
    peer = await relay.connect("submissions")
    await peer.say(b"EHLO client.test")
    await peer.say(b"AUTH LOGIN")
    assert (await peer.say(b"*")).startswith("501 5.7.0")
    assert (await peer.say(auth_plain("app@example.test", "right"))).startswith("235")


async def test_responses_as_long_as_tokens_are_heard(relay: Relay) -> None:
    peer = await relay.connect("submissions")
    await peer.say(b"EHLO client.test")
    token = "t" * 9000
    assert (await peer.say(auth_plain("app@example.test", token))).startswith("535")
    assert await peer.say(b"AUTH PLAIN") == "334 "
    assert (await peer.say(base64.b64encode(f"\0app@example.test\0{token}".encode()))).startswith("535")


async def test_nobody_acts_for_another(relay: Relay) -> None:
    peer = await relay.connect("submissions")
    await peer.say(b"EHLO client.test")
    response = base64.b64encode(b"boss@example.test\0app@example.test\0right")
    assert (await peer.say(b"AUTH PLAIN " + response)).startswith("535 5.7.8")


async def test_senders_that_the_login_does_not_own(relay: Relay) -> None:
    peer = await relay.logged_in()
    answer = await peer.say(b"MAIL FROM:<boss@example.test>")
    assert answer.startswith("553 5.7.1 ")
    assert "app@example.test may not send as boss@example.test" in answer
    await peer.say(MAIL, RCPT, b"DATA")
    answer = await peer.send(TEXT.replace(b"From: app", b"From: boss") + b".\r\n")
    assert answer.startswith("550 5.7.1 ")
    assert relay.dispatcher.messages == []
    await peer.hang_up()
    await relay.ended("rejected", "sender_not_owned", "submission")


async def test_a_suspended_login(relay: Relay) -> None:
    peer = await relay.connect("submissions")
    await peer.say(b"EHLO client.test")
    assert (await peer.say(auth_plain("stopped@example.test", "right"))).startswith("235")
    answer = await peer.say(b"MAIL FROM:<stopped@example.test>")
    assert answer.startswith("450 4.7.1 ")
    assert "suspended" in answer
    await peer.hang_up()
    await relay.ended("rejected", "login_suspended", "submissions")


async def test_too_big_when_declared_and_when_read(relay: Relay) -> None:
    peer = await relay.connect()
    await peer.say(b"EHLO client.test")
    assert (await peer.say(MAIL + b" SIZE=600001")).startswith("552 5.3.4")
    await peer.say(MAIL + b" SIZE=600000", RCPT, b"DATA")
    assert (await peer.send(TEXT + b"x" * 600_000 + END)).startswith("552 5.3.4")
    assert (await peer.say(b"NOOP")).startswith("250")
    assert relay.dispatcher.messages == []
    assert list(relay.dispatcher.directory.iterdir()) == []


async def test_each_recipient_over_the_cap_is_deferred(relay: Relay) -> None:
    peer = await relay.connect()
    await peer.say(b"EHLO client.test")
    await peer.say(MAIL)
    answers = [await peer.say(RCPT) for _ in range(5)]
    assert [answer[:9] for answer in answers] == ["250 2.1.5"] * 3 + ["452 4.5.3"] * 2
    await peer.say(b"DATA")
    assert (await peer.send(TEXT + b".\r\n")).startswith("250")
    assert len(relay.dispatcher.messages[0].envelope.recipients) == 3
    assert relay.metric("mailsluice_recipients_total", result="deferred") == 2


async def test_a_full_queue_at_mail_and_after_the_data(relay: Relay) -> None:
    relay.dispatcher.full = reply.QUEUE_FULL
    peer = await relay.connect()
    await peer.say(b"EHLO client.test")
    assert (await peer.say(MAIL)).startswith("452 4.3.1")
    relay.dispatcher.full = None
    relay.dispatcher.answer = reply.QUEUE_FULL
    await peer.say(MAIL, RCPT, b"DATA")
    assert (await peer.send(TEXT + b".\r\n")).startswith("452 4.3.1")
    await peer.hang_up()
    await relay.ended("rejected", "queue_full")
    assert relay.metric("mailsluice_messages_total", result="deferred", reason="queue_full") == 2


async def test_a_relay_that_drains_takes_nothing_more(relay: Relay) -> None:
    relay.dispatcher.full = reply.SHUTTING_DOWN
    peer = await relay.connect()
    await peer.say(b"EHLO client.test")
    assert await peer.say(MAIL) == str(reply.SHUTTING_DOWN)
    assert await peer.rest() == b""
    await relay.ended("rejected", "shutting_down")


async def test_a_message_that_the_queue_refuses_is_not_charged(start_relay: StartRelay) -> None:
    limit = RateLimit(name="hour", unit=RateLimitUnit.MESSAGES, limit=1, window=3600.0)
    relay = await start_relay(rate_limits=(limit,))
    relay.dispatcher.answer = reply.QUEUE_FULL
    peer = await relay.in_data()
    assert (await peer.send(TEXT + b".\r\n")).startswith("452")
    relay.dispatcher.answer, relay.dispatcher.error = None, OSError("gone")
    await peer.say(MAIL, RCPT, b"DATA")
    assert (await peer.send(TEXT + b".\r\n")).startswith("451")
    relay.dispatcher.error = None
    await peer.say(MAIL, RCPT, b"DATA")
    assert (await peer.send(TEXT + b".\r\n")).startswith("250")
    answer = await peer.say(MAIL)
    assert answer.startswith("450 4.7.1 Rate limit hour is used up; retry after ")


async def test_a_disk_without_room_defers_and_leaves_nothing(relay: Relay) -> None:
    def full(data: bytes) -> None:
        raise SpoolFull("no space left on device")

    original = relay.dispatcher.new_content

    def new_content() -> Any:
        writer = original()
        writer.write = full
        return writer

    relay.dispatcher.new_content = new_content
    peer = await relay.in_data()
    assert (await peer.send(TEXT + b".\r\n")).startswith("452 4.3.1")
    assert relay.dispatcher.waiting == 0


async def test_a_failure_of_ours_tells_nothing_of_the_inside(relay: Relay) -> None:
    relay.dispatcher.error = ZeroDivisionError("secret detail")
    peer = await relay.in_data()
    assert await peer.send(TEXT + b".\r\n") == str(reply.INTERNAL_ERROR)
    relay.dispatcher.error = None
    await peer.say(MAIL, RCPT, b"DATA")
    assert (await peer.send(TEXT + b".\r\n")).startswith("250")


# --- smuggling and injection ------------------------------------------------------------------------------------------
SMUGGLED = (
    b"MAIL FROM:<app@example.test>\r\nRCPT TO:<victim@example.org>\r\nDATA\r\n"
    b"From: app@example.test\r\n\r\nEvil.\r\n.\r\n"
)


@pytest.mark.parametrize(
    "variant",
    [
        b"\n.\n",
        b"\r.\r",
        b"\r.\n",
        b"\n.\r",
        b"\n.\r\n",
        b"\r\n.\n",
        b"\r.\r\n",
        b"\r\n.\r",
        b"\r\n\0.\r\n",
        b"\r\n.\0\r\n",
        b"\r\n.\r\r\n",
        b"\r\r\n.\r\r\n",
        b"\r\r\n.\r\n",
        b"\n\r.\n\r",
    ],
)
async def test_no_variant_of_the_end_of_data_smuggles_a_message_in(relay: Relay, variant: bytes) -> None:
    peer = await relay.in_data()
    peer.writer.write(TEXT + b"body" + variant + SMUGGLED)
    assert (await peer.rest()).decode().splitlines() == [str(reply.DATA_LINE_ENDING)]
    assert relay.dispatcher.messages == []
    await relay.ended("rejected", "line_ending")


@pytest.mark.parametrize("listener", ["submission", "submissions"])
async def test_the_last_reply_reaches_a_client_that_is_still_sending(relay: Relay, listener: str) -> None:
    peer = await relay.logged_in(listener)
    await peer.say(MAIL, RCPT, b"DATA")
    peer.writer.write(TEXT + b"\n.\n" + b"x" * 300_000 + END + SMUGGLED * 2000)
    assert await peer.reply() == str(reply.DATA_LINE_ENDING)
    peer.writer.close()
    assert relay.dispatcher.messages == []
    await relay.ended("rejected", "line_ending", listener)


async def test_a_client_that_only_knows_lf_is_told_though_its_text_never_ends(relay: Relay) -> None:
    peer = await relay.in_data()
    peer.writer.write(TEXT.replace(b"\r\n", b"\n") + b"\n.\n")
    assert (await peer.rest()).decode().splitlines() == [str(reply.DATA_LINE_ENDING)]
    await relay.ended("rejected", "line_ending")


async def test_commands_behind_starttls_are_not_run_in_the_encrypted_session(relay: Relay) -> None:
    peer = await relay.connect("submission")
    await peer.say(b"EHLO client.test")
    assert await peer.send(b"STARTTLS\r\nEHLO evil.test\r\nMAIL FROM:<evil@example.test>\r\n") == str(
        reply.TLS_PIPELINED
    )
    assert await peer.rest() == b""
    await relay.ended("rejected", "unauthorized_pipelining", "submission")


async def test_a_failed_handshake_ends_the_session(relay: Relay) -> None:
    peer = await relay.connect("submission")
    await peer.say(b"EHLO client.test")
    await peer.say(b"STARTTLS")
    peer.writer.write(b"EHLO this is no handshake\r\n")
    with contextlib.suppress(ConnectionError):
        await peer.rest()
    await relay.ended("rejected", "tls_handshake", "submission")


async def test_hanging_up_during_the_handshake_ends_the_session(relay: Relay) -> None:
    peer = await relay.connect("submission")
    await peer.say(b"EHLO client.test")
    await peer.say(b"STARTTLS")
    await peer.hang_up()
    await relay.ended("rejected", "tls_handshake", "submission")


# --- hanging up -------------------------------------------------------------------------------------------------------
async def test_hanging_up_in_the_middle_of_a_message_leaves_nothing(relay: Relay) -> None:
    peer = await relay.in_data()
    peer.writer.write(TEXT + b"x" * 400_000)
    await peer.writer.drain()
    await peer.hang_up()
    await relay.ended("none", "none")
    assert relay.dispatcher.waiting == 0
    assert list(relay.dispatcher.directory.iterdir()) == []


async def test_once_the_end_of_data_is_read_the_message_is_queued_whatever_the_client_does(relay: Relay) -> None:
    relay.dispatcher.may_go_on.clear()
    peer = await relay.in_data()
    peer.writer.write(TEXT + b".\r\n")
    await eventually(lambda: relay.dispatcher.waiting == 1)
    peer.writer.transport.abort()
    await asyncio.sleep(0)
    assert relay.all_sessions() == 0
    relay.dispatcher.may_go_on.set()
    await relay.ended("accepted", "accepted")
    assert len(relay.dispatcher.messages) == 1


async def test_a_client_that_only_stops_sending_still_gets_its_answer(relay: Relay) -> None:
    relay.dispatcher.may_go_on.clear()
    peer = await relay.in_data()
    peer.writer.write(TEXT + b".\r\n")
    peer.writer.write_eof()
    await eventually(lambda: relay.dispatcher.waiting == 1)
    relay.dispatcher.may_go_on.set()
    assert await peer.rest() == b"250 2.0.0 OK: queued as Q1\r\n"


DIALOGUE = (
    b"EHLO client.test\r\n",
    b"MAIL FROM:<app@example.test>\r\nRCPT TO:<person@example.org>\r\nDATA\r\n",
    TEXT + b"x" * 300_000 + END,
    b"QUIT\r\n",
)


async def test_wherever_clients_hang_up_each_session_counts_once_and_no_answered_message_is_missing(
    relay: Relay,
) -> None:
    random = Random(1)
    clients, answered = 60, 0

    async def client() -> None:
        nonlocal answered
        peer = await relay.connect()
        last = random.randrange(len(DIALOGUE))
        for number, group in enumerate(DIALOGUE):
            if number == last:
                peer.writer.write(group[: random.randrange(len(group) + 1)])
                if random.random() < 0.5:
                    await peer.writer.drain()
                    peer.writer.close()
                else:
                    peer.writer.transport.abort()
                return
            peer.writer.write(group)
            for _ in range(max(1, group.count(b"\r\n") if number == 1 else 1)):
                code = (await peer.reply())[:3]
            answered += number == 2 and code == "250"

    async with asyncio.TaskGroup() as group:
        for _ in range(10):
            group.create_task(client())
    for _ in range(clients - 10):
        await client()
    await eventually(lambda: relay.all_sessions() == clients)
    assert relay.metric("mailsluice_sessions_active", listener="open") == 0
    taken = len(relay.dispatcher.messages)
    assert 0 < answered <= taken
    assert relay.sessions("accepted", "accepted") == taken
    assert all(text.endswith(b"x" * 300_000 + b"\r\n") for text in relay.dispatcher.texts)
    kept = sum(message.content.body.size > 256 * 1024 for message in relay.dispatcher.messages)
    assert len(list(relay.dispatcher.directory.iterdir())) == kept


# --- time and room ----------------------------------------------------------------------------------------------------
async def test_an_idle_client_is_sent_away(start_relay: StartRelay) -> None:
    relay = await start_relay(limits=Limits(idle_timeout=0.1))
    peer = await relay.connect()
    await peer.say(b"EHLO client.test")
    assert (await peer.rest()).decode() == f"{reply.TIMED_OUT}\r\n"
    await relay.ended("rejected", "timeout")


async def drip(peer: Any, octets: bytes) -> None:
    """Send octet by octet for as long as the connection lasts."""
    with contextlib.suppress(ConnectionError):
        while not peer.reader.at_eof():
            peer.writer.write(octets)
            await peer.writer.drain()
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("in_data", [False, True])
async def test_dripping_octets_do_not_keep_a_session_open(start_relay: StartRelay, in_data: bool) -> None:
    relay = await start_relay(limits=Limits(idle_timeout=0.2))
    peer = await relay.in_data() if in_data else await relay.connect()
    dripping = asyncio.create_task(drip(peer, b"x"))
    assert (await peer.rest()).decode() == f"{reply.TIMED_OUT}\r\n"
    await dripping


async def test_a_message_that_comes_steadily_may_take_longer_than_the_idle_timeout(start_relay: StartRelay) -> None:
    relay = await start_relay(limits=Limits(idle_timeout=0.3))
    peer = await relay.in_data()
    peer.writer.write(TEXT)
    for _ in range(10):
        await asyncio.sleep(0.06)
        peer.writer.write(b"x" * 4096 + b"\r\n")
    assert (await peer.send(b".\r\n")).startswith("250")


async def test_a_session_has_an_end(start_relay: StartRelay) -> None:
    relay = await start_relay(limits=Limits(session_timeout=0.3))
    peer = await relay.connect()
    await peer.say(b"EHLO client.test")
    working = asyncio.create_task(drip(peer, b"RSET\r\n"))
    answers = (await peer.rest()).decode().splitlines()
    assert answers[-1] == str(reply.TIMED_OUT)
    await working


async def test_while_a_decision_waits_a_flood_is_not_read(relay: Relay) -> None:
    relay.dispatcher.may_go_on.clear()
    peer = await relay.in_data()
    peer.writer.write(TEXT + b".\r\n")
    await eventually(lambda: relay.dispatcher.waiting == 1)
    flood = b"MAIL FROM:<app@example.test>\r\n" * 1_000_000
    peer.writer.write(flood)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.5):
            await peer.writer.drain()
    relay.dispatcher.may_go_on.set()
    assert (await peer.reply()).startswith("250")


# --- how sessions are counted -----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "said", [b"", b"QUIT\r\n", b"EHLO probe.test\r\n", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"\x16\x03\x01\0\n"]
)
async def test_probes_and_scans_count_as_nothing_tried(relay: Relay, said: bytes) -> None:
    peer = await relay.connect()
    peer.writer.write(said)
    await peer.writer.drain()
    if said:
        await peer.reply()
    await peer.hang_up()
    await relay.ended("none", "none")


async def test_the_first_reason_of_the_winning_class_counts(relay: Relay) -> None:
    peer = await relay.connect()
    await peer.say(b"EHLO client.test")
    await peer.say(b"FOO", b"RCPT TO:<a@b.test>")
    await peer.hang_up()
    await relay.ended("rejected", "syntax")


async def test_an_accepted_message_outweighs_refusals(relay: Relay) -> None:
    peer = await relay.connect()
    await peer.say(b"EHLO client.test")
    await peer.say(b"MAIL FROM:<app@elsewhere.test>")
    await peer.say(MAIL, RCPT, b"DATA")
    assert (await peer.send(TEXT + b".\r\n")).startswith("250")
    await peer.hang_up()
    await relay.ended("accepted", "accepted")


async def test_a_suspected_message_outweighs_all(start_relay: StartRelay) -> None:
    relay = await start_relay(senders=Senders(allowed_domains=("example.test",)))
    peer = await relay.connect()
    await peer.say(b"EHLO client.test")
    await peer.say(MAIL, RCPT, b"DATA")
    await peer.send(TEXT + b".\r\n")
    original = relay.admission.message

    async def suspecting(*arguments: Any, **options: Any) -> Any:
        judgement = await original(*arguments, **options)
        return dataclasses.replace(judgement, suspected=True, held=True, reason=reply.Reason.RECIPIENT_BURST)

    relay.admission.message = suspecting
    await peer.say(MAIL, RCPT, b"DATA")
    assert (await peer.send(TEXT + b".\r\n")).startswith("250")
    assert relay.dispatcher.messages[1].held
    await peer.hang_up()
    await relay.ended("suspected_spam", "recipient_burst")
    assert relay.metric("mailsluice_messages_total", result="held", reason="recipient_burst") == 1


# --- names ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("2001:db8::1", "2001:db8::1"),
        ("fe80::1%eth0", "fe80::1"),
    ],
)
def test_client_addresses_have_one_spelling(text: str, address: str) -> None:
    assert canonical_address(text) == address


def test_redacted_addresses_keep_the_domain_alone() -> None:
    assert redacted("person@example.test") == "***@example.test"
    assert redacted("person") == "***"
