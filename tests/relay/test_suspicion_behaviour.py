"""Windows forget in time, and nothing grows without bound."""

from hypothesis import given, settings
from hypothesis import strategies as st

from mailsluice_relay.suspicion.behaviour import MAXIMUM_VALUES, Behaviour, History, WindowCount, WindowSet


@settings(deadline=None)  # other work on the machine is no fault of the code
@given(st.lists(st.tuples(st.floats(0, 40), st.integers(1, 9)), min_size=1, max_size=60))
def test_a_count_is_exact_to_a_twentieth_of_its_window(steps: list[tuple[float, int]]) -> None:
    count, now, added = WindowCount(), 0.0, []
    for wait, amount in steps:
        now += wait
        added.append((now, amount))
        result = count.add(amount, 100.0, now)
        assert result >= sum(amount for when, amount in added if when > now - 95.0)
        assert result <= sum(amount for when, amount in added if when >= now - 100.0)
        assert len(count._slots) <= 20


def test_a_set_counts_distinct_values_of_its_window() -> None:
    seen = WindowSet()
    assert [seen.add(value, 10.0, now) for value, now in (("a", 0), ("b", 5), ("a", 6), ("c", 7))] == [1, 2, 2, 3]
    assert seen.add("c", 10.0, 15.5) == 2  # b is gone, a was seen again
    assert seen.add("c", 10.0, 100.0) == 1


def test_bounds() -> None:
    behaviour, history = Behaviour(), History(maximum=10)
    for number in range(MAXIMUM_VALUES + 50):
        behaviour.networks.add(str(number), 60.0, 1.0)
        behaviour.body(number).add(1, 60.0, 1.0)
        history.of(str(number))
    assert behaviour.networks.add("last", 60.0, 1.0) == MAXIMUM_VALUES
    assert len(behaviour.bodies) == MAXIMUM_VALUES
    assert len(history) == 10


def test_who_was_seen_last_is_remembered() -> None:
    history = History(maximum=2)
    ann = history.of("ann")
    history.of("bob")
    assert history.of("ann") is ann
    history.of("cid")
    assert history.of("ann") is ann
