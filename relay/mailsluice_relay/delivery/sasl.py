"""The client's side of SASL: from a login, or a user and a token, to the octets that AUTH exchanges. No I/O.

A mechanism says what to send first, what to answer to each challenge, and whether success may be believed. Base64 and
the commands are the connection's business.
"""

from __future__ import annotations

import hmac
import re
from collections.abc import Callable, Mapping
from typing import Final, Protocol


class SaslError(Exception):
    """The server does not keep to the mechanism. The text holds no secret."""


class Mechanism(Protocol):
    def initial(self) -> bytes | None:
        """The initial response (RFC 4954 section 4); None: the server speaks first."""
        ...

    def respond(self, challenge: bytes) -> bytes:
        """What to answer. Raises SaslError."""
        ...

    def succeeded(self) -> None:
        """The server says that we are logged in. Raises SaslError where it would have had to prove itself first."""
        ...


class Plain:
    """RFC 4616."""

    def __init__(self, user: str, password: str) -> None:
        self._response = f"\0{user}\0{password}".encode()

    def initial(self) -> bytes | None:
        return self._response

    def respond(self, challenge: bytes) -> bytes:  # a server that ignores initial responses asks for it again
        return self._response

    def succeeded(self) -> None:
        """The server proves nothing; TLS did."""


class LoginMechanism:
    """draft-murchison-sasl-login: two questions, whose wording differs from server to server."""

    def __init__(self, user: str, password: str) -> None:
        self._answers = [user.encode(), password.encode()]

    def initial(self) -> bytes | None:
        return None

    def respond(self, challenge: bytes) -> bytes:
        if not self._answers:
            raise SaslError("LOGIN asks for more than a name and a password")
        return self._answers.pop(0)

    def succeeded(self) -> None:
        """The server proves nothing; TLS did."""


class CramMd5:
    """RFC 2195."""

    def __init__(self, user: str, password: str) -> None:
        self._user = user
        self._password = password

    def initial(self) -> bytes | None:
        return None

    def respond(self, challenge: bytes) -> bytes:
        return f"{self._user} {hmac.new(self._password.encode(), challenge, 'md5').hexdigest()}".encode()

    def succeeded(self) -> None:
        """The server proves nothing; TLS did."""


class ScramSha256:
    """RFC 7677, without channel binding. The server proves that it knows the password, too."""

    MAXIMUM_ITERATIONS: Final = 100_000
    """The server says how long we compute; this is some 70 ms, and usual are 4,096 to 15,000."""
    _ITERATIONS = re.compile(rb"(?:^|,)i=([0-9]+)")

    def __init__(self, user: str, password: str) -> None:
        import scramp  # here and not above: it takes 3 MB, and nearly all servers offer PLAIN

        self._error: type[Exception] = scramp.ScramException
        try:
            self._client = scramp.ScramClient(["SCRAM-SHA-256"], user, password)
        except scramp.ScramException as error:
            raise SaslError("the name or the password has characters that SCRAM does not allow") from error
        self._steps: list[Callable[[str], bytes]] = [self._prove, self._believe]

    def initial(self) -> bytes | None:
        return str(self._client.get_client_first()).encode()

    def respond(self, challenge: bytes) -> bytes:
        if not self._steps:
            raise SaslError("SCRAM-SHA-256 goes on after its last message")
        found = self._ITERATIONS.search(challenge)
        if found is not None and int(found[1]) > self.MAXIMUM_ITERATIONS:
            raise SaslError(f"SCRAM-SHA-256 asks for {int(found[1])} iterations, over {self.MAXIMUM_ITERATIONS}")
        try:
            return self._steps.pop(0)(challenge.decode())
        except (self._error, ValueError) as error:
            raise SaslError("the server's part of SCRAM-SHA-256 is not right: is the password?") from error

    def _prove(self, challenge: str) -> bytes:
        self._client.set_server_first(challenge)
        return str(self._client.get_client_final()).encode()

    def _believe(self, challenge: str) -> bytes:
        self._client.set_server_final(challenge)
        return b""

    def succeeded(self) -> None:
        if self._steps:
            raise SaslError("the server did not prove that it knows the password (SCRAM-SHA-256)")


class XOAuth2:
    """Google's and Microsoft's way to carry an access token. On failure the server explains in a challenge."""

    def __init__(self, user: str, token: str) -> None:
        self._response = f"user={user}\1auth=Bearer {token}\1\1".encode()

    def initial(self) -> bytes | None:
        return self._response

    def respond(self, challenge: bytes) -> bytes:
        return self._response if not challenge else b""

    def succeeded(self) -> None:
        """The server proves nothing; TLS did."""


class OAuthBearer:
    """RFC 7628."""

    def __init__(self, user: str, token: str) -> None:
        escaped = user.replace("=", "=3D").replace(",", "=2C")  # RFC 5801 section 4, saslname
        self._response = f"n,a={escaped},\1auth=Bearer {token}\1\1".encode()

    def initial(self) -> bytes | None:
        return self._response

    def respond(self, challenge: bytes) -> bytes:
        return self._response if not challenge else b"\1"  # section 3.2.3: a dummy, for the failure to be told

    def succeeded(self) -> None:
        """The server proves nothing; TLS did."""


WITH_PASSWORD: Final[Mapping[str, Callable[[str, str], Mechanism]]] = {
    "PLAIN": Plain,
    "LOGIN": LoginMechanism,
    "SCRAM-SHA-256": ScramSha256,
    "CRAM-MD5": CramMd5,
}
WITH_TOKEN: Final[Mapping[str, Callable[[str, str], Mechanism]]] = {"XOAUTH2": XOAuth2, "OAUTHBEARER": OAuthBearer}
