"""The check of files: every finding names file, line, object and field, and says what to do."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from mailsluice_operator.resource.files import Severity, check_files
from mailsluice_operator.resource.yaml_lines import MAXIMUM_SIZE, YAMLProblem, documents

ROOT = Path(__file__).resolve().parents[2]
BCRYPT = "$2b$10$IACI.x37fVDOprQytsuhaeWnGGmQwF6NkJtIbSJ97fVJryUdwnZYG"

RELAY = """\
apiVersion: mailsluice.dev/v1alpha1
kind: SmtpRelay
metadata: {name: outbound}
spec:
  authentication: {users: [{secretRef: {name: users}}]}
  upstreams: [{name: provider, host: smtp.provider.test}]
"""
USERS = f"""\
apiVersion: v1
kind: Secret
metadata: {{name: users}}
stringData:
  htpasswd: |
    shop@example.test:{BCRYPT}
"""

Check = Callable[..., list[str]]


@pytest.fixture
def check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Check:
    """Check documents as the file `relay.yaml`; returns the findings as they are printed."""
    monkeypatch.chdir(tmp_path)

    def run(*texts: str, strict: bool = False) -> list[str]:
        Path("relay.yaml").write_text("---\n".join(textwrap.dedent(text) for text in texts))
        return [str(finding) for finding in check_files([Path("relay.yaml")], strict=strict)]

    return run


def test_a_relay_with_its_secrets_is_right(check: Check) -> None:
    assert check(USERS, RELAY) == []


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda path: path.stem)
def test_examples_have_warnings_at_most(path: Path) -> None:
    assert [str(finding) for finding in check_files([path]) if finding.severity is Severity.ERROR] == []


def test_the_minimal_example_has_nothing_to_tell() -> None:
    assert check_files([ROOT / "examples/minimal.yaml"], strict=True) == []


def test_a_typing_mistake_is_shown_at_its_line_with_the_field_that_was_meant(check: Check) -> None:
    assert check(USERS, RELAY + "  listner: []\n") == [
        'relay.yaml:14: SmtpRelay/outbound: spec.listner: unknown field "spec.listner"; did you mean listeners?'
    ]


def test_a_rule_is_shown_at_the_field_that_breaks_it(check: Check) -> None:
    assert check(USERS, RELAY + "  spam:\n    suspectAt: 6\n    holdAt: 4\n") == [
        "relay.yaml:16: SmtpRelay/outbound: spec.spam.holdAt: "
        "Invalid value: holdAt must not be below suspectAt; raise it"
    ]


def test_what_is_missing_is_shown_where_it_belongs(check: Check) -> None:
    assert check(USERS, RELAY + "  rateLimits:\n  - name: day\n    window: 24h\n") == [
        "relay.yaml:15: SmtpRelay/outbound: spec.rateLimits[0].limit: Required value; add it"
    ]


def test_a_text_of_the_wrong_form_is_shown_with_the_right_one(check: Check) -> None:
    (finding,) = check(USERS, RELAY + "  queue: {lifetime: 2 days}\n")
    assert finding.startswith("relay.yaml:14: SmtpRelay/outbound: spec.queue.lifetime: ")
    assert finding.endswith("; write it like 90s, 10m, 48h or 1h30m")


def test_a_missing_secret_is_a_warning_and_with_strict_an_error(check: Check) -> None:
    field = "spec.authentication.users[0].secretRef"
    rest = f"{field}: Secret users is not in the files; add it, or see that the cluster has it"
    assert check(RELAY) == [f"relay.yaml:5: warning: SmtpRelay/outbound: {rest}"]
    assert check(RELAY, strict=True) == [f"relay.yaml:5: SmtpRelay/outbound: {rest}"]


def test_a_secret_without_the_key_is_an_error_that_names_the_key(check: Check) -> None:
    assert check(USERS.replace("htpasswd", "passwords"), RELAY) == [
        "relay.yaml:4: Secret/users: stringData: has no key htpasswd and no username and password; write one with "
        "`mailsluice passwd` (named by SmtpRelay/outbound: spec.authentication.users[0].secretRef)"
    ]


def test_a_wrong_htpasswd_line_is_named_and_its_secret_is_not_shown(check: Check) -> None:
    (finding,) = check(USERS + "    cron@example.test:swordfish\n", RELAY)
    assert finding.startswith(
        "relay.yaml:5: Secret/users: stringData.htpasswd: key htpasswd, line 2: the hash of cron@"
    )
    assert "swordfish" not in finding


def test_data_that_is_not_base64_is_an_error(check: Check) -> None:
    secret = "apiVersion: v1\nkind: Secret\nmetadata: {name: other}\ndata: {password: 'pass word'}\n"
    assert check(secret) == [
        "relay.yaml:4: Secret/other: data.password: is not base64; encode it, or write the text under stringData"
    ]


def test_a_secret_of_another_namespace_is_not_the_relays(check: Check) -> None:
    relay = RELAY.replace("{name: outbound}", "{name: outbound, namespace: mail}")
    assert check(USERS.replace("{name: users}", "{name: users, namespace: mail}"), relay) == []
    assert len(check(USERS.replace("{name: users}", "{name: users, namespace: shop}"), relay)) == 1


def test_one_login_in_two_secrets_is_an_error(check: Check) -> None:
    relay = RELAY.replace("[{secretRef: {name: users}}]", "[{secretRef: {name: users}}, {secretRef: {name: more}}]")
    assert check(USERS, USERS.replace("{name: users}", "{name: more}").replace("shop@", "SHOP@"), relay) == [
        "relay.yaml:19: SmtpRelay/outbound: spec.authentication.users[1].secretRef: Secret more has the login "
        "SHOP@example.test, which Secret users has too; remove one of them"
    ]


def test_a_short_login_is_useless_where_full_ones_are_asked_for(check: Check) -> None:
    (finding,) = check(USERS.replace("shop@example.test", "shop"), RELAY)
    assert finding.startswith("relay.yaml:5: warning: Secret/users: stringData.htpasswd: shop is no full address")
    short = RELAY.replace("authentication: {", "authentication: {loginFormat: Either, ")
    assert check(USERS.replace("shop@example.test", "shop"), short) == []


def test_a_user_needs_a_relay_that_takes_users(check: Check) -> None:
    user = """\
        apiVersion: mailsluice.dev/v1alpha1
        kind: SmtpUser
        metadata: {name: news}
        spec: {relayRef: {name: outbound}, login: news@example.test}
        """
    assert check(user) == [
        "relay.yaml:4: warning: SmtpUser/news: spec.relayRef: SmtpRelay outbound is not in the files; add it, or see "
        "that the cluster has it"
    ]
    assert check(USERS, RELAY, user) == [
        "relay.yaml:18: SmtpUser/news: spec.relayRef: SmtpRelay outbound takes no SmtpUsers; its owner has to set "
        "spec.authentication.smtpUsers"
    ]


def test_what_this_release_does_not_do_is_a_warning(check: Check) -> None:
    assert check(USERS, RELAY + "  tls: {issuerRef: {name: issuer}}\n") == [
        "relay.yaml:14: warning: SmtpRelay/outbound: spec.tls.issuerRef: "
        "no certificate is asked for yet; the operator's own authority makes it",
    ]


def test_one_object_twice_is_an_error(check: Check) -> None:
    assert check(USERS, USERS) == [
        "relay.yaml:10: Secret/users: metadata.name: is already at relay.yaml:1; remove one or rename it"
    ]


def test_a_name_that_is_missing_is_an_error(check: Check) -> None:
    assert check(USERS, RELAY.replace("metadata: {name: outbound}\n", "")) == [
        "relay.yaml:8: SmtpRelay/: metadata.name: Required value: name or generateName is required; correct it"
    ]


@pytest.mark.parametrize(
    ("text", "finding"),
    [
        ("a: [1, 2\nb: 3", "relay.yaml:2: broken YAML: expected ',' or ']', but got ':'"),
        ("kind: A\nkind: B", 'relay.yaml:2: broken YAML: key "kind" already set in map; remove one'),
        ("a:\n\tb: 1", "relay.yaml:2: broken YAML: found character '\\t' that cannot start any token"),
        ("a: &a [*a]", "relay.yaml:1: broken YAML: is nested too deeply"),
        ("a: .inf", "relay.yaml:1: broken YAML: '.inf' is no number"),
        ("just text", "relay.yaml:1: is no object; write apiVersion, kind, metadata and spec"),
    ],
)
def test_broken_yaml_is_shown_at_its_line(check: Check, text: str, finding: str) -> None:
    assert check(text) == [finding]


def test_a_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    (finding,) = check_files([tmp_path / "none.yaml"])
    assert finding.message == "cannot be read: No such file or directory; check the path"


def test_a_file_that_is_no_text_is_told(tmp_path: Path) -> None:
    (tmp_path / "relay.yaml").write_bytes(b"kind: \xff\xfe")
    (finding,) = check_files([tmp_path / "relay.yaml"])
    assert finding.message == "is not UTF-8 text; save it as such"


# --- YAML as Kubernetes' tools read it --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("yes", True),
        ("Off", False),
        ("'yes'", "yes"),
        ("010", 8),
        ("0x1F", 31),
        ("-7", -7),
        ("2.0", 2),
        ("1.5", 1.5),
        ("1e3", 1000),
        ("1:30", "1:30"),
        ("2001-01-01", "2001-01-01"),
        ("~", None),
    ],
)
def test_scalars_mean_what_they_mean_to_kubectl(text: str, value: object) -> None:
    (document,) = documents(f"field: {text}")
    assert document.value == {"field": value}


def test_merge_keys_fill_what_is_not_said() -> None:
    (document,) = documents("base: &base {a: 1, b: 2}\nother: {<<: *base, b: 3}\n")
    assert document.value["other"] == {"a": 1, "b": 3}


def test_a_list_is_its_items_with_their_own_lines() -> None:
    first, second = documents("kind: List\nitems:\n- kind: A\n- kind: B\n  spec:\n    x: 1\n")
    assert (first.value["kind"], second.value["kind"], second.line_of("spec.x")) == ("A", "B", 6)


def test_aliases_cannot_blow_a_file_up() -> None:
    bomb = "a: &a [" + ",".join(["x"] * 100) + "]\n"
    bomb += "b: &b [" + ",".join(["*a"] * 100) + "]\n"
    bomb += "c: [" + ",".join(["*b"] * 100) + "]\n"
    with pytest.raises(YAMLProblem, match="expands to more than"):
        list(documents(bomb))


def test_a_file_has_a_greatest_size() -> None:
    with pytest.raises(YAMLProblem, match="split it"):
        list(documents("#" * (MAXIMUM_SIZE + 1)))
