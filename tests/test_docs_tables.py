"""The tables in docs/ say what the code says, and the manifests in README.md are valid."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from prometheus_client import CollectorRegistry

from mailsluice_operator.app.metrics import Metrics as OperatorMetrics
from mailsluice_operator.children.metadata import RELAY_LABEL, Owner
from mailsluice_operator.children.monitoring import prometheus_rule
from mailsluice_operator.cluster.objects import SMTP_RELAY
from mailsluice_operator.cluster.store import Store
from mailsluice_operator.resource import not_yet as not_yet_module
from mailsluice_operator.resource.files import Severity, check_files
from mailsluice_operator.resource.models import relay_from, user_from
from mailsluice_operator.resource.not_yet import NotYet, not_yet
from mailsluice_relay.metrics import Metrics as RelayMetrics

ROOT: Final = Path(__file__).resolve().parent.parent
DOCS: Final = ROOT / "docs"


def rows(text: str) -> list[list[str]]:
    """The cells of every table row, the heads left out."""
    lines = re.findall(r"(?m)^\| (.+?) ?\|$", re.sub(r"(?m)^\|.*\|\n(?=\|---)", "", text))
    return [[cell.strip() for cell in line.split(" |")] for line in lines]


def section(page: str, heading: str) -> str:
    """What stands under a heading of the second level."""
    sections = dict(part.split("\n", 1) for part in re.split(r"(?m)^## ", (DOCS / page).read_text())[1:])
    return sections[heading]


# --- docs/metrics.md --------------------------------------------------------------------------------------------------


def exposed(registry: CollectorRegistry) -> dict[str, tuple[list[str], str]]:
    """Labels and type of every metric, by the name under which it is scraped."""
    found: dict[str, tuple[list[str], str]] = {}
    for family in registry.collect():
        name = f"{family.name}_total" if family.type == "counter" else family.name
        collector = registry._names_to_collectors.get(family.name)
        labels = list(getattr(collector, "_labelnames", family.samples[0].labels if family.samples else ()))
        found[name] = labels, family.type
    return found


def test_every_metric_has_a_row_with_its_labels_and_its_type() -> None:
    relay = RelayMetrics().registry
    operator = OperatorMetrics(Store(RELAY_LABEL), [SMTP_RELAY], wall_clock=lambda: 0.0).registry
    described = {
        name.strip("`"): (re.findall(r"`(\w+)`", labels), kind)
        for name, labels, kind, _ in rows((DOCS / "metrics.md").read_text())
    }
    assert described == exposed(relay) | exposed(operator)


# --- docs/conditions.md -----------------------------------------------------------------------------------------------


def calls(name: str) -> Iterator[ast.Call]:
    """Every call of a function or method of this name in the operator."""
    for path in sorted((ROOT / "operator").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and name in {getattr(node.func, "id", ""), getattr(node.func, "attr", "")}:
                yield node


def test_every_reason_of_a_condition_is_explained() -> None:
    in_code = {call.args[0].value for call in calls("Fact") if isinstance(call.args[0], ast.Constant)}
    explained = {row[0].strip("`") for row in rows((DOCS / "conditions.md").read_text()) if len(row) > 2}
    assert explained == in_code


def test_every_condition_is_explained() -> None:
    in_code = {
        call.args[0].value
        for call in calls("set")
        if len(call.args) > 1 and isinstance(call.args[0], ast.Constant) and isinstance(call.args[0].value, str)
    }
    explained = {row[0].strip("`") for row in rows((DOCS / "conditions.md").read_text()) if len(row) == 2}
    assert explained == in_code


# --- docs/alerts.md ---------------------------------------------------------------------------------------------------


def test_every_alert_is_explained() -> None:
    spec = {"upstreams": [{"name": "provider", "host": "smtp.provider.test"}], "monitoring": {"rules": True}}
    relay = relay_from({"metadata": {"name": "out"}, "spec": spec})
    rule = prometheus_rule(relay, Owner("SmtpRelay", "mail", "out", ""))
    assert rule is not None
    made = [(alert["alert"], alert["labels"]["severity"]) for alert in rule["spec"]["groups"][0]["rules"]]
    assert [(row[0].strip("`"), row[1]) for row in rows((DOCS / "alerts.md").read_text())] == made


# --- docs/status.md ---------------------------------------------------------------------------------------------------


def everything() -> tuple[dict[str, Any], dict[str, Any]]:
    """A relay and a user that say all there is to say to no effect. `placeholder` stands for names."""
    secret = {"name": "some-secret"}
    spec = {
        "tls": {"issuerRef": {"name": "issuer"}, "clientCASecretRef": secret},
        "authentication": {
            "clientCertificates": {},
            "serviceAccountTokens": {"login": "{serviceAccount}@{namespace}.example.test"},
        },
        "recipients": {"redirectTo": "staging@example.test"},
        "rateLimitStore": {"urlSecretRef": secret},
        "spam": {
            "engines": [{"name": "placeholder", "type": "ClamAV", "address": "clamd.example.test:3310"}],
        },
        "upstreams": [
            {"name": "provider", "host": "smtp.example.test"},
        ],
        "bounces": {"address": "bounces@example.test"},
        "dkim": [{"domain": "example.test", "selector": "s1", "privateKeySecretRef": secret}],
    }
    user = {"relayRef": {"name": "out"}, "login": "shop@example.test"}
    metadata = {"name": "out"}
    return {"metadata": metadata, "spec": spec}, {"metadata": metadata, "spec": user}


def said() -> list[tuple[NotYet, str]]:
    """Everything that can be said, and of which kind of resource."""
    relay, user = (read(body) for read, body in zip((relay_from, user_from), everything(), strict=True))
    return [*((item, "") for item in not_yet(relay)), *((item, "SmtpUser ") for item in not_yet(user))]


def listed() -> list[list[str]]:
    """The rows as the page has to have them."""
    return sorted(
        [f"{kind}`{re.sub(r'[0-9]+(?=])', '', item.field)}`", item.message.replace("placeholder", "NAME")]
        for item, kind in said()
    )


def test_what_has_no_effect_is_listed() -> None:
    assert sorted(rows(section("status.md", "Accepted without effect"))) == listed()


def test_nothing_that_the_table_of_the_code_can_say_is_forgotten() -> None:
    """Each piece of text in the code's messages was said by the resources above."""
    words = "\n".join(item.message for item, _ in said())
    source = Path(not_yet_module.__file__).read_text()
    texts = {
        piece.value
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call | ast.Return)
        for piece in ast.walk(node)
        if isinstance(piece, ast.Constant) and isinstance(piece.value, str) and " " in piece.value.strip()
    }
    assert texts
    assert {text for text in texts if text not in words} == set()


# --- docs/dependencies.md ---------------------------------------------------------------------------------------------


def test_every_direct_dependency_has_a_row() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"].values()
    groups = (project["project"]["dependencies"], *extras, project["dependency-groups"]["dev"])
    requirements = [requirement for group in groups for requirement in group]
    names = {re.split(r"[\[<>=!~; ]", requirement)[0] for requirement in requirements} - {"mailsluice"}
    chosen = {
        name for row in rows((DOCS / "dependencies.md").read_text()) for name in re.findall(r"`([\w.-]+)`", row[1])
    }
    assert names - chosen == set()


# --- README.md --------------------------------------------------------------------------------------------------------


def test_every_manifest_in_the_readme_is_valid(tmp_path: Path) -> None:
    manifests = re.findall(r"(?ms)^```yaml\n(.*?)^```", (ROOT / "README.md").read_text())
    assert len(manifests) > 1
    for number, manifest in enumerate(manifests):
        file = tmp_path / f"{number}.yaml"
        file.write_text(manifest)
        assert [str(found) for found in check_files([file]) if found.severity is Severity.ERROR] == []
