"""The queue's tables: every change to them, as SQL on one connection. Knows no threads and no event loop.

SQLite in WAL mode with synchronous=FULL: a commit is on the disk when it returns, and a torn write is never read back
(frames have checksums). Entries are apart from contents, so that walking 100,000 of them reads narrow rows, and
updating one does not rewrite its body. Bodies that came as files stay files (`bodies/QUEUE-ID`): they are synced, moved
and their directory synced before the row that names them is committed.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Final

from mailsluice_relay.envelope import Content
from mailsluice_relay.spool.content import FileBody
from mailsluice_relay.spool.record import Entry, Progress, State, encode_progress, encode_record

DATABASE: Final = "queue.sqlite3"
BODIES: Final = "bodies"
INCOMING: Final = "incoming"

MIGRATIONS: Final[tuple[str, ...]] = (
    """
    CREATE TABLE messages (
        id INTEGER PRIMARY KEY,
        queue_id TEXT NOT NULL UNIQUE,
        state TEXT NOT NULL,
        next_attempt REAL,
        received_at REAL NOT NULL,
        size INTEGER NOT NULL,
        login TEXT,
        record BLOB NOT NULL,
        progress BLOB,
        body_file TEXT
    );
    CREATE INDEX due ON messages (next_attempt) WHERE next_attempt IS NOT NULL;
    CREATE INDEX files ON messages (body_file) WHERE body_file IS NOT NULL;
    CREATE TABLE contents (id INTEGER PRIMARY KEY, header BLOB NOT NULL, body BLOB);
    """,
)
"""Script n brings the tables from `user_version` n to n + 1. Released scripts are never edited, only followed."""


_MESSAGES: Final = "messages (id, queue_id, state, next_attempt, received_at, size, login, record, progress, body_file)"
_CONTENTS: Final = "contents (id, header, body)"
_BATCH: Final = 64
"""Rows in one statement."""


class SchemaError(Exception):
    """The database was written by a newer release."""


@dataclass(frozen=True, slots=True)
class Settlement:
    """What an attempt came to: one transaction, so that a bounce exists if and only if its cause is recorded."""

    queue_id: str
    progress: Progress | None
    """None: everybody is settled, and the message leaves the queue."""
    next_attempt: float | None = None
    notices: tuple[tuple[Entry, Content], ...] = ()
    """Delivery status notifications to queue with it."""


def connect(path: Path, *, read_only: bool = False) -> sqlite3.Connection:
    """A connection with our settings. It is used by one thread, but not by the one that opened it."""
    if not read_only:
        path.touch(mode=0o600)  # mail is private; the WAL takes the rights of its database
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, cached_statements=64)
    connection.execute("PRAGMA busy_timeout = 10000")
    if read_only:
        connection.execute("PRAGMA query_only = ON")
        connection.execute("PRAGMA cache_size = -4096")
        return connection
    # 8 KiB pages: 200 KB bodies go in about a third faster than with 4 KiB, 2 KB ones about as fast.
    connection.execute("PRAGMA page_size = 8192")
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA wal_autocheckpoint = 2000")  # 16 MiB of WAL
    connection.execute("PRAGMA journal_size_limit = 67108864")
    connection.execute("PRAGMA cache_size = -8192")  # 8 MiB: memory stays flat
    return connection


def migrate(connection: sqlite3.Connection) -> None:
    """Bring the tables to this release's version. Raises SchemaError when they are newer than it."""
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version > len(MIGRATIONS):
        raise SchemaError(
            f"{DATABASE} has version {version}, this release knows {len(MIGRATIONS)}; run the release that wrote it"
        )
    for number in range(version, len(MIGRATIONS)):
        connection.executescript(f"BEGIN IMMEDIATE; {MIGRATIONS[number]} PRAGMA user_version = {number + 1}; COMMIT;")


def sync_directory(path: Path) -> None:
    """Make renames in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _batches(number: int) -> Iterator[tuple[int, int]]:
    """Slices of 0..number, by powers of two: few statements, and few different ones."""
    start = 0
    while start < number:
        size = min(1 << (number - start).bit_length() - 1, _BATCH)
        yield start, start + size
        start += size


class Store:
    """The changes. All of them run inside `begin` ... `commit` or `rollback` (`writer.Writer` does that).

    New messages and finished ones are gathered, and written together before the commit or whatever else comes: one
    statement for many rows takes half the time of one for each, and gives up the interpreter's lock less often.
    """

    def __init__(self, connection: sqlite3.Connection, directory: Path) -> None:
        self._connection = connection
        self._bodies = directory / BODIES
        self._moved: list[FileBody] = []
        self._unlink: list[Path] = []
        self.messages: Counter[State] = Counter()
        """How many there are, by state; as of the last commit, whatever is being written."""
        self.octets = 0
        rows = connection.execute("SELECT state, count(*), sum(size) FROM messages GROUP BY state")
        for state, number, octets in rows:
            self.messages[State(state)] = number
            self.octets += octets
        self._messages, self._octets = self.messages.copy(), self.octets
        (self._last_id,) = connection.execute("SELECT coalesce(max(id), 0) FROM messages").fetchone()
        self._new: list[tuple[object, ...]] = []
        self._new_contents: list[tuple[object, ...]] = []
        self._finished: list[str] = []

    def begin(self) -> None:
        self._messages, self._octets = self.messages.copy(), self.octets
        self._connection.execute("BEGIN IMMEDIATE")

    def commit(self) -> None:
        self._write_gathered()
        if self._moved:
            sync_directory(self._bodies)
        self._connection.execute("COMMIT")
        self.messages, self.octets = self._messages, self._octets
        self._moved.clear()
        for path in self._unlink:  # one that stays behind is an orphan, and goes at the next start
            with contextlib.suppress(OSError):
                path.unlink()
        self._unlink.clear()

    def rollback(self) -> None:
        """Back to the last commit. Bodies that were moved stay where they are: trying again finds them there."""
        if self._connection.in_transaction:
            self._connection.execute("ROLLBACK")
        self._forget_gathered()
        self._moved.clear()
        self._unlink.clear()

    def insert(self, entry: Entry, content: Content) -> None:
        body_file, body = None, None
        if isinstance(content.body, FileBody):
            body_file = entry.queue_id
            target = self._bodies / body_file
            if content.body.path != target:
                content.body.adopt(target)
            self._moved.append(content.body)
        else:
            body = b"".join(content.body.chunks())
        progress = entry.progress
        self._last_id += 1
        self._new.append(
            (
                self._last_id,
                entry.queue_id,
                entry.state.value,
                entry.next_attempt,
                entry.received_at,
                entry.size,
                entry.login,
                encode_record(entry),
                encode_progress(progress) if progress.attempts else None,
                body_file,
            )
        )
        self._new_contents.append((self._last_id, content.header, body))
        self._messages[entry.state] += 1
        self._octets += entry.size

    def _write_gathered(self) -> None:
        for table, rows in ((_MESSAGES, self._new), (_CONTENTS, self._new_contents)):
            for start, end in _batches(len(rows)):
                values = ", ".join([f"({', '.join('?' * len(rows[start]))})"] * (end - start))
                flat = list(chain(*rows[start:end]))
                self._connection.execute(f"INSERT INTO {table} VALUES {values}", flat)  # noqa: S608 - constants and question marks
        for start, end in _batches(len(self._finished)):
            self._delete(self._finished[start:end])
        self._forget_gathered()

    def _forget_gathered(self) -> None:
        self._new.clear()
        self._new_contents.clear()
        self._finished.clear()

    def _delete(self, queue_ids: Sequence[str]) -> int:
        """How many of them were there."""
        places = ", ".join("?" * len(queue_ids))
        gone = self._connection.execute(
            f"DELETE FROM messages WHERE queue_id IN ({places}) RETURNING id, state, size, body_file",  # noqa: S608 - question marks
            queue_ids,
        ).fetchall()
        if gone:
            places = ", ".join("?" * len(gone))
            numbers = [row[0] for row in gone]
            self._connection.execute(f"DELETE FROM contents WHERE id IN ({places})", numbers)  # noqa: S608 - question marks
        for _, state, size, body_file in gone:
            if body_file is not None:
                self._unlink.append(self._bodies / body_file)
            self._messages[State(state)] -= 1
            self._octets -= size
        return len(gone)

    def settle(self, settlement: Settlement) -> None:
        """Record an attempt. What an administrator did meanwhile wins: what is held stays held, what is gone gone."""
        if settlement.progress is None:
            self._finished.append(settlement.queue_id)
        else:
            self._write_gathered()
            row = self._connection.execute(
                "SELECT id, state FROM messages WHERE queue_id = ?", (settlement.queue_id,)
            ).fetchone()
            if row is not None:
                before = State(row[1])
                after = before if before in {State.HELD, State.QUARANTINED} else State.DEFERRED
                self._connection.execute(
                    "UPDATE messages SET progress = ?, state = ?, next_attempt = ? WHERE id = ?",
                    (
                        encode_progress(settlement.progress),
                        after.value,
                        settlement.next_attempt if after is State.DEFERRED else None,
                        row[0],
                    ),
                )
                self._transfer(before, after)
        for entry, content in settlement.notices:
            self.insert(entry, content)

    def remove(self, queue_id: str) -> bool:
        self._write_gathered()
        return self._delete((queue_id,)) > 0

    def move(self, queue_id: str, *, frm: Iterable[State], to: State, next_attempt: float | None) -> bool:
        """Change a message's state; False when it is not there or in none of the states `frm`."""
        self._write_gathered()
        row = self._connection.execute("SELECT id, state FROM messages WHERE queue_id = ?", (queue_id,)).fetchone()
        if row is None or State(row[1]) not in set(frm):
            return False
        self._connection.execute(
            "UPDATE messages SET state = ?, next_attempt = ? WHERE id = ?", (to.value, next_attempt, row[0])
        )
        self._transfer(State(row[1]), to)
        return True

    def restart(self, queue_id: str, progress: Progress, next_attempt: float) -> bool:
        """Due at `next_attempt`, with that progress, whatever state it has; False when it is not there."""
        done = self.move(queue_id, frm=State, to=State.ACTIVE, next_attempt=next_attempt)
        if done:
            self._connection.execute(
                "UPDATE messages SET progress = ? WHERE queue_id = ?", (encode_progress(progress), queue_id)
            )
        return done

    def flush(self, now: float) -> int:
        """Everything that waits for its time is due now; how many that were."""
        self._write_gathered()
        cursor = self._connection.execute("UPDATE messages SET next_attempt = ? WHERE next_attempt > ?", (now, now))
        return cursor.rowcount

    def quarantine(self, queue_ids: Sequence[str]) -> None:
        for queue_id in queue_ids:
            self.move(queue_id, frm=(State.ACTIVE, State.DEFERRED, State.HELD), to=State.QUARANTINED, next_attempt=None)

    def _transfer(self, before: State, after: State) -> None:
        self._messages[before] -= 1
        self._messages[after] += 1
