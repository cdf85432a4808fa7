"""One SmtpUser: its Secret with everything that is needed to send, and its status.

The login itself reaches the relay by the relay's own reconcile, which reads the Secret made here.
"""

from __future__ import annotations

import datetime
from typing import Final

import msgspec

from mailsluice_operator import desired
from mailsluice_operator.children.facts import Fact
from mailsluice_operator.children.metadata import authority_name
from mailsluice_operator.cluster.objects import CONFIG_MAP, SECRET, SMTP_USER, Object, Reference
from mailsluice_operator.credentials import Passwords, next_rotation, rotated
from mailsluice_operator.reconcile import users
from mailsluice_operator.reconcile.context import Context, Key
from mailsluice_operator.reconcile.index import relay_named_by
from mailsluice_operator.reconcile.writing import NotMadeError, delete_unwanted, ensure_child, write_status
from mailsluice_operator.resource.models import SmtpRelay, SmtpUser, relay_from, user_from
from mailsluice_operator.resource.quantities import seconds
from mailsluice_operator.resource.status import SmtpUserStatus
from mailsluice_operator.status import user_status
from mailsluice_relay.config import login_key

NOT_MADE_RETRY: Final = 30.0
"""Seconds after which is looked again whether a foreign Secret still has the name, or the API server still refuses
ours: no watch tells of it."""

POSTPONED: Final = 60.0
"""Seconds after which is looked again whether the relay takes a new password."""


async def reconcile_user(context: Context, key: Key) -> float | None:
    """Bring one user to what is wanted; returns in how many seconds to look again, if at all."""
    body = context.store.get(key)
    if body is None or "deletionTimestamp" in body["metadata"] or context.namespace_goes(key.namespace):
        return None  # its Secret goes with it, and the relay's own reconcile takes the login away
    try:
        user = user_from(body)
    except msgspec.ValidationError as error:
        # The schema lets nothing of the kind in; an older one may have. The parts that can be read carry the status.
        await _report(context, body, None, Fact("Invalid", f"{error}; correct it."), None, None)
        return None
    relay_key = relay_named_by(body)
    relay_body = context.store.get(relay_key)
    relay = _relay(relay_body)
    if relay is None or relay_body is None:
        refused = Fact(
            "RelayNotFound",
            f"spec.relayRef: there is no SmtpRelay {relay_key.namespace}/{relay_key.name}; create it, or correct the "
            "name.",
        )
        await _report(context, body, user, refused, None, None)
        return None
    decision = next(
        (made for made in users.decisions(context, relay_key, relay) if made.user.metadata.uid == user.metadata.uid),
        None,
    )
    if decision is None:  # the index will have it when the watch has told; the event brings this key back
        return None
    if decision.refused is not None:
        await _report(context, body, user, decision.refused, None, relay)
        return None
    passwords = _passwords(context, user, relay)
    unready = await _ensure_secret(context, user, relay, relay_key, passwords)
    if unready is not None:
        await _report(context, body, user, None, unready, relay)
        return NOT_MADE_RETRY if unready.reason in ("NameTaken", "ChildRefused") else None
    await _report(context, body, user, None, _relay_unready(relay), relay, passwords)
    return _until_change(context, user, passwords)


def key_of(user: SmtpUser) -> Key:
    return Reference(SMTP_USER, user.metadata.namespace, user.metadata.name)


def _relay(body: Object | None) -> SmtpRelay | None:
    if body is None:
        return None
    try:
        return relay_from(body)
    except msgspec.ValidationError:  # the relay's own status says so
        return None


def _secret_of(user: SmtpUser) -> Reference:
    return Reference(SECRET, user.metadata.namespace, desired.user_secret_name(user))


def _every(user: SmtpUser) -> datetime.timedelta | None:
    rotation = user.spec.rotation
    return datetime.timedelta(seconds=seconds(rotation.every)) if rotation is not None else None


def _takes_changes(relay: SmtpRelay) -> bool:
    """Whether the relay would learn of a new password: not while it is paused, or its configuration cannot be used."""
    return not relay.spec.paused and any(
        condition.type == "ConfigurationValid" and condition.status == "True" for condition in relay.status.conditions
    )


def _passwords(context: Context, user: SmtpUser, relay: SmtpRelay) -> Passwords:
    """The passwords that the user has from now on."""
    rotation = user.spec.rotation
    overlap = datetime.timedelta(seconds=seconds(rotation.overlap) if rotation is not None else 0.0)
    held = users.passwords_of(context.store.get(_secret_of(user)), user)
    if held is not None and not _takes_changes(relay):
        return held
    return rotated(held, _every(user), overlap, context.now(), context.randomness)


def _until_change(context: Context, user: SmtpUser, passwords: Passwords) -> float | None:
    """Seconds until the time of one of the passwords is over."""
    moments = [moment for moment in (passwords.former_until, next_rotation(passwords, _every(user))) if moment]
    if not moments:
        return None
    left = (min(moments) - context.now()).total_seconds()
    return left + 1.0 if left > 0 else POSTPONED


async def _ensure_secret(
    context: Context, user: SmtpUser, relay: SmtpRelay, relay_key: Key, passwords: Passwords
) -> Fact | None:
    """Make or repair the Secret; returns why it cannot be."""
    where = _secret_of(user)
    authority = context.store.get(Reference(CONFIG_MAP, relay_key.namespace, authority_name(relay_key.name)))
    bundle = (authority.get("data") or {}).get("ca.crt", "").encode() if authority is not None else b""
    wanted = desired.user_secret(relay, user, passwords, bundle)
    if wanted is None:
        return Fact(
            "NoListener",
            f"SmtpRelay {relay_key.namespace}/{relay_key.name} has no listener with TLS to send a password to.",
        )
    before = context.store.get(where)
    try:
        after = await ensure_child(context, wanted)
    except NotMadeError as error:
        return error.fact
    body = context.store.get(key_of(user))
    if body is not None:  # a Secret of a former secretName
        await delete_unwanted(context, body, [wanted])
    if before is None or after["metadata"]["resourceVersion"] != before["metadata"]["resourceVersion"]:
        context.enqueue(relay_key, 0.0)
    return None


def _relay_unready(relay: SmtpRelay) -> Fact | None:
    ready = next((condition for condition in relay.status.conditions if condition.type == "Ready"), None)
    if ready is not None and ready.status == "True":
        return None
    why = ready.message if ready is not None else "it was only just created."
    return Fact("RelayNotReady", f"SmtpRelay {relay.metadata.namespace}/{relay.metadata.name} is not ready: {why}")


async def _report(
    context: Context,
    body: Object,
    user: SmtpUser | None,
    refused: Fact | None,
    unready: Fact | None,
    relay: SmtpRelay | None,
    passwords: Passwords | None = None,
) -> None:
    status = user_status(
        user.status if user is not None else SmtpUserStatus(),
        generation=body["metadata"]["generation"],
        login=user.spec.login if user is not None else "",
        secret_name=desired.user_secret_name(user) if user is not None else "",
        refused=refused,
        unready=unready,
        suspended=user is not None
        and relay is not None
        and login_key(user.spec.login) in map(login_key, relay.spec.authentication.suspended_logins),
        rotated_at=passwords.made_at if passwords is not None else None,
        next_rotation=next_rotation(passwords, _every(user)) if passwords is not None and user is not None else None,
        now=context.now(),
    )
    if refused is not None:
        await context.tell(body, refused)
    await write_status(context, body, status)
