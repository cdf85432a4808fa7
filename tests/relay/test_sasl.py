"""SASL mechanisms, from the server's side."""

from __future__ import annotations

import pytest

from mailsluice_relay.auth.sasl import MECHANISMS, Attempt, Evidence, SaslError, offered


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


# --- tokens and certificates ------------------------------------------------------------------------------------------
TOKEN = "vF9dft4qmTc2Nvb3RlckBhbHRhdmlzdGEuY29tCg=="


def test_oauthbearer_takes_the_example_of_its_rfc() -> None:
    """RFC 7628 section 4.1."""
    response = f"n,a=user@example.com,\1host=server.example.com\1port=587\1auth=Bearer {TOKEN}\1\1".encode()
    expected = Attempt("OAUTHBEARER", "", "user@example.com", TOKEN, Evidence.TOKEN)
    assert run("OAUTHBEARER", response) == expected
    assert run("OAUTHBEARER", None) == b""
    assert run("OAUTHBEARER", None, response) == expected


@pytest.mark.parametrize(
    ("header", "authorization"),
    [(b"n,,", ""), (b"y,,", ""), (b"n,a=a=2Cb=3Dc@example.test,", "a,b=c@example.test")],
)
def test_oauthbearer_reads_the_gs2_header(header: bytes, authorization: str) -> None:
    outcome = run("OAUTHBEARER", header + b"\1auth=bearer t\1\1")
    assert outcome == Attempt("OAUTHBEARER", "", authorization, "t", Evidence.TOKEN)


def test_oauthbearer_without_a_token_is_an_attempt_that_fails() -> None:
    """RFC 7628 section 4.3: so does a client ask where to get one."""
    assert run("OAUTHBEARER", b"n,,\1auth=Bearer \1\1") == Attempt("OAUTHBEARER", "", "", "", Evidence.TOKEN)


def test_xoauth2_names_the_login() -> None:
    response = f"user=app@example.test\1auth=Bearer {TOKEN}\1\1".encode()
    assert run("XOAUTH2", response) == Attempt("XOAUTH2", "app@example.test", "", TOKEN, Evidence.TOKEN)


@pytest.mark.parametrize(
    "response",
    [
        b"",
        b"n,,",
        b"n,,\1auth=Bearer secret\1",
        b"n,,\1auth=Bearer secret",
        b"n,,\1\1",
        b"n,,\1auth=Basic secret\1\1",
        b"n,,\1auth=Bearer secret\1auth=Bearer secret\1\1",
        b"n,,\1auth=Bearer sec\0ret\1\1",
        b"n,,\1auth=Bearer secret;\1\1",
        b"n,,\1h0st=secret\1\1",
        b"p=tls-unique,,\1auth=Bearer secret\1\1",
        b"n\1auth=Bearer secret\1\1",
        b"n,\1auth=Bearer secret\1\1",
        b"n,b=c,\1auth=Bearer secret\1\1",
        b"n,a=,\1auth=Bearer secret\1\1",
        b"n,a=a=b,\1auth=Bearer secret\1\1",
        b"n,a=a,b,\1auth=Bearer secret\1\1",
        b"n,a=\xff,\1auth=Bearer secret\1\1",
        b"user=\1auth=Bearer secret\1\1",
        b"user=a\r\nb\1auth=Bearer secret\1\1",
    ],
)
@pytest.mark.parametrize("mechanism", ["OAUTHBEARER", "XOAUTH2"])
def test_malformed_tokens_are_refused_without_repeating_them(mechanism: str, response: bytes) -> None:
    with pytest.raises(SaslError) as caught:
        run(mechanism, response)
    assert "secret" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_external_may_name_whom_to_act_as() -> None:
    assert run("EXTERNAL", None) == b""
    assert run("EXTERNAL", b"") == Attempt("EXTERNAL", "", "", "", Evidence.CERTIFICATE)
    assert run("EXTERNAL", b"a@example.test") == Attempt("EXTERNAL", "", "a@example.test", "", Evidence.CERTIFICATE)


def test_only_what_can_be_verified_is_offered() -> None:
    assert offered({Evidence.PASSWORD}) == ("PLAIN", "LOGIN")
    assert offered({Evidence.TOKEN, Evidence.CERTIFICATE}) == ("OAUTHBEARER", "XOAUTH2", "EXTERNAL")
    assert offered(set()) == ()


def test_a_token_is_not_shown() -> None:
    assert TOKEN not in repr(run("XOAUTH2", f"user=a@example.test\1auth=Bearer {TOKEN}\1\1".encode()))
