"""The mail that waits in memory for one upstream, and how much of it there may be. Pure.

One lane for each upstream: mail for a slow or dead one never stands in the way of mail for another. What does not fit
stays in the store and is fetched when the lane has drained; a login with much mail may fill the lane, but always leaves
others their share.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from mailsluice_relay.delivery.fair import FairQueue
from mailsluice_relay.envelope import Content
from mailsluice_relay.spool.record import Entry

LANE_LIMIT: Final = 500
LOGIN_SHARE: Final = 20
"""Messages of one login that still come in when the lane is full."""


@dataclass(slots=True, eq=False)
class Item:
    """A message that is due. `content` is there when it was just taken and memory allowed, else it is in the store."""

    entry: Entry
    lane: str
    content: Content | None = None
    octets: int = 0
    """Of memory that the content takes."""
    withdrawn: bool = False
    """Held or removed while it waited."""
    is_running: bool = False


@dataclass(slots=True)
class Lane:
    slots: int
    """Messages under way at once: the upstream's connections."""
    running: int = 0
    recording: int = 0
    """Messages that are through, and whose outcome is being written: the next ones need not wait for the disk. Bounded,
    as these are the ones that would be sent twice if the process were killed now."""
    waiting: FairQueue[Item] = field(default_factory=FairQueue)

    def has_room(self, login: str) -> bool:
        return len(self.waiting) < LANE_LIMIT or self.waiting.count(login) < LOGIN_SHARE

    @property
    def has_drained(self) -> bool:
        """Time to fetch more."""
        return len(self.waiting) <= LANE_LIMIT // 2

    def add(self, item: Item) -> None:
        self.waiting.push(item.entry.login or "", item)

    def next(self) -> Item | None:
        """What to send now; None when nothing waits or all slots are taken. Counts it as running."""
        while self.running < self.slots and self.recording < self.slots and self.waiting:
            item = self.waiting.pop()
            if not item.withdrawn:
                self.running += 1
                item.is_running = True
                return item
        return None

    def delivered(self) -> None:
        self.running -= 1
        self.recording += 1

    def recorded(self) -> None:
        self.recording -= 1
