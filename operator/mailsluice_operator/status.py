"""What is reported of a relay and of a user: from what was seen to the status, with its conditions.

Pure: the clock is an argument. A condition's time moves only when its status flips, so that the same observation gives
the same status and nothing is written.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, NamedTuple

from mailsluice_operator.children.facts import Fact
from mailsluice_operator.children.metadata import timestamp
from mailsluice_operator.children.monitoring import QUEUE_OLD
from mailsluice_operator.resource.status import (
    Condition,
    ConfigurationStatus,
    DNSRecord,
    Endpoint,
    SmtpRelayStatus,
    SmtpUserStatus,
)

MAXIMUM_MESSAGE: Final = 4096
"""Characters of a condition's message that people still read; the schema would take more."""


class UpstreamDown(NamedTuple):
    """An upstream that takes no mail from a pod now, and the last error."""

    name: str
    error: str
    refuses_login: bool = False


@dataclass(frozen=True)
class PodView:
    """What a relay's pod told about itself, or that it did not answer (revision None)."""

    name: str
    ready: bool
    running: bool = True
    revision: str | None = None
    draining: bool = False
    queued: int | None = None
    oldest_seconds: float = 0.0
    """Age of its oldest message that is not held."""
    configuration_error: str = ""
    """Why it keeps an older configuration than the one that it read last."""
    upstreams_down: tuple[UpstreamDown, ...] = ()
    limit_store_error: str | None = None
    """Why the store of spec.rateLimitStore cannot be used; None while it can, and where there is none."""
    engines_down: tuple[tuple[str, str], ...] = ()
    """Names of spam engines that gave no verdict when they were asked last, and why."""
    unschedulable: str | None = None


@dataclass(frozen=True)
class RelayView:
    """What was seen of a relay in one reconcile."""

    generation: int
    paused: bool = False
    invalid: Fact | None = None
    """Why the configuration cannot be used; the last good one stays in force."""
    blocked: Fact | None = None
    """Why a child cannot be made, though the configuration is right."""
    deleting: Fact | None = None
    degraded: tuple[Fact, ...] = ()
    wanted_replicas: int = 1
    replicas: int = 0
    ready_replicas: int = 0
    updated_replicas: int = 0
    rolled_out: bool = True
    """The workload controller has seen the newest template."""
    revision: str = ""
    """Of the configuration in force; empty when there never was one."""
    pods: tuple[PodView, ...] = ()
    endpoints: tuple[Endpoint, ...] = ()
    users: int | None = None
    selector: str | None = None
    queued: int | None = None
    dns_records: tuple[DNSRecord, ...] | None = None
    """None: they could not be made up this time."""


@dataclass
class _Conditions:
    before: Sequence[Condition]
    generation: int
    now: datetime.datetime
    made: list[Condition] = field(default_factory=list)

    def set(self, kind: str, value: bool | None, fact: Fact) -> None:
        """Whether the condition holds (None: that cannot be known now), and why."""
        status: Literal["True", "False", "Unknown"] = "Unknown" if value is None else "True" if value else "False"
        former = next((condition for condition in self.before if condition.type == kind), None)
        flipped = former is None or former.status != status
        self.made.append(
            Condition(
                type=kind,
                status=status,
                reason=fact.reason,
                message=fact.message[:MAXIMUM_MESSAGE],
                last_transition_time=timestamp(self.now) if former is None or flipped else former.last_transition_time,
                observed_generation=self.generation,
            )
        )


def relay_status(before: SmtpRelayStatus, view: RelayView, now: datetime.datetime) -> SmtpRelayStatus:
    """The status of a relay."""
    conditions = _Conditions(before.conditions, view.generation, now)
    current = sum(1 for pod in view.pods if pod.revision == view.revision and view.revision)
    conditions.set("Ready", *_ready(view))
    conditions.set("Reconciling", *_reconciling(view, current))
    stalled = view.blocked or view.invalid
    conditions.set("Stalled", stalled is not None, stalled or Fact("NotStalled", "Nothing waits for a person."))
    conditions.set(
        "ConfigurationValid",
        view.invalid is None,
        view.invalid or Fact("Valid", "All fields and all objects that they name can be used."),
    )
    conditions.set("Degraded", *_degraded(view))
    conditions.set(
        "Paused",
        view.paused,
        Fact("PausedBySpec", "spec.paused is true: the operator changes nothing; set it to false to go on.")
        if view.paused
        else Fact("NotPaused", "The operator is at work."),
    )
    return SmtpRelayStatus(
        observed_generation=view.generation,
        conditions=tuple(conditions.made),
        replicas=view.replicas,
        ready_replicas=view.ready_replicas,
        selector=view.selector,
        endpoints=view.endpoints,
        users=view.users if view.users is not None else before.users,
        queued_messages=view.queued if view.queued is not None else before.queued_messages,
        configuration=ConfigurationStatus(revision=view.revision, pods_current=current, pods_total=len(view.pods)),
        dns_records=view.dns_records if view.dns_records is not None else before.dns_records,
    )


def _ready(view: RelayView) -> tuple[bool, Fact]:
    if view.deleting is not None:
        return False, view.deleting
    if view.ready_replicas > 0:
        return True, Fact("AcceptingMail", f"{view.ready_replicas} of {view.wanted_replicas} replicas accept mail.")
    if view.blocked is not None:
        return False, view.blocked
    if view.invalid is not None and not view.revision:
        return False, view.invalid
    if view.wanted_replicas == 0:
        return False, Fact("ScaledToZero", "spec.replicas is 0: nothing accepts mail; raise it.")
    return False, Fact("NoReplicaReady", f"None of {view.wanted_replicas} replicas accepts mail yet.")


def _reconciling(view: RelayView, current: int) -> tuple[bool, Fact]:
    if view.deleting is not None:
        return True, view.deleting
    if view.paused:
        return False, Fact("Paused", "spec.paused is true.")
    if view.blocked is not None or view.invalid is not None:
        return False, Fact("WaitingForChange", "See Stalled.")
    if not view.rolled_out or view.updated_replicas < view.wanted_replicas or view.replicas != view.wanted_replicas:
        return True, Fact(
            "RollingOut", f"{view.updated_replicas} of {view.wanted_replicas} replicas have the newest pod template."
        )
    if view.ready_replicas < view.wanted_replicas:
        return True, Fact("WaitingForReplicas", f"{view.ready_replicas} of {view.wanted_replicas} replicas are ready.")
    behind = [pod.name for pod in view.pods if pod.revision is not None and pod.revision != view.revision]
    if behind:
        return True, Fact(
            "ConfigurationRollingOut",
            f"{current} of {len(view.pods)} pods run configuration {view.revision}; not yet: {', '.join(behind)}.",
        )
    return False, Fact("UpToDate", "What is wanted is in force.")


def _degraded(view: RelayView) -> tuple[bool | None, Fact]:
    found = joined(_shortcomings(view))
    if found is not None:
        return True, found
    if view.invalid is not None:
        # Certificates, volumes and limits are looked at only together with a configuration that can be used.
        return None, Fact("NotFullyKnown", "Not all was looked at: the configuration cannot be used, see Stalled.")
    return False, Fact("AsExpected", "Everything that was looked at is in order.")


def _shortcomings(view: RelayView) -> list[Fact]:
    found = list(view.degraded)
    down: dict[str, UpstreamDown] = {}
    for pod in view.pods:
        down |= {upstream.name: upstream for upstream in pod.upstreams_down}
        if pod.unschedulable is not None:
            found.append(Fact("PodsUnschedulable", f"Pod {pod.name} finds no node: {pod.unschedulable}"))
        if pod.configuration_error:
            found.append(
                Fact(
                    "ConfigurationRefused",
                    f"Pod {pod.name} goes on with an older configuration: {pod.configuration_error}.",
                )
            )
    for name, upstream in sorted(down.items()):
        if upstream.refuses_login:
            words = f"Upstream {name} refuses the login in its credentialsSecretRef: {upstream.error}"
            found.append(Fact("UpstreamAuthenticationFailed", words))
        else:
            found.append(Fact("UpstreamUnreachable", f"Upstream {name} takes no mail: {upstream.error}"))
    stores = [pod.limit_store_error for pod in view.pods if pod.limit_store_error is not None]
    if stores:
        found.append(Fact("LimitStoreUnavailable", f"The store of spec.rateLimitStore cannot be used: {stores[0]}."))
    found += (
        # Without the age itself: the status would change with every look at the pod.
        Fact("QueueOld", f"Pod {pod.name} has mail that waits for more than {QUEUE_OLD // 60} minutes.")
        for pod in view.pods
        if pod.oldest_seconds > QUEUE_OLD
    )
    engines = dict(engine for pod in view.pods for engine in pod.engines_down)
    found += (
        Fact("EngineUnavailable", f"Engine {name} gives no verdict: {error}.")
        for name, error in sorted(engines.items())
    )
    return found


def joined(facts: Sequence[Fact]) -> Fact | None:
    """Several facts as one condition: the first one's reason, everyone's words."""
    if not facts:
        return None
    return Fact(facts[0].reason, " ".join(dict.fromkeys(fact.message for fact in facts)))


def user_status(
    before: SmtpUserStatus,
    *,
    generation: int,
    login: str,
    secret_name: str,
    refused: Fact | None,
    unready: Fact | None,
    suspended: bool,
    now: datetime.datetime,
    rotated_at: datetime.datetime | None = None,
    next_rotation: datetime.datetime | None = None,
) -> SmtpUserStatus:
    """The status of a SmtpUser: `refused` is why it gets no login, `unready` why it cannot send although it has one."""
    conditions = _Conditions(before.conditions, generation, now)
    conditions.set(
        "Accepted", refused is None, refused or Fact("Granted", "The relay grants this login and its senders.")
    )
    conditions.set(
        "Ready",
        refused is None and unready is None,
        refused or unready or Fact("CanSend", f"Secret {secret_name} holds all that is needed to send."),
    )
    return SmtpUserStatus(
        observed_generation=generation,
        conditions=tuple(conditions.made),
        login=login if refused is None else None,
        secret_name=secret_name if refused is None else None,
        usage=before.usage,
        last_limit=before.last_limit,
        last_refusal=before.last_refusal,
        suspended=suspended,
        rotated_at=timestamp(rotated_at) if rotated_at is not None else before.rotated_at,
        next_rotation=timestamp(next_rotation) if next_rotation is not None else None,
    )


def endpoints(host: str, ports: Iterable[tuple[str, int]]) -> tuple[Endpoint, ...]:
    """Where clients connect to, by listener."""
    shown = f"[{host}]" if ":" in host else host
    return tuple(Endpoint(name=name, address=f"{shown}:{port}") for name, port in ports)
