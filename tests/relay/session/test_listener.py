"""Listeners: certificates, connection caps, reconfiguration, and stopping."""

from __future__ import annotations

import asyncio
import datetime
import socket
import ssl
from typing import Any

import msgspec
import pytest
import trustme

from mailsluice_relay import reply
from mailsluice_relay.config import TLS, Configuration, ConfigurationError, Credentials, Limits, Listener, ListenerMode
from mailsluice_relay.listener import Connections, network_of, tls_context

MAIL = b"MAIL FROM:<app@example.test>"
RCPT = b"RCPT TO:<person@example.org>"
TEXT = b"From: app@example.test\r\n\r\nHello.\r\n.\r\n"

Relay = Any
"""conftest's RunningRelay; test modules cannot import it."""
StartRelay = Any


def issue(ca: trustme.CA, **options: Any) -> dict[str, bytes]:
    issued = ca.issue_cert("relay.test", **options)
    return {
        "tls.crt": b"".join(blob.bytes() for blob in issued.cert_chain_pems),
        "tls.key": issued.private_key_pem.bytes(),
    }


# --- certificates -----------------------------------------------------------------------------------------------------
def test_a_missing_certificate_is_named(configuration: Configuration) -> None:
    with pytest.raises(ConfigurationError, match=r"credentials/tls\.crt is missing"):
        tls_context(configuration, {})


def test_a_relay_without_tls_needs_no_certificate(configuration: Configuration) -> None:
    plain = tuple(each for each in configuration.listeners if each.mode is ListenerMode.PLAIN)
    tls_context(msgspec.structs.replace(configuration, listeners=plain), {})


def test_a_key_of_another_certificate_is_refused_without_showing_it(
    configuration: Configuration, credentials: Credentials, ca: trustme.CA
) -> None:
    other = issue(ca)["tls.key"]
    with pytest.raises(ConfigurationError, match=r"credentials/tls\.crt, tls\.key") as caught:
        tls_context(configuration, {**credentials, "tls.key": other})
    assert other.decode().splitlines()[1] not in str(caught.value)


@pytest.mark.parametrize("name", ["tls.crt", "tls.key"])
def test_what_is_no_pem_is_refused(configuration: Configuration, credentials: Credentials, name: str) -> None:
    with pytest.raises(ConfigurationError, match=r"credentials/tls\.crt, tls\.key"):
        tls_context(configuration, {**credentials, name: b"nonsense"})


def test_client_authorities_are_read_from_the_credentials(
    configuration: Configuration, credentials: Credentials, ca: trustme.CA
) -> None:
    wanted = msgspec.structs.replace(configuration, tls=TLS(client_ca="client-ca.crt"))
    context = tls_context(wanted, {**credentials, "client-ca.crt": ca.cert_pem.bytes()})
    assert context.verify_mode is ssl.CERT_OPTIONAL
    for broken in ({}, {"client-ca.crt": b"nonsense"}):
        with pytest.raises(ConfigurationError, match=r"client-ca\.crt"):
            tls_context(wanted, {**credentials, **broken})


@pytest.mark.parametrize("listener", ["submission", "submissions"])
async def test_the_minimum_version_holds(start_relay: StartRelay, listener: str) -> None:
    relay = await start_relay(tls=TLS(minimum_version="TLSv1.3"))
    relay.client_tls.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises((ssl.SSLError, ConnectionError)):
        await relay.logged_in(listener)
    relay.client_tls.maximum_version = ssl.TLSVersion.TLSv1_3
    await relay.logged_in(listener)


async def served_certificate(relay: Relay, listener: str) -> bytes:
    peer = await relay.logged_in(listener)
    certificate: bytes = peer.writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    return certificate


@pytest.mark.parametrize("listener", ["submission", "submissions"])
async def test_new_connections_get_the_new_certificate_and_old_ones_go_on(
    relay: Relay, ca: trustme.CA, listener: str
) -> None:
    old = await relay.logged_in(listener)
    before = await served_certificate(relay, listener)
    relay.listeners.reconfigure(relay.configuration, issue(ca))
    assert await served_certificate(relay, listener) != before
    assert (await old.say(b"NOOP")).startswith("250")


async def test_the_end_of_the_certificate_is_told_for_each_tls_listener(
    start_relay: StartRelay, ca: trustme.CA
) -> None:
    end = datetime.datetime(2031, 1, 2, 3, 4, 5, tzinfo=datetime.UTC)
    relay = await start_relay()
    relay.listeners.reconfigure(relay.configuration, issue(ca, not_after=end))
    assert relay.listeners.certificate_expiry() == {"submission": end.timestamp(), "submissions": end.timestamp()}


# --- what cannot be had -----------------------------------------------------------------------------------------------
async def test_a_balancers_network_that_is_none_is_named(start_relay: StartRelay) -> None:
    listener = Listener(name="from-lb", port=0, mode=ListenerMode.PLAIN, proxy_trusted_networks=("10.1.2.3/28",))
    with pytest.raises(ConfigurationError, match=r"listeners\.from-lb\.proxyProtocol\.trustedNetworks: 10\.1\.2\.3/28"):
        await start_relay(listeners=(listener,))


async def test_a_port_that_is_taken_is_named(start_relay: StartRelay) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        free = Listener(name="free", port=0, mode=ListenerMode.PLAIN)
        with pytest.raises(
            ConfigurationError, match=rf"listeners\.smtp\.port: cannot listen on 127\.0\.0\.1 port {port}"
        ):
            await start_relay(listeners=(free, Listener(name="smtp", port=port, mode=ListenerMode.PLAIN)))


async def test_the_set_of_listeners_changes_only_with_the_process(relay: Relay) -> None:
    fewer = msgspec.structs.replace(relay.configuration, listeners=relay.configuration.listeners[:1])
    first, *others = relay.configuration.listeners
    proxied = msgspec.structs.replace(first, proxy_trusted_networks=("10.0.0.0/8",))
    changed = msgspec.structs.replace(relay.configuration, listeners=(proxied, *others))
    for act in (relay.listeners.check, relay.listeners.reconfigure):
        for configuration in (fewer, changed):
            with pytest.raises(ConfigurationError, match="listeners"):
                act(configuration, relay.credentials)


async def test_a_refused_configuration_changes_nothing(relay: Relay) -> None:
    with pytest.raises(ConfigurationError):
        relay.listeners.reconfigure(relay.configuration, {"tls.crt": b"nonsense", "tls.key": b""})
    await relay.logged_in()


async def test_new_limits_hold_for_new_connections(relay: Relay) -> None:
    smaller = msgspec.structs.replace(relay.configuration, limits=Limits(message_size=10))
    old = await relay.connect()
    relay.listeners.reconfigure(smaller, relay.credentials)
    new = await relay.connect()
    assert "SIZE 600000" in await old.say(b"EHLO client.test")
    assert "SIZE 10" in await new.say(b"EHLO client.test")


# --- how many ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("limits", [Limits(connections=2), Limits(connections_per_network=2)])
async def test_connections_over_the_cap_are_sent_away(start_relay: StartRelay, limits: Limits) -> None:
    relay = await start_relay(limits=limits)
    first, _second = await relay.connect(), await relay.connect()
    third = await relay.connect()
    assert relay.greeting == str(reply.TOO_MANY_CONNECTIONS)
    assert await third.rest() == b""
    await relay.ended_one("rejected", "too_many_connections")
    await first.say(b"QUIT")
    await first.hang_up()
    await relay.ended_one("none", "none")
    await relay.connect()
    assert relay.greeting == "220 relay.test ESMTP"


def test_networks() -> None:
    assert network_of("192.0.2.1") == network_of("192.0.2.255") != network_of("192.0.3.1")
    assert network_of("2001:db8::1") == network_of("2001:db8::ffff:1") != network_of("2001:db8:0:1::1")


async def test_networks_that_are_gone_are_forgotten() -> None:
    class Visitor:
        class client:  # noqa: N801 - it stands for Session.client
            address = "192.0.2.1"

    connections = Connections(10, 1)
    visitor: Any = Visitor()
    for _ in range(3):
        assert connections.enter(visitor) is None
        assert connections.locate(visitor) is None
        connections.leave(visitor)
    await connections.wait_until_empty()


# --- stopping ---------------------------------------------------------------------------------------------------------
async def test_stopping_sends_idle_clients_away_and_lets_running_transactions_finish(relay: Relay) -> None:
    idle = await relay.connect()
    await idle.say(b"EHLO client.test")
    busy = await relay.in_data()
    stopping = asyncio.create_task(relay.listeners.stop(5.0))
    assert await idle.reply() == str(reply.SHUTTING_DOWN)
    assert await idle.rest() == b""
    with pytest.raises(ConnectionError):
        await relay.connect()
    busy.writer.write(TEXT)
    assert (await busy.reply()).startswith("250 2.0.0")
    assert await busy.reply() == str(reply.SHUTTING_DOWN)
    assert await busy.rest() == b""
    await stopping
    assert len(relay.dispatcher.messages) == 1


async def test_while_stopping_no_transaction_begins(relay: Relay) -> None:
    peer = await relay.in_data()
    stopping = asyncio.create_task(relay.listeners.stop(5.0))
    await asyncio.sleep(0)
    peer.writer.write(TEXT + MAIL + b"\r\n" + RCPT + b"\r\nDATA\r\n")
    assert (await peer.reply()).startswith("250")
    assert await peer.reply() == str(reply.SHUTTING_DOWN)
    await peer.rest()
    await stopping
    assert len(relay.dispatcher.messages) == 1


async def test_who_does_not_finish_in_time_is_dropped(relay: Relay) -> None:
    peer = await relay.in_data()
    await relay.listeners.stop(0.05)
    assert await peer.rest() == b""
    await relay.ended_one("none", "none")
