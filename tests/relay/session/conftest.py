"""A relay of real sessions, listeners and admission on loopback, with a dispatcher that keeps what it is given."""

from __future__ import annotations

import asyncio
import base64
import ssl
import time
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

import bcrypt
import msgspec
import pytest
import trustme
import uvloop

from mailsluice_relay import reply
from mailsluice_relay.admission import Admission
from mailsluice_relay.config import (
    Authentication,
    Configuration,
    Credentials,
    Limits,
    Listener,
    ListenerMode,
    Relay,
    Upstream,
    User,
)
from mailsluice_relay.envelope import Envelope, Message
from mailsluice_relay.listener import Listeners
from mailsluice_relay.metrics import Metrics
from mailsluice_relay.reply import Reply
from mailsluice_relay.spool.content import ContentWriter

LOGIN = "app@example.test"
PASSWORD = "right"
HASH = bcrypt.hashpw(PASSWORD.encode(), bcrypt.gensalt(4)).decode()


def pytest_asyncio_loop_factories() -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """The loop that the relay runs on."""
    return {"uvloop": uvloop.new_event_loop}


async def eventually(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    """Wait until the condition holds; fail when it does not in time."""
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - counters have no event to wait for
            await asyncio.sleep(0.005)


class KeepingDispatcher:
    """The dispatcher's side that sessions see: takes messages into memory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.messages: list[Message] = []
        self.texts: list[bytes] = []
        self.answer: Reply | None = None
        """What `submit` says instead of yes."""
        self.full: Reply | None = None
        self.error: Exception | None = None
        self.may_go_on = asyncio.Event()
        self.may_go_on.set()
        self.waiting = 0
        self._number = 0

    def new_queue_id(self) -> str:
        self._number += 1
        return f"Q{self._number}"

    def refuses(self) -> Reply | None:
        return self.full

    def passage(self, _envelope: Envelope) -> None:
        """Messages are queued."""

    def new_content(self) -> ContentWriter:
        return ContentWriter(self.directory)

    async def submit(self, message: Message) -> Reply:
        self.waiting += 1
        await self.may_go_on.wait()
        if self.error is not None:
            raise self.error
        if self.answer is not None:
            return self.answer
        self.messages.append(message)
        self.texts.append(b"".join(message.content.chunks()))
        return reply.queued(message.queue_id)


class Peer:
    """A client that says exactly what it is told to."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def reply(self) -> str:
        """The next reply, its lines joined; empty at the end of the connection."""
        lines = []
        async with asyncio.timeout(10):
            while line := await self.reader.readline():
                lines.append(line.decode().rstrip("\r\n"))
                if line[3:4] != b"-":
                    break
        return "\n".join(lines)

    async def say(self, *commands: bytes) -> str:
        """Send commands in one go; the last one's reply."""
        self.writer.write(b"".join(command + b"\r\n" for command in commands))
        answer = ""
        for _ in commands:
            answer = await self.reply()
        return answer

    async def send(self, octets: bytes) -> str:
        self.writer.write(octets)
        return await self.reply()

    async def rest(self) -> bytes:
        """Everything up to the end of the connection, which is then closed on this side, too."""
        async with asyncio.timeout(10):
            octets = await self.reader.read()
        self.writer.close()
        return octets

    async def hang_up(self) -> None:
        self.writer.close()
        await self.writer.wait_closed()


class RunningRelay:
    """What a test starts and looks at."""

    def __init__(self, configuration: Configuration, credentials: Credentials, ca: trustme.CA, directory: Path) -> None:
        self.configuration = configuration
        self.credentials = credentials
        self.metrics = Metrics()
        self.admission = Admission(configuration, metrics=self.metrics, monotonic=time.monotonic, now=time.time)
        self.dispatcher = KeepingDispatcher(directory)
        dispatcher: Any = self.dispatcher
        self.listeners = Listeners(
            configuration,
            credentials,
            bind=("127.0.0.1",),
            admission=self.admission,
            dispatcher=dispatcher,
            metrics=self.metrics,
            now=time.time,
            monotonic=time.monotonic,
        )
        self.metrics.configure(configuration, self.listeners.certificate_expiry(), self.admission.spam_rules)
        self.client_tls = ssl.create_default_context()
        ca.configure_trust(self.client_tls)

    eventually = staticmethod(eventually)

    async def dial(self, listener: str) -> Peer:
        """A client that has a connection, and has neither said nor heard a thing."""
        return Peer(*await asyncio.open_connection(*self.listeners.addresses[listener]))

    async def connect(self, listener: str = "open") -> Peer:
        """A greeted client."""
        host, port = self.listeners.addresses[listener]
        implicit = {"ssl": self.client_tls, "server_hostname": "relay.test"} if listener == "submissions" else {}
        reader, writer = await asyncio.open_connection(host, port, **implicit)
        peer = Peer(reader, writer)
        self.greeting = await peer.reply()
        return peer

    async def logged_in(self, listener: str = "submission") -> Peer:
        """A client that has done all that comes before MAIL."""
        peer = await self.connect(listener)
        await peer.say(b"EHLO client.test")
        if listener == "submission":
            assert (await peer.say(b"STARTTLS")).startswith("220")
            await peer.writer.start_tls(self.client_tls, server_hostname="relay.test")
            await peer.say(b"EHLO client.test")
        assert (await peer.say(auth_plain(LOGIN, PASSWORD))).startswith("235 2.7.0")
        return peer

    async def in_data(self) -> Peer:
        """A client, let in by its network, that may send the text now."""
        peer = await self.connect()
        await peer.say(b"EHLO client.test")
        answer = await peer.say(b"MAIL FROM:<app@example.test>", b"RCPT TO:<person@example.org>", b"DATA")
        assert answer.startswith("354")
        return peer

    def sessions(self, result: str, reason: str, listener: str = "open") -> float:
        labels = {"listener": listener, "result": result, "reason": reason}
        return self.metrics.registry.get_sample_value("mailsluice_sessions_total", labels) or 0.0

    def all_sessions(self) -> float:
        families = self.metrics.registry.collect()
        return sum(s.value for f in families for s in f.samples if s.name == "mailsluice_sessions_total")

    def metric(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(name, labels) or 0.0

    async def ended_one(self, result: str, reason: str, listener: str = "open") -> None:
        """A session has been counted as this."""
        await eventually(lambda: self.sessions(result, reason, listener) == 1)

    async def ended(self, result: str, reason: str, listener: str = "open") -> None:
        """The one session that there was has been counted as this, and as nothing else."""
        await eventually(lambda: self.all_sessions() == 1)
        assert self.sessions(result, reason, listener) == 1
        assert self.metric("mailsluice_sessions_active", listener=listener) == 0


def auth_plain(login: str, password: str) -> bytes:
    return b"AUTH PLAIN " + base64.b64encode(f"\0{login}\0{password}".encode())


@pytest.fixture(scope="session")
def ca() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="session")
def credentials(ca: trustme.CA) -> Credentials:
    return certificate(ca)


def certificate(ca: trustme.CA) -> dict[str, bytes]:
    """What credentials/ holds for a new server certificate."""
    issued = ca.issue_cert("relay.test")
    return {
        "tls.crt": b"".join(blob.bytes() for blob in issued.cert_chain_pems),
        "tls.key": issued.private_key_pem.bytes(),
    }


@pytest.fixture
def configuration() -> Configuration:
    return Configuration(
        revision="1",
        credentials_revision="1",
        relay=Relay(name="tenant-a", namespace="mail"),
        hostname="relay.test",
        listeners=(
            Listener(name="submission", port=0, mode=ListenerMode.START_TLS),
            Listener(name="submissions", port=0, mode=ListenerMode.IMPLICIT_TLS),
            Listener(name="open", port=0, mode=ListenerMode.PLAIN, authentication_required=False),
            Listener(
                name="lenient",
                port=0,
                mode=ListenerMode.PLAIN,
                authentication_required=False,
                allow_plaintext_authentication=True,
                normalize_line_endings=True,
            ),
        ),
        authentication=Authentication(
            users=(
                User(login=LOGIN, hashes=(HASH,)),
                User(login="stopped@example.test", hashes=(HASH,), suspended=True),
            ),
            allowed_networks=("127.0.0.0/8",),
        ),
        upstreams=(Upstream(name="smarthost", host="upstream.test"),),
        limits=Limits(message_size=600_000, recipients_per_message=3),
    )


StartRelay = Callable[..., Any]


@pytest.fixture
async def start_relay(
    configuration: Configuration, credentials: Credentials, ca: trustme.CA, tmp_path: Path
) -> AsyncIterator[StartRelay]:
    """Starts relays: `await start_relay(limits=Limits(...))` with changes to the configuration."""
    running: list[RunningRelay] = []

    async def start(**changes: Any) -> RunningRelay:
        relay = RunningRelay(msgspec.structs.replace(configuration, **changes), credentials, ca, tmp_path)
        await relay.listeners.start()
        running.append(relay)
        return relay

    yield start
    for relay in running:
        relay.dispatcher.may_go_on.set()
        await relay.listeners.stop(0.0)
        await relay.admission.close()


@pytest.fixture
async def relay(start_relay: StartRelay) -> RunningRelay:
    started: RunningRelay = await start_relay()
    return started
