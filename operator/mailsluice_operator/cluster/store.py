"""What the watches have told about the cluster: the newest known state of each object, by address.

Watch events, listings and the API's answers to our own writes arrive in any order; resourceVersions decide which is
newer (they are comparable integers, KEP-5504).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass

import msgspec

from mailsluice_operator.cluster.objects import Kind, Object, Reference, controller_of, labels_of, reference_of


def resource_version(body: Object) -> int:
    return int(body["metadata"]["resourceVersion"])


@dataclass(frozen=True, slots=True)
class _Entry:
    version: int
    packed: bytes
    """The object as JSON: a thousand relays have ten thousand objects, which take ten times as much room unpacked."""
    groups: tuple[tuple[str, ...], ...]


class Store:
    """Objects by kind, namespace and name; and by what they belong to, so that a reconcile does not walk over all."""

    def __init__(self, label: str) -> None:
        """`label` is the one whose value names what an object belongs to, within its namespace."""
        self._label = label
        self._entries: dict[Kind, dict[tuple[str, str], _Entry]] = {}
        self._groups: dict[tuple[str, ...], set[Reference]] = {}

    def put(self, kind: Kind, body: Object) -> bool:
        """Take in an object's state; False when a newer one, or this one, is known already."""
        where = reference_of(body, kind)
        known = self._entry(where)
        version = resource_version(body)
        if known is not None and known.version >= version:
            return False
        if known is not None:
            self._ungroup(where, known)
        if "managedFields" in body["metadata"]:  # as big as the object itself, and never asked for
            metadata = {key: value for key, value in body["metadata"].items() if key != "managedFields"}
            body = {**body, "metadata": metadata}
        entry = _Entry(version, msgspec.json.encode(body), tuple(self._groups_of(body)))
        self._entries.setdefault(kind, {})[where.namespace, where.name] = entry
        for group in entry.groups:
            self._groups.setdefault(group, set()).add(where)
        return True

    def remove(self, kind: Kind, body: Object) -> bool:
        """Take in an object's deletion; False when it has been made anew since."""
        where = reference_of(body, kind)
        known = self._entry(where)
        if known is None or known.version > resource_version(body):
            return False
        self.discard(where)
        return True

    def discard(self, where: Reference) -> None:
        """Forget an object of which the API has just said that it is not there."""
        known = self._entries.get(where.kind, {}).pop((where.namespace, where.name), None)
        if known is not None:
            self._ungroup(where, known)

    def get(self, where: Reference) -> Object | None:
        """The newest known state; a copy, which the caller may change."""
        entry = self._entry(where)
        return _unpacked(entry) if entry is not None else None

    def all(self, kind: Kind) -> Iterator[Object]:
        for entry in list(self._entries.get(kind, {}).values()):
            yield _unpacked(entry)

    def unlisted(self, kind: Kind, listed: Set[Reference], listed_at: int) -> list[Reference]:
        """What is known of a kind, but was not there any more when it was listed."""
        return [
            where
            for address, entry in self._entries.get(kind, {}).items()
            if entry.version <= listed_at and (where := Reference(kind, *address)) not in listed
        ]

    def labelled(self, namespace: str, value: str) -> Mapping[Reference, Object]:
        """The objects of a namespace that carry the label with this value."""
        return self._members((namespace, value))

    def owned(self, uid: str) -> Mapping[Reference, Object]:
        """The objects whose controller this is."""
        return self._members((uid,))

    def _entry(self, where: Reference) -> _Entry | None:
        return self._entries.get(where.kind, {}).get((where.namespace, where.name))

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

    def _ungroup(self, where: Reference, entry: _Entry) -> None:
        for group in entry.groups:
            members = self._groups[group]
            members.discard(where)
            if not members:
                del self._groups[group]


def _unpacked(entry: _Entry) -> Object:
    body: Object = msgspec.json.decode(entry.packed)
    return body
