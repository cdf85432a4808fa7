"""Files in, a relay's configuration out: what the operator does with the API server's objects, done with YAML."""

from __future__ import annotations

import datetime
import hashlib
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from mailsluice_operator import credentials
from mailsluice_operator.children import configuration
from mailsluice_operator.children.configuration import Secret, Unusable
from mailsluice_operator.children.metadata import Object
from mailsluice_operator.children.workload import PodSettings
from mailsluice_operator.desired import Contents, decide, relay_children, user_secret_name
from mailsluice_operator.local.documents import Documents, LocalError, read
from mailsluice_operator.local.mount import write_private
from mailsluice_operator.resource.models import SmtpRelay, SmtpUser
from mailsluice_relay.config import Configuration, Credentials, User, encode, hash_password


@dataclass(frozen=True, slots=True)
class Compiled:
    """One reading of the files."""

    relay: SmtpRelay
    directory: Path
    """The data directory."""
    configuration: Configuration
    files: Credentials
    warnings: tuple[str, ...]


def compiled(
    files: Sequence[Path], name: str | None, data_directory: Path | None, ports: Mapping[str, int]
) -> Compiled:
    """Read the files and make the configuration. Raises LocalError, naming object, field and remedy.

    The relay's own authority and the passwords made for SmtpUsers are kept in the data directory, and made at the first
    time. `ports` replaces those of listeners.
    """
    documents = read(files)
    relay = chosen(documents, name)
    directory = _directory(relay, data_directory)
    namespace = relay.metadata.namespace
    secrets = {name: as_read(documents, namespace, name) for space, name in documents.secrets if space == namespace}
    warnings: list[str] = []
    try:
        users = _granted(relay, documents, secrets, directory, warnings)
        built = configuration.build(relay, secrets=secrets, users=users, server=_certificate(relay, directory))
    except Unusable as error:
        raise LocalError(
            "\n".join(f"SmtpRelay/{relay.metadata.name}: {fact.message}" for fact in error.facts)
        ) from error
    warnings += [fact.message for fact in built.degraded]
    return Compiled(relay, directory, _with_ports(built.configuration, ports), built.files, tuple(warnings))


def data_directory(files: Sequence[Path], name: str | None, given: Path | None) -> Path:
    """Where the relay of the files keeps its queue; made if need be. Raises LocalError."""
    return _directory(chosen(read(files), name), given)


def render(files: Sequence[Path], name: str | None, image: str) -> list[Object]:
    """The objects that the operator would make of a relay. Values of Secrets are left out."""
    with tempfile.TemporaryDirectory(prefix="mailsluice-render-") as folder:
        made = compiled(files, name, Path(folder), {})
    children = relay_children(
        made.relay,
        Contents(
            encode(made.configuration),
            made.configuration.revision,
            made.files,
            made.configuration.credentials_revision,
        ),
        authority=None,
        replicas=made.relay.spec.replicas or 1,
        claims=None,
        settings=PodSettings(image=image),
    )
    for child in children:
        del child["metadata"]["ownerReferences"]  # nobody has this uid: the garbage collector would take the object
        if child["kind"] == "Secret":
            child["data"] = dict.fromkeys(child["data"], "(left out)")
    return children


def chosen(documents: Documents, name: str | None) -> SmtpRelay:
    """The one relay, or that of the name. Raises LocalError."""
    found = [relay for relay in documents.relays if name is None or relay.metadata.name == name]
    names = ", ".join(relay.metadata.name for relay in documents.relays) or "none"
    if not found:
        raise LocalError(f"the files hold no SmtpRelay{f' {name}' if name else ''}; they hold {names}")
    if len(found) > 1:
        raise LocalError(f"the files hold several SmtpRelays ({names}); choose one with --relay")
    return found[0]


def relay_of(user: SmtpUser) -> tuple[str, str]:
    reference = user.spec.relay_ref
    return reference.namespace or user.metadata.namespace, reference.name


def as_read(documents: Documents, namespace: str, name: str) -> Secret:
    """A Secret of the files as the API server would give it; its version is its content's."""
    data = documents.secrets[namespace, name]
    version = hashlib.sha256(msgspec.json.encode(sorted((key, value) for key, value in data.items()))).hexdigest()
    return Secret(data=data, uid=f"{namespace}/{name}", resource_version=version)


def kept_password(directory: Path, user: SmtpUser) -> str:
    """The password of a SmtpUser, made at its first use, in a file named like its Secret."""
    directory.mkdir(mode=0o700, exist_ok=True)
    path = directory / f"{user.metadata.namespace}.{user_secret_name(user)}"
    if not path.exists():
        write_private(path, credentials.new_password(os.urandom).encode())
    return path.read_text()


def _directory(relay: SmtpRelay, given: Path | None) -> Path:
    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    directory = given or state / "mailsluice" / relay.metadata.namespace / relay.metadata.name
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    return directory.resolve()


def _with_ports(made: Configuration, ports: Mapping[str, int]) -> Configuration:
    names = {listener.name for listener in made.listeners}
    if unknown := sorted(set(ports) - names):
        raise LocalError(f"--port {unknown[0]}: the relay has no such listener; it has {', '.join(sorted(names))}")
    listeners = tuple(
        msgspec.structs.replace(listener, port=ports.get(listener.name, listener.port)) for listener in made.listeners
    )
    return msgspec.structs.replace(made, listeners=listeners)


def _certificate(relay: SmtpRelay, directory: Path) -> Credentials:
    """The relay's own certificate, kept in the data directory; also good for this machine's name."""
    kept = directory / "authority"
    kept.mkdir(mode=0o700, exist_ok=True)
    held = {path.name: path.read_bytes() for path in kept.iterdir()}
    names = credentials.service_names(configuration.hostname(relay), relay.metadata.name, relay.metadata.namespace)
    material = credentials.ensure(held, (*names, "localhost"), datetime.datetime.now(datetime.UTC))
    for name, content in material.secret().items():
        if held.get(name) != content:
            write_private(kept / name, content)
    return material.server_files()


def _granted(
    relay: SmtpRelay, documents: Documents, secrets: Mapping[str, Secret], directory: Path, warnings: list[str]
) -> list[User]:
    """The SmtpUsers that the relay grants, each with a password kept in the data directory."""
    own = (relay.metadata.namespace, relay.metadata.name)
    wanted = [user for user in documents.users if relay_of(user) == own]
    granted: list[User] = []
    for decision in decide(relay, wanted, documents.namespaces, configuration.own_logins(relay, secrets)):
        user = decision.user
        if decision.refused is not None:
            warnings.append(f"SmtpUser {user.metadata.namespace}/{user.metadata.name}: {decision.refused.message}")
            continue
        password = kept_password(directory / "users", user)
        salt = hashlib.sha256(f"{user.metadata.namespace}/{user.metadata.name}".encode()).digest()[:16]
        granted.append(configuration.smtp_user(user, relay, (hash_password(password, salt),)))
    return granted
