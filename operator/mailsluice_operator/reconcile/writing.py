"""Writes, and only where something differs: children are applied or deleted, a status is applied.

An object of a child's name that somebody else made is left alone, and told about.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

import msgspec

from mailsluice_operator.children.compare import satisfied
from mailsluice_operator.children.facts import Fact
from mailsluice_operator.children.metadata import MANAGED_BY, MANAGED_BY_LABEL, plain
from mailsluice_operator.cluster.objects import (
    CHILDREN,
    Object,
    Reference,
    controller_of,
    labels_of,
    reference_of,
)
from mailsluice_operator.reconcile.context import Context
from mailsluice_operator.resource.status import SmtpRelayStatus, SmtpUserStatus

log = logging.getLogger(__name__)


class NameTakenError(Exception):
    """An object that is not ours has the name of a child."""

    def __init__(self, where: Reference, why: str) -> None:
        self.fact = Fact(
            "NameTaken", f"{where} exists and {why}; delete or rename it, or give this resource another name."
        )
        super().__init__(self.fact.message)


async def ensure_child(context: Context, body: Object) -> Object:
    """Bring a child to what is wanted; returns it as it then is. No request when it is so already."""
    where = reference_of(body)
    known = context.store.get(where)
    found = known
    if found is None:  # the watch shows only what carries our label
        found = await context.cluster.get(where)
    if found is not None:
        _check_ours(where, found, body)
    if known is not None and satisfied(body, known):
        return known
    applied = await context.cluster.apply(body)
    context.store.put(where.kind, applied)
    return applied


def _check_ours(where: Reference, found: Object, body: Object) -> None:
    """Ours is what our resource controls; and what it does not any more but what still carries its labels."""
    wanted_owner = controller_of(body)
    owner = controller_of(found)
    if wanted_owner is None or (owner is not None and owner["uid"] == wanted_owner["uid"]):
        return
    if owner is not None:
        raise NameTakenError(where, f"belongs to {owner['kind']} {owner['name']} (uid {owner['uid']})")
    labels = labels_of(found)
    if any(labels.get(key) != value for key, value in labels_of(body).items()):
        raise NameTakenError(where, "was not made by this operator")


async def delete_unwanted(context: Context, owner: Object, wanted: Iterable[Object]) -> None:
    """Delete the children of a resource that are not wanted any more."""
    keep = {reference_of(body) for body in wanted}
    for where, body in context.store.owned(owner["metadata"]["uid"]).items():
        if (
            where.kind in CHILDREN
            and where not in keep
            and labels_of(body).get(MANAGED_BY_LABEL) == MANAGED_BY
            and "deletionTimestamp" not in body["metadata"]
        ):
            await context.cluster.delete(where, body["metadata"]["uid"])
            context.store.discard(where)


async def write_status(context: Context, resource: Object, status: SmtpRelayStatus | SmtpUserStatus) -> None:
    """Apply the status, if it says something else than what is there. The schema's defaults make no difference."""
    try:
        if msgspec.convert(resource.get("status") or {}, type(status)) == status:
            return
    except msgspec.ValidationError as error:  # written by another release, or by hand
        log.info("%s: the status is made anew: %s", reference_of(resource), error)
    where = reference_of(resource)
    body = {
        "apiVersion": where.kind.api_version,
        "kind": where.kind.name,
        "metadata": {"name": where.name, "namespace": where.namespace, "uid": resource["metadata"]["uid"]},
        "status": plain(status),
    }
    context.store.put(where.kind, await context.cluster.apply_status(body))
