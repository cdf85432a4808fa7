"""The decisions of an election: who may take the Lease, and until when the one who has it may write. Pure.

Times are readings of the process's own clock; those in the Lease are for people. No two clocks are ever compared: a
holder is dead when its Lease has not changed for its whole duration since *we* first saw it so. The holder counts from
before it asked for the renewal, others from after they saw it, and it stops `MARGIN` earlier than they begin.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

DURATION: Final = 15.0
"""Seconds of silence after which the leader is taken for dead."""
MARGIN: Final = 5.0
"""Seconds before that at which a leader stops writing: for a write that is on its way, and for clocks that drift."""
RENEWAL: Final = 2.0
"""Seconds between renewals; several may fail before the deadline."""
POLL: Final = 1.0
"""Seconds between the looks of those who wait."""


@dataclass(frozen=True)
class Record:
    """What a Lease says."""

    holder: str
    """Empty when it was released."""
    duration: float
    renewed: str
    """When, by the holder's clock. Only that it changes counts."""
    acquired: str
    transitions: int


class Candidate:
    """One process's view of the election."""

    def __init__(self, identity: str, *, duration: float = DURATION, margin: float = MARGIN) -> None:
        self.identity = identity
        self._duration = duration
        self._margin = margin
        self._record: Record | None = None
        self._seen_at = -math.inf
        self._deadline = -math.inf

    def saw(self, record: Record | None, now: float) -> None:
        """The Lease as it is now; None when there is none."""
        if record != self._record:
            self._record = record
            self._seen_at = now

    def free_in(self, now: float) -> float:
        """Seconds until the Lease may be taken, as far as is known; 0 when it may be now."""
        if self._record is None or self._record.holder in ("", self.identity):
            return 0.0
        return max(0.0, self._seen_at + self._record.duration - now)

    def holds(self) -> bool:
        """Whether the Lease, as it was last seen, names this process."""
        return self._record is not None and self._record.holder == self.identity

    def bid(self, wall_clock: str) -> Record:
        """What to write, to take the Lease or to renew it."""
        former = self._record
        if former is not None and former.holder == self.identity:
            return Record(self.identity, self._duration, wall_clock, former.acquired, former.transitions)
        transitions = former.transitions + 1 if former is not None else 0
        return Record(self.identity, self._duration, wall_clock, wall_clock, transitions)

    def won(self, record: Record, asked_at: float, now: float) -> None:
        """The bid is in the Lease; it was sent at `asked_at`."""
        self.saw(record, now)
        self._deadline = asked_at + self._duration - self._margin

    def gives_up(self) -> None:
        """This process writes nothing more, whatever the Lease says."""
        self._deadline = -math.inf

    def may_write_for(self, now: float) -> float:
        """Seconds in which this process may still write; not above 0: it may not."""
        return self._deadline - now
