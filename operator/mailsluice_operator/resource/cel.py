"""The CEL of our rules without an API server: celpy, and what of Kubernetes' CEL library the rules call.

https://kubernetes.io/docs/reference/using-api/cel/ is the specification of the functions.
"""

from __future__ import annotations

import functools
import ipaddress
from collections.abc import Callable
from typing import Any, Final

import celpy
from celpy import celtypes
from celpy.celparser import CELParseError
from celpy.evaluation import CELEvalError

_Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class RuleError(Exception):
    """A rule could not be evaluated."""


class _CIDR:
    """A value of the type `net.CIDR`."""

    def __init__(self, network: _Network, address: str) -> None:
        self.network = network
        self.address = ipaddress.ip_address(address)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _CIDR) and (self.network, self.address) == (other.network, other.address)

    def __hash__(self) -> int:
        return hash((self.network, self.address))


class _IP:
    """A value of the type `net.IP`."""

    def __init__(self, address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> None:
        self.address = address


class Absent:
    """`oldSelf` of a creation: an optional without a value."""


def _network(text: str) -> _Network | None:
    """As Go's netip.ParsePrefix, which wants a prefix length; Kubernetes also refuses IPv4 mapped into IPv6."""
    address, slash, length = text.partition("/")
    if not slash or not length.isdigit() or (len(length) > 1 and length.startswith("0")) or "%" in address:
        return None
    try:
        network = ipaddress.ip_network(text, strict=False)
    except ValueError:
        return None
    if isinstance(network, ipaddress.IPv6Network) and network.network_address.ipv4_mapped is not None:
        return None
    return network


def _is_cidr(text: celtypes.StringType) -> celtypes.BoolType:
    return celtypes.BoolType(_network(str(text)) is not None)


def _cidr(text: celtypes.StringType) -> _CIDR:
    network = _network(str(text))
    if network is None:
        raise ValueError(f"network address parse error: {text}")
    return _CIDR(network, str(text).partition("/")[0])


def _masked(value: _CIDR) -> _CIDR:
    return _CIDR(value.network, str(value.network.network_address))


def _prefix_length(value: _CIDR) -> celtypes.IntType:
    return celtypes.IntType(value.network.prefixlen)


def _ip(value: _CIDR) -> _IP:
    return _IP(value.address)


def _family(value: _IP) -> celtypes.IntType:
    return celtypes.IntType(value.address.version)


def _has_value(value: object) -> celtypes.BoolType:
    return celtypes.BoolType(not isinstance(value, Absent))


def _value(value: object) -> object:
    if isinstance(value, Absent):
        raise TypeError("optional.none() dereference")
    return value


_FUNCTIONS: Final[dict[str, Callable[..., Any]]] = {
    "isCIDR": _is_cidr,
    "cidr": _cidr,
    "masked": _masked,
    "prefixLength": _prefix_length,
    "ip": _ip,
    "family": _family,
    "hasValue": _has_value,
    "value": _value,
}


@functools.cache
def _environment() -> celpy.Environment:
    return celpy.Environment()


@functools.lru_cache(maxsize=1024)
def _program(rule: str) -> Any:
    environment = _environment()
    try:
        return environment.program(environment.compile(rule), functions=_FUNCTIONS)
    except CELParseError as error:
        raise RuleError(f"{rule}: {error}") from error


def holds(rule: str, value: celtypes.Value) -> bool:
    """Whether the rule is true of a created value. Raises RuleError when it has no value."""
    try:
        return bool(_program(rule).evaluate({"self": value, "oldSelf": Absent()}))
    except CELEvalError as error:
        raise RuleError(f"{rule}: {error.args[0]}") from error


def to_cel(schema: dict[str, Any], value: Any) -> celtypes.Value:
    """A JSON value as the type that its schema gives it: `5` is a double where the schema says number."""
    if isinstance(value, dict):
        properties = schema.get("properties", {})
        others = schema.get("additionalProperties", {})
        return celtypes.MapType(
            {
                celtypes.StringType(name): to_cel(properties.get(name, others), item)
                for name, item in value.items()
                if item is not None
            }
        )
    if isinstance(value, list):
        return celtypes.ListType([to_cel(schema.get("items", {}), item) for item in value])
    if isinstance(value, bool):
        return celtypes.BoolType(value)
    if isinstance(value, int | float) and schema.get("type") == "number":
        return celtypes.DoubleType(value)
    if isinstance(value, int):
        return celtypes.IntType(value)
    if isinstance(value, float):
        return celtypes.DoubleType(value)
    return celtypes.StringType(value)
