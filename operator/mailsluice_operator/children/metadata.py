"""What all children have in common: names, labels, the owner, and the fingerprint of what was applied."""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import msgspec

Object = dict[str, Any]
"""A Kubernetes object as the API's JSON has it."""

API_VERSION: Final = "mailsluice.dev/v1alpha1"
MANAGED_BY: Final = "mailsluice"

RELAY_LABEL: Final = "mailsluice.dev/relay"
USER_LABEL: Final = "mailsluice.dev/user"
WATCH_LABEL: Final = "mailsluice.dev/watch"
"""On every Secret that the operator watches, its own and those that people made."""
MANAGED_BY_LABEL: Final = "app.kubernetes.io/managed-by"

APPLIED_ANNOTATION: Final = "mailsluice.dev/applied"
"""Fingerprint of the body that was applied last. A body that lacks a field which the one before it had looks like a
subset of what is there; the fingerprint tells that it has to be applied all the same, so that the field goes. Of a
Secret's values it tells nothing: who may read the annotation and not the Secret could try guesses on it. Values are
compared themselves."""
REVISION_ANNOTATION: Final = "mailsluice.dev/revision"
LISTENERS_ANNOTATION: Final = "mailsluice.dev/listeners"
"""On pods: fingerprint of what of the listeners a running relay cannot change."""
RESTARTED_ANNOTATION: Final = "mailsluice.dev/restartedAt"
ROTATED_ANNOTATION: Final = "mailsluice.dev/rotated-at"
"""On a SmtpUser's Secret: when its password was made (RFC 3339)."""
FORMER_UNTIL_ANNOTATION: Final = "mailsluice.dev/former-until"
"""On a SmtpUser's Secret: until when its former password is taken (RFC 3339)."""
DISCARD_QUEUE_ANNOTATION: Final = "mailsluice.dev/discard-queue"
DRAIN_FINALIZER: Final = "mailsluice.dev/drain"


def timestamp(moment: datetime.datetime) -> str:
    """As the API writes times."""
    return moment.astimezone(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def plain(value: msgspec.Struct) -> Object:
    """A model as the API's JSON has it: lists, where `msgspec.to_builtins` keeps tuples, so that both compare equal."""
    found: Object = msgspec.json.decode(msgspec.json.encode(value))
    return found


@dataclass(frozen=True)
class Owner:
    """The resource that a child belongs to and is deleted with."""

    kind: str
    namespace: str
    name: str
    uid: str

    def reference(self) -> Object:
        return {
            "apiVersion": API_VERSION,
            "kind": self.kind,
            "name": self.name,
            "uid": self.uid,
            "controller": True,
            "blockOwnerDeletion": True,
        }


def config_name(relay: str) -> str:
    return f"{relay}-config"


def credentials_name(relay: str) -> str:
    return f"{relay}-credentials"


def authority_name(relay: str) -> str:
    return f"{relay}-ca"


def pods_service_name(relay: str) -> str:
    return f"{relay}-pods"


def selector(relay: str) -> dict[str, str]:
    """The labels that choose a relay's pods; a workload's selector can never be changed."""
    return {
        "app.kubernetes.io/name": "mailsluice",
        "app.kubernetes.io/instance": relay,
        "app.kubernetes.io/component": "relay",
    }


def relay_labels(relay: str) -> dict[str, str]:
    return {**selector(relay), MANAGED_BY_LABEL: MANAGED_BY, RELAY_LABEL: relay}


def user_labels(user: str) -> dict[str, str]:
    return {
        "app.kubernetes.io/name": "mailsluice",
        "app.kubernetes.io/component": "user",
        MANAGED_BY_LABEL: MANAGED_BY,
        USER_LABEL: user,
        WATCH_LABEL: "true",
    }


def child(
    api_version: str,
    kind: str,
    name: str,
    owner: Owner,
    *,
    labels: Mapping[str, str],
    annotations: Mapping[str, str] | None = None,
    **content: Any,
) -> Object:
    """A child of the owner, fingerprint included."""
    body: Object = {
        "apiVersion": api_version,
        "kind": kind,
        "metadata": {
            "name": name,
            "namespace": owner.namespace,
            "labels": dict(labels),
            "annotations": dict(annotations or {}),
            "ownerReferences": [owner.reference()],
        },
        **content,
    }
    shown = {**body, "data": sorted(body.get("data", ()))} if kind == "Secret" else body
    body["metadata"]["annotations"][APPLIED_ANNOTATION] = fingerprint(shown)
    return body


def fingerprint(body: Object) -> str:
    """The same for the same body, in any process."""
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:32]
