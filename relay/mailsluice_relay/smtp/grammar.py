"""The grammar of SMTP commands and addresses: RFC 5321 section 4.1.2, with UTF-8 as RFC 6531 section 3.3 extends it.

Strict, and nothing more than SMTP's: no comments, no folding, no encoded words (RFC 2047). What is parsed is given
back as it came, so that nothing changes its meaning on the way to the next server. `is_internationalized` of the
result tells whether SMTPUTF8 was needed; whether it was given is the caller's to check.
"""

from __future__ import annotations

import ipaddress
import re
import unicodedata
from typing import Final

from mailsluice_relay.envelope import Mailbox

MAXIMUM_LOCAL_PART: Final = 64
"""Octets (RFC 5321 section 4.5.3.1.1)."""
MAXIMUM_DOMAIN: Final = 255
"""Octets (RFC 5321 section 4.5.3.1.2)."""
MAXIMUM_PATH: Final = 256
"""Octets with the angle brackets (RFC 5321 section 4.5.3.1.3)."""
MAXIMUM_LABEL: Final = 63
"""Octets (RFC 1035 section 2.3.4)."""

POSTMASTER: Final = Mailbox("Postmaster", "")
"""`<Postmaster>`, the one recipient without a domain (RFC 5321 section 4.1.1.3)."""

# Possessive quantifiers: a string that does not match is given up in linear time.
_ATEXT = r"A-Za-z0-9!#$%&'*+/=?^_`{|}~\-"
_DOT_STRING = rf"[{_ATEXT}]++(?:\.[{_ATEXT}]++)*+"
_LABEL = r"[A-Za-z0-9]++(?:-++[A-Za-z0-9]++)*+"
_DOMAIN = rf"{_LABEL}(?:\.{_LABEL})*+"

_COMMON_PATH: Final = re.compile(rf"<({_DOT_STRING})@({_DOMAIN})>")
"""Nearly every path there is; the rest of this file is for the others."""
_DOT_STRING_U: Final = re.compile(rf"[{_ATEXT}\x80-\U0010ffff]++(?:\.[{_ATEXT}\x80-\U0010ffff]++)*+")
_QUOTED_STRING_U: Final = re.compile(r'"(?:[ !#-\[\]-~\x80-\U0010ffff]++|\\[ -~])*+"')
_DOMAIN_U: Final = re.compile(r"[A-Za-z0-9\x80-\U0010ffff\-]++(?:\.[A-Za-z0-9\x80-\U0010ffff\-]++)*+")
_LITERAL: Final = re.compile(r"\[([!-Z^-~]++)\]")
_SOURCE_ROUTE: Final = re.compile(rf"@{_DOMAIN}(?:,@{_DOMAIN})*+:")
_HELLO_NAME: Final = re.compile(r"[A-Za-z0-9._:%\[\]\-]{1,255}")
"""What may follow EHLO. Wider than a domain: clients put host names with `_` there, and RFC 5321 section 4.1.4 wants
them served all the same. Narrow enough to stand in a Received field."""


class AddressError(ValueError):
    """Not an address as SMTP writes it. The text says what is wrong, without quoting it."""


def split_command(line: bytes) -> tuple[bytes, bytes]:
    """The verb in capitals and the argument (RFC 5321 section 2.4), of a line without its CRLF."""
    verb, _, argument = line.partition(b" ")
    return verb.upper(), argument.strip(b" ")


def hello_name(argument: bytes) -> str | None:
    """The name that a client gives itself, or None where it cannot be one."""
    text = argument.decode("ascii", "replace")
    return text if _HELLO_NAME.fullmatch(text) else None


def reverse_path(text: str) -> tuple[Mailbox | None, str]:
    """`<mailbox>` or `<>` (None) at the beginning of `text`, and what follows it. Raises AddressError."""
    if text.startswith("<>"):
        return None, text[2:]
    return _path(text)


def forward_path(text: str) -> tuple[Mailbox, str]:
    """`<mailbox>` or `<Postmaster>` at the beginning of `text`, and what follows it. Raises AddressError."""
    if text[:12].lower() == "<postmaster>":
        return Mailbox(text[1:11], ""), text[12:]
    return _path(text)


def mailbox(text: str) -> Mailbox:
    """All of `text` as a mailbox, `local-part@domain`. Raises AddressError."""
    found, end = _mailbox(text, 0)
    if end != len(text):
        raise AddressError("something follows the address")
    return found


def _path(text: str) -> tuple[Mailbox, str]:
    if match := _COMMON_PATH.match(text):
        local_part, domain = match.groups()
        if len(local_part) <= MAXIMUM_LOCAL_PART and len(domain) <= MAXIMUM_LABEL:
            return Mailbox(local_part, domain), text[match.end() :]
    if not text.startswith("<"):
        raise AddressError("an address stands between < and >")
    start = 1
    if route := _SOURCE_ROUTE.match(text, start):  # accepted and ignored: RFC 5321 section 3.3 and appendix C
        start = route.end()
    found, end = _mailbox(text, start)
    if text[end : end + 1] != ">":
        raise AddressError("the closing > is missing")
    if len(text[: end + 1].encode()) > MAXIMUM_PATH:
        raise AddressError(f"the path is longer than {MAXIMUM_PATH} octets")
    return found, text[end + 1 :]


def _mailbox(text: str, start: int) -> tuple[Mailbox, int]:
    """The mailbox that begins at `start`, and where it ends."""
    match = _DOT_STRING_U.match(text, start) or _QUOTED_STRING_U.match(text, start)
    if not match:
        raise AddressError("the local part is not valid")
    local_part = match[0]
    _check_characters(local_part)
    if len(local_part.encode()) > MAXIMUM_LOCAL_PART:
        raise AddressError(f"the local part is longer than {MAXIMUM_LOCAL_PART} octets")
    at = match.end()
    if text[at : at + 1] != "@":
        raise AddressError("the @ and the domain are missing")
    if literal := _LITERAL.match(text, at + 1):
        _check_literal(literal[1])
        return Mailbox(local_part, literal[0]), literal.end()
    match = _DOMAIN_U.match(text, at + 1)
    if not match:
        raise AddressError("the domain is not valid")
    _check_domain(match[0])
    return Mailbox(local_part, match[0]), match.end()


def _check_characters(text: str) -> None:
    """RFC 6532 section 3.1 wants NFC; controls, separators and unassigned code points only serve to deceive."""
    if text.isascii():
        return
    if any(unicodedata.category(character)[0] in "CZ" for character in text if character > "\x7f"):
        raise AddressError("the address holds invisible characters")
    if not unicodedata.is_normalized("NFC", text):
        raise AddressError("the address is not normalized (NFC)")


def _check_domain(domain: str) -> None:
    if len(domain.encode()) > MAXIMUM_DOMAIN:
        raise AddressError(f"the domain is longer than {MAXIMUM_DOMAIN} octets")
    _check_characters(domain)
    for label in domain.split("."):
        if label.startswith("-") or label.endswith("-"):
            raise AddressError("a label of the domain begins or ends with a hyphen")
        if not label.isascii():
            # U-labels (RFC 5890 section 2.3.2.1) are letters, digits and marks.
            if any(unicodedata.category(c)[0] not in "LMN" for c in label if c != "-"):
                raise AddressError("the domain holds characters that no domain has")
            if len(label.encode("punycode")) + 4 > MAXIMUM_LABEL:
                raise AddressError(f"a label of the domain is longer than {MAXIMUM_LABEL} octets")
        elif len(label) > MAXIMUM_LABEL:
            raise AddressError(f"a label of the domain is longer than {MAXIMUM_LABEL} octets")


def _check_literal(literal: str) -> None:
    """RFC 5321 section 4.1.3; of the tags only `IPv6:` is registered."""
    try:
        if literal[:5].lower() == "ipv6:":
            if "%" in literal:
                raise AddressError("an address literal has no zone")
            ipaddress.IPv6Address(literal[5:])
        else:
            ipaddress.IPv4Address(literal)
    except ipaddress.AddressValueError as error:
        raise AddressError("the address literal is not valid") from error
