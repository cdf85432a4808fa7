"""The rules of a relay's children: what pods may do, what outlives them, and what makes a new pod."""

from __future__ import annotations

import base64
import dataclasses
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from mailsluice_operator import desired
from mailsluice_operator.children import monitoring, network, scaling, secrets, workload
from mailsluice_operator.children.compare import quantity, satisfied
from mailsluice_operator.children.metadata import APPLIED_ANNOTATION, Owner, child, fingerprint
from mailsluice_operator.resource.models import SmtpRelay, SmtpUser, relay_from, user_from
from mailsluice_relay.config import login_key
from mailsluice_relay.metrics import Metrics as RelayMetrics

Object = dict[str, Any]

LISTENERS = (
    {"name": "smtp", "port": 25, "mode": "StartTLS"},
    {"name": "submissions", "port": 465, "mode": "ImplicitTLS"},
    {"name": "submission", "port": 587, "mode": "StartTLS"},
)
"""The default ones."""

OWNER = Owner("SmtpRelay", "mail", "out", "uid-1")
SETTINGS = workload.PodSettings("relay:1")


def relay(annotations: dict[str, str] | None = None, **spec: Any) -> SmtpRelay:
    upstreams = [{"name": "provider", "host": "smtp.provider.test"}]
    metadata = {"name": "out", "namespace": "mail", "uid": "uid-1", "annotations": annotations or {}}
    return relay_from({"metadata": metadata, "spec": {"upstreams": upstreams, **spec}})


def made(of: SmtpRelay, replicas: int = 1, claims: list[Object] | None = None) -> Object:
    return workload.workload(of, OWNER, SETTINGS, replicas, claims)


def pod(of: SmtpRelay) -> Object:
    spec: Object = made(of)["spec"]["template"]["spec"]
    return spec


CONTENTS = desired.Contents(b"packed", "r1", {"tls.crt": b"c", "tls.key": b"k", "ca.crt": b"a"}, "c1")


def children(of: SmtpRelay) -> dict[str, Object]:
    found = desired.relay_children(
        of, CONTENTS, authority={"ca.key": b"secret"}, replicas=1, claims=None, settings=SETTINGS
    )
    return {f"{body['kind']}/{body['metadata']['name']}": body for body in found}


def test_every_child_is_owned_labelled_and_fingerprinted() -> None:
    for name, body in children(relay(disruptionBudget={})).items():
        metadata = body["metadata"]
        assert metadata["ownerReferences"] == [OWNER.reference()], name
        assert metadata["namespace"] == "mail", name
        assert metadata["labels"]["mailsluice.dev/relay"] == "out", name
        assert APPLIED_ANNOTATION in metadata["annotations"], name


def test_what_a_pod_needs_is_applied_before_the_pods() -> None:
    order = list(children(relay()))
    assert order[-1] == "StatefulSet/out"
    assert order.index("Secret/out-credentials") < order.index("Secret/out-config")


def test_the_authority_key_is_in_one_secret_that_no_pod_mounts() -> None:
    found = children(relay())
    holding = [name for name, body in found.items() if base64.b64encode(b"secret").decode() in str(body)]
    assert holding == ["Secret/out-ca"]
    mounted = {volume["secret"]["secretName"] for volume in pod(relay())["volumes"] if "secret" in volume}
    assert mounted == {"out-config", "out-credentials"}


def test_pods_are_restricted() -> None:
    spec = pod(relay())
    assert spec["automountServiceAccountToken"] is False
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    (container,) = spec["containers"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert not any("subPath" in mount for mount in container["volumeMounts"])


def test_ports_below_1024_are_bound_plus_2000() -> None:
    ports = {port["name"]: port for port in network.client_service(relay(), OWNER)["spec"]["ports"]}
    assert {name: (port["port"], port["targetPort"]) for name, port in ports.items()} == {
        "smtp": (25, 2025),
        "submissions": (465, 2465),
        "submission": (587, 2587),
    }
    (container,) = pod(relay())["containers"]
    assert [port["containerPort"] for port in container["ports"]] == [2025, 2465, 2587, 9090]


def test_the_queue_outlives_the_stateful_set_and_the_relay() -> None:
    spec = made(relay(queue={"storage": {"size": "5Gi", "className": "fast"}}))["spec"]
    assert spec["persistentVolumeClaimRetentionPolicy"] == {"whenDeleted": "Retain", "whenScaled": "Retain"}
    (claim,) = spec["volumeClaimTemplates"]
    assert "ownerReferences" not in claim["metadata"]
    assert claim["spec"]["storageClassName"] == "fast"
    assert claim["spec"]["resources"]["requests"]["storage"] == "5Gi"


def test_claims_of_a_stateful_set_that_exists_are_kept() -> None:
    claims = made(relay())["spec"]["volumeClaimTemplates"]
    assert made(relay(queue={"storage": {"size": "9Gi"}}), claims=claims)["spec"]["volumeClaimTemplates"] == claims


@pytest.mark.parametrize(
    "changed",
    [
        {"senders": {"allowedDomains": ["example.test"]}},
        {"rateLimits": [{"name": "day", "limit": 5, "window": "24h"}]},
        {"limits": {"messageSize": "1Mi"}},
        {"upstreams": [{"name": "other", "host": "other.test"}]},
        {"hostname": "mail.example.test"},
        {"replicas": 3},
        {"listeners": [{**listener, "normalizeLineEndings": True} for listener in LISTENERS]},
    ],
)
def test_what_a_running_relay_can_take_makes_no_new_pod(changed: Object) -> None:
    assert made(relay(**changed))["spec"]["template"] == made(relay())["spec"]["template"]


@pytest.mark.parametrize(
    "changed",
    [
        {"image": "relay:2"},
        {"listeners": [{"name": "smtp", "port": 2525}]},
        {"listeners": [{"name": "smtp", "port": 25, "mode": "ImplicitTLS"}]},
        {"listeners": [{"name": "mail", "port": 25}]},
        {"listeners": [{"name": "smtp", "port": 25, "proxyProtocol": {"trustedNetworks": ["192.0.2.0/24"]}}]},
        {"resources": {"limits": {"memory": "1Gi"}}},
        {"podTemplate": {"spec": {"priorityClassName": "mail"}}},
        {"annotations": {"mailsluice.dev/restartedAt": "2026-01-01T00:00:00Z"}},
    ],
)
def test_what_needs_a_new_pod_changes_the_template(changed: Object) -> None:
    before = relay(listeners=[{"name": "smtp", "port": 25}])
    assert (
        made(relay(**{"listeners": [{"name": "smtp", "port": 25}], **changed}))["spec"]["template"]
        != (made(before)["spec"]["template"])
    )


def test_the_pod_template_of_the_resource_is_added_and_cannot_take_the_safety_away() -> None:
    changed = relay(
        podTemplate={
            "metadata": {"labels": {"team": "a"}, "annotations": {"note": "b"}},
            "spec": {
                "securityContext": {"runAsUser": 1000, "fsGroup": 2000},
                "tolerations": [{"key": "spot", "operator": "Exists"}],
                "topologySpreadConstraints": [
                    {"maxSkew": 2, "topologyKey": "zone", "whenUnsatisfiable": "DoNotSchedule"}
                ],
            },
        }
    )
    template = made(changed)["spec"]["template"]
    assert template["metadata"]["labels"]["team"] == "a"
    assert template["metadata"]["annotations"]["note"] == "b"
    context = template["spec"]["securityContext"]
    assert (context["runAsUser"], context["fsGroup"], context["runAsNonRoot"]) == (1000, 2000, True)
    (constraint,) = template["spec"]["topologySpreadConstraints"]
    assert constraint["labelSelector"]["matchLabels"]["app.kubernetes.io/instance"] == "out"
    assert template["spec"]["tolerations"] == [{"key": "spot", "operator": "Exists"}]


def test_pass_through_needs_no_volume() -> None:
    body = made(relay(queue={"mode": "PassThrough"}))
    assert body["kind"] == "Deployment"
    assert "volumeClaimTemplates" not in body["spec"]


def test_a_load_balancer_keeps_client_addresses_unless_told_otherwise() -> None:
    assert "externalTrafficPolicy" not in network.client_service(relay(), OWNER)["spec"]
    asked = {"type": "LoadBalancer", "annotations": {"pool": "mail"}, "loadBalancerSourceRanges": ["192.0.2.0/24"]}
    service = network.client_service(relay(service=asked), OWNER)
    assert service["spec"]["externalTrafficPolicy"] == "Local"
    assert service["spec"]["loadBalancerSourceRanges"] == ["192.0.2.0/24"]
    assert service["metadata"]["annotations"]["pool"] == "mail"
    asked["externalTrafficPolicy"] = "Cluster"
    assert network.client_service(relay(service=asked), OWNER)["spec"]["externalTrafficPolicy"] == "Cluster"


def test_a_users_secret_has_every_key_and_a_quoted_uri() -> None:
    body = secrets.user_secret(
        Owner("SmtpUser", "shop", "news", "uid-2"),
        "news-smtp",
        host="out.mail.svc",
        port=587,
        login="news@shop.test",
        password="p:/@",
        implicit_tls=False,
        bundle=b"PEM",
    )
    assert body["type"] == "servicebinding.io/smtp"
    found = {key: value.decode() for key, value in secrets.decoded(body).items()}
    assert found == {
        "type": "smtp",
        "provider": "mailsluice",
        "host": "out.mail.svc",
        "port": "587",
        "username": "news@shop.test",
        "password": "p:/@",
        "tls": "starttls",
        "ca.crt": "PEM",
        "uri": "smtp://news%40shop.test:p%3A%2F%40@out.mail.svc:587",
    }


# --- Comparison -------------------------------------------------------------------------------------------------------


def test_what_others_add_does_not_count() -> None:
    wanted = {"metadata": {"labels": {"a": "1"}}, "spec": {"ports": [{"port": 25}]}}
    found = {
        "metadata": {"labels": {"a": "1", "b": "2"}},
        "spec": {"ports": [{"port": 25, "nodePort": 3}]},
        "status": 1,
    }
    assert satisfied(wanted, found)


@pytest.mark.parametrize(
    "found",
    [
        {"spec": {"ports": [{"port": 26}]}},
        {"spec": {"ports": []}},
        {"spec": {"ports": [{"port": 25}, {"port": 26}]}},
        {"spec": None},
        {},
    ],
)
def test_any_other_value_and_any_other_item_counts(found: Object) -> None:
    assert not satisfied({"spec": {"ports": [{"port": 25}]}}, found)


def test_nothing_is_as_good_as_empty() -> None:
    assert satisfied({"spec": {"items": [], "map": {}}}, {"spec": {}})


def test_another_owner_beside_ours_does_not_count() -> None:
    wanted = {"metadata": {"ownerReferences": [{"uid": "1"}]}}
    assert satisfied(wanted, {"metadata": {"ownerReferences": [{"uid": "2"}, {"uid": "1"}]}})
    assert not satisfied(wanted, {"metadata": {"ownerReferences": [{"uid": "2"}]}})


@pytest.mark.parametrize(("one", "other"), [("1000m", "1"), ("0.5", "500m"), ("1Gi", "1024Mi"), ("1k", "1000")])
def test_quantities_are_compared_by_value_where_quantities_stand(one: str, other: str) -> None:
    assert quantity(one) == quantity(other)
    assert satisfied({"limits": {"cpu": one}}, {"limits": {"cpu": other}})
    assert not satisfied({"labels": {"cpu": one}}, {"labels": {"cpu": other}})


def test_a_body_that_lost_a_field_has_another_fingerprint() -> None:
    one = child("v1", "Secret", "x", OWNER, labels={}, data={"a": "1", "b": "2"})
    other = child("v1", "Secret", "x", OWNER, labels={}, data={"a": "1"})
    assert not satisfied(other, one)
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})


def test_the_fingerprint_of_a_secret_tells_its_keys_and_nothing_of_its_values() -> None:
    def secret(**data: str) -> Object:
        return child("v1", "Secret", "x", OWNER, labels={}, data=data)

    def mark(body: Object) -> str:
        found: str = body["metadata"]["annotations"][APPLIED_ANNOTATION]
        return found

    assert mark(secret(a="1")) == mark(secret(a="2"))
    assert mark(secret(a="1")) != mark(secret(b="1"))
    assert not satisfied(secret(a="2"), secret(a="1"))  # the value is compared itself
    assert mark(child("v1", "ConfigMap", "x", OWNER, labels={}, data={"a": "1"})) != mark(
        child("v1", "ConfigMap", "x", OWNER, labels={}, data={"a": "2"})
    )


# --- Grants and steps -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "claim", "granted"),
    [
        ("*@{namespace}.example.test", "a@shop.example.test", True),
        ("*@{namespace}.example.test", "A@SHOP.example.test", True),
        ("*@{namespace}.example.test", "*@shop.example.test", True),
        ("*@{namespace}.example.test", "a@other.example.test", False),
        ("*@{namespace}.example.test", "a@boss.test@shop.example.test", False),
        ("*@{namespace}.example.test", "a@shop.example.test.evil.test", False),
        ("*@{namespace}.example.test", "a@shopxexample.test", False),
        ("*@{namespace}.example.test", "*@*.shop.example.test", False),
        ("*@{namespace}.example.test", "shop", False),
        ("{namespace}-*@example.test", "shop-news@example.test", True),
        ("{namespace}-*@example.test", "shop-@boss.test", False),
        ("bounces@example.test", "bounces@example.test", True),
        ("*", "anything@anywhere.test", True),
    ],
)
def test_a_claim_lies_within_a_template(template: str, claim: str, granted: bool) -> None:
    assert desired.template_matches(template, claim, "shop") is granted


def claimed(login: str, name: str = "one", created: str = "2026-01-01T00:00:00Z") -> SmtpUser:
    metadata = {"name": name, "namespace": "mail", "uid": name, "creationTimestamp": created}
    return user_from({"metadata": metadata, "spec": {"relayRef": {"name": "out"}, "login": login}})


def refusals(own: frozenset[str], *users: SmtpUser) -> list[str | None]:
    granting = relay(authentication={"smtpUsers": {"logins": ["*@example.test"]}})
    decisions = desired.decide(granting, users, {"mail": {}}, own)
    return [decision.refused.reason if decision.refused is not None else None for decision in decisions]


def test_logins_are_compared_as_the_relay_compares_them() -> None:
    later = "2026-01-02T00:00:00Z"
    assert refusals(frozenset({login_key("Shop@example.test")}), claimed("sHop@example.test")) == ["LoginTaken"]
    assert refusals(frozenset(), claimed("a@example.test"), claimed("A@Example.test", "two", later)) == [
        None,
        "LoginTaken",
    ]


@pytest.mark.parametrize(
    ("patterns", "image", "allowed"),
    [
        ((), "relay:1", True),
        ((), "relay:2", False),
        (("registry.test/mail/*",), "registry.test/mail/relay:2", True),
        (("registry.test/mail/*",), "registry.test.evil.test/mail/relay:2", False),
        (("registry.test/mail/*",), "registryxtest/mail/relay:2", False),
        (("relay:2", "relay:3"), "relay:3", True),
    ],
)
def test_only_allowed_images_run(patterns: tuple[str, ...], image: str, allowed: bool) -> None:
    settings = dataclasses.replace(SETTINGS, allowed_images=patterns)
    refused = desired.image_refused(relay(image=image), settings)
    assert (refused is None) is allowed
    assert desired.image_refused(relay(), settings) is None


def test_volumes_of_another_size_than_wanted_are_named_with_the_remedy() -> None:
    wanted = relay(queue={"storage": {"size": "1Gi"}})
    same, smaller, bigger = (desired.Volume(f"queue-out-{size}", size, size) for size in (1 << 30, 1 << 29, 1 << 31))
    assert desired.not_resized(wanted, [same]) is None
    found = desired.not_resized(wanted, [same, smaller])
    assert found is not None
    assert smaller.claim in found.message
    assert same.claim not in found.message
    assert "raise" in found.message
    found = desired.not_resized(wanted, [bigger])
    assert found is not None
    assert "cannot shrink" in found.message


def test_the_first_to_go_is_the_highest_ordinal_and_only_when_it_is_empty() -> None:
    assert desired.next_step(3, 1, {}, "out") == desired.Step(3)
    assert desired.next_step(1, 3, {1: 0, 2: 0}, "out") == desired.Step(2, 1)
    for left in ({}, {2: None}, {2: 7}, {1: 0}):
        step = desired.next_step(1, 3, left, "out")
        assert (step.replicas, step.drain_from_ordinal) == (3, 1)
        assert step.waiting is not None
        assert step.waiting.reason == "QueueNotDrained"


def test_settings_of_the_operator_reach_the_pod() -> None:
    settings = dataclasses.replace(SETTINGS, bind=("192.0.2.1", "::"))
    (container,) = workload.workload(relay(), OWNER, settings, 1, None)["spec"]["template"]["spec"]["containers"]
    assert container["image"] == "relay:1"
    assert container["args"][5:9] == ["--bind", "192.0.2.1", "--bind", "::"]


@pytest.mark.parametrize(("spec", "period", "grace"), [({}, 60, "50"), ({"terminationGracePeriodSeconds": 5}, 5, "1")])
def test_the_relay_ends_before_the_kubelet_kills_it(spec: Object, period: int, grace: str) -> None:
    found = pod(relay(podTemplate={"spec": spec}))
    assert found["terminationGracePeriodSeconds"] == period
    assert found["containers"][0]["args"][-2:] == ["--grace", grace]


# --- What is asked for ------------------------------------------------------------------------------------------------


def test_a_network_policy_limits_who_sends_and_leaves_metrics_and_the_way_out_open() -> None:
    asked = relay(
        listeners=[{"name": "smtp", "port": 25}],
        networkPolicy={"enabled": True, "from": [{"namespaceSelector": {"matchLabels": {"mail": "yes"}}}]},
    )
    policy = network.network_policy(asked, OWNER)
    assert policy is not None
    assert policy["spec"]["policyTypes"] == ["Ingress"]
    assert policy["spec"]["ingress"] == [
        {
            "ports": [{"port": 2025, "protocol": "TCP"}],
            "from": [{"namespaceSelector": {"matchLabels": {"mail": "yes"}}}],
        },
        {"ports": [{"port": 9090, "protocol": "TCP"}], "from": [{"namespaceSelector": {}}]},
    ]
    everybody = network.network_policy(relay(networkPolicy={"enabled": True}), OWNER)
    assert everybody is not None
    assert "from" not in everybody["spec"]["ingress"][0]
    assert network.network_policy(relay(networkPolicy={"enabled": False}), OWNER) is None


def test_an_autoscaler_scales_the_resource_by_what_pods_can_help_with() -> None:
    found = scaling.autoscaler(
        relay(autoscaling={"maxReplicas": 4, "cpuUtilization": 70, "queuedMessagesPerReplica": 500}), OWNER
    )
    assert found is not None
    assert found["spec"]["scaleTargetRef"]["kind"] == "SmtpRelay"
    assert (found["spec"]["minReplicas"], found["spec"]["maxReplicas"]) == (1, 4)
    cpu, queue = found["spec"]["metrics"]
    assert cpu["resource"]["target"] == {"type": "Utilization", "averageUtilization": 70}
    assert queue["pods"]["target"] == {"type": "AverageValue", "averageValue": "500"}
    assert queue["pods"]["metric"]["name"] == "mailsluice_queue_messages"
    assert scaling.autoscaler(relay(replicas=2), OWNER) is None


def test_alerts_and_the_monitor_name_metrics_and_a_port_that_there_are() -> None:
    asked = relay(monitoring={"podMonitor": True, "rules": True, "labels": {"release": "prometheus"}})
    monitor, rule = monitoring.pod_monitor(asked, OWNER), monitoring.prometheus_rule(asked, OWNER)
    assert monitor is not None
    assert rule is not None
    (container,) = pod(asked)["containers"]
    assert monitor["spec"]["podMetricsEndpoints"][0]["port"] in {port["name"] for port in container["ports"]}
    for body in (monitor, rule):
        assert body["metadata"]["labels"]["release"] == "prometheus"
    served = {sample.name for family in RelayMetrics().registry.collect() for sample in family.samples}
    served |= {family.name for family in RelayMetrics().registry.collect()}
    served |= {f"{family.name}_total" for family in RelayMetrics().registry.collect() if family.type == "counter"}
    expressions = [alert["expr"] for alert in rule["spec"]["groups"][0]["rules"]]
    named = {name for expression in expressions for name in re.findall(r"\bmailsluice_\w+", expression)}
    assert named - served == set()
    assert all('namespace="mail",pod=~"out-[0-9]+"' in expression for expression in expressions)


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_prometheus_takes_the_alerts(tmp_path: Path) -> None:
    rule = monitoring.prometheus_rule(relay(monitoring={"rules": True}), OWNER)
    assert rule is not None
    file = tmp_path / "rules.json"  # which is YAML, too
    file.write_text(json.dumps(rule["spec"]))
    done = subprocess.run(["promtool", "check", "rules", file], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
