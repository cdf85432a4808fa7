"""The PROXY protocol's header: what HAProxy's document says it looks like, and that nothing else passes for one."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import struct

import pytest
from aiosmtpd.proxy_protocol import get_proxy
from hypothesis import given
from hypothesis import strategies as st

from mailsluice_relay.smtp.proxy import MAXIMUM_LENGTH, SIGNATURE, Header, HeaderReader, ProxyError

LOCAL, PROXY = 0x20, 0x21
TCP4, UDP4, TCP6, UNIX, UNSPEC = 0x11, 0x12, 0x21, 0x31, 0x00
V4 = socket.inet_aton("192.0.2.7") + socket.inet_aton("198.51.100.1") + struct.pack("!HH", 40000, 587)
V6 = (
    socket.inet_pton(socket.AF_INET6, "2001:db8::7")
    + socket.inet_pton(socket.AF_INET6, "2001:db8::1")
    + struct.pack("!HH", 40000, 587)
)


def version_2(command: int, family: int, rest: bytes) -> bytes:
    return SIGNATURE + struct.pack("!BBH", command, family, len(rest)) + rest


def tlv(kind: int, value: bytes) -> bytes:
    return struct.pack("!BH", kind, len(value)) + value


def read(octets: bytes) -> tuple[Header | None, bytes]:
    """The header, and what was not read."""
    reader, header, position = HeaderReader(), None, 0
    while header is None and position < len(octets):
        piece = octets[position : position + reader.wanted]
        position += len(piece)
        header = reader.feed(piece)
    return header, octets[position:]


HEADERS = {
    b"PROXY TCP4 192.0.2.7 198.51.100.1 40000 587\r\n": Header("192.0.2.7", 40000),
    b"PROXY TCP4 1.1.1.1 1.1.1.1 1 1\r\n": Header("1.1.1.1", 1),
    b"PROXY TCP4 255.255.255.255 255.255.255.255 65535 65535\r\n": Header("255.255.255.255", 65535),
    b"PROXY TCP6 2001:db8::7 2001:DB8::1 40000 587\r\n": Header("2001:db8::7", 40000),
    b"PROXY TCP6 ::ffff:192.0.2.7 ::1 0 587\r\n": Header("::ffff:c000:207", 0),
    b"PROXY UNKNOWN\r\n": Header(),
    b"PROXY UNKNOWN ffff:f...f:ffff ffff:f...f:ffff 65535 65535\r\n": Header(),
    version_2(PROXY, TCP4, V4): Header("192.0.2.7", 40000),
    version_2(PROXY, TCP6, V6): Header("2001:db8::7", 40000),
    version_2(PROXY, TCP4, V4 + tlv(0x02, b"relay.test") + tlv(0x04, b"")): Header("192.0.2.7", 40000),
    version_2(PROXY, UNIX, b"/run/x".ljust(216, b"\0")): Header(),
    version_2(PROXY, UNSPEC, b"anything"): Header(),
    version_2(LOCAL, UNSPEC, b""): Header(),
    version_2(LOCAL, TCP4, V4): Header(),
}


@pytest.mark.parametrize("octets", HEADERS)
def test_headers_are_read_and_nothing_behind_them(octets: bytes) -> None:
    header, rest = read(octets + b"\x16\x03\x01EHLO client.test\r\n")
    assert header is not None
    assert rest == b"\x16\x03\x01EHLO client.test\r\n"
    expected = HEADERS[octets]
    assert header.port == expected.port
    assert (header.address and ipaddress.ip_address(header.address)) == (
        expected.address and ipaddress.ip_address(expected.address)
    )


@pytest.mark.parametrize("octets", HEADERS)
async def test_aiosmtpds_parser_reads_the_same(octets: bytes) -> None:
    reader = asyncio.StreamReader()
    reader.feed_data(octets)
    reader.feed_eof()
    theirs = await get_proxy(reader)
    assert theirs.valid, theirs.error
    ours, _ = read(octets)
    assert ours is not None
    if ours.address is not None:
        assert (ipaddress.ip_address(ours.address), ours.port) == (theirs.src_addr, theirs.src_port)


@pytest.mark.parametrize("octets", HEADERS)
def test_no_beginning_of_a_header_is_one(octets: bytes) -> None:
    for end in range(len(octets)):
        assert read(octets[:end])[0] is None


@pytest.mark.parametrize("octets", HEADERS)
def test_octet_by_octet_is_the_same(octets: bytes) -> None:
    reader = HeaderReader()
    results = [reader.feed(bytes([octet])) for octet in octets]
    assert results[:-1] == [None] * (len(octets) - 1)
    assert results[-1] == read(octets)[0]


@pytest.mark.parametrize(
    "octets",
    [
        b"EHLO client.test\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\x00\x00\x00\x00\x00",
        b"proxy TCP4 192.0.2.7 198.51.100.1 40000 587\r\n",
        b"PROXY TCP4 192.0.2.7 198.51.100.1 40000 587\n" + b"x" * 100,
        b"PROXY TCP4 192.0.2.7  198.51.100.1 40000 587\r\n",
        b"PROXY TCP4 192.0.2.7 198.51.100.1 40000\r\n",
        b"PROXY TCP4 192.0.2.7 198.51.100.1 40000 587 \r\n",
        b"PROXY TCP4 192.0.2.7 198.51.100.1 40000 65536\r\n",
        b"PROXY TCP4 192.0.2.7 198.51.100.1 65536 587\r\n",
        b"PROXY TCP4 192.0.2.7 198.51.100.1 040 587\r\n",
        b"PROXY TCP4 192.0.2.7 198.51.100.1 -1 587\r\n",
        b"PROXY TCP4 192.0.2.256 198.51.100.1 40000 587\r\n",
        b"PROXY TCP4 192.000.002.007 198.51.100.1 40000 587\r\n",
        b"PROXY TCP4 2001:db8::7 198.51.100.1 40000 587\r\n",
        b"PROXY TCP6 192.0.2.7 2001:db8::1 40000 587\r\n",
        b"PROXY TCP6 fe80::1%eth0 2001:db8::1 40000 587\r\n",
        b"PROXY UDP4 192.0.2.7 198.51.100.1 40000 587\r\n",
        b"PROXY UNKNOWNN\r\n",
        b"PROXY UNKNOWN " + b"x" * 93,
        b"PROXY \r\n" + b"x" * 20,
        SIGNATURE[:-1] + b"X!!!!",
        version_2(0x11, TCP4, V4),
        version_2(0x22, TCP4, V4),
        version_2(PROXY, UDP4, V4),
        version_2(PROXY, 0x41, V4),
        version_2(PROXY, TCP4, V4[:-1]),
        version_2(PROXY, TCP6, V4),
        version_2(PROXY, TCP4, V4 + b"\x02\x00"),
        version_2(PROXY, TCP4, V4 + b"\x02\x00\x05four"),
        version_2(PROXY, TCP4, V4 + tlv(0x03, b"\0\0\0\0")),
        version_2(PROXY, TCP4, V4 + tlv(0x03, b"\0")),
        SIGNATURE + struct.pack("!BBH", PROXY, TCP4, MAXIMUM_LENGTH + 1),
    ],
)
def test_whatever_else_is_refused_without_reading_on(octets: bytes) -> None:
    with pytest.raises(ProxyError):
        read(octets)


def test_a_version_1_header_has_at_most_107_octets() -> None:
    longest = b"PROXY UNKNOWN " + b"x" * 91 + b"\r\n"
    assert len(longest) == 107
    assert read(longest)[0] == Header()
    with pytest.raises(ProxyError):
        read(b"PROXY UNKNOWN " + b"x" * 92 + b"\r\n")


def test_a_right_checksum_passes() -> None:
    octets = version_2(PROXY, TCP4, V4 + tlv(0x03, bytes.fromhex("00000000")))
    assert octets[-4:] == bytes(4)
    right = octets[:-4] + struct.pack("!I", crc32c(octets))
    assert read(right)[0] == Header("192.0.2.7", 40000)
    with pytest.raises(ProxyError):
        read(right[:-1] + bytes([right[-1] ^ 1]))


def crc32c(octets: bytes) -> int:
    """By the table, whose entries are the remainders (RFC 3720 appendix B.4 has the vectors)."""
    table = []
    for octet in range(256):
        for _ in range(8):
            octet = octet >> 1 ^ 0x82F63B78 if octet & 1 else octet >> 1
        table.append(octet)
    crc = 0xFFFFFFFF
    for octet in octets:
        crc = table[(crc ^ octet) & 0xFF] ^ crc >> 8
    return crc ^ 0xFFFFFFFF


def test_the_checksum_of_the_test_is_the_rfcs() -> None:
    assert crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c(b"\xff" * 32) == 0x62A8AB43


@given(octets=st.binary(max_size=300) | st.binary(max_size=60).map(lambda rest: version_2(PROXY, TCP4, rest)))
def test_any_octets_are_a_header_or_refused(octets: bytes) -> None:
    reader, position = HeaderReader(), 0
    while position < len(octets):
        assert reader.wanted > 0
        piece = octets[position : position + reader.wanted]
        position += len(piece)
        try:
            if reader.feed(piece) is not None:
                return
        except ProxyError:
            return
