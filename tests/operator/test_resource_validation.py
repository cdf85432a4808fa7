"""Every wrong resource of the table gets its errors word for word: offline, and from a real API server."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from kubernetes.config import new_client_from_config
from ruamel.yaml import YAML

from mailsluice_operator.resource.validation import KINDS, Problem, admitted, schema_of, validate

ROOT = Path(__file__).resolve().parents[2]
TABLES = Path(__file__).parent / "resources"

SMALLEST: dict[str, dict[str, Any]] = {
    "SmtpRelay": {"upstreams": [{"name": "provider", "host": "smtp.provider.test"}]},
    "SmtpUser": {"relayRef": {"name": "outbound"}, "login": "shop@example.test"},
}


def cases(table: str) -> list[Any]:
    return [pytest.param(case, id=case["name"]) for case in YAML(typ="safe").load(TABLES / table)]


def manifest_of(case: dict[str, Any]) -> dict[str, Any]:
    """The smallest right object with the case's fields laid over it."""
    kind = case.get("kind", "SmtpRelay")
    spec = {**SMALLEST[kind], **case.get("spec", {})}
    # A null of the table takes a field of the smallest object away; nulls elsewhere are what is tested.
    spec = {name: value for name, value in spec.items() if value is not None or name not in SMALLEST[kind]}
    manifest = {
        "apiVersion": "mailsluice.dev/v1alpha1",
        "kind": kind,
        "metadata": {"name": "outbound"},
        "spec": spec,
        **case.get("manifest", {}),
    }
    return {name: value for name, value in manifest.items() if value is not None}


def examples() -> list[Any]:
    return [
        pytest.param(document, id=f"{path.stem}-{document['metadata']['name']}")
        for path in sorted((ROOT / "examples").glob("*.yaml"))
        for document in YAML(typ="safe").load_all(path)
        if document["kind"] in SMALLEST
    ]


@pytest.mark.parametrize("case", cases("invalid.yaml"))
def test_a_wrong_resource_is_refused_offline_in_the_words_of_the_table(case: dict[str, Any]) -> None:
    assert sorted(map(str, validate(manifest_of(case)))) == sorted(case["errors"])


def test_every_rule_has_a_row_in_the_table() -> None:
    def messages(schema: dict[str, Any]) -> Iterator[str]:
        yield from (rule["message"] for rule in schema.get("x-kubernetes-validations", ()))
        for child in (*schema.get("properties", {}).values(), schema.get("items"), schema.get("additionalProperties")):
            if child:
                yield from messages(child)

    broken = "\n".join(error for case in YAML(typ="safe").load(TABLES / "invalid.yaml") for error in case["errors"])
    rules = {message for kind in KINDS for message in messages(schema_of(kind))}
    assert [message for message in sorted(rules) if message not in broken] == []


@pytest.mark.parametrize("case", cases("valid.yaml"))
def test_a_right_resource_passes_offline(case: dict[str, Any]) -> None:
    assert validate(manifest_of(case)) == []


@pytest.mark.parametrize("example", examples())
def test_every_example_passes_offline(example: dict[str, Any]) -> None:
    assert validate(example) == []


def test_a_kind_of_another_version_is_not_taken_for_ours() -> None:
    problems = validate({"apiVersion": "mailsluice.dev/v1", "kind": "SmtpRelay", "metadata": {"name": "a"}})
    assert problems == [Problem("kind", 'no matches for kind "SmtpRelay" in version "mailsluice.dev/v1"')]


def test_defaults_reach_objects_that_the_manifest_leaves_out() -> None:
    spec = admitted(manifest_of({}))["spec"]
    assert [listener["mode"] for listener in spec["listeners"]] == ["StartTLS", "ImplicitTLS", "StartTLS"]
    assert spec["queue"]["retry"] == {"initial": "1m", "maximum": "1h", "factor": 2}
    assert "replicas" not in spec, "an autoscaler could not be told from a person"


Create = Callable[[dict[str, Any]], list[str]]


@pytest.fixture(scope="session")
def create(api_server: Any) -> Create:
    """Try to create an object, strictly and for nothing; returns what the API server says against it."""
    client = new_client_from_config(str(api_server.kubeconfig))

    def attempt(manifest: dict[str, Any]) -> list[str]:
        path = f"/apis/{manifest['apiVersion']}/namespaces/default/{manifest['kind'].lower()}s"
        metadata = {name: value for name, value in manifest["metadata"].items() if name != "namespace"}
        request = client.param_serialize(
            "POST",
            path,
            query_params=[("dryRun", "All"), ("fieldValidation", "Strict")],
            header_params={"Content-Type": "application/json"},
            body={**manifest, "metadata": metadata},
            auth_settings=["BearerToken"],
        )
        response = client.call_api(*request)
        status = json.loads(response.read())
        return [] if response.status == 201 else errors_of(status)

    return attempt


def errors_of(status: dict[str, Any]) -> list[str]:
    """`path: message` of each error in a Status."""
    strict = re.findall(r'unknown field "([^"]+)"', status["message"])
    if strict:
        return [f'{path}: unknown field "{path}"' for path in strict]
    causes = [f"{cause['field']}: {cause['message']}" for cause in status["details"]["causes"]]
    # Without a field the API server repeats an error of type, or says that the rules have to wait.
    return [cause for cause in causes if not cause.startswith("<nil>: ")]


@pytest.mark.apiserver
@pytest.mark.parametrize("case", cases("invalid.yaml"))
def test_the_api_server_says_the_same_of_a_wrong_resource(case: dict[str, Any], create: Create) -> None:
    assert sorted(create(manifest_of(case))) == sorted(case["errors"])


@pytest.mark.apiserver
@pytest.mark.parametrize("case", cases("valid.yaml"))
def test_the_api_server_takes_a_right_resource(case: dict[str, Any], create: Create) -> None:
    assert create(manifest_of(case)) == []


@pytest.mark.apiserver
@pytest.mark.parametrize("example", examples())
def test_the_api_server_takes_every_example(example: dict[str, Any], create: Create) -> None:
    assert create(example) == []


@pytest.mark.apiserver
def test_an_autoscaler_may_write_replicas_and_a_person_may_not(kubectl: Any) -> None:
    relay = manifest_of({"spec": {"autoscaling": {"minReplicas": 2, "maxReplicas": 5, "cpuUtilization": 70}}})
    kubectl.apply(relay)
    kubectl("scale", "smtprelay/outbound", "--replicas=3")
    assert kubectl.get("smtprelay", "outbound")["spec"]["replicas"] == 3
    plain = manifest_of({"manifest": {"metadata": {"name": "plain"}}, "spec": {"replicas": 2}})
    kubectl.apply(plain)
    autoscaling = '{"spec": {"autoscaling": {"maxReplicas": 5, "cpuUtilization": 70}}}'
    refused = kubectl.attempt("patch", "smtprelay", "plain", "--type=merge", "-p", autoscaling)
    assert "set replicas or autoscaling, not both; remove replicas" in refused.stderr


@pytest.mark.apiserver
def test_the_stored_object_is_what_the_offline_check_makes_of_it(kubectl: Any) -> None:
    relay = manifest_of({"spec": {"spam": {"rules": {"linkShortener": {}}}, "rateLimitStore": None}})
    kubectl("create", "-f", "-", stdin=json.dumps(relay))
    assert kubectl.get("smtprelay", "outbound")["spec"] == admitted(relay)["spec"]
