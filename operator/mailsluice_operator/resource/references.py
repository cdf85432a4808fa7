"""Which Secrets a relay names, and whether their content is what their use needs. Never shows a value.

One table for all who read them: the configuration, the offline check, and the watch on Secrets.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterator, Mapping
from typing import Final

from mailsluice_operator.resource.models import SmtpRelay
from mailsluice_relay.config import ConfigurationError, login_key, parse_htpasswd

Data = Mapping[str, bytes]
"""The content of a Secret, decoded."""

_CERTIFICATE: Final = b"-----BEGIN CERTIFICATE-----"
_PRIVATE_KEY: Final = b"PRIVATE KEY-----"


class Purpose(enum.Enum):
    """What a Secret is read for, with the key that is meant when the reference names none."""

    USERS = "htpasswd"
    UPSTREAM_CREDENTIALS = "password"
    SERVER_CERTIFICATE = "tls.crt"
    AUTHORITIES = "ca.crt"
    PRIVATE_KEY = "tls.key"
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
    for index, upstream in enumerate(spec.upstreams):
        if (authorities := upstream.tls.ca_secret_ref) is not None:
            field = f"spec.upstreams[{index}].tls.caSecretRef"
            yield SecretUse(field, Purpose.AUTHORITIES, authorities.name, authorities.key)
        if (credentials := upstream.credentials_secret_ref) is not None:
            field = f"spec.upstreams[{index}].credentialsSecretRef"
            yield SecretUse(field, Purpose.UPSTREAM_CREDENTIALS, credentials.name)
    for index, signature in enumerate(spec.dkim):
        private = signature.private_key_secret_ref
        yield SecretUse(f"spec.dkim[{index}].privateKeySecretRef", Purpose.PRIVATE_KEY, private.name, private.key)


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
        case Purpose.UPSTREAM_CREDENTIALS if is_oauth(data):
            return _lacks(data, "user", "client-id", "token-url")
        case Purpose.UPSTREAM_CREDENTIALS:
            return _lacks(data, "username", "password")
        case Purpose.SERVER_CERTIFICATE:
            return (
                _lacks(data, "tls.crt", "tls.key")
                or _lacks_pem(data, "tls.crt", _CERTIFICATE, "certificate")
                or _lacks_pem(data, "tls.key", _PRIVATE_KEY, "private key")
            )
        case Purpose.AUTHORITIES:
            return _lacks(data, use.key) or _lacks_pem(data, use.key, _CERTIFICATE, "certificate")
        case Purpose.PRIVATE_KEY:
            return _lacks(data, use.key) or _lacks_pem(data, use.key, _PRIVATE_KEY, "private key")
        case Purpose.URL:
            return _lacks(data, use.key)


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


def _lacks_pem(data: Data, key: str, marker: bytes, what: str) -> str | None:
    return None if marker in data[key] else f"has no {what} in PEM form in the key {key}; put it there"


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
