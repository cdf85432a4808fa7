"""Durations and quantities as a resource writes them, into seconds and octets."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Final

_DURATION_PART: Final = re.compile(r"([0-9]+)(h|ms|m|s)")
_DURATION: Final = re.compile(r"([0-9]{1,5}(h|m|s|ms)){1,4}")
_SECONDS: Final = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001}
_QUANTITY: Final = re.compile(r"([0-9]+(?:\.[0-9]+)?)([a-zA-Z]*)")
_FACTORS: Final = {
    "": Decimal(1),
    "m": Decimal("0.001"),
    **{suffix: Decimal(1000) ** power for power, suffix in enumerate("kMGTP", start=1)},
    "K": Decimal(1000),
    **{f"{suffix}i": Decimal(1024) ** power for power, suffix in enumerate("KMGTP", start=1)},
}


def seconds(text: str) -> float:
    """`1h30m` is 5400.0. The form of the Gateway API (GEP-2257): at most four numbers, each with h, m, s or ms."""
    if not _DURATION.fullmatch(text):
        raise ValueError(f"{text!r} is no duration; write it like 90s, 10m, 48h or 1h30m")
    return sum(int(number) * _SECONDS[unit] for number, unit in _DURATION_PART.findall(text))


def octets(value: int | str) -> int:
    """`25Mi` is 26214400, `2G` is 2000000000; a number is itself. Fractions of an octet count as one."""
    if isinstance(value, int):
        return value
    match = _QUANTITY.fullmatch(value)
    factor = _FACTORS.get(match.group(2)) if match else None
    if match is None or factor is None:
        raise ValueError(f"{value!r} is no quantity; write it like 1000000, 2G or 25Mi")
    exact = Decimal(match.group(1)) * factor
    return int(exact.to_integral_value(rounding="ROUND_CEILING"))
