"""The objects of files as the operator would read them from the API server: checked, defaulted, decoded."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from mailsluice_operator.resource.files import Severity, check_files, load_files
from mailsluice_operator.resource.models import SmtpRelay, SmtpUser, relay_from, user_from
from mailsluice_operator.resource.references import Data
from mailsluice_operator.resource.validation import admitted

DEFAULT_NAMESPACE: Final = "default"
"""Where objects are that name no namespace, as with kubectl."""


class LocalError(Exception):
    """The relay cannot be run as asked; the text says what to do."""


@dataclass(slots=True)
class Documents:
    """What some files hold. Secrets are by namespace and name; namespaces carry their labels."""

    relays: list[SmtpRelay] = field(default_factory=list)
    users: list[SmtpUser] = field(default_factory=list)
    secrets: dict[tuple[str, str], Data] = field(default_factory=dict)
    namespaces: dict[str, Mapping[str, str]] = field(default_factory=dict)


def read(paths: Sequence[Path]) -> Documents:
    """Raises LocalError with every error that `mailsluice check` would tell."""
    errors = [finding for finding in check_files(paths) if finding.severity is Severity.ERROR]
    if errors:
        raise LocalError("\n".join(map(str, errors)))
    documents = Documents()
    for item in load_files(paths)[0]:
        match item.kind:
            case "SmtpRelay":
                documents.relays.append(relay_from(_placed(admitted(item.value))))
            case "SmtpUser":
                documents.users.append(user_from(_placed(admitted(item.value))))
            case "Secret":
                documents.secrets[item.namespace or DEFAULT_NAMESPACE, item.name] = _data(item.value)
            case "Namespace":
                labels = item.value["metadata"].get("labels") or {}
                documents.namespaces[item.name] = {"kubernetes.io/metadata.name": item.name, **labels}
    return documents


def _placed(manifest: dict[str, Any]) -> dict[str, Any]:
    metadata = {"namespace": DEFAULT_NAMESPACE, **manifest["metadata"]}
    metadata.setdefault("uid", f"{metadata['namespace']}/{metadata['name']}")
    return {**manifest, "metadata": metadata}


def _data(manifest: Mapping[str, Any]) -> dict[str, bytes]:
    """As the API server stores it: stringData wins over data."""
    decoded = {key: base64.b64decode(text) for key, text in (manifest.get("data") or {}).items()}
    return decoded | {key: text.encode() for key, text in (manifest.get("stringData") or {}).items()}
