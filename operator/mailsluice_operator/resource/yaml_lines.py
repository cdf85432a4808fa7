"""YAML documents with the line of every field.

Reads what `kubectl apply -f` reads: YAML 1.1 scalars as JSON values, several documents, lists of kind List. Bounded: a
file that expands beyond reason by aliases is refused.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Any, Final

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

MAXIMUM_SIZE: Final = 4 * 1024 * 1024
"""Octets of one file; etcd takes objects of 1.5 MiB."""
MAXIMUM_NODES: Final = 500_000

_TAG: Final = "tag:yaml.org,2002:"
_TRUE: Final = frozenset({"true", "yes", "on"})
_SEXAGESIMAL: Final = re.compile(r"[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?")


class YAMLProblem(Exception):  # noqa: N818 - a finding about a file, not of the program
    """A file that cannot be read as YAML; `line` is where."""

    def __init__(self, line: int, message: str) -> None:
        self.line = line
        super().__init__(message)


@dataclasses.dataclass(frozen=True)
class Document:
    """One object of a file."""

    line: int
    value: Any
    lines: dict[str, int]
    """The line of every field and item, by its path: `spec.listeners[0].mode`."""

    def line_of(self, path: str) -> int:
        """The line of a field, or of the nearest place around it that is there."""
        while path:
            if path in self.lines:
                return self.lines[path]
            path = path[: max(path.rfind("."), path.rfind("["), 0)]
        return self.line


def documents(text: str) -> Iterator[Document]:
    """Every object of the text. Raises YAMLProblem."""
    if len(text) > MAXIMUM_SIZE:
        raise YAMLProblem(1, f"the file has over {MAXIMUM_SIZE} octets; split it")
    # The pure loader gives nodes with their lines; 1.1 is what Kubernetes' tools read.
    loader = YAML(typ="safe", pure=True)
    loader.version = (1, 1)
    reader = _Reader()
    try:
        for node in loader.compose_all(text):
            if node is None or reader.is_null(node):
                continue
            document = reader.document(node)
            if isinstance(document.value, dict) and document.value.get("kind") == "List":
                yield from _items(document)
            else:
                yield document
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise YAMLProblem(mark.line + 1 if mark is not None else 1, error.problem or "is not YAML") from error
    except YAMLError as error:
        raise YAMLProblem(1, str(error).splitlines()[0]) from error
    except RecursionError as error:
        raise YAMLProblem(1, "is nested too deeply") from error


def _items(document: Document) -> Iterator[Document]:
    for index, item in enumerate(document.value.get("items") or ()):
        prefix = f"items[{index}]"
        lines = {
            path.removeprefix(f"{prefix}."): line
            for path, line in document.lines.items()
            if path.startswith(f"{prefix}.")
        }
        yield Document(document.line_of(prefix), item, lines)


class _Reader:
    """Turns nodes into values, and notes their lines."""

    def __init__(self) -> None:
        self._nodes = 0
        self._lines: dict[str, int] = {}

    def is_null(self, node: Node) -> bool:
        return isinstance(node, ScalarNode) and self._tag(node) == "null"

    def document(self, node: Node) -> Document:
        self._lines = {}
        value = self._value(node, "")
        return Document(_line(node), value, self._lines)

    def _value(self, node: Node, path: str) -> Any:
        self._nodes += 1
        if self._nodes > MAXIMUM_NODES:
            raise YAMLProblem(_line(node), f"the file expands to more than {MAXIMUM_NODES} values")
        if isinstance(node, MappingNode):
            return self._mapping(node, path)
        if isinstance(node, SequenceNode):
            items = []
            for index, item in enumerate(node.value):
                self._lines.setdefault(f"{path}[{index}]", _line(item))
                items.append(self._value(item, f"{path}[{index}]"))
            return items
        return self._scalar(node.value, node)

    def _mapping(self, node: MappingNode, path: str) -> dict[str, Any]:
        merged: dict[str, Any] = {}
        own: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if self._tag(key_node) == "merge":
                sources = value_node.value if isinstance(value_node, SequenceNode) else [value_node]
                for source in reversed(sources):  # of several, the first wins
                    if not isinstance(source, MappingNode):
                        raise YAMLProblem(_line(key_node), "<< merges mappings alone")
                    merged.update(self._mapping(source, path))
                continue
            if not isinstance(key_node, ScalarNode):
                raise YAMLProblem(_line(key_node), "a field's name must be text")
            name = key_node.value
            if name in own:
                raise YAMLProblem(_line(key_node), f'key "{name}" already set in map; remove one')
            child = f"{path}.{name}" if path else name
            self._lines[child] = _line(key_node)
            own[name] = self._value(value_node, child)
        return {**merged, **own}

    def _tag(self, node: Node) -> str:
        return str(node.tag).removeprefix(_TAG)

    def _scalar(self, text: str, node: Node) -> Any:
        try:
            match self._tag(node):
                case "null":
                    return None
                case "bool":
                    return text.lower() in _TRUE
                case "int" | "float" if _SEXAGESIMAL.fullmatch(text):
                    return text  # Kubernetes' tools do not count in sixties
                case "int":
                    return _integer(text)
                case "float":
                    number = float(text.replace("_", ""))  # .inf and .nan, which JSON has not, are refused
                    return int(number) if number.is_integer() else number  # as Go writes `2.0` into JSON
                case _:  # dates and everything unknown are text in JSON
                    return text
        except ValueError as error:
            raise YAMLProblem(_line(node), f"{text!r} is no number") from error


def _integer(text: str) -> int:
    digits = text.replace("_", "").lower()
    sign = -1 if digits.startswith("-") else 1
    digits = digits.lstrip("+-")
    if digits.startswith(("0x", "0b", "0o")):
        return sign * int(digits, 0)
    if len(digits) > 1 and digits.startswith("0"):
        return sign * int(digits, 8)
    return sign * int(digits)


def _line(node: Node) -> int:
    return int(node.start_mark.line) + 1
