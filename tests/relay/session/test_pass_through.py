"""`queue.mode: PassThrough` from end to end: client, relay, upstream. Nothing is kept; the upstream's word counts."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from mailsluice_relay import config
from mailsluice_relay.admission import Admission
from mailsluice_relay.config import Configuration, ConfigurationError, Queue, QueueMode, Upstream, UpstreamTLSMode
from mailsluice_relay.delivery.client import Timeouts
from mailsluice_relay.delivery.outcome import Failed, FailureClass, Retry, Stage
from mailsluice_relay.dispatch import Dispatcher
from mailsluice_relay.dispatch.passage import told
from mailsluice_relay.dispatch.upstreams import Upstreams
from mailsluice_relay.listener import Listeners
from mailsluice_relay.metrics import Metrics
from mailsluice_relay.reply import Reason, Reply

SHORT = Timeouts(connect=2, greeting=1, command=1, data=1, block=1, end_of_data=1, quit=0.5)
TEXT = b"From: app@example.test\r\nSubject: hello\r\n\r\nHello.\r\n.\r\n"


class Client:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def say(self, *lines: bytes) -> list[str]:
        """The replies to lines that go in one write."""
        self.writer.write(b"".join(line + b"\r\n" for line in lines))
        return [await self.reply() for _ in lines]

    async def send(self, *recipients: str, text: bytes = TEXT, sender: str = "app@example.test") -> list[str]:
        """A whole transaction; the replies to each RCPT and to the text."""
        commands = [f"MAIL FROM:<{sender}>", *(f"RCPT TO:<{address}>" for address in recipients), "DATA"]
        *replies, go = await self.say(*(command.encode() for command in commands))
        if not go.startswith("354"):
            return [*replies[1:], go]
        self.writer.write(text)
        return [*replies[1:], await self.reply()]

    async def reply(self) -> str:
        async with asyncio.timeout(10):
            while (line := await self.reader.readline())[3:4] == b"-":
                pass
        return line.decode().rstrip("\r\n")


class Chain:
    """A relay that passes through."""

    def __init__(
        self, configuration: Configuration, credentials: config.Credentials, directory: Path, exchangers: Any
    ) -> None:
        self.metrics = Metrics()
        clocks: dict[str, Any] = {"now": time.time, "monotonic": time.monotonic}
        self.directory = directory
        self.dispatcher = Dispatcher(
            configuration,
            credentials,
            directory=directory,
            metrics=self.metrics,
            random=random.Random(1),
            timeouts=SHORT,
            exchangers=exchangers,
            **clocks,
        )
        self.admission = Admission(configuration, metrics=self.metrics, **clocks)
        self.listeners = Listeners(
            configuration,
            credentials,
            bind=("127.0.0.1",),
            admission=self.admission,
            dispatcher=self.dispatcher,
            metrics=self.metrics,
            **clocks,
        )
        self.metrics.configure(configuration, {})

    async def client(self) -> Client:
        client = Client(*await asyncio.open_connection(*self.listeners.addresses["open"]))
        await client.reply()
        await client.say(b"EHLO client.test")
        return client

    def metric(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(name, labels) or 0.0

    def series(self) -> set[tuple[str, frozenset[tuple[str, str]]]]:
        samples = [sample for family in self.metrics.registry.collect() for sample in family.samples]
        return {(sample.name, frozenset(sample.labels.items())) for sample in samples}

    @property
    def has_nothing(self) -> bool:
        counts = self.dispatcher.counts()
        return counts.active + counts.deferred + counts.held == 0 and not list(self.directory.rglob("*.body"))


def upstream_of(server: Any, name: str = "up", **fields: Any) -> Upstream:
    return Upstream(name=name, host="127.0.0.1", port=server.port, tls=UpstreamTLSMode.PLAIN, **fields)


StartChain = Callable[..., Any]


@pytest.fixture
def start(configuration: Configuration, credentials: config.Credentials, tmp_path: Path) -> StartChain:
    @asynccontextmanager
    async def started(*upstreams: Upstream, exchangers: Any = None, **changes: Any) -> AsyncIterator[Chain]:
        settings = {
            "queue": Queue(mode=QueueMode.PASS_THROUGH),
            "limits": config.Limits(message_size=30_000_000),
            "upstreams": upstreams,
            **changes,
        }
        wanted = msgspec.structs.replace(configuration, **settings)
        chain = Chain(wanted, credentials, tmp_path / "data", exchangers)
        await chain.dispatcher.start()
        await chain.listeners.start()
        try:
            yield chain
        finally:
            await chain.listeners.stop(0.0)
            await chain.dispatcher.stop(0.0)
            await chain.admission.close()

    return started


# --- taken ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("size", [10, 1_000_000])
async def test_250_is_the_upstreams_and_nothing_is_kept(start: StartChain, make_upstream: Any, size: int) -> None:
    server = await make_upstream(answers={".": "250 2.6.0 as upstream-4711"})
    line = b"0123456789 .\r\n"
    text = TEXT[:-3] + line * (size // len(line)) + b".\r\n"
    async with start(upstream_of(server)) as chain:
        client = await chain.client()
        replies = await client.send("a@example.org", "b@example.org", text=text)
        assert [reply[:9] for reply in replies] == ["250 2.1.5", "250 2.1.5", "250 2.0.0"]
        assert replies[-1].endswith("250 2.6.0 as upstream-4711")
        assert chain.has_nothing
        assert chain.metric("mailsluice_delivery_attempts_total", upstream="up", result="delivered") == 2
    (received,) = server.received
    assert received.recipients == ["RCPT TO:<a@example.org>", "RCPT TO:<b@example.org>"]
    assert received.text.endswith(b"Hello.\r\n" + line * (size // len(line)))
    assert b"Received: from client.test" in received.text


@pytest.mark.parametrize("answer", ["250 2.0.0 ok", "450 4.2.1 later", "550 5.7.1 never", "421 4.3.2 no more"])
@pytest.mark.parametrize("step", ["MAIL", "RCPT", "."])
async def test_no_answer_of_the_upstream_makes_a_metric_series(
    start: StartChain, make_upstream: Any, until: Any, step: str, answer: str
) -> None:
    server = await make_upstream(answers={step: answer})
    async with start(upstream_of(server)) as chain:
        before = chain.series()
        client = await chain.client()
        await client.send("a@example.org")
        client.writer.close()
        await until(lambda: chain.metric("mailsluice_sessions_active", listener="open") == 0)
        assert chain.series() - before == set()


async def test_250_waits_for_the_upstreams(start: StartChain, make_upstream: Any, until: Any) -> None:
    server = await make_upstream(answers={".": "hang"})
    async with start(upstream_of(server)) as chain:
        client = await chain.client()
        replies = await client.send("a@example.org")
    assert replies[-1].startswith("451 4.4.1"), "no answer is no 250"


async def test_one_connection_carries_one_transaction_after_the_other(start: StartChain, make_upstream: Any) -> None:
    server = await make_upstream()
    async with start(upstream_of(server)) as chain:
        for _ in range(3):
            client = await chain.client()
            for _ in range(3):
                assert (await client.send("a@example.org"))[-1].startswith("250")
    assert len(server.received) == 9
    assert server.connections == 1


async def test_a_connection_that_was_closed_while_idle_is_replaced(
    start: StartChain, make_upstream: Any, until: Any
) -> None:
    server = await make_upstream()
    async with start(upstream_of(server)) as chain:
        client = await chain.client()
        assert (await client.send("a@example.org"))[-1].startswith("250")
        await server.stop()
        await server.start()
        assert (await client.send("a@example.org"))[-1].startswith("250")
    assert len(server.received) == 2


# --- refused ----------------------------------------------------------------------------------------------------------
async def test_each_recipient_has_the_upstreams_own_answer(start: StartChain, make_upstream: Any) -> None:
    server = await make_upstream(
        answers={
            "RCPT TO:<no@": "550 5.1.1 no such user here",
            "RCPT TO:<later@": "450 4.2.1 greylisted, come again",
            "RCPT TO:<full@": "452 4.5.3 enough",
            "RCPT TO:<old@": "550 go away",
        }
    )
    async with start(upstream_of(server)) as chain:
        client = await chain.client()
        addresses = [f"{name}@example.org" for name in ("a", "no", "later", "full", "old", "b")]
        replies = await client.send(*addresses)
    assert replies[:6] == [
        "250 2.1.5 Recipient OK",
        "550 5.1.1 no such user here",
        "450 4.2.1 greylisted, come again",
        "452 4.5.3 enough",
        "550 5.1.1 go away",
        "250 2.1.5 Recipient OK",
    ]
    assert replies[6].startswith("250")
    assert server.received[0].recipients == ["RCPT TO:<a@example.org>", "RCPT TO:<b@example.org>"]


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ({"MAIL": "550 5.7.1 not as this sender"}, "550 5.7.1 not as this sender"),
        ({"MAIL": "452 4.3.1 no room"}, "451 4.4.1"),
        ({"DATA": "554 5.7.1 no"}, "554 5.7.1 no"),
        ({".": "554 5.7.1 spam"}, "554 5.7.1 spam"),
        ({".": "451 4.6.0 odd"}, "451 4.6.0 odd"),
        ({".": "454 4.7.0 Too many messages"}, "451 4.7.0 Too many messages"),
        ({".": "550 5.4.5 Daily user sending limit exceeded"}, "451 4.4.5 Daily user sending limit exceeded"),
        ({".": "close"}, "451 4.4.1"),
        ({"RCPT": "close"}, "451 4.4.1"),
        ({"MAIL": "530 5.7.0 Authentication required"}, "451 4.4.1"),
    ],
)
async def test_refusals_pass_through_and_our_own_trouble_stays_ours(
    start: StartChain, make_upstream: Any, answers: dict[str, str], expected: str
) -> None:
    server = await make_upstream(answers=dict(answers))
    async with start(upstream_of(server)) as chain:
        client = await chain.client()
        replies = await client.send("a@example.org")
        told_at = 0 if next(iter(answers)) in {"MAIL", "RCPT"} else 1
        assert replies[told_at].startswith(expected)
        assert (await client.say(b"NOOP"))[0].startswith("250"), "the client's own session goes on"
        assert chain.has_nothing
    assert server.received == []


async def test_a_refused_message_is_none_of_the_accepted(start: StartChain, make_upstream: Any, until: Any) -> None:
    server = await make_upstream(answers={".": "554 5.7.1 spam"})
    async with start(upstream_of(server)) as chain:
        client = await chain.client()
        await client.send("a@example.org")
        await client.say(b"QUIT")
        labels = {"listener": "open", "result": "rejected", "reason": "upstream_refused"}
        await until(lambda: chain.metric("mailsluice_sessions_total", **labels) == 1)


async def test_an_upstream_that_is_lost_between_recipients_takes_all_or_nothing(
    start: StartChain, make_upstream: Any
) -> None:
    """The first was told 250, and is gone with the upstream: the client is told so, and nobody gets half the mail."""
    server = await make_upstream(answers={"RCPT TO:<b@": "close"})
    other = await make_upstream()
    async with start(upstream_of(server), upstream_of(other, "other", priority=20)) as chain:
        client = await chain.client()
        replies = await client.send("a@example.org", "b@example.org", "c@example.org")
        assert [reply[:9] for reply in replies] == ["250 2.1.5", "451 4.4.1", "451 4.4.1", "451 4.4.1"]
        assert (await client.send("a@example.org"))[-1].startswith("250")
    assert server.received + other.received != []
    assert sum(len(item.recipients) for item in server.received + other.received) == 1


# --- routes -----------------------------------------------------------------------------------------------------------
async def test_who_goes_another_way_is_told_to_come_again(start: StartChain, make_upstream: Any, until: Any) -> None:
    one, two = await make_upstream(), await make_upstream()
    async with start(upstream_of(one, "one", match_recipients=("*@one.test",)), upstream_of(two, "two")) as chain:
        client = await chain.client()
        replies = await client.send("a@one.test", "b@two.test", "c@one.test")
        assert [reply[:9] for reply in replies] == ["250 2.1.5", "452 4.5.3", "250 2.1.5", "250 2.0.0"]
        assert (await client.send("b@two.test"))[-1].startswith("250")
        await client.say(b"QUIT")
    assert one.received[0].recipients == ["RCPT TO:<a@one.test>", "RCPT TO:<c@one.test>"]
    assert two.received[0].recipients == ["RCPT TO:<b@two.test>"]


async def test_a_refused_first_recipient_decides_nothing(start: StartChain, make_upstream: Any) -> None:
    one, two = await make_upstream(answers={"RCPT": "550 5.1.1 no"}), await make_upstream()
    async with start(upstream_of(one, "one", match_recipients=("*@one.test",)), upstream_of(two, "two")) as chain:
        client = await chain.client()
        replies = await client.send("a@one.test", "b@two.test")
    assert [reply[:9] for reply in replies] == ["550 5.1.1", "250 2.1.5", "250 2.0.0"]


async def test_fails_over_before_anybody_was_taken(start: StartChain, make_upstream: Any) -> None:
    down, up = await make_upstream(), await make_upstream()
    await down.stop()
    async with start(upstream_of(down, "down"), upstream_of(up, "up", priority=20)) as chain:
        client = await chain.client()
        assert (await client.send("a@example.org", "b@example.org"))[-1].startswith("250")
    assert len(up.received[0].recipients) == 2


async def test_without_an_upstream_clients_come_again(start: StartChain, make_upstream: Any) -> None:
    down = await make_upstream()
    await down.stop()
    async with start(upstream_of(down)) as chain:
        client = await chain.client()
        assert (await client.send("a@example.org"))[0].startswith("451 4.4.1")


async def test_staging_sends_everything_to_one_address_once(start: StartChain, make_upstream: Any) -> None:
    server = await make_upstream()
    async with start(upstream_of(server), recipients=config.Recipients(redirect_to="stage@example.test")) as chain:
        client = await chain.client()
        replies = await client.send("a@example.org", "b@example.org")
        assert [reply[:3] for reply in replies] == ["250", "250", "250"]
    assert server.received[0].recipients == ["RCPT TO:<stage@example.test>"]


async def test_by_mx_records_each_domain_is_a_route_of_its_own(
    start: StartChain, make_upstream: Any, names: Any
) -> None:
    one = await make_upstream()
    two = await make_upstream(address="127.0.0.2", port=one.port)
    names.zone = {("one.test", "A"): ["127.0.0.1"], ("two.test", "A"): ["127.0.0.2"], ("null.test", "MX"): ["0 ."]}
    internet = Upstream(
        name="internet",
        type=config.UpstreamType.DIRECT_TO_MX,
        port=one.port,
        tls=UpstreamTLSMode.OPPORTUNISTIC,
    )
    async with start(internet, exchangers=names.exchangers()) as chain:
        client = await chain.client()
        replies = await client.send("x@null.test", "a@one.test", "b@two.test", "c@one.test")
        assert [reply[:10].rstrip() for reply in replies] == [
            "550 5.1.10",
            "250 2.1.5",
            "452 4.5.3",
            "250 2.1.5",
            "250 2.0.0",
        ]
        assert (await client.send("b@two.test"))[-1].startswith("250")
    assert one.received[0].recipients == ["RCPT TO:<a@one.test>", "RCPT TO:<c@one.test>"]
    assert two.received[0].recipients == ["RCPT TO:<b@two.test>"]


# --- given up ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("end", [b"RSET", b"EHLO client.test", b"QUIT", None])
async def test_a_transaction_that_is_given_up_leaves_nothing_at_the_upstream(
    start: StartChain, make_upstream: Any, until: Any, end: bytes | None
) -> None:
    server = await make_upstream()
    async with start(upstream_of(server, limits=config.UpstreamLimits(connections=1))) as chain:
        client = await chain.client()
        await client.say(b"MAIL FROM:<app@example.test>", b"RCPT TO:<victim@example.org>")
        if end is None:
            client.writer.close()
        else:
            await client.say(end)
        # The one connection is free again, and begins anew.
        another = await chain.client()
        assert (await another.send("a@example.org"))[-1].startswith("250")
    assert [item.recipients for item in server.received] == [["RCPT TO:<a@example.org>"]]
    assert "RSET" in server.commands
    assert server.connections == 1


async def test_a_client_that_hangs_up_after_its_last_dot_has_handed_its_mail_over(
    start: StartChain, make_upstream: Any, until: Any
) -> None:
    server = await make_upstream()
    async with start(upstream_of(server)) as chain:
        client = await chain.client()
        await client.say(b"MAIL FROM:<app@example.test>", b"RCPT TO:<a@example.org>", b"DATA")
        client.writer.write(TEXT)
        client.writer.close()
        await until(lambda: server.received)
    assert len(server.received) == 1


async def test_what_admission_refuses_the_upstream_never_sees(start: StartChain, make_upstream: Any) -> None:
    server = await make_upstream()
    async with start(upstream_of(server)) as chain:
        client = await chain.client()
        forged = TEXT.replace(b"app@example.test", b"boss@elsewhere.test")
        assert (await client.send("a@example.org", text=forged))[-1].startswith("550 5.7.1")
        assert (await client.send("a@example.org"))[-1].startswith("250")
    assert len(server.received) == 1


# --- what the next server cannot take ---------------------------------------------------------------------------------
async def test_too_big_for_the_upstream_is_told_before_or_after_the_text(start: StartChain, make_upstream: Any) -> None:
    server = await make_upstream(extensions=("SIZE 1000",))
    async with start(upstream_of(server)) as chain:
        client = await chain.client()
        replies = await client.say(b"MAIL FROM:<app@example.test> SIZE=2000", b"RCPT TO:<a@example.org>", b"RSET")
        assert replies[1].startswith("552 5.3.4")
        text = TEXT[:-3] + b"x" * 900 + b"\r\n" + b"y" * 900 + b"\r\n.\r\n"
        assert (await client.send("a@example.org", text=text))[-1].startswith("552 5.3.4")
        assert (await client.send("a@example.org"))[-1].startswith("250")


async def test_utf8_needs_an_upstream_that_takes_it(start: StartChain, make_upstream: Any) -> None:
    server = await make_upstream(extensions=("8BITMIME",))
    async with start(upstream_of(server)) as chain:
        client = await chain.client()
        replies = await client.say(
            b"MAIL FROM:<app@example.test> SMTPUTF8", "RCPT TO:<ü@example.org>".encode(), b"RSET"
        )
        assert replies[1].startswith("550 5.6.7")
        mail = await client.say(b"MAIL FROM:<app@example.test> SMTPUTF8", b"RCPT TO:<a@example.org>", b"DATA")
        assert mail[2].startswith("354")
        client.writer.write(TEXT.replace(b"hello", "grüße".encode()))
        assert (await client.reply()).startswith("550 5.6.7")
    assert server.received == []


# --- all or nothing, whatever happens ---------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", range(12))
async def test_who_was_told_250_got_it_once_and_nobody_else(start: StartChain, make_upstream: Any, seed: int) -> None:
    """Two routes, and upstreams that refuse, defer, break off or close at any step, at random."""
    chance = random.Random(seed)
    refusals = ("250 2.1.5 yes", "550 5.1.1 no", "450 4.2.0 later", "452 4.5.3 full", "close", "421 4.3.2 bye")

    def mood() -> dict[str, str | list[str]]:
        return {
            "MAIL": chance.choices(("250 2.1.0 yes", "550 5.7.1 no", "close"), (8, 1, 1), k=9),
            "RCPT": chance.choices(refusals, (10, 2, 2, 1, 1, 1), k=30),
            "DATA": chance.choices(("354 go", "451 4.3.0 not now", "close"), (8, 1, 1), k=9),
            ".": chance.choices(("250 2.0.0 yes", "554 5.6.0 no", "close"), (6, 1, 1), k=9),
        }

    servers = [await make_upstream(answers=mood()) for _ in range(3)]
    upstreams = (
        upstream_of(servers[0], "one", match_recipients=("*@one.test",)),
        upstream_of(servers[1], "two"),
        upstream_of(servers[2], "backup", priority=20),
    )
    expected: list[tuple[bytes, list[str]]] = []
    async with start(*upstreams) as chain:
        for number in range(8):
            client = await chain.client()
            to = [f"u{index}@{chance.choice(('one', 'two'))}.test" for index in range(chance.randint(1, 3))]
            marked = TEXT.replace(b"hello", str(number).encode())
            *answers, last = await client.send(*to, text=marked)
            if last.startswith("250"):
                told_yes = [a for a, answer in zip(to, answers, strict=True) if answer.startswith("250")]
                expected.append((str(number).encode(), told_yes))
            client.writer.close()
    delivered = [
        (item.text.partition(b"Subject: ")[2].partition(b"\r\n")[0], [r[9:-1] for r in item.recipients])
        for server in servers
        for item in server.received
    ]
    assert sorted(delivered) == sorted(expected)


# --- words ------------------------------------------------------------------------------------------------------------
def test_what_a_client_is_told() -> None:
    assert told(Failed(FailureClass.MAILBOX, Stage.RECIPIENT, "x", "5.1.1", Reply(550, "", "näh"))).reply == Reply(
        550, "5.1.1", "n\\xe4h"
    )
    secret = Retry(FailureClass.AUTHENTICATION, Stage.MAIL, "x", Reply(530, "5.7.0", "log in as platform@example.test"))
    verdict = told(secret)
    assert verdict.reason is Reason.UPSTREAM_UNAVAILABLE
    assert "platform" not in str(verdict.reply)


def test_holding_mail_needs_a_queue(configuration: Configuration) -> None:
    wanted = msgspec.structs.replace(
        configuration, queue=Queue(mode=QueueMode.PASS_THROUGH), spam=config.Spam(hold_at=6.0)
    )
    with pytest.raises(ConfigurationError, match=r"spam\.holdAt"):
        Upstreams.prepare(wanted, {})
