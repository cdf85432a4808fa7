"""The PROXY protocol, versions 1 and 2 (HAProxy, doc/proxy-protocol.txt): who the client behind a load balancer is.

The header stands before everything else, the TLS handshake too. `HeaderReader.wanted` says how many octets surely still
belong to it; who reads no more than that leaves what follows (a ClientHello) where the TLS layer will look for it.

- Nothing is guessed: whatever is not such a header raises ProxyError, and the connection is to be dropped.
- LOCAL (version 2), UNKNOWN (version 1), UNSPEC and UNIX name no client: the balancer speaks for itself, as its health
  checks do.
- A header is bounded: 107 octets in version 1, MAXIMUM_LENGTH behind the fixed part in version 2.
"""

from __future__ import annotations

import ipaddress
import re
import struct
from dataclasses import dataclass
from typing import Final

SIGNATURE: Final = b"\r\n\r\n\0\r\nQUIT\n"
MAXIMUM_LINE: Final = 107
"""Octets of a version 1 header with CR LF (section 2.1)."""
MAXIMUM_LENGTH: Final = 4096
"""Octets behind the fixed part of version 2. The longest address takes 216; the rest are TLVs: names, a TLS client's
certificate data, and what clouds add."""

_FIXED: Final = struct.Struct("!12sBBH")
_SHORTEST_LINE: Final = len(b"PROXY UNKNOWN\r\n")
_LINE: Final = re.compile(rb"PROXY (?:TCP([46]) ([^ ]+) ([^ ]+) ([0-9]{1,5}) ([0-9]{1,5})|(UNKNOWN)(?: .*)?)\r\n")
_LOCAL, _PROXY = 0x20, 0x21
_UNSPEC, _TCP4, _TCP6, _UNIX_STREAM = 0x00, 0x11, 0x21, 0x31
_ADDRESSES: Final = {_UNSPEC: 0, _TCP4: 12, _TCP6: 36, _UNIX_STREAM: 216}
"""Octets that each family's addresses take. Datagrams carry no SMTP."""
_TLV_CRC32C: Final = 0x03


class ProxyError(ValueError):
    """Not a PROXY header. The text quotes nothing of it."""


@dataclass(frozen=True, slots=True)
class Header:
    """A header that was read. `address` is None when the balancer speaks for itself."""

    address: str | None = None
    port: int = 0


class HeaderReader:
    """Reads one header. After it is complete it is used up."""

    __slots__ = ("_data", "wanted")

    def __init__(self) -> None:
        self._data = b""
        self.wanted = _SHORTEST_LINE
        """How many octets more surely belong to the header; never 0 before its end."""

    def feed(self, data: bytes) -> Header | None:
        """The header once it is complete. `data` is at most `wanted` octets. Raises ProxyError."""
        if len(data) > self.wanted:
            raise ProxyError("octets beyond the header")
        self._data += data
        if self._data[:1] == SIGNATURE[:1]:
            return self._read_version_2()
        return self._read_version_1()

    def _read_version_1(self) -> Header | None:
        data = self._data
        if not data.startswith(b"PROXY "[: len(data)]):
            raise ProxyError("no PROXY header")
        if data.endswith(b"\r\n"):
            return _line(data)
        if len(data) >= MAXIMUM_LINE or b"\n" in data:
            raise ProxyError(f"no CR LF within {MAXIMUM_LINE} octets")
        self.wanted = max(_SHORTEST_LINE - len(data), 1 if data.endswith(b"\r") or len(data) == MAXIMUM_LINE - 1 else 2)
        return None

    def _read_version_2(self) -> Header | None:
        data = self._data
        if not data.startswith(SIGNATURE[: len(data)]):
            raise ProxyError("no PROXY header")
        if len(data) < _FIXED.size:
            self.wanted = _FIXED.size - len(data)
            return None
        _, command, family, length = _FIXED.unpack_from(data)
        if command not in {_LOCAL, _PROXY}:
            raise ProxyError("neither LOCAL nor PROXY of version 2")
        if length > MAXIMUM_LENGTH:
            raise ProxyError(f"more than {MAXIMUM_LENGTH} octets")
        self.wanted = _FIXED.size + length - len(data)
        if self.wanted:
            return None
        # With LOCAL the family is to be ignored, and so is all that follows (section 2.2).
        return Header() if command == _LOCAL else _binary(data, family)


def _line(data: bytes) -> Header:
    match = _LINE.fullmatch(data)
    if match is None:
        raise ProxyError("the PROXY line is malformed")
    version, source, destination, source_port, destination_port, unknown = match.groups()
    if unknown:
        return Header()
    # The destination is the balancer's own; it only has to be in order.
    _address(destination, version)
    _port(destination_port)
    return Header(_address(source, version), _port(source_port))


def _address(octets: bytes, version: bytes) -> str:
    kind = ipaddress.IPv4Address if version == b"4" else ipaddress.IPv6Address
    try:
        address = kind(octets.decode("ascii"))
    except ValueError:  # `from None`: it would quote the octets
        raise ProxyError("an address of the PROXY line is malformed") from None
    if b"%" in octets:
        raise ProxyError("an address of the PROXY line has a zone")
    return str(address)


def _port(digits: bytes) -> int:
    if (len(digits) > 1 and digits.startswith(b"0")) or int(digits) > 65535:
        raise ProxyError("a port of the PROXY line is malformed")
    return int(digits)


def _binary(data: bytes, family: int) -> Header:
    size = _ADDRESSES.get(family)
    if size is None:
        raise ProxyError("an address family or transport that carries no SMTP")
    start = _FIXED.size
    if len(data) < start + size:
        raise ProxyError("shorter than its addresses")
    if family == _UNSPEC:  # no addresses, and what is there instead is to be ignored
        return Header()
    _check_tlvs(data, start + size)
    if family == _TCP4:
        address: ipaddress.IPv4Address | ipaddress.IPv6Address = ipaddress.IPv4Address(data[start : start + 4])
    elif family == _TCP6:
        address = ipaddress.IPv6Address(data[start : start + 16])
    else:
        return Header()
    return Header(str(address), int.from_bytes(data[start + size - 4 : start + size - 2]))


def _check_tlvs(data: bytes, position: int) -> None:
    """TLVs must fill the header, and a checksum among them must be right (section 2.2.3). None of them is used."""
    while position < len(data):
        if position + 3 > len(data):
            raise ProxyError("a TLV is cut off")
        begin = position + 3
        end = begin + int.from_bytes(data[position + 1 : begin])
        if end > len(data):
            raise ProxyError("a TLV is cut off")
        if data[position] == _TLV_CRC32C:
            if end - begin != 4:
                raise ProxyError("the checksum has not four octets")
            if _crc32c(data[:begin] + bytes(4) + data[end:]) != int.from_bytes(data[begin:end]):
                raise ProxyError("the checksum is wrong")
        position = end


def _crc32c(data: bytes) -> int:
    """Castagnoli's CRC (RFC 9260 appendix A). Headers are short, and few balancers send it."""
    crc = 0xFFFFFFFF
    for octet in data:
        crc ^= octet
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF
