"""What should be: which users a relay grants, how many replicas come next, and which children a relay has.

Pure: resources and observations in, plain values out. `reconcile` fetches what goes in and writes what comes out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from mailsluice_operator.children import monitoring, network, scaling, secrets, workload
from mailsluice_operator.children.configuration import DEFAULT_STORAGE
from mailsluice_operator.children.facts import Fact
from mailsluice_operator.children.metadata import (
    FORMER_UNTIL_ANNOTATION,
    ROTATED_ANNOTATION,
    Object,
    Owner,
    timestamp,
)
from mailsluice_operator.credentials import Passwords
from mailsluice_operator.resource.models import AllowedNamespaces, SmtpRelay, SmtpUser, SmtpUserGrant
from mailsluice_operator.resource.pod import LabelSelector
from mailsluice_operator.resource.quantities import octets
from mailsluice_relay.config import ListenerMode, login_key


def owner_of(resource: SmtpRelay | SmtpUser) -> Owner:
    metadata = resource.metadata
    return Owner(resource.kind, metadata.namespace, metadata.name, metadata.uid)


# --- Which users a relay grants ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Decision:
    """Whether a SmtpUser gets its login; if not, why."""

    user: SmtpUser
    refused: Fact | None


def decide(
    relay: SmtpRelay,
    users: Iterable[SmtpUser],
    namespaces: Mapping[str, Mapping[str, str] | None],
    own_logins: frozenset[str] = frozenset(),
) -> list[Decision]:
    """Who of the relay's SmtpUsers gets a login, in the order of their age.

    `namespaces` are the labels of the users' namespaces, None where they cannot be read. `own_logins` are the relay's
    own users, as `login_key` has them: those always win, and of two SmtpUsers the older.
    """
    taken: dict[str, SmtpUser] = {}
    decisions: list[Decision] = []
    for user in sorted(users, key=lambda user: (user.metadata.creation_timestamp or "", user.metadata.uid)):
        refused = _not_allowed(relay, user, namespaces.get(user.metadata.namespace))
        login = login_key(user.spec.login)
        if refused is None and login in own_logins:
            refused = Fact(
                "LoginTaken", f"spec.login: {user.spec.login} is one of the relay's own users; choose another login."
            )
        elif refused is None and login in taken:
            holder = taken[login].metadata
            refused = Fact(
                "LoginTaken",
                f"spec.login: {user.spec.login} belongs to the older SmtpUser {holder.namespace}/{holder.name}; "
                "choose another login.",
            )
        if refused is None:
            taken[login] = user
        decisions.append(Decision(user, refused))
    return decisions


def _not_allowed(relay: SmtpRelay, user: SmtpUser, labels: Mapping[str, str] | None) -> Fact | None:
    name = f"SmtpRelay {relay.metadata.namespace}/{relay.metadata.name}"
    grant = relay.spec.authentication.smtp_users
    if grant is None:
        return Fact(
            "NotAllowed",
            f"{name} takes no SmtpUsers; its owner has to set spec.authentication.smtpUsers.",
        )
    namespace = user.metadata.namespace
    if not namespace_allowed(grant.allowed_namespaces, relay.metadata.namespace, namespace, labels):
        return Fact(
            "NotAllowed",
            f"{name} takes no SmtpUsers of namespace {namespace}; its owner has to allow it in "
            "spec.authentication.smtpUsers.allowedNamespaces.",
        )
    return _claims(grant, user, name)


def _claims(grant: SmtpUserGrant, user: SmtpUser, name: str) -> Fact | None:
    namespace = user.metadata.namespace
    if not any(template_matches(template, user.spec.login, namespace) for template in grant.logins):
        return Fact(
            "NotAllowed",
            f"spec.login: {name} does not grant {user.spec.login} to namespace {namespace}, but "
            f"{_filled(grant.logins, namespace)}; choose such a login.",
        )
    for sender in user.spec.senders:
        if login_key(sender) == login_key(user.spec.login):  # a login may always send as itself
            continue
        if not any(template_matches(template, sender, namespace) for template in grant.senders):
            granted = _filled(grant.senders, namespace) if grant.senders else "the login itself alone"
            return Fact(
                "NotAllowed",
                f"spec.senders: {name} does not grant {sender} to namespace {namespace}, but {granted}; "
                "remove it or have it granted.",
            )
    return None


def _filled(templates: Sequence[str], namespace: str) -> str:
    return ", ".join(template.replace("{namespace}", namespace) for template in templates)


def template_matches(template: str, claim: str, namespace: str) -> bool:
    """Whether a claimed login or sender lies within a template of the grant.

    `*` stands for any text without @, so that `*@shop.example.test` cannot be stretched over another domain; a sender
    pattern's own `*` is covered by the template's. The template `*` alone grants everything.
    """
    if template == "*":
        return True
    parts = login_key(template.replace("{namespace}", namespace)).split("*")
    return re.fullmatch("[^@]*".join(map(re.escape, parts)), login_key(claim)) is not None


def namespace_allowed(allowed: AllowedNamespaces, own: str, namespace: str, labels: Mapping[str, str] | None) -> bool:
    """Whether the relay's grant is for this namespace. Labels that cannot be read match no selector."""
    if allowed.from_ == "All" or (allowed.from_ == "Same" and namespace == own):
        return True
    if allowed.from_ != "Selector" or allowed.selector is None or labels is None:
        return False
    return selects(allowed.selector, labels)


def selects(selector: LabelSelector, labels: Mapping[str, str]) -> bool:
    """As the API server evaluates a label selector."""
    if any(labels.get(key) != value for key, value in selector.match_labels.items()):
        return False
    for requirement in selector.match_expressions:
        value = labels.get(requirement.key)
        holds = {
            "In": value is not None and value in requirement.values,
            "NotIn": value is None or value not in requirement.values,
            "Exists": value is not None,
            "DoesNotExist": value is None,
        }[requirement.operator]
        if not holds:
            return False
    return True


# --- Which image ------------------------------------------------------------------------------------------------------


def image_refused(relay: SmtpRelay, settings: workload.PodSettings) -> Fact | None:
    """Why the operator does not run the image that the resource names."""
    image = relay.spec.image
    if image is None or settings.allows(image):
        return None
    return Fact(
        "ImageNotAllowed",
        f"spec.image: this operator does not run {image}; remove the field, or have the image allowed with the "
        "operator's --allowed-relay-image.",
    )


# --- How many replicas ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """The next step towards the wanted number of replicas."""

    replicas: int
    """What the workload is given now."""
    drain_from_ordinal: int | None = None
    """What the configuration tells: pods from this ordinal on take no new mail."""
    waiting: Fact | None = None
    """Why there are still more replicas than wanted."""


def next_step(wanted: int, current: int, drained: Mapping[int, int | None], name: str) -> Step:
    """Up at once; down one replica at a time, the highest ordinal first, and only when its queue is empty.

    `drained` tells for each ordinal that has been told to drain how many messages it still has; an ordinal that has
    not answered yet is absent or None.
    """
    if wanted >= current:
        return Step(wanted)
    last = current - 1
    left = drained.get(last)
    if left == 0:
        return Step(last, wanted)
    count = "an unknown number of" if left is None else str(left)
    return Step(
        current,
        wanted,
        Fact(
            "QueueNotDrained",
            f"Pod {name}-{last} still has {count} messages in its queue; it goes when they are delivered or removed.",
        ),
    )


# --- How much room the queues have ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Volume:
    """What a replica's queue is kept on."""

    claim: str
    """Name of the PersistentVolumeClaim."""
    requested: int
    capacity: int
    """Octets that it really has; while it is being expanded, less than requested."""


def not_resized(relay: SmtpRelay, volumes: Iterable[Volume]) -> Fact | None:
    """Why the volumes are not as big as the resource wants: a StatefulSet's claims cannot be changed."""
    size = (relay.spec.queue.storage or DEFAULT_STORAGE).size
    wanted = octets(size)
    different = [volume for volume in volumes if volume.requested != wanted]
    if not different:
        return None
    names = ", ".join(volume.claim for volume in different)
    remedy = (
        "set the size back, since a volume cannot shrink"
        if min(volume.requested for volume in different) > wanted
        else "raise spec.resources.requests.storage of each, if its StorageClass allows that, or set the size back"
    )
    return Fact(
        "StorageNotResized",
        f"spec.queue.storage.size: {size} is wanted, but the volumes that exist keep their size "
        f"(PersistentVolumeClaim {names}); {remedy}.",
    )


# --- Which children ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contents:
    """What the configuration Secrets of a relay hold."""

    packed: bytes
    revision: str
    files: Mapping[str, bytes]
    credentials_revision: str


def relay_children(
    relay: SmtpRelay,
    contents: Contents,
    *,
    authority: Mapping[str, bytes] | None,
    replicas: int,
    claims: list[Object] | None,
    settings: workload.PodSettings,
) -> list[Object]:
    """What a relay consists of, what a pod needs before the pods. `authority` is None where tls names a Secret."""
    owner = owner_of(relay)
    children = configuration_children(owner, contents)
    if authority is not None:
        children.append(secrets.authority_secret(owner, authority))
    if (bundle := contents.files.get("ca.crt")) is not None:
        children.append(secrets.authority_config_map(owner, bundle))
    children += [
        workload.service_account(owner),
        network.client_service(relay, owner),
        network.pods_service(relay, owner),
    ]
    asked_for = (
        network.network_policy(relay, owner),
        network.disruption_budget(relay, owner),
        scaling.autoscaler(relay, owner),
        monitoring.pod_monitor(relay, owner),
        monitoring.prometheus_rule(relay, owner),
    )
    children += [found for found in asked_for if found is not None]
    children.append(workload.workload(relay, owner, settings, replicas, claims))
    return children


def configuration_children(owner: Owner, contents: Contents) -> list[Object]:
    """The two Secrets that a pod mounts. Credentials come first: the configuration names their revision."""
    return [
        secrets.credentials_secret(owner, contents.files, contents.credentials_revision),
        secrets.config_secret(owner, contents.packed, contents.revision),
    ]


def service_host(relay: SmtpRelay) -> str:
    """Under which name clients in the cluster reach the relay."""
    return f"{relay.metadata.name}.{relay.metadata.namespace}.svc"


def user_secret_name(user: SmtpUser) -> str:
    return user.spec.secret_name or f"{user.metadata.name}-smtp"


def user_secret(relay: SmtpRelay, user: SmtpUser, passwords: Passwords, bundle: bytes) -> Object | None:
    """The Secret that an application sends with; None when the relay has no listener with TLS to send it to.

    Port 587 with STARTTLS is what most libraries expect, and 465 what RFC 8314 prefers; 25 is for servers.
    """
    usable = [listener for listener in relay.spec.listeners if listener.mode is not ListenerMode.PLAIN]
    ranked = sorted(usable, key=lambda listener: ({587: 0, 465: 1}.get(listener.port, 2), listener.port))
    if not ranked:
        return None
    annotations = {ROTATED_ANNOTATION: timestamp(passwords.made_at)}
    if passwords.former_until is not None:
        annotations[FORMER_UNTIL_ANNOTATION] = timestamp(passwords.former_until)
    return secrets.user_secret(
        owner_of(user),
        user_secret_name(user),
        host=service_host(relay),
        port=ranked[0].port,
        login=user.spec.login,
        password=passwords.current,
        former_password=passwords.former,
        annotations=annotations,
        implicit_tls=ranked[0].mode is ListenerMode.IMPLICIT_TLS,
        bundle=bundle,
    )
