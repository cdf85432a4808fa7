"""Fields that this release accepts, so that manifests need not change later, but does not act on yet.

One table: the check warns of each, and the operator reports it in Degraded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

import msgspec

from mailsluice_operator.resource.models import SmtpRelay, SmtpUser, SpamRules, Upstream
from mailsluice_relay.config import IMPLEMENTED_SPAM_RULES, UpstreamType


@dataclass(frozen=True)
class NotYet:
    """One field of a resource that has no effect yet."""

    field: str
    message: str
    """What that means, and what to do meanwhile."""


def not_yet(resource: SmtpRelay | SmtpUser) -> tuple[NotYet, ...]:
    """Everything that the resource says to no effect."""
    if isinstance(resource, SmtpUser):
        return tuple(_of_user(resource))
    return tuple(found for look in _LOOKS for found in look(resource))


def _of_user(user: SmtpUser) -> Iterator[NotYet]:
    if user.spec.rotation is not None:
        yield NotYet("spec.rotation", "passwords are not changed by themselves yet; delete the Secret to get a new one")


# --- What is left out -------------------------------------------------------------------------------------------------


def _upstreams(relay: SmtpRelay) -> Iterator[NotYet]:
    for index, upstream in enumerate(relay.spec.upstreams):
        if (why := left_out(upstream)) is not None:
            yield NotYet(f"spec.upstreams[{index}].{why[0]}", why[1])


def left_out(upstream: Upstream) -> tuple[str, str] | None:
    """Why the relay cannot deliver to an upstream yet: the field and the message; None if it can."""
    if upstream.type is UpstreamType.DIRECT_TO_MX:
        return "type", f"DirectToMX is not there yet: upstream {upstream.name} is left out; use a host or a preset"
    return None


# --- What merely does not help yet ------------------------------------------------------------------------------------


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


def _spam(relay: SmtpRelay) -> Iterator[NotYet]:
    for field in msgspec.structs.fields(SpamRules):
        given = getattr(relay.spec.spam.rules, field.name)
        if given is not None and given.score > 0 and field.encode_name not in IMPLEMENTED_SPAM_RULES:
            yield NotYet(
                f"spec.spam.rules.{field.encode_name}", "this rule is not there yet: it adds nothing to scores"
            )


_LOOKS: Final[tuple[Callable[[SmtpRelay], Iterator[NotYet]], ...]] = (
    _upstreams,
    _tls,
    _authentication,
    _spam,
)
