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
        width = window / _SLOTS
        current = int(now / width)
        self._slots[current] = self._slots.get(current, 0) + amount
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


@dataclass(slots=True)
class Behaviour:
    """Of one identity."""

    recipients: WindowCount = field(default_factory=WindowCount)
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
