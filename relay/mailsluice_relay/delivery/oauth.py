"""Access tokens for an upstream that takes OAuth 2.0 instead of a password (RFC 6749).

`Tokens` keeps one token for all connections to an upstream and gets the next before it expires: one request, however
many wait for it, of bounded time and size. While a new one cannot be had, the old one is used as long as it is valid.
Whatever goes wrong is a TokenError with words for people; no secret is ever in them, nor what a server echoes of one.
"""

from __future__ import annotations

import asyncio
import re
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import aiohttp
import msgspec
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePrivateKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from mailsluice_relay.config import OAuthGrant

TIMEOUT: Final = 30.0
"""Seconds for a whole request."""
MAXIMUM_ANSWER: Final = 64 * 1024
MAXIMUM_TOKEN: Final = 8 * 1024
"""Characters. Base64 of it fits the 12,288 octets that servers take for a SASL response (RFC 4954 section 4)."""
DEFAULT_LIFETIME: Final = 3600.0
"""Seconds, where the server does not say (RFC 6749 section 5.1 recommends that it does)."""
MARGIN: Final = 300.0
"""Seconds before its end that a token is replaced; of a short-lived one a fifth of its life."""
AGAIN: Final = 30.0
"""Seconds between attempts to replace a token that is still valid."""
JUST_NOW: Final = 60.0
"""Seconds. A token that is refused at this age was not revoked meanwhile; another would fare no better."""
ASSERTION_LIFETIME: Final = 600
"""Seconds; Google takes no more than an hour, and some clocks are wrong."""

_TOKEN = re.compile(r"[A-Za-z0-9\-._~+/]+=*")
"""RFC 6750 section 2.1. Anything else could end the SASL field that it is put in."""


class TokenError(Exception):
    """There is no token, and why."""


@dataclass(frozen=True, kw_only=True)
class Grant:
    """What an access token is given for."""

    type: OAuthGrant
    user: str
    """The mailbox that mail is sent as."""
    client_id: str
    token_url: str
    scope: str = ""
    client_secret: str = field(default="", repr=False)
    refresh_token: str = field(default="", repr=False)
    private_key: str = field(default="", repr=False)
    context: ssl.SSLContext = field(repr=False, compare=False)
    """For the token URL."""

    def redacted(self, text: str) -> str:
        for secret in (self.client_secret, self.refresh_token):
            text = text.replace(secret, "***") if secret else text
        return text


class _Granted(msgspec.Struct):
    """RFC 6749 section 5.1. What else a server says is of no use here."""

    access_token: str
    token_type: str = "Bearer"
    expires_in: float | None = None
    refresh_token: str | None = None


class _Denied(msgspec.Struct):
    """RFC 6749 section 5.2."""

    error: str = ""
    error_description: str = ""


@dataclass(frozen=True, slots=True)
class _Token:
    text: str
    got_at: float
    lifetime: float

    def is_valid(self, now: float) -> bool:
        return now < self.got_at + self.lifetime

    def is_due(self, now: float) -> bool:
        return now >= self.got_at + self.lifetime - min(MARGIN, self.lifetime / 5)


class Tokens:
    def __init__(self, grant: Grant, *, now: Callable[[], float], monotonic: Callable[[], float]) -> None:
        self.grant = grant
        self._now = now
        self._monotonic = monotonic
        self._token: _Token | None = None
        self._not_before = float("-inf")
        """When to look for a successor of a token that is still valid."""
        self._refresh_token = grant.refresh_token
        self._request: asyncio.Task[_Token] | None = None

    async def get(self) -> str:
        """A valid access token. Raises TokenError."""
        now = self._monotonic()
        token = self._token
        if token is not None and (not token.is_due(now) or (token.is_valid(now) and now < self._not_before)):
            return token.text
        if self._request is None or self._request.done():
            self._request = asyncio.get_running_loop().create_task(self._renew())
        try:
            # Who waits may be cancelled; the others still want the answer.
            return (await asyncio.shield(self._request)).text
        except asyncio.CancelledError as error:
            if self._request.cancelled():
                raise TokenError("given up, as this upstream has just been given another configuration") from error
            raise
        except TokenError:
            if token is None or self._token is not token or not token.is_valid(self._monotonic()):
                raise
            self._not_before = self._monotonic() + AGAIN
            return token.text

    def refused(self, text: str) -> bool:
        """The upstream does not take this token: the next one will be another. Whether that is worth trying at once."""
        token = self._token
        if token is None or token.text != text:
            return True  # another connection was told the same before
        self._token = None
        return self._monotonic() - token.got_at > JUST_NOW

    async def close(self) -> None:
        if self._request is not None:
            self._request.cancel()
            await asyncio.wait([self._request])

    async def _renew(self) -> _Token:
        grant = self.grant
        try:
            granted = await self._ask()
        except _DeniedError:
            if self._refresh_token == grant.refresh_token:
                raise
            # The one that was given to us along the way is not good any more; the one in the Secret may be.
            self._refresh_token = grant.refresh_token
            granted = await self._ask()
        if granted.refresh_token:  # RFC 6749 section 6: the old one may be void from now on
            self._refresh_token = granted.refresh_token
        self._token = _Token(granted.access_token, self._monotonic(), _lifetime(granted.expires_in))
        return self._token

    async def _ask(self) -> _Granted:
        url = self.grant.token_url
        try:
            async with (
                asyncio.timeout(TIMEOUT),
                aiohttp.ClientSession() as session,  # once an hour: nothing to keep open
                session.post(
                    url,
                    data=self._form(),
                    ssl=self.grant.context,
                    headers={"Accept": "application/json"},
                    allow_redirects=False,  # credentials go where they were meant to go
                ) as response,
            ):
                status, answer = response.status, await _read(response.content)
        except TimeoutError as error:
            raise TokenError(f"{url} does not answer within {TIMEOUT:.0f} s") from error
        except (aiohttp.ClientError, OSError) as error:
            raise TokenError(f"{url}: {self._clean(str(error) or type(error).__name__)}") from error
        if status != 200:
            raise self._denial(status, answer)
        return self._granted(answer)

    def _form(self) -> dict[str, str]:
        grant = self.grant
        form: dict[str, str] = {}
        match grant.type:
            case OAuthGrant.REFRESH_TOKEN:
                form = {
                    "grant_type": "refresh_token",
                    "refresh_token": self._refresh_token,
                    "client_id": grant.client_id,
                }
            case OAuthGrant.CLIENT_CREDENTIALS:
                form = {"grant_type": "client_credentials", "client_id": grant.client_id}
            case OAuthGrant.JWT_BEARER:
                form = {
                    "grant_type": "urn:ietf:params:oauth:grant-type:jwt-bearer",
                    "assertion": assertion(grant, int(self._now())),
                }
        if grant.client_secret and grant.type is not OAuthGrant.JWT_BEARER:
            form["client_secret"] = grant.client_secret
        if grant.scope and grant.type is not OAuthGrant.JWT_BEARER:  # there it is a claim
            form["scope"] = grant.scope
        return form

    def _denial(self, status: int, answer: bytes) -> TokenError:
        url = self.grant.token_url
        try:
            denied = msgspec.json.decode(answer, type=_Denied)
        except msgspec.MsgspecError:
            denied = _Denied()
        if not denied.error:
            return TokenError(f"{url} answers {status}")
        words = f"{denied.error}: {denied.error_description}" if denied.error_description else denied.error
        return _DeniedError(f"{url} answers {status}, {self._clean(words)}")

    def _granted(self, answer: bytes) -> _Granted:
        url = self.grant.token_url
        try:
            granted = msgspec.json.decode(answer, type=_Granted, strict=False)  # some write "3600"
        except msgspec.MsgspecError as error:
            # msgspec's text names fields and types, and no value.
            raise TokenError(f"{url} answers with something else than an access token: {error}") from error
        if granted.token_type.lower() != "bearer":
            raise TokenError(f"{url} gives a token that is no bearer token")
        if len(granted.access_token) > MAXIMUM_TOKEN or not _TOKEN.fullmatch(granted.access_token):
            raise TokenError(f"{url} gives a token that cannot be sent (RFC 6750 section 2.1)")
        return granted

    def _clean(self, text: str) -> str:
        """One printable line of bounded length, without secrets."""
        text = self.grant.redacted(text)
        if self._refresh_token:
            text = text.replace(self._refresh_token, "***")
        return "".join(c if c.isprintable() else " " for c in text)[:300]


class _DeniedError(TokenError):
    """The token server understood, and says no."""


async def _read(stream: aiohttp.StreamReader) -> bytes:
    answer = bytearray()
    while chunk := await stream.read(MAXIMUM_ANSWER):
        answer += chunk
        if len(answer) > MAXIMUM_ANSWER:
            raise aiohttp.ClientPayloadError(f"more than {MAXIMUM_ANSWER} octets")
    return bytes(answer)


def _lifetime(expires_in: float | None) -> float:
    return expires_in if expires_in is not None and 0 < expires_in < float("inf") else DEFAULT_LIFETIME


def assertion(grant: Grant, now: int) -> str:
    """RFC 7523 section 3, as Google's service accounts want it: issued by the client, in the name of the user."""
    claims = {
        "iss": grant.client_id,
        "sub": grant.user,
        "aud": grant.token_url,
        "iat": now,
        "exp": now + ASSERTION_LIFETIME,
        **({"scope": grant.scope} if grant.scope else {}),
    }
    import jwt  # here and not above: it takes 3 MB, and few grants are signed

    key, algorithm = signing_key(grant.private_key)
    return jwt.encode(claims, key, algorithm=algorithm)


def signing_key(pem: str) -> tuple[RSAPrivateKey | EllipticCurvePrivateKey, str]:
    """The key and the algorithm that goes with it (RFC 7518 section 3). Raises ValueError without a word of the key."""
    try:
        key = load_pem_private_key(pem.encode(), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:  # TypeError: it wants a password
        raise ValueError("no PEM private key without a password") from error
    if isinstance(key, RSAPrivateKey) and key.key_size >= 2048:
        return key, "RS256"
    if isinstance(key, EllipticCurvePrivateKey) and isinstance(key.curve, SECP256R1):
        return key, "ES256"
    raise ValueError("neither RSA of at least 2048 bits nor P-256")
