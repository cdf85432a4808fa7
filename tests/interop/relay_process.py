"""A relay as a real process, with a sink as its upstream that keeps every text octet for octet."""

from __future__ import annotations

import contextlib
import json
import socketserver
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import bcrypt
import trustme

from mailsluice_relay.config import (
    Authentication,
    Configuration,
    Listener,
    Relay,
    Upstream,
    UpstreamTLSMode,
    User,
    encode,
)

LOGIN: Final = "app@example.test"
PASSWORD: Final = "correct horse"
PATIENCE: Final = 30.0
"""Seconds."""


def until(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, f"not within {PATIENCE:g} s: {what}"
        time.sleep(0.01)


# --- the sink ---------------------------------------------------------------------------------------------------------
class Sink(socketserver.ThreadingTCPServer):
    """Takes all mail."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Dialogue)
        self.texts: list[bytes] = []
        """Each with its dots unstuffed, and otherwise as it came."""

    @property
    def port(self) -> int:
        port: int = self.server_address[1]
        return port


class _Dialogue(socketserver.StreamRequestHandler):
    server: Sink

    def handle(self) -> None:
        self.say(b"220 sink.test ESMTP")
        while line := self.rfile.readline():
            match line.split()[0].upper():
                case b"EHLO":
                    self.say(b"250-sink.test\r\n250-8BITMIME\r\n250-SMTPUTF8\r\n250 SIZE 100000000")
                case b"DATA":
                    self.say(b"354 go on")
                    self.server.texts.append(self.text())
                    self.say(b"250 2.0.0 kept")
                case b"QUIT":
                    self.say(b"221 2.0.0 bye")
                    return
                case _:
                    self.say(b"250 2.0.0 OK")

    def text(self) -> bytes:
        lines = []
        while (line := self.rfile.readline()) not in {b".\r\n", b""}:
            lines.append(line.removeprefix(b"."))
        return b"".join(lines)

    def say(self, reply: bytes) -> None:
        self.wfile.write(reply + b"\r\n")


# --- the relay --------------------------------------------------------------------------------------------------------
@dataclass
class RunningRelay:
    sink: Sink
    authority: Path
    """The CA of the relay's certificate, which is for localhost and 127.0.0.1."""
    log: Path
    addresses: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    http: str = ""

    def metric(self, name: str, **labels: str) -> float:
        with urllib.request.urlopen(f"http://{self.http}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        wanted = {f'{key}="{value}"' for key, value in labels.items()}
        return sum(
            float(line.rpartition(" ")[2])
            for line in lines
            if line.startswith(f"{name}{{") and wanted <= set(line.partition("{")[2].rpartition("}")[0].split(","))
        )


@contextlib.contextmanager
def running_relay(directory: Path, *listeners: Listener) -> Iterator[RunningRelay]:
    """`directory` is empty, and keeps the relay's log."""
    authority = trustme.CA()
    issued = authority.issue_cert("localhost", "127.0.0.1")
    (directory / "ca.pem").write_bytes(authority.cert_pem.bytes())
    with Sink() as sink:
        configuration = Configuration(
            revision="1",
            credentials_revision="1",
            relay=Relay(name="interop", namespace="mail"),
            hostname="localhost",
            listeners=listeners,
            authentication=Authentication(
                users=(User(login=LOGIN, hashes=(bcrypt.hashpw(PASSWORD.encode(), bcrypt.gensalt(4)).decode(),)),)
            ),
            upstreams=(Upstream(name="sink", host="127.0.0.1", port=sink.port, tls=UpstreamTLSMode.PLAIN),),
        )
        files = {
            "config/config.json.gz": encode(configuration),
            "credentials/revision": b"1",
            "credentials/tls.crt": b"".join(blob.bytes() for blob in issued.cert_chain_pems),
            "credentials/tls.key": issued.private_key_pem.bytes(),
        }
        for name, octets in files.items():
            path = directory / "etc" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(octets)
        (directory / "data").mkdir()
        ready = directory / "ready.json"
        options = ["--config-dir", directory / "etc", "--data-dir", directory / "data", "--ready-file", ready]
        program = Path(sys.executable).with_name("mailsluice-relay")
        serving = threading.Thread(target=sink.serve_forever, daemon=True)
        serving.start()
        relay = RunningRelay(sink, directory / "ca.pem", directory / "log")
        with relay.log.open("wb") as log:
            process = subprocess.Popen(
                [program, "serve", *options, "--http-port", "0", "--grace", "2"], stdout=log, stderr=log
            )
        try:
            until(lambda: ready.exists() or process.poll() is not None, "the relay is ready")
            assert process.poll() is None, relay.log.read_text()
            told = json.loads(ready.read_text())
            relay.http = told["http"]
            relay.addresses = {
                name: (address.rpartition(":")[0], int(address.rpartition(":")[2]))
                for name, address in told["listeners"].items()
            }
            yield relay
        finally:
            process.terminate()
            process.wait(PATIENCE)
            sink.shutdown()
            serving.join()
