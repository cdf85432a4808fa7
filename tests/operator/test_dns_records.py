"""The records that people copy into DNS: what stands in the status must verify what the relay signs."""

from __future__ import annotations

from typing import Any

import dkim
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from mailsluice_operator.children.configuration import Secret, build
from mailsluice_operator.children.dns_records import dns_records
from mailsluice_operator.resource.models import relay_from
from mailsluice_operator.resource.status import DNSRecord
from mailsluice_operator.resource.validation import admitted
from mailsluice_relay.dkim import Signer, signed
from mailsluice_relay.envelope import Content
from mailsluice_relay.spool.content import MemoryBody

SERVER = {"tls.crt": b"x", "tls.key": b"x", "ca.crt": b"x"}
KEYS: dict[str, Any] = {"rsa": rsa.generate_private_key(65537, 2048), "ed25519": Ed25519PrivateKey.generate()}
LOGIN = {"credentialsSecretRef": {"name": "login"}}


def records(**spec: Any) -> tuple[DNSRecord, ...]:
    return made(**spec)[0]


def made(**spec: Any) -> tuple[tuple[DNSRecord, ...], Signer]:
    secrets = {
        name: Secret(
            {"tls.key": key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())},
            uid=name,
            resource_version="1",
        )
        for name, key in KEYS.items()
    }
    secrets["login"] = Secret({"username": b"u", "password": b"p"}, "login", "1")
    manifest = {
        "apiVersion": "mailsluice.dev/v1alpha1",
        "kind": "SmtpRelay",
        "metadata": {"name": "outbound", "namespace": "mail"},
        "spec": {"upstreams": [{"name": "up", "host": "smtp.provider.test"}], **spec},
    }
    relay = relay_from(admitted(manifest))
    built = build(relay, secrets=secrets, server=SERVER)
    return dns_records(relay, built), Signer(built.configuration, built.files)


def signature(selector: str, key: str) -> dict[str, Any]:
    return {"domain": "Example.test", "selector": selector, "privateKeySecretRef": {"name": key}}


@pytest.mark.parametrize("kind", KEYS)
def test_the_record_verifies_what_the_key_signs(kind: str) -> None:
    found, signer = made(dkim=[signature("s1", kind)])
    zone = {record.name: record.value for record in found if record.purpose == "DKIM"}
    assert zone.keys() == {"s1._domainkey.example.test"}
    content = Content(b"From: a@example.test\r\n", MemoryBody(b"Hello.\r\n"))
    message = b"".join(signed(content, signer.keys_for(content), now=1_795_560_000.0).chunks())
    assert dkim.verify(message, dnsfunc=lambda name, timeout=5: zone[name.decode().rstrip(".")].encode())


def test_no_record_holds_anything_private() -> None:
    private = KEYS["ed25519"].private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode().split("\n")[1]
    assert all(private not in record.value for record in records(dkim=[signature("s1", "ed25519")]))


@pytest.mark.parametrize(
    ("upstreams", "value"),
    [
        ([{"name": "a", "preset": "Gmail", **LOGIN}], "v=spf1 include:_spf.google.com ~all"),
        (
            [
                {"name": "a", "preset": "AmazonSES", "region": "eu-west-1", **LOGIN},
                {"name": "b", "preset": "AmazonSES", "region": "us-east-1", **LOGIN},
                {"name": "c", "type": "DirectToMX"},
            ],
            "v=spf1 include:amazonses.com a:mail.example.test ~all",
        ),
        ([{"name": "a", "preset": "Gmail", **LOGIN}, {"name": "b", "host": "smtp.provider.test"}], None),
        ([{"name": "a", "preset": "Yahoo", **LOGIN}], None),
    ],
)
def test_spf_names_who_sends_where_that_is_known(upstreams: list[dict[str, Any]], value: str | None) -> None:
    found = records(
        hostname="mail.example.test", senders={"allowedDomains": ["b.test", "*.b.test", "a.test"]}, upstreams=upstreams
    )
    spf = [(record.name, record.value) for record in found if record.purpose == "SPF"]
    assert spf == ([("a.test", value), ("b.test", value)] if value is not None else [])


def test_every_sender_domain_gets_a_dmarc_record_to_begin_with() -> None:
    found = records(
        senders={"allowedDomains": ["shop.test"]}, dkim=[signature("s1", "rsa"), signature("s2", "ed25519")]
    )
    dmarc = [(record.name, record.value) for record in found if record.purpose == "DMARC"]
    assert dmarc == [("_dmarc.example.test", "v=DMARC1; p=none"), ("_dmarc.shop.test", "v=DMARC1; p=none")]


def test_a_relay_that_says_nothing_of_domains_has_no_records() -> None:
    assert records() == ()
