"""Secrets that relays name: read once, then watched by the label that is put on them, and released again."""

from __future__ import annotations

from mailsluice_operator.children import configuration
from mailsluice_operator.children.metadata import MANAGED_BY, MANAGED_BY_LABEL, WATCH_LABEL
from mailsluice_operator.children.secrets import decoded
from mailsluice_operator.cluster.client import FIELD_MANAGER
from mailsluice_operator.cluster.objects import SECRET, Object, Reference, labels_of
from mailsluice_operator.reconcile.context import Context, Key


async def read(context: Context, where: Reference) -> Object | None:
    """The Secret as the watch has it. One that is not watched yet is fetched, and watched from now on."""
    known = context.store.get(where)
    if known is not None:
        return known
    found = await context.cluster.get(where)
    if found is None:
        return None
    if labels_of(found).get(WATCH_LABEL) != "true":
        found = await _apply_labels(context, found, {WATCH_LABEL: "true"})
    context.store.put(SECRET, found)
    return found


def value_of(secret: Object) -> configuration.Secret:
    """As the configuration is made from it."""
    metadata = secret["metadata"]
    return configuration.Secret(decoded(secret), metadata["uid"], metadata["resourceVersion"])


async def reconcile_secret(context: Context, key: Key) -> None:
    """Take our label off a Secret that no relay names any more."""
    if context.index.referrers(key):
        return
    found = await context.cluster.get(key)
    if found is None or WATCH_LABEL not in labels_of(found) or labels_of(found).get(MANAGED_BY_LABEL) == MANAGED_BY:
        return
    if _labelled_by_us(found):
        await _apply_labels(context, found, {})
        context.store.discard(key)


async def _apply_labels(context: Context, secret: Object, labels: dict[str, str]) -> Object:
    """Server-side apply owns this one field. The uid makes it fail, not create, when the Secret is gone meanwhile."""
    metadata = secret["metadata"]
    body: Object = {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {
            "name": metadata["name"],
            "namespace": metadata["namespace"],
            "uid": metadata["uid"],
            **({"labels": labels} if labels else {}),
        },
    }
    return await context.cluster.apply(body)


def _labelled_by_us(secret: Object) -> bool:
    """A person may have put the label on as well; that one is theirs to take off."""
    field = f"f:{WATCH_LABEL}"
    return any(
        entry.get("manager") == FIELD_MANAGER
        and field in entry.get("fieldsV1", {}).get("f:metadata", {}).get("f:labels", {})
        for entry in secret["metadata"].get("managedFields") or ()
    )
