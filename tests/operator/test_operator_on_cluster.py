"""What the operator does on a real API server, with exactly the rights that deploy/ gives it."""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Callable
from typing import Any

import pytest

from mailsluice_relay.config import Configuration, decode, hash_password
from testcluster.kubectl import Kubectl

pytestmark = [pytest.mark.apiserver, pytest.mark.usefixtures("operator")]

Object = dict[str, Any]
Eventually = Callable[..., Any]

CHILDREN = (
    "secret/out-config",
    "secret/out-credentials",
    "secret/out-ca",
    "configmap/out-ca",
    "serviceaccount/out",
    "service/out",
    "service/out-pods",
    "poddisruptionbudget/out",
    "networkpolicy/out",
    "podmonitor/out",
    "prometheusrule/out",
    "statefulset/out",
)


def relay(name: str = "out", **spec: Any) -> Object:
    return {
        "apiVersion": "mailsluice.dev/v1alpha1",
        "kind": "SmtpRelay",
        "metadata": {"name": name},
        "spec": {
            "hostname": "mail.example.test",
            "authentication": {"users": [{"secretRef": {"name": "users"}}]},
            "senders": {"allowedDomains": ["example.test"]},
            "upstreams": [
                {"name": "provider", "host": "smtp.provider.test", "credentialsSecretRef": {"name": "provider"}}
            ],
            "disruptionBudget": {"maxUnavailable": 1},
            "networkPolicy": {"enabled": True, "from": [{"namespaceSelector": {}, "podSelector": {}}]},
            "monitoring": {"podMonitor": True, "rules": True, "labels": {"release": "prometheus"}},
            **spec,
        },
    }


def user(name: str, relay_namespace: str, login: str, **spec: Any) -> Object:
    reference = {"name": "out", "namespace": relay_namespace}
    return {
        "apiVersion": "mailsluice.dev/v1alpha1",
        "kind": "SmtpUser",
        "metadata": {"name": name},
        "spec": {"relayRef": reference, "login": login, **spec},
    }


def condition(kubectl: Kubectl, kind: str, resource: str = "smtprelay/out") -> tuple[str, str, str]:
    """Status, reason and message of a condition about the newest generation."""
    found = kubectl.get(*resource.split("/"))
    assert found.get("status", {}).get("observedGeneration") == found["metadata"]["generation"]
    (item,) = [item for item in found["status"]["conditions"] if item["type"] == kind]
    return item["status"], item["reason"], item["message"]


def is_true(kubectl: Kubectl, kind: str, resource: str = "smtprelay/out") -> bool:
    return condition(kubectl, kind, resource)[0] == "True"


def get(kubectl: Kubectl, resource: str) -> Object:
    return kubectl.get(*resource.split("/"))


def exists(kubectl: Kubectl, resource: str) -> bool:
    return kubectl.attempt("get", resource).returncode == 0


def configuration(kubectl: Kubectl) -> Configuration:
    return decode(base64.b64decode(get(kubectl, "secret/out-config")["data"]["config.json.gz"]))


def secret_value(kubectl: Kubectl, name: str, key: str) -> str:
    return base64.b64decode(get(kubectl, f"secret/{name}")["data"][key]).decode()


def events(kubectl: Kubectl, reason: str) -> list[str]:
    return [event["message"] for event in kubectl.list("events") if event["reason"] == reason]


def settle(mail: Kubectl, eventually: Eventually) -> Kubectl:
    mail.apply(relay())
    eventually(lambda: is_true(mail, "ConfigurationValid") and exists(mail, "statefulset/out"))
    eventually(lambda: get(mail, "smtprelay/out").get("status", {}).get("replicas") == 1)
    return mail


@pytest.fixture
def settled(mail: Kubectl, eventually: Eventually) -> Kubectl:
    """A relay `out` whose children are all there."""
    return settle(mail, eventually)


@pytest.fixture(scope="module")
def repaired(platform: Any, eventually: Eventually) -> Kubectl:
    """One such relay for all tests that leave it as it was."""
    kubectl: Kubectl = platform.kubectl.within("repaired")
    platform.kubectl("create", "namespace", "repaired")
    platform.fill(kubectl)
    return settle(kubectl, eventually)


def test_a_relay_gets_all_its_children_owned_and_labelled(settled: Kubectl) -> None:
    owner = get(settled, "smtprelay/out")["metadata"]["uid"]
    for child in CHILDREN:
        metadata = get(settled, child)["metadata"]
        assert [(o["uid"], o["controller"]) for o in metadata["ownerReferences"]] == [(owner, True)], child
        assert metadata["labels"]["app.kubernetes.io/managed-by"] == "mailsluice", child
        assert metadata["labels"]["mailsluice.dev/relay"] == "out", child
    assert get(settled, "smtprelay/out")["status"]["endpoints"][0]["address"].endswith(".svc:25")
    claims = settled.list("persistentvolumeclaims")
    assert [claim["metadata"].get("ownerReferences") for claim in claims] == [None]


def test_pods_hold_no_api_token_and_meet_the_restricted_standard(make_namespace: Any, eventually: Eventually) -> None:
    restricted = make_namespace(**{"pod-security.kubernetes.io/enforce": "restricted"})
    restricted.apply(relay(authentication={}, upstreams=[{"name": "provider", "host": "smtp.provider.test"}]))
    (pod,) = eventually(lambda: restricted.list("pods"))
    assert pod["spec"]["automountServiceAccountToken"] is False
    assert [v for v in pod["spec"]["volumes"] if "projected" in v or "hostPath" in v] == []


@pytest.mark.parametrize("child", CHILDREN)
def test_a_deleted_child_is_back_within_two_seconds(
    repaired: Kubectl, child: str, within_two_seconds: Callable[..., float]
) -> None:
    before = get(repaired, child)["metadata"]["uid"]
    repaired("delete", child, "--wait=false")
    within_two_seconds(lambda: get(repaired, child)["metadata"]["uid"] != before)


EDITS = {
    "secret/out-config": {"data": {"config.json.gz": base64.b64encode(b"tampered").decode()}},
    "secret/out-credentials": {"data": {"tls.key": None, "revision": "AAAA"}},
    "secret/out-ca": {"metadata": {"labels": {"mailsluice.dev/relay": "other"}}},
    "configmap/out-ca": {"data": {"ca.crt": "nothing"}},
    "serviceaccount/out": {"automountServiceAccountToken": True},
    "service/out": {"spec": {"ports": [{"name": "smtp", "port": 25, "targetPort": 26}]}},
    "service/out-pods": {"metadata": {"labels": {"app.kubernetes.io/managed-by": None}}},
    "poddisruptionbudget/out": {"spec": {"maxUnavailable": 0}},
    "networkpolicy/out": {"spec": {"ingress": [{}]}},
    "podmonitor/out": {"spec": {"podMetricsEndpoints": []}},
    "prometheusrule/out": {"spec": {"groups": []}},
    "statefulset/out": {"spec": {"replicas": 4, "template": {"spec": {"serviceAccountName": "default"}}}},
}


@pytest.mark.parametrize("child", CHILDREN)
def test_an_edited_child_is_repaired_within_two_seconds(
    repaired: Kubectl, child: str, within_two_seconds: Callable[..., float]
) -> None:
    def content() -> Object:
        found = get(repaired, child)
        metadata = {key: found["metadata"].get(key) for key in ("labels", "annotations", "ownerReferences")}
        return {**{key: found[key] for key in found if key not in ("metadata", "status")}, "metadata": metadata}

    before = content()
    version = get(repaired, child)["metadata"]["resourceVersion"]
    repaired("patch", child, "--type=merge", "-p", json.dumps(EDITS[child]))
    assert get(repaired, child)["metadata"]["resourceVersion"] != version
    within_two_seconds(lambda: content() == before)


@pytest.mark.parametrize(
    ("service", "edit"),
    [
        ("service/out", {"op": "replace", "path": "/spec/ports/2/port", "value": 1587}),
        ("service/out-pods", {"op": "replace", "path": "/spec/ports/0/port", "value": 1587}),
        ("service/out", {"op": "replace", "path": "/spec/ports/0/protocol", "value": "UDP"}),
        ("service/out", {"op": "remove", "path": "/spec/ports/1"}),
        ("service/out", {"op": "add", "path": "/spec/ports/-", "value": {"name": "more", "port": 80}}),
    ],
)
def test_a_port_edited_by_hand_is_repaired_within_two_seconds(
    repaired: Kubectl, service: str, edit: Object, within_two_seconds: Callable[..., float]
) -> None:
    before = get(repaired, service)["spec"]
    repaired("patch", service, "--type=json", "-p", json.dumps([edit]))
    within_two_seconds(lambda: get(repaired, service)["spec"] == before)
    assert not is_true(repaired, "Stalled")


def test_a_reconcile_with_nothing_to_do_writes_nothing(
    repaired: Kubectl, operator: Any, eventually: Eventually
) -> None:
    eventually(lambda: operator.value("mailsluice_operator_work_queue_depth") == 0)
    before = {child: get(repaired, child)["metadata"]["resourceVersion"] for child in CHILDREN}
    writes = operator.writes()
    reconciles = operator.value("mailsluice_operator_reconciles_total", kind="SmtpRelay")
    for number in range(10):
        repaired("annotate", "smtprelay/out", f"example.test/poke={number}", "--overwrite")
        count = reconciles + number + 1
        eventually(
            lambda count=count: operator.value("mailsluice_operator_reconciles_total", kind="SmtpRelay") >= count
        )
    assert operator.writes() == writes
    assert {child: get(repaired, child)["metadata"]["resourceVersion"] for child in CHILDREN} == before


def test_a_missing_secret_is_named_told_once_and_taken_up_when_it_comes(mail: Kubectl, eventually: Eventually) -> None:
    mail.apply(relay(upstreams=[{"name": "p", "host": "smtp.provider.test", "credentialsSecretRef": {"name": "late"}}]))
    eventually(lambda: condition(mail, "ConfigurationValid")[:2] == ("False", "SecretNotFound"))
    message = condition(mail, "ConfigurationValid")[2]
    assert "spec.upstreams[0].credentialsSecretRef" in message
    assert f"Secret {mail.namespace}/late" in message
    assert "looked for again within 15 s" in message
    assert condition(mail, "Degraded")[:2] == ("Unknown", "NotFullyKnown")
    assert is_true(mail, "Stalled")
    assert not is_true(mail, "Ready")
    assert not any(exists(mail, child) for child in CHILDREN)  # never half applied
    mail("annotate", "smtprelay/out", "example.test/poke=1")
    mail("create", "secret", "generic", "late", "--from-literal=username=a", "--from-literal=password=b")
    eventually(lambda: is_true(mail, "ConfigurationValid") and exists(mail, "statefulset/out"), 20)
    assert len(events(mail, "SecretNotFound")) == 1
    assert not is_true(mail, "Stalled")


def test_a_secret_that_breaks_is_named_and_the_last_good_configuration_stays(
    settled: Kubectl, eventually: Eventually, within_two_seconds: Callable[..., float]
) -> None:
    before = get(settled, "secret/out-config")["data"]
    settled("patch", "secret/users", "--type=json", "-p", '[{"op": "remove", "path": "/data/htpasswd"}]')
    eventually(lambda: condition(settled, "ConfigurationValid")[:2] == ("False", "SecretInvalid"))
    message = condition(settled, "ConfigurationValid")[2]
    assert "spec.authentication.users[0].secretRef" in message
    assert "htpasswd" in message
    assert get(settled, "secret/out-config")["data"] == before
    settled("delete", "service/out", "--wait=false")  # it is still looked after
    within_two_seconds(lambda: exists(settled, "service/out"))
    settled("patch", "secret/users", "-p", json.dumps({"stringData": {"htpasswd": ""}}))
    eventually(lambda: is_true(settled, "ConfigurationValid"))
    assert configuration(settled).authentication.users == ()


def test_a_changed_secret_reaches_the_configuration_and_leaves_the_pods_alone(
    settled: Kubectl, eventually: Eventually
) -> None:
    generation = get(settled, "statefulset/out")["metadata"]["generation"]
    before = configuration(settled)
    settled("patch", "secret/provider", "-p", json.dumps({"stringData": {"password": "changed"}}))
    eventually(lambda: secret_value(settled, "out-credentials", "upstream-provider.password") == "changed")
    eventually(lambda: configuration(settled).credentials_revision != before.credentials_revision)
    assert secret_value(settled, "out-credentials", "revision") == configuration(settled).credentials_revision
    assert (
        "changed"
        not in gzip.decompress(base64.b64decode(get(settled, "secret/out-config")["data"]["config.json.gz"])).decode()
    )
    assert get(settled, "statefulset/out")["metadata"]["generation"] == generation


def test_a_named_secret_is_labelled_and_unlabelled_when_no_relay_names_it(
    settled: Kubectl, eventually: Eventually
) -> None:
    def watched() -> bool:
        return "mailsluice.dev/watch" in get(settled, "secret/provider")["metadata"].get("labels", {})

    assert watched()
    settled.apply(relay("second"))
    eventually(lambda: is_true(settled, "ConfigurationValid", "smtprelay/second"))
    without = [{"name": "provider", "host": "smtp.provider.test"}]
    settled.apply(relay(upstreams=without))
    eventually(lambda: configuration(settled).upstreams[0].credentials is None)
    assert watched()  # the second relay still names it
    settled.apply(relay("second", upstreams=without))
    eventually(lambda: not watched())
    assert secret_value(settled, "provider", "password") == "provider-secret"


def test_children_that_are_not_wanted_any_more_go(settled: Kubectl, eventually: Eventually) -> None:
    optional = {"poddisruptionbudget/out", "networkpolicy/out", "podmonitor/out", "prometheusrule/out"}
    assert {child for child in CHILDREN if exists(settled, child)} == set(CHILDREN)
    changed = relay()
    for field in ("disruptionBudget", "networkPolicy", "monitoring"):
        del changed["spec"][field]
    settled.apply(changed)
    eventually(lambda: not any(exists(settled, child) for child in optional))
    assert exists(settled, "statefulset/out")


def test_an_autoscaler_finds_the_relays_scale_and_goes_when_it_is_not_wanted(
    mail: Kubectl, operator: Any, eventually: Eventually
) -> None:
    scaling = {"minReplicas": 2, "maxReplicas": 5, "queuedMessagesPerReplica": 2000, "cpuUtilization": 70}
    mail.apply(relay(autoscaling=scaling))
    eventually(lambda: exists(mail, "horizontalpodautoscaler/out"))
    eventually(lambda: get(mail, "statefulset/out")["spec"]["replicas"] == 2)

    def finds_it() -> bool:
        conditions = get(mail, "horizontalpodautoscaler/out")["status"].get("conditions", ())
        return ("AbleToScale", "True") in [(item["type"], item["status"]) for item in conditions]

    eventually(finds_it, 40)
    # As the autoscaler does; whoever applies the manifest again takes nothing back.
    mail("scale", "smtprelay/out", "--replicas=4")
    eventually(lambda: get(mail, "statefulset/out")["spec"]["replicas"] == 4)
    mail.apply(relay(autoscaling={**scaling, "maxReplicas": 6}))
    eventually(lambda: get(mail, "horizontalpodautoscaler/out")["spec"]["maxReplicas"] == 6)
    assert get(mail, "statefulset/out")["spec"]["replicas"] == 4

    def quiet() -> bool:
        """A reconcile that writes nothing, though the API server shows 2000 as 2k."""
        writes = operator.writes()
        count = operator.value("mailsluice_operator_reconciles_total", kind="SmtpRelay")
        mail("annotate", "smtprelay/out", f"example.test/poke={count}", "--overwrite")
        eventually(lambda: operator.value("mailsluice_operator_reconciles_total", kind="SmtpRelay") > count)
        return bool(operator.writes() == writes)

    eventually(quiet)
    mail.apply(relay(replicas=1))
    eventually(lambda: not exists(mail, "horizontalpodautoscaler/out"))


def test_a_foreign_object_of_the_same_name_is_reported_and_left_alone(mail: Kubectl, eventually: Eventually) -> None:
    spec = {"ports": [{"port": 80}]}
    mail.apply({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "out"}, "spec": spec})
    version = get(mail, "service/out")["metadata"]["resourceVersion"]
    mail.apply(relay())
    eventually(lambda: condition(mail, "Stalled")[:2] == ("True", "NameTaken"))
    assert f"Service {mail.namespace}/out" in condition(mail, "Stalled")[2]
    assert get(mail, "service/out")["metadata"]["resourceVersion"] == version
    assert not exists(mail, "statefulset/out")
    mail("delete", "service/out")  # which nothing tells the operator of: it looks again
    eventually(lambda: exists(mail, "statefulset/out") and not is_true(mail, "Stalled"), 20)


def test_a_child_that_a_quota_refuses_is_told_of_and_made_once_it_may_be(
    mail: Kubectl, operator: Any, eventually: Eventually
) -> None:
    with operator.provoking():
        mail("create", "quota", "tight", "--hard=count/services=0")
        eventually(lambda: get(mail, "resourcequota/tight")["status"]["used"] == {"count/services": "0"})
        mail.apply(relay())
        eventually(lambda: condition(mail, "Stalled")[:2] == ("True", "ChildRefused"))
        message = condition(mail, "Stalled")[2]
        assert f"Service {mail.namespace}/out is refused" in message
        assert f"Service {mail.namespace}/out-pods is refused" in message
        assert "exceeded quota: tight" in message
        assert "raise the quota" in message
        assert condition(mail, "Ready")[:2] == ("False", "ChildRefused")
        assert is_true(mail, "ConfigurationValid")
        assert all(exists(mail, child) for child in CHILDREN if not child.startswith("service/"))
        mail("annotate", "smtprelay/out", "example.test/poke=1")
        mail("delete", "quota", "tight")  # which nothing tells the operator of: it looks again
        eventually(lambda: exists(mail, "service/out") and not is_true(mail, "Stalled"), 30)
    assert len(events(mail, "ChildRefused")) == 1
    assert condition(mail, "Ready")[1] == "NoReplicaReady"


def test_a_child_that_is_not_valid_is_told_of_and_the_rest_goes_on(settled: Kubectl, eventually: Eventually) -> None:
    settled.apply(relay(service={"annotations": {"not a name": "x"}}, monitoring={}))
    eventually(lambda: condition(settled, "Stalled")[:2] == ("True", "ChildRefused"))
    message = condition(settled, "Stalled")[2]
    assert f"Service {settled.namespace}/out is refused" in message
    assert "metadata.annotations: Invalid value" in message
    settled("delete", "configmap/out-ca", "--wait=false")
    eventually(lambda: exists(settled, "configmap/out-ca"), 5)
    settled.apply(relay(monitoring={}))
    eventually(lambda: not is_true(settled, "Stalled") and not exists(settled, "podmonitor/out"))


def test_a_paused_relay_is_left_as_it_is(settled: Kubectl, operator: Any, eventually: Eventually) -> None:
    settled.apply(relay(paused=True))
    eventually(lambda: is_true(settled, "Paused"))
    settled("delete", "configmap/out-ca")
    count = operator.value("mailsluice_operator_reconciles_total", kind="SmtpRelay")
    settled("annotate", "smtprelay/out", "example.test/poke=1")
    eventually(lambda: operator.value("mailsluice_operator_reconciles_total", kind="SmtpRelay") > count)
    assert not exists(settled, "configmap/out-ca")
    settled("delete", "smtprelay/out", "--timeout=10s")  # never held up by it


# --- Queues -----------------------------------------------------------------------------------------------------------


def play_kubelet(kubectl: Kubectl, pod: str, address: str) -> None:
    status = {
        "phase": "Running",
        "podIP": address,
        "podIPs": [{"ip": address}],
        "conditions": [{"type": "Ready", "status": "True"}, {"type": "PodScheduled", "status": "True"}],
    }
    kubectl("patch", "pod", pod, "--subresource=status", "--type=strategic", "-p", json.dumps({"status": status}))


def test_pods_tell_their_queue_and_revision(
    settled: Kubectl, fake_pod: Callable[[], Any], eventually: Eventually
) -> None:
    pod = fake_pod()
    pod.answer["revision"] = "older"
    pod.queue(active=2, deferred=3, held=1)
    eventually(lambda: exists(settled, "pod/out-0"))
    play_kubelet(settled, "out-0", pod.address)
    eventually(lambda: is_true(settled, "Ready"))
    eventually(lambda: get(settled, "smtprelay/out").get("status", {}).get("queuedMessages") == 6)
    assert condition(settled, "Reconciling")[:2] == ("True", "ConfigurationRollingOut")
    # The nudge, without which the kubelet would take a minute.
    revision = configuration(settled).revision
    assert get(settled, "pod/out-0")["metadata"]["annotations"]["mailsluice.dev/revision"] == revision
    pod.answer["revision"] = revision
    eventually(lambda: not is_true(settled, "Reconciling"))
    assert get(settled, "smtprelay/out")["status"]["configuration"] == {
        "revision": revision,
        "podsCurrent": 1,
        "podsTotal": 1,
    }


def test_an_upstream_that_is_down_degrades_but_the_relay_stays_ready(
    settled: Kubectl, fake_pod: Callable[[], Any], eventually: Eventually
) -> None:
    pod = fake_pod()
    pod.answer["upstreams"] = {"provider": {"up": False, "last_error": "connection refused"}}
    eventually(lambda: exists(settled, "pod/out-0"))
    play_kubelet(settled, "out-0", pod.address)
    eventually(lambda: condition(settled, "Degraded")[:2] == ("True", "UpstreamUnreachable"), 20)
    assert "provider takes no mail: connection refused" in condition(settled, "Degraded")[2]
    assert is_true(settled, "Ready")


def test_deletion_waits_until_the_queue_is_empty(
    settled: Kubectl, fake_pod: Callable[[], Any], eventually: Eventually
) -> None:
    pod = fake_pod()
    pod.queue(deferred=3)
    eventually(lambda: exists(settled, "pod/out-0"))
    play_kubelet(settled, "out-0", pod.address)
    eventually(lambda: get(settled, "smtprelay/out")["metadata"].get("finalizers") == ["mailsluice.dev/drain"])
    settled("delete", "smtprelay/out", "--wait=false")
    eventually(lambda: configuration(settled).drain_from_ordinal == 0)
    pod.answer |= {"ready": False, "draining": True, "revision": configuration(settled).revision}
    eventually(lambda: "3 messages are still queued" in condition(settled, "Ready")[2])
    pod.queue(deferred=0)
    eventually(lambda: not exists(settled, "smtprelay/out"))
    eventually(lambda: not exists(settled, "statefulset/out"), 30)
    assert len(settled.list("persistentvolumeclaims")) == 1


def test_an_annotation_gives_the_queue_up(
    settled: Kubectl, fake_pod: Callable[[], Any], eventually: Eventually
) -> None:
    pod = fake_pod()
    pod.queue(deferred=3)
    changed = relay(queue={"onDelete": {"drainFor": "1s"}})
    settled.apply(changed)
    eventually(lambda: exists(settled, "pod/out-0"))
    play_kubelet(settled, "out-0", pod.address)
    eventually(lambda: get(settled, "smtprelay/out")["metadata"].get("finalizers") == ["mailsluice.dev/drain"])
    settled("delete", "smtprelay/out", "--wait=false")
    eventually(lambda: len(events(settled, "QueueNotDrained")) == 1)
    assert exists(settled, "smtprelay/out")
    settled("annotate", "smtprelay/out", "mailsluice.dev/discard-queue=true")
    eventually(lambda: not exists(settled, "smtprelay/out"))


def test_a_namespace_that_goes_takes_the_relay_with_it_at_once(
    platform: Any, settled: Kubectl, fake_pod: Callable[[], Any], eventually: Eventually
) -> None:
    pod = fake_pod()
    pod.queue(deferred=3)
    eventually(lambda: exists(settled, "pod/out-0"))
    play_kubelet(settled, "out-0", pod.address)
    eventually(lambda: get(settled, "smtprelay/out")["metadata"].get("finalizers") == ["mailsluice.dev/drain"])
    platform.kubectl("delete", "namespace", settled.namespace, "--wait=false")
    eventually(lambda: not exists(settled, "smtprelay/out"), 30)


def test_scaling_down_goes_one_replica_at_a_time_past_empty_queues(
    settled: Kubectl, fake_pod: Callable[[], Any], eventually: Eventually
) -> None:
    def replicas() -> int:
        wanted: int = get(settled, "statefulset/out")["spec"]["replicas"]
        return wanted

    settled("scale", "smtprelay/out", "--replicas=3")
    eventually(lambda: replicas() == 3)
    pods = [fake_pod() for _ in range(3)]
    for ordinal, pod in enumerate(pods):
        pod.queue(deferred=ordinal)
        eventually(lambda ordinal=ordinal: exists(settled, f"pod/out-{ordinal}"))
        play_kubelet(settled, f"out-{ordinal}", pod.address)
    settled("scale", "smtprelay/out", "--replicas=1")
    eventually(lambda: configuration(settled).drain_from_ordinal == 1)
    eventually(lambda: condition(settled, "Degraded")[:2] == ("True", "QueueNotDrained"))
    assert replicas() == 3
    pods[1].answer["draining"] = pods[2].answer["draining"] = True
    eventually(lambda: "out-2 still has 2 messages" in condition(settled, "Degraded")[2])
    pods[1].queue(deferred=0)
    assert replicas() == 3  # the highest ordinal goes first
    pods[2].queue(deferred=0)
    eventually(lambda: replicas() == 1)
    eventually(lambda: configuration(settled).drain_from_ordinal is None)


# --- SmtpUsers --------------------------------------------------------------------------------------------------------


@pytest.fixture
def granting(mail: Kubectl, eventually: Eventually) -> Kubectl:
    """A relay that takes SmtpUsers of namespaces labelled mail=ours."""
    grant = {
        "allowedNamespaces": {"from": "Selector", "selector": {"matchLabels": {"mail": mail.namespace}}},
        "logins": ["*@{namespace}.example.test"],
        "senders": ["*@{namespace}.example.test"],
    }
    users = [{"secretRef": {"name": "users"}}]
    mail.apply(relay(authentication={"users": users, "smtpUsers": grant}))
    eventually(lambda: exists(mail, "statefulset/out"))
    return mail


def logins(kubectl: Kubectl) -> list[str]:
    return [login.login for login in configuration(kubectl).authentication.users]


def test_a_granted_user_gets_a_secret_and_the_relay_its_login(
    granting: Kubectl, make_namespace: Any, eventually: Eventually
) -> None:
    shop = make_namespace(mail=granting.namespace)
    login = f"news@{shop.namespace}.example.test"
    shop.apply(user("news", granting.namespace, login, senders=[f"*@{shop.namespace}.example.test"]))
    eventually(lambda: is_true(shop, "Accepted", "smtpuser/news") and exists(shop, "secret/news-smtp"))
    eventually(lambda: login in logins(granting))
    found = get(shop, "secret/news-smtp")
    values = {key: base64.b64decode(value).decode() for key, value in found["data"].items()}
    assert found["type"] == "servicebinding.io/smtp"
    assert (values["host"], values["port"], values["tls"]) == (f"out.{granting.namespace}.svc", "587", "starttls")
    assert values["username"] == login
    assert values["ca.crt"] == get(granting, "configmap/out-ca")["data"]["ca.crt"]
    (made,) = [known for known in configuration(granting).authentication.users if known.login == login]
    assert made.namespace == shop.namespace
    (hashed,) = made.hashes
    salt = hashed.split("$")[3]
    assert hashed == hash_password(values["password"], base64.b64decode(salt + "=" * (-len(salt) % 4)))

    shop("delete", "secret/news-smtp")
    eventually(lambda: secret_value(shop, "news-smtp", "password") != values["password"])
    eventually(
        lambda: [u.hashes for u in configuration(granting).authentication.users if u.login == login] != [(hashed,)]
    )
    shop("delete", "smtpuser/news")
    eventually(lambda: login not in logins(granting))
    eventually(lambda: not exists(shop, "secret/news-smtp"), 30)


def test_nobody_gets_what_is_not_granted(granting: Kubectl, make_namespace: Any, eventually: Eventually) -> None:
    shop, other = make_namespace(mail=granting.namespace), make_namespace()
    shop.apply(
        user("boss", granting.namespace, "boss@example.test"),
        user("mask", granting.namespace, f"a@{shop.namespace}.example.test", senders=["*@example.test"]),
        user("lost", "no-such-namespace", f"b@{shop.namespace}.example.test"),
    )
    other.apply(user("news", granting.namespace, f"a@{other.namespace}.example.test"))
    for kubectl, name, reason, words in (
        (shop, "boss", "NotAllowed", "spec.login"),
        (shop, "mask", "NotAllowed", "spec.senders"),
        (shop, "lost", "RelayNotFound", "no-such-namespace/out"),
        (other, "news", "NotAllowed", "allowedNamespaces"),
    ):
        eventually(
            lambda kubectl=kubectl, name=name, reason=reason: (
                condition(kubectl, "Accepted", f"smtpuser/{name}")[:2] == ("False", reason)
            )
        )
        assert words in condition(kubectl, "Accepted", f"smtpuser/{name}")[2]
        assert not exists(kubectl, f"secret/{name}-smtp")
    assert logins(granting) == ["shop@example.test"]


def test_of_two_users_with_one_login_the_older_has_it(
    granting: Kubectl, make_namespace: Any, eventually: Eventually
) -> None:
    shop = make_namespace(mail=granting.namespace)
    login = f"a@{shop.namespace}.example.test"
    shop.apply(user("first", granting.namespace, login))
    eventually(lambda: is_true(shop, "Accepted", "smtpuser/first"))
    created = get(shop, "smtpuser/first")["metadata"]["creationTimestamp"]

    def second_is_younger() -> bool:
        """Times of creation have whole seconds."""
        shop.apply(user("second", granting.namespace, login.upper().replace("@", "@", 1)))
        if get(shop, "smtpuser/second")["metadata"]["creationTimestamp"] > created:
            return True
        shop("delete", "smtpuser/second")
        return False

    eventually(second_is_younger)
    eventually(lambda: condition(shop, "Accepted", "smtpuser/second")[:2] == ("False", "LoginTaken"))
    assert f"{shop.namespace}/first" in condition(shop, "Accepted", "smtpuser/second")[2]
    shop("delete", "smtpuser/first")
    eventually(lambda: is_true(shop, "Accepted", "smtpuser/second"))


def test_a_namespace_that_loses_its_label_loses_its_logins(
    granting: Kubectl, platform: Any, make_namespace: Any, eventually: Eventually
) -> None:
    shop = make_namespace(mail=granting.namespace)
    login = f"a@{shop.namespace}.example.test"
    shop.apply(user("news", granting.namespace, login))
    eventually(lambda: login in logins(granting))
    platform.kubectl("label", "namespace", shop.namespace, "mail-")
    eventually(lambda: login not in logins(granting))
    eventually(lambda: condition(shop, "Accepted", "smtpuser/news")[:2] == ("False", "NotAllowed"))


def test_a_secret_of_somebody_else_is_not_taken_for_a_user(
    granting: Kubectl, make_namespace: Any, eventually: Eventually
) -> None:
    shop = make_namespace(mail=granting.namespace)
    shop("create", "secret", "generic", "precious", "--from-literal=key=value")
    shop.apply(user("news", granting.namespace, f"a@{shop.namespace}.example.test", secretName="precious"))
    eventually(lambda: condition(shop, "Ready", "smtpuser/news")[:2] == ("False", "NameTaken"))
    assert secret_value(shop, "precious", "key") == "value"


# --- The process ------------------------------------------------------------------------------------------------------


def test_a_restart_over_settled_relays_writes_nothing_and_a_role_is_enough(
    platform: Any, settled: Kubectl, run_operator: Any, eventually: Eventually
) -> None:
    """Another operator process, for this namespace alone, with a RoleBinding instead of the ClusterRoleBinding."""
    settled.apply({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "operator"}})
    settled(
        "create",
        "rolebinding",
        "operator",
        "--clusterrole=mailsluice-operator",
        f"--serviceaccount={settled.namespace}:operator",
    )
    kubeconfig = platform.kubeconfig_of("operator", settled.namespace)
    # The last that happens to a new relay here: no node takes its pod. From then on there is nothing to write.
    eventually(lambda: condition(settled, "Degraded")[1] == "PodsUnschedulable")
    with run_operator(kubeconfig, platform.folder, "--namespace", settled.namespace) as process:
        eventually(lambda: process.value("mailsluice_operator_reconciles_total", result="success") >= 1)
        assert process.writes() == 0
        assert {code for (_, code), count in process.requests().items() if count} <= {"200", "404"}
        assert process.value("mailsluice_operator_relays") == 1
        assert process.stop() == 0
