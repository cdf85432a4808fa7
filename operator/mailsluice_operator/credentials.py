"""The operator's own certificate authority, the server certificates of relays, and the passwords of SmtpUsers.

What exists and is still good is kept as it is, octet for octet: a reconcile that has nothing to do changes nothing. The
clock is an argument. Private keys and serial numbers come from OpenSSL's own generator; nothing else may choose them.
"""

from __future__ import annotations

import base64
import datetime
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

AUTHORITY_LIFE: Final = datetime.timedelta(days=3650)
SERVER_LIFE: Final = datetime.timedelta(days=90)
BACKDATED: Final = datetime.timedelta(hours=1)
"""Certificates are valid from this long before they are made, for clients whose clocks are behind."""
RENEWED_AFTER: Final = 2 / 3
"""The share of its life after which a certificate is renewed."""
MAXIMUM_AUTHORITIES: Final = 4
"""Certificates in the bundle that clients trust: the current authority and those before it that have not expired."""
PASSWORD_OCTETS: Final = 32

AUTHORITY_KEY: Final = "ca.key"
AUTHORITY_BUNDLE: Final = "ca.crt"
SERVER_CERTIFICATE: Final = "tls.crt"
SERVER_KEY: Final = "tls.key"


@dataclass(frozen=True)
class Material:
    """A relay's certificates and keys, PEM. The authority's key never reaches a pod."""

    authority_key: bytes
    authority_bundle: bytes
    """What clients verify with; the current authority's certificate first."""
    certificate: bytes
    key: bytes
    renew_at: datetime.datetime
    """When the next of these certificates wants to be renewed."""

    def secret(self) -> Mapping[str, bytes]:
        """As the Secret of the authority keeps it."""
        return {
            AUTHORITY_KEY: self.authority_key,
            AUTHORITY_BUNDLE: self.authority_bundle,
            SERVER_CERTIFICATE: self.certificate,
            SERVER_KEY: self.key,
        }

    def server_files(self) -> Mapping[str, bytes]:
        """As the relay is given it."""
        return {SERVER_CERTIFICATE: self.certificate, SERVER_KEY: self.key, AUTHORITY_BUNDLE: self.authority_bundle}


def service_names(
    hostname: str, service: str, namespace: str, cluster_domain: str = "cluster.local"
) -> tuple[str, ...]:
    """The names under which clients reach a relay: its host name, and its Service's in every form."""
    forms = (hostname, service, f"{service}.{namespace}", f"{service}.{namespace}.svc")
    return tuple(dict.fromkeys((*forms, f"{service}.{namespace}.svc.{cluster_domain}")))


def ensure(held: Mapping[str, bytes], names: Iterable[str], now: datetime.datetime) -> Material:
    """The material to use now: what is held as far as it is good, and new for the rest.

    An authority that is renewed stays in the bundle until it expires, so that clients with an old bundle, and new
    clients of a pod that still serves the old certificate, both verify.
    """
    wanted = tuple(dict.fromkeys(names))
    old = _certificates(held.get(AUTHORITY_BUNDLE, b""))
    authority_key = _private_key(held.get(AUTHORITY_KEY, b""))
    authority = old[0] if old else None
    bundle = held.get(AUTHORITY_BUNDLE, b"")
    if authority is None or authority_key is None or not _good(authority, authority_key, now):
        authority_key = ec.generate_private_key(ec.SECP256R1())
        authority = _new_authority(authority_key, now)
        still_valid = [certificate for certificate in old if certificate.not_valid_after_utc > now]
        bundle = _pem(authority, *still_valid[: MAXIMUM_AUTHORITIES - 1])
        authority_pem = _key_pem(authority_key)
    else:
        authority_pem = held[AUTHORITY_KEY]
    key = _private_key(held.get(SERVER_KEY, b""))
    certificates = _certificates(held.get(SERVER_CERTIFICATE, b""))
    if (
        key is not None
        and certificates
        and _good(certificates[0], key, now)
        and _issued_by(certificates[0], authority)
        and _names(certificates[0]) == set(wanted)
    ):
        certificate, certificate_pem, key_pem = certificates[0], held[SERVER_CERTIFICATE], held[SERVER_KEY]
    else:
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = _new_server(key, wanted, authority, authority_key, now)
        certificate_pem, key_pem = _pem(certificate), _key_pem(key)
    return Material(
        authority_key=authority_pem,
        authority_bundle=bundle,
        certificate=certificate_pem,
        key=key_pem,
        renew_at=min(_renewal(certificate), _renewal(authority)),
    )


def expiry(chain: bytes) -> datetime.datetime | None:
    """When the first certificate of a PEM chain expires; None when there is none to read."""
    certificates = _certificates(chain)
    return certificates[0].not_valid_after_utc if certificates else None


def new_password(randomness: Callable[[int], bytes]) -> str:
    """A password of 256 bits that needs no quoting in a URL, a shell or an environment file."""
    return base64.urlsafe_b64encode(randomness(PASSWORD_OCTETS)).rstrip(b"=").decode("ascii")


@dataclass(frozen=True)
class Passwords:
    """The password of a SmtpUser, and for as long as both are taken the one before it."""

    current: str
    made_at: datetime.datetime
    former: str | None = None
    former_until: datetime.datetime | None = None


def rotated(
    held: Passwords | None,
    every: datetime.timedelta | None,
    overlap: datetime.timedelta,
    now: datetime.datetime,
    randomness: Callable[[int], bytes],
) -> Passwords:
    """The passwords to use now: those that are held, until the current one's time or the former one's is over.

    `every` is None where passwords stay. How long a former one is taken was decided when it was replaced.
    """
    if held is None:
        return Passwords(new_password(randomness), now)
    if every is not None and now >= held.made_at + every:
        return Passwords(new_password(randomness), now, held.current, now + overlap)
    if held.former_until is not None and now >= held.former_until:
        return Passwords(held.current, held.made_at)
    return held


def next_rotation(held: Passwords, every: datetime.timedelta | None) -> datetime.datetime | None:
    """When the current password is replaced; None: never."""
    return held.made_at + every if every is not None else None


def _certificates(pem: bytes) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(pem)
    except ValueError:  # nothing held, or something else than certificates: made anew
        return []


def _private_key(pem: bytes) -> ec.EllipticCurvePrivateKey | None:
    try:
        key = serialization.load_pem_private_key(pem, password=None)
    except (ValueError, TypeError):  # nothing held, something else than a key, or an encrypted one: made anew
        return None
    return key if isinstance(key, ec.EllipticCurvePrivateKey) else None


def _good(certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey, now: datetime.datetime) -> bool:
    return certificate.public_key() == key.public_key() and certificate.not_valid_before_utc <= now < _renewal(
        certificate
    )


def _renewal(certificate: x509.Certificate) -> datetime.datetime:
    life = certificate.not_valid_after_utc - certificate.not_valid_before_utc
    return certificate.not_valid_before_utc + life * RENEWED_AFTER


def _issued_by(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def _names(certificate: x509.Certificate) -> set[str]:
    try:
        extension = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except x509.ExtensionNotFound:
        return set()
    return set(extension.value.get_values_for_type(x509.DNSName))


def _builder(
    common_name: str,
    issuer: x509.Name | None,
    key: ec.EllipticCurvePrivateKey,
    issuer_key: ec.EllipticCurvePrivateKey,
    now: datetime.datetime,
    life: datetime.timedelta,
) -> x509.CertificateBuilder:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name[:64])])  # ub-common-name, RFC 5280 A.1
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer if issuer is not None else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATED)
        .not_valid_after(now + life)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _new_authority(key: ec.EllipticCurvePrivateKey, now: datetime.datetime) -> x509.Certificate:
    # Names of authorities differ, so that a verifier with two of them in its bundle tries the right one.
    name = f"mailsluice {now:%Y-%m-%d %H:%M:%S}"
    return (
        _builder(name, None, key, key, now, AUTHORITY_LIFE)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .sign(key, hashes.SHA256())
    )


def _new_server(
    key: ec.EllipticCurvePrivateKey,
    names: tuple[str, ...],
    authority: x509.Certificate,
    authority_key: ec.EllipticCurvePrivateKey,
    now: datetime.datetime,
) -> x509.Certificate:
    return (
        _builder(names[0], authority.subject, key, authority_key, now, SERVER_LIFE)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name) for name in names]), critical=False)
        .sign(authority_key, hashes.SHA256())
    )


def _pem(*certificates: x509.Certificate) -> bytes:
    return b"".join(certificate.public_bytes(serialization.Encoding.PEM) for certificate in certificates)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
