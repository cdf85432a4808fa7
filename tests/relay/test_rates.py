"""Rate limits: never more than the limit allows, all of a message's limits or none, and no memory for the quiet."""

import asyncio
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mailsluice_relay.config import RateLimit, RateLimitKey, RateLimitUnit
from mailsluice_relay.policy.rates import Charge, Decision, MemoryStore, Quantity, Subject, charges_of

ANN = Subject(user="ann", namespace="team", network="192.0.2.0/24", sender_domain="example.test")


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def limit(name: str = "l", *, amount: int, window: float, burst: int | None = None, **more: object) -> RateLimit:
    settings: dict[str, object] = {"unit": RateLimitUnit.MESSAGES, **more}
    return RateLimit(name=name, limit=amount, window=window, burst=burst, **settings)  # type: ignore[arg-type]  # checked by msgspec


def charge(store: MemoryStore, *charges: Charge) -> Decision:
    return asyncio.run(store.charge(charges))


def peek(store: MemoryStore, *charges: Charge) -> Decision:
    return asyncio.run(store.peek(charges))


def test_a_burst_then_the_steady_rate() -> None:
    clock = Clock()
    store = MemoryStore(clock)
    one = Charge(limit(amount=60, window=60.0, burst=5), "ann", 1)
    assert [charge(store, one).exceeded for _ in range(5)] == [None] * 5
    refused = charge(store, one)
    assert refused.exceeded is one
    assert refused.retry_after == pytest.approx(1.0)
    clock.now += refused.retry_after
    assert charge(store, one).exceeded is None
    assert charge(store, one).exceeded is one


def test_the_whole_limit_may_come_at_once_when_no_burst_is_given() -> None:
    store = MemoryStore(Clock())
    one = Charge(limit(amount=10, window=3600.0), "ann", 1)
    assert sum(charge(store, one).exceeded is None for _ in range(20)) == 10


def test_a_message_over_the_burst_alone_can_never_pass() -> None:
    store = MemoryStore(Clock())
    decision = charge(store, Charge(limit(amount=100, window=60.0, burst=10), "ann", 11))
    assert decision.exceeded is not None
    assert math.isinf(decision.retry_after)


def test_all_or_nothing() -> None:
    store = MemoryStore(Clock())
    wide, narrow = limit("wide", amount=10, window=60.0), limit("narrow", amount=1, window=60.0)
    both = (Charge(wide, "w", 1), Charge(narrow, "n", 1))
    assert charge(store, *both).exceeded is None
    for _ in range(20):
        decision = charge(store, *both)
        assert decision.exceeded is both[1]
    assert sum(charge(store, both[0]).exceeded is None for _ in range(20)) == 9


def test_the_limit_that_makes_the_client_wait_longest_is_named() -> None:
    store = MemoryStore(Clock())
    minute = Charge(limit("minute", amount=1, window=60.0), "m", 1)
    day = Charge(limit("day", amount=1, window=86400.0), "d", 1)
    charge(store, minute, day)
    for order in ((minute, day), (day, minute)):
        decision = charge(store, *order)
        assert decision.exceeded is day
        assert decision.retry_after == pytest.approx(86400)


def test_peeking_takes_nothing_and_says_what_a_charge_would() -> None:
    store = MemoryStore(Clock())
    one = Charge(limit(amount=1, window=60.0), "ann", 1)
    assert [peek(store, one).exceeded for _ in range(5)] == [None] * 5
    charge(store, one)
    assert peek(store, one).exceeded is one


def test_a_refund_gives_back_what_was_charged() -> None:
    store = MemoryStore(Clock())
    two = Charge(limit(amount=2, window=60.0), "ann", 2)
    charge(store, two)
    assert charge(store, two).exceeded is two
    store.refund([two])
    assert charge(store, two).exceeded is None


def test_a_refund_of_what_is_worked_off_gives_no_credit() -> None:
    clock = Clock()
    store = MemoryStore(clock)
    one = Charge(limit(amount=1, window=60.0), "ann", 1)
    charge(store, one)
    clock.now += 3600
    store.refund([one])
    assert charge(store, one).exceeded is None
    assert charge(store, one).exceeded is one


@settings(deadline=None)  # other work on the machine is no fault of the code
@given(
    amount=st.integers(1, 50),
    window=st.sampled_from([1.0, 60.0, 3600.0, 86400.0]),
    burst=st.none() | st.integers(1, 50),
    steps=st.lists(st.tuples(st.floats(0, 5000), st.integers(1, 10)), min_size=1, max_size=80),
)
def test_no_window_ever_has_more_than_limit_and_burst(
    amount: int, window: float, burst: int | None, steps: list[tuple[float, int]]
) -> None:
    clock = Clock()
    store = MemoryStore(clock)
    rate = limit(amount=amount, window=window, burst=burst)
    taken: list[tuple[float, int]] = []
    for wait, quantity in steps:
        clock.now += wait
        if charge(store, Charge(rate, "ann", quantity)).exceeded is None:
            taken.append((clock.now, quantity))
    for start, _ in taken:
        within = sum(quantity for when, quantity in taken if start <= when < start + window)
        assert within <= amount + (burst or amount)


@settings(deadline=None)  # other work on the machine is no fault of the code
@given(
    quantities=st.lists(st.integers(1, 5), min_size=1, max_size=20),
    waits=st.lists(st.floats(0, 30), min_size=20, max_size=20),
)
def test_waiting_as_told_is_enough(quantities: list[int], waits: list[float]) -> None:
    clock = Clock()
    store = MemoryStore(clock)
    limits = [limit("a", amount=5, window=10.0), limit("b", amount=30, window=100.0, burst=6)]
    for quantity, wait in zip(quantities, waits, strict=False):
        clock.now += wait
        charges = [Charge(one, one.name, quantity) for one in limits]
        decision = charge(store, *charges)
        if decision.exceeded is not None:
            clock.now += decision.retry_after
            assert charge(store, *charges).exceeded is None


@settings(deadline=None)  # other work on the machine is no fault of the code
@given(st.permutations(range(4)), st.lists(st.integers(1, 3), min_size=1, max_size=20))
def test_the_order_of_limits_changes_no_decision(order: list[int], quantities: list[int]) -> None:
    limits = [limit(str(number), amount=amount, window=60.0) for number, amount in enumerate((5, 9, 7, 20))]
    plain, shuffled = MemoryStore(Clock()), MemoryStore(Clock())
    for quantity in quantities:
        charges = [Charge(one, one.name, quantity) for one in limits]
        first = charge(plain, *charges)
        second = charge(shuffled, *[charges[index] for index in order])
        assert (first.exceeded is None) == (second.exceeded is None)
        assert first.retry_after == second.retry_after


def test_quiet_keys_are_forgotten_and_their_number_is_bounded() -> None:
    clock = Clock()
    store = MemoryStore(clock, maximum_keys=100)
    rate = limit(amount=1, window=60.0)
    for number in range(500):
        charge(store, Charge(rate, f"busy {number}", 1))
    assert len(store) == 100
    clock.now += 61
    for number in range(50):
        charge(store, Charge(rate, f"later {number}", 1))
    assert len(store) == 50


def test_what_each_limit_counts_for_whom() -> None:
    quantity = Quantity(messages=1, recipients=7, octets=2048)
    limits = [
        limit(per.value, amount=9, window=1.0, per=per, unit=unit)
        for per, unit in zip(RateLimitKey, [*RateLimitUnit, RateLimitUnit.BYTES, RateLimitUnit.BYTES], strict=True)
    ]
    own = [limit("mine", amount=5, window=1.0, per=RateLimitKey.RELAY)]
    found = [(one.key, one.amount, one.is_own) for one in charges_of(limits, own, ANN, quantity)]
    assert found == [
        ("User user ann", 1, False),
        ("Namespace namespace team", 7, False),
        ("SourceNetwork network 192.0.2.0/24", 2048, False),
        ("SenderDomain domain example.test", 2048, False),
        ("Relay relay", 2048, False),
        ("mine of ann", 1, True),
    ]


def test_a_users_own_limit_is_inside_the_relays_and_of_that_user_alone() -> None:
    store = MemoryStore(Clock())
    relays, own = [limit("relay", amount=3, window=60.0)], [limit("relay", amount=2, window=60.0)]
    bob = Subject(user="bob", namespace="team", network=ANN.network, sender_domain="example.test")
    one = Quantity(1, 1, 1)
    results = [charge(store, *charges_of(relays, own, ANN, one)).exceeded for _ in range(3)]
    assert results[:2] == [None, None]
    assert results[2] is not None
    assert results[2].is_own
    assert charge(store, *charges_of(relays, own, bob, one)).exceeded is None
