"""The durable queue as the event loop sees it: store, writer thread and reader thread behind one async interface.

`put` returns only after the message is on the disk. Room is reserved while a message is being written, so that
concurrent sessions cannot go over the quota together.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import sqlite3
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, TypeVar

import structlog

from mailsluice_relay.envelope import Body, Content, Message
from mailsluice_relay.spool.content import ContentWriter, FileBody, MemoryBody, write_file
from mailsluice_relay.spool.errors import SpoolError, SpoolFull, translated
from mailsluice_relay.spool.reader import Cursor, Page, Reader
from mailsluice_relay.spool.record import Entry, RecordError, State, entry_of
from mailsluice_relay.spool.recovery import lock, open_store
from mailsluice_relay.spool.store import DATABASE, INCOMING, SchemaError, Settlement, connect
from mailsluice_relay.spool.writer import Done, Writer

T = TypeVar("T")

DISK_RESERVE: Final = 64 * 1024 * 1024
"""Octets of the disk that no new mail may take: what is queued must stay deliverable, and that writes, too."""

IN_DATABASE: Final = 64 * 1024
"""Octets of a body that goes into the database. A longer one is a file: SQLite would write it twice, page by page (at
200 KB that took half as much time again), while a small one costs less as a row than as a file to make, sync, remove.
"""

_SYNC_THREADS: Final = 8
"""Files synced at once: they wait for the disk, not for the processor."""

log = structlog.get_logger("mailsluice.spool")


@dataclass(frozen=True, slots=True)
class Quota:
    maximum_messages: int
    maximum_bytes: int | None = None
    disk_reserve: int = DISK_RESERVE


class Spool:
    def __init__(self, directory: Path, quota: Quota) -> None:
        self._directory = directory
        self._incoming = directory / INCOMING
        self.quota = quota
        self._reserved_messages = 0
        self._reserved_octets = 0

    async def open(self, *, now: float) -> None:
        """Take the directory and recover what is there. Raises SpoolError."""
        await asyncio.get_running_loop().run_in_executor(None, self._open, now)

    def _open(self, now: float) -> None:
        self._lock = lock(self._directory)
        try:
            self._connection, self._store = open_store(self._directory, now=now)
            self._read_connection = connect(self._directory / DATABASE, read_only=True)
        except (OSError, sqlite3.Error) as error:
            os.close(self._lock)
            raise translated(error) from error
        except (SpoolError, SchemaError) as error:
            os.close(self._lock)
            raise SpoolError(str(error)) from error
        self._reader = Reader(self._read_connection, self._directory)
        self._reading = ThreadPoolExecutor(1, thread_name_prefix="spool-reader")
        self._syncing = ThreadPoolExecutor(_SYNC_THREADS, thread_name_prefix="spool-sync")
        self._writer = Writer(self._store)
        self._writer.start()

    async def close(self) -> None:
        """Write what was submitted and let the directory go."""
        await asyncio.get_running_loop().run_in_executor(None, self._close)

    def _close(self) -> None:
        self._syncing.shutdown()
        self._writer.close()
        self._reading.shutdown()
        self._read_connection.close()
        with contextlib.suppress(sqlite3.Error):  # an optimisation: the WAL is read again at the next start anyway
            self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        self._connection.close()
        os.close(self._lock)

    # --- room ---------------------------------------------------------------------------------------------------------
    @property
    def octets(self) -> int:
        return self._store.octets

    def number(self, state: State) -> int:
        return self._store.messages[state]

    @property
    def is_empty(self) -> bool:
        """Nothing waits for delivery or for a person."""
        return not any(self.number(state) for state in (State.ACTIVE, State.DEFERRED, State.HELD))

    def has_room(self, octets: int = 0) -> bool:
        """Whether a message of that size may be taken: by the quota, and by the disk less its reserve.

        What has just been committed counts twice until its `put` returns: near the limit that refuses a moment early,
        never late.
        """
        if sum(self._store.messages.values()) + self._reserved_messages >= self.quota.maximum_messages:
            return False
        wanted = octets + self._reserved_octets
        if self.quota.maximum_bytes is not None and self._store.octets + wanted > self.quota.maximum_bytes:
            return False
        disk = os.statvfs(self._directory)
        return disk.f_bavail * disk.f_frsize - wanted > self.quota.disk_reserve

    # --- messages -----------------------------------------------------------------------------------------------------
    def new_content(self) -> ContentWriter:
        return ContentWriter(self._incoming)

    async def put(self, message: Message) -> Entry:
        """Make a message durable. Raises SpoolFull or SpoolError, and then nothing of it is kept.

        The content belongs to the queue from here on, whatever the outcome.
        """
        if self.keeps_in_database(message.content):
            written: asyncio.Future[Entry] = asyncio.get_running_loop().create_future()
            self.begin(message, functools.partial(_settle, written))
            return await written
        entry = entry_of(message, body_file=message.queue_id)
        size = self._reserve(message.content)
        body: FileBody | None = None
        try:
            body = await asyncio.get_running_loop().run_in_executor(self._syncing, self._synced, message.content.body)
            content = Content(message.content.header, body)
            await self._writer.submit(lambda store: store.insert(entry, content))
        except (OSError, SpoolError) as error:
            for each in (body, message.content.body):
                if isinstance(each, FileBody):
                    with contextlib.suppress(OSError):  # an orphan, which the next start removes
                        each.path.unlink()
            if isinstance(error, OSError):
                raise translated(error) from error
            raise
        finally:
            self._give_back(size)
        return entry

    @staticmethod
    def keeps_in_database(content: Content) -> bool:
        """Whether `begin` takes it."""
        return isinstance(content.body, MemoryBody) and content.body.size <= IN_DATABASE

    def _synced(self, body: Body) -> FileBody:
        """In a thread: the body as a file that is on the disk. Raises OSError."""
        if isinstance(body, FileBody):
            body.sync()
            return body
        return write_file(self._incoming, b"".join(body.chunks()))

    def begin(self, message: Message, done: Done[Entry]) -> None:
        """As `put`, for a message that goes into the database: no task has to wait. Raises SpoolFull."""
        content, entry = message.content, entry_of(message)
        size = self._reserve(content)

        def written(_: None, error: BaseException | None) -> None:
            self._give_back(size)
            done(None if error is not None else entry, error)

        self._writer.begin(lambda store: store.insert(entry, content), written)

    def _reserve(self, content: Content) -> int:
        """Raises SpoolFull; the content is given up then."""
        size = content.size
        if not self.has_room(size):
            content.body.close()
            raise SpoolFull("the queue has no room left")
        self._reserved_messages += 1
        self._reserved_octets += size
        return size

    def _give_back(self, size: int) -> None:
        self._reserved_messages -= 1
        self._reserved_octets -= size

    async def settle(self, settlement: Settlement) -> None:
        await self._writer.submit(lambda store: store.settle(settlement))

    async def due(self, now: float, after: Cursor | None, limit: int) -> Page:
        return await self._checked(await self._read(lambda reader: reader.due(now, after, limit)))

    async def next_due(self, now: float) -> float | None:
        return await self._read(lambda reader: reader.next_due(now))

    async def oldest(self) -> float | None:
        return await self._read(lambda reader: reader.oldest())

    async def page(self, *, state: str | None, login: str | None, after: int, limit: int) -> Page:
        """Entries in the order in which they came."""
        return await self._checked(
            await self._read(lambda reader: reader.page(state=state, login=login, after=after, limit=limit))
        )

    async def get(self, queue_id: str) -> Entry | None:
        try:
            return await self._read(lambda reader: reader.get(queue_id))
        except RecordError as error:
            await self._quarantine({queue_id: str(error)})
            return None

    async def content(self, queue_id: str) -> Content | None:
        """None when the message is gone, or has just been quarantined because its content is damaged."""
        try:
            return await self._read(lambda reader: reader.content(queue_id))
        except RecordError as error:
            await self._quarantine({queue_id: str(error)})
            return None

    async def move(self, queue_id: str, *, frm: Iterable[State], to: State, next_attempt: float | None) -> bool:
        states = frozenset(frm)
        return await self._writer.submit(
            lambda store: store.move(queue_id, frm=states, to=to, next_attempt=next_attempt)
        )

    async def restart(self, queue_id: str, next_attempt: float) -> bool:
        """From the start, for those recipients who are not settled: attempts and waiting time are forgotten."""
        entry = await self.get(queue_id)
        if entry is None:
            return False
        progress = replace(entry.progress, attempts=0, warned=False)
        return await self._writer.submit(lambda store: store.restart(queue_id, progress, next_attempt))

    async def remove(self, queue_id: str) -> bool:
        return await self._writer.submit(lambda store: store.remove(queue_id))

    async def flush(self, now: float) -> int:
        return await self._writer.submit(lambda store: store.flush(now))

    async def _read(self, query: Callable[[Reader], T]) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._reading, query, self._reader)
        except (OSError, sqlite3.Error) as error:
            raise translated(error) from error

    async def _checked(self, page: Page) -> Page:
        if page.unreadable:
            await self._quarantine(dict(page.unreadable))
        return page

    async def _quarantine(self, unreadable: dict[str, str]) -> None:
        await self._writer.submit(lambda store: store.quarantine(list(unreadable)))
        for queue_id, error in unreadable.items():
            log.error("message_quarantined", queue_id=queue_id, error=error)


def _settle(future: asyncio.Future[Entry], entry: Entry | None, error: BaseException | None) -> None:
    if future.cancelled():
        return
    if entry is not None:
        future.set_result(entry)
    elif error is not None:
        future.set_exception(error)


__all__ = ["DISK_RESERVE", "Quota", "Spool"]
