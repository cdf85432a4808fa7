"""What the operator reports in the status of its resources. Tolerant: a newer operator may have written more."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from mailsluice_operator.resource.schema import TolerantStruct, list_map

Count = Annotated[int, Meta(ge=0)]


class Condition(TolerantStruct, frozen=True, kw_only=True):
    """One condition, as in meta/v1."""

    type: Annotated[str, Meta(max_length=316)]
    """Name of the condition."""
    status: Literal["True", "False", "Unknown"]
    """Whether it holds."""
    last_transition_time: str
    """When the status last changed (RFC 3339)."""
    reason: Annotated[str, Meta(max_length=1024)]
    """Why, in one CamelCase word."""
    message: Annotated[str, Meta(max_length=32768)]
    """Why, in words: the object, the field and what to do."""
    observed_generation: Count | None = None
    """metadata.generation that the condition is about."""


Conditions = Annotated[tuple[Condition, ...], Meta(max_length=32), list_map("type")]


class Endpoint(TolerantStruct, frozen=True, kw_only=True):
    """Where clients connect to one listener."""

    name: str
    """Name of the listener."""
    address: str
    """host:port to connect to."""


class ConfigurationStatus(TolerantStruct, frozen=True, kw_only=True):
    """How far the wanted configuration has got."""

    revision: str = ""
    """Revision that the pods should run."""
    pods_current: Count = 0
    """Pods that run it."""
    pods_total: Count = 0
    """Pods that there are."""


class DNSRecord(TolerantStruct, frozen=True, kw_only=True):
    """A DNS record to copy into the zone of the sender's domain."""

    name: str
    """Name of the record."""
    type: str
    """Type of the record."""
    value: str
    """Value of the record."""
    purpose: Literal["SPF", "DKIM", "DMARC"]
    """What it is for."""


class SmtpRelayStatus(TolerantStruct, frozen=True, kw_only=True):
    """What the operator saw and did last."""

    observed_generation: Count | None = None
    """metadata.generation that this status is about."""
    conditions: Conditions = ()
    """Ready, Reconciling, Stalled, ConfigurationValid, Degraded, Paused."""
    replicas: Count | None = None
    """Pods that there are."""
    ready_replicas: Count | None = None
    """Pods that accept mail."""
    selector: str | None = None
    """Label selector of the pods, for the scale subresource."""
    endpoints: Annotated[tuple[Endpoint, ...], Meta(max_length=16), list_map("name")] = ()
    """Where clients connect to, by listener."""
    users: Count | None = None
    """Logins that the relay knows."""
    queued_messages: Count | None = None
    """Messages in the queues of all pods; at most half a minute old."""
    configuration: ConfigurationStatus | None = None
    """How far the wanted configuration has got."""
    dns_records: Annotated[tuple[DNSRecord, ...], Meta(max_length=256)] = ()
    """Records to copy into the zones of the sender domains."""


class Usage(TolerantStruct, frozen=True, kw_only=True):
    """How much of one rate limit is used up."""

    name: str
    """Name of the limit."""
    unit: str
    """What is counted."""
    used: Count
    """How much of it was used in the window that ends now."""
    limit: Count
    """How much may be used."""


class LimitHit(TolerantStruct, frozen=True, kw_only=True):
    """The rate limit that held mail back last."""

    name: str
    """Name of the limit."""
    time: str
    """When (RFC 3339)."""


class Refusal(TolerantStruct, frozen=True, kw_only=True):
    """The last refusal of this login's mail."""

    reason: str
    """Reason as in docs/reasons.md."""
    message: str
    """The reply that the client got."""
    time: str
    """When (RFC 3339)."""


class SmtpUserStatus(TolerantStruct, frozen=True, kw_only=True):
    """What the operator saw and did last."""

    observed_generation: Count | None = None
    """metadata.generation that this status is about."""
    conditions: Conditions = ()
    """Accepted: the relay grants login and senders. Ready: the Secret is there and the relay knows the login."""
    login: str | None = None
    """The login as the relay knows it."""
    secret_name: str | None = None
    """The Secret with host, port, user name and password."""
    usage: Annotated[tuple[Usage, ...], Meta(max_length=32), list_map("name")] = ()
    """How much of each rate limit is used up; at most a minute old."""
    last_limit: LimitHit | None = None
    """The rate limit that held mail back last."""
    last_refusal: Refusal | None = None
    """The last refusal of this login's mail."""
    suspended: bool | None = None
    """Whether the relay's owner suspended the login."""
    rotated_at: str | None = None
    """When the password was last changed (RFC 3339)."""
    next_rotation: str | None = None
    """When it will be changed next (RFC 3339)."""


class OwnerReference(TolerantStruct, frozen=True, kw_only=True):
    """An owner of the object."""

    kind: str
    name: str
    uid: str


class ObjectMeta(TolerantStruct, frozen=True, kw_only=True):
    """What the operator reads of an object's metadata."""

    name: str
    namespace: str = "default"
    uid: str = ""
    generation: int = 0
    resource_version: str = ""
    creation_timestamp: str | None = None
    deletion_timestamp: str | None = None
    labels: dict[str, str] = msgspec.field(default_factory=dict)
    annotations: dict[str, str] = msgspec.field(default_factory=dict)
    finalizers: tuple[str, ...] = ()
    owner_references: tuple[OwnerReference, ...] = ()


__all__ = [
    "Condition",
    "ConfigurationStatus",
    "DNSRecord",
    "Endpoint",
    "LimitHit",
    "ObjectMeta",
    "OwnerReference",
    "Refusal",
    "SmtpRelayStatus",
    "SmtpUserStatus",
    "Usage",
]
