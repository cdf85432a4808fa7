"""The rules of what is known of the cluster, and of asking it: newer wins, failures are tried again."""

from __future__ import annotations

import json
import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from mailsluice_operator.cluster.client import (
    ATTEMPTS,
    FIELD_MANAGER,
    ApiError,
    Cluster,
    ConflictError,
    InvalidError,
    NotFoundError,
    connect,
)
from mailsluice_operator.cluster.events import PERIOD, Recent
from mailsluice_operator.cluster.objects import NAMESPACE, SECRET, SMTP_RELAY, SMTP_USER, STATEFUL_SET, Kind, Reference
from mailsluice_operator.cluster.store import Store
from mailsluice_operator.reconcile.index import Index, relay_named_by

Object = dict[str, Any]
LABEL = "mailsluice.dev/relay"


def body(name: str, version: int, *, relay: str | None = None, owner: str | None = None, uid: str = "u") -> Object:
    metadata: Object = {"name": name, "namespace": "mail", "resourceVersion": str(version), "uid": uid}
    if relay is not None:
        metadata["labels"] = {LABEL: relay}
    if owner is not None:
        metadata["ownerReferences"] = [{"uid": owner, "kind": "SmtpRelay", "name": "out", "controller": True}]
    return {"apiVersion": "v1", "kind": "Secret", "metadata": metadata}


def where(name: str) -> Reference:
    return Reference(SECRET, "mail", name)


@pytest.mark.parametrize(
    ("status", "permanent"),
    [(400, True), (403, True), (413, True), (422, True)]
    + [(passing, False) for passing in (0, 401, 404, 408, 409, 429, 500, 503, 504)],
)
def test_what_a_person_has_to_change_is_told_from_what_passes(status: int, permanent: bool) -> None:
    assert ApiError("Service mail/out", status, "no").permanent is permanent


# --- The store --------------------------------------------------------------------------------------------------------


def test_an_older_or_the_same_state_is_no_news() -> None:
    store = Store(LABEL)
    assert store.put(SECRET, body("a", 5))
    assert not store.put(SECRET, body("a", 5))
    assert not store.put(SECRET, body("a", 4))
    assert store.put(SECRET, body("a", 10))
    assert store.get(where("a")) == body("a", 10)


def test_a_late_deletion_does_not_hide_what_was_made_since() -> None:
    store = Store(LABEL)
    store.put(SECRET, body("a", 20, uid="new"))
    assert not store.remove(SECRET, body("a", 15, uid="old"))
    assert store.get(where("a")) is not None
    assert store.remove(SECRET, body("a", 25, uid="new"))
    assert store.get(where("a")) is None


def test_a_listing_tells_what_is_gone_but_not_of_what_came_after_it() -> None:
    store = Store(LABEL)
    for name, version in (("gone", 5), ("kept", 6), ("after", 30)):
        store.put(SECRET, body(name, version))
    assert store.unlisted(SECRET, {where("kept"), where("new")}, listed_at=20) == [where("gone")]


def test_objects_are_found_by_label_and_by_owner_as_they_are_now() -> None:
    store = Store(LABEL)
    store.put(SECRET, body("a", 1, relay="out", owner="o1"))
    store.put(SECRET, body("b", 2, relay="other", owner="o1"))
    assert set(store.labelled("mail", "out")) == {where("a")}
    assert set(store.owned("o1")) == {where("a"), where("b")}
    store.put(SECRET, body("a", 3, relay="other"))
    assert set(store.labelled("mail", "out")) == set()
    assert set(store.labelled("mail", "other")) == {where("a"), where("b")}
    assert set(store.owned("o1")) == {where("b")}
    store.discard(where("b"))
    assert set(store.owned("o1")) == set()


def test_managed_fields_are_not_kept() -> None:
    store = Store(LABEL)
    full = body("a", 1)
    full["metadata"]["managedFields"] = [{"manager": "x"}]
    store.put(SECRET, full)
    assert store.get(where("a")) == body("a", 1)
    assert "managedFields" in full["metadata"]


def test_an_event_is_news_once_in_its_period() -> None:
    now = 0.0
    recent = Recent(lambda: now)
    assert recent.is_news(("uid", "reason", "message"))
    assert not recent.is_news(("uid", "reason", "message"))
    assert recent.is_news(("uid", "reason", "another"))
    now = PERIOD
    assert recent.is_news(("uid", "reason", "message"))


def test_the_index_tells_who_names_a_secret_and_which_nobody_names_any_more() -> None:
    index, one, two = Index(), Reference(SMTP_RELAY, "mail", "one"), Reference(SMTP_RELAY, "mail", "two")
    assert index.set_secrets(one, ["a", "b"]) == frozenset()
    index.set_secrets(two, ["b"])
    assert index.referrers(where("b")) == {one, two}
    assert index.set_secrets(one, ["c"]) == {where("a")}
    assert index.referrers(where("b")) == {two}
    assert index.set_secrets(two, []) == {where("b")}
    assert index.referrers(Reference(SECRET, "elsewhere", "c")) == frozenset()


def test_the_index_follows_a_user_from_relay_to_relay() -> None:
    index, user = Index(), Reference(SMTP_USER, "shop", "news")
    resource = {"metadata": {"name": "news", "namespace": "shop"}, "spec": {"relayRef": {"name": "out"}}}
    own = relay_named_by(resource)
    assert own == Reference(SMTP_RELAY, "shop", "out")
    index.set_relay(user, own)
    other = Reference(SMTP_RELAY, "mail", "out")
    index.set_relay(user, other)
    assert (index.users(own), index.users(other), index.relay_of(user)) == (frozenset(), {user}, other)
    index.set_relay(user, None)
    assert (index.users(other), index.relay_of(user)) == (frozenset(), None)


@pytest.mark.parametrize(
    ("kind", "path"),
    [
        (SECRET, "/api/v1/namespaces/mail/secrets/x"),
        (STATEFUL_SET, "/apis/apps/v1/namespaces/mail/statefulsets/x"),
        (NAMESPACE, "/api/v1/namespaces/x"),
    ],
)
def test_paths_need_no_discovery(kind: Kind, path: str) -> None:
    assert kind.path("mail", "x") == path


# --- Requests ---------------------------------------------------------------------------------------------------------

Answer = tuple[int, Object, dict[str, str]]


class FakeApiServer:
    """Answers with what is queued, and keeps what it was asked."""

    def __init__(self) -> None:
        self.answers: list[Answer] = []
        self.asked: list[web.Request] = []
        self.bodies: list[Any] = []
        self.breaks = 0
        """Connections to close instead of an answer."""

    def will(self, status: int, answer: Object | None = None, **headers: str) -> None:
        self.answers.append((status, answer or {"message": f"because {status}"}, headers))

    async def handle(self, request: web.Request) -> web.Response:
        if self.breaks and request.transport is not None:
            self.breaks -= 1
            request.transport.close()
            return web.Response()
        self.asked.append(request)
        text = await request.text()
        self.bodies.append(json.loads(text) if text else None)
        status, answer, headers = self.answers.pop(0)
        return web.json_response(answer, status=status, headers=headers)


class Pauses(list[float]):
    async def sleep(self, seconds: float) -> None:
        self.append(seconds)


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[tuple[FakeApiServer, str]]:
    fake = FakeApiServer()
    application = web.Application()
    application.router.add_route("*", "/{path:.*}", fake.handle)
    runner = web.AppRunner(application)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    kubeconfig = tmp_path / "kubeconfig"
    kubeconfig.write_text(
        json.dumps(
            {
                "current-context": "c",
                "clusters": [{"name": "c", "cluster": {"server": f"http://127.0.0.1:{port}"}}],
                "users": [{"name": "u", "user": {"token": "t"}}],
                "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
            }
        )
    )
    yield fake, str(kubeconfig)
    await runner.cleanup()


@pytest.fixture
async def cluster(server: tuple[FakeApiServer, str]) -> AsyncIterator[tuple[Cluster, FakeApiServer, list[Any], Pauses]]:
    fake, kubeconfig = server
    seen: list[Any] = []
    pauses = Pauses()
    api = await connect(kubeconfig, "mailsluice-operator/1")
    made = Cluster(api, observe=lambda verb, code: seen.append((verb, code)), rng=random.Random(1), sleep=pauses.sleep)
    yield made, fake, seen, pauses
    await made.close()


async def test_apply_is_server_side_forced_and_under_one_field_manager(cluster: Any) -> None:
    made, fake, seen, _ = cluster
    fake.will(200, body("a", 1))
    assert await made.apply(body("a", 0)) == body("a", 1)
    (request,) = fake.asked
    assert (request.method, request.path) == ("PATCH", "/api/v1/namespaces/mail/secrets/a")
    assert dict(request.query) == {"fieldManager": FIELD_MANAGER, "force": "true"}
    assert request.content_type == "application/apply-patch+yaml"
    assert request.headers["User-Agent"] == "mailsluice-operator/1"
    assert request.headers["Authorization"] == "Bearer t"
    assert seen == [("apply", "200")]


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
async def test_a_server_that_has_trouble_is_asked_again(cluster: Any, status: int) -> None:
    made, fake, seen, pauses = cluster
    fake.will(status)
    fake.will(200, body("a", 1))
    assert await made.get(where("a")) == body("a", 1)
    assert seen == [("get", str(status)), ("get", "200")]
    assert len(pauses) == 1


async def test_a_server_that_says_when_is_asked_then(cluster: Any) -> None:
    made, fake, _, pauses = cluster
    fake.will(429, None, **{"Retry-After": "3"})
    fake.will(200, body("a", 1))
    await made.get(where("a"))
    assert pauses == [3.0]


async def test_after_the_last_attempt_the_failure_names_object_and_cause(cluster: Any) -> None:
    made, fake, _, pauses = cluster
    for _ in range(ATTEMPTS):
        fake.will(503)
    with pytest.raises(ApiError, match="Secret mail/a: 503: because 503") as failure:
        await made.apply(body("a", 0))
    assert failure.value.status == 503
    assert pauses == sorted(pauses)


@pytest.mark.parametrize(
    ("status", "error"),
    [(400, InvalidError), (403, ApiError), (404, NotFoundError), (409, ConflictError), (422, InvalidError)],
)
async def test_a_refusal_is_not_repeated(cluster: Any, status: int, error: type[ApiError]) -> None:
    made, fake, seen, pauses = cluster
    fake.will(status)
    with pytest.raises(error):
        await made.apply(body("a", 0))
    assert (len(seen), pauses) == (1, [])


async def test_a_connection_that_breaks_is_tried_again(cluster: Any) -> None:
    made, fake, seen, _ = cluster
    fake.breaks = 2  # aiohttp itself repeats a request once when the connection was a kept one
    fake.will(200, body("a", 1))
    assert await made.get(where("a")) == body("a", 1)
    assert (seen[0], seen[-1]) == (("get", "error"), ("get", "200"))


async def test_what_is_not_there_is_none(cluster: Any) -> None:
    made, fake, _, _ = cluster
    fake.will(404)
    assert await made.get(where("a")) is None


async def test_a_listing_follows_its_pages_and_names_the_kinds(cluster: Any) -> None:
    made, fake, _, _ = cluster
    one = {"metadata": {"name": "a", "namespace": "mail", "resourceVersion": "3"}}
    fake.will(200, {"items": [one], "metadata": {"continue": "more", "resourceVersion": "9"}})
    fake.will(200, {"items": None, "metadata": {"resourceVersion": "9"}})
    pages = [page async for page in made.pages(SECRET, None, "a=b")]
    assert pages == [([{"apiVersion": "v1", "kind": "Secret", **one}], 9), ([], 9)]
    assert [request.query.get("continue") for request in fake.asked] == [None, "more"]
    assert fake.asked[0].query["labelSelector"] == "a=b"


async def test_only_the_very_object_is_deleted(cluster: Any) -> None:
    made, fake, _, _ = cluster
    fake.will(200, {})
    await made.delete(where("a"), "uid-1")
    assert fake.bodies[0]["preconditions"] == {"uid": "uid-1"}
