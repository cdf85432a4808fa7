"""HAProxy in front of the relay: both versions of the PROXY protocol, its health checks, STARTTLS and implicit TLS."""

from __future__ import annotations

import shutil
import smtplib
import socket
import ssl
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import pytest

from mailsluice_relay.config import Listener, ListenerMode
from relay_process import LOGIN, PASSWORD, PATIENCE, RunningRelay, running_relay, until

pytestmark = [pytest.mark.interop, pytest.mark.timeout(300)]

CLIENT: Final = "127.0.0.2"
"""The client's address; HAProxy itself connects from 127.0.0.1."""
BALANCER: Final = ("127.0.0.1/32",)
VERSIONS: Final = {
    "v1": "send-proxy",
    "v2": "send-proxy-v2 proxy-v2-options crc32c,unique-id",
}
CHECKS: Final = {"submission": "option smtpchk EHLO balancer.test", "submissions": ""}
CONFIGURATION: Final = """\
global
  maxconn 100
defaults
  mode tcp
  timeout connect 5s
  timeout client 30s
  timeout server 30s
"""
SECTION: Final = """\
listen {name}
  bind 127.0.0.1:{port}
  unique-id-format %[uuid()]
  {check}
  server relay 127.0.0.1:{to} {proxy} check check-send-proxy inter 100ms
"""


@dataclass(frozen=True)
class Balanced:
    relay: RunningRelay
    ports: dict[tuple[str, str], int]
    """By listener and version."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def accepts(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="module")
def balanced(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Balanced]:
    haproxy = shutil.which("haproxy") or shutil.which("haproxy", path="/usr/sbin")
    if haproxy is None:
        pytest.skip("haproxy is not there; see what tools/interop-clients says")
    listeners = (
        Listener(name="submission", port=0, mode=ListenerMode.START_TLS, proxy_trusted_networks=BALANCER),
        Listener(name="submissions", port=0, mode=ListenerMode.IMPLICIT_TLS, proxy_trusted_networks=BALANCER),
    )
    with running_relay(tmp_path_factory.mktemp("relay"), *listeners) as relay:
        ports = {(listener.name, version): free_port() for listener in listeners for version in VERSIONS}
        sections = [
            SECTION.format(
                name=f"{listener}-{version}",
                port=port,
                to=relay.addresses[listener][1],
                proxy=VERSIONS[version],
                check=CHECKS[listener],
            )
            for (listener, version), port in ports.items()
        ]
        file = tmp_path_factory.mktemp("haproxy") / "haproxy.cfg"
        file.write_text(CONFIGURATION + "".join(sections))
        with file.with_suffix(".log").open("wb") as log:
            process = subprocess.Popen([haproxy, "-db", "-f", str(file)], stdout=log, stderr=log)
            try:
                until(lambda: process.poll() is not None or all(map(accepts, ports.values())), "HAProxy listens")
                assert process.poll() is None, file.with_suffix(".log").read_text()
                yield Balanced(relay, ports)
            finally:
                process.terminate()
                process.wait(PATIENCE)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("listener", ["submission", "submissions"])
def test_mail_through_a_balancer_has_the_clients_own_address(balanced: Balanced, listener: str, version: str) -> None:
    relay, port = balanced.relay, balanced.ports[listener, version]
    context = ssl.create_default_context(cafile=str(relay.authority))
    source = (CLIENT, 0)
    client: smtplib.SMTP
    if listener == "submissions":
        client = smtplib.SMTP_SSL("localhost", port, context=context, timeout=30, source_address=source)
    else:
        client = smtplib.SMTP("localhost", port, timeout=30, source_address=source)
    subject = f"Subject: {listener} {version}\r\n".encode()
    text = f"From: {LOGIN}\r\n".encode() + subject + b"\r\nHello.\r\n"
    with client:
        if listener == "submission":
            client.starttls(context=context)
        client.login(LOGIN, PASSWORD)
        client.sendmail(LOGIN, ["person@example.org"], text)
    until(lambda: any(subject in received for received in relay.sink.texts), "the mail is at the sink")
    (received,) = (received for received in relay.sink.texts if subject in received)
    assert f"([{CLIENT}])".encode() in received.partition(b"\r\n")[0]


@pytest.mark.parametrize("listener", ["submission", "submissions"])
def test_health_checks_are_nobodys_sessions(balanced: Balanced, listener: str) -> None:
    def sessions(result: str) -> float:
        return balanced.relay.metric("mailsluice_sessions_total", listener=listener, result=result)

    before = sessions("none")
    until(lambda: sessions("none") >= before + 10, "some checks were counted")
    assert sessions("rejected") == 0


def test_who_does_not_come_through_the_balancer_is_sent_away(balanced: Balanced) -> None:
    with socket.create_connection(balanced.relay.addresses["submission"], 10, source_address=(CLIENT, 0)) as direct:
        direct.sendall(b"PROXY TCP4 192.0.2.7 198.51.100.1 40000 587\r\n")
        assert direct.recv(512).startswith(b"421 4.7.0 Only a trusted load balancer")
