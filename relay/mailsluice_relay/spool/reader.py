"""Reads the queue: what is due, what is there, a message's content. On a connection of its own, in a thread of its own.

Nothing here loads the whole queue: every walk is a page, and pages continue where the last one ended.
"""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from mailsluice_relay.envelope import Content
from mailsluice_relay.spool.content import FileBody, MemoryBody
from mailsluice_relay.spool.record import Entry, RecordError, decode
from mailsluice_relay.spool.store import BODIES

_COLUMNS: Final = "queue_id, state, next_attempt, received_at, size, login, record, progress, body_file, id"


@dataclass(frozen=True, slots=True)
class Cursor:
    """Where a walk over what is due has come to."""

    next_attempt: float
    row: int


@dataclass(frozen=True, slots=True)
class Page:
    entries: tuple[Entry, ...]
    unreadable: tuple[tuple[str, str], ...]
    """Queue ids, each with what is wrong: to be quarantined."""
    cursor: Cursor | None
    """Where to go on; None at the end."""


class Reader:
    def __init__(self, connection: sqlite3.Connection, directory: Path) -> None:
        self._connection = connection
        self._bodies = directory / BODIES

    def due(self, now: float, after: Cursor | None, limit: int) -> Page:
        """What may be tried now, longest waiting first."""
        cursor = after or Cursor(float("-inf"), 0)
        rows = self._connection.execute(
            # The row value comparison and the order are the index's (`due` ends with the rowid).
            f"SELECT {_COLUMNS} FROM messages WHERE next_attempt <= ? AND (next_attempt, id) > (?, ?)"  # noqa: S608 - a constant
            " ORDER BY next_attempt, id LIMIT ?",
            (now, cursor.next_attempt, cursor.row, limit),
        ).fetchall()
        entries, unreadable = _decoded(rows)
        last = Cursor(rows[-1][2], rows[-1][9]) if len(rows) == limit else None
        return Page(entries, unreadable, last)

    def next_due(self, now: float) -> float | None:
        """When the next message becomes due that is not due yet."""
        (when,) = self._connection.execute(
            "SELECT min(next_attempt) FROM messages WHERE next_attempt > ?", (now,)
        ).fetchone()
        return None if when is None else float(when)

    def oldest(self) -> float | None:
        """When the oldest message that is not held was received."""
        row = self._connection.execute(  # rows are in the order in which messages came
            "SELECT received_at FROM messages WHERE next_attempt IS NOT NULL ORDER BY id LIMIT 1"
        ).fetchone()
        return None if row is None else float(row[0])

    def get(self, queue_id: str) -> Entry | None:
        """Raises RecordError for one that cannot be read."""
        row = self._connection.execute(
            f"SELECT {_COLUMNS} FROM messages WHERE queue_id = ?",  # noqa: S608 - a constant
            (queue_id,),
        ).fetchone()
        return None if row is None else _entry(row)

    def page(self, *, state: str | None, login: str | None, after: int, limit: int) -> Page:
        """Entries in the order in which they came; `after` is the last one's row, 0 at the beginning."""
        rows = self._connection.execute(
            f"SELECT {_COLUMNS} FROM messages WHERE id > ? AND (? IS NULL OR state = ?) AND (? IS NULL OR login = ?)"  # noqa: S608 - a constant
            " ORDER BY id LIMIT ?",
            (after, state, state, login, login, limit),
        ).fetchall()
        entries, unreadable = _decoded(rows)
        return Page(entries, unreadable, Cursor(0.0, rows[-1][9]) if len(rows) == limit else None)

    def content(self, queue_id: str) -> Content | None:
        """Raises RecordError when the body is not what was written."""
        row = self._connection.execute(
            "SELECT contents.header, contents.body, messages.body_file, messages.size FROM messages"
            " LEFT JOIN contents ON contents.id = messages.id WHERE queue_id = ?",
            (queue_id,),
        ).fetchone()
        if row is None:
            return None
        header, body, body_file, size = row
        if header is None:
            raise RecordError("the content is missing")
        if body_file is None:
            content = Content(header, MemoryBody(body or b""))
        else:
            path = self._bodies / body_file
            try:
                octets = path.stat().st_size
            except OSError as error:
                raise RecordError(f"the body's file cannot be read: {error.strerror}") from error
            content = Content(header, FileBody(path, octets, temporary=False))
        if content.size != size:
            raise RecordError(f"the content has {content.size} octets, {size} were taken")
        return content


def _entry(row: tuple[object, ...]) -> Entry:
    queue_id, state, next_attempt, received_at, size, login, record, progress, body_file, number = row
    return decode(
        queue_id=str(queue_id),
        state=str(state),
        next_attempt=next_attempt if isinstance(next_attempt, float) else None,
        received_at=received_at if isinstance(received_at, float) else 0.0,
        size=size if isinstance(size, int) else 0,
        login=login if isinstance(login, str) else None,
        record=record if isinstance(record, bytes) else b"",
        progress=progress if isinstance(progress, bytes) else None,
        body_file=body_file if isinstance(body_file, str) else None,
        row=number if isinstance(number, int) else 0,
    )


def _decoded(rows: list[tuple[object, ...]]) -> tuple[tuple[Entry, ...], tuple[tuple[str, str], ...]]:
    entries, unreadable = [], []
    for row in rows:
        try:
            entries.append(_entry(row))
        except RecordError as error:
            unreadable.append((str(row[0]), str(error)))
    return tuple(entries), tuple(unreadable)
