"""One thread that writes the queue, with group commit.

Whatever operations wait when the disk is ready again share one transaction and one fsync: under load the disk's latency
is paid once per group instead of once per message. An operation's future is done only after the commit that holds it.
"""

from __future__ import annotations

import asyncio
import queue
import sqlite3
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, TypeVar, cast

from mailsluice_relay.spool.errors import SpoolError, translated
from mailsluice_relay.spool.store import Store

T = TypeVar("T")

GROUP_LIMIT: Final = 128
"""Operations in one transaction: bounds how long the first of them waits and how much has to be redone."""


Done = Callable[[T | None, BaseException | None], None]
"""Gets an operation's result, or why nothing of it was kept."""


@dataclass(slots=True)
class _Job:
    operation: Callable[[Store], Any]
    done: Done[Any]
    loop: asyncio.AbstractEventLoop
    result: Any = None
    error: BaseException | None = None


class Writer:
    def __init__(self, store: Store) -> None:
        self._store = store
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="spool-writer", daemon=True)
        self._closed = False

    def start(self) -> None:
        self._thread.start()

    def submit(self, operation: Callable[[Store], T]) -> asyncio.Future[T]:
        """Run an operation in the next group. The future fails with SpoolError, and then nothing of it was kept."""
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()

        def done(result: T | None, error: BaseException | None) -> None:
            if future.cancelled():  # whoever waited; what was written stays written
                return
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(cast(T, result))

        self.begin(operation, done)
        return future

    def begin(self, operation: Callable[[Store], T], done: Done[T]) -> None:
        """As `submit`; `done` is called in the event loop, where others wait behind it: it must not raise."""
        if self._closed:
            done(None, SpoolError("the queue is closed"))
        else:
            self._jobs.put(_Job(operation, done, asyncio.get_running_loop()))

    def close(self) -> None:
        """Write what was submitted, then end the thread. Blocks."""
        if not self._closed:
            self._closed = True
            self._jobs.put(None)
            self._thread.join()

    def _run(self) -> None:
        ended = False
        while not ended:
            group = []
            job = self._jobs.get()
            while job is not None:
                group.append(job)
                if len(group) == GROUP_LIMIT:
                    break
                try:
                    job = self._jobs.get_nowait()
                except queue.Empty:
                    break
            ended = job is None
            if group:
                self._write(group)
                self._tell(group)

    def _write(self, group: list[_Job]) -> None:
        if self._attempt(group) is None or len(group) == 1:
            return
        for job in group:  # one of them spoils the group: each for itself
            job.error = None
            self._attempt([job])

    def _attempt(self, group: list[_Job]) -> Exception | None:
        failure: Exception
        try:
            self._store.begin()
            for job in group:
                job.result = job.operation(self._store)
            self._store.commit()
            return None
        except (OSError, sqlite3.Error) as error:
            failure = translated(error)
            failure.__cause__ = error
        except Exception as error:  # noqa: BLE001 - whoever waits gets it; the thread has to live for the others
            failure = error
        try:
            self._store.rollback()
        except sqlite3.Error as error:
            failure = translated(error)
        for job in group:
            job.error = failure
        return failure

    def _tell(self, group: list[_Job]) -> None:
        loop = group[0].loop
        try:
            loop.call_soon_threadsafe(_tell_all, group)
        except RuntimeError:  # the loop is closed: nobody waits any more
            return


def _tell_all(group: list[_Job]) -> None:
    for job in group:
        job.done(job.result, job.error)
