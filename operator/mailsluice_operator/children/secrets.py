"""The Secrets and ConfigMaps of a relay and of a user."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Final
from urllib.parse import quote

from mailsluice_operator.children.metadata import (
    REVISION_ANNOTATION,
    WATCH_LABEL,
    Object,
    Owner,
    authority_name,
    child,
    config_name,
    credentials_name,
    relay_labels,
    user_labels,
)

CONFIG_KEY: Final = "config.json.gz"
REVISION_KEY: Final = "revision"
FORMER_PASSWORD_KEY: Final = "former-password"
"""While a password that was replaced is still taken, so that the operator need not remember it elsewhere."""
BINDING_TYPE: Final = "servicebinding.io/smtp"
"""As Service Binding 1.1 names the types of such Secrets, whose well-known keys `user_secret` fills."""


def encoded(data: Mapping[str, bytes]) -> dict[str, str]:
    return {key: base64.b64encode(value).decode("ascii") for key, value in sorted(data.items())}


def decoded(secret: Object) -> dict[str, bytes]:
    """The values of a Secret as the API has it. The API server has checked the base64."""
    return {key: base64.b64decode(value) for key, value in (secret.get("data") or {}).items()}


def config_secret(owner: Owner, packed: bytes, revision: str) -> Object:
    """What the relay is told, save what would let its reader log in somewhere."""
    return _secret(owner, config_name(owner.name), {CONFIG_KEY: packed}, {REVISION_ANNOTATION: revision})


def credentials_secret(owner: Owner, files: Mapping[str, bytes], revision: str) -> Object:
    """The keys and passwords that the relay needs, apart from the configuration, so that RBAC can tell them apart."""
    content = {**files, REVISION_KEY: revision.encode()}
    return _secret(owner, credentials_name(owner.name), content, {REVISION_ANNOTATION: revision})


def authority_secret(owner: Owner, material: Mapping[str, bytes]) -> Object:
    """The operator's certificate authority for this relay. No pod mounts it."""
    return _secret(owner, authority_name(owner.name), material, {})


def _secret(owner: Owner, name: str, data: Mapping[str, bytes], annotations: Mapping[str, str]) -> Object:
    labels = {**relay_labels(owner.name), WATCH_LABEL: "true"}
    return child("v1", "Secret", name, owner, labels=labels, annotations=annotations, type="Opaque", data=encoded(data))


def authority_config_map(owner: Owner, bundle: bytes) -> Object:
    """What clients verify the relay with; anyone in the namespace may read it."""
    return child(
        "v1",
        "ConfigMap",
        authority_name(owner.name),
        owner,
        labels=relay_labels(owner.name),
        data={"ca.crt": bundle.decode("ascii")},
    )


def user_secret(
    owner: Owner,
    name: str,
    *,
    host: str,
    port: int,
    login: str,
    password: str,
    implicit_tls: bool,
    bundle: bytes,
    former_password: str | None = None,
    annotations: Mapping[str, str] | None = None,
) -> Object:
    """What an application needs to send: by key, and as one URI."""
    scheme = "smtps" if implicit_tls else "smtp"
    values = {
        "type": "smtp",
        "provider": "mailsluice",
        "host": host,
        "port": str(port),
        "username": login,
        "password": password,
        "tls": "implicit" if implicit_tls else "starttls",
        "uri": f"{scheme}://{quote(login, safe='')}:{quote(password, safe='')}@{host}:{port}",
    }
    if former_password is not None:
        values[FORMER_PASSWORD_KEY] = former_password
    data = {key: value.encode() for key, value in values.items()}
    if bundle:
        data["ca.crt"] = bundle
    return child(
        "v1",
        "Secret",
        name,
        owner,
        labels=user_labels(owner.name),
        annotations=annotations,
        type=BINDING_TYPE,
        data=encoded(data),
    )
