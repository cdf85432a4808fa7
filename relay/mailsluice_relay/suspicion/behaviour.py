"""What each identity did lately, as far as rules ask: counts and sets over sliding windows. Pure: time is an argument.

Everything is bounded: identities, and what is kept of each. A window is counted in twenty slots, so that a count
forgets a twentieth of its window at a time, and never more than that too late.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Final

MAXIMUM_IDENTITIES: Final = 20_000
MAXIMUM_VALUES: Final = 256
"""Distinct networks or bodies kept of one identity; the longest unseen goes first."""

_SLOTS: Final = 20


class WindowCount:
    """A sum over the last `window` seconds."""

    __slots__ = ("_slots",)

    def __init__(self) -> None:
        self._slots: dict[int, int] = {}

    def add(self, amount: int, window: float, now: float) -> int:
        """The sum with `amount` in it."""
        current = int(now / (window / _SLOTS))
        self._slots[current] = self._slots.get(current, 0) + amount
        return self.total(window, now)

    def total(self, window: float, now: float) -> int:
        """The sum as it stands."""
        if not self._slots:
            return 0
        current = int(now / (window / _SLOTS))
        for slot in [slot for slot in self._slots if not current - _SLOTS < slot <= current]:
            del self._slots[slot]
        return sum(self._slots.values())


class WindowSet:
    """The distinct values of the last `window` seconds."""

    __slots__ = ("_seen",)

    def __init__(self) -> None:
        self._seen: OrderedDict[str, float] = OrderedDict()

    def add(self, value: str, window: float, now: float) -> int:
        """How many values there are with this one."""
        self._seen[value] = now
        self._seen.move_to_end(value)
        while self._seen:
            oldest, seen = next(iter(self._seen.items()))
            if seen > now - window and len(self._seen) <= MAXIMUM_VALUES:
                break
            del self._seen[oldest]
        return len(self._seen)


HOUR: Final = 3600.0
DAY: Final = 24 * HOUR
LEARNING: Final = 3
"""Days with mail after which it is known what is usual."""
_WEIGHT: Final = 0.2
"""Of the newest day. A change of habit is half learnt after three days with mail."""
_GROWTH: Final = 2.0
"""One day counts at most as so many times the usual: who floods once does not make that usual."""
_DEVIATION: Final = 1.25
"""Standard deviations in a mean absolute deviation, of the normal distribution."""
_LEAST_DEVIATION: Final = 0.25
"""Of the average: what is the same every day still varies by chance."""


class Volume:
    """Recipients in the busiest hour of a day, and what is usual there.

    The average and the mean absolute deviation are exponentially weighted, and forget slowly. Days are compared and not
    hours, as one nightly batch is regular mail; days without mail do not count, so that a monthly newsletter is, too.
    """

    __slots__ = ("_average", "_busiest", "_count", "_day", "_days", "_deviation", "_hour")

    def __init__(self) -> None:
        self._hour = self._day = -1
        self._count = self._busiest = self._days = 0
        self._average = self._deviation = 0.0

    def add(self, amount: int, now: float) -> int:
        """This hour's count with `amount` in it."""
        day, hour = int(now / DAY), int(now / HOUR)
        if day != self._day:
            if self._busiest:
                self._learn(self._busiest)
            self._day, self._busiest = day, 0
        if hour != self._hour:
            self._hour, self._count = hour, 0
        self._count += amount
        self._busiest = max(self._busiest, self._count)
        return self._count

    def usual(self, deviations: float) -> float | None:
        """So many standard deviations above the average; None while too little is known."""
        if self._days < LEARNING:
            return None
        deviation = max(self._deviation * _DEVIATION, self._average * _LEAST_DEVIATION)
        return self._average + deviations * deviation

    def _learn(self, busiest: float) -> None:
        if self._days == 0:
            self._average = busiest
        elif self._days >= LEARNING:
            busiest = min(busiest, self._average * _GROWTH)
        distance = abs(busiest - self._average)
        if self._days:
            self._average += _WEIGHT * (busiest - self._average)
            self._deviation += _WEIGHT * (distance - self._deviation)
        self._days += 1


@dataclass(slots=True)
class Behaviour:
    """Of one identity."""

    recipients: WindowCount = field(default_factory=WindowCount)
    settled: WindowCount = field(default_factory=WindowCount)
    """Recipients of which it is known whether they exist."""
    unknown: WindowCount = field(default_factory=WindowCount)
    """Those that do not."""
    volume: Volume = field(default_factory=Volume)
    networks: WindowSet = field(default_factory=WindowSet)
    bodies: OrderedDict[int, WindowCount] = field(default_factory=OrderedDict)

    def body(self, digest: int) -> WindowCount:
        """The recipients of one body."""
        count = self.bodies.setdefault(digest, WindowCount())
        self.bodies.move_to_end(digest)
        if len(self.bodies) > MAXIMUM_VALUES:
            self.bodies.popitem(last=False)
        return count


class History:
    """The behaviour of identities: a login, or the network of a client that is let in without one."""

    def __init__(self, maximum: int = MAXIMUM_IDENTITIES) -> None:
        self._maximum = maximum
        self._behaviours: OrderedDict[str, Behaviour] = OrderedDict()

    def __len__(self) -> int:
        return len(self._behaviours)

    def of(self, identity: str) -> Behaviour:
        behaviour = self._behaviours.setdefault(identity, Behaviour())
        self._behaviours.move_to_end(identity)
        if len(self._behaviours) > self._maximum:
            self._behaviours.popitem(last=False)
        return behaviour
