"""The pure rules of delivery: replies, outcomes, routes, schedule, pace, breaker, turns."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mailsluice_relay.config import Queue, Upstream, UpstreamLimits
from mailsluice_relay.config import Retry as RetrySettings
from mailsluice_relay.delivery.allowance import Allowance, AllowanceBook
from mailsluice_relay.delivery.breaker import FIRST_PROBE, TOLERANCE, Breaker
from mailsluice_relay.delivery.fair import FairQueue
from mailsluice_relay.delivery.outcome import Failed, FailureClass, Retry, Stage, classify, session_fault
from mailsluice_relay.delivery.pace import LONGEST_PAUSE, Pace
from mailsluice_relay.delivery.route import candidates, choose, fits
from mailsluice_relay.delivery.schedule import delay, next_attempt, warning_due
from mailsluice_relay.delivery.wire import MAXIMUM_LINE, ReplyParser, WireError, capabilities, dot_stuffed
from mailsluice_relay.envelope import Mailbox
from mailsluice_relay.reply import Reply
from mailsluice_relay.spool.identifier import ALPHABET, LENGTH, QueueIds


def reply(line: str) -> Reply:
    (parsed,) = ReplyParser().feed(line.encode() + b"\r\n")
    return parsed


# --- replies ---
@pytest.mark.parametrize(
    ("octets", "expected"),
    [
        (b"250 OK\r\n", [Reply(250, "", "OK")]),
        (b"250 2.1.5 OK\r\n", [Reply(250, "2.1.5", "OK")]),
        (b"250\r\n", [Reply(250, "", "")]),
        (b"250 2.0.0\r\n", [Reply(250, "2.0.0", "")]),
        (b"250-a.test\r\n250-SIZE 10\r\n250 DSN\r\n", [Reply(250, "", "a.test\nSIZE 10\nDSN")]),
        (b"550-5.7.1 one\r\n550 5.7.1 two\r\n", [Reply(550, "5.7.1", "one\ntwo")]),
        (b"550 4.7.1 status of another class\r\n", [Reply(550, "", "4.7.1 status of another class")]),
        (b"250 bare line feed\n", [Reply(250, "", "bare line feed")]),
        (b"250 a\x1b[31m\x00b\r\n", [Reply(250, "", "a [31m b")]),
        (b"250 one\r\n354 two\r\n550 thr", [Reply(250, "", "one"), Reply(354, "", "two")]),
    ],
)
def test_replies(octets: bytes, expected: list[Reply]) -> None:
    assert ReplyParser().feed(octets) == expected


@given(st.lists(st.sampled_from([b"250 OK\r\n", b"250-a\r\n250 b\r\n", b"421 4.3.2 bye\r\n"])), st.integers(1, 7))
def test_replies_do_not_depend_on_how_they_are_cut(replies: list[bytes], step: int) -> None:
    octets = b"".join(replies)
    parser = ReplyParser()
    piecewise = [r for n in range(0, len(octets), step) for r in parser.feed(octets[n : n + step])]
    assert piecewise == ReplyParser().feed(octets)
    assert parser.is_empty


@pytest.mark.parametrize(
    "octets",
    [
        b"HTTP/1.1 200 OK\r\n",
        b"\r\n",
        b"25 OK\r\n",
        b"199 no\r\n",
        b"250-a\r\n251 b\r\n",
        b"250 " + b"x" * MAXIMUM_LINE,
        b"250-x\r\n" * 1000,
    ],
)
def test_what_is_no_reply_is_refused_within_bounds(octets: bytes) -> None:
    with pytest.raises(WireError):
        ReplyParser().feed(octets)


def test_capabilities() -> None:
    offered = capabilities(Reply(250, "", "up.test\nsize 1000\nAUTH=LOGIN\nAUTH PLAIN login\nSTARTTLS\n8bitmime"))
    assert offered.mechanisms == {"PLAIN", "LOGIN"}
    assert offered.size == 1000
    assert "8BITMIME" in offered
    assert "UP.TEST" not in offered
    assert capabilities(Reply(250, "", "up.test\nSIZE 0")).size is None
    assert capabilities(Reply(250, "", "up.test\nSIZE lots")).size is None


@given(st.lists(st.sampled_from([b".", b"\r\n", b"a", b"..", b"\r\n."])), st.integers(1, 5))
def test_dots_are_doubled_wherever_the_text_is_cut(parts: list[bytes], step: int) -> None:
    text = b"".join(parts)
    wire = b"".join(dot_stuffed(text[n : n + step] for n in range(0, len(text), step)))
    assert wire.endswith(b".\r\n")
    ended = text if text.endswith(b"\r\n") or not text else text + b"\r\n"
    lines = ended.split(b"\r\n")[:-1]
    assert wire == b"".join(b"." * line.startswith(b".") + line + b"\r\n" for line in lines) + b".\r\n"


# --- outcomes ---
@pytest.mark.parametrize(
    ("stage", "line", "kind", "failure"),
    [
        (Stage.RECIPIENT, "550 5.1.1 unknown", Failed, FailureClass.MAILBOX),
        (Stage.RECIPIENT, "550 no such user", Failed, FailureClass.MAILBOX),
        (Stage.RECIPIENT, "452 4.2.2 full", Retry, FailureClass.MAILBOX),
        (Stage.RECIPIENT, "452 4.5.3 too many", Retry, FailureClass.RECIPIENTS),
        (Stage.RECIPIENT, "552 too many recipients", Retry, FailureClass.RECIPIENTS),
        (Stage.RECIPIENT, "550 5.7.1 relaying denied", Failed, FailureClass.POLICY),
        (Stage.RECIPIENT, "450 4.7.1 greylisted, try again", Retry, FailureClass.POLICY),
        (Stage.MAIL, "530 5.7.0 authentication required", Retry, FailureClass.AUTHENTICATION),
        (Stage.MAIL, "421 4.7.0 too many", Retry, FailureClass.THROTTLED),
        (Stage.MAIL, "452 4.3.1 insufficient storage", Retry, FailureClass.UNAVAILABLE),
        (Stage.MAIL, "553 5.1.8 sender unknown", Failed, FailureClass.MAILBOX),
        (Stage.MAIL, "250 OK", Retry, None),
        (Stage.END_OF_DATA, "454 Throttling failure: Maximum sending rate exceeded.", Retry, FailureClass.THROTTLED),
        (Stage.END_OF_DATA, "550 5.4.5 Daily user sending limit exceeded", Retry, FailureClass.THROTTLED),
        (Stage.END_OF_DATA, "550 5.7.1 message rate limit text inside a policy", Failed, FailureClass.POLICY),
        (Stage.END_OF_DATA, "554 5.7.1 spam", Failed, FailureClass.POLICY),
        (Stage.END_OF_DATA, "554 looks like spam", Failed, FailureClass.POLICY),
        (Stage.END_OF_DATA, "552 5.3.4 too big", Failed, FailureClass.MESSAGE),
        (Stage.END_OF_DATA, "554 no", Failed, FailureClass.MESSAGE),
        (Stage.END_OF_DATA, "451 4.3.0 later", Retry, FailureClass.MESSAGE),
    ],
)
def test_what_a_reply_means(stage: Stage, line: str, kind: type, failure: FailureClass | None) -> None:
    outcome = classify(stage, reply(line))
    assert type(outcome) is kind
    assert outcome.failure is (failure or FailureClass.CONNECTION)


@given(
    st.sampled_from([Stage.GREETING, Stage.HELLO, Stage.STARTTLS, Stage.AUTHENTICATION]),
    st.integers(200, 599),
    st.sampled_from(["no", "spam", "user unknown", "rate limit exceeded", "blocked"]),
)
def test_before_mail_nothing_is_ever_the_mails_fault(stage: Stage, code: int, text: str) -> None:
    outcome = session_fault(stage, Reply(code, "", text)).retry
    assert outcome.is_upstream_problem


@given(st.sampled_from([Stage.MAIL, Stage.RECIPIENT, Stage.DATA, Stage.END_OF_DATA]), st.integers(400, 499))
def test_4yz_never_bounces(stage: Stage, code: int) -> None:
    assert isinstance(classify(stage, Reply(code, "", "whatever")), Retry)


@given(st.sampled_from([Stage.RECIPIENT, Stage.DATA, Stage.END_OF_DATA]), st.integers(554, 599))
def test_a_bounce_always_has_a_5yz_status(stage: Stage, code: int) -> None:
    outcome = classify(stage, Reply(code, "", "whatever"))
    assert isinstance(outcome, Failed)
    assert outcome.status.startswith("5.")


# --- routes ---
@pytest.mark.parametrize(
    ("pattern", "address", "expected"),
    [
        ("a@x.test", "a@x.test", True),
        ("A@X.test", "a@x.TEST", True),
        ("a@x.test", "b@x.test", False),
        ("*@x.test", "anybody@x.test", True),
        ("*@x.test", "anybody@sub.x.test", False),
        ("*@*.x.test", "anybody@sub.x.test", True),
        ("*@*.x.test", "anybody@deep.sub.x.test", True),
        ("*@*.x.test", "anybody@x.test", False),
        ("*@*.x.test", "anybody@evilx.test", False),
        ("*@*", "anybody@anywhere.test", True),
    ],
)
def test_patterns(pattern: str, address: str, expected: bool) -> None:
    assert fits(pattern, Mailbox(*address.split("@"))) is expected


def test_the_null_sender_fits_only_its_own_pattern() -> None:
    assert fits("<>", None)
    assert not fits("*@*", None)


def names(upstreams: list[Upstream], sender: str, recipient: str = "r@x.test") -> list[str]:
    found = candidates(upstreams, Mailbox(*sender.split("@")), Mailbox(*recipient.split("@")))
    return [upstream.name for upstream in found]


def test_what_matches_comes_first_then_priority_and_what_does_not_fit_never() -> None:
    upstreams = [
        Upstream(name="backup", priority=20),
        Upstream(name="main", priority=10),
        Upstream(name="finance", priority=99, match_senders=("*@finance.test",)),
        Upstream(name="both", match_senders=("*@finance.test",), match_recipients=("*@bank.test",)),
    ]
    assert names(upstreams, "a@other.test") == ["main", "backup"]
    assert names(upstreams, "a@finance.test") == ["finance", "main", "backup"]
    assert names(upstreams, "a@finance.test", "b@bank.test") == ["both", "finance", "main", "backup"]


def test_weights_divide_equals_and_those_down_are_passed_over() -> None:
    upstreams = [Upstream(name="a", weight=3), Upstream(name="b", weight=1), Upstream(name="c", priority=20)]
    chance = random.Random(1)

    def chosen(down: str = "") -> str:
        upstream = choose(upstreams, available=lambda u: u.name not in down, random=chance.random)
        return upstream.name if upstream is not None else "nobody"

    counted = Counter(chosen() for _ in range(4000))
    assert counted["c"] == 0
    assert 2.6 < counted["a"] / counted["b"] < 3.4
    kept = [choose(upstreams, available=lambda _: True, random=chance.random, preferred="b") for _ in range(9)]
    assert {upstream.name for upstream in kept if upstream is not None} == {"b"}
    passed_over = choose(upstreams, available=lambda _: True, random=chance.random, preferred="c")
    assert passed_over is not None
    assert passed_over.name != "c"
    assert chosen(down="a") == "b"
    assert chosen(down="ab") == "c"
    assert chosen(down="abc") == "nobody"


# --- schedule ---
def test_delays_grow_to_their_maximum_with_jitter_around_them() -> None:
    settings = RetrySettings(initial=60.0, maximum=3600.0, factor=2.0)
    assert [delay(settings, n, lambda: 0.5) for n in (1, 2, 3, 7, 5000)] == [60.0, 120.0, 240.0, 3600.0, 3600.0]
    assert delay(settings, 1, lambda: 0.0) == 45.0
    assert delay(settings, 1, lambda: 0.999) < 75.0


def test_the_last_attempt_is_at_the_end_of_the_lifetime_and_none_comes_after() -> None:
    queue = Queue(lifetime=100.0, retry=RetrySettings(initial=60.0))

    def at(now: float, attempts: int) -> float | None:
        return next_attempt(queue, now=now, received_at=1000.0, attempts=attempts, random=lambda: 0.5)

    assert at(1000.0, 1) == 1060.0
    assert at(1060.0, 2) == 1100.0
    assert at(1100.0, 3) is None


def test_the_delay_warning() -> None:
    queue = Queue(delay_warning=50.0)
    assert not warning_due(queue, now=1049.0, received_at=1000.0)
    assert warning_due(queue, now=1050.0, received_at=1000.0)
    assert not warning_due(Queue(delay_warning=None), now=1e9, received_at=0.0)


# --- pace ---
def test_messages_are_spaced_evenly_and_never_saved_up() -> None:
    pace = Pace(UpstreamLimits(messages_per_second=10.0))
    assert [round(pace.reserve(100.0), 6) for _ in range(4)] == [0.0, 0.1, 0.2, 0.3]
    assert pace.reserve(200.0) == 0.0
    assert round(pace.reserve(200.0), 6) == 0.1


def test_throttling_pauses_longer_each_time_and_recovers() -> None:
    pace = Pace(UpstreamLimits())
    assert pace.reserve(0.0) == 0.0
    assert pace.throttled(0.0) == 1.0
    assert pace.throttled(0.5) == 0.0  # what was under way already says nothing new
    assert pace.paused_for(0.25) == 0.75
    assert pace.throttled(1.0) == 2.0
    assert pace.reserve(3.0) == 0.0
    assert pace.reserve(3.0) > 0.0  # slower than before
    for _ in range(100):
        pace.passed()
    assert pace.reserve(10.0) == 0.0
    assert pace.reserve(10.0) == 0.0
    assert pace.throttled(20.0) == 1.0
    now = 1000.0
    for _ in range(20):
        now += LONGEST_PAUSE
        longest = pace.throttled(now)
    assert longest == LONGEST_PAUSE


def test_the_days_allowance_begins_anew_at_midnight() -> None:
    pace = Pace(UpstreamLimits(messages_per_day=2))
    noon = 86400.0 * 100 + 43200
    pace.count(noon)
    assert pace.used_up_until(noon) is None
    pace.count(noon)
    assert pace.used_up_until(noon) == 86400.0 * 101
    assert pace.used_up_until(86400.0 * 101) is None


def test_a_message_that_is_not_limited_by_the_day_is_not_written_down() -> None:
    writes: list[int] = []
    allowance = Allowance(keep=lambda: writes.append(1))
    Pace(UpstreamLimits(), allowance).count(1.0)
    assert writes == []


def test_the_disk_is_ahead_of_what_was_sent_by_a_hundredth_at_most() -> None:
    kept: list[int] = []
    allowance = Allowance(keep=lambda: kept.append(allowance.reserved))
    pace = Pace(UpstreamLimits(messages_per_day=1000), allowance)
    for number in range(1, 101):
        pace.count(1.0)
        assert number <= kept[-1] < number + 10
    assert len(kept) == 10


def test_an_unreadable_book_begins_anew_and_a_good_one_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "allowances.json"
    path.write_bytes(b"{broken")
    book = AllowanceBook(path)
    for name, number in (("a", 3), ("b", 200)):
        for _ in range(number):
            book.of(name).count(86400.0 * 5, 10_000)
    assert (AllowanceBook(path).of("a").used, AllowanceBook(path).of("b").used) == (100, 200)
    book.close()
    again = AllowanceBook(path)
    assert (again.of("a").used_on(86400.0 * 5 + 1), again.of("b").used_on(86400.0 * 5)) == (3, 200)
    assert again.of("a").used_on(86400.0 * 6) == 0


# --- breaker ---
def test_sessions_that_fail_together_count_as_one_look() -> None:
    breaker = Breaker(lambda: 0.5)
    for _ in range(10):
        breaker.failed(0.0, FailureClass.CONNECTION, "refused")
    assert breaker.probe_at == FIRST_PROBE
    breaker.failed(breaker.probe_at, FailureClass.CONNECTION, "refused")
    assert breaker.probe_at == FIRST_PROBE + 2 * FIRST_PROBE


def test_an_upstream_is_down_after_some_failures_and_at_once_where_time_heals_nothing() -> None:
    breaker = Breaker(lambda: 0.5)
    for _ in range(TOLERANCE - 1):
        breaker.failed(0.0, FailureClass.CONNECTION, "no")
    assert breaker.is_up
    breaker.succeeded()
    for _ in range(TOLERANCE):
        breaker.failed(0.0, FailureClass.CONNECTION, "no")
    assert not breaker.is_up
    wrong_password = Breaker(lambda: 0.5)
    wrong_password.failed(0.0, FailureClass.AUTHENTICATION, "535")
    assert not wrong_password.is_up
    assert wrong_password.last_error == "535"


def test_probes_come_less_and_less_often_up_to_a_bound() -> None:
    breaker = Breaker(lambda: 0.5)
    waits = []
    for _ in range(12):
        now = breaker.probe_at
        breaker.failed(now, FailureClass.TLS, "expired")
        waits.append(breaker.probe_at - now)
    assert waits[:4] == [2.0, 4.0, 8.0, 16.0]
    assert waits[-1] == 300.0
    breaker.succeeded()
    now = breaker.probe_at
    breaker.failed(now, FailureClass.TLS, "expired")
    assert breaker.probe_at - now == 2.0


# --- turns ---
def test_everybody_gets_a_turn() -> None:
    queue: FairQueue[str] = FairQueue()
    for n in range(100):
        queue.push("newsletter", f"news {n}")
    queue.push("accounts", "password reset 1")
    queue.push("accounts", "password reset 2")
    assert [queue.pop() for _ in range(5)] == ["news 0", "password reset 1", "news 1", "password reset 2", "news 2"]
    assert len(queue) == 97
    assert (queue.count("newsletter"), queue.count("accounts")) == (97, 0)


# --- ids ---
def test_ids_are_short_ordered_by_time_and_never_the_same_twice() -> None:
    clock = [1_800_000_000.0]
    new = QueueIds(lambda: clock[0], random.Random(1).getrandbits)
    ids = [new() for _ in range(10_000)]
    clock[0] += 3600
    ids.append(new())
    clock[0] -= 7200  # the clock is set back
    ids.append(new())
    assert ids == sorted(ids)
    assert len(set(ids)) == len(ids)
    assert {len(name) for name in ids} == {LENGTH}
    assert set("".join(ids)) <= set(ALPHABET)
