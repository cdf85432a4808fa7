"""The SmtpUsers of a relay: who is granted, with which password, and the hashes of passwords."""

from __future__ import annotations

import base64
import datetime
from collections.abc import Mapping
from typing import Final

import msgspec

from mailsluice_operator import desired
from mailsluice_operator.children import configuration
from mailsluice_operator.children.metadata import FORMER_UNTIL_ANNOTATION, ROTATED_ANNOTATION
from mailsluice_operator.children.secrets import BINDING_TYPE, FORMER_PASSWORD_KEY, decoded
from mailsluice_operator.cluster.objects import (
    NAMESPACE,
    SECRET,
    Object,
    Reference,
    annotations_of,
    controller_of,
    labels_of,
)
from mailsluice_operator.credentials import Passwords
from mailsluice_operator.desired import Decision
from mailsluice_operator.reconcile.context import Context, Key
from mailsluice_operator.reconcile.secrets import value_of
from mailsluice_operator.resource.models import SmtpRelay, SmtpUser, user_from
from mailsluice_relay.config import User, hash_password

MINIMUM_PASSWORD: Final = 32
"""Characters of a password that is kept though it is not the one that was made."""


def decisions(context: Context, relay_key: Key, relay: SmtpRelay) -> list[Decision]:
    """Who of the relay's users gets a login, by what the watches know now."""
    users: list[SmtpUser] = []
    for reference in context.index.users(relay_key):
        body = context.store.get(reference)
        if body is None or "deletionTimestamp" in body["metadata"]:
            continue
        try:
            users.append(user_from(body))
        except msgspec.ValidationError:  # its own reconcile reports it; it cannot have a login
            continue
    namespaces = {user.metadata.namespace: namespace_labels(context, user.metadata.namespace) for user in users}
    return desired.decide(relay, users, namespaces, context.own_logins.get(relay_key, frozenset()))


def namespace_labels(context: Context, namespace: str) -> Mapping[str, str] | None:
    body = context.store.get(Reference(NAMESPACE, "", namespace))
    return labels_of(body) if body is not None else None


def passwords_of(secret: Object | None, user: SmtpUser) -> Passwords | None:
    """The passwords in a user's Secret, if the Secret is this user's own and they may be kept."""
    if secret is None or secret.get("type") != BINDING_TYPE:
        return None
    owner = controller_of(secret)
    if owner is not None and owner["uid"] != user.metadata.uid:
        return None
    try:
        data = {key: value.decode() for key, value in decoded(secret).items()}
    except UnicodeDecodeError:
        return None
    password = data.get("password", "")
    if data.get("username") != user.spec.login or len(password) < MINIMUM_PASSWORD:
        return None
    annotations, former = annotations_of(secret), data.get(FORMER_PASSWORD_KEY, "")
    former_until = _moment(annotations.get(FORMER_UNTIL_ANNOTATION))
    made_at = _moment(annotations.get(ROTATED_ANNOTATION)) or _moment(secret["metadata"]["creationTimestamp"])
    if made_at is None:
        return None
    if former_until is None or len(former) < MINIMUM_PASSWORD:
        return Passwords(password, made_at)
    return Passwords(password, made_at, former, former_until)


def _moment(text: str | None) -> datetime.datetime | None:
    """A time of an annotation; None where somebody has taken it off or made something else of it."""
    try:
        found = datetime.datetime.fromisoformat(text or "")
    except ValueError:
        return None
    return found if found.tzinfo is not None else None


class Hashes:
    """Password hashes by their salt, which stands for one version of one Secret.

    Making a hash costs 45 ms of a core, and an operator that starts meets thousands that were made before.
    """

    def __init__(self) -> None:
        self._known: dict[str, str] = {}

    def learn(self, users: tuple[User, ...]) -> None:
        """Take over hashes that an earlier run made."""
        for user in users:
            for text in user.hashes:
                if text.startswith("$scrypt$"):
                    self._known.setdefault(text.split("$")[3], text)

    def of(self, passwords: Passwords, secret: configuration.Secret) -> tuple[str, ...]:
        """The hashes of all passwords that a user may log in with now."""
        hashes = [self(passwords.current, secret.salt)]
        if passwords.former is not None:
            hashes.append(self(passwords.former, secret.former_salt))
        return tuple(hashes)

    def __call__(self, password: str, salt: bytes) -> str:
        """The hash; made only when this version of the Secret has not been met."""
        name = base64.b64encode(salt).decode().rstrip("=")
        known = self._known.get(name)
        if known is None:
            known = self._known[name] = hash_password(password, salt)
        return known


def granted(
    context: Context, relay_key: Key, relay: SmtpRelay
) -> list[tuple[SmtpUser, configuration.Secret, Passwords]]:
    """The users that get a login, whose Secret is there, with the passwords in it."""
    found: list[tuple[SmtpUser, configuration.Secret, Passwords]] = []
    for decision in decisions(context, relay_key, relay):
        user = decision.user
        secret = context.store.get(Reference(SECRET, user.metadata.namespace, desired.user_secret_name(user)))
        passwords = passwords_of(secret, user)
        if decision.refused is None and secret is not None and passwords is not None:
            found.append((user, value_of(secret), passwords))
    return found
