"""Defaults of a structural schema, put in as the API server does it before it validates."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any


def with_defaults(schema: dict[str, Any], value: Any) -> Any:
    """The value with the schema's defaults at every level. The argument stays as it is.

    A null in an object is taken for absent, as none of our fields is nullable.
    """
    if isinstance(value, Mapping):
        filled = {name: with_defaults(_child(schema, name), item) for name, item in value.items() if item is not None}
        for name, child in schema.get("properties", {}).items():
            if name not in filled and "default" in child:
                filled[name] = with_defaults(child, copy.deepcopy(child["default"]))
        return filled
    if isinstance(value, list):
        items = schema.get("items", {})
        return [with_defaults(items, item) for item in value]
    return value


def _child(schema: dict[str, Any], name: str) -> dict[str, Any]:
    """The schema of a field; empty for an unknown one."""
    found: dict[str, Any] = schema.get("properties", {}).get(name) or schema.get("additionalProperties", {})
    return found
