"""What came of a login's recipients, for those who judge its next mail. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

from mailsluice_relay.delivery.outcome import Delivered, Failed, Outcome

UNKNOWN_RECIPIENT: Final = frozenset({"5.1.1", "5.1.2", "5.1.3", "5.1.6", "5.1.10"})
"""No such mailbox or domain, no address at all, moved away, or a domain that takes no mail (RFC 3463 section 3.2,
RFC 7505). The other codes of the group are about the sender."""

OnSettled = Callable[[str, int, int], None]
"""Is told a login, how many recipients of its are settled, and how many of those do not exist."""


def tally(outcomes: Iterable[Outcome]) -> tuple[int, int]:
    """Recipients that are settled, and of those the ones that do not exist."""
    settled = [outcome for outcome in outcomes if isinstance(outcome, Delivered | Failed)]
    unknown = sum(isinstance(outcome, Failed) and outcome.status in UNKNOWN_RECIPIENT for outcome in settled)
    return len(settled), unknown
