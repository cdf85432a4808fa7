"""Names of messages in the queue: ordered by time, short, never the same twice. Clock and randomness are arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

ALPHABET: Final = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
"""Base 32 without I, L, O and U: they are read out over the telephone. Ordered as ASCII is."""

LENGTH: Final = 13
_RANDOM_BITS: Final = 20


class QueueIds:
    """Milliseconds since the epoch, then random bits; strictly growing in a process, also when the clock goes back."""

    def __init__(self, now: Callable[[], float], random_bits: Callable[[int], int]) -> None:
        self._now = now
        self._random_bits = random_bits
        self._last = 0

    def __call__(self) -> str:
        value = (int(self._now() * 1000) << _RANDOM_BITS) | self._random_bits(_RANDOM_BITS)
        self._last = value = max(value, self._last + 1)
        return "".join(ALPHABET[value >> shift & 31] for shift in range((LENGTH - 1) * 5, -1, -5))
