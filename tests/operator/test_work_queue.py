"""The rules of the work queue: once for many wishes, never twice at once, later after a failure."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from mailsluice_operator.work_queue import Backoff, WorkQueue


class Record:
    """An observer that keeps what it was told."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.errors: list[tuple[str, BaseException, float]] = []
        self.ended: list[str] = []

    def started(self, key: str, waited: float) -> None:
        assert waited >= 0
        self.begun.append(key)

    def finished(self, key: str, seconds: float, error: BaseException | None, retry_in: float | None) -> None:
        self.ended.append(key)
        if error is not None:
            assert retry_in is not None
            self.errors.append((key, error, retry_in))


@contextlib.asynccontextmanager
async def running(
    work: Callable[[str], Awaitable[float | None]], *, workers: int = 4, backoff: Backoff | None = None
) -> AsyncIterator[tuple[WorkQueue[str], Record]]:
    record = Record()
    queue = WorkQueue(
        work, observer=record, monotonic=time.monotonic, rng=random.Random(1), workers=workers, backoff=backoff
    )
    task = asyncio.create_task(queue.run())
    try:
        yield queue, record
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 - what is waited for belongs to the queue, which has no event for it
            await asyncio.sleep(0.001)


async def test_many_wishes_for_a_waiting_key_are_one_run() -> None:
    runs: list[str] = []

    async def work(key: str) -> None:
        runs.append(key)

    async with running(work) as (queue, _):
        for _ in range(100):
            queue.add("a")
        queue.add("b")
        await until(lambda: queue.idle)
    assert sorted(runs) == ["a", "b"]


async def test_a_key_wanted_while_it_runs_runs_once_more_and_never_beside_itself() -> None:
    gate = asyncio.Event()
    active = 0
    most = 0
    runs = 0

    async def work(_key: str) -> None:
        nonlocal active, most, runs
        runs += 1
        active += 1
        most = max(most, active)
        await gate.wait()
        active -= 1

    async with running(work) as (queue, record):
        queue.add("a")
        await until(lambda: record.begun == ["a"])
        for _ in range(10):
            queue.add("a")
        gate.set()
        await until(lambda: queue.idle)
    assert (runs, most) == (2, 1)


async def test_different_keys_run_at_once_up_to_the_number_of_workers() -> None:
    gate = asyncio.Event()
    active: set[str] = set()

    async def work(key: str) -> None:
        active.add(key)
        await gate.wait()

    async with running(work, workers=3) as (queue, _):
        for key in "abcdef":
            queue.add(key)
        await until(lambda: len(active) == 3)
        assert queue.depth == 3
        gate.set()
        await until(lambda: queue.idle)
    assert active == set("abcdef")


async def test_a_delayed_key_waits_and_an_earlier_wish_overtakes_it() -> None:
    times: list[float] = []

    async def work(_key: str) -> None:
        times.append(time.monotonic())

    async with running(work) as (queue, _):
        start = time.monotonic()
        queue.add("a", 60.0)
        queue.add("a", 0.05)
        queue.add("a", 30.0)
        assert queue.depth == 0
        await until(lambda: len(times) == 1)
        assert times[0] - start >= 0.05
        await until(lambda: queue.idle)
        assert len(times) == 1


async def test_a_failure_is_reported_and_tried_again_until_it_succeeds() -> None:
    tries = 0

    async def work(_key: str) -> None:
        nonlocal tries
        tries += 1
        if tries < 3:
            raise ValueError(f"try {tries}")

    async with running(work, backoff=Backoff(initial=0.002, maximum=0.01)) as (queue, record):
        queue.add("a")
        await until(lambda: tries == 3)
    assert [(key, str(error)) for key, error, _ in record.errors] == [("a", "try 1"), ("a", "try 2")]


async def test_a_failing_key_does_not_hold_up_the_others() -> None:
    done: list[str] = []

    async def work(key: str) -> None:
        if key == "bad":
            raise ValueError(key)
        done.append(key)

    async with running(work, workers=1) as (queue, _):
        queue.add("bad")
        queue.add("good")
        await until(lambda: done == ["good"])


async def test_work_that_asks_for_its_key_again_gets_it() -> None:
    runs = 0

    async def work(_key: str) -> float | None:
        nonlocal runs
        runs += 1
        return 0.001 if runs < 4 else None

    async with running(work) as (queue, _):
        queue.add("a")
        await until(lambda: runs == 4)


async def test_a_change_during_the_work_comes_before_the_wished_delay() -> None:
    gate = asyncio.Event()
    runs = 0

    async def work(_key: str) -> float | None:
        nonlocal runs
        runs += 1
        await gate.wait()
        return 3600.0

    async with running(work) as (queue, _):
        queue.add("a")
        await until(lambda: runs == 1)
        queue.add("a")
        gate.set()
        await until(lambda: runs == 2)


@pytest.mark.parametrize(("failures", "ceiling"), [(1, 1.0), (2, 2.0), (5, 16.0), (12, 300.0), (5000, 300.0)])
def test_backoff_doubles_up_to_its_maximum_with_half_of_it_jitter(failures: int, ceiling: float) -> None:
    rng = random.Random(7)
    delays = [Backoff().delay(failures, rng) for _ in range(200)]
    assert all(ceiling / 2 <= delay <= ceiling for delay in delays)
    assert len(set(delays)) > 100
