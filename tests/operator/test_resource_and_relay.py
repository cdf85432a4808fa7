"""What the resource lets through the relay can read: a field of one tenant must not stop the others' changes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trustme
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from hypothesis import given
from hypothesis import strategies as st
from ruamel.yaml import YAML

from mailsluice_operator.children.configuration import Secret, build
from mailsluice_operator.local.mount import write_mount
from mailsluice_operator.resource import cel
from mailsluice_operator.resource.models import API_VERSION, SpamRules, relay_from
from mailsluice_operator.resource.references import Purpose, secret_uses
from mailsluice_operator.resource.schema import (
    ADDRESS_PATTERN,
    DOMAIN_PATTERN,
    HAS_NO_HOST_BITS,
    IS_NETWORK,
    LOGIN_PATTERN,
    SENDER_PATTERN,
)
from mailsluice_operator.resource.validation import admitted
from mailsluice_relay.admission import Admission
from mailsluice_relay.config import encode, login_key
from mailsluice_relay.dispatch import Dispatcher
from mailsluice_relay.metrics import Metrics
from mailsluice_relay.policy.networks import Networks
from mailsluice_relay.policy.ownership import Domains, rights
from mailsluice_relay.reload import load
from mailsluice_relay.suspicion.rules import RULES

ROOT = Path(__file__).resolve().parents[2]
CERTIFICATE = b"-----BEGIN CERTIFICATE-----\n"
KEY = b"-----BEGIN PRIVATE KEY-----\n"
SERVER = {"tls.crt": CERTIFICATE, "tls.key": KEY, "ca.crt": CERTIFICATE}
BCRYPT = "$2b$10$IACI.x37fVDOprQytsuhaeWnGGmQwF6NkJtIbSJ97fVJryUdwnZYG"
CONTENT: dict[Purpose, dict[str, bytes]] = {
    Purpose.USERS: {"username": b"shop@example.test", "password": b"p"},
    Purpose.UPSTREAM_CREDENTIALS: {"username": b"u", "password": b"p"},
    Purpose.UPSTREAM_PASSWORD: {"username": b"u", "password": b"p"},
    Purpose.UPSTREAM_GRANT: {
        "grant": b"RefreshToken",
        "user": b"u@example.test",
        "client-id": b"c",
        "token-url": b"https://login.example.test/token",
        "refresh-token": b"r",
    },
    Purpose.SERVER_CERTIFICATE: {"tls.crt": CERTIFICATE, "tls.key": KEY},
    Purpose.AUTHORITIES: {"ca.crt": trustme.CA().cert_pem.bytes()},
    Purpose.SIGNING_KEY: {
        "tls.key": Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    },
    Purpose.URL: {"url": b"redis://valkey:6379/0"},
}

cel.holds("true", cel.to_cel({}, ""))  # celpy raises the recursion limit on first use, which hypothesis remarks on


@given(st.from_regex(SENDER_PATTERN, fullmatch=True))
def test_every_sender_pattern_is_one_to_the_relay(pattern: str) -> None:
    rights("shop@example.test", [pattern])


@given(st.from_regex(LOGIN_PATTERN, fullmatch=True))
def test_every_login_is_one_to_the_relay(login: str) -> None:
    rights(login, [])
    Domains([login.rpartition("@")[2]] if "@" in login else [], "logins")
    assert login_key(login) == login.casefold(), "two ways to compare would let two users have one login"


@given(st.from_regex(DOMAIN_PATTERN, fullmatch=True))
def test_every_domain_is_one_to_the_relay(domain: str) -> None:
    Domains([domain], "senders.allowedDomains")


@given(st.from_regex(ADDRESS_PATTERN, fullmatch=True))
def test_every_address_has_one_at_sign_and_is_ascii(address: str) -> None:
    assert address.isascii()
    assert address.count("@") == 1
    assert not re.search(r"\s", address)


@given(st.ip_addresses(), st.integers(0, 128))
def test_every_network_is_one_to_the_relay(address: Any, prefix: int) -> None:
    text = f"{address}/{prefix}"
    value = cel.to_cel({}, [text])
    if cel.holds(IS_NETWORK.rule, value) and cel.holds(HAS_NO_HOST_BITS.rule, value):
        Networks([text], "authentication.allowedNetworks")


def test_the_resource_has_every_rule_with_the_defaults_that_the_relay_has() -> None:
    names = {field.encode_name: field.name for field in msgspec.structs.fields(SpamRules)}
    assert set(names) == set(RULES)
    plain = relay_from({"metadata": {"name": "out"}, "spec": {"upstreams": [{"name": "up", "host": "up.test"}]}})
    made = build(plain, secrets={}, server=SERVER).configuration.spam.rules
    assert made == {name: rule.defaults for name, rule in RULES.items()}


def right_relays() -> list[Any]:
    """The relays of the examples and of the table of right resources that this release can run."""
    rows = YAML(typ="safe").load(Path(__file__).parent / "resources/valid.yaml")
    specs = {
        row["name"]: {"upstreams": [{"name": "provider", "host": "smtp.provider.test"}], **row.get("spec", {})}
        for row in rows
        if row.get("kind", "SmtpRelay") == "SmtpRelay"
    }
    for path in (ROOT / "examples").glob("*.yaml"):
        for document in YAML(typ="safe").load_all(path):
            if document["kind"] == "SmtpRelay":
                specs[f"{path.stem}-{document['metadata']['name']}"] = document["spec"]
    return [pytest.param(spec, id=name) for name, spec in specs.items()]


@pytest.mark.parametrize("spec", right_relays())
async def test_a_right_resource_makes_a_configuration_that_the_relay_takes(
    spec: dict[str, Any], tmp_path: Path
) -> None:
    metadata = {"name": "outbound", "namespace": "mail"}
    manifest = {"apiVersion": API_VERSION, "kind": "SmtpRelay", "metadata": metadata, "spec": spec}
    relay = relay_from(admitted(manifest))
    # One login a Secret, as no login may stand in two.
    secrets = {
        use.name: Secret({**CONTENT[use.purpose], "username": f"{use.name}@example.test".encode()}, use.name, "1")
        for use in secret_uses(relay)
    }
    made = build(relay, secrets=secrets, server=SERVER, hash_password=lambda _password, _salt: BCRYPT)
    revision = made.configuration.credentials_revision.encode()
    write_mount(tmp_path / "config", {"config.json.gz": encode(made.configuration)})
    write_mount(tmp_path / "credentials", {**made.files, "revision": revision})
    loaded = load(tmp_path)
    Dispatcher.check(loaded.configuration, loaded.credentials)
    admission = Admission(
        made.configuration, credentials=made.files, metrics=Metrics(), monotonic=lambda: 0.0, now=lambda: 0.0
    )
    await admission.close()
