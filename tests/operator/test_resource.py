"""The models: examples as they stand, quantities, presets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from ruamel.yaml import YAML

from mailsluice_operator.resource.models import (
    DEFAULT_LISTENERS,
    DEFAULT_SPAM_RULES,
    SmtpRelay,
    SpamRules,
    bound_port,
    relay_from,
    user_from,
)
from mailsluice_operator.resource.not_yet import not_yet
from mailsluice_operator.resource.presets import PRESETS
from mailsluice_operator.resource.quantities import octets, seconds
from mailsluice_operator.resource.references import secret_uses
from mailsluice_operator.resource.validation import validate

ROOT = Path(__file__).resolve().parents[2]


def load(name: str) -> Any:
    return YAML(typ="safe").load(ROOT / "examples" / name)


def relay(**spec: Any) -> SmtpRelay:
    upstreams = [{"name": "provider", "host": "smtp.provider.test"}]
    return relay_from({"metadata": {"name": "outbound"}, "spec": {"upstreams": upstreams, **spec}})


def test_the_full_example_is_read_as_it_stands() -> None:
    spec = relay_from(load("full.yaml")).spec
    assert spec.rate_limits[2].limit == "2G"
    assert spec.tls.client_ca_secret_ref is not None
    assert spec.tls.client_ca_secret_ref.name == "client-ca"
    assert spec.network_policy is not None
    assert spec.network_policy.from_[0].namespace_selector is not None
    assert spec.pod_template is not None
    assert spec.pod_template.spec is not None
    assert spec.pod_template.spec.priority_class_name == "mail"


def test_the_user_example_is_read_as_it_stands() -> None:
    spec = user_from(load("smtpuser.yaml")).spec
    assert (spec.relay_ref.namespace, spec.login) == ("mail", "newsletter@shop.example.test")


def test_an_unknown_field_is_an_error_with_its_path() -> None:
    with pytest.raises(msgspec.ValidationError, match=r"unknown field `lifetme` - at `\$\.spec\.queue`"):
        relay(queue={"lifetme": "48h"})


def test_a_status_of_a_newer_operator_is_read() -> None:
    manifest = {"metadata": {"name": "a"}, "spec": load("full.yaml")["spec"], "status": {"invented": 1, "users": 3}}
    assert relay_from(manifest).status.users == 3


def test_what_is_written_back_has_the_names_of_the_manifest() -> None:
    example = load("full.yaml")["spec"]["podTemplate"]
    template = relay_from(load("full.yaml")).spec.pod_template
    assert msgspec.json.decode(msgspec.json.encode(template)) == example


def test_listeners_by_default() -> None:
    assert [(listener.name, listener.port, str(listener.mode)) for listener in relay().spec.listeners] == [
        ("smtp", 25, "StartTLS"),
        ("submissions", 465, "ImplicitTLS"),
        ("submission", 587, "StartTLS"),
    ]
    assert [bound_port(listener.port) for listener in DEFAULT_LISTENERS] == [2025, 2465, 2587]
    assert bound_port(10587) == 10587


def test_every_spam_rule_has_defaults() -> None:
    assert set(DEFAULT_SPAM_RULES) == {field.name for field in msgspec.structs.fields(SpamRules)}


@pytest.mark.parametrize(
    ("text", "value"),
    [("90s", 90.0), ("10m", 600.0), ("48h", 172800.0), ("1h30m", 5400.0), ("500ms", 0.5), ("1m500ms", 60.5)],
)
def test_durations(text: str, value: float) -> None:
    assert seconds(text) == value


@pytest.mark.parametrize("text", ["", "5", "5 m", "-5m", "1.5h", "2d", "m", "100000h", "1h1m1s1ms1s", "５m"])
def test_wrong_durations(text: str) -> None:
    with pytest.raises(ValueError, match="is no duration"):
        seconds(text)


@pytest.mark.parametrize(
    ("value", "result"),
    [(60, 60), ("60", 60), ("2G", 2_000_000_000), ("25Mi", 26_214_400), ("1.5Ki", 1536), ("10k", 10_000), ("500m", 1)],
)
def test_quantities(value: int | str, result: int) -> None:
    assert octets(value) == result


@pytest.mark.parametrize("text", ["", "25MB", "-1", "1e3", "Gi", "1 G"])
def test_wrong_quantities(text: str) -> None:
    with pytest.raises(ValueError, match="is no quantity"):
        octets(text)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_makes_a_valid_upstream(name: str) -> None:
    preset = PRESETS[name]
    region = {"region": next(iter(preset.regions), "eu-west-1")} if preset.takes_region else {}
    upstream = {"name": "provider", "preset": name, "credentialsSecretRef": {"name": "login"}, **region}
    manifest = {
        "apiVersion": "mailsluice.dev/v1alpha1",
        "kind": "SmtpRelay",
        "metadata": {"name": "outbound"},
        "spec": {"upstreams": [upstream]},
    }
    assert validate(manifest) == []
    host = preset.host_of(region.get("region"))
    assert host is not None
    assert "{" not in host


def test_a_preset_knows_its_regions() -> None:
    assert PRESETS["AmazonSES"].host_of("eu-west-1") == "email-smtp.eu-west-1.amazonaws.com"
    assert PRESETS["AmazonSES"].host_of(None) is None
    assert PRESETS["Mailgun"].host_of(None) == "smtp.mailgun.org"
    assert PRESETS["Mailgun"].host_of("eu") == "smtp.eu.mailgun.org"


def test_every_secret_that_a_relay_names_is_found() -> None:
    named = {use.field: (use.name, use.key) for use in secret_uses(relay_from(load("full.yaml")))}
    assert named == {
        "spec.tls.clientCASecretRef": ("client-ca", "ca.crt"),
        "spec.authentication.users[0].secretRef": ("tenant-a-users", "htpasswd"),
        "spec.authentication.users[1].secretRef": ("cron-login", "htpasswd"),
        "spec.rateLimitStore.urlSecretRef": ("valkey", "url"),
        "spec.upstreams[0].credentialsSecretRef": ("ses-login", "username"),
        "spec.upstreams[1].tls.caSecretRef": ("backup-ca", "ca.crt"),
        "spec.upstreams[1].credentialsSecretRef": ("backup-login", "password"),
        "spec.upstreams[2].credentialsSecretRef": ("gmail-oauth", "password"),
        "spec.dkim[0].privateKeySecretRef": ("dkim-example", "tls.key"),
    }


def test_a_plain_relay_says_nothing_that_is_not_there_yet() -> None:
    assert not_yet(relay()) == ()
