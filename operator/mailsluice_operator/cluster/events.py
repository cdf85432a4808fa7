"""Which Events are worth posting: each (object, reason, message) once in ten minutes.

An API server throttles what posts more (EventRateLimit), and a person reads the first one.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Final

PERIOD: Final = 600.0
"""Seconds in which a repetition is dropped."""

MAXIMUM: Final = 10_000
"""Remembered Events; beyond it the oldest is forgotten, so that memory stays bounded."""


class Recent:
    """What was said lately."""

    def __init__(self, monotonic: Callable[[], float]) -> None:
        self._monotonic = monotonic
        self._said: dict[Hashable, float] = {}

    def is_news(self, what: Hashable) -> bool:
        """Whether this was not said within the period; from now on it was."""
        now = self._monotonic()
        last = self._said.get(what)
        if last is not None and now - last < PERIOD:
            return False
        self._said.pop(what, None)
        self._said[what] = now
        if len(self._said) > MAXIMUM:
            del self._said[next(iter(self._said))]
        return True
