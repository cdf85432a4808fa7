"""What the watches have told about the cluster: the newest known state of each object, by address.

Watch events, listings and the API's answers to our own writes arrive in any order; resourceVersions decide which is
newer (they are comparable integers, KEP-5504).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from mailsluice_operator.cluster.objects import Kind, Object, Reference, controller_of, labels_of, reference_of


def resource_version(body: Object) -> int:
    return int(body["metadata"]["resourceVersion"])


class Store:
    """Objects by kind, namespace and name; and by what they belong to, so that a reconcile does not walk over all."""

    def __init__(self, label: str) -> None:
        """`label` is the one whose value names what an object belongs to, within its namespace."""
        self._label = label
        self._objects: dict[Kind, dict[tuple[str, str], Object]] = {}
        self._groups: dict[tuple[str, ...], set[Reference]] = {}

    def put(self, kind: Kind, body: Object) -> bool:
        """Take in an object's state; False when a newer one, or this one, is known already."""
        where = reference_of(body, kind)
        known = self.get(where)
        if known is not None and resource_version(known) >= resource_version(body):
            return False
        if known is not None:
            self._ungroup(where, known)
        if "managedFields" in body["metadata"]:  # as big as the object itself, and never asked for
            metadata = {key: value for key, value in body["metadata"].items() if key != "managedFields"}
            body = {**body, "metadata": metadata}
        self._objects.setdefault(kind, {})[where.namespace, where.name] = body
        for group in self._groups_of(body):
            self._groups.setdefault(group, set()).add(where)
        return True

    def remove(self, kind: Kind, body: Object) -> bool:
        """Take in an object's deletion; False when it has been made anew since."""
        where = reference_of(body, kind)
        known = self.get(where)
        if known is None or resource_version(known) > resource_version(body):
            return False
        self.discard(where)
        return True

    def discard(self, where: Reference) -> None:
        """Forget an object of which the API has just said that it is not there."""
        known = self._objects.get(where.kind, {}).pop((where.namespace, where.name), None)
        if known is not None:
            self._ungroup(where, known)

    def replace(self, kind: Kind, items: Iterable[Object], listed_at: int) -> set[Reference]:
        """Take in a listing of a kind: also what is not in it any more is news. Returns what was new to the store."""
        changed: set[Reference] = set()
        listed: set[tuple[str, str]] = set()
        for body in items:
            where = reference_of(body, kind)
            listed.add((where.namespace, where.name))
            if self.put(kind, body):
                changed.add(where)
        for address, body in list(self._objects.get(kind, {}).items()):
            if address not in listed and resource_version(body) <= listed_at:
                where = Reference(kind, *address)
                self.discard(where)
                changed.add(where)
        return changed

    def get(self, where: Reference) -> Object | None:
        return self._objects.get(where.kind, {}).get((where.namespace, where.name))

    def all(self, kind: Kind) -> Iterator[Object]:
        yield from self._objects.get(kind, {}).values()

    def labelled(self, namespace: str, value: str) -> Mapping[Reference, Object]:
        """The objects of a namespace that carry the label with this value."""
        return self._members((namespace, value))

    def owned(self, uid: str) -> Mapping[Reference, Object]:
        """The objects whose controller this is."""
        return self._members((uid,))

    def _members(self, group: tuple[str, ...]) -> Mapping[Reference, Object]:
        found: dict[Reference, Object] = {}
        for where in sorted(self._groups.get(group, ()), key=str):
            body = self.get(where)
            if body is not None:
                found[where] = body
        return found

    def _groups_of(self, body: Object) -> Iterator[tuple[str, ...]]:
        value = labels_of(body).get(self._label)
        if value is not None:
            yield body["metadata"].get("namespace", ""), value
        controller = controller_of(body)
        if controller is not None:
            yield (controller["uid"],)

    def _ungroup(self, where: Reference, body: Object) -> None:
        for group in self._groups_of(body):
            members = self._groups[group]
            members.discard(where)
            if not members:
                del self._groups[group]
