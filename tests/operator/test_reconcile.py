"""The rules of the reconcile that need a clock of their own: renewal, deadlines, waiting.

Everything else is proven on a real API server (test_operator_on_cluster). The one here keeps objects and counts writes.
"""

from __future__ import annotations

import base64
import copy
import dataclasses
import datetime
import itertools
from typing import Any, cast

import pytest

from mailsluice_operator.children.secrets import decoded
from mailsluice_operator.children.workload import PodSettings
from mailsluice_operator.cluster.client import ApiError, Cluster, InvalidError
from mailsluice_operator.cluster.objects import (
    DISRUPTION_BUDGET,
    OPTIONAL,
    POD,
    SECRET,
    SERVICE,
    SMTP_RELAY,
    SMTP_USER,
    STATEFUL_SET,
    Kind,
    Object,
    Reference,
    kind_of,
    reference_of,
)
from mailsluice_operator.cluster.store import Store
from mailsluice_operator.reconcile.context import Context, PodReport
from mailsluice_operator.reconcile.index import Index, relay_named_by
from mailsluice_operator.reconcile.reconciler import Reconciler
from mailsluice_relay.config import decode, hash_password

START = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
OUT = Reference(SMTP_RELAY, "mail", "out")


class KeptObjects:
    """As much of an API server as the reconcile asks for, without its rules."""

    def __init__(self) -> None:
        self.objects: dict[Reference, Object] = {}
        self.events: list[str] = []
        self.writes = 0
        self.refused: dict[Reference, ApiError] = {}
        self._version = 0

    def keep(self, body: Object) -> Object:
        where = reference_of(body)
        self._version += 1
        kept = {**self.objects.get(where, {}), **copy.deepcopy(body)}
        kept["metadata"] = {
            "uid": str(where),
            "generation": 1,
            **self.objects.get(where, {}).get("metadata", {}),
            **body["metadata"],
            "resourceVersion": str(self._version),
        }
        self.objects[where] = kept
        return kept

    async def get(self, where: Reference) -> Object | None:
        return self.objects.get(where)

    async def apply(self, body: Object) -> Object:
        if (refusal := self.refused.get(reference_of(body))) is not None:
            raise refusal
        self.writes += 1
        return self.keep(body)

    apply_status = apply

    async def annotate(self, where: Reference, annotations: dict[str, str]) -> Object:
        body = self.objects[where]
        body["metadata"].setdefault("annotations", {}).update(annotations)
        return await self.apply(body)

    async def set_finalizers(self, body: Object, finalizers: list[str]) -> Object:
        return await self.apply({**body, "metadata": {**body["metadata"], "finalizers": finalizers}})

    async def delete(self, where: Reference, uid: str) -> None:
        self.writes += 1
        assert self.objects.pop(where)["metadata"]["uid"] == uid

    async def post_event(self, about: Object, *, kind: str, reason: str, message: str, at: str) -> None:
        self.events.append(reason)


@dataclasses.dataclass
class World:
    api: KeptObjects
    context: Context
    reconciler: Reconciler
    seconds: float = 0.0
    reports: dict[str, PodReport] = dataclasses.field(default_factory=dict)

    def tell(self, body: Object) -> None:
        """Somebody wrote an object, and the watch told of it."""
        self.context.store.put(kind_of(body), self.api.keep(body))

    async def reconcile(self) -> float | None:
        return await self.reconciler(OUT)

    def found(self, kind: Kind, name: str) -> Object:
        return self.api.objects[Reference(kind, "mail", name)]

    def condition(self, kind: str) -> tuple[str, str]:
        conditions = self.found(SMTP_RELAY, "out")["status"]["conditions"]
        return next((item["status"], item["reason"]) for item in conditions if item["type"] == kind)


def new_world(*, namespaced: bool = False) -> World:
    api = KeptObjects()
    numbers = itertools.count(1)

    async def probe(address: str) -> PodReport | None:
        return world.reports.get(address)

    context = Context(
        cluster=cast(Cluster, api),
        store=Store("mailsluice.dev/relay"),
        index=Index(),
        settings=PodSettings("relay:1"),
        now=lambda: START + datetime.timedelta(seconds=world.seconds),
        monotonic=lambda: world.seconds,
        randomness=lambda length: next(numbers).to_bytes(length, "big"),
        probe=probe,
        enqueue=lambda _key, _delay: None,
        namespaced=namespaced,
    )
    world = World(api, context, Reconciler(context))
    return world


@pytest.fixture
def world() -> World:
    return new_world()


def relay(**spec: Any) -> Object:
    upstreams = [{"name": "p", "host": "smtp.provider.test", "credentialsSecretRef": {"name": "provider"}}]
    return {
        "apiVersion": "mailsluice.dev/v1alpha1",
        "kind": "SmtpRelay",
        "metadata": {"name": "out", "namespace": "mail"},
        "spec": {"upstreams": upstreams, **spec},
    }


def provider(encoded: str = "cGFzcw==") -> Object:
    metadata = {"name": "provider", "namespace": "mail", "labels": {"mailsluice.dev/watch": "true"}}
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": metadata,
        "data": {"username": "YQ==", "password": encoded},
    }


def running_pod(ordinal: int = 0) -> Object:
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": f"out-{ordinal}", "namespace": "mail", "labels": {"mailsluice.dev/relay": "out"}},
        "status": {"phase": "Running", "podIP": f"pod-{ordinal}", "conditions": [{"type": "Ready", "status": "True"}]},
    }


async def settle(world: World) -> None:
    world.tell(provider())
    world.tell(relay())
    await world.reconcile()
    await world.reconcile()


async def test_a_second_reconcile_writes_nothing(world: World) -> None:
    await settle(world)
    before = world.api.writes
    assert before > 0
    await world.reconcile()
    assert world.api.writes == before


async def test_the_server_certificate_is_renewed_in_time_without_a_new_pod(world: World) -> None:
    await settle(world)
    before = decoded(world.found(SECRET, "out-credentials"))
    template = world.found(STATEFUL_SET, "out")["spec"]["template"]
    revision = decode(decoded(world.found(SECRET, "out-config"))["config.json.gz"]).revision
    world.seconds = 59 * 86400
    await world.reconcile()
    assert decoded(world.found(SECRET, "out-credentials")) == before
    world.seconds = 61 * 86400
    await world.reconcile()
    after = decoded(world.found(SECRET, "out-credentials"))
    assert after["tls.crt"] != before["tls.crt"]
    assert after["ca.crt"] == before["ca.crt"]
    assert decode(decoded(world.found(SECRET, "out-config"))["config.json.gz"]).revision != revision
    assert world.found(STATEFUL_SET, "out")["spec"]["template"] == template


async def test_a_missing_secret_is_looked_for_less_and_less_often(world: World) -> None:
    world.tell(relay())
    assert [await world.reconcile() for _ in range(8)] == [1, 2, 4, 8, 15, 15, 15, 15]
    assert world.condition("ConfigurationValid") == ("False", "SecretNotFound")
    assert world.api.events == ["SecretNotFound"]
    world.tell(provider())
    await world.reconcile()
    assert world.condition("ConfigurationValid") == ("True", "Valid")


async def test_a_broken_secret_changes_nothing_and_the_last_good_children_are_kept(world: World) -> None:
    await settle(world)
    configuration = world.found(SECRET, "out-config")["data"]
    world.tell(provider(encoded=""))
    await world.reconcile()
    assert world.condition("ConfigurationValid") == ("False", "SecretInvalid")
    service = Reference(SERVICE, "mail", "out")
    del world.api.objects[service]
    world.context.store.discard(service)
    await world.reconcile()
    assert service in world.api.objects
    assert world.found(SECRET, "out-config")["data"] == configuration


async def test_the_last_good_children_are_those_with_the_newest_values(world: World) -> None:
    await settle(world)
    world.tell(provider(encoded="bmV3"))
    await world.reconcile()
    newest = world.found(SECRET, "out-credentials")["data"]
    world.tell(provider(encoded=""))
    credentials = Reference(SECRET, "mail", "out-credentials")
    del world.api.objects[credentials]
    world.context.store.discard(credentials)
    await world.reconcile()
    assert world.condition("ConfigurationValid") == ("False", "SecretInvalid")
    assert world.found(SECRET, "out-credentials")["data"] == newest


async def test_a_refused_child_holds_up_neither_the_others_nor_the_word_of_it(world: World) -> None:
    service = Reference(SERVICE, "mail", "out")
    world.api.refused[service] = InvalidError(str(service), 422, "422: spec.ports[0]: Invalid value")
    world.tell(provider())
    world.tell(relay())
    assert await world.reconcile() == 1
    assert world.condition("Stalled") == ("True", "ChildRefused")
    assert Reference(STATEFUL_SET, "mail", "out") in world.api.objects
    assert await world.reconcile() == 2  # less and less often
    assert world.api.events == ["ChildRefused"]
    world.tell(provider(encoded=""))  # the one does not hide the other
    await world.reconcile()
    assert world.condition("Stalled") == ("True", "SecretInvalid")
    assert world.condition("Degraded") == ("True", "ChildRefused")
    world.api.refused.clear()
    world.tell(provider())
    await world.reconcile()
    assert world.condition("Stalled") == ("False", "NotStalled")
    assert service in world.api.objects


async def test_a_refusal_that_passes_is_left_to_the_work_queue(world: World) -> None:
    service = Reference(SERVICE, "mail", "out")
    world.api.refused[service] = ApiError(str(service), 503, "503: later")
    world.tell(provider())
    world.tell(relay())
    with pytest.raises(ApiError, match="later"):
        await world.reconcile()


async def test_what_is_not_wanted_goes_only_when_all_that_is_wanted_is_there(world: World) -> None:
    await settle(world)
    budget = Reference(DISRUPTION_BUDGET, "mail", "out")
    world.tell({**world.found(SMTP_RELAY, "out"), **relay(disruptionBudget={})})
    await world.reconcile()
    assert budget in world.api.objects
    service = Reference(SERVICE, "mail", "out")
    world.api.refused[service] = ApiError(str(service), 403, "403: exceeded quota")
    world.tell({**world.found(SMTP_RELAY, "out"), **relay(service={"annotations": {"a": "b"}})})
    await world.reconcile()
    assert budget in world.api.objects
    world.api.refused.clear()
    await world.reconcile()
    assert budget not in world.api.objects


async def test_mail_left_after_the_deadline_is_told_and_the_relay_stays(world: World) -> None:
    await settle(world)
    world.tell(running_pod())
    world.reports["pod-0"] = PodReport("", draining=False, queued=4)
    await world.reconcile()
    body = world.found(SMTP_RELAY, "out")
    assert body["metadata"]["finalizers"] == ["mailsluice.dev/drain"]
    world.tell({**body, "metadata": {**body["metadata"], "deletionTimestamp": "2026-01-01T00:00:00Z"}})
    world.reports["pod-0"] = PodReport("r", draining=True, queued=4)
    world.seconds = 60
    await world.reconcile()
    assert world.api.events == []
    assert world.condition("Ready") == ("False", "Draining")
    world.seconds = 601  # drainFor is 10m by default
    for _ in range(3):
        await world.reconcile()
    assert world.api.events == ["QueueNotDrained"]
    assert world.found(SMTP_RELAY, "out")["metadata"]["finalizers"] == ["mailsluice.dev/drain"]
    world.reports["pod-0"] = PodReport("r", draining=True, queued=0)
    world.seconds = 610
    await world.reconcile()
    assert world.found(SMTP_RELAY, "out")["metadata"]["finalizers"] == []


async def test_a_pod_is_asked_twice_a_minute_and_its_count_written_no_more_often(world: World) -> None:
    await settle(world)
    revision = decode(decoded(world.found(SECRET, "out-config"))["config.json.gz"]).revision
    world.tell(running_pod())
    world.reports["pod-0"] = PodReport(revision, draining=False, queued=1)
    await world.reconcile()
    world.reports["pod-0"] = PodReport(revision, draining=False, queued=2)
    counts = []
    for second in (10, 20, 31):
        world.seconds = second
        await world.reconcile()
        counts.append(world.found(SMTP_RELAY, "out")["status"]["queuedMessages"])
    assert counts == [1, 1, 2]


async def test_a_running_pod_is_nudged_once_a_revision(world: World) -> None:
    await settle(world)
    world.tell(running_pod())
    await world.reconcile()
    first = world.found(POD, "out-0")["metadata"]["annotations"]["mailsluice.dev/revision"]
    before = world.api.writes
    await world.reconcile()
    assert world.api.writes == before
    world.tell(provider(encoded="b3RoZXI="))
    await world.reconcile()
    assert world.found(POD, "out-0")["metadata"]["annotations"]["mailsluice.dev/revision"] != first


async def test_with_a_role_alone_other_namespaces_cannot_be_granted() -> None:
    world = new_world(namespaced=True)
    world.tell(provider())
    grant = {"logins": ["*@a.test"], "allowedNamespaces": {"from": "All"}}
    world.tell(relay(authentication={"smtpUsers": grant}))
    await world.reconcile()
    assert world.condition("ConfigurationValid") == ("False", "ClusterScopeRequired")
    world.tell(relay(authentication={"smtpUsers": {**grant, "allowedNamespaces": {"from": "Same"}}}))
    await world.reconcile()
    assert world.condition("ConfigurationValid") == ("True", "Valid")


async def test_an_image_that_is_not_allowed_is_refused_and_the_relay_stays_as_it_was(world: World) -> None:
    await settle(world)
    template = world.found(STATEFUL_SET, "out")["spec"]["template"]
    world.tell(relay(image="somebody/else:1"))
    await world.reconcile()
    assert world.condition("ConfigurationValid") == ("False", "ImageNotAllowed")
    assert world.found(STATEFUL_SET, "out")["spec"]["template"] == template
    world.tell(relay(image="relay:1"))
    await world.reconcile()
    assert world.condition("ConfigurationValid") == ("True", "Valid")


def volume(requested: str, capacity: str | None = None, ordinal: int = 0) -> Object:
    labels = {"mailsluice.dev/relay": "out", "app.kubernetes.io/managed-by": "mailsluice"}
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": f"queue-out-{ordinal}", "namespace": "mail", "labels": labels},
        "spec": {"resources": {"requests": {"storage": requested}}},
        "status": {"capacity": {"storage": capacity}} if capacity is not None else {"phase": "Pending"},
    }


async def test_the_quota_follows_the_smallest_volume_that_exists_until_it_is_expanded(world: World) -> None:
    def quota() -> int | None:
        packed = decoded(world.found(SECRET, "out-config"))["config.json.gz"]
        return decode(packed).queue.maximum_bytes

    await settle(world)
    world.tell(volume("1Gi", "1Gi"))
    world.tell(relay(queue={"storage": {"size": "10Gi"}}))
    await world.reconcile()
    assert world.condition("Degraded") == ("True", "StorageNotResized")
    assert quota() == (1 << 30) * 9 // 10
    world.tell(volume("10Gi", "1Gi"))  # asked for, and not there yet
    await world.reconcile()
    assert world.condition("Degraded") == ("False", "AsExpected")
    assert quota() == (1 << 30) * 9 // 10
    world.tell(volume("10Gi", "10Gi"))
    await world.reconcile()
    assert quota() == (10 << 30) * 9 // 10
    assert world.found(STATEFUL_SET, "out")["spec"]["volumeClaimTemplates"][0]["spec"]["resources"] == {
        "requests": {"storage": "1Gi"}
    }


async def test_kinds_that_the_cluster_does_not_know_are_reported_and_the_rest_is_made(world: World) -> None:
    world.context.unserved = frozenset(OPTIONAL)
    world.tell(provider())
    world.tell(relay(monitoring={"podMonitor": True, "rules": True}))
    await world.reconcile()
    assert world.condition("Degraded") == ("True", "KindNotServed")
    assert Reference(STATEFUL_SET, "mail", "out") in world.api.objects
    assert not any(where.kind in OPTIONAL for where in world.api.objects)


NEWS = Reference(SMTP_USER, "mail", "news")
HOUR = 3600.0


def news(every: str = "720h", overlap: str = "24h") -> Object:
    rotation = {"every": every, "overlap": overlap}
    return {
        "apiVersion": "mailsluice.dev/v1alpha1",
        "kind": "SmtpUser",
        "metadata": {"name": "news", "namespace": "mail"},
        "spec": {"relayRef": {"name": "out"}, "login": "news@example.test", "rotation": rotation},
    }


async def settle_user(world: World) -> None:
    world.tell(provider())
    world.tell(relay(authentication={"smtpUsers": {"logins": ["*@example.test"]}}))
    world.tell(news())
    world.context.index.set_relay(NEWS, relay_named_by(news()))
    await world.reconcile()
    await world.reconciler(NEWS)
    await world.reconcile()


def password(world: World) -> str:
    return decoded(world.found(SECRET, "news-smtp"))["password"].decode()


def can_log_in(world: World, *passwords: str) -> list[bool]:
    """Whether the relay, as it is configured now, takes each of these passwords."""

    def fits(hashed: str, given: str) -> bool:
        salt = hashed.split("$")[3]
        return hashed == hash_password(given, base64.b64decode(salt + "=" * (-len(salt) % 4)))

    packed = decoded(world.found(SECRET, "out-config"))["config.json.gz"]
    (user,) = decode(packed).authentication.users
    return [any(fits(hashed, given) for hashed in user.hashes) for given in passwords]


async def test_a_user_is_told_why_its_secret_is_refused_and_gets_it_once_it_may_be(world: World) -> None:
    secret = Reference(SECRET, "mail", "news-smtp")
    world.api.refused[secret] = ApiError(str(secret), 403, "403: exceeded quota: tight")
    await settle_user(world)
    assert await world.reconciler(NEWS) == 30
    conditions = world.found(SMTP_USER, "news")["status"]["conditions"]
    (ready,) = [item for item in conditions if item["type"] == "Ready"]
    assert (ready["status"], ready["reason"]) == ("False", "ChildRefused")
    assert "exceeded quota: tight" in ready["message"]
    world.api.refused.clear()
    await world.reconciler(NEWS)
    await world.reconcile()
    assert can_log_in(world, password(world)) == [True]


async def test_a_rotated_password_is_taken_beside_the_former_one_until_the_overlap_ends(world: World) -> None:
    await settle_user(world)
    first = password(world)
    again = await world.reconciler(NEWS)
    assert again == pytest.approx(720 * HOUR, abs=2)
    status = world.found(SMTP_USER, "news")["status"]
    assert (status["rotatedAt"], status["nextRotation"]) == ("2026-01-01T00:00:00Z", "2026-01-31T00:00:00Z")

    world.seconds = 720 * HOUR + 1
    again = await world.reconciler(NEWS)
    assert again == pytest.approx(24 * HOUR, abs=2)
    await world.reconcile()
    second = password(world)
    assert second != first
    assert can_log_in(world, first, second, "another") == [True, True, False]
    before = world.api.writes
    await world.reconciler(NEWS)
    await world.reconcile()
    assert world.api.writes == before

    world.seconds = 744 * HOUR + 3
    await world.reconciler(NEWS)
    await world.reconcile()
    assert password(world) == second
    assert "former-password" not in decoded(world.found(SECRET, "news-smtp"))
    assert can_log_in(world, first, second) == [False, True]


async def test_no_password_is_changed_that_the_relay_would_not_learn_of(world: World) -> None:
    await settle_user(world)
    first = password(world)
    spec = world.found(SMTP_RELAY, "out")["spec"]
    world.tell({**relay(), "spec": {**spec, "paused": True}})
    world.seconds = 800 * HOUR
    assert await world.reconciler(NEWS) == 60
    assert password(world) == first
    world.tell({**relay(), "spec": spec})
    await world.reconcile()
    await world.reconciler(NEWS)
    assert password(world) != first


# --- limits of several replicas ---------------------------------------------------------------------------------------


async def test_with_a_store_the_limits_are_the_whole_relays(world: World) -> None:
    several = {"replicas": 3, "rateLimits": [{"name": "hour", "unit": "Messages", "limit": 10, "window": "1h"}]}
    world.tell(provider())
    world.tell(relay(**several))
    await world.reconcile()
    assert world.condition("Degraded") == ("True", "LimitsPerReplica")
    url = base64.b64encode(b"redis://valkey.mail.svc:6379/0").decode()
    world.tell({**provider(), "metadata": {"name": "valkey", "namespace": "mail"}, "data": {"url": url}})
    world.tell(relay(**several, rateLimitStore={"urlSecretRef": {"name": "valkey"}}))
    await world.reconcile()
    await world.reconcile()
    assert world.condition("Degraded")[0] == "False"
    assert decoded(world.found(SECRET, "out-credentials"))["rate-limit-store.url"].startswith(b"redis://valkey")
