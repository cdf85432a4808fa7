"""Whether what is there already says what is wanted, so that nothing has to be written.

Wanted is what would be applied: what the API server or others add to it does not count. The same quantity may be
written in several ways (the API server turns `1000m` into `1`).
"""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Any, Final

from mailsluice_operator.children.metadata import Object

_QUANTITY: Final = re.compile(r"([0-9]+(?:\.[0-9]+)?|\.[0-9]+)(n|u|m|k|K|M|G|T|P|E|Ki|Mi|Gi|Ti|Pi|Ei)?")
_FACTORS: Final[dict[str, Decimal]] = {
    "": Decimal(1),
    "n": Decimal("1e-9"),
    "u": Decimal("1e-6"),
    "m": Decimal("1e-3"),
    "K": Decimal(1000),
    **{suffix: Decimal(1000) ** power for power, suffix in enumerate("kMGTPE", 1)},
    **{f"{suffix}i": Decimal(1024) ** power for power, suffix in enumerate("KMGTPE", 1)},
}
_QUANTITY_PARENTS: Final = frozenset({"requests", "limits", "capacity", "target"})
"""Fields that hold quantities; `target` is that of an autoscaler's metric."""


def quantity(text: object) -> Decimal | None:
    """The number that a Kubernetes quantity stands for; None when it is not one."""
    match = _QUANTITY.fullmatch(str(text))
    return Decimal(match[1]) * _FACTORS[match[2] or ""] if match else None


def satisfied(wanted: Object, found: Object) -> bool:
    """Whether applying `wanted` onto `found` would change nothing."""
    return _subset(wanted, found, "")


def has_foreign_ports(wanted: Object, found: Object) -> bool:
    """Whether a Service has ports that are not wanted, by what the API server tells ports apart."""

    def ports(body: Object) -> set[tuple[int, str]]:
        listed = (body.get("spec") or {}).get("ports") or ()
        return {(port["port"], port.get("protocol", "TCP")) for port in listed}

    return not ports(found) <= ports(wanted)


def _subset(wanted: Any, found: Any, parent: str) -> bool:
    if isinstance(wanted, dict):
        if found is None:
            found = {}
        return isinstance(found, dict) and all(
            (parent in _QUANTITY_PARENTS and _same_quantity(value, found.get(key)))
            or _subset(value, found.get(key), key)
            for key, value in wanted.items()
        )
    if isinstance(wanted, list):
        items = found if found is not None else []
        if not isinstance(items, list):
            return False
        if parent == "ownerReferences":  # others may add theirs
            return all(any(_subset(item, candidate, "") for candidate in items) for item in wanted)
        return len(wanted) == len(items) and all(_subset(a, b, "") for a, b in zip(wanted, items, strict=True))
    return bool(wanted == found)


def _same_quantity(wanted: object, found: object) -> bool:
    number = quantity(wanted)
    return number is not None and number == quantity(found)
