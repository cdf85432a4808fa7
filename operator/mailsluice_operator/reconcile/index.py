"""Who refers to whom: the relays that name a Secret, the users of a relay. Kept current as the watches tell."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from mailsluice_operator.cluster.objects import SECRET, SMTP_RELAY, SMTP_USER, Object, Reference, reference_of
from mailsluice_operator.resource.models import relay_from
from mailsluice_operator.resource.references import secret_uses


class Index:
    """References from relays and users, both ways."""

    def __init__(self) -> None:
        self._secrets: dict[Reference, frozenset[Reference]] = {}
        self._referrers: dict[Reference, set[Reference]] = {}
        self._relay_of: dict[Reference, Reference] = {}
        self._users: dict[Reference, set[Reference]] = {}

    def set_secrets(self, relay: Reference, names: Iterable[str]) -> frozenset[Reference]:
        """The Secrets that the relay names from now on; returns those that nobody names any more."""
        new = frozenset(Reference(SECRET, relay.namespace, name) for name in names)
        old = self._secrets.get(relay, frozenset())
        for secret in new - old:
            self._referrers.setdefault(secret, set()).add(relay)
        for secret in old - new:
            self._referrers[secret].discard(relay)
            if not self._referrers[secret]:
                del self._referrers[secret]
        if new:
            self._secrets[relay] = new
        else:
            self._secrets.pop(relay, None)
        return frozenset(secret for secret in old - new if secret not in self._referrers)

    def referrers(self, secret: Reference) -> frozenset[Reference]:
        """The relays that name this Secret."""
        return frozenset(self._referrers.get(secret, ()))

    def set_relay(self, user: Reference, relay: Reference | None) -> None:
        """The relay that the user wants to send through; None when the user is gone."""
        old = self._relay_of.pop(user, None)
        if old is not None:
            self._users[old].discard(user)
            if not self._users[old]:
                del self._users[old]
        if relay is not None:
            self._relay_of[user] = relay
            self._users.setdefault(relay, set()).add(user)

    def users(self, relay: Reference) -> frozenset[Reference]:
        """The SmtpUsers that name this relay, granted or not."""
        return frozenset(self._users.get(relay, ()))

    def relay_of(self, user: Reference) -> Reference | None:
        return self._relay_of.get(user)


def relay_named_by(user: Object) -> Reference:
    """The relay in a SmtpUser's spec."""
    where = reference_of(user, SMTP_USER)
    reference = user["spec"]["relayRef"]
    return Reference(SMTP_RELAY, reference.get("namespace") or where.namespace, reference["name"])


def secrets_named_by(relay: Object) -> frozenset[str]:
    """The Secrets in a SmtpRelay's spec; none when it cannot be read, which its own reconcile reports."""
    try:
        return frozenset(use.name for use in secret_uses(relay_from(relay)))
    except msgspec.ValidationError:
        return frozenset()
