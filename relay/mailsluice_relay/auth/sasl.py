"""The server's side of SASL exchanges (RFC 4422): PLAIN (RFC 4616) and LOGIN (draft-murchison-sasl-login).

Pure: responses in, challenges and in the end an `Attempt` out; whether it succeeds is `admission`'s to say. A mechanism
more is one class and one line in MECHANISMS. An exchange is used once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final, Protocol

MAXIMUM_LOGIN: Final = 320
"""Octets: local part, @ and domain of the longest address."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """What a client claims to be, not yet believed."""

    mechanism: str
    login: str
    """authcid: whose password it is."""
    authorization: str
    """authzid: whom to act as; empty where none is given."""
    password: str = field(repr=False)


class SaslError(ValueError):
    """The response is not what the mechanism prescribes. The text never holds any of it."""


class Exchange(Protocol):
    def step(self, response: bytes | None) -> bytes | Attempt:
        """The next challenge, or the attempt once it is whole. `response` is None when the client began without one.

        Raises SaslError.
        """
        ...


class Plain:
    """`[authzid] NUL authcid NUL passwd` (RFC 4616 section 2)."""

    def step(self, response: bytes | None) -> bytes | Attempt:
        if response is None:
            return b""
        parts = response.split(b"\0")
        if len(parts) != 3:
            raise SaslError("expected authorization identity, login and password with NUL between them")
        authorization, login, password = parts
        return Attempt("PLAIN", _name(login), _name(authorization) if authorization else "", _password(password))


class Login:
    """Login and password, each as the response to a prompt. Clients compare the prompts with these very words."""

    def __init__(self) -> None:
        self._login: str | None = None

    def step(self, response: bytes | None) -> bytes | Attempt:
        if response is None:
            return b"Username:"
        if self._login is None:
            # Some clients end the strings with a NUL, as the draft's own prompts do.
            self._login = _name(response.removesuffix(b"\0"))
            return b"Password:"
        return Attempt("LOGIN", self._login, "", _password(response.removesuffix(b"\0")))


def _name(octets: bytes) -> str:
    if not octets or len(octets) > MAXIMUM_LOGIN:
        raise SaslError(f"the login must have 1 to {MAXIMUM_LOGIN} octets")
    name = _text(octets)
    if not name.isprintable():
        raise SaslError("the login holds control characters")
    return name


def _password(octets: bytes) -> str:
    if not octets or b"\0" in octets:
        raise SaslError("the password is empty or holds NUL")
    return _text(octets)


def _text(octets: bytes) -> str:
    try:
        return octets.decode()
    except UnicodeDecodeError:
        # `from None`: the error would carry the octets.
        raise SaslError("login and password must be UTF-8") from None


MECHANISMS: Final[Mapping[str, Callable[[], Exchange]]] = {"PLAIN": Plain, "LOGIN": Login}
"""By name, in the order in which they are offered."""
