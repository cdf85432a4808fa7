"""One SmtpRelay: references are read, children are made, the status is written; deletion waits for the queue."""

from __future__ import annotations

import asyncio
import datetime
import hashlib
import logging
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Final

import msgspec

from mailsluice_operator import credentials, desired
from mailsluice_operator.children import configuration
from mailsluice_operator.children.compare import satisfied
from mailsluice_operator.children.dns_records import dns_records
from mailsluice_operator.children.facts import Fact
from mailsluice_operator.children.metadata import (
    DISCARD_QUEUE_ANNOTATION,
    DRAIN_FINALIZER,
    REVISION_ANNOTATION,
    Owner,
    authority_name,
    config_name,
    selector,
    timestamp,
)
from mailsluice_operator.children.secrets import CONFIG_KEY, config_secret, decoded
from mailsluice_operator.cluster.objects import (
    POD_MONITOR,
    PROMETHEUS_RULE,
    SECRET,
    SERVICE,
    SMTP_RELAY,
    Object,
    Reference,
    annotations_of,
    kind_of,
)
from mailsluice_operator.reconcile import secrets, users
from mailsluice_operator.reconcile.context import Context, Key
from mailsluice_operator.reconcile.pods import FRESH, FRESH_SILENCE, FRESH_WHILE_CHANGING, Pods, drained, is_ready
from mailsluice_operator.reconcile.workload import Workload, claim_of, volumes
from mailsluice_operator.reconcile.writing import (
    ChildRefusedError,
    NameTakenError,
    delete_unwanted,
    ensure_child,
    write_status,
)
from mailsluice_operator.resource.models import Autoscaling, SmtpRelay, relay_from
from mailsluice_operator.resource.quantities import seconds
from mailsluice_operator.resource.references import secret_uses
from mailsluice_operator.resource.status import DNSRecord, SmtpRelayStatus
from mailsluice_operator.status import PodView, RelayView, endpoints, joined, relay_status
from mailsluice_relay.config import ConfigurationError, QueueMode, decode, encode

log = logging.getLogger(__name__)

FIRST_WAIT: Final = 1.0
LONGEST_WAIT: Final = 60.0
"""Seconds after which is looked again for what cannot be watched: a foreign object of a child's name, since it has no
label of ours, and what made the API server refuse a child. Each time twice as long."""
LONGEST_WAIT_FOR_SECRET: Final = 15.0
"""The same for a Secret that was not there: someone is about to make it, and to look costs one small request."""

EXPIRING: Final = datetime.timedelta(days=14)
"""Before the end of a certificate that a person has to renew."""


@dataclass
class _Memory:
    """What one relay's next reconcile has to know of the last one. Lost with the process, and then made anew."""

    good: bytes | None = None
    """The children of the last configuration that could be used, packed: they stay while a newer one cannot."""
    good_digest: bytes = b""
    """Of what `good` holds, values of Secrets included; it stays within this process."""
    delay: float = FIRST_WAIT
    learnt: bool = False
    queued: int | None = None
    queued_at: float = 0.0

    def remember(self, children: list[Object]) -> None:
        encoded = msgspec.json.encode(children)
        digest = hashlib.sha256(encoded).digest()
        if digest != self.good_digest:
            self.good_digest = digest
            self.good = zlib.compress(encoded)

    def wait(self, longest: float = LONGEST_WAIT) -> float:
        """In how many seconds to look again for what no watch tells of."""
        delay, self.delay = min(self.delay, longest), min(self.delay * 2, longest)
        return delay

    def recall(self) -> list[Object]:
        return msgspec.json.decode(zlib.decompress(self.good), type=list[Object]) if self.good is not None else []


@dataclass(frozen=True)
class _Built:
    """What a usable configuration comes to."""

    contents: desired.Contents
    authority: Mapping[str, bytes] | None
    logins: int
    degraded: tuple[Fact, ...]
    dns_records: tuple[DNSRecord, ...]


class RelayReconciler:
    """Reconciles relays; keeps in memory only what can be found out again."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._pods = Pods(context)
        self._hashes = users.Hashes()
        self._memory: dict[Key, _Memory] = {}

    async def reconcile(self, key: Key) -> float | None:
        """Bring one relay to what is wanted; returns in how many seconds to look again."""
        body = self._context.store.get(key)
        if body is None:
            self._memory.pop(key, None)
            self._pods.forget(key)
            self._context.own_logins.pop(key, None)
            return None
        memory = self._memory.setdefault(key, _Memory())
        try:
            relay = relay_from(body)
        except msgspec.ValidationError as error:
            invalid = Fact("Invalid", f"{error}; correct it, or upgrade the operator if the field is newer than it.")
            view = RelayView(body["metadata"]["generation"], invalid=invalid)
            await self._report(body, SmtpRelayStatus(), view)
            return None
        if "deletionTimestamp" in body["metadata"]:
            return await self._delete(key, body, relay)
        if self._context.namespace_goes(key.namespace):
            return None  # it takes nothing new, and the relay is deleted next
        if relay.spec.paused:
            view = replace(await self._view(key, relay, self._revision_in_force(key), changing=False), paused=True)
            await self._report(body, relay.status, view)
            return self._look_again(key, view)
        return await self._converge(key, body, relay, memory)

    # --- A relay that is wanted -------------------------------------------------------------------------------------

    async def _converge(self, key: Key, body: Object, relay: SmtpRelay, memory: _Memory) -> float | None:
        workload = Workload.of(self._context, key)
        if relay.spec.autoscaling is not None and relay.spec.replicas is None:
            body = await self._seed_replicas(body, relay.spec.autoscaling, workload)
            relay = relay_from(body)
        effective, wanted = _way_to(relay, workload)
        in_force = self._revision_in_force(key)
        step = await self._step(key, effective, workload, wanted)
        built = await self._build(key, effective, step)
        if isinstance(built, Fact):
            missing = built.reason == "SecretNotFound"
            if missing:
                again = f"It is looked for again within {LONGEST_WAIT_FOR_SECRET:.0f} s."
                built = Fact(built.reason, f"{built.message} {again}")
            refused = await self._keep_last_good(memory)
            view = replace(
                await self._view(key, relay, in_force, changing=False), invalid=built, degraded=tuple(refused)
            )
            await self._report(body, relay.status, view)
            if missing:
                return memory.wait(LONGEST_WAIT_FOR_SECRET)
            return memory.wait() if refused else self._look_again(key, view)
        children = desired.relay_children(
            effective,
            built.contents,
            authority=built.authority,
            replicas=step.replicas,
            claims=workload.claims,
            settings=self._context.settings,
        )
        children = [child for child in children if kind_of(child) not in self._context.unserved]
        memory.remember(children)
        blocked = await self._apply(body, children)
        revision = self._revision_in_force(key)  # an older one while the newest configuration is refused
        await self._pods.nudge(key, revision)
        body = await self._hold_for_drain(key, body)
        view = replace(
            await self._view(key, relay, revision, changing=step.waiting is not None),
            blocked=blocked,
            users=built.logins,
            dns_records=built.dns_records,
            wanted_replicas=wanted,
            degraded=tuple(fact for fact in (step.waiting, *built.degraded) if fact is not None),
        )
        await self._report(body, relay.status, view)
        if blocked is not None:
            return memory.wait()
        memory.delay = FIRST_WAIT
        return self._look_again(key, view)

    async def _seed_replicas(self, body: Object, scaling: Autoscaling, workload: Workload) -> Object:
        """The scale subresource fails while spec.replicas is not there, and so would the autoscaler: it begins here."""
        replicas = max(scaling.min_replicas, min(workload.replicas, scaling.max_replicas))
        body = await self._context.cluster.set_replicas(body, replicas)
        self._context.store.put(SMTP_RELAY, body)
        return body

    async def _apply(self, body: Object, children: list[Object]) -> Fact | None:
        """Make the children what they should be; returns why that could not be done.

        What comes after a name that is taken is not made; what comes after a refusal is. Nothing goes before all that
        is wanted is there: the one may take the other's place.
        """
        refused: list[Fact] = []
        for child in children:
            try:
                await ensure_child(self._context, child)
            except ChildRefusedError as error:
                refused.append(error.fact)
            except NameTakenError as taken:
                return joined([taken.fact, *refused])
        if not refused:
            await delete_unwanted(self._context, body, children)
        return joined(refused)

    async def _keep_last_good(self, memory: _Memory) -> list[Fact]:
        """While the newest configuration cannot be used, the children of the one before it are still looked after.

        Returns what of them the API server refuses.
        """
        refused: list[Fact] = []
        for child in memory.recall():
            try:
                await ensure_child(self._context, child)
            except ChildRefusedError as error:
                refused.append(error.fact)
            except NameTakenError:  # the condition already says what a person has to do first
                break
        return refused

    async def _step(self, key: Key, relay: SmtpRelay, workload: Workload, wanted: int) -> desired.Step:
        if relay.spec.queue.mode is QueueMode.PASS_THROUGH or wanted >= workload.replicas:
            return desired.Step(wanted)
        views = await self._pods.views(key, self._revision_in_force(key), changing=True)
        left = await self._left(key, views, range(workload.replicas - 1, workload.replicas))
        return desired.next_step(wanted, workload.replicas, left, key.name)

    async def _left(self, key: Key, views: tuple[PodView, ...], ordinals: range) -> dict[int, int | None]:
        """How many messages each of these ordinals still has, where that can be known.

        One that does not run and has no volume has none: nothing is accepted before it is on the volume.
        """
        left = drained(views, key.name)
        running = {view.name for view in views if view.running}
        for ordinal in ordinals:
            if left.get(ordinal) is None and f"{key.name}-{ordinal}" not in running:
                claim = await self._context.cluster.get(claim_of(key, ordinal))
                if claim is None or claim["status"].get("phase") == "Pending":
                    left[ordinal] = 0
        return left

    async def _build(self, key: Key, relay: SmtpRelay, step: desired.Step) -> _Built | Fact:
        """The configuration and the certificates; or why there can be none, which names object and field."""
        if self._context.namespaced and (beyond := _needs_cluster_scope(relay)) is not None:
            return beyond
        if (refused := desired.image_refused(relay, self._context.settings)) is not None:
            return refused
        read: dict[str, configuration.Secret] = {}
        for use in secret_uses(relay):
            found = await secrets.read(self._context, Reference(SECRET, key.namespace, use.name))
            if found is not None:
                read[use.name] = secrets.value_of(found)
        self._learn_hashes(key)
        self._set_own_logins(key, configuration.own_logins(relay, read))
        granted = users.granted(self._context, key, relay)
        material = self._own_material(key, relay) if relay.spec.tls.secret_ref is None else None
        persistent = relay.spec.queue.mode is QueueMode.PERSISTENT
        exist = volumes(self._context, key, step.replicas) if persistent else []

        def build() -> configuration.Built:
            return configuration.build(
                relay,
                secrets=read,
                users=[
                    configuration.smtp_user(user, relay, self._hashes.of(passwords, secret))
                    for user, secret, passwords in granted
                ],
                server=material.server_files() if material is not None else {},
                replicas=step.replicas,
                volume=min((volume.capacity for volume in exist), default=None),
                drain_from_ordinal=step.drain_from_ordinal,
                hash_password=self._hashes,
            )

        try:
            made = await asyncio.to_thread(build)  # hashing a new password takes a while
            packed = encode(made.configuration)
        except configuration.Unusable as unusable:
            return Fact(unusable.facts[0].reason, " ".join(fact.message for fact in unusable.facts))
        except ConfigurationError as error:
            return Fact("ConfigurationTooLarge", f"spec.authentication: {error}.")
        return _Built(
            desired.Contents(packed, made.configuration.revision, made.files, made.configuration.credentials_revision),
            authority=material.secret() if material is not None else None,
            logins=len(made.configuration.authentication.users),
            degraded=tuple(self._shortcomings(relay, made, exist)),
            dns_records=dns_records(relay, made),
        )

    def _shortcomings(self, relay: SmtpRelay, made: configuration.Built, exist: list[desired.Volume]) -> Iterator[Fact]:
        """What does not keep the relay from working, but wants a person's attention."""
        yield from made.degraded
        if (fact := desired.not_resized(relay, exist)) is not None:
            yield fact
        monitoring = relay.spec.monitoring
        for field, asked, kind in (
            ("podMonitor", monitoring.pod_monitor, POD_MONITOR),
            ("rules", monitoring.rules, PROMETHEUS_RULE),
        ):
            if asked and kind in self._context.unserved:
                yield Fact(
                    "KindNotServed",
                    f"spec.monitoring.{field}: this cluster has no {kind.name} ({kind.api_version}); install the "
                    "Prometheus operator, or set it to false.",
                )
        given = relay.spec.tls.secret_ref
        expiry = credentials.expiry(made.files.get("tls.crt", b"")) if given is not None else None
        if given is not None and expiry is not None and expiry - self._context.now() < EXPIRING:
            yield Fact(
                "CertificateExpiring",
                f"spec.tls.secretRef: the certificate in Secret {relay.metadata.namespace}/{given.name} is valid "
                f"until {timestamp(expiry)}; renew it.",
            )
        replicas = _wanted_replicas(relay)
        if replicas > 1 and relay.spec.rate_limits and relay.spec.rate_limit_store is None:
            yield Fact(
                "LimitsPerReplica",
                f"spec.rateLimits hold for each of {replicas} replicas; with spec.rateLimitStore for all.",
            )

    def _set_own_logins(self, key: Key, logins: frozenset[str]) -> None:
        """A login that the relay's owner gives to someone is taken from a SmtpUser that had it, and the reverse."""
        if self._context.own_logins.get(key, frozenset()) != logins:
            self._context.own_logins[key] = logins
            for user in self._context.index.users(key):
                self._context.enqueue(user, 0.0)

    def _own_material(self, key: Key, relay: SmtpRelay) -> credentials.Material:
        """The certificates of the operator's own authority for this relay."""
        where = Reference(SECRET, key.namespace, authority_name(key.name))
        held = self._context.store.get(where)
        names = credentials.service_names(configuration.hostname(relay), key.name, key.namespace)
        return credentials.ensure(decoded(held) if held is not None else {}, names, self._context.now())

    def _learn_hashes(self, key: Key) -> None:
        """From the configuration in force, if it is as an earlier run wrote it."""
        found = self._context.store.get(Reference(SECRET, key.namespace, config_name(key.name)))
        owner = self._context.store.get(key)
        if found is None or owner is None or self._memory[key].learnt:
            return
        self._memory[key].learnt = True
        packed = decoded(found).get(CONFIG_KEY, b"")
        metadata = owner["metadata"]
        written = config_secret(
            Owner(SMTP_RELAY.name, key.namespace, key.name, metadata["uid"]),
            packed,
            annotations_of(found).get(REVISION_ANNOTATION, ""),
        )
        if not satisfied(written, found):
            return
        try:
            self._hashes.learn(decode(packed).authentication.users)
        except ConfigurationError:  # of another release: its hashes are made anew
            return

    # --- A relay that goes --------------------------------------------------------------------------------------------

    async def _hold_for_drain(self, key: Key, body: Object) -> Object:
        """The finalizer, from when a replica was first ready: what never took mail need not be drained."""
        finalizers = list(body["metadata"].get("finalizers") or ())
        persistent = Workload.of(self._context, key).is_persistent
        held = DRAIN_FINALIZER in finalizers
        if persistent and not held and any(is_ready(pod) for pod in self._pods.of(key)):
            body = await self._context.cluster.set_finalizers(body, [*finalizers, DRAIN_FINALIZER])
        elif held and not persistent:
            body = await self._context.cluster.set_finalizers(
                body, [name for name in finalizers if name != DRAIN_FINALIZER]
            )
        else:
            return body
        self._context.store.put(SMTP_RELAY, body)
        return body

    async def _delete(self, key: Key, body: Object, relay: SmtpRelay) -> float | None:
        """Let the relay go once its queues are empty, or nobody wants them."""
        finalizers = list(body["metadata"].get("finalizers") or ())
        if DRAIN_FINALIZER not in finalizers:
            return None
        workload = Workload.of(self._context, key)
        waiting = None if self._gives_up_queue(key, body, workload) else await self._drain(key, relay, workload)
        if waiting is None:
            kept = [name for name in finalizers if name != DRAIN_FINALIZER]
            self._context.store.put(SMTP_RELAY, await self._context.cluster.set_finalizers(body, kept))
            return None
        deadline = _moment(body["metadata"]["deletionTimestamp"]) + datetime.timedelta(
            seconds=seconds(relay.spec.queue.on_delete.drain_for)
        )
        if self._context.now() >= deadline:
            await self._context.tell(
                body, Fact("QueueNotDrained", f"{waiting.message} To give it up: set {DISCARD_QUEUE_ANNOTATION}.")
            )
        view = await self._view(key, relay, self._revision_in_force(key), changing=True)
        await self._report(body, relay.status, replace(view, deleting=waiting))
        return FRESH_WHILE_CHANGING

    def _gives_up_queue(self, key: Key, body: Object, workload: Workload) -> bool:
        """Nothing is to be waited for: it was said so, or the namespace or the pods go (foreground deletion)."""
        return (
            annotations_of(body).get(DISCARD_QUEUE_ANNOTATION) == "true"
            or self._context.namespace_goes(key.namespace)
            or not workload.is_persistent
            or workload.going
            or workload.replicas == 0
        )

    async def _drain(self, key: Key, relay: SmtpRelay, workload: Workload) -> Fact | None:
        """Tell every pod to empty its queue; returns what is still waited for."""
        refused = await self._apply_draining(key, relay)
        views = await self._pods.views(key, self._revision_in_force(key), changing=True)
        left = await self._left(key, views, range(workload.replicas))
        unknown = [ordinal for ordinal in range(workload.replicas) if left.get(ordinal) is None]
        known = sum(count for count in left.values() if count is not None)
        if not unknown and known == 0:
            return None
        words = f"{known} messages are still queued" if known or not unknown else "the queues are not known to be empty"
        silent = f" (not heard of: {', '.join(f'{key.name}-{ordinal}' for ordinal in unknown)})" if unknown else ""
        why = f" {refused.message}" if refused is not None else ""
        return Fact("Draining", f"The resource goes when its queues are empty; {words}{silent}.{why}")

    async def _apply_draining(self, key: Key, relay: SmtpRelay) -> Fact | None:
        """The configuration in force, with nothing changed but that every pod drains; returns why it is refused.

        It is not built anew: what the resource names may be going as well.
        """
        found = self._context.store.get(Reference(SECRET, key.namespace, config_name(key.name)))
        if found is None:
            return None
        try:
            in_force = decode(decoded(found).get(CONFIG_KEY, b""))
        except ConfigurationError as error:
            log.warning("%s: the configuration in force cannot be read, so pods are not told to drain: %s", key, error)
            return None
        if in_force.drain_from_ordinal != 0:
            revision = f"{in_force.revision}-drain"
            draining = msgspec.structs.replace(in_force, drain_from_ordinal=0, revision=revision)
            try:
                await ensure_child(self._context, config_secret(desired.owner_of(relay), encode(draining), revision))
            except ChildRefusedError as error:
                return error.fact
        await self._pods.nudge(key, self._revision_in_force(key))
        return None

    # --- What is seen, and said --------------------------------------------------------------------------------------

    def _revision_in_force(self, key: Key) -> str:
        """The revision in the configuration Secret that pods mount; empty when there is none."""
        found = self._context.store.get(Reference(SECRET, key.namespace, config_name(key.name)))
        return annotations_of(found).get(REVISION_ANNOTATION, "") if found is not None else ""

    async def _view(self, key: Key, relay: SmtpRelay, revision: str, *, changing: bool) -> RelayView:
        workload = Workload.of(self._context, key)
        pods = await self._pods.views(key, revision, changing=changing)
        return RelayView(
            generation=relay.metadata.generation,
            wanted_replicas=workload.replicas,
            replicas=workload.count("replicas"),
            ready_replicas=workload.count("readyReplicas"),
            updated_replicas=workload.count("updatedReplicas"),
            rolled_out=workload.seen_by_controller,
            revision=revision,
            pods=pods,
            endpoints=endpoints(
                self._host(key, relay), [(listener.name, listener.port) for listener in relay.spec.listeners]
            ),
            selector=",".join(f"{name}={value}" for name, value in selector(key.name).items()),
            queued=self._queued(key, pods),
        )

    def _host(self, key: Key, relay: SmtpRelay) -> str:
        """The load balancer's address once it has one, else the Service's name."""
        service = self._context.store.get(Reference(SERVICE, key.namespace, key.name))
        ingress = ((service or {}).get("status") or {}).get("loadBalancer", {}).get("ingress") or ()
        for entry in ingress:
            host: str = entry.get("hostname") or entry.get("ip") or ""
            if host:
                return host
        return desired.service_host(relay)

    def _queued(self, key: Key, pods: tuple[PodView, ...]) -> int | None:
        """The messages in all queues; a new number at most every half minute, whatever else is written."""
        memory = self._memory[key]
        now = self._context.monotonic()
        if any(pod.queued is not None for pod in pods) and (memory.queued is None or now - memory.queued_at >= FRESH):
            memory.queued = sum(pod.queued or 0 for pod in pods)
            memory.queued_at = now
        return memory.queued

    async def _report(self, body: Object, before: SmtpRelayStatus, view: RelayView) -> None:
        for fact in (view.blocked, view.invalid, *view.degraded):
            if fact is not None:
                await self._context.tell(body, fact)
        await write_status(self._context, body, relay_status(before, view, self._context.now()))

    def _look_again(self, key: Key, view: RelayView) -> float | None:
        """Pods are asked from time to time; everything else comes as an event."""
        if not self._pods.of(key):
            return None
        behind = any(pod.revision is not None and pod.revision != view.revision for pod in view.pods)
        waiting = any(fact.reason == "QueueNotDrained" for fact in view.degraded)
        if behind or waiting:
            return FRESH_WHILE_CHANGING
        return FRESH_SILENCE if any(pod.running and pod.revision is None for pod in view.pods) else FRESH


def _way_to(relay: SmtpRelay, workload: Workload) -> tuple[SmtpRelay, int]:
    """The relay to make now, and its replicas.

    From Persistent to PassThrough the queues must be empty before the StatefulSet, which knows their volumes, goes:
    until then the relay stays as it is and is drained to no replica.
    """
    if relay.spec.queue.mode is QueueMode.PASS_THROUGH and workload.is_persistent and workload.replicas > 0:
        queue = msgspec.structs.replace(relay.spec.queue, mode=QueueMode.PERSISTENT)
        return msgspec.structs.replace(relay, spec=msgspec.structs.replace(relay.spec, queue=queue)), 0
    return relay, _wanted_replicas(relay)


def _wanted_replicas(relay: SmtpRelay) -> int:
    """An autoscaler writes spec.replicas by the scale subresource; its bounds hold also before it does."""
    scaling = relay.spec.autoscaling
    if scaling is None:
        return relay.spec.replicas if relay.spec.replicas is not None else 1
    asked = relay.spec.replicas if relay.spec.replicas is not None else scaling.min_replicas
    return max(scaling.min_replicas, min(asked, scaling.max_replicas))


def _needs_cluster_scope(relay: SmtpRelay) -> Fact | None:
    """What an operator with a Role cannot give: it reads neither Namespaces nor other namespaces' SmtpUsers."""
    users = relay.spec.authentication.smtp_users
    if users is not None and users.allowed_namespaces.from_ != "Same":
        return Fact(
            "ClusterScopeRequired",
            f"spec.authentication.smtpUsers.allowedNamespaces.from: {users.allowed_namespaces.from_} needs an operator "
            "that watches the whole cluster; use Same, or start the operator without --namespace.",
        )
    return None


def _moment(text: str) -> datetime.datetime:
    return datetime.datetime.fromisoformat(text)
