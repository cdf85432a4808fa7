"""The server's side of SASL exchanges (RFC 4422): PLAIN (RFC 4616), LOGIN (draft-murchison-sasl-login), OAUTHBEARER
(RFC 7628), XOAUTH2 (Google's, older and as widespread), EXTERNAL (RFC 4422 appendix A).

Pure: responses in, challenges and in the end an `Attempt` out; whether it succeeds is `admission`'s to say. A mechanism
more is one class and one line in MECHANISMS, and is offered where what it rests on can be verified (`offered`). An
exchange is used once.
"""

from __future__ import annotations

import abc
import enum
import re
from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from typing import ClassVar, Final

MAXIMUM_LOGIN: Final = 320
"""Octets: local part, @ and domain of the longest address."""

_BEARER: Final = re.compile(rb"[Bb][Ee][Aa][Rr][Ee][Rr] +([A-Za-z0-9._~+/=-]*)")
"""The value of `auth` (RFC 6750 section 2.1); without a token it asks what a failure tells (RFC 7628 section 4.3)."""
_PAIR: Final = re.compile(rb"([A-Za-z]+)=([\t\n\r -~]*)")
"""RFC 7628 section 3.1."""


class Evidence(enum.Enum):
    """What an attempt rests on, and what must be there to verify it."""

    PASSWORD = enum.auto()
    TOKEN = enum.auto()
    CERTIFICATE = enum.auto()
    """The client's, of the TLS handshake."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """What a client claims to be, not yet believed."""

    mechanism: str
    login: str
    """authcid: whose password it is. Empty where the token or the certificate says it."""
    authorization: str
    """authzid: whom to act as; empty where none is given."""
    password: str = field(repr=False)
    """Or the token; empty with a certificate."""
    evidence: Evidence = Evidence.PASSWORD


class SaslError(ValueError):
    """The response is not what the mechanism prescribes. The text never holds any of it."""


class Exchange(abc.ABC):
    evidence: ClassVar[Evidence] = Evidence.PASSWORD
    failure: ClassVar[bytes | None] = None
    """The challenge that tells of a failure, before the reply: the client answers it with something without meaning."""

    @abc.abstractmethod
    def step(self, response: bytes | None) -> bytes | Attempt:
        """The next challenge, or the attempt once it is whole. `response` is None when the client began without one.

        Raises SaslError.
        """


class Plain(Exchange):
    """`[authzid] NUL authcid NUL passwd` (RFC 4616 section 2)."""

    def step(self, response: bytes | None) -> bytes | Attempt:
        if response is None:
            return b""
        parts = response.split(b"\0")
        if len(parts) != 3:
            raise SaslError("expected authorization identity, login and password with NUL between them")
        authorization, login, password = parts
        return Attempt("PLAIN", _name(login), _name(authorization) if authorization else "", _password(password))


class Login(Exchange):
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


class OAuthBearer(Exchange):
    """`n,a=AUTHZID,` ^A `auth=Bearer TOKEN` ^A ^A (RFC 7628 section 3.1). Who it is, is in the token."""

    evidence = Evidence.TOKEN
    failure = b'{"status":"invalid_token"}'

    def step(self, response: bytes | None) -> bytes | Attempt:
        if response is None:
            return b""
        gs2, pairs = _key_values(response)
        # gs2-header (RFC 5801 section 4): no channel binding, which `p=` would ask for.
        flag, comma, identity = gs2.partition(b",")
        if flag not in {b"n", b"y"} or not comma or not identity.endswith(b","):
            raise SaslError("expected a GS2 header without channel binding")
        identity = identity.removesuffix(b",")
        if identity and not identity.startswith(b"a="):
            raise SaslError("expected a= with the authorization identity")
        authorization = _unescaped(identity.removeprefix(b"a="))
        return Attempt("OAUTHBEARER", "", _name(authorization) if identity else "", _token(pairs), self.evidence)


class XOAuth2(Exchange):
    """`user=LOGIN` ^A `auth=Bearer TOKEN` ^A ^A (developers.google.com/gmail/imap/xoauth2-protocol)."""

    evidence = Evidence.TOKEN
    failure = b'{"status":"401","schemes":"Bearer"}'

    def step(self, response: bytes | None) -> bytes | Attempt:
        if response is None:
            return b""
        user, pairs = _key_values(response)
        if not user.startswith(b"user="):
            raise SaslError("expected user= with the login")
        return Attempt("XOAUTH2", _name(user.removeprefix(b"user=")), "", _token(pairs), self.evidence)


class External(Exchange):
    """`[authzid]` (RFC 4422 appendix A). Who it is, is in the client's certificate."""

    evidence = Evidence.CERTIFICATE

    def step(self, response: bytes | None) -> bytes | Attempt:
        if response is None:
            return b""
        return Attempt("EXTERNAL", "", _name(response) if response else "", "", self.evidence)


def _key_values(response: bytes) -> tuple[bytes, dict[bytes, bytes]]:
    """What stands before the first ^A, and the pairs between that and ^A ^A."""
    first, separator, rest = response.partition(b"\1")
    if not separator or not rest.endswith(b"\1\1"):
        raise SaslError("expected pairs between ^A, and ^A twice at the end")
    pairs: dict[bytes, bytes] = {}
    for text in rest[:-2].split(b"\1"):
        pair = _PAIR.fullmatch(text)
        if pair is None or pair[1] in pairs:
            raise SaslError("expected KEY=VALUE, and each key once")
        pairs[pair[1]] = pair[2]
    return first, pairs


def _token(pairs: Mapping[bytes, bytes]) -> str:
    found = _BEARER.fullmatch(pairs.get(b"auth", b""))
    if found is None:
        raise SaslError("expected auth=Bearer with a token")
    return found[1].decode("ascii")


def _unescaped(name: bytes) -> bytes:
    """A saslname (RFC 5801 section 4)."""
    if re.search(rb"=(?!2C|3D)|,", name):
        raise SaslError("expected = and , of the authorization identity as =3D and =2C")
    return name.replace(b"=2C", b",").replace(b"=3D", b"=")


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


MECHANISMS: Final[Mapping[str, type[Exchange]]] = {
    "PLAIN": Plain,
    "LOGIN": Login,
    "OAUTHBEARER": OAuthBearer,
    "XOAUTH2": XOAuth2,
    "EXTERNAL": External,
}
"""By name, in the order in which they are offered."""


def offered(verifiable: Set[Evidence]) -> tuple[str, ...]:
    """The mechanisms whose attempts can be verified."""
    return tuple(name for name, exchange in MECHANISMS.items() if exchange.evidence in verifiable)
