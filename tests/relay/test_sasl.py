"""PLAIN (RFC 4616) and LOGIN, from the server's side."""

from __future__ import annotations

import pytest

from mailsluice_relay.auth.sasl import MECHANISMS, Attempt, SaslError


def run(mechanism: str, *responses: bytes | None) -> bytes | Attempt:
    exchange = MECHANISMS[mechanism]()
    outcome: bytes | Attempt = b""
    for response in responses:
        outcome = exchange.step(response)
    return outcome


def test_plain_with_and_without_an_initial_response() -> None:
    expected = Attempt("PLAIN", "app@example.test", "", "pässword")
    response = "\0app@example.test\0pässword".encode()
    assert run("PLAIN", response) == expected
    assert run("PLAIN", None) == b""
    assert run("PLAIN", None, response) == expected


def test_plain_tells_whom_the_client_wants_to_act_as() -> None:
    """It is admission that refuses it; aiosmtpd drops it silently."""
    assert run("PLAIN", b"boss@example.test\0app@example.test\0secret") == Attempt(
        "PLAIN", "app@example.test", "boss@example.test", "secret"
    )


@pytest.mark.parametrize(
    "response",
    [
        b"",
        b"app",
        b"app\0secret",
        b"\0app\0secret\0",
        b"\0\0secret",
        b"\0app\0",
        b"\0app\r\n\0secret",
        b"\0\xff\0secret",
        b"\0app\0\xff",
        b"a\x01\0app\0secret",
        b"\0" + b"a" * 321 + b"\0secret",
    ],
)
def test_plain_refuses_malformed_responses_without_repeating_them(response: bytes) -> None:
    with pytest.raises(SaslError) as caught:
        run("PLAIN", response)
    assert "secret" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_login_asks_for_both() -> None:
    assert run("LOGIN", None) == b"Username:"
    assert run("LOGIN", None, b"app@example.test") == b"Password:"
    expected = Attempt("LOGIN", "app@example.test", "", "secret")
    assert run("LOGIN", None, b"app@example.test", b"secret") == expected
    assert run("LOGIN", b"app@example.test", b"secret") == expected


@pytest.mark.parametrize("responses", [(b"",), (b"app", b""), (b"a\0b",), (b"app", b"a\0b"), (b"\xff",)])
def test_login_refuses_malformed_responses(responses: tuple[bytes, ...]) -> None:
    with pytest.raises(SaslError):
        run("LOGIN", *responses)


def test_an_attempt_does_not_show_its_password() -> None:
    assert "secret" not in repr(Attempt("PLAIN", "app@example.test", "", "secret"))
