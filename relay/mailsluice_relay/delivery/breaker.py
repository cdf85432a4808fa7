"""Whether an upstream is up, and when one that is down is looked at again. Pure: clock and randomness are arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from mailsluice_relay.delivery.outcome import FailureClass

TOLERANCE: Final = 3
"""Sessions in a row that may fail before the upstream counts as down. One, where time heals nothing by itself."""
AT_ONCE: Final = frozenset({FailureClass.AUTHENTICATION, FailureClass.TLS})
FIRST_PROBE: Final = 2.0
LAST_PROBE: Final = 300.0


class Breaker:
    def __init__(self, random: Callable[[], float]) -> None:
        self._random = random
        self._failures = 0
        self._delay = FIRST_PROBE
        self.is_up = True
        self.failure: FailureClass | None = None
        self.last_error = ""
        self.probe_at = 0.0

    def failed(self, now: float, failure: FailureClass, error: str) -> None:
        """A session has failed. Sessions that were begun together fail together: while the upstream is down, only what
        comes at or after the next look makes the time to the one after it longer."""
        if not self.is_up and now < self.probe_at:
            return
        self._failures += 1
        self.failure, self.last_error = failure, error
        if self.is_up and self._failures < TOLERANCE and failure not in AT_ONCE:
            return
        self.is_up = False
        self.probe_at = now + self._delay * (0.75 + 0.5 * self._random())
        self._delay = min(self._delay * 2, LAST_PROBE)

    def succeeded(self) -> None:
        self._failures = 0
        self._delay = FIRST_PROBE
        self.is_up = True
        self.failure = None
        self.last_error = ""
