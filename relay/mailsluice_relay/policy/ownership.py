"""Which senders a login owns, and which domains the relay lets out. Pure.

A login may always send as itself; `senders` of a user adds patterns: `user@domain`, `*@domain`, `*@*.domain` and `<>`,
the null reverse-path, which only who makes bounces needs. `alice+tag@domain` is another address than `alice@domain`:
it is owned when it is granted.

Two spellings are one address only where every receiver takes them as one: the case of ASCII letters, the quotes of a
local part that needs none (RFC 5321 section 4.1.2), and a domain's U-labels and A-labels (RFC 5890). Domains are
compared by IDNA 2008, strictly: the mappings of IDNA 2003 make one name of `faß.test` and `fass.test`, which have
different owners.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import idna

from mailsluice_relay.config import ConfigurationError
from mailsluice_relay.envelope import Mailbox

NULL_SENDER: Final = "<>"

_ASCII_LOWER = {code: code + 32 for code in range(ord("A"), ord("Z") + 1)}
_QUOTED_PAIR = re.compile(r"\\(.)", re.DOTALL)
_IDEOGRAPHIC_DOTS = frozenset("\u3002\uff0e\uff61")


@functools.lru_cache(4096)
def domain_key(domain: str) -> str | None:
    """The domain in lower-case A-labels; None when it is no valid name, which then equals nothing."""
    if domain.isascii():
        return domain.translate(_ASCII_LOWER) or None
    if _IDEOGRAPHIC_DOTS & set(domain):  # receivers differ on whether these separate labels
        return None
    try:
        return idna.encode(domain.translate(_ASCII_LOWER)).decode("ascii")
    except idna.IDNAError:
        return None


def local_part_key(local_part: str) -> str:
    """The local part without needless quotes and without the case of ASCII letters."""
    if len(local_part) >= 2 and local_part[0] == local_part[-1] == '"':
        local_part = _QUOTED_PAIR.sub(r"\1", local_part[1:-1])
    return local_part.translate(_ASCII_LOWER)


def is_local_name(domain: str) -> bool:
    """Whether the domain means a machine and nothing in the DNS, as in `root@localhost` (RFC 6761, RFC 6762)."""
    name = domain.translate(_ASCII_LOWER)
    return not name.startswith("[") and ("." not in name or name.endswith((".localhost", ".localdomain", ".local")))


@dataclass(frozen=True, slots=True)
class Rights:
    """What one login may send as."""

    addresses: frozenset[tuple[str, str]]
    domains: frozenset[str]
    subdomains: tuple[str, ...]
    """Each with its leading dot."""
    null: bool

    def owns(self, sender: Mailbox | None) -> bool:
        """Whether the login may send as this address; None is the null reverse-path."""
        if sender is None:
            return self.null
        domain = domain_key(sender.domain)
        if domain is None:
            return False
        return (
            domain in self.domains
            or (local_part_key(sender.local_part), domain) in self.addresses
            or any(domain.endswith(subdomain) for subdomain in self.subdomains)
        )


def rights(login: str, patterns: Iterable[str]) -> Rights:
    """The login itself, if it is an address, and what the patterns add. Raises ConfigurationError."""
    addresses: set[tuple[str, str]] = set()
    domains: set[str] = set()
    subdomains: list[str] = []
    null = False
    if "@" in login:
        local_part, _, domain = login.rpartition("@")
        if key := domain_key(domain):
            addresses.add((local_part_key(local_part), key))
    for pattern in patterns:
        if pattern == NULL_SENDER:
            null = True
            continue
        local_part, at, domain = pattern.rpartition("@")
        wild = domain.startswith("*.")
        key = domain_key(domain[2:] if wild else domain)
        if not at or not local_part or key is None or "*" in key or (wild and local_part != "*"):
            raise ConfigurationError(
                f"authentication.users: {login}: sender {pattern!r} is no pattern; expected user@domain, *@domain, "
                "*@*.domain or <>"
            )
        if wild:
            subdomains.append(f".{key}")
        elif local_part == "*":
            domains.add(key)
        elif "*" in local_part:
            raise ConfigurationError(
                f"authentication.users: {login}: sender {pattern!r}: a * stands for the whole local part only"
            )
        else:
            addresses.add((local_part_key(local_part), key))
    return Rights(frozenset(addresses), frozenset(domains), tuple(subdomains), null)


class Domains:
    """A list of allowed domains: a plain name matches exactly, `*.name` its subdomains. An empty list allows any.

    Raises ConfigurationError, naming the field.
    """

    def __init__(self, names: Iterable[str], field: str) -> None:
        self._exact: set[str] = set()
        self._subdomains: list[str] = []
        for name in names:
            wild = name.startswith("*.")
            key = domain_key(name[2:] if wild else name)
            if key is None or "*" in key or "@" in key:
                raise ConfigurationError(f"{field}: {name!r} is no domain; expected example.test or *.example.test")
            if wild:
                self._subdomains.append(f".{key}")
            else:
                self._exact.add(key)

    def __bool__(self) -> bool:
        return bool(self._exact or self._subdomains)

    def allows(self, domain: str) -> bool:
        if not self:
            return True
        key = domain_key(domain)
        return key is not None and (
            key in self._exact or any(key.endswith(subdomain) for subdomain in self._subdomains)
        )
