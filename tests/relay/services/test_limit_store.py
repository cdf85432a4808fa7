"""Replicas that count in one store: together never more than the limit, and what becomes of mail while it is away."""

from __future__ import annotations

import asyncio
import contextlib
import math
import shutil
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trustme

from mailsluice_relay.admission import Admission, Judgement
from mailsluice_relay.config import (
    Authentication,
    Configuration,
    ConfigurationError,
    Credentials,
    FailureAction,
    Listener,
    RateLimit,
    RateLimitStore,
    RateLimitUnit,
    Relay,
    Upstream,
    User,
)
from mailsluice_relay.envelope import Client, Content, Envelope, Login, Mailbox, Recipient, TLSState
from mailsluice_relay.limit_store import line
from mailsluice_relay.limit_store.store import SharedStore
from mailsluice_relay.limit_store.target import target_of
from mailsluice_relay.metrics import Metrics
from mailsluice_relay.policy.rates import Charge, MemoryStore, StoreUnavailableError
from mailsluice_relay.reply import Reason, Verdict

Until = Callable[..., Awaitable[None]]

PROGRAM = shutil.which("valkey-server") or shutil.which("redis-server")
pytestmark = pytest.mark.skipif(
    PROGRAM is None, reason="no valkey-server or redis-server; on Debian: apt-get install redis-server"
)


async def eventually(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(20):
        while not await condition():  # noqa: ASYNC110 - another process sets no event, and the wait is bounded
            await asyncio.sleep(0.02)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


class Server:
    """A real server on a free port, which keeps nothing on disk."""

    def __init__(self, directory: Path, *options: str) -> None:
        self.port = free_port()
        self._directory = directory
        self.options = options
        self.process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        assert PROGRAM is not None
        common = ("--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--dir", str(self._directory))
        port = () if "--tls-port" in self.options else ("--port", str(self.port))
        options = tuple(option.format(port=self.port) for option in self.options)
        self.process = await asyncio.create_subprocess_exec(
            PROGRAM, *port, *common, *options, stdout=asyncio.subprocess.DEVNULL
        )
        await eventually(self._accepts)

    async def _accepts(self) -> bool:
        with contextlib.suppress(OSError):
            _, writer = await asyncio.open_connection("127.0.0.1", self.port)
            writer.close()
            return True
        return False

    async def kill(self) -> None:
        if self.process is not None and self.process.returncode is None:
            self.process.kill()
            await self.process.wait()

    def freeze(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)


MakeServer = Callable[..., Awaitable[Server]]


@pytest.fixture
async def make_server(tmp_path: Path) -> AsyncIterator[MakeServer]:
    servers: list[Server] = []

    async def make(*options: str) -> Server:
        directory = tmp_path / f"server-{len(servers)}"
        directory.mkdir()
        server = Server(directory, *options)
        servers.append(server)
        await server.start()
        return server

    yield make
    for server in servers:
        await server.kill()


@pytest.fixture
async def server(make_server: MakeServer) -> Server:
    return await make_server()


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


class Replica:
    """One replica's side of the store, with the counts of its own that it falls back on."""

    def __init__(self, url: str, on_failure: FailureAction, tag: str, authorities: bytes | None) -> None:
        configuration = configured(on_failure, tag=tag, ca="store.ca.crt" if authorities else None)
        target = target_of(configuration, {"store.url": url.encode(), "store.ca.crt": authorities or b""})
        assert target is not None
        self.metrics = Metrics()
        self.store = SharedStore(target, local=MemoryStore(Clock()), metrics=self.metrics)

    async def ask(self, *command: str | int) -> Any:
        return await self.store._line.call(*command)

    async def passes(self, *charges: Charge) -> bool:
        return (await self.store.charge(charges)).exceeded is None


def configured(on_failure: FailureAction = FailureAction.ALLOW, *, tag: str, ca: str | None = None) -> Configuration:
    return Configuration(
        revision="r",
        credentials_revision="c",
        relay=Relay(name="out", namespace="mail", uid=tag),
        hostname="relay.example.test",
        listeners=(Listener(name="smtp", port=0),),
        upstreams=(Upstream(name="up", host="up.example.test"),),
        rate_limit_store=RateLimitStore(credentials="store", ca=ca, on_failure=on_failure),
    )


MakeReplica = Callable[..., Replica]


@pytest.fixture
async def make_replica() -> AsyncIterator[MakeReplica]:
    replicas: list[Replica] = []

    def make(
        server: Server,
        on_failure: FailureAction = FailureAction.ALLOW,
        *,
        url: str = "redis://127.0.0.1:{port}/0",
        tag: str = "uid-1",
        authorities: bytes | None = None,
    ) -> Replica:
        replica = Replica(url.format(port=server.port), on_failure, tag, authorities)
        replicas.append(replica)
        return replica

    yield make
    for replica in replicas:
        await replica.store.close()


def limit(name: str = "l", *, amount: int, window: float = 3600.0, burst: int | None = None) -> RateLimit:
    return RateLimit(name=name, unit=RateLimitUnit.MESSAGES, limit=amount, window=window, burst=burst)


def charge(amount: int = 1, *, of: RateLimit, key: str = "ann") -> Charge:
    return Charge(of, f"{of.name} user {key}", amount)


# --- counting together ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("replicas", [2, 3])
async def test_replicas_together_take_exactly_the_limit(
    server: Server, make_replica: MakeReplica, replicas: int
) -> None:
    fleet = [make_replica(server) for _ in range(replicas)]
    one = charge(of=limit(amount=100))
    passed = await asyncio.gather(*(fleet[number % replicas].passes(one) for number in range(300)))
    assert sum(passed) == 100


async def test_all_limits_of_a_message_or_none_under_concurrency(server: Server, make_replica: MakeReplica) -> None:
    fleet = [make_replica(server) for _ in range(2)]
    wide, narrow = charge(of=limit("wide", amount=50)), charge(of=limit("narrow", amount=10))
    passed = await asyncio.gather(*(fleet[number % 2].passes(wide, narrow) for number in range(100)))
    assert sum(passed) == 10
    alone = await asyncio.gather(*(fleet[number % 2].passes(wide) for number in range(100)))
    assert sum(alone) == 40


async def test_a_steady_rate_follows_the_burst_on_the_servers_clock(server: Server, make_replica: MakeReplica) -> None:
    one = charge(of=limit(amount=50, window=10.0, burst=3))
    first, second = make_replica(server), make_replica(server)
    assert [await first.passes(one), await second.passes(one), await first.passes(one)] == [True, True, True]
    refused = await second.store.charge([one])
    assert refused.exceeded is one
    assert 0 < refused.retry_after <= 0.2
    await asyncio.sleep(refused.retry_after)
    assert await first.passes(one)


async def test_what_is_refused_and_for_how_long_is_what_one_process_says(
    server: Server, make_replica: MakeReplica
) -> None:
    minute, day = charge(of=limit("minute", amount=1, window=60.0)), charge(of=limit("day", amount=1, window=86400.0))
    replica = make_replica(server)
    assert await replica.passes(minute, day)
    for order in ((minute, day), (day, minute)):
        decision = await replica.store.charge(order)
        assert decision.exceeded is day
        assert decision.retry_after == pytest.approx(86400, abs=5)


async def test_more_than_the_burst_is_refused_for_ever_without_asking(
    server: Server, make_replica: MakeReplica
) -> None:
    replica = make_replica(server)
    await server.kill()
    decision = await replica.store.charge([charge(11, of=limit(amount=100, burst=10))])
    assert math.isinf(decision.retry_after)
    assert replica.store.state.up


async def test_a_microsecond_counts(server: Server, make_replica: MakeReplica) -> None:
    """A kilobyte of a gigabyte an hour is worked off in 3.6 ms, an octet of it in 3.6 us."""
    replica, rate = make_replica(server), limit(amount=1_000_000_000)

    async def arrival() -> float:
        (key,) = await replica.ask("KEYS", "*")
        return float(await replica.ask("GET", key))

    assert await replica.passes(charge(500_000_000, of=rate))
    before = await arrival()
    for _ in range(10):
        assert await replica.passes(charge(1, of=rate))
    assert await arrival() - before == pytest.approx(36, abs=2)


async def test_peeking_takes_nothing(server: Server, make_replica: MakeReplica) -> None:
    replica, one = make_replica(server), charge(of=limit(amount=1))
    assert [(await replica.store.peek([one])).exceeded for _ in range(3)] == [None] * 3
    assert await replica.passes(one)
    assert (await replica.store.peek([one])).exceeded is one


async def test_another_replica_can_use_what_was_refunded(server: Server, make_replica: MakeReplica) -> None:
    first, second = make_replica(server), make_replica(server)
    two = charge(2, of=limit(amount=2))
    taken = await first.store.charge([two])
    assert not await second.passes(two)
    assert taken.taken_by is not None
    taken.taken_by.refund([two])
    await eventually(lambda: second.passes(two))


async def test_a_thousand_at_once_are_all_served_in_few_round_trips(server: Server, make_replica: MakeReplica) -> None:
    replica, one = make_replica(server), charge(of=limit(amount=400))
    assert await replica.passes(one)
    passed = await asyncio.gather(*(replica.passes(one) for _ in range(1000)))
    assert sum(passed) == 399
    assert replica.store.state.up


async def test_a_call_that_was_given_up_is_not_sent(server: Server, make_replica: MakeReplica) -> None:
    replica, one, other = make_replica(server), charge(of=limit(amount=1)), charge(of=limit("other", amount=9))
    assert await replica.passes(other)  # now the server knows the script, and runs what it is sent
    running = asyncio.create_task(replica.passes(other))
    left = asyncio.create_task(replica.passes(one))
    await asyncio.sleep(0)
    left.cancel()
    assert await running
    assert await replica.passes(one)


async def test_a_connection_that_the_server_closed_while_idle_is_made_again(
    server: Server, make_replica: MakeReplica, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(line, "IDLE", 0.0)
    replica, one = make_replica(server, FailureAction.DEFER), charge(of=limit(amount=9))
    assert await replica.passes(one)
    await server.kill()
    await server.start()
    assert await replica.passes(one)


async def test_relays_in_one_database_do_not_count_for_each_other(server: Server, make_replica: MakeReplica) -> None:
    one = charge(of=limit(amount=1))
    assert await make_replica(server, tag="uid-1").passes(one)
    assert await make_replica(server, tag="uid-2").passes(one)


async def test_a_count_expires_when_it_is_worked_off(server: Server, make_replica: MakeReplica) -> None:
    replica = make_replica(server)
    assert await replica.passes(charge(of=limit(amount=10, window=100.0)))
    (key,) = await replica.ask("KEYS", "*")
    assert 9_000 < await replica.ask("PTTL", key) <= 10_000


# --- reaching it ------------------------------------------------------------------------------------------------------


async def test_password_and_database_come_from_the_url(make_server: MakeServer, make_replica: MakeReplica) -> None:
    server = await make_server("--requirepass", "pass word")
    one = charge(of=limit(amount=1))
    right = make_replica(server, FailureAction.DEFER, url="redis://:pass%20word@127.0.0.1:{port}/3")
    assert await right.passes(one)
    wrong = make_replica(server, FailureAction.DEFER, url="redis://:pass-wort@127.0.0.1:{port}/3")
    with pytest.raises(StoreUnavailableError) as error:
        await wrong.passes(one)
    assert "pass-wort" not in f"{error.value} {wrong.store.state} {wrong.store.target}"


async def test_tls_verifies_the_servers_name(
    make_server: MakeServer, make_replica: MakeReplica, authority: trustme.CA, tmp_path: Path
) -> None:
    certificate = authority.issue_cert("localhost")
    certificate.private_key_pem.write_to_path(tmp_path / "key.pem")
    certificate.cert_chain_pems[0].write_to_path(tmp_path / "chain.pem")
    files = ("--tls-key-file", str(tmp_path / "key.pem"), "--tls-cert-file", str(tmp_path / "chain.pem"))
    server = await make_server("--port", "0", "--tls-port", "{port}", *files, "--tls-auth-clients", "no")
    pem = authority.cert_pem.bytes()
    one = charge(of=limit(amount=1))
    url = "rediss://localhost:{port}/0"
    assert await make_replica(server, FailureAction.DEFER, url=url, authorities=pem).passes(one)
    with pytest.raises(StoreUnavailableError, match="certificate"):
        await make_replica(server, FailureAction.DEFER, url=url).passes(one)
    other_name = "rediss://127.0.0.1:{port}/0"
    with pytest.raises(StoreUnavailableError, match="certificate"):
        await make_replica(server, FailureAction.DEFER, url=other_name, authorities=pem).passes(one)


async def test_the_node_of_a_cluster_that_has_the_keys_is_followed(
    make_server: MakeServer, make_replica: MakeReplica
) -> None:
    nodes = [await make_server("--cluster-enabled", "yes", "--cluster-port", str(free_port())) for _ in range(2)]
    halves = ((0, 8191), (8192, 16383))
    admins = [make_replica(node) for node in nodes]
    for admin, half in zip(admins, halves, strict=True):
        await admin.ask("CLUSTER", "ADDSLOTSRANGE", *half)
    bus = nodes[1].options[-1]
    await admins[0].ask("CLUSTER", "MEET", "127.0.0.1", nodes[1].port, bus)

    async def is_whole() -> bool:
        return all([b"cluster_state:ok" in await admin.ask("CLUSTER", "INFO") for admin in admins])

    await eventually(is_whole)
    fleet = [make_replica(node, FailureAction.DEFER, tag="moved") for node in nodes]
    one = charge(of=limit(amount=10))
    passed = await asyncio.gather(*(fleet[number % 2].passes(one) for number in range(40)))
    assert sum(passed) == 10


@pytest.mark.parametrize(
    "url", ["", "http://valkey:6379/0", "redis://", "redis://host:port/0", "redis://host/zero", "redis://host/0?ssl=no"]
)
def test_what_is_no_url_of_a_store_is_refused_without_showing_it(url: str) -> None:
    with pytest.raises(ConfigurationError, match=r"credentials/store\.url") as error:
        target_of(configured(tag="t"), {"store.url": url.replace("//", "//:secret@").encode()})
    assert "secret" not in str(error.value)


# --- what a client is told --------------------------------------------------------------------------------------------


class Door:
    """An admission with one login and one limit, counted in a store."""

    def __init__(self, server: Server, on_failure: FailureAction, amount: int) -> None:
        self.metrics = Metrics()
        self.settings = {
            "rate_limits": (limit("hourly", amount=amount),),
            "authentication": Authentication(users=(User(login="ann@example.test"),)),
        }
        self.admission = Admission(
            self.configuration(on_failure),
            credentials=self.credentials(server),
            metrics=self.metrics,
            monotonic=Clock(),
            now=lambda: 1_700_000_000.0,
        )

    def configuration(self, on_failure: FailureAction) -> Configuration:
        return msgspec.structs.replace(configured(on_failure, tag="uid-1"), **self.settings)

    def credentials(self, server: Server) -> Credentials:
        return {"store.url": f"redis://127.0.0.1:{server.port}/0".encode()}

    async def mail(self) -> Verdict:
        return await self.admission.mail(self._client(), self._envelope())

    async def message(self) -> Judgement:
        text = b"From: ann@example.test\r\nSubject: Hello\r\n"
        content = Content(text, Octets(b"Hello there, how are you today, my dear friend?\r\n"))
        return await self.admission.message(self._client(), self._envelope(), content, queue_id="Q1")

    def _client(self) -> Client:
        login = Login("ann@example.test", "PLAIN")
        return Client("s1", "smtp", "192.0.2.7", 40000, extended=True, tls=TLSState("TLSv1.3", "X"), login=login)

    def _envelope(self) -> Envelope:
        return Envelope(Mailbox("ann", "example.test"), recipients=[Recipient(Mailbox("to", "other.test"))])


@dataclass
class Octets:
    octets: bytes

    @property
    def size(self) -> int:
        return len(self.octets)

    def chunks(self) -> Iterator[bytes]:
        yield self.octets

    def close(self) -> None:
        pass


MakeDoor = Callable[..., Door]


@pytest.fixture
async def make_door() -> AsyncIterator[MakeDoor]:
    doors: list[Door] = []

    def make(server: Server, on_failure: FailureAction = FailureAction.DEFER, *, amount: int = 2) -> Door:
        doors.append(Door(server, on_failure, amount))
        return doors[-1]

    yield make
    for door in doors:
        await door.admission.close()


async def test_the_limit_is_one_for_two_replicas(server: Server, make_door: MakeDoor) -> None:
    first, second = make_door(server), make_door(server)
    assert (await first.message()).verdict.is_positive
    assert (await second.message()).verdict.is_positive
    assert (await first.mail()).reply.code == 450
    refused = (await first.message()).verdict
    assert (refused.reply.code, refused.reply.status, refused.reason) == (450, "4.7.1", Reason.RATE_LIMITED)


async def test_defer_answers_451_at_mail_and_after_the_data(server: Server, make_door: MakeDoor, until: Until) -> None:
    door = make_door(server)
    await server.kill()
    for verdict in (await door.mail(), (await door.message()).verdict):
        assert (verdict.reply.code, verdict.reply.status) == (451, "4.7.1")
        assert verdict.reason is Reason.LIMIT_STORE_UNAVAILABLE
    state = door.admission.limit_store_state
    assert state is not None
    assert not state.up
    await server.start()
    await until(lambda: door.admission.limit_store_state.up)  # type: ignore[union-attr] # it is there, see above
    assert (await door.message()).verdict.is_positive


async def test_that_the_store_is_away_shows_before_the_first_message(
    server: Server, make_door: MakeDoor, until: Until
) -> None:
    door = make_door(server)
    await server.kill()
    await door.admission.start()
    await until(lambda: door.metrics.registry.get_sample_value("mailsluice_limit_store_up") == 0)


async def test_what_the_spool_does_not_take_is_refunded(server: Server, make_door: MakeDoor) -> None:
    first, second = make_door(server, amount=1), make_door(server, amount=1)
    judgement = await first.message()
    assert not (await second.message()).verdict.is_positive
    first.admission.refund(judgement)

    async def passes() -> bool:
        return (await second.message()).verdict.is_positive

    await eventually(passes)


async def test_another_store_or_none_is_taken_up_without_a_restart(
    server: Server, make_server: MakeServer, make_door: MakeDoor
) -> None:
    other, door = await make_server(), make_door(server, amount=1)
    assert (await door.message()).verdict.is_positive
    assert not (await door.message()).verdict.is_positive
    door.admission.reconfigure(door.configuration(FailureAction.DEFER), door.credentials(other))
    assert (await door.message()).verdict.is_positive
    await other.kill()
    without = msgspec.structs.replace(door.configuration(FailureAction.DEFER), rate_limit_store=None)
    door.admission.reconfigure(without)
    assert door.admission.limit_store_state is None
    assert (await door.message()).verdict.is_positive


# --- while it is away -------------------------------------------------------------------------------------------------


async def test_allow_each_replica_counts_for_itself_until_the_store_is_back(
    server: Server, make_replica: MakeReplica, until: Until
) -> None:
    fleet = [make_replica(server) for _ in range(2)]
    one = charge(of=limit(amount=5))
    assert await fleet[0].passes(one)
    await server.kill()
    for replica in fleet:
        assert sum([await replica.passes(one) for _ in range(20)]) == 5
        assert not replica.store.state.up
        assert replica.metrics.registry.get_sample_value("mailsluice_limit_store_up") == 0
    await server.start()
    await until(lambda: all(replica.store.state.up for replica in fleet))
    # The server keeps nothing on disk: the limit begins anew, and is one again.
    assert sum([await fleet[number % 2].passes(one) for number in range(20)]) == 5


async def test_defer_nothing_passes_until_the_store_is_back(
    server: Server, make_replica: MakeReplica, until: Until
) -> None:
    replica, one = make_replica(server, FailureAction.DEFER), charge(of=limit(amount=5))
    assert await replica.passes(one)
    await server.kill()
    for _ in range(3):
        with pytest.raises(StoreUnavailableError):
            await replica.passes(one)
        with pytest.raises(StoreUnavailableError):
            await replica.store.peek([one])
    await server.start()
    await until(lambda: replica.store.state.up)
    assert await replica.passes(one)


async def test_killed_and_restarted_under_load_no_more_passes_than_it_took(
    server: Server, make_replica: MakeReplica, until: Until
) -> None:
    """Defer: what passed was counted by one life of the store or the other."""
    fleet = [make_replica(server, FailureAction.DEFER) for _ in range(3)]
    one = charge(of=limit(amount=200))
    passed: list[Replica] = []
    stop = False

    async def send(replica: Replica) -> None:
        while not stop:
            with contextlib.suppress(StoreUnavailableError):
                if await replica.passes(one):
                    passed.append(replica)
            await asyncio.sleep(0)

    senders = [asyncio.create_task(send(replica)) for replica in fleet for _ in range(4)]
    await until(lambda: len(passed) > 50)
    await server.kill()
    await until(lambda: not any(replica.store.state.up for replica in fleet))
    first_life = len(passed)
    await server.start()
    await until(lambda: all(replica.store.state.up for replica in fleet))
    await until(lambda: len(passed) - first_life >= 200)
    stop = True
    await asyncio.gather(*senders)
    assert first_life <= 200
    assert len(passed) - first_life == 200


async def test_a_store_that_hangs_costs_one_wait_and_no_answer_goes_astray(
    server: Server, make_replica: MakeReplica, until: Until, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(line, "TIMEOUT", 0.2)
    replica = make_replica(server)
    one, other = charge(of=limit(amount=5)), charge(of=limit("other", amount=1))
    assert await replica.passes(one)
    server.freeze()
    clock = asyncio.get_running_loop().time
    before = clock()
    assert await replica.passes(other)  # after TIMEOUT, counted here
    waited = clock() - before
    before = clock()
    for _ in range(100):
        await replica.passes(one)
    assert waited > 0.15
    assert clock() - before < waited
    server.thaw()
    await until(lambda: replica.store.state.up)
    # Each answer is to its own question, though one was given up in the middle: `one` has had one charge of five.
    assert [await replica.passes(one) for _ in range(5)] == [True] * 4 + [False]


async def test_a_refund_goes_to_who_took_the_charge(server: Server, make_replica: MakeReplica, until: Until) -> None:
    """A charge that this process counted itself, while the store was away, gives no credit in the store."""
    replica, one = make_replica(server), charge(of=limit(amount=1))
    await server.kill()
    taken = await replica.store.charge([one])
    assert taken.taken_by is not None
    await server.start()
    await until(lambda: replica.store.state.up)
    assert await replica.passes(one)
    taken.taken_by.refund([one])
    assert not await replica.passes(one)
