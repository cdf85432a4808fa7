"""Names of messages in the queue: ordered by time, short, never the same twice. Clock and randomness are arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

ALPHABET: Final = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
"""Base 32 without I, L, O and U: they are read out over the telephone. Ordered as ASCII is."""

LENGTH: Final = 13
_SHIFTS: Final = range((LENGTH - 1) * 5, -1, -5)
_RANDOM_BITS: Final = 20
_MASK: Final = (1 << _RANDOM_BITS) - 1
_DRAWN_AT_ONCE: Final = 64
"""Ids for which random bits are drawn together: the system's randomness is a system call."""


class QueueIds:
    """Milliseconds since the epoch, then random bits; strictly growing in a process, also when the clock goes back."""

    def __init__(self, now: Callable[[], float], random_bits: Callable[[int], int]) -> None:
        self._now = now
        self._random_bits = random_bits
        self._last = 0
        self._bits, self._drawn = 0, 0

    def __call__(self) -> str:
        if not self._drawn:
            self._bits, self._drawn = self._random_bits(_RANDOM_BITS * _DRAWN_AT_ONCE), _DRAWN_AT_ONCE
        value = (int(self._now() * 1000) << _RANDOM_BITS) | (self._bits & _MASK)
        self._bits >>= _RANDOM_BITS
        self._drawn -= 1
        self._last = value = max(value, self._last + 1)
        return "".join([ALPHABET[value >> shift & 31] for shift in _SHIFTS])
