"""OAuth towards upstreams: a token server over TLS, and an SMTP server that looks at the token."""

from __future__ import annotations

import asyncio
import itertools
import ssl
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import jwt
import pytest
import trustme
from aiohttp import web
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from mailsluice_relay import config
from mailsluice_relay.config import ConfigurationError, OAuthGrant, UpstreamTLSMode
from mailsluice_relay.delivery import oauth
from mailsluice_relay.delivery.client import Timeouts, connect
from mailsluice_relay.delivery.oauth import Grant, TokenError, Tokens
from mailsluice_relay.delivery.outcome import FailureClass, Fault
from mailsluice_relay.delivery.pool import Clocks, Pool
from mailsluice_relay.delivery.target import Target, target_of

SHORT = Timeouts(connect=2, greeting=1, command=1, data=1, block=1, end_of_data=1, quit=0.5)


@dataclass
class TokenServer:
    """Gives a new token each time, or what `answer` says; remembers what it was asked."""

    url: str = ""
    expires_in: object = 3600
    asked: list[dict[str, str]] = field(default_factory=list)
    given: list[str] = field(default_factory=list)
    answer: Callable[[dict[str, str]], web.Response] | None = None
    gate: asyncio.Event = field(default_factory=asyncio.Event)

    async def token(self, request: web.Request) -> web.Response:
        form = {key: str(value) for key, value in (await request.post()).items()}
        self.asked.append(form)
        await self.gate.wait()
        if self.answer is not None:
            return self.answer(form)
        self.given.append(f"ya29.token-{len(self.asked)}")
        granted = {"access_token": self.given[-1], "token_type": "Bearer", "expires_in": self.expires_in}
        return web.json_response({key: value for key, value in granted.items() if value is not None})


@pytest.fixture
def tls(authority: trustme.CA) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(server)
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    authority.configure_trust(client)
    return server, client


@pytest.fixture
async def token_server(tls: tuple[ssl.SSLContext, ssl.SSLContext]) -> AsyncIterator[TokenServer]:
    server = TokenServer()
    server.gate.set()
    application = web.Application()
    application.router.add_post("/token", server.token)
    runner = web.AppRunner(application, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls[0])
    await site.start()
    server.url = f"https://127.0.0.1:{runner.addresses[0][1]}/token"
    yield server
    server.gate.set()
    await runner.cleanup()


@dataclass
class Clock:
    ahead: float = 0.0

    def monotonic(self) -> float:
        return time.monotonic() + self.ahead

    def now(self) -> float:
        return time.time() + self.ahead


@pytest.fixture
def clock() -> Clock:
    return Clock()


MakeTokens = Callable[..., Tokens]


@pytest.fixture
async def tokens_of(
    token_server: TokenServer, tls: tuple[ssl.SSLContext, ssl.SSLContext], clock: Clock
) -> AsyncIterator[MakeTokens]:
    made = []

    def make(kind: OAuthGrant = OAuthGrant.REFRESH_TOKEN, **fields: Any) -> Tokens:
        settings = {
            "user": "user@example.test",
            "client_id": "client",
            "token_url": token_server.url,
            "refresh_token": "1//refresh",
            "context": tls[1],
            **fields,
        }
        made.append(Tokens(Grant(type=kind, **settings), now=clock.now, monotonic=clock.monotonic))
        return made[-1]

    yield make
    for tokens in made:
        await tokens.close()


def pem(key: Any) -> str:
    text: bytes = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return text.decode()


RSA = rsa.generate_private_key(65537, 2048)
P256 = ec.generate_private_key(ec.SECP256R1())


# --- the three grants -------------------------------------------------------------------------------------------------
async def test_a_refresh_token_is_exchanged(tokens_of: MakeTokens, token_server: TokenServer) -> None:
    tokens = tokens_of(client_secret="shh", scope="https://mail.google.com/")
    assert await tokens.get() == "ya29.token-1"
    assert token_server.asked == [
        {
            "grant_type": "refresh_token",
            "refresh_token": "1//refresh",
            "client_id": "client",
            "client_secret": "shh",
            "scope": "https://mail.google.com/",
        }
    ]


async def test_client_credentials_are_exchanged(tokens_of: MakeTokens, token_server: TokenServer) -> None:
    scope = "https://outlook.office365.com/.default"
    await tokens_of(OAuthGrant.CLIENT_CREDENTIALS, client_secret="shh", scope=scope).get()
    assert token_server.asked == [
        {"grant_type": "client_credentials", "client_id": "client", "client_secret": "shh", "scope": scope}
    ]


@pytest.mark.parametrize(("key", "algorithm"), [(RSA, "RS256"), (P256, "ES256")])
async def test_a_signed_assertion_is_exchanged(
    tokens_of: MakeTokens, token_server: TokenServer, key: Any, algorithm: str
) -> None:
    await tokens_of(OAuthGrant.JWT_BEARER, private_key=pem(key), scope="https://mail.google.com/").get()
    (form,) = token_server.asked
    assert form.keys() == {"grant_type", "assertion"}
    assert form["grant_type"] == "urn:ietf:params:oauth:grant-type:jwt-bearer"
    claims = jwt.decode(form["assertion"], key.public_key(), algorithms=[algorithm], audience=token_server.url)
    assert (claims["iss"], claims["sub"], claims["scope"]) == (
        "client",
        "user@example.test",
        "https://mail.google.com/",
    )
    assert 0 < claims["exp"] - claims["iat"] <= 3600


async def test_a_new_refresh_token_takes_the_place_of_the_old_one_until_it_is_void(
    tokens_of: MakeTokens, token_server: TokenServer, clock: Clock
) -> None:
    """RFC 6749 section 6. Microsoft gives a new one each time; ours in the Secret may outlive it."""
    numbers = itertools.count(1)
    void: set[str] = set()

    def answer(form: dict[str, str]) -> web.Response:
        if form["refresh_token"] in void:
            return web.json_response({"error": "invalid_grant"}, status=400)
        number = next(numbers)
        return web.json_response({"access_token": f"t{number}", "expires_in": 60, "refresh_token": f"next-{number}"})

    token_server.answer = answer
    tokens = tokens_of()
    assert await tokens.get() == "t1"
    clock.ahead += 100
    assert await tokens.get() == "t2"
    void.add("next-2")
    clock.ahead += 100
    assert await tokens.get() == "t3"
    assert [form["refresh_token"] for form in token_server.asked] == ["1//refresh", "next-1", "next-2", "1//refresh"]


# --- one token for all, renewed in time -------------------------------------------------------------------------------
async def test_many_who_wait_cause_one_request(tokens_of: MakeTokens, token_server: TokenServer, until: Any) -> None:
    token_server.gate.clear()
    tokens = tokens_of()
    waiting = [asyncio.create_task(tokens.get()) for _ in range(50)]
    await until(lambda: token_server.asked)
    waiting[0].cancel()  # whoever goes takes nothing from the others
    token_server.gate.set()
    results = await asyncio.gather(*waiting, return_exceptions=True)
    assert isinstance(results[0], asyncio.CancelledError)
    assert set(results[1:]) == {"ya29.token-1"}
    assert len(token_server.asked) == 1


@pytest.mark.parametrize(
    ("expires_in", "kept_for", "replaced_after"), [(3600, 3299, 3301), ("600", 479, 481), (None, 3299, 3301)]
)
async def test_a_token_is_replaced_before_it_expires(
    tokens_of: MakeTokens,
    token_server: TokenServer,
    clock: Clock,
    expires_in: object,
    kept_for: float,
    replaced_after: float,
) -> None:
    token_server.expires_in = expires_in
    tokens = tokens_of()
    assert await tokens.get() == "ya29.token-1"
    clock.ahead = kept_for - 1
    assert await tokens.get() == "ya29.token-1"
    clock.ahead = replaced_after
    assert await tokens.get() == "ya29.token-2"


async def test_while_there_is_no_new_token_the_old_one_is_used_to_its_end(
    tokens_of: MakeTokens, token_server: TokenServer, clock: Clock
) -> None:
    tokens = tokens_of()
    await tokens.get()
    token_server.answer = lambda _form: web.Response(status=503)
    clock.ahead = 3400
    assert await tokens.get() == "ya29.token-1"
    assert await tokens.get() == "ya29.token-1"
    assert len(token_server.asked) == 2, "the server is not asked again for every connection"
    clock.ahead = 3601
    with pytest.raises(TokenError, match="answers 503"):
        await tokens.get()
    token_server.answer = None
    assert await tokens.get() == "ya29.token-4"


# --- what goes wrong --------------------------------------------------------------------------------------------------
def json_of(**fields: object) -> Callable[[dict[str, str]], web.Response]:
    return lambda _form: web.json_response(fields)


def redirect(_form: dict[str, str]) -> web.Response:
    return web.Response(status=307, headers={"Location": "http://elsewhere.test/"})


def echo(form: dict[str, str]) -> web.Response:
    words = f"I do not know {form['refresh_token']} with {form['client_secret']}\x1b[2J" + "x" * 9999
    return web.json_response({"error": "invalid_grant", "error_description": words}, status=400)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (echo, "answers 400, invalid_grant: I do not know *** with *** [2Jxxx"),
        (redirect, "answers 307"),
        (lambda _form: web.Response(text="<html>log in</html>"), "something else than an access token"),
        (lambda _form: web.Response(body=b"x" * 100_000), "more than 65536 octets"),
        (lambda _form: web.Response(status=500, text="oops"), "answers 500"),
        (json_of(access_token=7), "something else than an access token"),
        (json_of(access_token="a\1b\r\nQUIT"), "cannot be sent"),
        (json_of(access_token="x" * 9000), "cannot be sent"),
        (json_of(access_token="x", token_type="mac"), "no bearer token"),
    ],
)
async def test_an_answer_without_a_token_is_told_and_shows_no_secret(
    tokens_of: MakeTokens, token_server: TokenServer, answer: Any, said: str
) -> None:
    token_server.answer = answer
    with pytest.raises(TokenError) as caught:
        await tokens_of(client_secret="s3cr3t").get()
    text = str(caught.value)
    assert said in text
    assert "s3cr3t" not in text
    assert "1//refresh" not in text
    assert text.isprintable()
    assert len(text) < 500


async def test_a_server_that_does_not_answer_is_given_up(
    tokens_of: MakeTokens, token_server: TokenServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(oauth, "TIMEOUT", 0.2)
    token_server.gate.clear()
    with pytest.raises(TokenError, match="does not answer within"):
        await tokens_of().get()


async def test_a_server_with_another_certificate_gets_nothing(tokens_of: MakeTokens, token_server: TokenServer) -> None:
    stranger = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    trustme.CA().configure_trust(stranger)
    with pytest.raises(TokenError, match="certificate verify failed"):
        await tokens_of(context=stranger).get()
    assert token_server.asked == []


# --- the SMTP server --------------------------------------------------------------------------------------------------
def target(upstream: Any, tokens: Tokens, tls: tuple[ssl.SSLContext, ssl.SSLContext]) -> Target:
    return Target(
        name="up",
        host="127.0.0.1",
        port=upstream.port,
        tls=UpstreamTLSMode.START_TLS,
        hostname="relay.test",
        context=tls[1],
        login=tokens.grant,
        mechanisms=("XOAUTH2", "OAUTHBEARER"),
    )


@pytest.mark.parametrize("mechanism", ["XOAUTH2", "OAUTHBEARER"])
async def test_logs_in_with_the_token(
    make_upstream: Any, tokens_of: MakeTokens, tls: tuple[ssl.SSLContext, ssl.SSLContext], mechanism: str
) -> None:
    upstream = await make_upstream(tls=tls[0], password="", mechanisms=f"PLAIN {mechanism}", tokens={"ya29.token-1"})
    tokens = tokens_of()
    connection = await connect(target(upstream, tokens, tls), SHORT, tokens)
    await connection.quit()
    assert [line.split(" ")[1] for line in upstream.commands if line.startswith("AUTH")] == [mechanism]


async def test_a_token_that_was_revoked_is_replaced_on_the_same_connection(
    make_upstream: Any, tokens_of: MakeTokens, tls: tuple[ssl.SSLContext, ssl.SSLContext], clock: Clock
) -> None:
    upstream = await make_upstream(tls=tls[0], password="", mechanisms="XOAUTH2", tokens={"ya29.token-2"})
    tokens = tokens_of()
    await tokens.get()
    clock.ahead = 1000
    connection = await connect(target(upstream, tokens, tls), SHORT, tokens)
    await connection.quit()
    assert upstream.connections == 1


@pytest.mark.parametrize("mechanism", ["XOAUTH2", "OAUTHBEARER"])
async def test_a_new_token_that_is_refused_is_the_upstreams_problem_and_is_not_tried_again_at_once(
    make_upstream: Any,
    tokens_of: MakeTokens,
    token_server: TokenServer,
    tls: tuple[ssl.SSLContext, ssl.SSLContext],
    mechanism: str,
) -> None:
    upstream = await make_upstream(tls=tls[0], password="", mechanisms=mechanism)
    tokens = tokens_of()
    with pytest.raises(Fault) as caught:
        await connect(target(upstream, tokens, tls), SHORT, tokens)
    assert caught.value.failure is FailureClass.AUTHENTICATION
    assert "ya29" not in caught.value.text
    assert len(token_server.asked) == 1


async def test_without_a_token_the_upstream_is_down_for_its_login_and_comes_back_by_itself(
    make_upstream: Any,
    tokens_of: MakeTokens,
    token_server: TokenServer,
    tls: tuple[ssl.SSLContext, ssl.SSLContext],
    clock: Clock,
    until: Any,
) -> None:
    upstream = await make_upstream(tls=tls[0], password="", mechanisms="XOAUTH2", tokens={"ya29.token-2"})
    token_server.answer = lambda _form: web.json_response({"error": "invalid_client"}, status=401)
    up = asyncio.Event()
    pool = Pool(
        target(upstream, tokens_of(), tls),
        config.UpstreamLimits(),
        clocks=Clocks(clock.now, clock.monotonic, lambda: 0.0),
        on_up=up.set,
        on_throttled=lambda _seconds: None,
        timeouts=SHORT,
    )
    await pool.check()
    state = pool.state
    assert not state.up
    assert state.failure is FailureClass.AUTHENTICATION
    assert "no access token" in state.last_error
    assert "invalid_client" in state.last_error
    token_server.answer = None
    pool.probe(at_once=True)
    await asyncio.wait_for(up.wait(), 5)
    assert pool.is_up
    await pool.close()


# --- from the configuration -------------------------------------------------------------------------------------------
FILES = {
    "up.grant": b"RefreshToken\n",
    "up.user": b"user@example.test",
    "up.client-id": b"client",
    "up.token-url": b"https://login.example.test/token",
    "up.refresh-token": b"r\n",
}
UPSTREAM = config.Upstream(name="up", host="smtp.example.test", credentials="up", mechanisms=("XOAUTH2",))


def test_a_grant_is_read_from_its_files_and_never_shown() -> None:
    files = {**FILES, "up.client-secret": b"s3cr3t", "up.scope": b"mail"}
    login = target_of(0, UPSTREAM, files, hostname="relay.test").login
    assert isinstance(login, Grant)
    assert (login.type, login.user, login.refresh_token, login.scope) == (
        OAuthGrant.REFRESH_TOKEN,
        "user@example.test",
        "r",
        "mail",
    )
    assert "s3cr3t" not in repr(login)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"up.grant": b"Password"}, "up.grant is none of RefreshToken, ClientCredentials, JWTBearer"),
        ({"up.refresh-token": None}, "the file up.refresh-token is missing"),
        ({"up.grant": b"ClientCredentials"}, "the file up.client-secret is missing"),
        ({"up.grant": b"JWTBearer"}, "the file up.private-key is missing"),
        ({"up.grant": b"JWTBearer", "up.private-key": b"s3cr3t"}, "up.private-key holds no PEM private key"),
        (
            {"up.grant": b"JWTBearer", "up.private-key": pem(ec.generate_private_key(ec.SECP384R1())).encode()},
            "up.private-key holds neither RSA of at least 2048 bits nor P-256",
        ),
        ({"up.token-url": b"http://login.example.test/token"}, "up.token-url is no https address"),
        ({"up.token-url": b"https:///token"}, "up.token-url is no https address"),
        ({"up.user": b"user\1auth=x"}, "up.user has a control character"),
    ],
)
def test_a_grant_that_cannot_work_is_refused_with_its_file(files: dict[str, bytes | None], said: str) -> None:
    credentials = {name: value for name, value in {**FILES, **files}.items() if value is not None}
    with pytest.raises(ConfigurationError) as caught:
        target_of(0, UPSTREAM, credentials, hostname="relay.test")
    assert said in str(caught.value)
    assert str(caught.value).startswith("upstreams[0].credentials")
    assert "s3cr3t" not in str(caught.value)


def test_a_grant_goes_with_no_mechanism_for_passwords() -> None:
    upstream = config.Upstream(name="up", host="smtp.example.test", credentials="up")
    with pytest.raises(ConfigurationError, match="works with an OAuth grant; use XOAUTH2 or OAUTHBEARER"):
        target_of(0, upstream, FILES, hostname="relay.test")
