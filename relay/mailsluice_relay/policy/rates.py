"""Rate limits: the generic cell rate algorithm (ITU-T I.371) over several limits at once. Pure: time is an argument.

Each limit keeps one number a key, its theoretical arrival time (TAT): when what was charged would be worked off at the
limit's steady rate. A message fits while that lies no further ahead than the burst takes to work off. No window
begins anew at a full hour, and a quiet key costs no memory.

A message is charged to all its limits or to none. Where the counts are kept is behind `Store`: in this process, or
in one that the replicas share (`limit_store`), which does a charge in one atomic step.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from mailsluice_relay.config import RateLimit, RateLimitKey, RateLimitUnit

MAXIMUM_KEYS: Final = 100_000
"""Counts kept, about 20 MB. Beyond it the longest untouched is forgotten."""

_SWEPT_PER_CHARGE: Final = 4


@dataclass(frozen=True, slots=True)
class Subject:
    """Who sends, as limits count them."""

    user: str
    """The login; for a client that is let in by its network, that network."""
    namespace: str
    network: str
    sender_domain: str
    """Normalised; empty for the null reverse-path."""


@dataclass(frozen=True, slots=True)
class Quantity:
    """What is sent, in every unit."""

    messages: int
    recipients: int
    octets: int


@dataclass(frozen=True, slots=True)
class Charge:
    """One limit's share of a message."""

    limit: RateLimit
    key: str
    amount: int
    is_own: bool = False
    """Of a limit that the user has, and not the relay."""

    @property
    def seconds(self) -> float:
        """How long the limit's steady rate takes to work this off."""
        return self.amount * self.limit.window / self.limit.limit

    @property
    def tolerance(self) -> float:
        """How far ahead the TAT may lie."""
        return (self.limit.burst or self.limit.limit) * self.limit.window / self.limit.limit


@dataclass(frozen=True, slots=True)
class Decision:
    """`exceeded` is None when the charges were taken; else the one that makes the client wait longest."""

    exceeded: Charge | None = None
    retry_after: float = 0.0
    """Seconds; infinite when the message alone is more than the limit's burst."""
    taken_by: Store | None = None
    """Who took the charges, and can refund them."""


class StoreUnavailableError(Exception):
    """The counts cannot be reached, and nobody may count in their place."""


class Store(Protocol):
    """Where the counts are. May raise StoreUnavailableError."""

    async def charge(self, charges: Sequence[Charge]) -> Decision:
        """Take all charges, or none and say which limit was exceeded."""
        ...

    async def peek(self, charges: Sequence[Charge]) -> Decision:
        """What `charge` would decide now; takes nothing."""
        ...

    def refund(self, charges: Sequence[Charge]) -> None:
        """Give back what `charge` took. It need not have happened when this returns."""
        ...


def charges_of(
    limits: Iterable[RateLimit], own_limits: Iterable[RateLimit], subject: Subject, quantity: Quantity
) -> tuple[Charge, ...]:
    """What a message is charged for: the relay's limits, and the user's own, which count for that user alone."""
    shared = [Charge(limit, f"{limit.name} {key_of(limit.per, subject)}", _amount(limit, quantity)) for limit in limits]
    own = [
        Charge(limit, f"{limit.name} of {subject.user}", _amount(limit, quantity), is_own=True) for limit in own_limits
    ]
    return (*shared, *own)


def key_of(per: RateLimitKey, subject: Subject) -> str:
    match per:
        case RateLimitKey.USER:
            return f"user {subject.user}"
        case RateLimitKey.NAMESPACE:
            return f"namespace {subject.namespace}"
        case RateLimitKey.SOURCE_NETWORK:
            return f"network {subject.network}"
        case RateLimitKey.SENDER_DOMAIN:
            return f"domain {subject.sender_domain}"
        case RateLimitKey.RELAY:
            return "relay"


def hopeless(charges: Iterable[Charge]) -> Charge | None:
    """A charge that no waiting helps: the message alone is more than the limit's burst."""
    return next((charge for charge in charges if charge.seconds > charge.tolerance), None)


def _amount(limit: RateLimit, quantity: Quantity) -> int:
    match limit.unit:
        case RateLimitUnit.MESSAGES:
            return quantity.messages
        case RateLimitUnit.RECIPIENTS:
            return quantity.recipients
        case RateLimitUnit.BYTES:
            return quantity.octets


class MemoryStore:
    """Counts in this process."""

    def __init__(self, monotonic: Callable[[], float], maximum_keys: int = MAXIMUM_KEYS) -> None:
        self._monotonic = monotonic
        self._maximum_keys = maximum_keys
        self._arrivals: OrderedDict[str, float] = OrderedDict()
        self._taken = Decision(taken_by=self)

    def __len__(self) -> int:
        return len(self._arrivals)

    async def charge(self, charges: Sequence[Charge]) -> Decision:
        now = self._monotonic()
        decision = self._decide(charges, now)
        if decision.exceeded is not None:
            return decision
        for charge in charges:
            self._arrivals[charge.key] = max(self._arrivals.get(charge.key, now), now) + charge.seconds
            self._arrivals.move_to_end(charge.key)
        self._forget(now)
        return self._taken

    async def peek(self, charges: Sequence[Charge]) -> Decision:
        return self._decide(charges, self._monotonic())

    def refund(self, charges: Sequence[Charge]) -> None:
        for charge in charges:
            arrival = self._arrivals.get(charge.key)
            if arrival is not None:
                self._arrivals[charge.key] = arrival - charge.seconds

    def _decide(self, charges: Sequence[Charge], now: float) -> Decision:
        if (never := hopeless(charges)) is not None:
            return Decision(never, math.inf)
        worst = Decision()
        for charge in charges:
            excess = max(self._arrivals.get(charge.key, now) - now, 0.0) + charge.seconds - charge.tolerance
            # Adding and subtracting times leaves rounding errors that would refuse the last of a burst.
            if excess > 1e-6 * charge.tolerance and excess > worst.retry_after:
                worst = Decision(charge, excess)
        return worst

    def _forget(self, now: float) -> None:
        """Drop counts that are worked off, a few at a time from the longest untouched, and what is over the bound."""
        for _ in range(_SWEPT_PER_CHARGE):
            key = next(iter(self._arrivals), None)
            if key is None or self._arrivals[key] > now:
                break
            del self._arrivals[key]
        while len(self._arrivals) > self._maximum_keys:
            self._arrivals.popitem(last=False)
