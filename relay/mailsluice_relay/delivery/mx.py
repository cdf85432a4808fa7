"""Where mail for a domain goes: its MX records and their addresses (RFC 5321 section 5.1), from DNS.

The answers are cached for as long as DNS says. What is found out here is either the mail's fate (the domain does not
exist, or takes no mail: RFC 7505) or a trouble that passes (a name server that does not answer).
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import dns.asyncresolver
import dns.exception
import dns.name
import dns.rdatatype
import dns.resolver
import idna

from mailsluice_relay.delivery.outcome import Failed, FailureClass, Retry, Stage, UndeliverableError

LOOKUP_TIMEOUT: Final = 15.0
"""Seconds for one question, asked again meanwhile."""
CACHED_ANSWERS: Final = 5000
MAXIMUM_DESTINATIONS: Final = 10
"""Addresses that are tried for one domain; RFC 5321 section 5.1 asks for two at least."""

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address


@dataclass(frozen=True, slots=True)
class Destination:
    """One address of a mail server."""

    host: str
    """Its name, or its address where the recipient gave that (RFC 5321 section 4.1.3)."""
    address: str


def is_public(address: IPAddress) -> bool:
    """Not this machine, and no address that belongs to no host: an MX record is somebody else's to write."""
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    checked = mapped or address
    return not (checked.is_loopback or checked.is_unspecified or checked.is_multicast or checked.is_link_local)


def system_resolver() -> dns.asyncresolver.Resolver:
    """As /etc/resolv.conf says; without one every question fails for now."""
    resolver = dns.asyncresolver.Resolver(configure=False)
    with contextlib.suppress(dns.resolver.NoResolverConfiguration, OSError):
        resolver.read_resolv_conf("/etc/resolv.conf")
    return resolver


class MailExchangers:
    def __init__(
        self,
        resolver: dns.asyncresolver.Resolver,
        *,
        random: Callable[[], float],
        allows: Callable[[IPAddress], bool] = is_public,
    ) -> None:
        self._resolver = resolver
        self._resolver.cache = dns.resolver.LRUCache(CACHED_ANSWERS)
        self._random = random
        self._allows = allows

    async def destinations(self, domain: str, *, hostname: str) -> Sequence[Destination]:
        """Where to try, best first. `hostname` is ours: mail never goes to a server farther away than we are.

        Raises UndeliverableError.
        """
        if domain.startswith("["):
            return [self._literal(domain)]
        name = _absolute(domain)
        hosts = _not_behind(hostname, await self._exchangers(domain, name))
        if hosts is None:
            hosts = [name]  # RFC 5321 section 5.1: the implicit MX
        elif not hosts:
            raise _failed(f"{domain}: its mail servers lead back to this one", "5.4.6")
        found = await asyncio.gather(*(self._addresses(host) for host in hosts[:MAXIMUM_DESTINATIONS]))
        destinations = [
            Destination(host.canonicalize().to_text(omit_final_dot=True), str(address))
            for host, addresses in zip(hosts, found, strict=False)
            if not isinstance(addresses, Exception)
            for address in addresses
            if self._allows(address)
        ]
        if destinations:
            return destinations[:MAXIMUM_DESTINATIONS]
        if any(isinstance(addresses, dns.resolver.NXDOMAIN | list) for addresses in found) and not any(
            isinstance(addresses, Exception) and not isinstance(addresses, dns.resolver.NXDOMAIN) for addresses in found
        ):
            raise _failed(f"{domain}: no mail server of this domain has an address", "5.4.4")
        raise _retry(f"{domain}: the addresses of its mail servers cannot be looked up now")

    async def _exchangers(self, domain: str, name: dns.name.Name) -> list[tuple[int, dns.name.Name]] | None:
        """Preferences and names, best first; None: there is no MX record."""
        try:
            records = await self._ask(name, "MX")
        except dns.resolver.NXDOMAIN as error:
            raise _failed(f"{domain}: there is no such domain", "5.1.2") from error
        except dns.exception.DNSException as error:
            raise _retry(f"{domain}: its MX records cannot be looked up now ({type(error).__name__})") from error
        if not records:
            return None
        if len(records) == 1 and records[0].exchange == dns.name.root:
            raise _failed(f"{domain}: this domain takes no mail (null MX)", "5.1.10")  # RFC 7505 section 4.2
        # Equals in any order, so that the load is spread (RFC 5321 section 5.1).
        weighted = [(int(record.preference), self._random(), record.exchange) for record in records]
        return [(preference, exchange) for preference, _, exchange in sorted(weighted, key=lambda item: item[:2])]

    async def _addresses(self, host: dns.name.Name) -> list[IPAddress] | Exception:
        """IPv4 first: from IPv6 addresses without a name of their own many take no mail."""
        found: list[IPAddress] = []
        trouble: Exception | None = None
        for kind in ("A", "AAAA"):
            try:
                found += [ipaddress.ip_address(record.address) for record in await self._ask(host, kind)]
            except dns.exception.DNSException as error:
                trouble = error
        return found or trouble or found

    async def _ask(self, name: dns.name.Name, kind: str) -> list[Any]:
        """The records, of which there may be none. Raises DNSException."""
        answer = await self._resolver.resolve(
            name, kind, raise_on_no_answer=False, lifetime=LOOKUP_TIMEOUT, search=False
        )
        return list(answer.rrset or ())

    def _literal(self, domain: str) -> Destination:
        """RFC 5321 section 4.1.3."""
        text = domain.strip("[]")
        try:
            address = ipaddress.ip_address(text[5:] if text.lower().startswith("ipv6:") else text)
        except ValueError as error:
            raise _failed(f"{domain} is no address", "5.1.2") from error
        if not self._allows(address):
            raise _failed(f"{domain} is no address that mail is sent to", "5.1.2")
        return Destination(str(address), str(address))


def _not_behind(hostname: str, records: list[tuple[int, dns.name.Name]] | None) -> list[dns.name.Name] | None:
    """The servers that are nearer to the domain than we are, should we be one of them (RFC 5321 section 5.1)."""
    if records is None:
        return None
    ours = _absolute(hostname)
    own = min((preference for preference, name in records if name == ours), default=None)
    return [name for preference, name in records if own is None or preference < own]


def _absolute(domain: str) -> dns.name.Name:
    """Raises UndeliverableError."""
    try:
        text = domain if domain.isascii() else idna.encode(domain, uts46=True).decode()
        return dns.name.from_text(text)
    except (dns.exception.DNSException, idna.IDNAError) as error:
        raise _failed(f"{domain} is no domain name", "5.1.2") from error


def _failed(text: str, status: str) -> UndeliverableError:
    return UndeliverableError(Failed(FailureClass.MAILBOX, Stage.CONNECT, text, status))


def _retry(text: str) -> UndeliverableError:
    return UndeliverableError(Retry(FailureClass.OTHER, Stage.CONNECT, text))
