"""What the cluster says of the StatefulSet or Deployment that runs a relay's pods now, and of its volumes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from mailsluice_operator.children.workload import QUEUE_VOLUME
from mailsluice_operator.cluster.objects import CLAIM, DEPLOYMENT, STATEFUL_SET, Object, Reference
from mailsluice_operator.desired import Volume
from mailsluice_operator.reconcile.context import Context, Key
from mailsluice_operator.resource.quantities import octets

_CLAIM_FIELDS: Final = ("accessModes", "resources", "storageClassName")
"""What `children.workload` says of a claim; the API server adds a status and defaults."""


@dataclass(frozen=True)
class Workload:
    """A view of the object; of none, when there is none yet."""

    body: Object | None

    @staticmethod
    def of(context: Context, relay: Key) -> Workload:
        """A StatefulSet counts before a Deployment: it has queues to lose."""
        for kind in (STATEFUL_SET, DEPLOYMENT):
            body = context.store.get(Reference(kind, relay.namespace, relay.name))
            if body is not None:
                return Workload(body)
        return Workload(None)

    @property
    def is_persistent(self) -> bool:
        return self.body is not None and self.body["kind"] == STATEFUL_SET.name

    @property
    def going(self) -> bool:
        return self.body is not None and "deletionTimestamp" in self.body["metadata"]

    @property
    def replicas(self) -> int:
        """How many it has been told to run."""
        return int(self.body["spec"].get("replicas", 1)) if self.body is not None else 0

    @property
    def claims(self) -> list[Object] | None:
        """The volume claims of a StatefulSet, which can never be changed, as they were applied."""
        if self.body is None or not self.is_persistent:
            return None
        found: list[Object] = [
            {
                "apiVersion": "v1",
                "kind": "PersistentVolumeClaim",
                "metadata": {key: claim["metadata"][key] for key in ("name", "labels") if key in claim["metadata"]},
                "spec": {key: claim["spec"][key] for key in _CLAIM_FIELDS if key in claim["spec"]},
            }
            for claim in self.body["spec"]["volumeClaimTemplates"]
        ]
        return found

    @property
    def seen_by_controller(self) -> bool:
        """The counts in its status are of its newest spec."""
        return self.body is not None and self.count("observedGeneration") >= self.body["metadata"]["generation"]

    def count(self, field: str) -> int:
        return int((self.body.get("status") or {}).get(field, 0)) if self.body is not None else 0


def claim_of(relay: Key, ordinal: int) -> Reference:
    """The claim of one replica's queue."""
    return Reference(CLAIM, relay.namespace, f"{QUEUE_VOLUME}-{relay.name}-{ordinal}")


def volumes(context: Context, relay: Key, replicas: int) -> list[Volume]:
    """The volumes of the first so many replicas, as far as they exist: from an earlier relay of this name as well."""
    found: list[Volume] = []
    for ordinal in range(replicas):
        body = context.store.get(claim_of(relay, ordinal))
        if body is not None:
            requested = octets(body["spec"]["resources"]["requests"]["storage"])
            capacity = (body.get("status") or {}).get("capacity", {}).get("storage")
            # Before it is bound to a volume it has none.
            found.append(
                Volume(body["metadata"]["name"], requested, octets(capacity) if capacity is not None else requested)
            )
    return found
