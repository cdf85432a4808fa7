"""The CustomResourceDefinitions, generated from the models.

    python -m mailsluice_operator.resource.crd [DIRECTORY]

writes them; the default directory is crds/. The schema is structural, as apiextensions.k8s.io/v1 demands: no
references, no unions but x-kubernetes-int-or-string.
"""

from __future__ import annotations

import ast
import functools
import inspect
import sys
import textwrap
from pathlib import Path
from typing import Any, Final

import msgspec

from mailsluice_operator.resource.defaults import with_defaults
from mailsluice_operator.resource.models import GROUP, VERSION, SmtpRelay, SmtpUser

Schema = dict[str, Any]

_REFERENCE: Final = "#/{name}"
_DROPPED: Final = frozenset({"title", "additionalProperties", "description"})
_NAMES: Final[dict[type, Schema]] = {
    # Becomes the name of a Service (a DNS label that starts with a letter) and of a StatefulSet, whose pods carry it in
    # a label with eleven characters more (kubernetes/kubernetes#64023); what is derived from it needs room too.
    SmtpRelay: {"type": "string", "maxLength": 45, "pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$"},
    SmtpUser: {"type": "string", "maxLength": 63},
}


@functools.cache
def attribute_docs(model: type) -> dict[str, str]:
    """The docstrings below the fields of a class, by field; those that it inherits too."""
    docs: dict[str, str] = {}
    for base in reversed(model.__mro__):
        if base is msgspec.Struct or not issubclass(base, msgspec.Struct):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        if not isinstance(body, ast.ClassDef):
            continue
        for field, text in zip(body.body, body.body[1:], strict=False):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(text, ast.Expr)
                and isinstance(text.value, ast.Constant)
                and isinstance(text.value.value, str)
            ):
                docs[field.target.id] = " ".join(text.value.value.split())
    return docs


def _models(root: type) -> dict[str, type]:
    """The struct types that a type reaches, by the name that msgspec gives them."""
    found: dict[str, type] = {}

    def visit(info: msgspec.inspect.Type) -> None:
        if isinstance(info, msgspec.inspect.StructType):
            if info.cls.__name__ in found:
                return
            found[info.cls.__name__] = info.cls
            for field in info.fields:
                visit(field.type)
            return
        for attribute in ("type", "item_type", "value_type"):
            if isinstance(inner := getattr(info, attribute, None), msgspec.inspect.Type):
                visit(inner)
        for inner in getattr(info, "types", ()):
            visit(inner)

    visit(msgspec.inspect.type_info(root))
    return found


class _Builder:
    """Turns msgspec's JSON schema of a model into a structural one."""

    def __init__(self, root: type, *, described: bool) -> None:
        self.models = _models(root)
        (self.root,), self.components = msgspec.json.schema_components((root,), ref_template=_REFERENCE)
        self.described = described

    def build(self) -> Schema:
        return self.structural(self.root)

    def structural(self, schema: Schema) -> Schema:
        if "$ref" in schema:
            name = schema["$ref"].removeprefix("#/")
            beside = {key: value for key, value in schema.items() if key != "$ref"}
            return _joined(self.component(name), self.structural(beside))
        if "anyOf" in schema:
            beside = {key: value for key, value in schema.items() if key != "anyOf"}
            return _joined(self.union(schema["anyOf"]), self.structural(beside))
        result = {key: value for key, value in schema.items() if key not in _DROPPED}
        if "enum" in result:
            # msgspec sorts them; the order of the source is not kept by typing.Literal either way.
            result["type"] = "string"
        if "items" in schema:
            result["items"] = self.structural(schema["items"])
        if isinstance(schema.get("additionalProperties"), dict):
            result["additionalProperties"] = self.structural(schema["additionalProperties"])
        if "default" in result:
            default = msgspec.json.decode(msgspec.json.encode(result.pop("default")))
            if default not in (None, []):
                result["default"] = default
        return result

    def union(self, branches: list[Schema]) -> Schema:
        """Only `X | None` (an optional field) and `int | str` occur; anything else has no structural form."""
        rest = [self.structural(branch) for branch in branches if branch != {"type": "null"}]
        if len(rest) == 1:
            return rest[0]
        if sorted(branch.get("type", "") for branch in rest) != ["integer", "string"]:
            raise TypeError(f"no structural schema for the union {branches}")
        number, text = sorted(rest, key=lambda branch: str(branch["type"]))
        limits = {key: value for branch in (number, text) for key, value in branch.items() if key != "type"}
        # `anyOf` of the two types may stand beside it, but would only double every error.
        return {"x-kubernetes-int-or-string": True, **limits}

    def component(self, name: str) -> Schema:
        component = self.components[name]
        model = self.models.get(name)
        if model is None:  # an enumeration
            return self.structural(component)
        docs = attribute_docs(model) if self.described else {}
        fields = {field.encode_name: field.name for field in msgspec.structs.fields(model)}
        properties: Schema = {}
        for encoded, schema in component["properties"].items():
            made = self.structural(schema)
            if text := docs.get(fields[encoded]):
                made = {"description": text, **{key: value for key, value in made.items() if key != "description"}}
            if "default" in made:
                # Rules are checked against a default as it stands, so it must hold its own defaults.
                made["default"] = with_defaults(made, made["default"])
            properties[encoded] = made
        result: Schema = {}
        if self.described:
            result["description"] = " ".join((model.__doc__ or "").split())
        result["type"] = "object"
        if component.get("required"):
            result["required"] = component["required"]
        result["properties"] = properties
        if checks := getattr(model, "RULES", ()):
            result["x-kubernetes-validations"] = [rule.to_schema() for rule in checks]
        return result


def _joined(of_type: Schema, of_field: Schema) -> Schema:
    """What a type says and what its field adds; the rules of both hold."""
    checks = [*of_type.get("x-kubernetes-validations", ()), *of_field.get("x-kubernetes-validations", ())]
    return {**of_type, **of_field, **({"x-kubernetes-validations": checks} if checks else {})}


def schema(model: type, *, described: bool = True) -> Schema:
    """The openAPIV3Schema of a resource."""
    built = _Builder(model, described=described).build()
    built["properties"] = {
        "apiVersion": {"type": "string"},
        "kind": {"type": "string"},
        "metadata": {"type": "object", "properties": {"name": _NAMES[model]}},
        "spec": built["properties"]["spec"],
        "status": {key: value for key, value in built["properties"]["status"].items() if key != "default"},
    }
    built["required"] = ["spec"]
    return built


def _column(name: str, kind: str, path: str, description: str, *, wide: bool = False) -> dict[str, Any]:
    column: dict[str, Any] = {"name": name, "type": kind, "jsonPath": path, "description": description}
    if wide:
        column["priority"] = 1
    return column


def _condition(kind: str, field: str) -> str:
    return f'.status.conditions[?(@.type=="{kind}")].{field}'


_AGE: Final = _column("Age", "date", ".metadata.creationTimestamp", "Time since creation.")
_READY: Final = _column("Ready", "string", _condition("Ready", "status"), "Whether it works.")
_REASON: Final = _column("Reason", "string", _condition("Ready", "reason"), "Why, or why not.")


def _definition(
    model: type, *, short: str, columns: list[dict[str, Any]], subresources: dict[str, Any]
) -> dict[str, Any]:
    kind = model.__name__
    plural = f"{kind.lower()}s"
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{plural}.{GROUP}"},
        "spec": {
            "group": GROUP,
            "names": {
                "kind": kind,
                "listKind": f"{kind}List",
                "plural": plural,
                "singular": kind.lower(),
                "shortNames": [short],
                "categories": ["mailsluice"],
            },
            "scope": "Namespaced",
            "versions": [
                {
                    "name": VERSION,
                    "served": True,
                    "storage": True,
                    "additionalPrinterColumns": columns,
                    "subresources": subresources,
                    "schema": {"openAPIV3Schema": schema(model)},
                }
            ],
        },
    }


def relay_definition() -> dict[str, Any]:
    return _definition(
        SmtpRelay,
        short="relay",
        columns=[
            _READY,
            _REASON,
            _column("Replicas", "integer", ".status.replicas", "Pods that there are."),
            _column("Queued", "integer", ".status.queuedMessages", "Messages that wait in the queues."),
            _column("Endpoint", "string", ".status.endpoints[0].address", "Where clients connect to."),
            _AGE,
            _column("Users", "integer", ".status.users", "Logins that the relay knows.", wide=True),
        ],
        subresources={
            "status": {},
            "scale": {
                "specReplicasPath": ".spec.replicas",
                "statusReplicasPath": ".status.replicas",
                "labelSelectorPath": ".status.selector",
            },
        },
    )


def user_definition() -> dict[str, Any]:
    return _definition(
        SmtpUser,
        short="smtpuser",
        columns=[
            _READY,
            _REASON,
            _column("Relay", "string", ".spec.relayRef.name", "The relay that it sends through."),
            _column("Login", "string", ".spec.login", "The login."),
            _column("Secret", "string", ".status.secretName", "Where the password is."),
            _AGE,
        ],
        subresources={"status": {}},
    )


def render() -> dict[str, str]:
    """The files of crds/, by name."""
    definitions = (relay_definition(), user_definition())
    names = {f"{definition['metadata']['name']}.yaml": definition for definition in definitions}
    head = (
        "# Generated from operator/mailsluice_operator/resource/models.py by `make crds`; change that file instead.\n"
    )
    files = {name: head + msgspec.yaml.encode(definition).decode() for name, definition in names.items()}
    files["kustomization.yaml"] = (
        head
        + msgspec.yaml.encode(
            {"apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization", "resources": sorted(names)}
        ).decode()
    )
    return files


def main(arguments: list[str]) -> int:
    directory = Path(arguments[0] if arguments else "crds")
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in render().items():
        (directory / name).write_text(text)
        print(directory / name)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
