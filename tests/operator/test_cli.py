"""The commands of `mailsluice` as a person or a script calls them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from mailsluice_relay.config import is_supported_hash

MAILSLUICE = str(Path(sys.executable).with_name("mailsluice"))
EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.yaml"))

BROKEN = """\
apiVersion: mailsluice.dev/v1alpha1
kind: SmtpRelay
metadata: {name: outbound}
spec:
  authentication:
    users:
    - secretRef: {name: users}
  listeners:
  - {name: one, port: 25, mode: StartTLS}
  - {name: two, port: 25, mode: StartTLS}
  upstreams:
  - {name: provider, preset: Gmial}
"""


def mailsluice(*arguments: str, given: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [MAILSLUICE, *arguments], input=given, capture_output=True, text=True, timeout=100, check=False
    )


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_is_accepted(example: Path) -> None:
    done = mailsluice("check", "-f", str(example))
    assert done.returncode == 0, done.stdout
    assert "no errors" in done.stdout


def test_check_tells_file_line_object_field_and_remedy(tmp_path: Path) -> None:
    broken = tmp_path / "broken.yaml"
    broken.write_text(BROKEN)
    done = mailsluice("check", "-f", str(broken))
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    assert any(
        line.startswith(f"{broken}:12: SmtpRelay/outbound: spec.upstreams[0].preset: Unsupported value")
        for line in lines
    ), lines
    broken.write_text(BROKEN.replace("preset: Gmial", "host: smtp.provider.test"))
    rules = mailsluice("check", "-f", str(broken)).stdout.splitlines()
    assert any(
        line.startswith(f"{broken}:8: SmtpRelay/outbound: spec.listeners: ") and "ports must be unique" in line
        for line in rules
    ), rules


def test_a_missing_secret_is_a_warning_and_with_strict_an_error(tmp_path: Path) -> None:
    file = tmp_path / "relay.yaml"
    file.write_text(
        BROKEN.replace("preset: Gmial", "host: smtp.provider.test").replace("two, port: 25", "two, port: 26")
    )
    assert mailsluice("check", "-f", str(file)).returncode == 0
    strict = mailsluice("check", "--strict", "-f", str(file))
    assert strict.returncode == 1
    assert f"{file}:7: SmtpRelay/outbound: spec.authentication.users[0].secretRef: Secret users" in strict.stdout


def test_a_file_without_objects_is_told(tmp_path: Path) -> None:
    empty = tmp_path / "empty.yaml"
    empty.write_text("# nothing\n")
    assert "holds no object" in mailsluice("check", "-f", str(empty)).stdout
    assert mailsluice("check", "--strict", "-f", str(empty)).returncode == 1


def test_errors_of_the_file_system_are_messages(tmp_path: Path) -> None:
    minimal = next(path for path in EXAMPLES if path.stem == "minimal")
    done = mailsluice("run", "-f", str(minimal), "--data-dir", "/proc/nowhere")
    assert done.returncode == 1
    assert done.stderr.startswith("mailsluice: /proc/nowhere")
    assert mailsluice("run", "-f", str(minimal), "--http-port", "99999").returncode == 2


def test_passwd_makes_a_line_that_a_relay_takes() -> None:
    done = mailsluice("passwd", "shop@example.test", given="shop-password\n")
    login, hashed = done.stdout.strip().split(":", 1)
    assert login == "shop@example.test"
    assert is_supported_hash(hashed)
    assert "shop-password" not in done.stdout


@pytest.mark.parametrize(
    ("login", "given"), [("shop", "secret\n"), ("shop@example.test", "\n"), ("a:b@c.test", "x\n"), ("a@@c.test", "x\n")]
)
def test_passwd_refuses_what_cannot_be_a_login(login: str, given: str) -> None:
    done = mailsluice("passwd", login, given=given)
    assert done.returncode != 0
    assert done.stdout == ""
    assert done.stderr.startswith("mailsluice: ")


def test_render_shows_the_children_without_secrets(tmp_path: Path) -> None:
    minimal = next(path for path in EXAMPLES if path.stem == "minimal")
    done = mailsluice("render", "-f", str(minimal))
    assert done.returncode == 0, done.stderr
    kinds = [document["kind"] for document in YAML(typ="safe").load_all(done.stdout)]
    assert {"Secret", "ConfigMap", "ServiceAccount", "Service", "StatefulSet"} <= set(kinds)
    assert "provider-secret" not in done.stdout
    assert "PRIVATE KEY" not in done.stdout


def test_a_queue_without_a_relay_says_what_to_do(tmp_path: Path) -> None:
    done = mailsluice("queue", "list", "--data-dir", str(tmp_path))
    assert done.returncode != 0
    assert "no relay runs on" in done.stderr
    assert mailsluice("queue", "list").stderr.startswith("mailsluice: which queue?")


def test_the_demo_ends_by_itself_with_all_results() -> None:
    done = mailsluice("demo", "--json")
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout.splitlines()[-1])
    assert all(counts["sessions"][result] > 0 for result in ("accepted", "rejected", "suspected_spam", "none"))
    assert counts["delivered"] == 16
    assert counts["refused_reasons"] == {
        "authentication_required": 3,
        "line_ending": 1,
        "rate_limited": 15,
        "sender_not_owned": 1,
        "short_login": 1,
    }
