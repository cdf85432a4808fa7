"""Whom a login names, and how failed logins are throttled without locking an owner out."""

import pytest

from mailsluice_relay.auth.directory import Directory
from mailsluice_relay.auth.throttle import MAXIMUM_KEYS, Throttle
from mailsluice_relay.config import (
    Authentication,
    ConfigurationError,
    FailureLimit,
    Failures,
    LoginFormat,
    User,
    hash_password,
)

HASH = hash_password("p", bytes(16))
OTHER_HASH = hash_password("q", bytes(16))


def directory(*logins: str, login_format: LoginFormat = LoginFormat.FULL) -> Directory:
    users = tuple(User(login=login, hashes=(HASH,)) for login in logins)
    return Directory(Authentication(login_format=login_format, users=users), key=b"k")


def found(where: Directory, login: str) -> str | None:
    user = where.candidate(login).user
    return user.login if user else None


@pytest.mark.parametrize(
    ("login_format", "login", "expected"),
    [
        (LoginFormat.FULL, "ann@example.test", "Ann@Example.test"),
        (LoginFormat.FULL, "ANN@EXAMPLE.TEST", "Ann@Example.test"),
        (LoginFormat.FULL, "ann", None),
        (LoginFormat.FULL, "ann@other.test", None),
        (LoginFormat.FULL, "ann@example.test ", None),
        (LoginFormat.SHORT, "ann", "Ann@Example.test"),
        (LoginFormat.SHORT, "cron", "cron"),
        (LoginFormat.SHORT, "ann@example.test", None),
        (LoginFormat.EITHER, "ann", "Ann@Example.test"),
        (LoginFormat.EITHER, "ann@example.test", "Ann@Example.test"),
        (LoginFormat.EITHER, "bob", None),  # two domains have a bob
        (LoginFormat.EITHER, "bob@b.test", "bob@b.test"),
        (LoginFormat.EITHER, "", None),
        (LoginFormat.EITHER, "@", None),
    ],
)
def test_login_formats(login_format: LoginFormat, login: str, expected: str | None) -> None:
    users = directory("Ann@Example.test", "bob@a.test", "bob@b.test", "cron", login_format=login_format)
    assert found(users, login) == expected


def test_a_short_login_is_refused_for_its_form_known_or_not() -> None:
    users = directory("ann@example.test", "cron")
    assert users.is_short("ann")
    assert users.is_short("cron")
    assert users.is_short("nobody")
    assert not users.is_short("ann@example.test")
    assert not directory("ann@example.test", login_format=LoginFormat.EITHER).is_short("ann")


def test_an_accent_may_be_composed_either_way() -> None:
    assert found(directory("r\u00e9my@example.test"), "re\u0301my@example.test") == "r\u00e9my@example.test"


def test_an_unknown_login_costs_what_a_known_one_does() -> None:
    users = Directory(
        Authentication(
            users=(User(login="a@x.test", hashes=(HASH,)), User(login="b@x.test", hashes=(OTHER_HASH, HASH)))
        ),
        key=b"k",
    )
    candidates = [users.candidate(f"nobody{number}@x.test") for number in range(64)]
    assert all(candidate.user is None for candidate in candidates)
    assert {candidate.hashes for candidate in candidates} == {(HASH,), (OTHER_HASH, HASH)}
    assert users.candidate("nobody1@x.test") == users.candidate("NOBODY1@x.test")


def test_without_users_there_is_still_something_to_hash() -> None:
    assert directory().candidate("a@x.test").hashes


def test_a_user_without_a_hash_has_no_password() -> None:
    users = Directory(Authentication(users=(User(login="a@x.test"),)), key=b"k")
    assert users.candidate("a@x.test").user is None
    assert users.user("a@x.test") is not None


def test_one_login_twice_is_an_error_that_names_it() -> None:
    with pytest.raises(ConfigurationError, match=r"ANN@example\.test stands twice"):
        directory("ann@example.test", "ANN@example.test")


def test_an_unsupported_hash_is_an_error_that_names_the_login_only() -> None:
    with pytest.raises(ConfigurationError, match=r"ann@example\.test: a hash") as error:
        Directory(Authentication(users=(User(login="ann@example.test", hashes=("hunter2",)),)), key=b"k")
    assert "hunter2" not in str(error.value)


FAILURES = Failures(
    per_network_and_user=FailureLimit(limit=3, window=60.0), per_network=FailureLimit(limit=5, window=60.0)
)


def test_a_pair_is_refused_after_its_limit_and_heard_again_after_its_window() -> None:
    throttle = Throttle(FAILURES)
    for second in range(3):
        assert not throttle.refuses("net", "ann", float(second))
        throttle.failed("net", "ann", float(second))
    assert throttle.refuses("net", "ann", 3.0)
    assert throttle.refuses("net", "ann", 59.0)
    assert not throttle.refuses("net", "ann", 60.5)


def test_an_attacker_does_not_lock_the_owner_out_elsewhere() -> None:
    throttle = Throttle(FAILURES)
    for _ in range(100):
        throttle.failed("bad", "ann", 0.0)
    assert throttle.refuses("bad", "ann", 1.0)
    assert not throttle.refuses("home", "ann", 1.0)


def test_a_network_is_refused_for_all_logins_but_those_it_is_known_for() -> None:
    throttle = Throttle(FAILURES)
    throttle.succeeded("net", "ann", 0.0)
    for number in range(5):
        throttle.failed("net", f"guess{number}", 1.0)
    assert throttle.refuses("net", "bob", 2.0)
    assert not throttle.refuses("net", "ann", 2.0)
    for _ in range(3):
        throttle.failed("net", "ann", 2.0)
    assert throttle.refuses("net", "ann", 3.0)


def test_successes_are_never_counted_and_forgive_the_pair() -> None:
    throttle = Throttle(FAILURES)
    for _ in range(2):
        throttle.failed("net", "ann", 0.0)
    for _ in range(1000):
        throttle.succeeded("net", "ann", 1.0)
    for _ in range(2):
        throttle.failed("net", "ann", 2.0)
    assert not throttle.refuses("net", "ann", 3.0)


def test_memory_is_bounded_whatever_the_client_calls_itself() -> None:
    throttle = Throttle(FAILURES)
    for number in range(MAXIMUM_KEYS + 100):
        throttle.failed(f"net{number}", "x" * 300, 0.0)
    assert len(throttle._pairs._failures) == MAXIMUM_KEYS
    assert len(throttle._networks._failures) == MAXIMUM_KEYS
    assert all(len(key) == 32 for key in throttle._pairs._failures)


def test_new_limits_apply_to_what_was_counted_before() -> None:
    throttle = Throttle(FAILURES)
    for _ in range(3):
        throttle.failed("net", "ann", 0.0)
    throttle.reconfigure(Failures(per_network_and_user=FailureLimit(limit=4, window=60.0)))
    assert not throttle.refuses("net", "ann", 1.0)
    throttle.failed("net", "ann", 1.0)
    assert throttle.refuses("net", "ann", 2.0)
