"""Which Secrets a relay names, and whether their content is what their use needs. Never shows a value.

One table for all who read them: the configuration, the offline check, and the watch on Secrets.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Iterator, Mapping
from typing import Final

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePrivateKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from mailsluice_operator.resource.models import SmtpRelay, Upstream
from mailsluice_operator.resource.presets import OAUTH_MECHANISMS, PRESETS
from mailsluice_relay.config import (
    OAUTH_KEYS,
    OAUTH_SECRETS,
    REQUIRED_OAUTH_KEYS,
    ConfigurationError,
    OAuthGrant,
    is_https,
    login_key,
    parse_htpasswd,
    parse_store_url,
)

Data = Mapping[str, bytes]
"""The content of a Secret, decoded."""

_CERTIFICATE: Final = b"-----BEGIN CERTIFICATE-----"
_PRIVATE_KEY: Final = b"PRIVATE KEY-----"


class Purpose(enum.Enum):
    """What a Secret is read for, with the key that is meant when the reference names none."""

    USERS = "htpasswd"
    UPSTREAM_CREDENTIALS = "password"
    """A password or an OAuth grant."""
    UPSTREAM_PASSWORD = "username"
    UPSTREAM_GRANT = "grant"
    SERVER_CERTIFICATE = "tls.crt"
    AUTHORITIES = "ca.crt"
    SIGNING_KEY = "tls.key"
    URL = "url"


@dataclasses.dataclass(frozen=True)
class SecretUse:
    """One reference of a relay to a Secret of its namespace."""

    field: str
    """Where the relay names it, such as `spec.upstreams[0].credentialsSecretRef`."""
    purpose: Purpose
    name: str
    given_key: str | None = None

    @property
    def key(self) -> str:
        return self.given_key or self.purpose.value


def secret_uses(relay: SmtpRelay) -> tuple[SecretUse, ...]:
    """Every reference to a Secret, in the order of the resource's fields."""
    return tuple(_secret_uses(relay))


def _secret_uses(relay: SmtpRelay) -> Iterator[SecretUse]:
    spec = relay.spec
    if spec.tls.secret_ref is not None:
        yield SecretUse("spec.tls.secretRef", Purpose.SERVER_CERTIFICATE, spec.tls.secret_ref.name)
    if (client_ca := spec.tls.client_ca_secret_ref) is not None:
        yield SecretUse("spec.tls.clientCASecretRef", Purpose.AUTHORITIES, client_ca.name, client_ca.key)
    for index, source in enumerate(spec.authentication.users):
        reference = source.secret_ref
        field = f"spec.authentication.users[{index}].secretRef"
        yield SecretUse(field, Purpose.USERS, reference.name, reference.key)
    if spec.rate_limit_store is not None:
        url = spec.rate_limit_store.url_secret_ref
        yield SecretUse("spec.rateLimitStore.urlSecretRef", Purpose.URL, url.name, url.key)
        if (authorities := spec.rate_limit_store.ca_secret_ref) is not None:
            field = "spec.rateLimitStore.caSecretRef"
            yield SecretUse(field, Purpose.AUTHORITIES, authorities.name, authorities.key)
    for index, upstream in enumerate(spec.upstreams):
        if (authorities := upstream.tls.ca_secret_ref) is not None:
            field = f"spec.upstreams[{index}].tls.caSecretRef"
            yield SecretUse(field, Purpose.AUTHORITIES, authorities.name, authorities.key)
        if (credentials := upstream.credentials_secret_ref) is not None:
            field = f"spec.upstreams[{index}].credentialsSecretRef"
            yield SecretUse(field, _credentials(upstream), credentials.name)
    for index, signature in enumerate(spec.dkim):
        private = signature.private_key_secret_ref
        yield SecretUse(f"spec.dkim[{index}].privateKeySecretRef", Purpose.SIGNING_KEY, private.name, private.key)


def _credentials(upstream: Upstream) -> Purpose:
    """Of which kind the server takes them, as far as that is known."""
    preset = PRESETS.get(upstream.preset) if upstream.preset is not None else None
    if preset is None:
        return Purpose.UPSTREAM_CREDENTIALS
    if preset.is_oauth_only:
        return Purpose.UPSTREAM_GRANT
    takes_grants = set(OAUTH_MECHANISMS) & set(preset.mechanisms)
    return Purpose.UPSTREAM_CREDENTIALS if takes_grants else Purpose.UPSTREAM_PASSWORD


def is_oauth(data: Data) -> bool:
    """Whether upstream credentials are an OAuth grant rather than a password."""
    return "grant" in data


def is_basic_auth(use: SecretUse, data: Data) -> bool:
    """Whether a Secret of users is of the kind kubernetes.io/basic-auth: one login."""
    return use.given_key is None and use.key not in data and "username" in data


def wrong_content(use: SecretUse, data: Data) -> str | None:
    """What is wrong with the Secret's content for this use, and what to do; None if nothing is."""
    match use.purpose:
        case Purpose.USERS if is_basic_auth(use, data):
            return _lacks(data, "username", "password")
        case Purpose.USERS:
            if use.key not in data:
                other = " and no username and password" if use.given_key is None else ""
                return f"has no key {use.key}{other}; write one with `mailsluice passwd`"
            return _wrong_htpasswd(use.key, data[use.key])
        case Purpose.UPSTREAM_GRANT if not is_oauth(data):
            return "has no key grant: this provider takes OAuth alone; put a grant there instead of a password"
        case Purpose.UPSTREAM_PASSWORD if is_oauth(data):
            return "holds an OAuth grant, and this provider takes a password; put username and password there"
        case Purpose.UPSTREAM_GRANT | Purpose.UPSTREAM_CREDENTIALS if is_oauth(data):
            return _wrong_grant(data)
        case Purpose.UPSTREAM_CREDENTIALS | Purpose.UPSTREAM_PASSWORD | Purpose.UPSTREAM_GRANT:
            return _lacks(data, "username", "password")
        case Purpose.SERVER_CERTIFICATE:
            return (
                _lacks(data, "tls.crt", "tls.key")
                or _lacks_pem(data, "tls.crt", _CERTIFICATE, "certificate")
                or _lacks_pem(data, "tls.key", _PRIVATE_KEY, "private key")
            )
        case Purpose.AUTHORITIES:
            return _lacks(data, use.key) or _lacks_pem(data, use.key, _CERTIFICATE, "certificate")
        case Purpose.SIGNING_KEY:
            return _lacks(data, use.key) or _wrong_key(data, use.key, _is_signing_key, _SIGNING_KEYS)
        case Purpose.URL:
            return _lacks(data, use.key) or _wrong_store_url(use.key, data[use.key])


def _lacks(data: Data, *keys: str) -> str | None:
    for key in keys:
        if key not in data:
            return f"has no key {key}; add it"
        if not data[key].strip():
            return f"has nothing in the key {key}; fill it"
    if any(not _is_text(data[key]) for key in keys):
        return f"has something else than UTF-8 text in the keys {', '.join(keys)}; write them anew"
    return None


def _is_text(octets: bytes) -> bool:
    try:
        octets.decode()
    except UnicodeDecodeError:
        return False
    return True


def _wrong_grant(data: Data) -> str | None:
    if (lacking := _lacks(data, *REQUIRED_OAUTH_KEYS)) is not None:
        return lacking
    try:
        kind = OAuthGrant(data["grant"].decode().strip())
    except ValueError:
        return f"has something else in the key grant than {', '.join(OAuthGrant)}; write one of them"
    if not data["user"].decode().strip().isprintable():
        return "has a control character in the key user; write it anew"
    if not is_https(data["token-url"].decode().strip()):
        return "has no https address in the key token-url; credentials are sent there, so put one there"
    given = [key for key in OAUTH_KEYS if data.get(key, b"").strip()]
    if (lacking := _lacks(data, OAUTH_SECRETS[kind], *given)) is not None:
        return lacking
    return (
        _wrong_key(data, "private-key", _is_assertion_key, _ASSERTION_KEYS) if kind is OAuthGrant.JWT_BEARER else None
    )


_ASSERTION_KEYS: Final = "RSA of at least 2048 bits or P-256"


def _is_assertion_key(key: PrivateKeyTypes) -> bool:
    """RS256 or ES256 (RFC 7518 section 3.1)."""
    if isinstance(key, RSAPrivateKey):
        return key.key_size >= 2048
    return isinstance(key, EllipticCurvePrivateKey) and isinstance(key.curve, SECP256R1)


_SIGNING_KEYS: Final = "RSA of at least 1024 bits or Ed25519"


def _is_signing_key(key: PrivateKeyTypes) -> bool:
    """What DKIM takes (RFC 8301 section 3.2, RFC 8463)."""
    return isinstance(key, Ed25519PrivateKey) or (isinstance(key, RSAPrivateKey) and key.key_size >= 1024)


def _wrong_key(data: Data, key: str, is_right: Callable[[PrivateKeyTypes], bool], kinds: str) -> str | None:
    try:
        private = load_pem_private_key(data[key].strip(), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):  # TypeError: it wants a password
        return f"has no private key in PEM form, without a password, in the key {key}; put it there"
    return None if is_right(private) else f"has another kind of key in the key {key} than {kinds}; make one of these"


def _lacks_pem(data: Data, key: str, marker: bytes, what: str) -> str | None:
    return None if marker in data[key] else f"has no {what} in PEM form in the key {key}; put it there"


def _wrong_store_url(key: str, octets: bytes) -> str | None:
    try:
        parse_store_url(octets)
    except ConfigurationError as error:
        return f"key {key} {error}"
    return None


def _wrong_htpasswd(key: str, octets: bytes) -> str | None:
    try:
        pairs = parse_htpasswd(octets.decode())
    except UnicodeDecodeError:
        return f"has something else than UTF-8 text in the key {key}; write it anew with `mailsluice passwd`"
    except ConfigurationError as error:
        return f"key {key}, {error}"
    seen: set[str] = set()
    for login, _ in pairs:
        if login_key(login) in seen:
            return f"key {key} has the login {login} twice; remove one line"
        seen.add(login_key(login))
    return None
