"""The HorizontalPodAutoscaler of a relay."""

from __future__ import annotations

from typing import Final

from mailsluice_operator.children.metadata import API_VERSION, Object, Owner, child, relay_labels
from mailsluice_operator.resource.models import SmtpRelay

QUEUE_METRIC: Final = "mailsluice_queue_messages"
DELIVERABLE: Final = ("active", "deferred")
"""States of a queued message that more pods may help; what is held waits for a person."""


def autoscaler(relay: SmtpRelay, owner: Owner) -> Object | None:
    """Scales the SmtpRelay itself, not its StatefulSet: a queue has to be empty before its replica goes."""
    wanted = relay.spec.autoscaling
    if wanted is None:
        return None
    metrics: list[Object] = []
    if wanted.cpu_utilization is not None:
        target: Object = {"type": "Utilization", "averageUtilization": wanted.cpu_utilization}
        metrics.append({"type": "Resource", "resource": {"name": "cpu", "target": target}})
    if wanted.queued_messages_per_replica is not None:
        states = {"key": "state", "operator": "In", "values": list(DELIVERABLE)}
        metrics.append(
            {
                "type": "Pods",
                "pods": {
                    "metric": {"name": QUEUE_METRIC, "selector": {"matchExpressions": [states]}},
                    "target": {"type": "AverageValue", "averageValue": str(wanted.queued_messages_per_replica)},
                },
            }
        )
    spec: Object = {
        "scaleTargetRef": {"apiVersion": API_VERSION, "kind": owner.kind, "name": owner.name},
        "minReplicas": wanted.min_replicas,
        "maxReplicas": wanted.max_replicas,
        "metrics": metrics,
    }
    return child(
        "autoscaling/v2",
        "HorizontalPodAutoscaler",
        owner.name,
        owner,
        labels=relay_labels(owner.name),
        spec=spec,
    )
