"""How the spool says no. The session answers both with 452 4.3.1; neither is ever a mail that got 250."""

from __future__ import annotations

import errno
import sqlite3

_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT})


class SpoolError(Exception):
    """The disk or the database failed; nothing of the operation was kept."""


class SpoolFull(SpoolError):  # noqa: N818 - it reads as the state that it is, like the reply's name
    """There is no room: the quota, or the disk less its reserve, is used up."""


def translated(error: OSError | sqlite3.Error) -> SpoolError:
    """The spool's own error for one of the operating system's or the database's."""
    if isinstance(error, OSError):
        return SpoolFull(str(error)) if error.errno in _NO_ROOM else SpoolError(str(error))
    code = getattr(error, "sqlite_errorcode", None)
    return SpoolFull(str(error)) if code == sqlite3.SQLITE_FULL else SpoolError(f"queue database: {error}")
