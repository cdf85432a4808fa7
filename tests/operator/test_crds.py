"""The CustomResourceDefinitions: current, documented, bounded, and what kubectl shows of them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from mailsluice_operator.resource.crd import relay_definition, render, user_definition
from mailsluice_operator.resource.presets import PRESETS

ROOT = Path(__file__).resolve().parents[2]

DEFINITIONS = [pytest.param(make(), id=make.__name__) for make in (relay_definition, user_definition)]


def schema_of(definition: dict[str, Any]) -> dict[str, Any]:
    (version,) = definition["spec"]["versions"]
    schema: dict[str, Any] = version["schema"]["openAPIV3Schema"]
    return schema


def nodes(schema: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every schema within, by its path."""
    yield path, schema
    for name, child in schema.get("properties", {}).items():
        yield from nodes(child, f"{path}.{name}")
    for name in ("items", "additionalProperties"):
        if name in schema:
            yield from nodes(schema[name], f"{path}[]")


@pytest.mark.parametrize("name", sorted(render()))
def test_the_files_are_what_the_models_say(name: str) -> None:
    assert (ROOT / "crds" / name).read_text() == render()[name], "run `make crds`"


def test_the_folder_holds_nothing_else() -> None:
    assert sorted(path.name for path in (ROOT / "crds").iterdir()) == sorted(render())


@pytest.mark.parametrize("definition", DEFINITIONS)
def test_every_field_is_explained(definition: dict[str, Any]) -> None:
    spec = schema_of(definition)["properties"]["spec"]
    unexplained = [
        path for path, node in nodes(spec) if path and not path.endswith("[]") and not node.get("description")
    ]
    assert unexplained == []


@pytest.mark.parametrize("definition", DEFINITIONS)
def test_everything_that_a_person_writes_has_a_bound(definition: dict[str, Any]) -> None:
    """Without bounds the cost of a rule cannot be told, and the API server refuses it."""
    unbounded = []
    for path, node in nodes(schema_of(definition)["properties"]["spec"]):
        text = node.get("type") == "string" and "enum" not in node and "maxLength" not in node
        items = node.get("type") == "array" and "maxItems" not in node
        keys = "additionalProperties" in node and "maxProperties" not in node
        if text or items or keys:
            unbounded.append(path)
    assert unbounded == []


@pytest.mark.parametrize("definition", DEFINITIONS)
def test_the_schema_is_structural(definition: dict[str, Any]) -> None:
    for path, node in nodes(schema_of(definition)):
        assert "type" in node or node.get("x-kubernetes-int-or-string"), path
        assert not {"$ref", "anyOf", "oneOf", "title"} & node.keys(), path


@pytest.mark.parametrize("definition", DEFINITIONS)
def test_every_rule_says_what_to_do(definition: dict[str, Any]) -> None:
    for path, node in nodes(schema_of(definition)):
        for rule in node.get("x-kubernetes-validations", ()):
            assert rule["message"], path
            assert "\n" not in rule["message"], path


def test_the_presets_of_the_table_are_those_of_the_schema() -> None:
    upstream = schema_of(relay_definition())["properties"]["spec"]["properties"]["upstreams"]["items"]
    assert upstream["properties"]["preset"]["enum"] == list(PRESETS)


def test_kubectl_get_shows_what_matters() -> None:
    (version,) = relay_definition()["spec"]["versions"]
    shown = [column["name"].upper() for column in version["additionalPrinterColumns"] if "priority" not in column]
    assert shown == ["READY", "REASON", "REPLICAS", "QUEUED", "ENDPOINT", "AGE"]


def test_a_relay_scales() -> None:
    (version,) = relay_definition()["spec"]["versions"]
    assert version["subresources"]["scale"] == {
        "specReplicasPath": ".spec.replicas",
        "statusReplicasPath": ".status.replicas",
        "labelSelectorPath": ".status.selector",
    }


@pytest.mark.apiserver
def test_kubectl_explains_a_field(kubectl: Any, eventually: Any, tmp_path: Path) -> None:
    def explained() -> bool:
        # Discovery trails the CRD by a moment, and kubectl remembers what it did not find.
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        text = kubectl("explain", "relay.spec.queue.lifetime", f"--cache-dir={tmp_path / 'cache'}")
        return "How long delivery is tried before the sender gets a bounce." in " ".join(text.split())

    eventually(explained, 30)


@pytest.mark.apiserver
def test_kubectl_shows_the_status_of_a_relay(kubectl: Any) -> None:
    (relay,) = YAML(typ="safe").load_all(
        "{apiVersion: mailsluice.dev/v1alpha1, kind: SmtpRelay, metadata: {name: outbound}, "
        "spec: {upstreams: [{name: provider, host: smtp.provider.test}]}}"
    )
    kubectl.apply(relay)
    status = (
        '{"status": {"replicas": 2, "selector": "app=x", "queuedMessages": 7, '
        '"endpoints": [{"name": "smtp", "address": "outbound.mail.svc:25"}], '
        '"conditions": [{"type": "Ready", "status": "True", "reason": "Ready", "message": "", '
        '"lastTransitionTime": "2026-01-01T00:00:00Z"}]}}'
    )
    kubectl("patch", "relay", "outbound", "--subresource=status", "--type=merge", "-p", status)
    head, row = kubectl("get", "relay").splitlines()
    assert head.split() == ["NAME", "READY", "REASON", "REPLICAS", "QUEUED", "ENDPOINT", "AGE"]
    assert row.split()[:-1] == ["outbound", "True", "Ready", "2", "7", "outbound.mail.svc:25"]
