"""How fast an upstream may be sent to: the configured rate, its daily limit, and what its throttling replies ask for.

Pure: time is an argument. A throttling reply pauses all sending, longer each time, and spaces messages out afterwards;
every message that passes takes a part of the spacing back.
"""

from __future__ import annotations

from typing import Final

from mailsluice_relay.config import UpstreamLimits
from mailsluice_relay.delivery.allowance import DAY, Allowance

FIRST_PAUSE: Final = 1.0
LONGEST_PAUSE: Final = 300.0
FIRST_SPACING: Final = 0.1
LONGEST_SPACING: Final = 10.0
RECOVERY: Final = 0.9
"""The factor on the spacing for each message that passes."""


class Pace:
    def __init__(self, limits: UpstreamLimits, allowance: Allowance | None = None) -> None:
        self._interval = 1.0 / limits.messages_per_second if limits.messages_per_second else 0.0
        self._per_day = limits.messages_per_day
        self._free_at = float("-inf")
        """When the next message may go (theoretical arrival time of GCRA)."""
        self._resume_at = float("-inf")
        self._pause = FIRST_PAUSE
        self._spacing = 0.0
        self._allowance = allowance or Allowance()

    def reserve(self, now: float) -> float:
        """Take the next place; the seconds to wait for it."""
        interval = max(self._interval, self._spacing)
        if interval == 0.0:
            return max(0.0, self._resume_at - now)
        at = max(self._free_at, now, self._resume_at)  # no burst: providers count in every second on its own
        self._free_at = at + interval
        return max(0.0, at - now)

    def paused_for(self, now: float) -> float:
        """The seconds until the pause that the upstream asked for is over."""
        return max(0.0, self._resume_at - now)

    def throttled(self, now: float) -> float:
        """The upstream asked to be sent to more slowly; the seconds by which the pause has grown."""
        if now < self._resume_at:
            return 0.0  # replies to what was under way already say nothing new
        pause = self._pause
        self._resume_at = now + pause
        self._pause = min(self._pause * 2, LONGEST_PAUSE)
        self._spacing = min(max(self._spacing * 2, FIRST_SPACING, self._interval * 2), LONGEST_SPACING)
        return pause

    def passed(self) -> None:
        """A message was taken."""
        if self._spacing:
            self._spacing *= RECOVERY
            if self._spacing < FIRST_SPACING / 10 or self._spacing < self._interval:
                self._spacing = 0.0
                self._pause = FIRST_PAUSE

    def used_up_until(self, epoch: float) -> float | None:
        """When the daily limit starts anew (seconds since the epoch, UTC midnight); None: it is not used up."""
        if self._per_day is None or self._allowance.used_on(epoch) < self._per_day:
            return None
        return float((int(epoch // DAY) + 1) * DAY)

    def count(self, epoch: float) -> None:
        """One message of today's."""
        if self._per_day is not None:
            self._allowance.count(epoch, self._per_day)
