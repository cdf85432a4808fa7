"""What comes before SMTP: a load balancer's PROXY header, implicit TLS. It is bounded, and counted."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import errno
import socket
import ssl
import struct
from typing import Any

import msgspec
import pytest

from mailsluice_relay import listener as listener_module
from mailsluice_relay import opening, reply
from mailsluice_relay.config import Limits, Listener, ListenerMode

PASSWORD = base64.b64encode(b"\0app@example.test\0right")
MAIL = b"MAIL FROM:<app@example.test>"
RCPT = b"RCPT TO:<person@example.org>"
TEXT = b"From: app@example.test\r\n\r\nHello.\r\n.\r\n"
VERSION_1 = b"PROXY TCP4 192.0.2.7 198.51.100.1 40000 587\r\n"
VERSION_2 = b"\r\n\r\n\0\r\nQUIT\n\x21\x11" + struct.pack(
    "!H4s4sHH", 12, socket.inet_aton("192.0.2.7"), socket.inet_aton("198.51.100.1"), 40000, 587
)
DATAGRAM = VERSION_2[:13] + b"\x12" + VERSION_2[14:]
LOCAL = b"\r\n\r\n\0\r\nQUIT\n\x20\x00\0\0"
UNKNOWN = b"PROXY UNKNOWN\r\n"
HERE = ("127.0.0.0/8",)
ELSEWHERE = ("10.1.2.16/28",)

Relay = Any
"""conftest's RunningRelay; test modules cannot import it."""
StartRelay = Any
Peer = Any


async def proxied(start_relay: StartRelay, trusted: tuple[str, ...] = HERE, **changes: Any) -> Relay:
    """A relay whose listeners `submission`, `submissions` and `open` stand behind a load balancer."""
    return await start_relay(
        listeners=(
            Listener(name="submission", port=0, mode=ListenerMode.START_TLS, proxy_trusted_networks=trusted),
            Listener(name="submissions", port=0, mode=ListenerMode.IMPLICIT_TLS, proxy_trusted_networks=trusted),
            Listener(
                name="open",
                port=0,
                mode=ListenerMode.PLAIN,
                authentication_required=False,
                proxy_trusted_networks=trusted,
            ),
        ),
        **changes,
    )


async def connected(relay: Relay, listener: str, *pieces: bytes) -> Peer:
    """A client that has sent this, and has heard nothing yet."""
    peer = await relay.dial(listener)
    for piece in pieces:
        peer.writer.write(piece)
        await peer.writer.drain()
    return peer


async def log_in_and_send(peer: Peer) -> None:
    await peer.say(b"EHLO client.test")
    assert (await peer.say(b"AUTH PLAIN " + PASSWORD)).startswith("235")
    assert (await peer.say(MAIL, RCPT, b"DATA")).startswith("354")
    assert (await peer.send(TEXT)).startswith("250")


# --- whom the balancer connects for -----------------------------------------------------------------------------------
@pytest.mark.parametrize("header", [VERSION_1, VERSION_2], ids=["version 1", "version 2"])
@pytest.mark.parametrize("split", [False, True], ids=["whole", "octet by octet"])
async def test_the_client_is_whom_the_balancer_names(start_relay: StartRelay, header: bytes, split: bool) -> None:
    relay = await proxied(start_relay)
    pieces = [bytes([octet]) for octet in header] if split else [header]
    peer = await connected(relay, "submission", *pieces)
    assert await peer.reply() == "220 relay.test ESMTP"
    await peer.say(b"EHLO client.test")
    assert (await peer.say(b"STARTTLS")).startswith("220")
    await peer.writer.start_tls(relay.client_tls, server_hostname="relay.test")
    await log_in_and_send(peer)
    assert [message.client_address for message in relay.dispatcher.messages] == ["192.0.2.7"]
    assert b"[192.0.2.7]" in relay.dispatcher.texts[0]


@pytest.mark.parametrize("header", [VERSION_1, VERSION_2], ids=["version 1", "version 2"])
async def test_tls_begins_behind_the_header(start_relay: StartRelay, header: bytes) -> None:
    relay = await proxied(start_relay)
    peer = await connected(relay, "submissions", header)
    await peer.writer.start_tls(relay.client_tls, server_hostname="relay.test")
    assert await peer.reply() == "220 relay.test ESMTP"
    await log_in_and_send(peer)
    assert [message.client_address for message in relay.dispatcher.messages] == ["192.0.2.7"]


@pytest.mark.parametrize("header", [VERSION_1, VERSION_2], ids=["version 1", "version 2"])
async def test_a_handshake_in_the_headers_own_segment_is_not_lost(start_relay: StartRelay, header: bytes) -> None:
    relay = await proxied(start_relay)
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = relay.client_tls.wrap_bio(incoming, outgoing, server_hostname="relay.test")
    with pytest.raises(ssl.SSLWantReadError):
        tls.do_handshake()
    peer = await connected(relay, "submissions", header + outgoing.read())
    async with asyncio.timeout(10):
        while True:
            try:
                tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                incoming.write(await peer.reader.read(65536))
        peer.writer.write(outgoing.read())
        greeting = b""
        while not greeting.endswith(b"\r\n"):
            try:
                greeting += tls.read()
            except ssl.SSLWantReadError:
                incoming.write(await peer.reader.read(65536))
    assert greeting == b"220 relay.test ESMTP\r\n"


async def test_limits_and_networks_are_those_of_the_real_client(start_relay: StartRelay) -> None:
    relay = await proxied(start_relay, limits=Limits(connections_per_network=1))
    first = await connected(relay, "open", VERSION_1)
    assert (await first.reply()).startswith("220")
    other = await connected(relay, "open", VERSION_1.replace(b"192.0.2.7", b"203.0.113.1"))
    assert (await other.reply()).startswith("220")
    neighbour = await connected(relay, "open", VERSION_1.replace(b"192.0.2.7", b"192.0.2.8"))
    assert await neighbour.reply() == str(reply.TOO_MANY_CONNECTIONS)
    await relay.ended_one("rejected", "too_many_connections")
    # 127.0.0.0/8 is let in without a login here. The balancer is in it, and its clients are not.
    await first.say(b"EHLO client.test")
    assert (await first.say(MAIL)).startswith("530 5.7.0")


# --- health checks ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("header", [LOCAL, UNKNOWN])
@pytest.mark.parametrize("commands", [[b"EHLO lb", b"QUIT"], [b"QUIT"], [b"what", b"ever", b"QUIT"]])
async def test_a_balancers_own_connection_is_nobodys_session(
    start_relay: StartRelay, header: bytes, commands: list[bytes]
) -> None:
    relay = await proxied(start_relay)
    peer = await connected(relay, "open", header)
    assert (await peer.reply()).startswith("220")
    for command in commands:
        await peer.say(command)
    await peer.rest()
    await relay.ended("none", "none")


@pytest.mark.parametrize("header", [LOCAL, UNKNOWN])
async def test_the_balancers_network_lets_nobody_in(start_relay: StartRelay, header: bytes) -> None:
    relay = await proxied(start_relay)
    peer = await connected(relay, "open", header)
    assert (await peer.reply()).startswith("220")
    await peer.say(b"EHLO client.test")
    assert (await peer.say(MAIL)).startswith("530 5.7.0")


@pytest.mark.parametrize("listener", ["open", "submissions"])
async def test_who_connects_and_says_nothing_is_nobodys_session(start_relay: StartRelay, listener: str) -> None:
    relay = await proxied(start_relay)
    await (await connected(relay, listener)).hang_up()
    await relay.ended("none", "none", listener)


# --- what is not such a header ----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "octets",
    [b"EHLO client.test\r\n", b"PROXY TCP4 192.0.2.7\r\n" + b" " * 20, DATAGRAM],
    ids=["a command", "no ports", "datagram"],
)
async def test_without_a_header_the_connection_is_closed(start_relay: StartRelay, octets: bytes) -> None:
    relay = await proxied(start_relay)
    peer = await connected(relay, "open", octets)
    assert await peer.reply() == str(reply.PROXY_REQUIRED)
    assert await peer.rest() == b""
    await relay.ended("rejected", "proxy_protocol")


async def test_a_header_that_breaks_off_is_refused(start_relay: StartRelay) -> None:
    relay = await proxied(start_relay)
    peer = await connected(relay, "open", VERSION_1[:20])
    peer.writer.write_eof()
    assert await peer.reply() == str(reply.PROXY_REQUIRED)
    await relay.ended("rejected", "proxy_protocol")


@pytest.mark.parametrize("octets", [b"", VERSION_1[:20], VERSION_2[:-1]])
async def test_a_header_has_to_come_soon(
    start_relay: StartRelay, monkeypatch: pytest.MonkeyPatch, octets: bytes
) -> None:
    monkeypatch.setattr(opening, "PROXY_TIMEOUT", 0.1)
    relay = await proxied(start_relay)
    peer = await connected(relay, "open", octets)
    assert await peer.reply() == str(reply.PROXY_REQUIRED)
    await relay.ended("rejected", "proxy_protocol")


async def test_only_a_trusted_balancer_may_say_who_the_client_is(start_relay: StartRelay) -> None:
    relay = await proxied(start_relay, trusted=ELSEWHERE)
    peer = await connected(relay, "open", VERSION_1)
    assert await peer.reply() == str(reply.PROXY_REQUIRED)
    await relay.ended_one("rejected", "proxy_protocol")
    peer = await connected(relay, "submissions", VERSION_1)
    assert await peer.rest() == b""
    await relay.ended_one("rejected", "proxy_protocol", "submissions")


@pytest.mark.parametrize("header", [VERSION_1, VERSION_2], ids=["version 1", "version 2"])
async def test_a_header_is_never_guessed(relay: Relay, header: bytes) -> None:
    peer = await relay.connect()
    peer.writer.write(header + b"\r\n")
    assert (await peer.reply()).startswith("500")
    await peer.hang_up()
    tls = await connected(relay, "submissions", header)
    await tls.rest()
    await relay.ended_one("rejected", "tls_handshake", "submissions")


# --- implicit TLS -----------------------------------------------------------------------------------------------------
async def test_a_handshake_counts_as_a_connection(start_relay: StartRelay) -> None:
    relay = await start_relay(limits=Limits(connections=2))
    silent = [await connected(relay, "submissions") for _ in range(2)]
    await relay.connect("open")
    assert relay.greeting == str(reply.TOO_MANY_CONNECTIONS)
    refused = await relay.connect("submissions")
    assert relay.greeting == str(reply.TOO_MANY_CONNECTIONS)
    assert await refused.rest() == b""
    await relay.ended_one("rejected", "too_many_connections", "submissions")
    for peer in silent:
        await peer.hang_up()
    await relay.eventually(lambda: relay.sessions("none", "none", "submissions") == 2)
    await relay.connect("submissions")
    assert relay.greeting == "220 relay.test ESMTP"


async def test_few_of_those_over_the_cap_may_hear_so_under_tls(
    start_relay: StartRelay, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener_module, "TOLD_AT_ONCE", 1)
    relay = await start_relay(limits=Limits(connections=1))
    _admitted = await relay.connect("submissions")
    told = await connected(relay, "submissions")
    dropped = await connected(relay, "submissions")
    assert await dropped.rest() == b""
    await relay.ended_one("rejected", "too_many_connections", "submissions")
    await told.writer.start_tls(relay.client_tls, server_hostname="relay.test")
    assert await told.reply() == str(reply.TOO_MANY_CONNECTIONS)


async def test_a_handshake_that_fails_is_a_session_that_was_refused(relay: Relay) -> None:
    peer = await connected(relay, "submissions", b"EHLO client.test\r\n")
    await peer.rest()
    await relay.ended("rejected", "tls_handshake", "submissions")


async def test_a_client_that_does_not_trust_the_certificate_is_a_session_that_was_refused(relay: Relay) -> None:
    def distrust() -> None:
        with socket.create_connection(relay.listeners.addresses["submissions"], timeout=10) as connection:
            ssl.create_default_context().wrap_socket(connection, server_hostname="relay.test")

    with pytest.raises(ssl.SSLCertVerificationError):
        await asyncio.to_thread(distrust)
    await relay.ended("rejected", "tls_handshake", "submissions")


async def test_a_handshake_has_to_come_soon(relay: Relay, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "TLS_HANDSHAKE_TIMEOUT", 0.1)
    peer = await connected(relay, "submissions", b"\x16\x03\x01")
    assert await peer.rest() == b""
    await relay.ended("none", "none", "submissions")


async def test_stopping_does_not_wait_for_who_has_not_been_greeted(start_relay: StartRelay) -> None:
    relay = await proxied(start_relay)
    silent = [await connected(relay, "open"), await connected(relay, "submissions", VERSION_1)]
    await relay.eventually(lambda: len(relay.listeners._connections.sessions) == 2)
    async with asyncio.timeout(5):
        await relay.listeners.stop(60.0)
    for peer in silent:
        with contextlib.suppress(ConnectionError):
            assert await peer.rest() == b""
    assert relay.metric("mailsluice_sessions_active", listener="open") == 0


async def test_without_file_descriptors_accepting_pauses_and_goes_on(
    relay: Relay, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opening, "ACCEPT_PAUSE", 0.05)
    accept, failures = socket.socket.accept, [OSError(errno.EMFILE, "Too many open files")]

    def accept_later(listening: socket.socket) -> Any:
        if failures:
            raise failures.pop()
        return accept(listening)

    monkeypatch.setattr(socket.socket, "accept", accept_later)
    await relay.connect("submissions")
    assert relay.greeting == "220 relay.test ESMTP"
    assert failures == []


async def test_new_trusted_networks_hold_for_new_connections(start_relay: StartRelay) -> None:
    relay = await proxied(start_relay, trusted=ELSEWHERE)
    listeners = tuple(
        msgspec.structs.replace(each, proxy_trusted_networks=HERE) for each in relay.configuration.listeners
    )
    relay.listeners.reconfigure(msgspec.structs.replace(relay.configuration, listeners=listeners), relay.credentials)
    peer = await connected(relay, "open", VERSION_1)
    assert (await peer.reply()).startswith("220")
