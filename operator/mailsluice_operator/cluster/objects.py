"""Kubernetes objects as plain dicts: their kinds and their names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

Object = dict[str, Any]
"""An object as the API's JSON has it. `Any` is the truth here: the schema belongs to the API server."""


@dataclass(frozen=True)
class Kind:
    """A kind with what its URL is made of, so that no discovery request is needed."""

    api_version: str
    name: str
    plural: str
    namespaced: bool = True

    def path(self, namespace: str | None = None, name: str | None = None, subresource: str | None = None) -> str:
        """The URL path of one object, of one namespace's objects, or of all."""
        prefix = "/apis" if "/" in self.api_version else "/api"
        parts = [prefix, self.api_version]
        if self.namespaced and namespace is not None:
            parts += ["namespaces", namespace]
        parts.append(self.plural)
        parts += [part for part in (name, subresource) if part is not None]
        return "/".join(parts)


SMTP_RELAY = Kind("mailsluice.dev/v1alpha1", "SmtpRelay", "smtprelays")
SMTP_USER = Kind("mailsluice.dev/v1alpha1", "SmtpUser", "smtpusers")
SECRET = Kind("v1", "Secret", "secrets")
CONFIG_MAP = Kind("v1", "ConfigMap", "configmaps")
SERVICE = Kind("v1", "Service", "services")
SERVICE_ACCOUNT = Kind("v1", "ServiceAccount", "serviceaccounts")
STATEFUL_SET = Kind("apps/v1", "StatefulSet", "statefulsets")
DEPLOYMENT = Kind("apps/v1", "Deployment", "deployments")
DISRUPTION_BUDGET = Kind("policy/v1", "PodDisruptionBudget", "poddisruptionbudgets")
NETWORK_POLICY = Kind("networking.k8s.io/v1", "NetworkPolicy", "networkpolicies")
AUTOSCALER = Kind("autoscaling/v2", "HorizontalPodAutoscaler", "horizontalpodautoscalers")
POD_MONITOR = Kind("monitoring.coreos.com/v1", "PodMonitor", "podmonitors")
PROMETHEUS_RULE = Kind("monitoring.coreos.com/v1", "PrometheusRule", "prometheusrules")
CLAIM = Kind("v1", "PersistentVolumeClaim", "persistentvolumeclaims")
POD = Kind("v1", "Pod", "pods")
NAMESPACE = Kind("v1", "Namespace", "namespaces", namespaced=False)
EVENT = Kind("v1", "Event", "events")
LEASE = Kind("coordination.k8s.io/v1", "Lease", "leases")

OPTIONAL = (POD_MONITOR, PROMETHEUS_RULE)
"""Kinds of children that a cluster serves only when somebody has installed their definitions."""

CHILDREN = (
    SECRET,
    CONFIG_MAP,
    SERVICE_ACCOUNT,
    SERVICE,
    NETWORK_POLICY,
    DISRUPTION_BUDGET,
    AUTOSCALER,
    *OPTIONAL,
    STATEFUL_SET,
    DEPLOYMENT,
)
"""Kinds of which a relay has children."""

KINDS: Mapping[tuple[str, str], Kind] = {
    (kind.api_version, kind.name): kind
    for kind in (SMTP_RELAY, SMTP_USER, *CHILDREN, CLAIM, POD, NAMESPACE, EVENT, LEASE)
}


class Reference(NamedTuple):
    """One object's address."""

    kind: Kind
    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.kind.name} {self.namespace}/{self.name}" if self.namespace else f"{self.kind.name} {self.name}"


def kind_of(body: Object) -> Kind:
    """The kind of an object that carries apiVersion and kind."""
    return KINDS[body["apiVersion"], body["kind"]]


def reference_of(body: Object, kind: Kind | None = None) -> Reference:
    """The address of an object; items of a list need to be told their kind."""
    metadata = body["metadata"]
    return Reference(kind if kind is not None else kind_of(body), metadata.get("namespace", ""), metadata["name"])


def labels_of(body: Object) -> Mapping[str, str]:
    labels: Mapping[str, str] | None = body["metadata"].get("labels")
    return labels or {}


def annotations_of(body: Object) -> Mapping[str, str]:
    annotations: Mapping[str, str] | None = body["metadata"].get("annotations")
    return annotations or {}


def controller_of(body: Object) -> Object | None:
    """The owner reference of the object's controller."""
    for owner in body["metadata"].get("ownerReferences") or ():
        if owner.get("controller"):
            found: Object = owner
            return found
    return None
