"""What engines are sent and what is made of their answers: servers on real sockets that say what a test tells them to,
late, in pieces, too much, or nothing at all."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field

import pytest

from mailsluice_relay.admission import Admission, Judgement
from mailsluice_relay.config import (
    Authentication,
    Configuration,
    ConfigurationError,
    Engine,
    EngineType,
    FailureAction,
    Listener,
    RateLimit,
    RateLimitUnit,
    Relay,
    Spam,
    Upstream,
    User,
)
from mailsluice_relay.envelope import Client, Content, Envelope, Login, Mailbox, Recipient, TLSState
from mailsluice_relay.metrics import Metrics
from mailsluice_relay.reply import Reason
from mailsluice_relay.suspicion.engine import MAXIMUM_ANSWER, EngineVerdict, Submission
from mailsluice_relay.suspicion.panel import REST, TIMEOUTS, Answer, Panel
from mailsluice_relay.suspicion.spamassassin import MAXIMUM_SENT

Until = Callable[..., Awaitable[None]]
Behaviour = Callable[["Server", asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]

MEGABYTE = 1024 * 1024


@dataclass
class Server:
    """A server that does as it is told with each connection, and keeps what it was sent."""

    behaviour: Behaviour
    port: int = 0
    received: list[bytes] = field(default_factory=list)
    connections: int = 0
    _server: asyncio.Server | None = None
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        try:
            await self.behaviour(self, reader, writer)
            await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the relay gave up: that is what some tests are about
        finally:
            writer.close()
            self._tasks.discard(task)


MakeServer = Callable[[Behaviour], Awaitable[Server]]


@pytest.fixture
async def make_server() -> AsyncIterator[MakeServer]:
    servers: list[Server] = []

    async def make(behaviour: Behaviour) -> Server:
        server = Server(behaviour)
        servers.append(server)
        await server.start()
        return server

    yield make
    for server in servers:
        await server.stop()


def says(answer: bytes) -> Behaviour:
    """Reads to the end of the request, and answers."""

    async def behaviour(server: Server, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server.received.append(await request_of(reader))
        writer.write(answer)

    return behaviour


def http(body: bytes, status: str = "200 OK") -> Behaviour:
    return says(b"HTTP/1.1 %s\r\nContent-Length: %d\r\n\r\n%s" % (status.encode(), len(body), body))


async def request_of(reader: asyncio.StreamReader) -> bytes:
    """One request: HTTP has its length in the head, the others end it themselves."""
    first = await reader.readexactly(4)
    if first != b"POST":
        return first + await reader.read(-1)
    head = first + await reader.readuntil(b"\r\n\r\n")
    found = re.search(rb"(?i)content-length: *([0-9]+)", head)
    assert found is not None
    return head + await reader.readexactly(int(found[1]))


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Octets:
    octets: bytes

    @property
    def size(self) -> int:
        return len(self.octets)

    def chunks(self) -> Iterator[bytes]:
        for start in range(0, len(self.octets), 64 * 1024):
            yield self.octets[start : start + 64 * 1024]

    def close(self) -> None:
        pass


def submission(body: bytes = b"Hello.\r\n", **more: object) -> Submission:
    settings: dict[str, object] = {
        "content": Content(b"From: ann@example.test\r\n", Octets(body)),
        "queue_id": "Q1",
        "login": "ann@example.test",
        "client_address": "192.0.2.7",
        "hello": "app-1",
        "sender": Mailbox("ann", "example.test"),
        "recipients": (Mailbox("bob", "other.test"), Mailbox("eve", "other.test")),
        **more,
    }
    return Submission(**settings)  # type: ignore[arg-type] - a test names the fields that it means


def engine(kind: EngineType, server: Server, **more: object) -> Engine:
    where = f"127.0.0.1:{server.port}"
    settings: dict[str, object] = {
        "name": kind.lower(),
        "type": kind,
        "timeout": 5.0,
        **({"url": f"http://{where}"} if kind is EngineType.RSPAMD else {"address": where}),
        **more,
    }
    return Engine(**settings)  # type: ignore[arg-type] - a test names the fields that it means


async def ask(kind: EngineType, server: Server, mail: Submission | None = None, **more: object) -> Answer:
    (answer,) = await Panel((engine(kind, server, **more),), Clock()).ask(mail or submission())
    return answer


WHOLE = b"From: ann@example.test\r\n\r\nHello.\r\n"


# --- what is sent, and what is understood -----------------------------------------------------------------------------


async def test_clamd_gets_chunks_with_their_length_and_names_what_it_found(make_server: MakeServer) -> None:
    server = await make_server(says(b"stream: Some.Worm-1 FOUND\0"))
    assert (await ask(EngineType.CLAM_AV, server)).verdict == EngineVerdict(malware="Some.Worm-1")
    (sent,) = server.received
    head = b"From: ann@example.test\r\n\r\n"
    body = b"Hello.\r\n"
    assert sent == b"zINSTREAM\0" + b"".join(len(piece).to_bytes(4, "big") + piece for piece in (head, body, b""))


async def test_clamd_finds_nothing(make_server: MakeServer) -> None:
    assert (await ask(EngineType.CLAM_AV, await make_server(says(b"stream: OK\0")))).verdict == EngineVerdict()


async def test_spamd_gets_the_message_with_its_length_and_says_score_and_symbols(make_server: MakeServer) -> None:
    reply = b"SPAMD/1.1 0 EX_OK\r\nContent-length: 20\r\nSpam: True ; 15.1 / 5.0\r\n\r\nMISSING_DATE,URI_X\r\n"
    server = await make_server(says(reply))
    assert (await ask(EngineType.SPAM_ASSASSIN, server)).verdict == EngineVerdict(15.1, "", ("MISSING_DATE", "URI_X"))
    (sent,) = server.received
    assert sent == b"SYMBOLS SPAMC/1.5\r\nContent-length: %d\r\n\r\n" % len(WHOLE) + WHOLE


async def test_spamd_gets_the_first_half_megabyte_of_more(make_server: MakeServer) -> None:
    server = await make_server(says(b"SPAMD/1.1 0 EX_OK\r\nSpam: False ; -1.2 / 5.0\r\n\r\n\r\n"))
    answer = await ask(EngineType.SPAM_ASSASSIN, server, submission(b"x" * MEGABYTE))
    assert answer.verdict == EngineVerdict(-1.2)
    (sent,) = server.received
    assert len(sent.partition(b"\r\n\r\n")[2]) == MAXIMUM_SENT
    assert b"Content-length: %d\r\n" % MAXIMUM_SENT in sent


async def test_rspamd_is_told_who_sends_what_to_whom(make_server: MakeServer) -> None:
    server = await make_server(
        http(b'{"score":7.5,"required_score":15,"action":"add header","symbols":{"A":{},"B":{}}}')
    )
    assert (await ask(EngineType.RSPAMD, server)).verdict == EngineVerdict(7.5, "", ("A", "B"))
    head, _, body = server.received[0].partition(b"\r\n\r\n")
    assert head.startswith(b"POST /checkv2 HTTP/1.1\r\n")
    assert body == WHOLE
    fields = head.split(b"\r\n")
    for field_line in (
        b"User: ann@example.test",
        b"From: ann@example.test",
        b"Rcpt: bob@other.test",
        b"Rcpt: eve@other.test",
        b"IP: 192.0.2.7",
        b"Helo: app-1",
        b"Queue-Id: Q1",
    ):
        assert field_line in fields


async def test_rspamds_action_reject_counts_as_what_it_rejects_from(make_server: MakeServer) -> None:
    server = await make_server(http(b'{"score":0,"required_score":15,"action":"reject"}'))
    assert (await ask(EngineType.RSPAMD, server)).verdict == EngineVerdict(15.0)


async def test_nothing_that_a_client_chooses_becomes_a_field_of_its_own(make_server: MakeServer) -> None:
    server = await make_server(http(b'{"score":0}'))
    nasty = "x\r\nUser: boss@example.test\r\n\r\nSettings-ID: none\0\x7f"
    await ask(
        EngineType.RSPAMD,
        server,
        submission(hello=nasty, sender=Mailbox(nasty, "example.test"), recipients=(Mailbox(nasty, "other.test"),)),
    )
    head = server.received[0].partition(b"\r\n\r\n")[0]
    names = [line.partition(b":")[0] for line in head.split(b"\r\n")[1:]]
    assert sorted(name for name in names if name in {b"User", b"Settings-ID"}) == [b"User"]
    assert b"\nUser: ann@example.test" in head


async def test_who_has_no_login_is_no_user_and_the_null_sender_is_one(make_server: MakeServer) -> None:
    server = await make_server(http(b'{"score":0}'))
    await ask(EngineType.RSPAMD, server, submission(login=None, sender=None))
    head = server.received[0].partition(b"\r\n\r\n")[0]
    assert b"\nUser:" not in head
    assert b"\nFrom: <>" in head


# --- what goes wrong --------------------------------------------------------------------------------------------------

KINDS = tuple(EngineType)
GARBAGE = (
    b"",
    b"\xff\xfe\x00garbage",
    b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\n\r\n",
    b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:9/\r\nContent-Length: 0\r\n\r\n",
    b'HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{"score":',
    b'HTTP/1.1 200 OK\r\nContent-Length: 15\r\n\r\n{"score":"many"}',
    b'HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\n{"score":1}',
    b"SPAMD/1.1 76 EX_PROTOCOL\r\n\r\n",
    b"SPAMD/1.1 0 EX_OK\r\n\r\n",
    b"SPAMD/1.1 0 EX_OK\r\nSpam: True ; 1.2.3 / 5.0\r\n\r\n",
    b"stream: ERROR\0",
    b"stream: OK but not quite\0",
    b"INSTREAM size limit exceeded. ERROR\0",
    b"x" * (MAXIMUM_ANSWER + 10),
)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("garbage", GARBAGE, ids=range(len(GARBAGE)))
async def test_garbage_is_no_verdict(make_server: MakeServer, kind: EngineType, garbage: bytes) -> None:
    answer = await ask(kind, await make_server(says(garbage)))
    assert answer.verdict is None
    assert not answer.defers


@pytest.mark.parametrize("kind", KINDS)
async def test_one_that_answers_before_it_has_read_all_is_heard(make_server: MakeServer, kind: EngineType) -> None:
    """As clamd does with a message that is too long: it answers, and closes."""
    good = {
        EngineType.CLAM_AV: b"stream: Big.Worm FOUND\0",
        EngineType.SPAM_ASSASSIN: b"SPAMD/1.1 0 EX_OK\r\nSpam: True ; 9.0 / 5.0\r\n\r\n",
        EngineType.RSPAMD: b'HTTP/1.1 200 OK\r\nContent-Length: 11\r\nConnection: close\r\n\r\n{"score":9}',
    }

    async def impatient(server: Server, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1000)
        writer.write(good[kind])
        await writer.drain()
        if kind is not EngineType.SPAM_ASSASSIN:
            await reader.read(400_000)  # and hangs up with more on its way

    server = await make_server(impatient)
    answer = await ask(kind, server, submission(b"x" * 20 * MEGABYTE))
    assert answer.verdict is not None
    assert answer.verdict.malware or answer.verdict.score == 9


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("on_failure", "defers"), [(FailureAction.ALLOW, False), (FailureAction.DEFER, True)])
async def test_one_that_is_not_there(
    make_server: MakeServer, kind: EngineType, on_failure: FailureAction, defers: bool
) -> None:
    server = await make_server(says(b""))
    await server.stop()
    answer = await ask(kind, server, on_failure=on_failure)
    assert (answer.verdict, answer.defers) == (None, defers)


async def reads_and_hangs(server: Server, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await asyncio.Event().wait()


async def drips_for_ever(server: Server, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while True:
        writer.write(b"x")
        await writer.drain()
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("behaviour", [reads_and_hangs, drips_for_ever])
async def test_nobody_waits_longer_than_the_time_out(
    make_server: MakeServer, kind: EngineType, behaviour: Behaviour
) -> None:
    clock = asyncio.get_running_loop().time
    before = clock()
    server = await make_server(behaviour)
    answer = await ask(kind, server, submission(b"x" * 5 * MEGABYTE), timeout=0.2, on_failure=FailureAction.DEFER)
    assert answer.defers
    assert clock() - before < 3


@pytest.mark.parametrize("kind", KINDS)
async def test_a_message_that_is_given_up_leaves_no_connection(
    make_server: MakeServer, until: Until, kind: EngineType
) -> None:
    given_up, gone = asyncio.Event(), asyncio.Event()

    async def notices(server: Server, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(MEGABYTE):
            pass
        await given_up.wait()  # some end their side once the message is sent
        try:
            while True:
                writer.write(b"x" * 1000)
                await writer.drain()
                await asyncio.sleep(0.01)
        except ConnectionError:
            gone.set()

    server = await make_server(notices)
    asking = asyncio.create_task(ask(kind, server, timeout=30.0))
    await until(lambda: server.connections)
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    given_up.set()
    async with asyncio.timeout(10):
        await gone.wait()


# --- several engines, and one that hangs ------------------------------------------------------------------------------


async def test_engines_are_asked_at_the_same_time(make_server: MakeServer) -> None:
    everybody_here = asyncio.Barrier(3)

    def waits(answer: bytes) -> Behaviour:
        async def behaviour(server: Server, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await request_of(reader)
            await everybody_here.wait()
            writer.write(answer)

        return behaviour

    engines = (
        engine(
            EngineType.RSPAMD, await make_server(waits(b'HTTP/1.1 200 OK\r\nContent-Length: 11\r\n\r\n{"score":1}'))
        ),
        engine(EngineType.SPAM_ASSASSIN, await make_server(waits(b"SPAMD/1.1 0 OK\r\nSpam: No ; 2 / 5.0\r\n\r\n"))),
        engine(EngineType.CLAM_AV, await make_server(waits(b"stream: OK\0"))),
    )
    answers = await Panel(engines, Clock()).ask(submission())
    assert [answer.verdict.score if answer.verdict else None for answer in answers] == [1.0, 2.0, 0.0]


async def test_one_that_hangs_is_left_alone_for_a_while(make_server: MakeServer) -> None:
    hangs = True

    async def behaviour(server: Server, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await (reads_and_hangs if hangs else says(b"stream: OK\0"))(server, reader, writer)

    server, clock = await make_server(behaviour), Clock()
    panel = Panel((engine(EngineType.CLAM_AV, server, timeout=0.05),), clock)
    for _ in range(TIMEOUTS):
        await panel.ask(submission())
    assert server.connections == TIMEOUTS
    (answer,) = await panel.ask(submission())
    assert (answer.verdict, answer.seconds) == (None, None)
    assert server.connections == TIMEOUTS
    assert not panel.states["clamav"].up
    hangs = False
    clock.now += REST
    (answer,) = await panel.ask(submission())
    assert answer.verdict == EngineVerdict()
    assert panel.states["clamav"].up


async def test_a_message_that_is_too_long_for_clamd_says_nothing_of_its_health(make_server: MakeServer) -> None:
    server = await make_server(says(b"INSTREAM size limit exceeded. ERROR\0"))
    panel = Panel((engine(EngineType.CLAM_AV, server, on_failure=FailureAction.DEFER),), Clock())
    for _ in range(TIMEOUTS + 2):
        (answer,) = await panel.ask(submission())
        assert answer.defers
    assert server.connections == TIMEOUTS + 2
    assert panel.states["clamav"].up


async def test_what_is_known_of_an_engine_outlives_a_change_elsewhere(make_server: MakeServer) -> None:
    server = await make_server(says(b"what?"))
    settings = engine(EngineType.CLAM_AV, server)
    panel = Panel((settings,), Clock())
    await panel.ask(submission())
    other = engine(EngineType.SPAM_ASSASSIN, server)
    assert not Panel((other, settings), Clock(), panel).states["clamav"].up
    assert Panel((engine(EngineType.CLAM_AV, server, timeout=9.0),), Clock(), panel).states["clamav"].up


@pytest.mark.parametrize("address", ["", "clamd", "clamd:", ":3310", "clamd:0", "clamd:99999", "clamd:x"])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(ConfigurationError, match="host:port"):
        Panel((Engine(name="e", type=EngineType.CLAM_AV, address=address),), Clock())


def test_an_ipv6_address_is_one() -> None:
    Panel((Engine(name="e", type=EngineType.CLAM_AV, address="[::1]:3310"),), Clock())


# --- what a client is told --------------------------------------------------------------------------------------------


class Door:
    """An admission with one login, a limit of two messages, and engines."""

    def __init__(self, *engines: Engine, **spam: object) -> None:
        self.metrics = Metrics()
        configuration = Configuration(
            revision="r",
            credentials_revision="c",
            relay=Relay(name="out", namespace="mail"),
            hostname="relay.example.test",
            listeners=(Listener(name="smtp", port=0),),
            upstreams=(Upstream(name="up", host="up.example.test"),),
            authentication=Authentication(users=(User(login="ann@example.test"),)),
            rate_limits=(RateLimit(name="hourly", unit=RateLimitUnit.MESSAGES, limit=2, window=3600.0),),
            spam=Spam(engines=engines, **spam),  # type: ignore[arg-type] - a test names the fields that it means
        )
        self.metrics.configure(configuration, {})
        clocks = {"monotonic": Clock(), "now": lambda: 1_700_000_000.0}
        self.admission = Admission(configuration, metrics=self.metrics, **clocks)

    async def message(self, subject: str = "Hello", link: str = "") -> Judgement:
        login = Login("ann@example.test", "PLAIN")
        client = Client("s1", "smtp", "192.0.2.7", 40000, extended=True, tls=TLSState("TLSv1.3", "X"), login=login)
        envelope = Envelope(Mailbox("ann", "example.test"), recipients=[Recipient(Mailbox("to", "other.test"))])
        header = f"From: ann@example.test\r\nBcc: secret@other.test\r\nSubject: {subject}\r\n"
        body = f"Hello there, how are you today, my dear friend? {link}\r\n"
        content = Content(header.encode(), Octets(body.encode()))
        return await self.admission.message(client, envelope, content, queue_id="Q1")

    def sample(self, name: str, **labels: str) -> float | None:
        return self.metrics.registry.get_sample_value(name, labels)


RSPAMD_SAYS_7 = http(b'{"score":7,"symbols":{"BAD_LINK":{}}}')


async def test_an_engines_score_adds_to_that_of_the_rules(make_server: MakeServer) -> None:
    rspamd = engine(EngineType.RSPAMD, await make_server(RSPAMD_SAYS_7))
    door = Door(rspamd, suspect_at=5.0, hold_at=9.0)
    judgement = await door.message()
    assert (judgement.suspected, judgement.held, judgement.reason, judgement.score) == (True, False, Reason.SPAM, 7)
    assert b"score=7; rules=rspamd" in judgement.content.header
    judgement = await door.message(link="http://bit.ly/x")  # the rule adds 2
    assert (judgement.held, judgement.score) == (True, 9)
    assert door.sample("mailsluice_spam_engine_seconds_count", engine="rspamd") == 2
    assert door.sample("mailsluice_spam_rule_hits_total", rule="rspamd") is None


async def test_an_engine_that_likes_a_message_takes_nothing_off(make_server: MakeServer) -> None:
    spamd = await make_server(says(b"SPAMD/1.1 0 EX_OK\r\nSpam: False ; -20 / 5.0\r\n\r\nWHITE\r\n"))
    judgement = await Door(engine(EngineType.SPAM_ASSASSIN, spamd)).message(link="http://bit.ly/x")
    assert judgement.score == 2


async def test_from_reject_at_on_it_is_550(make_server: MakeServer) -> None:
    judgement = await Door(engine(EngineType.RSPAMD, await make_server(RSPAMD_SAYS_7)), reject_at=6.0).message()
    assert (judgement.verdict.reply.code, judgement.verdict.reply.status) == (550, "5.7.1")
    assert (judgement.verdict.reason, judgement.suspected) == (Reason.SPAM, True)


async def test_malware_is_550_whatever_else_is_said(make_server: MakeServer) -> None:
    clamd = engine(EngineType.CLAM_AV, await make_server(says(b"stream: Some.Worm FOUND\0")))
    broken = engine(EngineType.SPAM_ASSASSIN, await make_server(says(b"what?")), on_failure=FailureAction.DEFER)
    verdict = (await Door(broken, clamd).message()).verdict
    assert (verdict.reply.code, verdict.reply.status, verdict.reason) == (550, "5.7.1", Reason.MALWARE)
    assert "Some.Worm" in verdict.reply.text


async def test_allow_the_message_goes_on_without_the_engine(make_server: MakeServer) -> None:
    door = Door(engine(EngineType.CLAM_AV, await make_server(says(b"what?"))))
    assert (await door.message()).verdict.is_positive
    assert door.sample("mailsluice_spam_engine_failures_total", engine="clamav") == 1
    assert not door.admission.engine_states["clamav"].up


async def test_defer_is_451_and_costs_nothing_of_the_limit(make_server: MakeServer) -> None:
    door = Door(engine(EngineType.CLAM_AV, await make_server(says(b"what?")), on_failure=FailureAction.DEFER))
    for _ in range(4):  # twice the limit
        verdict = (await door.message()).verdict
        assert (verdict.reply.code, verdict.reply.status) == (451, "4.7.1")
        assert verdict.reason is Reason.ENGINE_UNAVAILABLE


async def test_an_engine_sees_what_will_be_sent(make_server: MakeServer) -> None:
    """With the trace, Date and Message-ID that the relay adds, and without Bcc."""
    server = await make_server(RSPAMD_SAYS_7)
    judgement = await Door(engine(EngineType.RSPAMD, server), suspect_at=50.0).message()
    seen = server.received[0].partition(b"\r\n\r\n")[2]
    assert seen == b"".join(judgement.content.chunks())
    assert b"Received: " in seen
    assert b"Bcc" not in seen


async def test_what_the_rules_alone_reject_no_engine_is_asked_about(make_server: MakeServer) -> None:
    server = await make_server(RSPAMD_SAYS_7)
    judgement = await Door(engine(EngineType.RSPAMD, server), suspect_at=1.0, reject_at=2.0).message(
        link="http://bit.ly/x"
    )
    assert judgement.verdict.reason is Reason.LINK_SHORTENER
    assert server.connections == 0
