"""Fixtures that several tests of the relay share."""

from __future__ import annotations

import asyncio
import base64
import hmac
import itertools
import random
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dns.asyncresolver
import dns.flags
import dns.message
import dns.rcode
import dns.rdatatype
import dns.rrset
import pytest
import scramp
import trustme

from mailsluice_relay.delivery.mx import MailExchangers
from mailsluice_relay.envelope import Envelope, Mailbox, Message, Recipient
from mailsluice_relay.spool.content import ContentWriter

MakeMessage = Callable[..., Message]


@pytest.fixture
def make_message(tmp_path: Path) -> MakeMessage:
    """Makes messages as a session would: `make_message(to=(...), body=b"...")`."""
    numbers = itertools.count(1)
    incoming = tmp_path / "taken"

    def make(
        *,
        queue_id: str | None = None,
        sender: str | None = "app@example.test",
        to: tuple[str | Recipient, ...] = ("person@example.org",),
        header: bytes = b"From: app@example.test\r\nSubject: hello\r\n",
        body: bytes = b"Hello.\r\n",
        login: str | None = "app@example.test",
        received_at: float = 1000.0,
        held: bool = False,
        **envelope: object,
    ) -> Message:
        incoming.mkdir(parents=True, exist_ok=True)
        writer = ContentWriter(incoming)
        writer.write(header + b"\r\n" + body)
        recipients = [Recipient(Mailbox(*r.rsplit("@", 1))) if isinstance(r, str) else r for r in to]
        return Message(
            queue_id=queue_id or f"TEST{next(numbers):06}",
            envelope=Envelope(
                sender=None if sender is None else Mailbox(*sender.rsplit("@", 1)),
                recipients=recipients,
                **envelope,  # type: ignore[arg-type] - a test names the fields that it means
            ),
            content=writer.finish(),
            login=login,
            listener="submission",
            client_address="192.0.2.1",
            received_at=received_at,
            held=held,
        )

    return make


# --- an upstream that answers by script ------------------------------------------------------------------------------
@dataclass
class Received:
    """A transaction that the upstream took."""

    mail: str
    recipients: list[str]
    text: bytes


@dataclass
class ScriptedUpstream:
    """A real SMTP server on a real socket, which answers as it is told.

    `answers` maps a command's verb, its first words (`RCPT TO:<a@b>`) or `.` (the end of data) to what is answered from
    then on: one reply, or a list to be used up first; `close` and `hang` instead of a reply do so.
    """

    extensions: tuple[str, ...] = ("PIPELINING", "SIZE 10000000", "8BITMIME", "SMTPUTF8", "DSN", "ENHANCEDSTATUSCODES")
    answers: dict[str, str | list[str]] = field(default_factory=dict)
    tls: ssl.SSLContext | None = None
    implicit_tls: bool = False
    greeting: str = "220 upstream.test ESMTP"
    segment: int = 0
    """How many octets of a reply are written at once; 0: all."""
    address: str = "127.0.0.1"
    password: str | None = None
    mechanisms: str = "PLAIN LOGIN"
    tokens: set[str] = field(default_factory=set)
    """The access tokens that XOAUTH2 and OAUTHBEARER let in, for user@example.test."""
    received: list[Received] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)
    reads: list[bytes] = field(default_factory=list)
    connections: int = 0
    open: int = 0
    most_open: int = 0
    port: int = 0
    _server: asyncio.Server | None = None
    _sessions: set[asyncio.Task[None]] = field(default_factory=set)
    _writers: set[asyncio.StreamWriter] = field(default_factory=set)

    async def start(self, port: int = 0) -> None:
        self._server = await asyncio.start_server(
            self._session, self.address, port or self.port, ssl=self.tls if self.implicit_tls else None
        )
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
        for writer in list(self._writers):
            writer.transport.abort()
        for task in list(self._sessions):
            task.cancel()
        await asyncio.gather(*self._sessions, return_exceptions=True)

    def texts(self) -> list[bytes]:
        return [item.text for item in self.received]

    async def _session(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._sessions.add(task)
        self._writers.add(writer)
        self.connections += 1
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        try:
            await self._dialogue(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError, ssl.SSLError, EOFError):
            pass
        finally:
            self.open -= 1
            self._sessions.discard(task)
            self._writers.discard(writer)
            writer.close()

    def _answer(self, line: str, default: str) -> str:
        verb = line.split(" ")[0].upper()
        for key, answer in self.answers.items():
            if verb == key or (" " in key and line.startswith(key)):
                if isinstance(answer, str):
                    return answer
                return answer.pop(0) if answer else default
        return default

    async def _dialogue(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async def say(reply: str) -> None:
            if reply == "close":
                writer.transport.abort()
                raise EOFError
            if reply == "hang":
                await asyncio.Event().wait()
            octets = reply.encode() + b"\r\n"
            for start in range(0, len(octets), self.segment or len(octets)):
                writer.write(octets[start : start + (self.segment or len(octets))])
                await asyncio.sleep(0)  # the socket does not delay, so that each piece is a segment of its own
            if reply.startswith("421"):
                raise EOFError

        encrypted, authenticated = self.implicit_tls, False
        mail, recipients = "", []
        await say(self._answer("GREETING", self.greeting))
        while line := (await reader.readuntil(b"\n")).decode().rstrip("\r\n"):
            self.commands.append(line)
            verb = line.split(" ")[0].upper()
            if verb == "EHLO":
                offered = [*self.extensions]
                if self.tls is not None and not encrypted:
                    offered.append("STARTTLS")
                if self.password is not None:
                    offered.append(f"AUTH {self.mechanisms}")
                words = ["upstream.test", *offered]
                greeting = "\r\n".join(f"250-{word}" for word in words[:-1])
                default = f"{greeting}\r\n250 {words[-1]}" if len(words) > 1 else f"250 {words[0]}"
                await say(self._answer(line, default))
            elif verb == "STARTTLS":
                await say(self._answer(line, "220 2.0.0 go ahead"))
                await writer.start_tls(self.tls)
                encrypted = True
            elif verb == "AUTH":
                await self._authenticate(line, reader, say)
                authenticated = True
            elif verb == "MAIL":
                default = "250 2.1.0 OK"
                if self.password is not None and not authenticated:
                    default = "530 5.7.0 Authentication required"
                reply = self._answer(line, default)
                if reply.startswith("2"):
                    mail, recipients = line, []
                await say(reply)
            elif verb == "RCPT":
                reply = self._answer(line, "250 2.1.5 OK" if mail else "503 5.5.1 MAIL first")
                if reply.startswith("2"):
                    recipients.append(line)
                await say(reply)
            elif verb == "DATA":
                reply = self._answer(line, "354 go" if recipients else "503 5.5.1 RCPT first")
                await say(reply)
                if reply.startswith("354"):
                    raw = bytearray(b"\r\n")
                    while not raw.endswith(b"\r\n.\r\n"):
                        raw += await reader.readuntil(b"\n")
                    text = bytes(raw[:-3]).replace(b"\r\n..", b"\r\n.")[2:]
                    reply = self._answer(".", "250 2.0.0 taken" if recipients else "554 5.5.1 no recipients")
                    if reply.startswith("2"):
                        self.received.append(Received(mail, recipients, text))
                    mail, recipients = "", []
                    await say(reply)
            elif verb == "QUIT":
                await say("221 2.0.0 bye")
                return
            elif verb in {"RSET", "HELO", "NOOP"}:
                mail, recipients = "", []
                await say(self._answer(line, "250 2.0.0 OK"))
            else:
                await say("500 5.5.1 what?")

    async def _authenticate(
        self, line: str, reader: asyncio.StreamReader, say: Callable[[str], Awaitable[None]]
    ) -> None:
        async def ask(challenge: bytes) -> bytes:
            await say(f"334 {base64.b64encode(challenge).decode()}")
            return base64.b64decode(await reader.readuntil(b"\n"))

        _, mechanism, *given = line.split(" ")
        initial = base64.b64decode(given[0]) if given else b""
        password = (self.password or "").encode()
        match mechanism:
            case "PLAIN":
                is_right = initial.split(b"\0")[2] == password
            case "LOGIN":
                await ask(b"Username:")
                is_right = await ask(b"Password:") == password
            case "CRAM-MD5":
                challenge = b"<1896.697170952@upstream.test>"
                name, _, digest = (await ask(challenge)).partition(b" ")
                is_right = (name, digest.decode()) == (b"user", hmac.new(password, challenge, "md5").hexdigest())
            case "SCRAM-SHA-256":
                is_right = await self._scram(initial, ask)
            case "XOAUTH2":
                is_right = initial in {f"user=user@example.test\1auth=Bearer {t}\1\1".encode() for t in self.tokens}
                if not is_right:
                    assert await ask(b'{"status":"400","schemes":"Bearer"}') == b""
            case _:
                gs2 = "n,a=user@example.test,"
                is_right = initial in {f"{gs2}\1auth=Bearer {t}\1\1".encode() for t in self.tokens}
                if not is_right:
                    assert await ask(b'{"status":"invalid_token"}') == b"\1"
        await say(self._answer("AUTH", "235 2.7.0 welcome" if is_right else "535 5.7.8 wrong"))

    async def _scram(self, initial: bytes, ask: Callable[[bytes], Awaitable[bytes]]) -> bool:
        mechanism = scramp.ScramMechanism("SCRAM-SHA-256")
        known = mechanism.make_auth_info(self.password)
        server = mechanism.make_server(lambda _name: known)
        try:
            server.set_client_first(initial.decode())
            server.set_client_final((await ask(str(server.get_server_first()).encode())).decode())
        except scramp.ScramException:
            return False
        await ask(str(server.get_server_final()).encode())
        return True


MakeUpstream = Callable[..., Awaitable[ScriptedUpstream]]


@pytest.fixture
async def make_upstream() -> AsyncIterator[MakeUpstream]:
    """Starts scripted upstreams: `await make_upstream(answers={"RCPT": "550 5.1.1 no"})`."""
    started: list[ScriptedUpstream] = []

    async def make(**settings: object) -> ScriptedUpstream:
        upstream = ScriptedUpstream(**settings)  # type: ignore[arg-type] - a test names the fields that it means
        await upstream.start()
        started.append(upstream)
        return upstream

    yield make
    for upstream in started:
        await upstream.stop()


class NameServer(asyncio.DatagramProtocol):
    """Answers from a zone: `{("example.org", "MX"): ["10 mx.example.org."]}`; a name that is nowhere does not exist."""

    def __init__(self, zone: dict[tuple[str, str], list[str]]) -> None:
        self.zone = zone
        self.failing: set[str] = set()
        self.silent = False
        self.asked: list[tuple[str, str]] = []
        self._transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def datagram_received(self, data: bytes, address: Any) -> None:
        query = dns.message.from_wire(data)
        question = query.question[0]
        name, kind = question.name.to_text(omit_final_dot=True).lower(), dns.rdatatype.to_text(question.rdtype)
        self.asked.append((name, kind))
        if self.silent:
            return
        answer = dns.message.make_response(query)
        answer.flags |= dns.flags.RA
        if name in self.failing:
            answer.set_rcode(dns.rcode.SERVFAIL)
        elif records := self.zone.get((name, kind)):
            answer.answer.append(dns.rrset.from_text_list(question.name, 300, "IN", kind, records))
        elif not any(known == name for known, _ in self.zone):
            answer.set_rcode(dns.rcode.NXDOMAIN)
        self._transport.sendto(answer.to_wire(), address)

    def exchangers(self, **settings: Any) -> MailExchangers:
        """What asks this server, and nobody else."""
        resolver = dns.asyncresolver.Resolver(configure=False)
        resolver.nameservers = ["127.0.0.1"]
        resolver.port = self._transport.get_extra_info("sockname")[1]
        resolver.timeout = 0.2
        return MailExchangers(resolver, **{"random": random.Random(1).random, "allows": lambda _: True, **settings})


@pytest.fixture
async def names() -> AsyncIterator[NameServer]:
    """A DNS server: `names.zone = {("example.org", "MX"): ["10 mx.example.org."]}`."""
    server = NameServer({})
    transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(
        lambda: server, local_addr=("127.0.0.1", 0)
    )
    yield server
    transport.close()


@pytest.fixture(scope="session")
def authority() -> trustme.CA:
    return trustme.CA()


async def _until(condition: Callable[[], object], seconds: float = 10.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - what is waited for sets no event, and the wait is bounded
            await asyncio.sleep(0.005)


@pytest.fixture
def until() -> Callable[..., Awaitable[None]]:
    """Waits, boundedly, for something to become true: `await until(lambda: upstream.received)`."""
    return _until
