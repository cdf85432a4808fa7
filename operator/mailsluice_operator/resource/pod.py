"""The closed subset of core/v1 that a resource may say about its pods. No volumes, no host access, no other containers.

Names and meaning are core/v1's, so that what one knows from a Deployment holds here, and so that the values go into the
pod template as they are.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import msgspec
from msgspec import Meta

from mailsluice_operator.resource.schema import (
    ATOMIC,
    Annotations,
    Labels,
    NamespaceName,
    ObjectName,
    Quantity,
    Rule,
    Struct,
    list_map,
)

LabelKey = Annotated[str, Meta(min_length=1, max_length=317)]
LabelValue = Annotated[str, Meta(max_length=63)]
Weight = Annotated[int, Meta(ge=1, le=100)]


class LabelSelectorRequirement(Struct, frozen=True, kw_only=True):
    """One expression of a label selector."""

    key: LabelKey
    """Key of the label."""
    operator: Literal["In", "NotIn", "Exists", "DoesNotExist"]
    """How the label's value relates to `values`."""
    values: Annotated[tuple[LabelValue, ...], Meta(max_length=64), ATOMIC] = ()
    """Values for In and NotIn; empty for Exists and DoesNotExist."""


class LabelSelector(Struct, frozen=True, kw_only=True):
    """A label selector; all of it must match. An empty one matches everything."""

    match_labels: Labels = msgspec.field(default_factory=dict)
    """Labels that must be there with these values."""
    match_expressions: Annotated[tuple[LabelSelectorRequirement, ...], Meta(max_length=32), ATOMIC] = ()
    """Expressions that must hold."""


class NodeSelectorRequirement(Struct, frozen=True, kw_only=True):
    """One expression about a node."""

    key: LabelKey
    """Key of the node's label or field."""
    operator: Literal["In", "NotIn", "Exists", "DoesNotExist", "Gt", "Lt"]
    """How the value relates to `values`."""
    values: Annotated[tuple[LabelValue, ...], Meta(max_length=64), ATOMIC] = ()
    """Values to compare with."""


class NodeSelectorTerm(Struct, frozen=True, kw_only=True):
    """Expressions that must all hold for one node."""

    match_expressions: Annotated[tuple[NodeSelectorRequirement, ...], Meta(max_length=32), ATOMIC] = ()
    """Expressions about the node's labels."""
    match_fields: Annotated[tuple[NodeSelectorRequirement, ...], Meta(max_length=32), ATOMIC] = ()
    """Expressions about the node's fields."""


class NodeSelector(Struct, frozen=True, kw_only=True):
    """Terms of which one must hold."""

    node_selector_terms: Annotated[tuple[NodeSelectorTerm, ...], Meta(min_length=1, max_length=16), ATOMIC]
    """The terms; one is enough."""


class PreferredSchedulingTerm(Struct, frozen=True, kw_only=True):
    """A node preference with its weight."""

    weight: Weight
    """1 to 100; higher is stronger."""
    preference: NodeSelectorTerm
    """What the node should match."""


class NodeAffinity(Struct, frozen=True, kw_only=True):
    """Which nodes the pods may or should run on."""

    required_during_scheduling_ignored_during_execution: NodeSelector | None = None
    """What a node must match."""
    preferred_during_scheduling_ignored_during_execution: Annotated[
        tuple[PreferredSchedulingTerm, ...], Meta(max_length=16), ATOMIC
    ] = ()
    """What a node should match."""


class PodAffinityTerm(Struct, frozen=True, kw_only=True):
    """Pods that this pod should be near to, or away from."""

    topology_key: LabelKey
    """Label of nodes; nodes with the same value are one place. Example: kubernetes.io/hostname."""
    label_selector: LabelSelector | None = None
    """Which pods."""
    namespace_selector: LabelSelector | None = None
    """Pods of which namespaces, by label."""
    namespaces: Annotated[tuple[NamespaceName, ...], Meta(max_length=32), ATOMIC] = ()
    """Pods of which namespaces, by name. Default: the relay's own."""


class WeightedPodAffinityTerm(Struct, frozen=True, kw_only=True):
    """A pod preference with its weight."""

    weight: Weight
    """1 to 100; higher is stronger."""
    pod_affinity_term: PodAffinityTerm
    """Which pods."""


class PodAffinity(Struct, frozen=True, kw_only=True):
    """Pods to be near to, or away from."""

    required_during_scheduling_ignored_during_execution: Annotated[
        tuple[PodAffinityTerm, ...], Meta(max_length=16), ATOMIC
    ] = ()
    """What must hold."""
    preferred_during_scheduling_ignored_during_execution: Annotated[
        tuple[WeightedPodAffinityTerm, ...], Meta(max_length=16), ATOMIC
    ] = ()
    """What should hold."""


class Affinity(Struct, frozen=True, kw_only=True):
    """Where the pods may run, relative to nodes and to other pods."""

    node_affinity: NodeAffinity | None = None
    """Nodes to run on."""
    pod_affinity: PodAffinity | None = None
    """Pods to be near to."""
    pod_anti_affinity: PodAffinity | None = None
    """Pods to be away from."""


class Toleration(Struct, frozen=True, kw_only=True):
    """A taint of nodes that the pods tolerate."""

    key: Annotated[str, Meta(max_length=317)] | None = None
    """Key of the taint. Left out with operator Exists: every taint."""
    operator: Literal["Exists", "Equal"] = "Equal"
    """Whether the value counts. Default Equal."""
    value: LabelValue | None = None
    """Value of the taint."""
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    """Effect of the taint. Left out: every effect."""
    toleration_seconds: int | None = None
    """With NoExecute: for how many seconds the pod stays. Left out: for ever."""


class TopologySpreadConstraint(Struct, frozen=True, kw_only=True):
    """How evenly the relay's pods are spread over nodes, zones or other places."""

    max_skew: Annotated[int, Meta(ge=1)]
    """By how many pods the fullest place may exceed the emptiest."""
    topology_key: LabelKey
    """Label of nodes; nodes with the same value are one place. Example: topology.kubernetes.io/zone."""
    when_unsatisfiable: Literal["DoNotSchedule", "ScheduleAnyway"]
    """What to do when it cannot be kept."""
    label_selector: LabelSelector | None = None
    """Which pods are counted. Default: the relay's own."""
    min_domains: Annotated[int, Meta(ge=1)] | None = None
    """How many places there should be at least; with DoNotSchedule only."""
    node_affinity_policy: Literal["Honor", "Ignore"] | None = None
    """Whether nodes outside the node affinity count."""
    node_taints_policy: Literal["Honor", "Ignore"] | None = None
    """Whether nodes with taints that are not tolerated count."""


class LocalObjectReference(Struct, frozen=True, kw_only=True):
    """An object of the relay's namespace."""

    name: ObjectName
    """Its name."""


UserId = Annotated[int, Meta(ge=1, le=2_147_483_647)]


class PodSecurityContext(Struct, frozen=True, kw_only=True):
    """Identities that the pods run as, for clusters that assign ranges. Never root."""

    run_as_user: UserId | None = None
    """User id of the process. Default: the image's."""
    run_as_group: UserId | None = None
    """Group id of the process. Default: the image's."""
    fs_group: UserId | None = None
    """Group that the queue's volume belongs to. Default: the process's group."""


class PodSpec(Struct, frozen=True, kw_only=True):
    """Scheduling and identity of the pods."""

    node_selector: Labels = msgspec.field(default_factory=dict)
    """Labels that a node must have."""
    affinity: Affinity | None = None
    """Where the pods may run, relative to nodes and to other pods."""
    tolerations: Annotated[tuple[Toleration, ...], Meta(max_length=32), ATOMIC] = ()
    """Taints of nodes that the pods tolerate."""
    topology_spread_constraints: Annotated[
        tuple[TopologySpreadConstraint, ...], Meta(max_length=8), list_map("topologyKey", "whenUnsatisfiable")
    ] = ()
    """How the pods are spread over nodes and zones."""
    priority_class_name: ObjectName | None = None
    """PriorityClass of the pods."""
    runtime_class_name: ObjectName | None = None
    """RuntimeClass of the pods."""
    image_pull_secrets: Annotated[tuple[LocalObjectReference, ...], Meta(max_length=8), list_map("name")] = ()
    """Secrets to pull the image with; of the relay's namespace."""
    termination_grace_period_seconds: Annotated[int, Meta(ge=5, le=3600)] | None = None
    """Seconds a pod may take to finish transactions and deliver what it can before it is killed. Default 60. What is
    left stays on the volume."""
    security_context: PodSecurityContext | None = None
    """User and group ids of the pods."""


class PodMetadata(Struct, frozen=True, kw_only=True):
    """Labels and annotations of the pods. Those under mailsluice.dev and app.kubernetes.io are the operator's."""

    labels: Labels = msgspec.field(default_factory=dict)
    """Labels to add."""
    annotations: Annotations = msgspec.field(default_factory=dict)
    """Annotations to add."""

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "!has(self.labels) || self.labels.all(key, !key.contains('mailsluice.dev/') && "
            "!key.startsWith('app.kubernetes.io/'))",
            "labels under mailsluice.dev/ and app.kubernetes.io/ are set by the operator; choose another prefix",
            field_path=".labels",
        ),
    )


class PodTemplate(Struct, frozen=True, kw_only=True):
    """What is added to the pods; a closed subset of core/v1's PodTemplateSpec."""

    metadata: PodMetadata | None = None
    """Labels and annotations of the pods."""
    spec: PodSpec | None = None
    """Scheduling and identity of the pods."""


Resources = Annotated[dict[str, Quantity], Meta(max_length=16)]


class ResourceRequirements(Struct, frozen=True, kw_only=True):
    """CPU and memory of the relay's container."""

    requests: Resources = msgspec.field(default_factory=dict)
    """What the scheduler reserves. Example: {cpu: 100m, memory: 96Mi}."""
    limits: Resources = msgspec.field(default_factory=dict)
    """What the container may not exceed. Example: {memory: 256Mi}. A CPU limit slows delivery down."""


class IPBlock(Struct, frozen=True, kw_only=True):
    """Addresses outside the cluster."""

    cidr: Annotated[str, Meta(min_length=2, max_length=43)]
    """Network in CIDR notation. Example: 192.0.2.0/24."""
    except_: Annotated[tuple[Annotated[str, Meta(max_length=43)], ...], Meta(max_length=16), ATOMIC] = ()
    """Networks within it that are left out."""

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule("isCIDR(self.cidr)", "cidr must be a network such as 192.0.2.0/24", field_path=".cidr"),
    )


class NetworkPolicyPeer(Struct, frozen=True, kw_only=True):
    """Who may connect, as in networking.k8s.io/v1."""

    namespace_selector: LabelSelector | None = None
    """Pods of these namespaces."""
    pod_selector: LabelSelector | None = None
    """These pods, of the selected namespaces or of the relay's own."""
    ip_block: IPBlock | None = None
    """Addresses outside the cluster; alone."""

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "has(self.ipBlock) != (has(self.namespaceSelector) || has(self.podSelector))",
            "set ipBlock alone, or namespaceSelector and podSelector (one or both)",
        ),
    )
