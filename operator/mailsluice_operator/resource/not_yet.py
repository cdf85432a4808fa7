"""Fields that this release accepts, so that manifests need not change later, but does not act on yet.

One table: the check warns of each, and the operator reports it in Degraded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from mailsluice_operator.resource.models import SmtpRelay, SmtpUser


@dataclass(frozen=True)
class NotYet:
    """One field of a resource that has no effect yet."""

    field: str
    message: str
    """What that means, and what to do meanwhile."""


def not_yet(resource: SmtpRelay | SmtpUser) -> tuple[NotYet, ...]:
    """Everything that the resource says to no effect."""
    if isinstance(resource, SmtpUser):  # everything in it has its effect
        return ()
    return tuple(found for look in _LOOKS for found in look(resource))


def _tls(relay: SmtpRelay) -> Iterator[NotYet]:
    if relay.spec.tls.issuer_ref is not None:
        yield NotYet("spec.tls.issuerRef", "no certificate is asked for yet; the operator's own authority makes it")
    if relay.spec.tls.client_ca_secret_ref is not None:
        yield NotYet(
            "spec.tls.clientCASecretRef", "client certificates are verified, but nobody is logged in by one yet"
        )


def _authentication(relay: SmtpRelay) -> Iterator[NotYet]:
    authentication = relay.spec.authentication
    if authentication.client_certificates is not None:
        yield NotYet(
            "spec.authentication.clientCertificates", "login with a certificate is not there yet; use passwords"
        )
    if authentication.service_account_tokens is not None:
        yield NotYet("spec.authentication.serviceAccountTokens", "login with a token is not there yet; use SmtpUser")


_LOOKS: Final[tuple[Callable[[SmtpRelay], Iterator[NotYet]], ...]] = (
    _tls,
    _authentication,
)
