"""What runs a relay's pods: the ServiceAccount and the StatefulSet, or with PassThrough the Deployment.

Only what needs a new pod is in the pod template. Users, limits, rules, upstreams and certificates reach a running pod
through the two mounted Secrets, whose contents leave no trace in the template.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from mailsluice_operator.children.metadata import (
    LISTENERS_ANNOTATION,
    MANAGED_BY,
    MANAGED_BY_LABEL,
    RELAY_LABEL,
    RESTARTED_ANNOTATION,
    Object,
    Owner,
    child,
    config_name,
    credentials_name,
    fingerprint,
    plain,
    pods_service_name,
    relay_labels,
    selector,
)
from mailsluice_operator.children.network import HTTP_PORT_NAME
from mailsluice_operator.resource.models import HTTP_PORT, SmtpRelay, bound_port
from mailsluice_operator.resource.pod import PodSpec
from mailsluice_relay.config import QueueMode

USER_ID: Final = 65532
"""`nonroot` of the image."""
CONFIG_DIR: Final = "/etc/mailsluice"
DATA_DIR: Final = "/var/lib/mailsluice"
QUEUE_VOLUME: Final = "queue"
CONTAINER: Final = "relay"
GRACE_PERIOD: Final = 60
"""Seconds to finish transactions and deliver what goes."""
KILL_RESERVE: Final = 10
"""Seconds of the grace period that are left for closing the queue before the kubelet kills."""


@dataclass(frozen=True)
class PodSettings:
    """What the operator decides for the pods of all relays."""

    image: str
    bind: tuple[str, ...] = ("0.0.0.0",)  # noqa: S104 - inside a pod; who may connect is the Service's and NetworkPolicy's
    """Addresses that the relay listens on: 0.0.0.0, or :: where pods have IPv6 addresses, or both."""
    allowed_images: tuple[str, ...] = ()
    """What spec.image may be beside `image`; * stands for any text."""

    def allows(self, image: str) -> bool:
        """Whether a relay may run this image: who may create a SmtpRelay need not be one who may choose programs."""
        return image == self.image or any(
            re.fullmatch(".*".join(map(re.escape, pattern.split("*"))), image) for pattern in self.allowed_images
        )


def service_account(owner: Owner) -> Object:
    """An identity without any right, and no token in the pod: a relay has no business with the API."""
    return child(
        "v1",
        "ServiceAccount",
        owner.name,
        owner,
        labels=relay_labels(owner.name),
        automountServiceAccountToken=False,
    )


def workload(
    relay: SmtpRelay, owner: Owner, settings: PodSettings, replicas: int, claims: list[Object] | None
) -> Object:
    """The StatefulSet or Deployment. `claims` are those of the StatefulSet that exists: they can never be changed."""
    labels = relay_labels(owner.name)
    spec: Object = {
        "replicas": replicas,
        "revisionHistoryLimit": 3,
        "selector": {"matchLabels": selector(owner.name)},
        "template": pod_template(relay, owner, settings),
    }
    if relay.spec.queue.mode is QueueMode.PASS_THROUGH:
        spec["strategy"] = {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}}
        return child("apps/v1", "Deployment", owner.name, owner, labels=labels, spec=spec)
    spec |= {
        "serviceName": pods_service_name(owner.name),
        "podManagementPolicy": "Parallel",  # replicas do not wait for each other; each has a queue of its own
        "updateStrategy": {"type": "RollingUpdate"},
        # Accepted mail outlives the StatefulSet: a relay of the same name takes it up again.
        "persistentVolumeClaimRetentionPolicy": {"whenDeleted": "Retain", "whenScaled": "Retain"},
        "volumeClaimTemplates": claims if claims is not None else [queue_claim(relay, owner.name)],
    }
    return child("apps/v1", "StatefulSet", owner.name, owner, labels=labels, spec=spec)


def queue_claim(relay: SmtpRelay, name: str) -> Object:
    """The volume of one replica's queue. No owner reference: it stays when the relay goes."""
    storage = relay.spec.queue.storage
    spec: Object = {
        "accessModes": ["ReadWriteOnce"],
        "resources": {"requests": {"storage": str(storage.size) if storage is not None else "1Gi"}},
    }
    if storage is not None and storage.class_name is not None:
        spec["storageClassName"] = storage.class_name
    metadata = {"name": QUEUE_VOLUME, "labels": {**selector(name), MANAGED_BY_LABEL: MANAGED_BY, RELAY_LABEL: name}}
    return {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": metadata, "spec": spec}


def pod_template(relay: SmtpRelay, owner: Owner, settings: PodSettings) -> Object:
    """A pod that meets the `restricted` Pod Security Standard, with the resource's own wishes added."""
    template = relay.spec.pod_template
    extra_labels: Mapping[str, str] = {}
    annotations: dict[str, str] = {"kubectl.kubernetes.io/default-container": CONTAINER}
    if template is not None and template.metadata is not None:
        extra_labels = template.metadata.labels
        annotations |= template.metadata.annotations
    if (restarted := relay.metadata.annotations.get(RESTARTED_ANNOTATION)) is not None:
        annotations[RESTARTED_ANNOTATION] = restarted
    annotations[LISTENERS_ANNOTATION] = _listeners(relay)
    wishes = template.spec if template is not None and template.spec is not None else PodSpec()
    return {
        "metadata": {"labels": {**extra_labels, **relay_labels(owner.name)}, "annotations": annotations},
        "spec": _pod_spec(relay, owner, settings, wishes),
    }


def _listeners(relay: SmtpRelay) -> str:
    """The same for as long as a running relay takes the listeners (`check` of its listener.py)."""
    return fingerprint(
        {
            "listeners": [
                [listener.name, bound_port(listener.port), listener.mode.value, listener.proxy_protocol is not None]
                for listener in relay.spec.listeners
            ]
        }
    )


def _pod_spec(relay: SmtpRelay, owner: Owner, settings: PodSettings, wishes: PodSpec) -> Object:
    wanted = plain(wishes)
    identity = {"runAsUser": USER_ID, "runAsGroup": USER_ID, "fsGroup": USER_ID, **wanted.pop("securityContext", {})}
    spec: Object = {
        "serviceAccountName": owner.name,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,  # a namespace with a thousand Services would fill the environment
        "terminationGracePeriodSeconds": GRACE_PERIOD,
        "securityContext": {
            "runAsNonRoot": True,
            "fsGroupChangePolicy": "OnRootMismatch",  # a queue of 100,000 files is not walked at every start
            "seccompProfile": {"type": "RuntimeDefault"},
            **identity,
        },
        "topologySpreadConstraints": [
            {"maxSkew": 1, "topologyKey": "kubernetes.io/hostname", "whenUnsatisfiable": "ScheduleAnyway"}
        ],
        "containers": [_container(relay, settings, wishes.termination_grace_period_seconds or GRACE_PERIOD)],
        "volumes": _volumes(relay, owner),
        **wanted,
    }
    for constraint in spec["topologySpreadConstraints"]:
        constraint.setdefault("labelSelector", {"matchLabels": selector(owner.name)})
    return spec


def _container(relay: SmtpRelay, settings: PodSettings, grace_period: int) -> Object:
    ports: list[Object] = [
        {"name": listener.name, "containerPort": bound_port(listener.port), "protocol": "TCP"}
        for listener in relay.spec.listeners
    ]
    bind = [argument for address in settings.bind for argument in ("--bind", address)]
    container: Object = {
        "name": CONTAINER,
        "image": relay.spec.image or settings.image,
        "imagePullPolicy": "IfNotPresent",
        "command": ["mailsluice-relay"],
        "args": [
            "serve",
            "--config-dir",
            CONFIG_DIR,
            "--data-dir",
            DATA_DIR,
            *bind,
            "--http-port",
            str(HTTP_PORT),
            "--grace",
            str(max(grace_period - KILL_RESERVE, 1)),
        ],
        "ports": [*ports, {"name": HTTP_PORT_NAME, "containerPort": HTTP_PORT, "protocol": "TCP"}],
        # A start may have to recover a full queue first.
        "startupProbe": {
            "httpGet": _http("/healthz"),
            "periodSeconds": 1,
            "timeoutSeconds": 5,
            "failureThreshold": 300,
        },
        "livenessProbe": {
            "httpGet": _http("/healthz"),
            "periodSeconds": 10,
            "timeoutSeconds": 5,
            "failureThreshold": 6,
        },
        "readinessProbe": {"httpGet": _http("/readyz"), "periodSeconds": 5, "timeoutSeconds": 3, "failureThreshold": 2},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [
            # Whole directories: a subPath mount would never be updated (kubernetes#50345).
            {"name": "config", "mountPath": f"{CONFIG_DIR}/config", "readOnly": True},
            {"name": "credentials", "mountPath": f"{CONFIG_DIR}/credentials", "readOnly": True},
            {"name": QUEUE_VOLUME, "mountPath": DATA_DIR},
            {"name": "tmp", "mountPath": "/tmp"},  # noqa: S108 - the pod's own, empty at every start
        ],
    }
    resources = plain(relay.spec.resources) if relay.spec.resources is not None else {}
    if resources:
        container["resources"] = {
            section: {name: str(amount) for name, amount in amounts.items()} for section, amounts in resources.items()
        }
    return container


def _http(path: str) -> Object:
    return {"path": path, "port": HTTP_PORT_NAME, "scheme": "HTTP"}


def _volumes(relay: SmtpRelay, owner: Owner) -> list[Object]:
    def secret(name: str) -> Object:
        return {"secretName": name, "defaultMode": 0o440}  # readable by the fsGroup

    volumes: list[Object] = [
        {"name": "config", "secret": secret(config_name(owner.name))},
        {"name": "credentials", "secret": secret(credentials_name(owner.name))},
        {"name": "tmp", "emptyDir": {}},
    ]
    if relay.spec.queue.mode is QueueMode.PASS_THROUGH:
        # The control socket, and large messages while they come in: none is accepted before the upstream has it.
        volumes.append({"name": QUEUE_VOLUME, "emptyDir": {}})
    return volumes
