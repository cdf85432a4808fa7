"""What there is to tell people: a reason from the closed list, and words."""

from __future__ import annotations

from typing import NamedTuple


class Fact(NamedTuple):
    """The reason of a condition or an Event, and the message that names the object, the field and the remedy."""

    reason: str
    message: str
