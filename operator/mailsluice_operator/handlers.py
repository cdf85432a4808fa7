"""Kopf glue: watch events go into the store, and the keys of what they concern into the work queue. Nothing else.

Kopf only watches here (`on.event`): it writes no annotations and no finalizers, and an event whose handler failed would
be lost, so nothing in this file can fail for a reason outside this process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Set
from typing import Any, Final

import kopf

from mailsluice_operator.children.metadata import (
    MANAGED_BY,
    MANAGED_BY_LABEL,
    RELAY_LABEL,
    USER_LABEL,
    WATCH_LABEL,
)
from mailsluice_operator.cluster.objects import (
    CHILDREN,
    CLAIM,
    NAMESPACE,
    POD,
    SECRET,
    SMTP_RELAY,
    SMTP_USER,
    Kind,
    Object,
    Reference,
    controller_of,
    labels_of,
    reference_of,
)
from mailsluice_operator.cluster.store import resource_version
from mailsluice_operator.reconcile.context import Context, Key
from mailsluice_operator.reconcile.index import relay_named_by, secrets_named_by

SILENCE: Final = 180.0
"""Seconds after which a watch that has not told what a listing did is taken for dead."""

EXIT_TIMEOUT: Final = 25.0
"""Seconds in which Kopf must have stopped; below the pod's grace period."""


def selectors() -> Mapping[Kind, str | None]:
    """What is watched of each kind: the API server sends nothing else, whatever else the cluster holds."""
    ours = f"{MANAGED_BY_LABEL}={MANAGED_BY}"
    return {
        SMTP_RELAY: None,
        SMTP_USER: None,
        **dict.fromkeys(CHILDREN, ours),
        SECRET: f"{WATCH_LABEL}=true",
        CLAIM: ours,
        POD: RELAY_LABEL,
        NAMESPACE: None,
    }


def watched(*, namespaced: bool, unserved: Set[Kind] = frozenset()) -> list[Kind]:
    """Namespaces cannot be watched with a Role, nor what the cluster does not know."""
    return [kind for kind in selectors() if kind not in unserved and (kind is not NAMESPACE or not namespaced)]


class Intake:
    """Takes in what the watches and listings tell."""

    def __init__(self, context: Context, saw: Callable[[Kind], None], monotonic: Callable[[], float]) -> None:
        """`saw` is told of each event, for the age of the watch."""
        self._context = context
        self._saw = saw
        self._monotonic = monotonic
        self._overdue: dict[Reference, tuple[int, float]] = {}
        """What a listing told before the watch did: the resourceVersion to wait for, and since when."""

    def event(self, kind: Kind, event_type: str | None, body: Object) -> None:
        """One event of a watch; type None is an object of the first listing."""
        self._saw(kind)
        where = reference_of(body, kind)
        awaited = self._overdue.get(where)
        if awaited is not None and resource_version(body) >= awaited[0]:
            del self._overdue[where]
        before = self._context.store.get(where)
        gone = event_type == "DELETED"
        changed = self._context.store.remove(kind, body) if gone else self._context.store.put(kind, body)
        if changed:
            self._concern(where, before, None if gone else body)

    def page(self, kind: Kind, items: list[Object]) -> set[Reference]:
        """A page of a listing; only what the watches have not told yet concerns anyone. Returns what was on it."""
        listed: set[Reference] = set()
        for body in items:
            where = reference_of(body, kind)
            listed.add(where)
            before = self._context.store.get(where)
            if self._context.store.put(kind, body):
                self._overdue[where] = resource_version(body), self._monotonic()
                self._concern(where, before, body)
        return listed

    def listed(self, kind: Kind, listed: Set[Reference], listed_at: int) -> None:
        """The end of a listing: what is known but was not on it is gone."""
        for where in self._context.store.unlisted(kind, listed, listed_at):
            before = self._context.store.get(where)
            self._context.store.discard(where)
            self._concern(where, before, None)

    def silent_watch(self) -> str | None:
        """Which watch keeps to itself what the API server has told us otherwise; None while all speak.

        While the API server does not answer there is no listing, and so nothing to blame the watch for.
        """
        now = self._monotonic()
        for where, (_, since) in self._overdue.items():
            if now - since > SILENCE:
                return f"the watch of {where.kind.plural} has not told of {where} for {now - since:.0f} s"
        return None

    def _concern(self, where: Reference, before: Object | None, after: Object | None) -> None:
        self._note_references(where, after)
        for key in set(self._keys(where, before, after)):
            self._context.enqueue(key, 0.0)

    def _note_references(self, where: Reference, after: Object | None) -> None:
        index = self._context.index
        if where.kind is SMTP_RELAY:
            for released in index.set_secrets(where, secrets_named_by(after) if after is not None else ()):
                self._context.enqueue(released, 0.0)
        elif where.kind is SMTP_USER:
            former = index.relay_of(where)
            index.set_relay(where, relay_named_by(after) if after is not None else None)
            if former is not None:  # the relay that a user left has a login too many, and a rival may get it
                for key in (former, *index.users(former)):
                    self._context.enqueue(key, 0.0)

    def _keys(self, where: Reference, before: Object | None, after: Object | None) -> Iterator[Key]:
        index = self._context.index
        if where.kind is SMTP_RELAY:
            yield where
            if before is None or after is None or _matters_to_users(before) != _matters_to_users(after):
                yield from index.users(where)
        elif where.kind is SMTP_USER:
            yield from self._user_and_rivals(where)
        elif where.kind is NAMESPACE:
            if before is None or after is None or _matters_of_namespace(before) != _matters_of_namespace(after):
                yield from self._all_in(where.name)
        else:
            for body in (before, after):
                if body is not None:
                    yield from self._belongs_to(where, body)
            if where.kind is SECRET:
                yield from index.referrers(where)
                if after is not None and MANAGED_BY_LABEL not in labels_of(after) and not index.referrers(where):
                    yield where

    def _user_and_rivals(self, user: Reference) -> Iterator[Key]:
        """Another user of the same relay may get a login, or lose it, by this one's change."""
        yield user
        relay = self._context.index.relay_of(user)
        if relay is not None:
            yield relay
            yield from self._context.index.users(relay)

    def _all_in(self, namespace: str) -> Iterator[Key]:
        for body in self._context.store.all(SMTP_USER):
            if body["metadata"]["namespace"] == namespace:
                yield from self._user_and_rivals(reference_of(body, SMTP_USER))
        for body in self._context.store.all(SMTP_RELAY):
            if body["metadata"]["namespace"] == namespace:
                yield reference_of(body, SMTP_RELAY)

    def _belongs_to(self, where: Reference, body: Object) -> Iterator[Key]:
        """By label and by owner: either may have been edited away."""
        labels = labels_of(body)
        if RELAY_LABEL in labels:
            yield Reference(SMTP_RELAY, where.namespace, labels[RELAY_LABEL])
        owner = controller_of(body)
        if owner is not None and owner["kind"] == SMTP_RELAY.name:
            yield Reference(SMTP_RELAY, where.namespace, owner["name"])
        user = labels.get(USER_LABEL)
        if owner is not None and owner["kind"] == SMTP_USER.name:
            user = owner["name"]
        if user is not None:
            key = Reference(SMTP_USER, where.namespace, user)
            yield key
            relay = self._context.index.relay_of(key)
            if relay is not None:
                yield relay


def _matters_to_users(relay: Object) -> object:
    """What of a relay a user's Secret and conditions follow from; its counts change all the time."""
    conditions = (relay.get("status") or {}).get("conditions") or ()
    ready = [(item["status"], item["message"]) for item in conditions if item["type"] == "Ready"]
    return relay["metadata"]["generation"], "deletionTimestamp" in relay["metadata"], ready


def _matters_of_namespace(namespace: Object) -> object:
    return labels_of(namespace), "deletionTimestamp" in namespace["metadata"]


def register(registry: kopf.OperatorRegistry, intake: Intake, kinds: list[Kind]) -> None:
    """Have Kopf watch the kinds and hand every event to the intake."""
    for kind in kinds:
        _register_kind(registry, intake, kind)


def _register_kind(registry: kopf.OperatorRegistry, intake: Intake, kind: Kind) -> None:
    group, _, version = kind.api_version.rpartition("/")

    async def handle(event: Any, **_: Any) -> None:
        intake.event(kind, event["type"], {"apiVersion": kind.api_version, "kind": kind.name, **event["object"]})

    kopf.on.event(group, version, kind.plural, registry=registry, id=f"on-{kind.plural}")(handle)


def settings(kinds: list[Kind]) -> kopf.OperatorSettings:
    """Kopf as a watcher alone."""
    made = kopf.OperatorSettings()
    made.posting.enabled = False
    made.posting.loggers = False
    made.peering.standalone = True
    # Needs rights on CustomResourceDefinitions; ours are there before the operator starts, or it waits for them.
    made.scanning.disabled = True
    made.watching.connect_timeout = 30.0
    # A stream that a load balancer has silently dropped is noticed (kopf#585, #957); the server ends it in any case.
    made.watching.inactivity_timeout = 70.0
    made.watching.server_timeout = 600  # an integer: the API server parses it as one
    made.watching.chunk_size = 100  # the last page of a listing stays in memory for as long as Kopf watches
    # Kopf keeps a task, with the object, for each object that it hears of; a moment later nothing of it is needed. With
    # Kopf's 5 s a start over 300 relays took 155 MB, with this 113 (82 without any).
    made.queueing.idle_timeout = 0.1
    made.networking.request_timeout = 60.0
    made.networking.enforce_retry_after = True
    made.process.ultimate_exiting_timeout = EXIT_TIMEOUT
    for kind, selector in selectors().items():
        if selector is not None and kind in kinds:
            group, _, version = kind.api_version.rpartition("/")
            made.watching.label_selectors[group, version, kind.plural] = selector
    return made
