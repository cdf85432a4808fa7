"""What the API server would say about a resource, without one: the same checks, in the same order, in the same words.

Strict field validation first; then defaults; then the schema as kube-openapi checks it; then lists that are maps or
sets; then, unless an error so far stands in the way, the CEL rules. Words are those of Kubernetes 1.37, held against an
API server by a table of wrong resources (tests/operator/resources/invalid.yaml).
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterator, Mapping
from typing import Any, Final

import re2

from mailsluice_operator.resource import cel
from mailsluice_operator.resource.crd import schema
from mailsluice_operator.resource.defaults import with_defaults
from mailsluice_operator.resource.models import API_VERSION, SmtpRelay, SmtpUser
from mailsluice_operator.resource.schema import SUBDOMAIN_PATTERN

Schema = dict[str, Any]

_NOT_A_SUBDOMAIN: Final = (
    "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.', and must start and "
    f"end with an alphanumeric character (e.g. 'example.com', regex used for validation is '{SUBDOMAIN_PATTERN[1:-1]}')"
)
KINDS: Final[Mapping[str, type]] = {"SmtpRelay": SmtpRelay, "SmtpUser": SmtpUser}


@dataclasses.dataclass(frozen=True)
class Problem:
    """One error. `path` is a field such as `spec.listeners[0].mode`."""

    path: str
    message: str
    blocking: bool = dataclasses.field(default=False, compare=False)
    """The rules cannot be evaluated while it stands."""

    def __str__(self) -> str:
        return f"{self.path}: {self.message}" if self.path else self.message


@functools.cache
def schema_of(kind: str) -> Schema:
    return schema(KINDS[kind], described=False)


def admitted(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """A valid resource as the API server would store it: with defaults, without nulls."""
    value: dict[str, Any] = with_defaults(schema_of(manifest["kind"]), manifest)
    return value


def validate(manifest: Mapping[str, Any]) -> list[Problem]:
    """All that the API server would refuse in a SmtpRelay or SmtpUser to be created; empty if nothing."""
    kind, version = manifest.get("kind"), manifest.get("apiVersion")
    if not isinstance(kind, str) or kind not in KINDS or version != API_VERSION:
        return [Problem("kind", f'no matches for kind "{kind}" in version "{version}"')]
    of_kind = schema_of(kind)
    if unknown := list(_unknown_fields(of_kind, manifest, "")):
        return unknown
    value = with_defaults(of_kind, manifest)
    problems = [*_metadata(value.get("metadata")), *_schema(of_kind, value, ""), *_lists(of_kind, value, "")]
    if not any(problem.blocking for problem in problems):
        problems.extend(_rules(of_kind, value, ""))
    return problems


def known_fields(kind: str, path: str) -> tuple[str, ...]:
    """The fields beside the one at `path`, for suggestions; empty if there is no such place."""
    node = schema_of(kind)
    *parents, _ = [part.split("[")[0] for part in path.split(".")]
    for name in parents:
        node = node.get("properties", {}).get(name, {})
        node = node.get("items", node)
    return tuple(node.get("properties", ()))


def _child(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _fields(of: Schema, value: Mapping[str, Any]) -> Iterator[tuple[str, Schema, Any]]:
    """Known fields of an object with their schemas, and the items of a map."""
    properties, others = of.get("properties", {}), of.get("additionalProperties")
    for name, item in value.items():
        if name in properties:
            yield name, properties[name], item
        elif others is not None:
            yield name, others, item


# --- Unknown fields ---------------------------------------------------------------------------------------------------


def _unknown_fields(of: Schema, value: Any, path: str) -> Iterator[Problem]:
    if isinstance(value, list):
        for index, item in enumerate(value):
            yield from _unknown_fields(of.get("items", {}), item, f"{path}[{index}]")
        return
    if not isinstance(value, Mapping) or path == "metadata":
        return
    known = {name for name, _, _ in _fields(of, value)}
    for name in value:
        if name not in known:
            yield Problem(_child(path, name), f'unknown field "{_child(path, name)}"')
    for name, child, item in _fields(of, value):
        yield from _unknown_fields(child, item, _child(path, name))


# --- Metadata ---------------------------------------------------------------------------------------------------------


def _metadata(metadata: Any) -> Iterator[Problem]:
    name = metadata.get("name") if isinstance(metadata, Mapping) else None
    if not name:
        yield Problem("metadata.name", "Required value: name or generateName is required", blocking=True)
    elif not re2.search(SUBDOMAIN_PATTERN, str(name)):
        yield Problem("metadata.name", f"Invalid value: {_shown(name)}: {_NOT_A_SUBDOMAIN}")


# --- Schema -----------------------------------------------------------------------------------------------------------


def _schema(of: Schema, value: Any, path: str) -> Iterator[Problem]:
    yield from _type(of, value, path)
    if value is None:
        return
    if "enum" in of and value not in of["enum"]:
        supported = ", ".join(json.dumps(item) for item in of["enum"])
        yield Problem(path, f"Unsupported value: {_shown(value)}: supported values: {supported}", blocking=True)
    if isinstance(value, str):
        yield from _text(of, value, path)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield from _number(of, value, path)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _schema(of.get("items", {}), item, f"{path}[{index}]")
        if len(value) < of.get("minItems", 0):
            yield _invalid(path, len(value), f"should have at least {of['minItems']} items")
        yield from _too_many(path, len(value), of.get("maxItems"))
    elif isinstance(value, Mapping):
        for name, child, item in _fields(of, value):
            yield from _schema(child, item, _child(path, name))
        for name in of.get("required", ()):
            if name not in value:
                yield Problem(_child(path, name), "Required value", blocking=True)
        yield from _too_many(path, len(value), of.get("maxProperties"))


def _type(of: Schema, value: Any, path: str) -> Iterator[Problem]:
    wanted = ["integer", "string"] if of.get("x-kubernetes-int-or-string") else [of["type"]] if "type" in of else []
    found = _type_name(value)
    if wanted and found not in wanted and not (found == "integer" and "number" in wanted):
        text = f'{path} in body must be of type {",".join(wanted)}: "{found}"'
        yield Problem(path, f'Invalid value: "{found}": {text}', blocking=True)


def _type_name(value: Any) -> str:
    if value is None:
        return "null"
    for kind, name in ((bool, "boolean"), (int, "integer"), (float, "number"), (str, "string"), (list, "array")):
        if isinstance(value, kind):
            return name
    return "object"


def _text(of: Schema, value: str, path: str) -> Iterator[Problem]:
    """The first that is wrong, as kube-openapi leaves it at that."""
    limit = of.get("maxLength")
    pattern = of.get("pattern")
    if limit is not None and len(value) > limit:
        unit = "byte" if limit == 1 else "bytes"
        yield Problem(path, f"Too long: may not be more than {limit} {unit}", blocking=True)
    elif len(value) < of.get("minLength", 0):
        yield _invalid(path, value, f"should be at least {of['minLength']} chars long")
    # RE2 as in Go, where `$` is the very end; Python's own would let a last line feed through.
    elif pattern is not None and not re2.search(pattern, value):
        yield _invalid(path, value, f"should match '{pattern}'")


def _number(of: Schema, value: float, path: str) -> Iterator[Problem]:
    if "minimum" in of and value < of["minimum"]:
        yield _invalid(path, value, f"should be greater than or equal to {_shown(of['minimum'])}")
    if "maximum" in of and value > of["maximum"]:
        yield _invalid(path, value, f"should be less than or equal to {_shown(of['maximum'])}")


def _too_many(path: str, count: int, limit: int | None) -> Iterator[Problem]:
    if limit is not None and count > limit:
        items = "item" if limit == 1 else "items"
        yield Problem(path, f"Too many: {count}: must have at most {limit} {items}", blocking=True)


def _invalid(path: str, value: Any, what: str) -> Problem:
    return Problem(path, f"Invalid value: {_shown(value)}: {path} in body {what}")


def _shown(value: Any) -> str:
    """As Go's field errors print a value: strings and compounds as JSON, numbers without superfluous zeros."""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), sort_keys=True)


# --- Lists that are maps or sets --------------------------------------------------------------------------------------


def _lists(of: Schema, value: Any, path: str) -> Iterator[Problem]:
    if isinstance(value, list):
        kind = of.get("x-kubernetes-list-type")
        if kind == "set":
            yield from _repeated(value, path)
        elif kind == "map":
            for index, item in enumerate(value):
                if item is not None and not isinstance(item, Mapping):
                    wrong = f"Invalid value: {_shown(item)}: must be an object for an array of list-type map"
                    yield Problem(f"{path}[{index}]", wrong)
                    return
            keys = of["x-kubernetes-list-map-keys"]
            yield from _repeated(
                [{key: (item or {})[key] for key in keys if key in (item or {})} for item in value], path
            )
        for index, item in enumerate(value):
            yield from _lists(of.get("items", {}), item, f"{path}[{index}]")
    elif isinstance(value, Mapping):
        for name, child, item in _fields(of, value):
            yield from _lists(child, item, _child(path, name))


def _repeated(values: list[Any], path: str) -> Iterator[Problem]:
    """Only the second of equal values is an error, however many follow."""
    counts: dict[str, int] = {}
    for index, value in enumerate(values):
        shown = _shown(value)
        counts[shown] = counts.get(shown, 0) + 1
        if counts[shown] == 2:
            yield Problem(f"{path}[{index}]", f"Duplicate value: {shown}")


# --- Rules ------------------------------------------------------------------------------------------------------------


def _rules(of: Schema, value: Any, path: str) -> Iterator[Problem]:
    if value is None:
        return
    if checks := of.get("x-kubernetes-validations"):
        subject = cel.to_cel(of, value)
        for check in checks:
            if not cel.holds(check["rule"], subject):
                yield _broken(check, value, path)
    if isinstance(value, list):
        for index, item in enumerate(value):
            yield from _rules(of.get("items", {}), item, f"{path}[{index}]")
    elif isinstance(value, Mapping):
        for name, child, item in _fields(of, value):
            yield from _rules(child, item, _child(path, name))


def _broken(check: Mapping[str, Any], value: Any, path: str) -> Problem:
    path += check.get("fieldPath", "")
    match check.get("reason"):
        case "FieldValueRequired":
            return Problem(path, f"Required value: {check['message']}")
        case "FieldValueForbidden":
            return Problem(path, f"Forbidden: {check['message']}")
        case _ if isinstance(value, Mapping | list):
            return Problem(path, f"Invalid value: {check['message']}")
        case _:
            return Problem(path, f"Invalid value: {_shown(value)}: {check['message']}")
