"""From 250 to the end of each message: real spool, real sockets, an upstream that answers by script."""

from __future__ import annotations

import asyncio
import base64
import email
import email.policy
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import dkim
import msgspec
import pytest
from aiosmtpd.controller import Controller
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from mailsluice_relay import config
from mailsluice_relay.delivery import breaker, pool
from mailsluice_relay.delivery.client import Timeouts
from mailsluice_relay.dispatch import Dispatcher
from mailsluice_relay.envelope import Mailbox, Notify, Recipient
from mailsluice_relay.metrics import Metrics
from mailsluice_relay.spool.errors import SpoolFull
from mailsluice_relay.spool.spool import Spool
from mailsluice_relay.spool.store import Settlement

SHORT = Timeouts(connect=2, greeting=1, command=1, data=1, block=1, end_of_data=1, quit=0.5)
QUICK = config.Queue(retry=config.Retry(initial=0.05, maximum=0.1))


class Clock:
    """Real time, and as much more as a test adds."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def now(self) -> float:
        return time.time() + self.ahead

    def monotonic(self) -> float:
        return time.monotonic() + self.ahead


def upstream_of(server: Any, name: str = "up", **fields: Any) -> config.Upstream:
    return config.Upstream(name=name, host="127.0.0.1", port=server.port, tls=config.UpstreamTLSMode.PLAIN, **fields)


def configured(*upstreams: config.Upstream, **fields: Any) -> config.Configuration:
    settings: dict[str, Any] = {
        "revision": "1",
        "credentials_revision": "1",
        "relay": config.Relay(name="r", namespace="n"),
        "hostname": "relay.test",
        "listeners": (config.Listener(name="submission", port=0),),
        "upstreams": upstreams,
        "queue": QUICK,
        **fields,
    }
    return config.Configuration(**settings)


class Relay:
    """A dispatcher with what a test wants to see of it."""

    def __init__(self, directory: Path, configuration: config.Configuration, clock: Clock, **settings: Any) -> None:
        self.metrics = Metrics()
        self.metrics.configure(configuration, {})
        self.dispatcher = Dispatcher(
            configuration,
            settings.pop("credentials", {}),
            directory=directory,
            metrics=self.metrics,
            now=clock.now,
            monotonic=clock.monotonic,
            random=random.Random(1),
            timeouts=SHORT,
            **settings,
        )

    def metric(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(name, labels) or 0.0

    @property
    def is_empty(self) -> bool:
        counts = self.dispatcher.counts()
        return counts.active + counts.deferred + counts.held == 0 and not self.dispatcher._claimed


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def start(tmp_path: Path, clock: Clock) -> Callable[..., Any]:
    """`async with start(configuration) as relay:`; again in the same test it opens the same queue."""

    @asynccontextmanager
    async def started(configuration: config.Configuration, grace: float = 0.0, **settings: Any) -> AsyncIterator[Relay]:
        relay = Relay(tmp_path / "data", configuration, clock, **settings)
        await relay.dispatcher.start()
        try:
            yield relay
        finally:
            await relay.dispatcher.stop(grace)

    return started


@pytest.fixture
def message(make_message: Any, clock: Clock) -> Callable[..., Any]:
    def make(**fields: Any) -> Any:
        return make_message(**{"received_at": clock.now(), **fields})

    return make


def report_of(text: bytes) -> tuple[Any, str, list[Any]]:
    """A notification taken apart: the mail, what a person reads, the fields of each recipient."""
    parsed = email.message_from_bytes(text, policy=email.policy.SMTP)
    assert parsed.get_content_type() == "multipart/report"
    words, fields, _ = parsed.iter_parts()
    return parsed, words.get_content(), list(fields.iter_parts())[1:]


# --- delivered ---
@pytest.mark.parametrize("body", [b"Hello.\r\n", b"0123456789abcdef\r\n" * 20_000])
async def test_what_got_250_is_delivered_and_forgotten(
    start: Any, make_upstream: Any, message: Any, until: Any, tmp_path: Path, body: bytes
) -> None:
    server = await make_upstream()
    async with start(configured(upstream_of(server))) as relay:
        mail = message(body=body)
        reply = await relay.dispatcher.submit(mail)
        assert str(reply) == f"250 2.0.0 OK: queued as {mail.queue_id}"
        await until(lambda: server.received and relay.is_empty)
        assert server.texts() == [b"From: app@example.test\r\nSubject: hello\r\n\r\n" + body]
        assert relay.metric("mailsluice_delivery_attempts_total", upstream="up", result="delivered") == 1
        assert relay.metric("mailsluice_delivery_seconds_count", upstream="up") == 1
        assert relay.metric("mailsluice_queue_bytes") == 0
    assert list((tmp_path / "data" / "bodies").iterdir()) == []


async def test_connections_are_kept_and_limited(start: Any, make_upstream: Any, message: Any, until: Any) -> None:
    server = await make_upstream()
    limits = config.UpstreamLimits(connections=3)
    async with start(configured(upstream_of(server, limits=limits))) as relay:
        await asyncio.gather(*(relay.dispatcher.submit(message()) for _ in range(100)))
        await until(lambda: len(server.received) == 100 and relay.is_empty)
        assert server.most_open <= 3
        assert server.connections <= 3
        assert relay.metric("mailsluice_upstream_connections", upstream="up") == server.open


async def test_a_connection_that_was_closed_while_idle_is_replaced(
    start: Any, make_upstream: Any, message: Any, until: Any
) -> None:
    server = await make_upstream()
    async with start(configured(upstream_of(server))) as relay:
        await relay.dispatcher.submit(message())
        await until(lambda: len(server.received) == 1)
        server.answers["MAIL"] = ["421 4.4.2 idle too long"]  # as it says to whoever speaks next on an old connection
        await relay.dispatcher.submit(message())
        await until(lambda: len(server.received) == 2 and relay.is_empty)
        assert relay.metric("mailsluice_delivery_attempts_total", upstream="up", result="deferred") == 0


async def test_more_than_fits_in_memory_comes_from_the_store(
    start: Any, make_upstream: Any, message: Any, until: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mailsluice_relay.dispatch.lane.LANE_LIMIT", 10)
    monkeypatch.setattr("mailsluice_relay.dispatch.lane.LOGIN_SHARE", 2)
    monkeypatch.setattr("mailsluice_relay.dispatch.dispatcher.CONTENT_MEMORY", 500)
    monkeypatch.setattr("mailsluice_relay.dispatch.dispatcher.PAGE", 7)
    server = await make_upstream()
    async with start(configured(upstream_of(server))) as relay:
        await asyncio.gather(*(relay.dispatcher.submit(message(body=b"%d\r\n" % n)) for n in range(200)))
        await until(lambda: relay.is_empty)
    assert sorted(server.texts()) == sorted(
        b"From: app@example.test\r\nSubject: hello\r\n\r\n%d\r\n" % n for n in range(200)
    )


async def test_a_login_with_much_mail_does_not_delay_another(
    start: Any, make_upstream: Any, message: Any, until: Any
) -> None:
    server = await make_upstream()
    limits = config.UpstreamLimits(connections=1)
    async with start(configured(upstream_of(server, limits=limits))) as relay:
        newsletter = [message(login="newsletter@example.test", body=b"news\r\n") for _ in range(300)]
        await asyncio.gather(*map(relay.dispatcher.submit, newsletter))
        ahead = len(server.received)
        await relay.dispatcher.submit(message(login="accounts@example.test", body=b"password reset\r\n"))
        await until(lambda: relay.is_empty)
        place = next(n for n, text in enumerate(server.texts()) if text.endswith(b"password reset\r\n"))
        assert place < 300 - 50 or ahead > 250
        assert place - ahead < 100


async def test_submitting_goes_on_when_the_session_is_cancelled(
    start: Any, make_upstream: Any, message: Any, until: Any
) -> None:
    server = await make_upstream()
    async with start(configured(upstream_of(server))) as relay:
        task = asyncio.create_task(relay.dispatcher.submit(message()))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: len(server.received) == 1)


async def test_a_server_of_other_peoples_making_takes_the_mail(start: Any, message: Any, until: Any) -> None:
    """aiosmtpd stands for strict servers: no DSN, its own order of checks."""
    taken: list[bytes] = []

    class Handler:
        async def handle_DATA(self, server: Any, session: Any, envelope: Any) -> str:
            taken.append(envelope.original_content)
            return "250 OK"

    controller = Controller(Handler(), hostname="127.0.0.1", port=0)
    loop = asyncio.get_running_loop()
    server = await loop.create_server(controller.factory, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    upstream = config.Upstream(name="up", host="127.0.0.1", port=port, tls=config.UpstreamTLSMode.PLAIN)
    async with start(configured(upstream)) as relay:
        for body in (b".\r\n..\r\n", "é\r\n".encode(), b"x" * 500 + b"\r\n"):
            await relay.dispatcher.submit(message(body=body))
        await until(lambda: relay.is_empty)
    server.close()
    header = b"From: app@example.test\r\nSubject: hello\r\n\r\n"
    expected = [b".\r\n..\r\n", "é\r\n".encode(), b"x" * 500 + b"\r\n"]
    assert sorted(taken) == sorted(header + body for body in expected)


async def test_recipients_stay_together_among_equal_upstreams(
    start: Any, make_upstream: Any, message: Any, until: Any
) -> None:
    servers = [await make_upstream(), await make_upstream()]
    upstreams = [upstream_of(server, f"up{number}") for number, server in enumerate(servers)]
    async with start(configured(*upstreams)) as relay:
        for _ in range(20):
            await relay.dispatcher.submit(message(to=("a@x.test", "b@x.test", "c@x.test")))
        await until(lambda: relay.is_empty)
    assert [len(item.recipients) for server in servers for item in server.received] == [3] * 20
    assert all(server.received for server in servers)


# --- deferred ---
@pytest.mark.parametrize(
    "answers",
    [
        {"RCPT": ["451 4.2.0 busy"]},
        {"MAIL": ["451 4.3.0 not now"]},
        {"DATA": ["451 4.3.0 not now"]},
        {".": ["451 4.3.0 not now"]},
        {"MAIL": ["close", "close"]},
        {".": ["close"]},
    ],
)
async def test_what_is_refused_for_now_comes_again(
    start: Any, make_upstream: Any, message: Any, until: Any, answers: dict[str, list[str]]
) -> None:
    server = await make_upstream(answers=answers)
    async with start(configured(upstream_of(server))) as relay:
        await relay.dispatcher.submit(message())
        await until(lambda: relay.is_empty)
        assert len(server.received) == 1
        assert relay.metric("mailsluice_delivery_attempts_total", upstream="up", result="deferred") >= 1


async def test_each_recipient_has_an_end_of_its_own(start: Any, make_upstream: Any, message: Any, until: Any) -> None:
    server = await make_upstream(
        answers={"RCPT TO:<later@x.test>": ["451 4.2.0 busy"], "RCPT TO:<no@x.test>": "550 5.1.1 nobody of that name"}
    )
    async with start(configured(upstream_of(server))) as relay:
        await relay.dispatcher.submit(message(to=("a@x.test", "later@x.test", "no@x.test")))
        await until(lambda: relay.is_empty)
        mails = [(item.mail.split(" ")[1], [r.split(" ")[1] for r in item.recipients]) for item in server.received]
        assert ("FROM:<app@example.test>", ["TO:<a@x.test>"]) in mails
        assert ("FROM:<app@example.test>", ["TO:<later@x.test>"]) in mails
        assert ("FROM:<>", ["TO:<app@example.test>"]) in mails
        assert len(mails) == 3
        assert relay.metric("mailsluice_bounces_total", **{"class": "permanent"}) == 1


async def test_more_recipients_than_a_transaction_takes(
    start: Any, make_upstream: Any, message: Any, until: Any
) -> None:
    server = await make_upstream(answers={"RCPT TO:<r7@x.test>": ["452 4.5.3 too many recipients"]})
    async with start(configured(upstream_of(server))) as relay:
        await relay.dispatcher.submit(message(to=tuple(f"r{n}@x.test" for n in range(150))))
        await until(lambda: relay.is_empty)
        assert sorted(len(item.recipients) for item in server.received) == [1, 50, 99]
        assert relay.metric("mailsluice_delivery_attempts_total", upstream="up", result="deferred") == 0


async def test_a_restart_continues_where_the_queue_was(
    start: Any, make_upstream: Any, message: Any, until: Any
) -> None:
    server = await make_upstream(answers={"RCPT TO:<later@x.test>": "451 4.2.0 busy"})
    queue = config.Queue(retry=config.Retry(initial=3600.0))
    async with start(configured(upstream_of(server), queue=queue)) as relay:
        await relay.dispatcher.submit(message(to=("a@x.test", "later@x.test")))
        await until(lambda: relay.dispatcher.counts().deferred == 1)
    server.answers.clear()
    async with start(configured(upstream_of(server), queue=queue)) as relay:
        assert relay.metric("mailsluice_queue_messages", state="deferred") == 1
        await relay.dispatcher.flush()
        await until(lambda: relay.is_empty)
    assert [item.recipients[0].split(" ")[1] for item in server.received] == ["TO:<a@x.test>", "TO:<later@x.test>"]


# --- upstreams in trouble ---
async def test_fails_over_to_the_next_priority(start: Any, make_upstream: Any, message: Any, until: Any) -> None:
    broken = await make_upstream(greeting="554 5.7.1 not you")
    backup = await make_upstream()
    upstreams = upstream_of(broken, "first", priority=10), upstream_of(backup, "backup", priority=20)
    async with start(configured(*upstreams)) as relay:
        for _ in range(5):
            await relay.dispatcher.submit(message())
        await until(lambda: relay.is_empty)
        assert len(backup.received) == 5
        await until(lambda: relay.metric("mailsluice_upstream_up", upstream="first") == 0)
        assert relay.metric("mailsluice_upstream_up", upstream="backup") == 1
        state = relay.dispatcher.upstream_states()["first"]
        assert not state.up
        assert "554 5.7.1 not you" in state.last_error


async def test_a_wrong_password_defers_mail_and_bounces_nothing(
    start: Any, make_upstream: Any, message: Any, until: Any, tmp_path: Path
) -> None:
    """Found out before there is any mail; when the password is right, what waited goes."""
    server = await make_upstream(password="right", answers={"AUTH": ["535 5.7.8 wrong-secret is wrong"]})
    upstream = upstream_of(server, credentials="login", allow_plaintext_authentication=True)
    configuration = configured(upstream)
    wrong, right = ({"login.username": b"user", "login.password": value} for value in (b"wrong-secret", b"right"))
    async with start(configuration, credentials=wrong) as relay:
        await until(lambda: not relay.dispatcher.upstream_states()["up"].up)
        state = relay.dispatcher.upstream_states()["up"]
        assert state.failure == "authentication"
        assert state.last_error == "AUTH: 535 5.7.8 *** is wrong"  # whatever the upstream repeats of it
        await relay.dispatcher.submit(message())
        await until(lambda: relay.dispatcher.counts().deferred == 1)
        assert server.received == []
        assert relay.metric("mailsluice_bounces_total", **{"class": "permanent"}) == 0
        relay.dispatcher.reconfigure(configuration, right)
        await until(lambda: relay.is_empty)
        assert len(server.received) == 1
        assert relay.metric("mailsluice_upstream_up", upstream="up") == 1


async def test_an_upstream_that_comes_back_is_noticed(start: Any, make_upstream: Any, message: Any, until: Any) -> None:
    server = await make_upstream()
    await server.stop()
    async with start(configured(upstream_of(server))) as relay:
        await relay.dispatcher.submit(message())
        await until(lambda: relay.metric("mailsluice_upstream_up", upstream="up") == 0)
        await server.start()
        await relay.dispatcher.flush()
        await until(lambda: relay.is_empty)
        assert len(server.received) == 1
        assert relay.metric("mailsluice_upstream_up", upstream="up") == 1


async def test_an_upstream_that_comes_back_is_noticed_though_looking_went_wrong_once(
    start: Any, make_upstream: Any, message: Any, until: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect, faults = pool.connect, list[Exception]()

    async def fails_the_first_probe(*arguments: Any) -> Any:
        if relay.metric("mailsluice_upstream_up", upstream="up") == 0 and not faults:
            faults.append(ValueError("something that nobody thought of"))
            raise faults[0]
        return await connect(*arguments)

    monkeypatch.setattr(pool, "connect", fails_the_first_probe)
    monkeypatch.setattr(breaker, "FIRST_PROBE", 0.05)
    server = await make_upstream()
    await server.stop()
    async with start(configured(upstream_of(server))) as relay:
        await relay.dispatcher.submit(message())
        await until(lambda: faults)
        await server.start()
        await until(lambda: relay.is_empty)
        assert len(server.received) == 1


async def test_throttling_slows_the_upstream_down_and_bounces_nothing(
    start: Any, make_upstream: Any, message: Any, until: Any
) -> None:
    server = await make_upstream(answers={".": ["454 Throttling failure: Maximum sending rate exceeded."]})
    async with start(configured(upstream_of(server))) as relay:
        await relay.dispatcher.submit(message())
        await until(lambda: relay.metric("mailsluice_upstream_throttled_seconds_total", upstream="up") > 0)
        assert relay.dispatcher.upstream_states()["up"].paused_seconds > 0
        await until(lambda: relay.is_empty)
        assert len(server.received) == 1


async def test_messages_per_second(start: Any, make_upstream: Any, message: Any, until: Any) -> None:
    server = await make_upstream()
    limits = config.UpstreamLimits(messages_per_second=20.0)
    async with start(configured(upstream_of(server, limits=limits))) as relay:
        started = time.monotonic()
        await asyncio.gather(*(relay.dispatcher.submit(message()) for _ in range(11)))
        await until(lambda: relay.is_empty)
        assert time.monotonic() - started >= 0.5


async def test_the_days_allowance_sends_the_rest_elsewhere(
    start: Any, make_upstream: Any, message: Any, until: Any
) -> None:
    first, second = await make_upstream(), await make_upstream()
    limits = config.UpstreamLimits(messages_per_day=3, connections=1)
    upstreams = upstream_of(first, "first", limits=limits), upstream_of(second, "second", priority=20)
    async with start(configured(*upstreams)) as relay:
        for _ in range(5):
            await relay.dispatcher.submit(message())
            await until(lambda: relay.is_empty)
    assert (len(first.received), len(second.received)) == (3, 2)


@pytest.mark.parametrize("is_killed", [False, True])
async def test_the_days_allowance_outlives_a_restart_and_a_new_configuration(
    start: Any, make_upstream: Any, message: Any, until: Any, clock: Clock, is_killed: bool, tmp_path: Path
) -> None:
    first, second = await make_upstream(), await make_upstream()

    def upstreams(**limits: int) -> tuple[config.Upstream, ...]:
        mine = config.UpstreamLimits(messages_per_day=5, **limits)
        return upstream_of(first, "first", limits=mine), upstream_of(second, "second", priority=20)

    async def send(relay: Any, number: int) -> None:
        for _ in range(number):
            await relay.dispatcher.submit(message())
        await until(lambda: relay.is_empty)

    async with start(configured(*upstreams())) as relay:
        await send(relay, 2)
        relay.dispatcher.reconfigure(configured(*upstreams(connections=3)), {})
        await send(relay, 1)
        on_disk = (tmp_path / "data/allowances.json").read_bytes()
    if is_killed:
        (tmp_path / "data/allowances.json").write_bytes(on_disk)
    async with start(configured(*upstreams())) as relay:
        await send(relay, 4)
        assert (len(first.received), len(second.received)) == (5, 2)
        clock.ahead += 86400
        await send(relay, 1)
        assert len(first.received) == 6


# --- failed, late, relayed ---
async def test_a_bounce_says_who_why_and_what_to_do(start: Any, make_upstream: Any, message: Any, until: Any) -> None:
    server = await make_upstream(answers={"RCPT TO:<no@x.test>": "550 5.1.1 no such user here"})
    async with start(configured(upstream_of(server))) as relay:
        mail = message(
            to=(Recipient(Mailbox("no", "x.test"), None, "rfc822;old+2Bno@x.test"),),
            header=b"From: app@example.test\r\nMessage-ID: <1@example.test>\r\nSubject: hello\r\n",
            envid="Q+3D1",
            ret="HDRS",
        )
        await relay.dispatcher.submit(mail)
        await until(lambda: relay.is_empty)
    (bounce,) = server.received
    assert bounce.mail.startswith("MAIL FROM:<> ")
    assert bounce.recipients == ["RCPT TO:<app@example.test> NOTIFY=NEVER"]
    parsed, words, (fields,) = report_of(bounce.text)
    assert parsed["Auto-Submitted"] == "auto-replied"
    assert parsed["In-Reply-To"] == "<1@example.test>"
    assert parsed["To"] == "app@example.test"
    assert "no@x.test" in words
    assert "550 5.1.1 no such user here" in words
    assert "Check the address" in words
    assert fields["Final-Recipient"] == "rfc822; no@x.test"
    assert fields["Original-Recipient"] == "rfc822;old+no@x.test"
    assert fields["Action"] == "failed"
    assert fields["Status"] == "5.1.1"
    assert fields["Diagnostic-Code"] == "smtp; 550 5.1.1 no such user here"
    per_message = next(list(parsed.iter_parts())[1].iter_parts())
    assert per_message["Original-Envelope-Id"] == "Q=1"
    assert per_message["Reporting-MTA"] == "dns; relay.test"
    assert b"Subject: hello" in bounce.text
    assert b"Hello." not in bounce.text


async def test_what_came_of_a_logins_recipients_is_told(
    start: Any, make_upstream: Any, message: Any, until: Any
) -> None:
    """Once they are settled: unknown ones apart, and none that is refused for another reason or tried again."""
    answers = {
        "RCPT TO:<none@": "550 5.1.1 no such user",
        "RCPT TO:<old@": "550 no such user here",  # without a code of its own
        "RCPT TO:<full@": "552 5.2.2 mailbox full",
        "RCPT TO:<sender@": "550 5.1.8 your domain does not exist",
        "RCPT TO:<later@": "450 4.1.1 greylisted",
    }
    server = await make_upstream(answers=answers)
    told: list[tuple[str, int, int]] = []
    async with start(configured(upstream_of(server)), on_settled=lambda *settled: told.append(settled)) as relay:
        to = tuple(f"{name}@example.org" for name in ("bob", "none", "old", "full", "sender", "later"))
        await relay.dispatcher.submit(message(to=to, login="ann@example.test"))
        await until(lambda: told)
        assert told == [("ann@example.test", 5, 2)]


async def test_notify_never_is_respected(start: Any, make_upstream: Any, message: Any, until: Any) -> None:
    server = await make_upstream(answers={"RCPT": "550 5.1.1 no"})
    async with start(configured(upstream_of(server))) as relay:
        await relay.dispatcher.submit(message(to=(Recipient(Mailbox("no", "x.test"), Notify.NEVER),)))
        await until(lambda: relay.is_empty)
        assert server.received == []
        assert relay.metric("mailsluice_bounces_total", **{"class": "permanent"}) == 1


async def test_a_notification_is_never_answered(start: Any, make_upstream: Any, message: Any, until: Any) -> None:
    server = await make_upstream(answers={"RCPT": "550 5.1.1 no"})
    async with start(configured(upstream_of(server))) as relay:
        await relay.dispatcher.submit(message())
        await until(lambda: relay.metric("mailsluice_bounces_total", **{"class": "permanent"}) == 2 and relay.is_empty)
        assert server.received == []
        assert sum(command.startswith("MAIL") for command in server.commands) == 2


async def test_what_nobody_else_gets_goes_to_the_bounce_address(
    start: Any, make_upstream: Any, message: Any, until: Any
) -> None:
    server = await make_upstream(
        answers={"RCPT TO:<app@example.test>": "550 5.1.1 no", "RCPT TO:<no@x.test>": "550 no"}
    )
    bounces = config.Bounces(address="bounces@example.test")
    async with start(configured(upstream_of(server), bounces=bounces)) as relay:
        await relay.dispatcher.submit(message(to=("no@x.test",)))
        await until(lambda: relay.is_empty)
    (double,) = server.received
    assert double.recipients == ["RCPT TO:<bounces@example.test> NOTIFY=NEVER"]
    assert b"Final-Recipient: rfc822; app@example.test" in double.text


@pytest.mark.parametrize(
    "refusal",
    [
        {"MAIL FROM:<>": "550 5.1.7 sender needed"},
        {"RCPT TO:<app@": ["553 5.7.1 Sender address rejected: not owned by auth user"]},
        {".": ["550 5.7.60 SMTP; Client does not have permissions to send as this sender"]},
        {".": ["554 Message rejected: Email address is not verified. MAIL FROM is empty"]},
    ],
)
async def test_a_provider_that_refuses_the_null_sender_gets_the_bounce_address(
    start: Any, make_upstream: Any, message: Any, until: Any, refusal: dict[str, Any]
) -> None:
    server = await make_upstream(answers={"RCPT TO:<no@x.test>": "550 no", **refusal})
    bounces = config.Bounces(address="bounces@example.test")
    async with start(configured(upstream_of(server), bounces=bounces)) as relay:
        await relay.dispatcher.submit(message(to=("no@x.test",)))
        await until(lambda: relay.is_empty)
    (bounce,) = server.received
    assert bounce.mail.startswith("MAIL FROM:<bounces@example.test>")
    assert bounce.recipients == ["RCPT TO:<app@example.test> NOTIFY=NEVER"]


async def test_a_late_mail_is_announced_once_and_given_up_at_the_end_of_its_lifetime(
    start: Any, make_upstream: Any, message: Any, until: Any, clock: Clock
) -> None:
    server = await make_upstream(answers={"RCPT TO:<later@x.test>": "451 4.2.0 busy"})
    queue = config.Queue(lifetime=7200.0, delay_warning=3600.0, retry=config.Retry(initial=1000.0, maximum=1000.0))
    async with start(configured(upstream_of(server), queue=queue)) as relay:
        await relay.dispatcher.submit(message(to=("later@x.test",)))
        await until(lambda: relay.dispatcher.counts().deferred == 1)
        assert server.received == []
        for _ in range(2):
            tries = len(server.commands)
            clock.ahead += 3600.0 - 1500.0 * bool(server.received)
            relay.dispatcher._look()  # time has been moved, and nobody noticed
            await until(lambda tries=tries: len(server.commands) > tries)
            await until(lambda: server.received)
        (late,) = server.received
        _, words, (fields,) = report_of(late.text)
        assert (fields["Action"], fields["Status"]) == ("delayed", "4.2.0")
        assert "Nothing needs to be done" in words
        clock.ahead += 7200.0
        relay.dispatcher._look()
        await until(lambda: relay.is_empty)
        assert relay.metric("mailsluice_bounces_total", **{"class": "expired"}) == 1
    _, words, (fields,) = report_of(server.received[1].text)
    assert (fields["Action"], fields["Status"]) == ("failed", "5.4.7")
    assert "not delivered within 2 hours" in words or "451 4.2.0 busy" in words


@pytest.mark.parametrize(("offered", "reports"), [(("DSN",), 0), ((), 1)])
async def test_success_is_reported_by_whoever_is_last_to_know(
    start: Any, make_upstream: Any, message: Any, until: Any, offered: tuple[str, ...], reports: int
) -> None:
    server = await make_upstream(extensions=offered)
    async with start(configured(upstream_of(server))) as relay:
        await relay.dispatcher.submit(message(to=(Recipient(Mailbox("a", "x.test"), Notify.SUCCESS),)))
        await until(lambda: relay.is_empty)
    assert len(server.received) == 1 + reports
    if reports:
        _, _, (fields,) = report_of(server.received[1].text)
        assert (fields["Action"], fields["Status"]) == ("relayed", "2.0.0")


# --- trouble of our own ---
async def test_an_outcome_that_cannot_be_written_is_not_sent_again_but_written_later(
    start: Any, make_upstream: Any, message: Any, until: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = await make_upstream()
    monkeypatch.setattr("mailsluice_relay.dispatch.dispatcher.WRITE_AGAIN", (0.01, 0.02))
    settle, failures = Spool.settle, 0

    async def full_at_first(self: Spool, settlement: Settlement) -> None:
        nonlocal failures
        if failures < 5:
            failures += 1
            raise SpoolFull("no room for the write-ahead log")
        await settle(self, settlement)

    monkeypatch.setattr(Spool, "settle", full_at_first)
    async with start(configured(upstream_of(server))) as relay:
        await relay.dispatcher.submit(message())
        await relay.dispatcher.flush()
        await until(lambda: relay.is_empty)
    assert failures == 5
    assert len(server.received) == 1


async def test_a_fault_of_ours_after_delivery_does_not_send_the_mail_over_and_over(
    start: Any, make_upstream: Any, message: Any, until: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = await make_upstream()

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("mailsluice_relay.dispatch.dispatcher.conclude", broken)
    monkeypatch.setattr("mailsluice_relay.dispatch.dispatcher.GLANCE", 0.01)
    async with start(configured(upstream_of(server))) as relay:
        await relay.dispatcher.submit(message())
        await until(lambda: server.received)
        await relay.dispatcher.flush()
        await relay.dispatcher.submit(message(to=("other@x.test",)))  # what comes after it goes on
        await until(lambda: len(server.received) == 2)
        looks = 0
        fetch = relay.dispatcher._fetch

        async def counted(cursor: Any) -> Any:
            nonlocal looks
            looks += 1
            return await fetch(cursor)

        monkeypatch.setattr(relay.dispatcher, "_fetch", counted)
        await until(lambda: looks >= 5)
        assert len(server.received) == 2
        assert relay.dispatcher.counts().active == 2


# --- queue control ---
async def test_a_held_message_waits_for_a_person(start: Any, make_upstream: Any, message: Any, until: Any) -> None:
    server = await make_upstream()
    async with start(configured(upstream_of(server))) as relay:
        mail = message(held=True, body=b"suspected\r\n")
        assert (await relay.dispatcher.submit(mail)).code == 250
        await relay.dispatcher.submit(message(body=b"other\r\n"))
        await until(lambda: len(server.received) == 1)
        await relay.dispatcher.flush()
        assert relay.dispatcher.counts().held == 1
        assert not await relay.dispatcher.release("NOSUCH")
        assert await relay.dispatcher.release(mail.queue_id)
        await until(lambda: relay.is_empty)
        assert [text[-11:] for text in server.texts()][1] == b"suspected\r\n"


async def test_hold_show_list_requeue_and_remove(start: Any, make_upstream: Any, message: Any, until: Any) -> None:
    server = await make_upstream(answers={"RCPT": "451 4.2.0 busy"})
    queue = config.Queue(retry=config.Retry(initial=3600.0))
    async with start(configured(upstream_of(server), queue=queue)) as relay:
        dispatcher = relay.dispatcher
        mails = [message(login=f"u{n % 2}@example.test", to=(f"r{n}@x.test",)) for n in range(4)]
        for mail in mails:
            await dispatcher.submit(mail)
        await until(lambda: dispatcher.counts().deferred == 4)
        listed = await dispatcher.list_messages(login="u1@example.test")
        assert [row.queue_id for row in listed] == [mails[1].queue_id, mails[3].queue_id]
        assert [row.queue_id for row in await dispatcher.list_messages(recipient="R2@x.test")] == [mails[2].queue_id]
        assert len(await dispatcher.list_messages(limit=3)) == 3
        assert msgspec.json.decode(msgspec.json.encode(listed))[0]["recipients"][0] == {
            "address": "r1@x.test",
            "state": "pending",
            "attempts": 1,
            "reply": "RCPT: 451 4.2.0 busy",
        }
        shown = await dispatcher.show(mails[0].queue_id)
        assert shown is not None
        assert shown.header == "From: app@example.test\r\nSubject: hello\r\n"
        assert await dispatcher.hold(mails[0].queue_id)
        assert [row.queue_id for row in await dispatcher.list_messages(state="held")] == [mails[0].queue_id]
        assert await dispatcher.remove(mails[1].queue_id)
        assert await dispatcher.show(mails[1].queue_id) is None
        server.answers.clear()
        assert await dispatcher.requeue(mails[0].queue_id)
        assert await dispatcher.requeue(mails[2].queue_id)
        await until(lambda: len(server.received) == 2)
        assert await dispatcher.flush() == 1
        await until(lambda: relay.is_empty)
        assert not await dispatcher.remove(mails[2].queue_id)
    assert sorted(item.recipients[0].split(" ")[1] for item in server.received) == [
        "TO:<r0@x.test>",
        "TO:<r2@x.test>",
        "TO:<r3@x.test>",
    ]


async def test_what_waits_in_memory_can_be_held_and_removed(
    start: Any, make_upstream: Any, message: Any, until: Any
) -> None:
    server = await make_upstream(answers={"MAIL": "hang"})
    limits = config.UpstreamLimits(connections=1)
    async with start(configured(upstream_of(server, limits=limits))) as relay:
        await relay.dispatcher.submit(message())
        await until(lambda: any(command.startswith("MAIL") for command in server.commands))
        held, removed = message(), message()
        await relay.dispatcher.submit(held)
        await relay.dispatcher.submit(removed)
        assert await relay.dispatcher.hold(held.queue_id)
        assert await relay.dispatcher.remove(removed.queue_id)
        server.answers.clear()
        await until(lambda: server.received)
        await until(lambda: relay.dispatcher.counts().active + relay.dispatcher.counts().deferred == 0)
        assert relay.dispatcher.counts().held == 1
    assert len(server.received) == 1


# --- by MX records ---
def internet(port: int, **fields: Any) -> config.Upstream:
    return config.Upstream(
        name="internet",
        type=config.UpstreamType.DIRECT_TO_MX,
        port=port,
        tls=config.UpstreamTLSMode.OPPORTUNISTIC,
        **fields,
    )


async def test_mail_goes_to_the_servers_of_its_recipients_and_a_bounce_names_the_one_that_refused(
    start: Any, make_upstream: Any, message: Any, until: Any, names: Any
) -> None:
    one = await make_upstream()
    await make_upstream(address="127.0.0.2", port=one.port, answers={"RCPT TO:<no@": "550 5.1.1 unknown"})
    names.zone = {
        ("one.test", "A"): ["127.0.0.1"],
        ("two.test", "MX"): ["10 mx.two.test."],
        ("mx.two.test", "A"): ["127.0.0.2"],
        ("example.test", "A"): ["127.0.0.1"],
    }
    async with start(configured(internet(one.port)), exchangers=names.exchangers()) as relay:
        await relay.dispatcher.submit(message(to=("a@one.test", "no@two.test", "b@null.test")))
        await until(lambda: len(one.received) == 2)
        await until(lambda: relay.is_empty)
    mail, bounce = one.received
    assert mail.recipients == ["RCPT TO:<a@one.test>"]
    _, words, fields = report_of(bounce.text)
    assert [(item["Status"], item["Remote-MTA"]) for item in fields] == [
        ("5.1.1", "dns; mx.two.test"),
        ("5.1.2", None),
    ]
    assert "there is no such domain" in words


async def test_what_the_internet_cannot_reach_goes_through_the_smarthost(
    start: Any, make_upstream: Any, message: Any, until: Any, names: Any
) -> None:
    smarthost = await make_upstream()
    names.zone = {("down.test", "A"): ["127.0.0.9"]}
    upstreams = (internet(smarthost.port, priority=5), upstream_of(smarthost, "smarthost"))
    async with start(configured(*upstreams), exchangers=names.exchangers()) as relay:
        await relay.dispatcher.submit(message(to=("a@down.test",)))
        await until(lambda: smarthost.received)
        await until(lambda: relay.is_empty)


# --- signed ---
KEY = rsa.generate_private_key(65537, 2048)
SIGNING = {
    "dkim.key": KEY.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
}


def signing(selector: str) -> tuple[config.Dkim, ...]:
    return (config.Dkim(domain="example.test", selector=selector, key="dkim.key"),)


def selector_that_verifies(text: bytes) -> str:
    public = KEY.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    asked = []

    def look_up(name: bytes, timeout: int = 5) -> bytes:
        asked.append(name.decode().split(".")[0])
        return b"v=DKIM1; k=rsa; p=" + base64.b64encode(public)

    assert dkim.verify(text, dnsfunc=look_up)
    return asked[0]


@pytest.mark.parametrize("body", [b"Hello.\r\n", b".dots and  blanks \r\n" * 30_000])
async def test_mail_arrives_signed_and_a_new_key_is_used_from_the_next_mail_on(
    start: Any, make_upstream: Any, message: Any, until: Any, body: bytes
) -> None:
    server = await make_upstream()
    configuration = configured(upstream_of(server), dkim=signing("old"))
    async with start(configuration, credentials=SIGNING) as relay:
        await relay.dispatcher.submit(message(body=body))
        await until(lambda: server.received)
        relay.dispatcher.reconfigure(msgspec.structs.replace(configuration, dkim=signing("new")), SIGNING)
        await relay.dispatcher.submit(message(body=body))
        await until(lambda: len(server.received) == 2)
    assert [selector_that_verifies(text) for text in server.texts()] == ["old", "new"]


async def test_our_own_notifications_are_signed_for_the_bounce_address(
    start: Any, make_upstream: Any, message: Any, until: Any
) -> None:
    server = await make_upstream(answers={"RCPT TO:<no@": "550 5.1.1 unknown"})
    bounces = config.Bounces(address="bounces@example.test")
    async with start(
        configured(upstream_of(server), dkim=signing("s1"), bounces=bounces), credentials=SIGNING
    ) as relay:
        await relay.dispatcher.submit(message(sender="app@elsewhere.test", to=("no@example.org",)))
        await until(lambda: server.received)
    assert server.received[0].mail.startswith("MAIL FROM:<>")
    assert selector_that_verifies(server.texts()[0]) == "s1"


async def test_mail_of_another_domain_goes_as_it_is(start: Any, make_upstream: Any, message: Any, until: Any) -> None:
    server = await make_upstream()
    async with start(configured(upstream_of(server), dkim=signing("s1")), credentials=SIGNING) as relay:
        await relay.dispatcher.submit(message(header=b"From: a@elsewhere.test\r\n"))
        await until(lambda: server.received)
    assert server.texts()[0].startswith(b"From:")


# --- what it will not do ---
def test_what_this_release_does_not_do_is_refused_by_name(tmp_path: Path, clock: Clock) -> None:
    good = config.Upstream(name="a", host="a.test")
    cases = [
        (configured(config.Upstream(name="a")), r"upstreams\[0\]\.host"),
        (configured(good, good), r"upstreams\[1\]\.name"),
        (configured(config.Upstream(name="a", host="a", credentials="c")), r"c\.username is missing"),
        (configured(config.Upstream(name="a", host="a", ca="ca.crt")), r"ca\.crt is missing"),
        (configured(good, dkim=signing("s1")), r"dkim\[0\]\.key"),
    ]
    for configuration, named in cases:
        with pytest.raises(config.ConfigurationError, match=named):
            Relay(tmp_path / "data", configuration, clock)


async def test_a_bad_configuration_changes_nothing(start: Any, make_upstream: Any, message: Any, until: Any) -> None:
    server = await make_upstream()
    async with start(configured(upstream_of(server))) as relay:
        with pytest.raises(config.ConfigurationError):
            relay.dispatcher.reconfigure(configured(upstream_of(server, "new"), config.Upstream(name="no-host")), {})
        await relay.dispatcher.submit(message())
        await until(lambda: relay.is_empty)
        assert relay.metric("mailsluice_delivery_attempts_total", upstream="up", result="delivered") == 1


async def test_a_new_upstream_takes_what_waits_for_the_old_one(
    start: Any, make_upstream: Any, message: Any, until: Any
) -> None:
    slow = await make_upstream(answers={"MAIL": "hang"})
    fast = await make_upstream()
    old = configured(upstream_of(slow, "old", limits=config.UpstreamLimits(connections=1)))
    async with start(old) as relay:
        for _ in range(5):
            await relay.dispatcher.submit(message())
        await until(lambda: any(command.startswith("MAIL") for command in slow.commands))
        relay.dispatcher.reconfigure(configured(upstream_of(fast, "new")), {})
        await until(lambda: relay.is_empty)
        assert len(fast.received) == 5
        assert set(relay.dispatcher.upstream_states()) == {"new"}


# --- coming and going ---
async def test_refuses_when_full_and_takes_mail_again(start: Any, make_upstream: Any, message: Any) -> None:
    server = await make_upstream(answers={"RCPT": "451 4.2.0 busy"})
    queue = config.Queue(maximum_messages=2, retry=config.Retry(initial=3600.0))
    async with start(configured(upstream_of(server), queue=queue)) as relay:
        mails = [message() for _ in range(3)]
        replies = [await relay.dispatcher.submit(mail) for mail in mails]
        assert [reply.code for reply in replies] == [250, 250, 452]
        assert replies[2].status == "4.3.1"
        full = relay.dispatcher.refuses()
        assert full is not None
        assert (full.code, full.status) == (452, "4.3.1")
        await relay.dispatcher.remove(mails[0].queue_id)
        assert relay.dispatcher.refuses() is None


async def test_a_pod_that_is_to_go_takes_nothing_and_delivers_at_once(
    start: Any, make_upstream: Any, message: Any, until: Any
) -> None:
    server = await make_upstream(answers={"RCPT": ["451 4.2.0 busy"]})
    queue = config.Queue(retry=config.Retry(initial=3600.0))
    async with start(configured(upstream_of(server), queue=queue), ordinal=2) as relay:
        assert relay.dispatcher.refuses() is None
        await relay.dispatcher.submit(message())
        await until(lambda: relay.dispatcher.counts().deferred == 1)
        relay.dispatcher.reconfigure(configured(upstream_of(server), queue=queue, drain_from_ordinal=2), {})
        refusal = relay.dispatcher.refuses()
        assert refusal is not None
        assert (refusal.code, relay.dispatcher.draining) == (421, True)
        await until(lambda: relay.is_empty)
        relay.dispatcher.reconfigure(configured(upstream_of(server), queue=queue, drain_from_ordinal=3), {})
        assert relay.dispatcher.refuses() is None


async def test_stop_delivers_what_goes_and_keeps_the_rest(
    start: Any, make_upstream: Any, message: Any, until: Any
) -> None:
    server = await make_upstream(answers={"RCPT TO:<later@x.test>": "451 4.2.0 busy"})
    queue = config.Queue(retry=config.Retry(initial=3600.0))
    configuration = configured(upstream_of(server), queue=queue)
    async with start(configuration, grace=20.0) as relay:
        mails = [message() for _ in range(50)] + [message(to=("later@x.test",))]
        await asyncio.gather(*map(relay.dispatcher.submit, mails))
        stopping = time.monotonic()
    assert time.monotonic() - stopping < 10
    assert len(server.received) == 50
    async with start(configuration) as relay:
        assert relay.dispatcher.counts().deferred == 1


async def test_stop_ends_on_time_when_an_upstream_hangs(
    start: Any, make_upstream: Any, message: Any, until: Any
) -> None:
    server = await make_upstream(answers={"MAIL": "hang"})
    configuration = configured(upstream_of(server))
    async with start(configuration, grace=0.2) as relay:
        await relay.dispatcher.submit(message())
        await until(lambda: any(command.startswith("MAIL") for command in server.commands))
        stopping = time.monotonic()
    assert time.monotonic() - stopping < 5
    server.answers.clear()
    async with start(configuration) as relay:
        await until(lambda: relay.is_empty)
    assert len(server.received) == 1


async def test_staging_sends_everything_to_one_address(
    start: Any, make_upstream: Any, message: Any, until: Any
) -> None:
    server = await make_upstream()
    recipients = config.Recipients(redirect_to="staging@example.test")
    async with start(configured(upstream_of(server), recipients=recipients)) as relay:
        await relay.dispatcher.submit(message(to=("a@customer.test", "b@customer.test")))
        await until(lambda: relay.is_empty)
    assert [item.recipients for item in server.received] == [["RCPT TO:<staging@example.test>"]]
