"""The work queue: which key is worked on when, and how often again after a failure.

A key that is added several times before its turn is worked on once; a key that is added while it is being worked on is
worked on once more afterwards, never twice at the same time. That is what makes a level-triggered reconcile safe: the
work reads the newest state, so one run covers all the changes before it. It knows neither Kubernetes nor Prometheus.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import random
from collections.abc import Awaitable, Callable, Hashable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

Key = TypeVar("Key", bound=Hashable)
Key_contra = TypeVar("Key_contra", bound=Hashable, contravariant=True)


@dataclass(frozen=True)
class Backoff:
    """How long a key that failed has to wait, in seconds."""

    initial: float = 1.0
    maximum: float = 300.0
    factor: float = 2.0

    def delay(self, failures: int, rng: random.Random) -> float:
        """After the given number of failures in a row: exponential, of which a random half is jitter.

        The jitter keeps the keys that failed together, because the API server was away, from coming back together.
        """
        exponent = min(failures - 1, 64)  # 2.0**1024 would overflow a float
        ceiling: float = min(self.initial * self.factor**exponent, self.maximum)
        return ceiling * (0.5 + 0.5 * rng.random())


class Observer(Protocol[Key_contra]):
    """Told what happens; the composition root makes metrics and log lines of it."""

    def started(self, key: Key_contra, waited: float) -> None:
        """The key's turn came `waited` seconds after it was due."""

    def finished(self, key: Key_contra, seconds: float, error: BaseException | None, retry_in: float | None) -> None:
        """The work took `seconds`; after an error the key comes back in `retry_in` seconds."""


class WorkQueue(Generic[Key]):
    """Keys to work on, and the workers that do it."""

    def __init__(
        self,
        work: Callable[[Key], Awaitable[float | None]],
        *,
        observer: Observer[Key],
        monotonic: Callable[[], float],
        rng: random.Random,
        workers: int = 8,
        backoff: Backoff | None = None,
    ) -> None:
        """`work` returns in how many seconds it wants the key again, or None. `workers` bounds how many run at once."""
        self._work = work
        self._observer = observer
        self._monotonic = monotonic
        self._rng = rng
        self._workers = workers
        self._backoff = backoff if backoff is not None else Backoff()
        self._due: dict[Key, float] = {}
        """When each waiting key is wanted; what a heap entry must agree with to be more than a left-over."""
        self._heap: list[tuple[float, int, Key]] = []
        self._order = itertools.count()
        self._running: set[Key] = set()
        self._again: dict[Key, float] = {}
        """Keys added while they were being worked on."""
        self._failures: dict[Key, int] = {}
        self._changed = asyncio.Event()

    @property
    def depth(self) -> int:
        """Keys that are due now and have no worker yet."""
        now = self._monotonic()
        return sum(1 for due in self._due.values() if due <= now)

    @property
    def idle(self) -> bool:
        """Nothing is due and nothing is running; delayed keys may still wait."""
        return not self._running and not self._again and self.depth == 0

    def add(self, key: Key, delay: float = 0.0) -> None:
        """Have the key worked on after `delay` seconds; of several wishes the earliest holds."""
        due = self._monotonic() + delay
        if key in self._running:
            self._again[key] = min(due, self._again.get(key, due))
            return
        known = self._due.get(key)
        if known is not None and known <= due:
            return
        self._due[key] = due
        heapq.heappush(self._heap, (due, next(self._order), key))
        self._changed.set()

    def forget(self, key: Key) -> None:
        """Start the key's backoff anew, because what it failed over is gone."""
        self._failures.pop(key, None)

    async def run(self) -> None:
        """Work until cancelled. The work that runs then is cancelled too: it has to be repeatable anyway."""
        async with asyncio.TaskGroup() as group:
            for _ in range(self._workers):
                group.create_task(self._worker())

    async def _worker(self) -> None:
        while True:
            key, due = await self._next()
            started = self._monotonic()
            self._observer.started(key, started - due)
            error: BaseException | None = None
            again: float | None = None
            try:
                again = await self._work(key)
            except Exception as caught:  # noqa: BLE001 - whatever it was, it is reported and the key is tried again
                error = caught
            self._finish(key, started, error, again)

    def _finish(self, key: Key, started: float, error: BaseException | None, again: float | None) -> None:
        self._running.discard(key)
        if error is not None:
            self._failures[key] = self._failures.get(key, 0) + 1
            again = self._backoff.delay(self._failures[key], self._rng)
        else:
            self._failures.pop(key, None)
        now = self._monotonic()
        self._observer.finished(key, now - started, error, again if error is not None else None)
        if again is not None:
            self.add(key, again)
        wanted = self._again.pop(key, None)
        if wanted is not None:
            self.add(key, max(0.0, wanted - now))

    async def _next(self) -> tuple[Key, float]:
        """The key that is due next, once it is."""
        while True:
            timeout: float | None = None
            while self._heap:
                due, _, key = self._heap[0]
                if self._due.get(key) != due:  # superseded by an earlier wish
                    heapq.heappop(self._heap)
                    continue
                timeout = due - self._monotonic()
                if timeout > 0:
                    break
                heapq.heappop(self._heap)
                del self._due[key]
                self._running.add(key)
                return key, due
            self._changed.clear()
            try:
                async with asyncio.timeout(timeout):
                    await self._changed.wait()
            except TimeoutError:
                continue
