"""Opens the queue's directory after whatever ended the last process; a bad record never keeps it from starting.

What was being read from clients had no 250 and goes. Bodies without a record go. Records without a body, or that cannot
be read, are quarantined. A database that is damaged as a whole is moved aside, and what can be read of it taken over.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import sqlite3
from pathlib import Path
from typing import Final

import structlog

from mailsluice_relay.spool.errors import SpoolError
from mailsluice_relay.spool.store import BODIES, DATABASE, INCOMING, Store, connect, migrate

QUARANTINE: Final = "quarantine"
_BATCH: Final = 500

log = structlog.get_logger("mailsluice.spool")


def lock(directory: Path) -> int:
    """Keep the directory to ourselves: two processes on one queue would send everything twice. A descriptor."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise SpoolError(f"{directory} is in use by another process; stop it first") from error
    return descriptor


def open_store(directory: Path, *, now: float) -> tuple[sqlite3.Connection, Store]:
    """The queue in `directory`, made when there is none, mended when it is damaged."""
    for name in (BODIES, INCOMING):
        (directory / name).mkdir(mode=0o700, exist_ok=True)
    for leftover in (directory / INCOMING).iterdir():
        leftover.unlink()
    try:
        connection = _opened(directory / DATABASE)
    except sqlite3.DatabaseError as error:
        if isinstance(error, sqlite3.OperationalError):  # locked, no rights, no room: nothing is wrong with the data
            raise SpoolError(f"{directory / DATABASE}: {error}") from error
        connection = _replaced(directory, now, str(error))
    store = Store(connection, directory)
    _match_bodies(connection, store, directory / BODIES)
    return connection, store


def _opened(path: Path) -> sqlite3.Connection:
    connection = connect(path)
    try:
        migrate(connection)
        # Walks the indexes and the narrow rows, and so finds damage there before it is met in the middle of work.
        connection.execute("SELECT count(*), sum(length(record)) FROM messages").fetchone()
        connection.execute("SELECT count(*) FROM messages WHERE next_attempt > 0").fetchone()
    except BaseException:
        connection.close()
        raise
    return connection


def _replaced(directory: Path, now: float, why: str) -> sqlite3.Connection:
    """Move a damaged database aside and take over into a new one what can be read of it."""
    aside = directory / QUARANTINE / f"{int(now)}"
    aside.mkdir(mode=0o700, parents=True, exist_ok=True)
    for suffix in ("", "-wal", "-shm"):
        damaged = directory / f"{DATABASE}{suffix}"
        if damaged.exists():
            shutil.move(damaged, aside / damaged.name)
    connection = _opened(directory / DATABASE)
    saved = _salvage(aside / DATABASE, connection)
    log.error("queue_database_damaged", error=why, moved_to=str(aside), messages_saved=saved)
    return connection


def _salvage(damaged: Path, connection: sqlite3.Connection) -> int:
    saved = 0
    with contextlib.suppress(sqlite3.DatabaseError), contextlib.closing(sqlite3.connect(damaged)) as old:
        (last,) = old.execute("SELECT max(id) FROM contents").fetchone()
        for number in range(1, (last or 0) + 1):
            try:
                message = old.execute("SELECT * FROM messages NOT INDEXED WHERE id = ?", (number,)).fetchone()
                content = old.execute("SELECT * FROM contents WHERE id = ?", (number,)).fetchone()
            except sqlite3.DatabaseError:
                continue
            if message is not None and content is not None:
                with contextlib.suppress(sqlite3.IntegrityError):
                    connection.execute("BEGIN IMMEDIATE")
                    connection.execute(f"INSERT INTO messages VALUES ({','.join('?' * len(message))})", message)  # noqa: S608 - question marks
                    connection.execute("INSERT INTO contents VALUES (?, ?, ?)", content)
                    saved += 1
                if connection.in_transaction:
                    connection.execute("COMMIT")
    return saved


def _match_bodies(connection: sqlite3.Connection, store: Store, bodies: Path) -> None:
    """Bodies without a record go; records without their body are quarantined."""
    missing = [
        queue_id
        for queue_id, body_file in connection.execute(
            "SELECT queue_id, body_file FROM messages WHERE body_file IS NOT NULL"
        )
        if not (bodies / body_file).is_file()
    ]
    if missing:
        store.begin()
        store.quarantine(missing)
        store.commit()
        for queue_id in missing:
            log.error("message_quarantined", queue_id=queue_id, error="the body's file is missing")
    for path in bodies.iterdir():
        known = connection.execute("SELECT 1 FROM messages WHERE body_file = ?", (path.name,)).fetchone()
        if known is None:
            path.unlink()
            log.info("orphan_body_removed", file=path.name)
