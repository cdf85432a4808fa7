"""The check of files without a cluster: YAML, schema and rules, references, and what this release does not do yet."""

from __future__ import annotations

import base64
import binascii
import dataclasses
import difflib
import enum
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from mailsluice_operator.resource.models import GROUP, SmtpRelay, SmtpUser, relay_from, user_from
from mailsluice_operator.resource.not_yet import not_yet
from mailsluice_operator.resource.references import Purpose, SecretUse, is_basic_auth, secret_uses, wrong_content
from mailsluice_operator.resource.schema import PATTERN_REMEDIES
from mailsluice_operator.resource.validation import KINDS, Problem, admitted, known_fields, validate
from mailsluice_operator.resource.yaml_lines import Document, YAMLProblem, documents
from mailsluice_relay.config import LoginFormat, login_key, parse_htpasswd


class Severity(enum.Enum):
    ERROR = "error"
    WARNING = "warning"


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing to tell about a file."""

    file: str
    line: int
    object: str
    """kind/name, or empty where the file itself is meant."""
    field: str
    message: str
    """What is wrong; what to do."""
    severity: Severity = Severity.ERROR

    def __str__(self) -> str:
        warning = "warning" if self.severity is Severity.WARNING else ""
        parts = (f"{self.file}:{self.line}", warning, self.object, self.field, self.message)
        return ": ".join(part for part in parts if part)


@dataclasses.dataclass(frozen=True)
class Loaded:
    """An object of a file."""

    file: str
    document: Document

    @property
    def value(self) -> Mapping[str, Any]:
        value: Mapping[str, Any] = self.document.value
        return value

    @property
    def kind(self) -> str:
        return str(self.value.get("kind", ""))

    @property
    def name(self) -> str:
        return str(self._metadata.get("name", ""))

    @property
    def namespace(self) -> str | None:
        """None when the file leaves it to `kubectl -n`."""
        namespace = self._metadata.get("namespace")
        return str(namespace) if namespace is not None else None

    @property
    def _metadata(self) -> Mapping[str, Any]:
        metadata = self.value.get("metadata")
        return metadata if isinstance(metadata, Mapping) else {}

    def finding(self, field: str, message: str, severity: Severity = Severity.ERROR) -> Finding:
        line = self.document.line_of(field)
        return Finding(self.file, line, f"{self.kind}/{self.name}", field, message, severity)


def load_files(paths: Iterable[Path]) -> tuple[list[Loaded], list[Finding]]:
    """The objects of files, and what keeps files from being read."""
    loaded: list[Loaded] = []
    findings: list[Finding] = []
    for path in paths:
        file = str(path)
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            findings.append(Finding(file, 1, "", "", f"cannot be read: {error.strerror}; check the path"))
            continue
        except UnicodeDecodeError:
            findings.append(Finding(file, 1, "", "", "is not UTF-8 text; save it as such"))
            continue
        try:
            for document in documents(text):
                if isinstance(document.value, dict):
                    loaded.append(Loaded(file, document))
                else:
                    findings.append(
                        Finding(file, document.line, "", "", "is no object; write apiVersion, kind, metadata and spec")
                    )
        except YAMLProblem as problem:
            findings.append(Finding(file, problem.line, "", "", f"broken YAML: {problem}"))
    return loaded, findings


def check_files(paths: Sequence[Path], *, strict: bool = False) -> list[Finding]:
    """Everything that is wrong with the files, by file and line. `strict`: objects that are missing are errors."""
    loaded, findings = load_files(paths)
    absent = Severity.ERROR if strict else Severity.WARNING
    told = {item.file for item in loaded} | {finding.file for finding in findings}
    findings += [
        Finding(str(path), 1, "", "", "holds no object; see that it is the file that you mean", absent)
        for path in paths
        if str(path) not in told
    ]
    findings += _twice(loaded)
    secrets = _Secrets(loaded)
    findings += secrets.findings
    relays: list[tuple[Loaded, SmtpRelay]] = []
    users: list[tuple[Loaded, SmtpUser]] = []
    for item in loaded:
        if not _is_ours(item):
            continue
        if problems := validate(item.value):
            findings += [_of_problem(item, problem) for problem in problems]
            continue
        try:
            if item.kind == "SmtpRelay":
                relays.append((item, relay_from(admitted(item.value))))
            else:
                users.append((item, user_from(admitted(item.value))))
        except msgspec.ValidationError as error:  # metadata, which the schema leaves to the API server
            findings.append(item.finding("metadata", f"{error}; correct it"))
    for item, relay in relays:
        findings += secrets.of_relay(item, relay, absent)
        findings += _no_effect(item, relay)
    for item, user in users:
        findings += _of_user(item, user, relays, absent)
        findings += _no_effect(item, user)
    return sorted(findings, key=lambda finding: (finding.file, finding.line, finding.field, finding.message))


def _is_ours(item: Loaded) -> bool:
    version = str(item.value.get("apiVersion", ""))
    return version.split("/")[0] == GROUP or item.kind in KINDS


def _twice(loaded: list[Loaded]) -> Iterator[Finding]:
    seen: dict[tuple[str, str, str | None], Loaded] = {}
    for item in loaded:
        identity = (item.kind, item.name, item.namespace)
        if item.name and identity in seen:
            first = seen[identity]
            yield item.finding(
                "metadata.name", f"is already at {first.file}:{first.document.line}; remove one or rename it"
            )
        seen.setdefault(identity, item)


def _no_effect(item: Loaded, resource: SmtpRelay | SmtpUser) -> Iterator[Finding]:
    for entry in not_yet(resource):
        yield item.finding(entry.field, entry.message, Severity.WARNING)


# --- Schema and rules -------------------------------------------------------------------------------------------------


def _of_problem(item: Loaded, problem: Problem) -> Finding:
    return item.finding(problem.path, problem.message + _remedy(item, problem))


def _remedy(item: Loaded, problem: Problem) -> str:
    """What to do, where the API server's words do not say it."""
    message = problem.message
    if message.startswith("unknown field"):
        return _suggestion(item.kind, problem.path)
    if message == "Required value":
        return "; add it"
    if message.startswith("Duplicate value"):
        return "; rename or remove one"
    if message.startswith("Unsupported value"):
        return "; choose one of them"
    for pattern, remedy in PATTERN_REMEDIES.items():
        if message.endswith(f"should match '{pattern}'"):
            return f"; {remedy}"
    return "" if ";" in message else "; correct it"


def _suggestion(kind: str, path: str) -> str:
    name = path.rpartition(".")[2]
    fields = known_fields(kind, path)
    by_folded = {field.casefold(): field for field in fields}
    close = difflib.get_close_matches(name.casefold(), by_folded, n=1)
    if close:
        return f"; did you mean {by_folded[close[0]]}?"
    return f"; remove it, or choose of {', '.join(fields)}" if 0 < len(fields) <= 12 else "; remove it"


# --- References -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Secret:
    item: Loaded
    data: Mapping[str, bytes]


class _Secrets:
    """The Secrets of the files."""

    def __init__(self, loaded: list[Loaded]) -> None:
        self.findings: list[Finding] = []
        self._by_name: dict[str, list[_Secret]] = defaultdict(list)
        for item in loaded:
            if item.kind == "Secret" and item.value.get("apiVersion") == "v1":
                self._by_name[item.name].append(_Secret(item, self._data(item)))

    def _data(self, item: Loaded) -> dict[str, bytes]:
        data: dict[str, bytes] = {}
        for key, text in _texts(item, "data"):
            try:
                data[key] = base64.b64decode(text.replace("\r", "").replace("\n", ""), validate=True)
            except (binascii.Error, ValueError):
                self.findings.append(
                    item.finding(f"data.{key}", "is not base64; encode it, or write the text under stringData")
                )
        for key, text in _texts(item, "stringData"):
            data[key] = text.encode()
        return data

    def of_relay(self, item: Loaded, relay: SmtpRelay, absent: Severity) -> Iterator[Finding]:
        logins: dict[str, str] = {}
        for use in secret_uses(relay):
            secret = self._find(item.namespace, use.name)
            if secret is None:
                yield item.finding(
                    use.field, f"Secret {use.name} is not in the files; add it, or see that the cluster has it", absent
                )
            elif (wrong := wrong_content(use, secret.data)) is not None:
                where = _where(secret, use)
                yield secret.item.finding(where, f"{wrong} (named by {item.kind}/{item.name}: {use.field})")
            elif use.purpose is Purpose.USERS:
                yield from _logins(item, relay, use, secret, logins)

    def _find(self, namespace: str | None, name: str) -> _Secret | None:
        """Where one of the two leaves the namespace to `kubectl -n`, they are taken for neighbours."""
        for secret in self._by_name.get(name, ()):
            if namespace is None or secret.item.namespace in (None, namespace):
                return secret
        return None


def _texts(item: Loaded, field: str) -> Iterator[tuple[str, str]]:
    values = item.value.get(field)
    if isinstance(values, Mapping):
        for key, text in values.items():
            yield str(key), text if isinstance(text, str) else ""


def _where(secret: _Secret, use: SecretUse) -> str:
    for field in ("stringData", "data"):
        if use.key in (secret.item.value.get(field) or {}):
            return f"{field}.{use.key}"
    return "stringData" if "stringData" in secret.item.value else "data"


def _logins(item: Loaded, relay: SmtpRelay, use: SecretUse, secret: _Secret, seen: dict[str, str]) -> Iterator[Finding]:
    if is_basic_auth(use, secret.data):
        names = [secret.data["username"].decode().strip()]
    else:
        names = [login for login, _ in parse_htpasswd(secret.data[use.key].decode())]
    for login in names:
        if relay.spec.authentication.login_format is LoginFormat.FULL and "@" not in login:
            yield secret.item.finding(
                _where(secret, use),
                f"{login} is no full address, and with loginFormat Full of {item.kind}/{item.name} nobody can log in "
                "with it; write the full address, or set loginFormat",
                Severity.WARNING,
            )
        if (other := seen.setdefault(login_key(login), use.name)) != use.name:
            yield item.finding(
                use.field, f"Secret {use.name} has the login {login}, which Secret {other} has too; remove one of them"
            )


def _of_user(
    item: Loaded, user: SmtpUser, relays: list[tuple[Loaded, SmtpRelay]], absent: Severity
) -> Iterator[Finding]:
    wanted = user.spec.relay_ref
    for other, relay in relays:
        namespaces = {other.namespace, wanted.namespace or item.namespace}
        if other.name == wanted.name and (None in namespaces or len(namespaces) == 1):
            if relay.spec.authentication.smtp_users is None:
                yield item.finding(
                    "spec.relayRef",
                    f"SmtpRelay {wanted.name} takes no SmtpUsers; its owner has to set spec.authentication.smtpUsers",
                )
            return
    yield item.finding(
        "spec.relayRef", f"SmtpRelay {wanted.name} is not in the files; add it, or see that the cluster has it", absent
    )


__all__: Final = ["Finding", "Loaded", "Severity", "check_files", "load_files"]
