"""The DNS records that a relay's sender domains need, for people to copy into their zones: SPF, DKIM, DMARC. Pure.

Nothing is looked up or written in DNS. What only its owner can know is left out: with a host that is no preset's, who
may send for the domain; and that a zone has a record already, into which a part has to go.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

from mailsluice_operator.children.configuration import Built
from mailsluice_operator.resource.models import SmtpRelay, Upstream
from mailsluice_operator.resource.presets import PRESETS
from mailsluice_operator.resource.status import DNSRecord
from mailsluice_relay.config import UpstreamType

MAXIMUM_RECORDS: Final = 256
"""Of `status.dnsRecords`."""


def dns_records(relay: SmtpRelay, made: Built) -> tuple[DNSRecord, ...]:
    """By purpose and name."""
    found = sorted((*_dkim(made), *_spf(relay), *_dmarc(relay)), key=lambda record: (record.purpose, record.name))
    return tuple(found[:MAXIMUM_RECORDS])


def _domains(relay: SmtpRelay) -> list[str]:
    """Those that are known by name to be sent as."""
    named = {signature.domain.lower() for signature in relay.spec.dkim}
    return sorted(named | {domain.lower() for domain in relay.spec.senders.allowed_domains if "*" not in domain})


def _dkim(made: Built) -> Iterator[DNSRecord]:
    for signature in made.configuration.dkim:
        key = load_pem_private_key(made.files[signature.key], password=None)
        public = key.public_key()
        if isinstance(key, Ed25519PrivateKey):  # RFC 8463 section 4
            kind, octets = "ed25519", public.public_bytes(Encoding.Raw, PublicFormat.Raw)
        else:
            kind, octets = "rsa", public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        yield DNSRecord(
            name=f"{signature.selector}._domainkey.{signature.domain.lower()}",
            type="TXT",
            value=f"v=DKIM1; k={kind}; p={base64.b64encode(octets).decode()}",
            purpose="DKIM",
        )


def _spf(relay: SmtpRelay) -> Iterator[DNSRecord]:
    mechanisms = [_mechanism(relay, upstream) for upstream in relay.spec.upstreams]
    known = list(dict.fromkeys(mechanism for mechanism in mechanisms if mechanism is not None))
    if len(known) == 0 or None in mechanisms:
        return
    for domain in _domains(relay):
        yield DNSRecord(name=domain, type="TXT", value=f"v=spf1 {' '.join(known)} ~all", purpose="SPF")


def _mechanism(relay: SmtpRelay, upstream: Upstream) -> str | None:
    """Who sends for the domain through this upstream (RFC 7208 section 5)."""
    if upstream.type is UpstreamType.DIRECT_TO_MX:
        return f"a:{relay.spec.hostname}"
    sends_from = PRESETS[upstream.preset].spf if upstream.preset is not None else None
    return f"include:{sends_from}" if sends_from is not None else None


def _dmarc(relay: SmtpRelay) -> Iterator[DNSRecord]:
    for domain in _domains(relay):
        # To look first and refuse later is what RFC 7489 section 6.1 has p=none for.
        yield DNSRecord(name=f"_dmarc.{domain}", type="TXT", value="v=DMARC1; p=none", purpose="DMARC")
