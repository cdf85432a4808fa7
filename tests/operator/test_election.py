"""The rules of the election: never two that may write, and never long without one, whatever the network does.

Several candidates run on one clock that the test moves. Requests take time, are refused, or get no answer though they
were carried out; processes stand still for a while, or die.
"""

from __future__ import annotations

import asyncio
import datetime
import heapq
import itertools
import math
import random
from typing import Any, cast

import pytest

from mailsluice_operator.cluster.client import ApiError, Cluster, ConflictError
from mailsluice_operator.cluster.objects import LEASE, Object, Reference
from mailsluice_operator.election import Candidate, Election, LeadershipLostError, Record
from mailsluice_operator.election.candidate import DURATION, MARGIN, POLL, RENEWAL

WHERE = Reference(LEASE, "system", "operator")
EPOCH = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)


class Clock:
    """Time that passes only when everything waits for it."""

    def __init__(self) -> None:
        self.now = 0.0
        self._waiting: list[tuple[float, int, asyncio.Future[None]]] = []
        self._numbers = itertools.count()

    async def until(self, moment: float) -> None:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (moment, next(self._numbers), future))
        await future

    async def advance(self, end: float) -> None:
        """Let time pass up to `end`."""
        await self._go_on()
        while self._waiting and self._waiting[0][0] <= end:
            moment, _, future = heapq.heappop(self._waiting)
            self.now = max(self.now, moment)
            if not future.done():
                future.set_result(None)
            await self._go_on()
        self.now = end

    @staticmethod
    async def _go_on() -> None:
        """Everything that can go on now does."""
        for _ in range(20):
            await asyncio.sleep(0)


class Server:
    """The Lease, with the API server's optimistic locking."""

    def __init__(self) -> None:
        self.body: Object | None = None
        self.version = 0

    def put(self, body: Object) -> Object:
        if (
            self.body is not None
            and body["metadata"].get("resourceVersion") != self.body["metadata"]["resourceVersion"]
        ):
            raise ConflictError("Lease", 409, "changed")
        self.version += 1
        self.body = {**body, "metadata": {**body["metadata"], "resourceVersion": str(self.version)}}
        return self.body


class Process:
    """One candidate with its own view of the network, its clock and its standstills."""

    def __init__(self, name: str, clock: Clock, server: Server, rng: random.Random) -> None:
        self.clock, self.server, self.rng = clock, server, rng
        self.offset = rng.uniform(-1e6, 1e6)
        """Clocks of two processes have nothing in common."""
        self.frozen_until = 0.0
        self.cut_off_until = 0.0
        self.loses_answers = 0.0
        self.election = Election(
            Candidate(name),
            WHERE,
            cast(Cluster, self),
            clock=lambda: clock.now + self.offset,
            now=lambda: EPOCH + datetime.timedelta(seconds=clock.now),
            sleep=self.sleep,
        )
        self.ended: BaseException | None = None
        self.task = asyncio.create_task(self.run())

    async def run(self) -> None:
        await self.election.acquire()
        try:
            await self.election.keep()
        except LeadershipLostError as lost:
            self.ended = lost

    async def sleep(self, seconds: float) -> None:
        await self.clock.until(self.clock.now + seconds)
        while self.clock.now < self.frozen_until:
            await self.clock.until(self.frozen_until)

    async def _ask(self, action: Any) -> Any:
        await self.sleep(self.rng.uniform(0.001, 0.5))
        if self.clock.now < self.cut_off_until:
            await self.sleep(2.5)
            raise ApiError("Lease", 0, "no answer")
        answer = action()
        await self.sleep(self.rng.uniform(0.001, 0.5))
        if self.rng.random() < self.loses_answers:
            raise ApiError("Lease", 0, "no answer")
        return answer

    async def get(self, _: Reference) -> Object | None:
        return cast("Object | None", await self._ask(lambda: self.server.body))

    async def update(self, body: Object) -> Object:
        return cast(Object, await self._ask(lambda: self.server.put(body)))

    create = update

    @property
    def may_write(self) -> bool:
        return self.election.may_write_for() > 0


def writers(processes: list[Process]) -> list[Process]:
    return [process for process in processes if process.may_write]


async def end(*processes: Process) -> None:
    for process in processes:
        process.task.cancel()
    await asyncio.gather(*(process.task for process in processes), return_exceptions=True)


@pytest.mark.parametrize("seed", range(10))
async def test_never_do_two_write_whatever_network_and_standstills_do(seed: int) -> None:
    rng = random.Random(seed)
    clock, server = Clock(), Server()
    processes = [Process(name, clock, server, rng) for name in ("a", "b", "c")]
    led = 0
    for step in range(6000):
        await clock.advance((step + 1) * 0.1)
        at_once = writers(processes)
        assert len(at_once) <= 1, (clock.now, [process.offset for process in at_once])
        led += len(at_once)
        victim = rng.choice(processes)
        match rng.randrange(400):
            case 0:
                victim.frozen_until = clock.now + rng.uniform(1, 40)
            case 1:
                victim.cut_off_until = clock.now + rng.uniform(1, 40)
            case 2:
                victim.loses_answers = rng.choice([0.0, 0.3])
            case 3:
                await end(victim)
                victim.election.may_write_for = lambda: -math.inf  # type: ignore[method-assign]  # it is dead
                processes.remove(victim)
                processes.append(Process(f"new-{step}", clock, server, rng))
        for process in [process for process in processes if process.ended is not None]:
            processes.remove(process)
            processes.append(Process(f"again-{step}", clock, server, rng))
    assert led > 2000  # most of the time somebody led
    await end(*processes)


async def test_the_next_one_leads_soon_after_a_death_and_at_once_after_a_release() -> None:
    clock, server, rng = Clock(), Server(), random.Random(1)
    first = Process("first", clock, server, rng)
    await clock.advance(5)
    second = Process("second", clock, server, rng)
    await clock.advance(10)
    assert writers([first, second]) == [first]
    await end(first)
    await clock.advance(10 + DURATION - MARGIN + 0.1)
    assert writers([first, second]) == []
    await clock.advance(10 + DURATION + POLL + 2 * RENEWAL)
    assert writers([first, second]) == [second]

    third = Process("third", clock, server, rng)
    await clock.advance(clock.now + 5)
    second.task.cancel()
    release = asyncio.create_task(second.election.release())
    await clock.advance(clock.now + POLL + 2)
    await release
    assert writers([second, third]) == [third]
    await end(second, third)


async def test_a_leader_that_cannot_renew_ends_before_another_may_begin() -> None:
    clock, server, rng = Clock(), Server(), random.Random(2)
    leader = Process("leader", clock, server, rng)
    await clock.advance(5)
    leader.cut_off_until = math.inf
    cut_off = clock.now
    while leader.ended is None:
        await clock.advance(clock.now + 0.1)
        assert clock.now < cut_off + DURATION
    assert not leader.may_write
    await end(leader)


async def test_a_lease_of_somebody_else_is_taken_for_what_it_is() -> None:
    clock, server, rng = Clock(), Server(), random.Random(3)
    leader = Process("leader", clock, server, rng)
    await clock.advance(5)
    assert server.body is not None
    server.put({**server.body, "spec": {**server.body["spec"], "holderIdentity": "thief"}})
    await clock.advance(clock.now + RENEWAL + 2)
    assert isinstance(leader.ended, LeadershipLostError)
    assert not leader.may_write


async def test_an_annotation_on_the_lease_changes_nothing() -> None:
    clock, server, rng = Clock(), Server(), random.Random(4)
    leader = Process("leader", clock, server, rng)
    await clock.advance(5)
    assert server.body is not None
    server.put({**server.body, "metadata": {**server.body["metadata"], "annotations": {"note": "hello"}}})
    await clock.advance(clock.now + 20)
    assert leader.ended is None
    assert leader.may_write
    assert server.body["metadata"]["annotations"] == {"note": "hello"}
    await end(leader)


def test_a_renewal_counts_from_before_it_was_asked_for() -> None:
    candidate = Candidate("me")
    candidate.won(candidate.bid("now"), asked_at=100.0, now=103.0)
    assert candidate.may_write_for(100.0) == DURATION - MARGIN
    assert candidate.may_write_for(100.0 + DURATION - MARGIN) <= 0


def test_a_holder_is_given_its_whole_duration_from_when_its_lease_was_first_seen_so() -> None:
    candidate = Candidate("me")
    candidate.saw(Record("other", 30.0, "1", "1", 0), 50.0)
    candidate.saw(Record("other", 30.0, "1", "1", 0), 70.0)
    assert candidate.free_in(70.0) == 10.0
    candidate.saw(Record("other", 30.0, "2", "1", 0), 79.0)
    assert candidate.free_in(79.0) == 30.0
    candidate.saw(Record("", 30.0, "2", "1", 0), 80.0)
    assert candidate.free_in(80.0) == 0.0
    assert candidate.bid("now") == Record("me", DURATION, "now", "now", 1)
