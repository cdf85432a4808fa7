"""One SmtpUser: its Secret with everything that is needed to send, and its status.

The login itself reaches the relay by the relay's own reconcile, which reads the Secret made here.
"""

from __future__ import annotations

from typing import Final

import msgspec

from mailsluice_operator import desired
from mailsluice_operator.children.facts import Fact
from mailsluice_operator.children.metadata import authority_name
from mailsluice_operator.cluster.objects import CONFIG_MAP, SECRET, SMTP_USER, Object, Reference
from mailsluice_operator.credentials import new_password
from mailsluice_operator.reconcile import users
from mailsluice_operator.reconcile.context import Context, Key
from mailsluice_operator.reconcile.index import relay_named_by
from mailsluice_operator.reconcile.writing import NameTakenError, delete_unwanted, ensure_child, write_status
from mailsluice_operator.resource.models import SmtpRelay, SmtpUser, relay_from, user_from
from mailsluice_operator.resource.status import SmtpUserStatus
from mailsluice_operator.status import user_status
from mailsluice_relay.config import login_key

NAME_TAKEN_RETRY: Final = 30.0
"""Seconds after which is looked again whether a foreign Secret still has the name: no watch tells of it."""


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
    unready: Fact | None = None
    if decision.refused is None:
        unready = await _ensure_secret(context, user, relay, relay_key) or _relay_unready(relay)
    await _report(context, body, user, decision.refused, unready, relay)
    return NAME_TAKEN_RETRY if unready is not None and unready.reason == "NameTaken" else None


def key_of(user: SmtpUser) -> Key:
    return Reference(SMTP_USER, user.metadata.namespace, user.metadata.name)


def _relay(body: Object | None) -> SmtpRelay | None:
    if body is None:
        return None
    try:
        return relay_from(body)
    except msgspec.ValidationError:  # the relay's own status says so
        return None


async def _ensure_secret(context: Context, user: SmtpUser, relay: SmtpRelay, relay_key: Key) -> Fact | None:
    """Make or repair the Secret; returns why it cannot be."""
    where = Reference(SECRET, user.metadata.namespace, desired.user_secret_name(user))
    authority = context.store.get(Reference(CONFIG_MAP, relay_key.namespace, authority_name(relay_key.name)))
    bundle = (authority.get("data") or {}).get("ca.crt", "").encode() if authority is not None else b""
    password = users.password_of(context.store.get(where), user) or new_password(context.randomness)
    wanted = desired.user_secret(relay, user, password, bundle)
    if wanted is None:
        return Fact(
            "NoListener",
            f"SmtpRelay {relay_key.namespace}/{relay_key.name} has no listener with TLS to send a password to.",
        )
    before = context.store.get(where)
    try:
        after = await ensure_child(context, wanted)
    except NameTakenError as taken:
        return taken.fact
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
        now=context.now(),
    )
    if refused is not None:
        await context.tell(body, refused)
    await write_status(context, body, status)
