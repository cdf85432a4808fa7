"""Writes, and only where something differs: children are applied or deleted, a status is applied.

An object of a child's name that somebody else made is left alone, and told about; so is what the API server refuses.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Final

import msgspec

from mailsluice_operator.children.compare import has_foreign_ports, satisfied
from mailsluice_operator.children.facts import Fact
from mailsluice_operator.children.metadata import MANAGED_BY, MANAGED_BY_LABEL, plain
from mailsluice_operator.cluster.client import ApiError
from mailsluice_operator.cluster.objects import (
    CHILDREN,
    SERVICE,
    Object,
    Reference,
    controller_of,
    labels_of,
    reference_of,
)
from mailsluice_operator.reconcile.context import Context
from mailsluice_operator.resource.status import SmtpRelayStatus, SmtpUserStatus

log = logging.getLogger(__name__)


MAXIMUM_REFUSAL: Final = 700
"""Characters of an API server's answer that are repeated: an Event carries 1024 with the remedy."""


class NotMadeError(Exception):
    """A child is not as it is wanted, and will not be before a person changes something."""

    def __init__(self, fact: Fact) -> None:
        self.fact = fact
        super().__init__(fact.message)


class NameTakenError(NotMadeError):
    """An object that is not ours has the name of a child."""

    def __init__(self, where: Reference, why: str) -> None:
        words = f"{where} exists and {why}; delete or rename it, or give this resource another name."
        super().__init__(Fact("NameTaken", words))


class ChildRefusedError(NotMadeError):
    """The API server refuses a child: a quota, a policy, a webhook, or a field that it does not take."""

    def __init__(self, where: Reference, error: ApiError) -> None:
        if error.status == 403:
            remedy = "raise the quota, or change the policy, the webhook or the right that it names"
        else:
            remedy = "correct the field that it names; one that cannot be changed: set it back, or delete the object"
        answer = error.message[:MAXIMUM_REFUSAL].rstrip(".")
        words = f"{where} is refused by the API server ({answer}): {remedy}. It is tried again within a minute."
        super().__init__(Fact("ChildRefused", words))


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
    try:
        if where.kind is SERVICE and found is not None and has_foreign_ports(body, found):
            # A port that was edited by hand would stay beside ours, with our port's name: applying would be refused.
            await context.cluster.set_ports(found, body["spec"]["ports"])
        applied = await context.cluster.apply(body)
    except ApiError as error:
        if error.permanent:
            raise ChildRefusedError(where, error) from error
        raise
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
