"""What a relay is reached by, and by whom: its Services, NetworkPolicy and PodDisruptionBudget."""

from __future__ import annotations

from mailsluice_operator.children.metadata import (
    Object,
    Owner,
    child,
    plain,
    pods_service_name,
    relay_labels,
    selector,
)
from mailsluice_operator.resource.models import HTTP_PORT, SmtpRelay, bound_port

HTTP_PORT_NAME = "http"


def client_service(relay: SmtpRelay, owner: Owner) -> Object:
    """What clients connect to: the listeners' ports, turned into those that pods may bind."""
    wanted = relay.spec.service
    spec: Object = {
        "type": wanted.type,
        "selector": selector(owner.name),
        "ports": [
            {"name": listener.name, "port": listener.port, "targetPort": bound_port(listener.port), "protocol": "TCP"}
            for listener in relay.spec.listeners
        ],
    }
    if wanted.type != "ClusterIP":
        # With Cluster every client has a node's address; allowed networks and limits by network need its own.
        spec["externalTrafficPolicy"] = wanted.external_traffic_policy or "Local"
    if wanted.load_balancer_source_ranges:
        spec["loadBalancerSourceRanges"] = list(wanted.load_balancer_source_ranges)
    if wanted.load_balancer_class is not None:
        spec["loadBalancerClass"] = wanted.load_balancer_class
    if wanted.ip_family_policy is not None:
        spec["ipFamilyPolicy"] = wanted.ip_family_policy
    return child(
        "v1",
        "Service",
        owner.name,
        owner,
        labels={**wanted.labels, **relay_labels(owner.name)},
        annotations=wanted.annotations,
        spec=spec,
    )


def pods_service(relay: SmtpRelay, owner: Owner) -> Object:
    """Gives each pod of the StatefulSet a name, ready or not, and monitoring a place to find them."""
    spec: Object = {
        "clusterIP": "None",
        "publishNotReadyAddresses": True,
        "selector": selector(owner.name),
        "ports": [{"name": HTTP_PORT_NAME, "port": HTTP_PORT, "targetPort": HTTP_PORT, "protocol": "TCP"}],
    }
    if relay.spec.service.ip_family_policy is not None:
        spec["ipFamilyPolicy"] = relay.spec.service.ip_family_policy
    return child("v1", "Service", pods_service_name(owner.name), owner, labels=relay_labels(owner.name), spec=spec)


def disruption_budget(relay: SmtpRelay, owner: Owner) -> Object | None:
    """How many pods may be evicted at a time; only where it was asked for, since one replica must stay evictable."""
    wanted = relay.spec.disruption_budget
    if wanted is None:
        return None
    spec = {"maxUnavailable": wanted.max_unavailable, "selector": {"matchLabels": selector(owner.name)}}
    return child(
        "policy/v1",
        "PodDisruptionBudget",
        owner.name,
        owner,
        labels=relay_labels(owner.name),
        spec=spec,
    )


def network_policy(relay: SmtpRelay, owner: Owner) -> Object | None:
    """Who may connect to the listeners. What pods connect to is not limited: upstreams are anywhere.

    The metrics port stays open to all namespaces: Prometheus is in one that the resource does not know, and the
    operator asks pods there too. The kubelet's probes come from the pod's own node and are always let through.
    """
    wanted = relay.spec.network_policy
    if wanted is None or not wanted.enabled:
        return None
    mail: Object = {
        "ports": [{"port": bound_port(listener.port), "protocol": "TCP"} for listener in relay.spec.listeners]
    }
    if wanted.from_:
        mail["from"] = [plain(peer) for peer in wanted.from_]
    metrics: Object = {
        "ports": [{"port": HTTP_PORT, "protocol": "TCP"}],
        "from": [{"namespaceSelector": {}}],
    }
    spec: Object = {
        "podSelector": {"matchLabels": selector(owner.name)},
        "policyTypes": ["Ingress"],
        "ingress": [mail, metrics],
    }
    return child(
        "networking.k8s.io/v1",
        "NetworkPolicy",
        owner.name,
        owner,
        labels=relay_labels(owner.name),
        spec=spec,
    )
