"""What a connection to an upstream needs, from the configuration and the credential files, or refused with words."""

from __future__ import annotations

import ssl
from dataclasses import dataclass

from mailsluice_relay.config import (
    OAUTH_SECRETS,
    ConfigurationError,
    Credentials,
    OAuthGrant,
    Upstream,
    UpstreamTLSMode,
    UpstreamType,
    is_https,
)
from mailsluice_relay.delivery.oauth import Grant, signing_key
from mailsluice_relay.delivery.sasl import WITH_PASSWORD, WITH_TOKEN


@dataclass(frozen=True)
class Login:
    """Credentials of ours at an upstream."""

    username: str
    password: str

    def __repr__(self) -> str:
        return f"Login({self.username!r}, ...)"

    def redacted(self, text: str) -> str:
        return text.replace(self.password, "***")


@dataclass(frozen=True)
class Target:
    name: str
    host: str
    port: int
    tls: UpstreamTLSMode
    hostname: str
    """What we say in EHLO."""
    address: str | None = None
    """Where to connect to; None: where the system's resolver finds `host`."""
    context: ssl.SSLContext | None = None
    login: Login | Grant | None = None
    mechanisms: tuple[str, ...] = tuple(WITH_PASSWORD)
    allow_plaintext_authentication: bool = False


def target_of(index: int, upstream: Upstream, credentials: Credentials, *, hostname: str) -> Target:
    """Raises ConfigurationError, which names `upstreams[index]`."""
    field = f"upstreams[{index}]"
    if not upstream.host and upstream.type is not UpstreamType.DIRECT_TO_MX:
        raise ConfigurationError(f"{field}.host: {upstream.name} has no host; name the provider's server")
    login = _credentials(field, upstream, credentials)
    known = WITH_TOKEN if isinstance(login, Grant) else WITH_PASSWORD
    if login is not None and not set(upstream.mechanisms) & set(known):
        kind = "an OAuth grant" if isinstance(login, Grant) else "a password"
        raise ConfigurationError(
            f"{field}.mechanisms: none of {', '.join(upstream.mechanisms)} works with {kind}; use {' or '.join(known)}"
        )
    if login is not None and upstream.tls is UpstreamTLSMode.PLAIN and not upstream.allow_plaintext_authentication:
        raise ConfigurationError(
            f"{field}.tls: the password of {upstream.name} would go in the clear; use StartTLS or ImplicitTLS, "
            "or set allowPlaintextAuthentication"
        )
    return Target(
        name=upstream.name,
        host=upstream.host,
        port=upstream.port,
        tls=upstream.tls,
        hostname=hostname,
        context=_context(field, upstream, credentials, has_login=login is not None),
        login=login,
        mechanisms=upstream.mechanisms,
        allow_plaintext_authentication=upstream.allow_plaintext_authentication,
    )


def _credentials(field: str, upstream: Upstream, credentials: Credentials) -> Login | Grant | None:
    name, field = upstream.credentials, f"{field}.credentials"
    if name is None:
        return None
    if f"{name}.grant" in credentials:
        return _grant(field, name, upstream, credentials)
    username, password = (_text(field, f"{name}.{part}", credentials) for part in ("username", "password"))
    return Login(username, password)


def _grant(field: str, name: str, upstream: Upstream, credentials: Credentials) -> Grant:
    def given(key: str) -> str:
        return _text(field, f"{name}.{key}", credentials)

    def optional(key: str) -> str:
        return given(key) if f"{name}.{key}" in credentials else ""

    try:
        kind = OAuthGrant(given("grant"))
    except ValueError as error:
        raise ConfigurationError(
            f"{field}: {name}.grant is none of {', '.join(OAuthGrant)}; write one of them"
        ) from error
    given(OAUTH_SECRETS[kind])
    user, url = given("user"), given("token-url")
    if not user.isprintable():  # a control character ends a field of XOAUTH2
        raise ConfigurationError(f"{field}: {name}.user has a control character")
    if not is_https(url):
        raise ConfigurationError(f"{field}: {name}.token-url is no https address; credentials go nowhere else")
    private_key = optional("private-key") if kind is OAuthGrant.JWT_BEARER else ""
    if private_key:
        try:
            signing_key(private_key)
        except ValueError as error:
            raise ConfigurationError(f"{field}: {name}.private-key holds {error}") from error
    return Grant(
        type=kind,
        user=user,
        client_id=given("client-id"),
        token_url=url,
        scope=optional("scope"),
        client_secret=optional("client-secret"),
        refresh_token=optional("refresh-token"),
        private_key=private_key,
        context=_token_context(field, upstream, credentials),
    )


def _text(field: str, file: str, credentials: Credentials) -> str:
    raw = credentials.get(file)
    if raw is None:
        raise ConfigurationError(f"{field}: the file {file} is missing from the credentials")
    try:
        value = raw.decode().removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{field}: {file} is not UTF-8") from error
    if not value or "\0" in value:  # NUL separates the parts of PLAIN (RFC 4616 section 2)
        raise ConfigurationError(f"{field}: {file} is empty or holds a NUL")
    return value


def _context(field: str, upstream: Upstream, credentials: Credentials, *, has_login: bool) -> ssl.SSLContext | None:
    if upstream.tls is UpstreamTLSMode.PLAIN:
        return None
    context = ssl.create_default_context() if upstream.ca is None else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    _trust(field, context, upstream, credentials)
    context.minimum_version = ssl.TLSVersion.TLSv1_2  # RFC 8996
    if upstream.tls is UpstreamTLSMode.OPPORTUNISTIC and not has_login:
        # RFC 7435: whoever would accept plain text gains from any encryption. A password is worth more than that:
        # with a login the name is verified here, too.
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def _token_context(field: str, upstream: Upstream, credentials: Credentials) -> ssl.SSLContext:
    """Trusts the system's authorities and the upstream's own: a mail server inside has its token server there, too."""
    context = ssl.create_default_context()
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    _trust(field, context, upstream, credentials)
    return context


def _trust(field: str, context: ssl.SSLContext, upstream: Upstream, credentials: Credentials) -> None:
    if upstream.ca is None:
        return
    raw = credentials.get(upstream.ca)
    if raw is None:
        raise ConfigurationError(f"{field}.ca: the file {upstream.ca} is missing from the credentials")
    try:
        context.load_verify_locations(cadata=raw.decode("ascii", "replace"))
    except (ssl.SSLError, ValueError) as error:  # ValueError: nothing at all
        raise ConfigurationError(f"{field}.ca: {upstream.ca} holds no usable PEM certificate: {error}") from error
