"""The rules of the intake: which keys a change concerns, and when a watch is taken for dead."""

from __future__ import annotations

import dataclasses
import datetime
from typing import Any

import pytest

from mailsluice_operator.children.workload import PodSettings
from mailsluice_operator.cluster.objects import (
    CONFIG_MAP,
    NAMESPACE,
    POD,
    SECRET,
    SMTP_RELAY,
    SMTP_USER,
    Kind,
    Reference,
)
from mailsluice_operator.cluster.store import Store
from mailsluice_operator.handlers import SILENCE, Intake, selectors, watched
from mailsluice_operator.reconcile.context import Context
from mailsluice_operator.reconcile.index import Index

Object = dict[str, Any]

OUT = Reference(SMTP_RELAY, "mail", "out")
NEWS = Reference(SMTP_USER, "shop", "news")
RIVAL = Reference(SMTP_USER, "shop", "rival")


@dataclasses.dataclass
class World:
    intake: Intake
    enqueued: list[Reference]
    index: Index
    now: float = 0.0
    version: int = 100

    def tell(self, kind: Kind, body: Object, event: str | None = "MODIFIED") -> set[Reference]:
        """The keys that an event, newer than all before it, puts into the queue."""
        self.version += 1
        body["metadata"]["resourceVersion"] = str(self.version)
        self.enqueued.clear()
        self.intake.event(kind, event, {"apiVersion": kind.api_version, "kind": kind.name, **body})
        return set(self.enqueued)


@pytest.fixture
def world() -> World:
    enqueued: list[Reference] = []
    index = Index()

    async def no_pods(_: str) -> None:
        raise AssertionError("nothing is reconciled here")

    context = Context(
        cluster=None,  # type: ignore[arg-type]  # the intake asks nothing of it
        store=Store("mailsluice.dev/relay"),
        index=index,
        settings=PodSettings("relay:1"),
        now=lambda: datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC),
        monotonic=lambda: made.now,
        randomness=bytes,
        probe=no_pods,
        enqueue=lambda key, _delay: enqueued.append(key),
    )
    made = World(Intake(context, lambda _: None, lambda: made.now), enqueued, index)
    return made


def relay(name: str = "out", users: str = "users", **status: Any) -> Object:
    return {
        "metadata": {"name": name, "namespace": "mail", "uid": name, "generation": 1},
        "spec": {
            "authentication": {"users": [{"secretRef": {"name": users}}]},
            "upstreams": [{"name": "p", "host": "smtp.provider.test"}],
        },
        "status": status,
    }


def user(name: str = "news", relay_name: str = "out") -> Object:
    return {
        "metadata": {"name": name, "namespace": "shop", "uid": name, "generation": 1},
        "spec": {"relayRef": {"name": relay_name, "namespace": "mail"}, "login": "a@shop.test"},
    }


def plain(
    name: str, namespace: str, labels: dict[str, str] | None = None, owner: tuple[str, str] | None = None
) -> Object:
    metadata: Object = {"name": name, "namespace": namespace, "uid": name, "labels": labels or {}}
    if owner is not None:
        kind, owner_name = owner
        metadata["ownerReferences"] = [{"kind": kind, "name": owner_name, "uid": "o", "controller": True}]
    return {"metadata": metadata}


def test_a_child_concerns_its_relay_by_label_or_by_owner(world: World) -> None:
    assert world.tell(CONFIG_MAP, plain("a", "mail", {"mailsluice.dev/relay": "out"})) == {OUT}
    assert world.tell(CONFIG_MAP, plain("b", "mail", owner=("SmtpRelay", "out"))) == {OUT}
    assert world.tell(POD, plain("out-0", "mail", {"mailsluice.dev/relay": "out"}, ("StatefulSet", "out"))) == {OUT}


def test_a_child_whose_label_was_taken_off_still_concerns_its_relay(world: World) -> None:
    world.tell(CONFIG_MAP, plain("a", "mail", {"mailsluice.dev/relay": "out"}))
    assert world.tell(CONFIG_MAP, plain("a", "mail")) == {OUT}
    world.tell(CONFIG_MAP, plain("a", "mail", {"mailsluice.dev/relay": "out"}))
    assert world.tell(CONFIG_MAP, plain("a", "mail", {"mailsluice.dev/relay": "out"}), "DELETED") == {OUT}


def test_a_secret_concerns_the_relays_that_name_it_and_itself_when_none_does(world: World) -> None:
    world.tell(SMTP_RELAY, relay())
    assert world.tell(SECRET, plain("users", "mail", {"mailsluice.dev/watch": "true"})) == {OUT}
    unused = Reference(SECRET, "mail", "unused")
    assert world.tell(SECRET, plain("unused", "mail", {"mailsluice.dev/watch": "true"})) == {unused}
    assert world.tell(SECRET, plain("users", "elsewhere")) == {Reference(SECRET, "elsewhere", "users")}


def test_a_relay_that_names_another_secret_gives_the_old_one_free(world: World) -> None:
    world.tell(SMTP_RELAY, relay())
    assert world.tell(SMTP_RELAY, relay(users="others")) == {OUT, Reference(SECRET, "mail", "users")}
    assert world.tell(SMTP_RELAY, relay(users="others"), "DELETED") == {OUT, Reference(SECRET, "mail", "others")}


def test_a_user_concerns_its_relay_and_its_rivals_also_when_it_goes(world: World) -> None:
    assert world.tell(SMTP_USER, user()) == {NEWS, OUT}
    assert world.tell(SMTP_USER, user("rival")) == {NEWS, RIVAL, OUT}
    assert world.tell(SMTP_USER, user("rival", "other")) == {NEWS, RIVAL, OUT, Reference(SMTP_RELAY, "mail", "other")}
    world.tell(SMTP_USER, user("rival"))
    assert world.tell(SMTP_USER, user(), "DELETED") == {NEWS, RIVAL, OUT}


def test_a_users_secret_concerns_the_user_and_its_relay(world: World) -> None:
    world.tell(SMTP_USER, user())
    labels = {"app.kubernetes.io/managed-by": "mailsluice", "mailsluice.dev/user": "news"}
    assert world.tell(SECRET, plain("news-smtp", "shop", labels)) == {NEWS, OUT}


def test_a_relays_counts_do_not_concern_its_users_but_its_readiness_does(world: World) -> None:
    world.tell(SMTP_USER, user())
    ready = {"type": "Ready", "status": "True", "message": "yes"}
    assert world.tell(SMTP_RELAY, relay(conditions=[ready])) == {OUT, NEWS}
    assert world.tell(SMTP_RELAY, relay(conditions=[ready], queuedMessages=5)) == {OUT}
    assert world.tell(SMTP_RELAY, relay(conditions=[{**ready, "status": "False"}])) == {OUT, NEWS}


def test_a_namespaces_labels_concern_its_users_and_their_relays(world: World) -> None:
    world.tell(SMTP_USER, user())
    namespace = {"metadata": {"name": "shop", "labels": {"a": "1"}}}
    assert world.tell(NAMESPACE, namespace) == {NEWS, OUT}
    assert (
        world.tell(NAMESPACE, {"metadata": {"name": "shop", "labels": {"a": "1"}, "annotations": {"b": "2"}}}) == set()
    )
    assert world.tell(NAMESPACE, {"metadata": {"name": "shop", "labels": {}}}) == {NEWS, OUT}


def test_what_is_known_already_concerns_nobody(world: World) -> None:
    body = plain("a", "mail", {"mailsluice.dev/relay": "out"})
    world.tell(CONFIG_MAP, body)
    world.enqueued.clear()
    world.intake.event(CONFIG_MAP, None, body)
    assert world.intake.page(CONFIG_MAP, [body]) == {Reference(CONFIG_MAP, "mail", "a")}
    assert world.enqueued == []


def test_what_a_listing_lacks_concerns_its_relay(world: World) -> None:
    world.tell(CONFIG_MAP, plain("a", "mail", {"mailsluice.dev/relay": "out"}))
    world.enqueued.clear()
    world.intake.listed(CONFIG_MAP, set(), world.version)
    assert world.enqueued == [OUT]


def test_a_watch_is_dead_when_it_keeps_to_itself_what_a_listing_told(world: World) -> None:
    body = plain("a", "mail")
    body["metadata"]["resourceVersion"] = "50"
    world.intake.page(CONFIG_MAP, [body])
    assert world.intake.silent_watch() is None
    world.now = SILENCE + 1
    assert "configmaps" in (world.intake.silent_watch() or "")
    world.intake.event(CONFIG_MAP, "ADDED", body)
    assert world.intake.silent_watch() is None


def test_a_watch_with_nothing_to_tell_is_alive(world: World) -> None:
    world.tell(CONFIG_MAP, plain("a", "mail"))
    world.now = 10 * SILENCE
    assert world.intake.silent_watch() is None


def test_only_labelled_secrets_and_pods_are_watched_and_namespaces_not_with_a_role() -> None:
    assert selectors()[SECRET] == "mailsluice.dev/watch=true"
    assert selectors()[POD] == "mailsluice.dev/relay"
    assert NAMESPACE in watched(namespaced=False)
    assert NAMESPACE not in watched(namespaced=True)
