"""Networks of clients: which are allowed, and which network an address counts for. Pure.

An IPv4-mapped IPv6 address (RFC 4291 section 2.5.5.2) is the IPv4 address: a dual-stack socket shows clients so.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Final

from mailsluice_relay.config import ConfigurationError

IPV4_PREFIX: Final = 24
IPV6_PREFIX: Final = 64
"""What one party is commonly given: counting single IPv6 addresses counts nothing."""


@functools.lru_cache(4096)
def parse_address(address: str) -> IPv4Address | IPv6Address:
    """Raises ValueError."""
    parsed = ip_address(address.partition("%")[0])
    if isinstance(parsed, IPv6Address) and parsed.ipv4_mapped is not None:
        return parsed.ipv4_mapped
    return parsed


@functools.lru_cache(4096)
def source_network(address: str) -> str:
    """The /24 or /64 that the address is in. Raises ValueError."""
    parsed = parse_address(address)
    return str(ip_network((parsed, IPV4_PREFIX if parsed.version == 4 else IPV6_PREFIX), strict=False))


class Networks:
    """A set of networks. Raises ConfigurationError, naming the field and the network."""

    def __init__(self, networks: Iterable[str], field: str) -> None:
        self._networks: list[IPv4Network | IPv6Network] = []
        for network in networks:
            try:
                self._networks.append(ip_network(network))
            except ValueError as error:
                raise ConfigurationError(f"{field}: {error}; expected a prefix such as 192.0.2.0/24") from error

    def __contains__(self, address: str) -> bool:
        parsed = parse_address(address)
        return any(parsed in network for network in self._networks)
