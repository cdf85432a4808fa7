"""How many messages each upstream has had today (UTC), for limits by the day; outlives restarts and new configurations.

What is on the disk is always ahead of what was sent, by a hundredth of the limit at most: a process that is killed goes
on from there and errs on the provider's side. One small write for each such block, none for a message.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec
import structlog

DAY: Final = 86400
"""Seconds."""

log = structlog.get_logger("mailsluice.delivery")


def _not_kept() -> None:
    """For an allowance that is nobody else's."""


@dataclass(slots=True)
class Allowance:
    """Of one upstream."""

    day: int = 0
    """Days since the epoch."""
    used: int = 0
    reserved: int = 0
    """Up to where the disk knows of it."""
    keep: Callable[[], None] = _not_kept

    def used_on(self, epoch: float) -> int:
        return self.used if int(epoch // DAY) == self.day else 0

    def count(self, epoch: float, limit: int) -> None:
        """One message, of at most `limit` a day."""
        day = int(epoch // DAY)
        if day != self.day:
            self.day, self.used, self.reserved = day, 0, 0
        self.used += 1
        if self.used > self.reserved:
            self.reserved = self.used - 1 + max(1, limit // 100)
            self.keep()


class AllowanceBook:
    """All upstreams' allowances, in one file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._allowances: dict[str, Allowance] = {}
        try:
            kept = msgspec.json.decode(path.read_bytes(), type=dict[str, tuple[int, int]])
        except FileNotFoundError:
            kept = {}
        except (OSError, msgspec.MsgspecError) as error:
            log.warning("allowances_unreadable", error=str(error), consequence="limits by the day begin anew")
            kept = {}
        for name, (day, used) in kept.items():
            self._allowances[name] = Allowance(day, used, used, self._write)

    def of(self, name: str) -> Allowance:
        """The same for a name whatever its configuration is: the provider counts on."""
        if name not in self._allowances:
            self._allowances[name] = Allowance(keep=self._write)
        return self._allowances[name]

    def close(self) -> None:
        """What was reserved and not used is given back."""
        for allowance in self._allowances.values():
            allowance.reserved = allowance.used
        if self._allowances:
            self._write()

    def _write(self) -> None:
        newest = max(allowance.day for allowance in self._allowances.values())
        kept = {name: (a.day, a.reserved) for name, a in self._allowances.items() if a.day == newest and a.reserved}
        draft = self._path.with_name(f".{self._path.name}.new")
        try:
            draft.write_bytes(msgspec.json.encode(kept))
            draft.replace(self._path)
        except OSError as error:  # mail is more important than the count
            log.warning("allowances_not_kept", error=str(error), consequence="a restart would count anew")
            with contextlib.suppress(OSError):
                draft.unlink(missing_ok=True)


__all__ = ["DAY", "Allowance", "AllowanceBook"]
