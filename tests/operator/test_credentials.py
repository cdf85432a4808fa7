"""The rules of what the operator makes: certificates that verify and are renewed in time, passwords that rotate."""

from __future__ import annotations

import datetime
import itertools
import ssl
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from cryptography import x509

from mailsluice_operator import credentials
from mailsluice_operator.credentials import next_rotation, rotated

NOW = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
NAMES = credentials.service_names("mail.example.test", "outbound", "shop")
DAY = datetime.timedelta(days=1)


def handshake(chain: bytes, key: bytes, bundle: bytes, hostname: str, tmp_path: Path) -> None:
    """A real TLS handshake in memory; raises when the client does not accept the server."""
    (tmp_path / "chain.pem").write_bytes(chain)
    (tmp_path / "key.pem").write_bytes(key)
    server_context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_context.load_cert_chain(tmp_path / "chain.pem", tmp_path / "key.pem")
    client_context = ssl.create_default_context(cadata=bundle.decode())
    client_context.verify_flags |= ssl.VERIFY_X509_STRICT
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = client_context.wrap_bio(to_client, to_server, server_hostname=hostname)
    server = server_context.wrap_bio(to_server, to_client, server_side=True)
    done: set[ssl.SSLObject] = set()
    for _ in range(10):
        for side in (client, server):
            try:
                side.do_handshake()
                done.add(side)
            except ssl.SSLWantReadError:
                continue
    assert done == {client, server}


def make(
    held: Mapping[str, bytes] | None = None, now: datetime.datetime = NOW, names: tuple[str, ...] = NAMES
) -> credentials.Material:
    return credentials.ensure(held or {}, names, now)


@pytest.mark.parametrize(
    "name",
    ["mail.example.test", "outbound", "outbound.shop", "outbound.shop.svc", "outbound.shop.svc.cluster.local"],
)
def test_clients_verify_the_server_under_every_name_of_the_relay(name: str, tmp_path: Path) -> None:
    made = make()
    handshake(made.certificate, made.key, made.authority_bundle, name, tmp_path)


def test_another_name_is_refused(tmp_path: Path) -> None:
    made = make()
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(made.certificate, made.key, made.authority_bundle, "outbound.other.svc", tmp_path)


@pytest.mark.parametrize("later", [datetime.timedelta(0), 30 * DAY, 59 * DAY])
def test_what_is_good_is_kept_octet_for_octet(later: datetime.timedelta) -> None:
    made = make()
    assert make(made.secret(), NOW + later) == made


def test_the_server_certificate_is_renewed_at_two_thirds_of_its_life_by_the_same_authority() -> None:
    made = make()
    assert NOW + 59 * DAY < made.renew_at < NOW + 61 * DAY
    renewed = make(made.secret(), made.renew_at)
    assert renewed.certificate != made.certificate
    assert renewed.key != made.key
    assert (renewed.authority_key, renewed.authority_bundle) == (made.authority_key, made.authority_bundle)


def test_a_renewed_authority_keeps_the_old_one_in_the_bundle(tmp_path: Path) -> None:
    made = make()
    renewed = make(made.secret(), NOW + 2500 * DAY)
    assert renewed.authority_key != made.authority_key
    assert len(x509.load_pem_x509_certificates(renewed.authority_bundle)) == 2
    assert renewed.authority_bundle.endswith(made.authority_bundle)
    handshake(made.certificate, made.key, renewed.authority_bundle, "outbound", tmp_path)


def test_another_host_name_needs_another_certificate_but_no_other_authority() -> None:
    made = make()
    changed = make(made.secret(), names=credentials.service_names("new.example.test", "outbound", "shop"))
    assert changed.certificate != made.certificate
    assert changed.authority_bundle == made.authority_bundle


@pytest.mark.parametrize("key", ["ca.key", "ca.crt", "tls.crt", "tls.key"])
@pytest.mark.parametrize(
    "content", [b"", b"not PEM at all", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"]
)
def test_what_was_damaged_is_made_anew_and_works(key: str, content: bytes, tmp_path: Path) -> None:
    made = make({**make().secret(), key: content})
    handshake(made.certificate, made.key, made.authority_bundle, "outbound.shop.svc", tmp_path)
    assert make(made.secret()) == made


def test_a_certificate_of_another_authority_is_not_kept(tmp_path: Path) -> None:
    made, other = make(), make()
    mixed = make({**made.secret(), "tls.crt": other.certificate, "tls.key": other.key})
    handshake(mixed.certificate, mixed.key, mixed.authority_bundle, "outbound", tmp_path)


def test_expiry_reads_the_first_certificate_of_a_chain() -> None:
    made = make()
    assert credentials.expiry(made.certificate + made.authority_bundle) == NOW + credentials.SERVER_LIFE
    assert credentials.expiry(b"nothing") is None


def test_a_password_has_256_bits_and_needs_no_quoting() -> None:
    asked: list[int] = []

    def randomness(octets: int) -> bytes:
        asked.append(octets)
        return b"\xff" * octets

    assert credentials.new_password(randomness) == "_" * 42 + "8"
    assert asked == [32]


# --- Passwords of SmtpUsers -------------------------------------------------------------------------------------------

MONTH = datetime.timedelta(days=30)


def numbered() -> Callable[[int], bytes]:
    numbers = itertools.count(1)
    return lambda length: next(numbers).to_bytes(length, "big")


def test_a_password_is_replaced_in_time_and_the_former_one_is_taken_for_the_overlap() -> None:
    random = numbered()
    first = rotated(None, MONTH, DAY, NOW, random)
    assert rotated(first, MONTH, DAY, NOW + MONTH - DAY, random) == first
    assert next_rotation(first, MONTH) == NOW + MONTH
    second = rotated(first, MONTH, DAY, NOW + MONTH, random)
    assert second.current != first.current
    assert (second.former, second.former_until) == (first.current, NOW + MONTH + DAY)
    assert rotated(second, MONTH, DAY, NOW + MONTH + DAY / 2, random) == second
    third = rotated(second, MONTH, DAY, NOW + MONTH + DAY, random)
    assert (third.current, third.former, third.made_at) == (second.current, None, second.made_at)


def test_without_rotation_a_password_stays_and_an_overlap_that_was_promised_is_kept() -> None:
    random = numbered()
    first = rotated(None, None, DAY, NOW, random)
    assert rotated(first, None, DAY, NOW + 100 * MONTH, random) == first
    assert next_rotation(first, None) is None
    second = rotated(first, MONTH, DAY, NOW + MONTH, random)
    assert rotated(second, None, datetime.timedelta(0), NOW + MONTH + DAY / 2, random).former == first.current
