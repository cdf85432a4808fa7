"""What a connection to an upstream needs, from the configuration and the credential files, or refused with words."""

from __future__ import annotations

import ssl
from dataclasses import dataclass

from mailsluice_relay.config import ConfigurationError, Credentials, Upstream, UpstreamTLSMode, UpstreamType

SUPPORTED_MECHANISMS = ("PLAIN", "LOGIN")


@dataclass(frozen=True)
class Login:
    """Credentials of ours at an upstream."""

    username: str
    password: str

    def __repr__(self) -> str:
        return f"Login({self.username!r}, ...)"


@dataclass(frozen=True)
class Target:
    name: str
    host: str
    port: int
    tls: UpstreamTLSMode
    hostname: str
    """What we say in EHLO."""
    context: ssl.SSLContext | None = None
    login: Login | None = None
    mechanisms: tuple[str, ...] = SUPPORTED_MECHANISMS
    allow_plaintext_authentication: bool = False


def target_of(index: int, upstream: Upstream, credentials: Credentials, *, hostname: str) -> Target:
    """Raises ConfigurationError, which names `upstreams[index]`."""
    field = f"upstreams[{index}]"
    if upstream.type is UpstreamType.DIRECT_TO_MX:
        raise ConfigurationError(
            f"{field}.type: DirectToMX ({upstream.name}) is not in this release; name a provider's host or preset"
        )
    if not upstream.host:
        raise ConfigurationError(f"{field}.host: {upstream.name} has no host; name the provider's server")
    login = None if upstream.credentials is None else _login(f"{field}.credentials", upstream.credentials, credentials)
    if login is not None and not set(upstream.mechanisms) & set(SUPPORTED_MECHANISMS):
        raise ConfigurationError(
            f"{field}.mechanisms: none of {', '.join(upstream.mechanisms)} is in this release; "
            f"use {' or '.join(SUPPORTED_MECHANISMS)}"
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


def _login(field: str, name: str, credentials: Credentials) -> Login:
    values = []
    for part in ("username", "password"):
        raw = credentials.get(f"{name}.{part}")
        if raw is None:
            raise ConfigurationError(f"{field}: the file {name}.{part} is missing from the credentials")
        try:
            value = raw.decode().removesuffix("\n").removesuffix("\r")
        except UnicodeDecodeError as error:
            raise ConfigurationError(f"{field}: {name}.{part} is not UTF-8") from error
        if not value or "\0" in value:  # NUL separates the parts of PLAIN (RFC 4616 section 2)
            raise ConfigurationError(f"{field}: {name}.{part} is empty or holds a NUL")
        values.append(value)
    return Login(*values)


def _context(field: str, upstream: Upstream, credentials: Credentials, *, has_login: bool) -> ssl.SSLContext | None:
    if upstream.tls is UpstreamTLSMode.PLAIN:
        return None
    authorities = None
    if upstream.ca is not None:
        raw = credentials.get(upstream.ca)
        if raw is None:
            raise ConfigurationError(f"{field}.ca: the file {upstream.ca} is missing from the credentials")
        authorities = raw.decode("ascii", "replace")
    try:
        context = ssl.create_default_context(cadata=authorities)
    except ssl.SSLError as error:
        raise ConfigurationError(f"{field}.ca: {upstream.ca} holds no usable PEM certificate: {error}") from error
    context.minimum_version = ssl.TLSVersion.TLSv1_2  # RFC 8996
    if upstream.tls is UpstreamTLSMode.OPPORTUNISTIC and not has_login:
        # RFC 7435: whoever would accept plain text gains from any encryption. A password is worth more than that:
        # with a login the name is verified here, too.
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context
