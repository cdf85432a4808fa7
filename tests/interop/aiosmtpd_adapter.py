"""Puts our session where aiosmtpd's own test-suite expects the library's class (a pytest plugin for that run alone).

`Adapter` takes the library's constructor arguments and handler hooks (handle_EHLO, handle_MAIL, ...), and answers the
session's questions with them: it stands where admission and dispatcher stand in the relay. Everything that the tests
then see on the wire is the engine's and the session's own.

The suite compares whole replies. Ours have enhanced status codes (RFC 2034) and other words, so the named replies of
the suite (aiosmtpd.testing.statuscodes) are equal to ours when the code is; how often the words were equal too is
written to the report. Replies that a test spells out itself are left as they are.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import ssl
import sys
import tempfile
import types
from collections import Counter
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import aiosmtpd.controller
import aiosmtpd.smtp
import pytest
import uvloop
from aiosmtpd.testing.statuscodes import StatusCode

from mailsluice_relay import reply
from mailsluice_relay.admission import Authentication, Judgement
from mailsluice_relay.config import Configuration, Limits, Listener, ListenerMode, Relay, Upstream
from mailsluice_relay.envelope import Client, Content, Envelope, Login, Message, Recipient
from mailsluice_relay.metrics import Metrics
from mailsluice_relay.reply import Reason, Reply, Verdict
from mailsluice_relay.session import Service, Session
from mailsluice_relay.smtp import engine
from mailsluice_relay.spool.content import ContentWriter

Library = aiosmtpd.smtp.SMTP
MISSING = aiosmtpd.smtp.MISSING

METRICS = Metrics()
DIRECTORY = Path(tempfile.mkdtemp(prefix="mailsluice-aiosmtpd-"))
comparisons: Counter[str] = Counter()


class Adapter(Session):
    """The relay's session, with the library's constructor and hooks."""

    def __init__(self, handler: Any, **options: Any) -> None:
        Library.__init__(self, handler, **options)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        Session.__init__(self, self._make_service())
        self.session = self._create_session()
        self.session.peer = transport.get_extra_info("peername")
        self.envelope = self._create_envelope()
        self._writer = Writer(transport)
        super().connection_made(transport)

    def connection_lost(self, error: Exception | None) -> None:
        self._writer.close()
        super().connection_lost(error)

    def _make_service(self) -> Service:
        listener = Listener(
            name="suite",
            port=0,
            mode=ListenerMode.START_TLS if self.tls_context is not None else ListenerMode.PLAIN,
            allow_plaintext_authentication=not self._auth_require_tls,
        )
        hooks: Any = Hooks(self)
        return Service(
            configuration=Configuration(
                revision="1",
                credentials_revision="1",
                relay=Relay(name="suite", namespace="mail"),
                hostname=self.hostname,
                listeners=(listener,),
                upstreams=(Upstream(name="nowhere", host="upstream.test"),),
                limits=Limits(message_size=self.data_size_limit or 2**31, idle_timeout=self._timeout_duration),
            ),
            listener=listener,
            admission=hooks,
            dispatcher=hooks,
            metrics=METRICS,
            gate=hooks,
            now=lambda: 1_000_000_000.0,
            new_session_id=lambda: "s1",
            tls_context=self.tls_context or ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER),
        )

    # --- questions that go to hooks ----------------------------------------------------------------------------------
    def _decide(self, decision: Coroutine[Any, Any, None]) -> None:
        """Say what failed to the handler, as the library does."""

        async def told() -> None:
            try:
                await decision
            except Exception as error:
                if hasattr(self.event_handler, "handle_exception"):
                    await self.event_handler.handle_exception(error)
                raise

        super()._decide(told())

    def _on_hello(self, event: engine.Hello) -> None:
        self.envelope = self._create_envelope()
        self.session.extended_smtp = event.extended
        self._decide(self._greet_by_hook(event))

    async def _greet_by_hook(self, event: engine.Hello) -> None:
        verb = "EHLO" if event.extended else "HELO"
        answer = event.reply
        if verb in self._handle_hooks:
            if self._ehlo_hook_ver == "new" and event.extended:
                lines = [f"250-{line}" for line in event.reply.text.split("\n")]
                lines = await self._handle_hooks[verb](self, self.session, self.envelope, event.name, lines)
                answer = Reply(250, "", "\n".join(line[4:] for line in lines))
            else:
                answer = as_reply(await self._call_handler_hook(verb, event.name), event.reply)
        else:
            self.session.host_name = event.name
        super()._on_hello(dataclasses.replace(event, reply=answer))

    def _on_command(self, event: engine.Command) -> None:
        self._decide(self._command_by_hook(event))

    async def _command_by_hook(self, event: engine.Command) -> None:
        verb = event.verb.decode()
        arguments = [event.argument.decode()] if verb in {"NOOP", "VRFY"} else []
        answer = as_reply(await self._call_handler_hook(verb, *arguments), event.reply)
        if verb == "RSET":
            self.envelope = self._create_envelope()
        super()._on_command(dataclasses.replace(event, reply=dataclasses.replace(answer, close=event.reply.close)))

    def _on_rcpt(self, event: engine.Rcpt) -> None:
        self._decide(self._recipient_by_hook(event))

    async def _recipient_by_hook(self, event: engine.Rcpt) -> None:
        address = str(event.recipient.mailbox)
        answer = as_reply(await self._call_handler_hook("RCPT", address, []), None)
        if answer is None:
            self.envelope.rcpt_tos.append(address)
            super()._on_rcpt(event)
        else:
            self._engine.answer(answer)


class Writer:
    """Stands where the library has its stream: closed when the session has noticed the end of the connection."""

    def __init__(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def close(self) -> None: ...


class Hooks:
    """Admission, dispatcher and gate of one session: the handler's hooks decide."""

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter
        self.text = b""

    async def authenticate(self, client: Client, attempt: Any) -> Authentication:
        credentials = aiosmtpd.smtp.LoginPassword(attempt.login.encode(), attempt.password.encode())
        result = self.adapter._authenticate(attempt.mechanism, credentials)
        if not result.success:
            answer = as_reply(result.message, reply.CREDENTIALS_INVALID)
            return Authentication(None, Verdict(answer, Reason.CREDENTIALS_INVALID))
        self.adapter.session.authenticated = True
        self.adapter.session.auth_data = result.auth_data
        return Authentication(Login(attempt.login, attempt.mechanism), Verdict(reply.AUTHENTICATED, Reason.ACCEPTED))

    asks_others = True

    async def mail(self, client: Client, envelope: Envelope) -> Verdict:
        if self.adapter.require_starttls and client.tls is None:
            return Verdict(reply.TLS_REQUIRED, Reason.TLS_REQUIRED)
        if self.adapter._auth_required and client.login is None:
            return Verdict(reply.AUTHENTICATION_REQUIRED, Reason.AUTHENTICATION_REQUIRED)
        address = str(envelope.sender or "")
        answer = as_reply(await self.adapter._call_handler_hook("MAIL", address, []), None)
        if answer is None:
            self.adapter.envelope.mail_from = address
            self.adapter.envelope.smtp_utf8 = envelope.internationalized
        return Verdict(answer or reply.SENDER_OK, Reason.ACCEPTED)

    def recipient(self, client: Client, envelope: Envelope, recipient: Recipient) -> Verdict:
        return Verdict(reply.RECIPIENT_OK, Reason.ACCEPTED)

    async def message(self, client: Client, envelope: Envelope, content: Content, *, queue_id: str) -> Judgement:
        return Judgement(Verdict(reply.OK, Reason.ACCEPTED), content)

    def refund(self, judgement: Judgement) -> None: ...

    # --- dispatcher --------------------------------------------------------------------------------------------------
    def new_queue_id(self) -> str:
        return "Q1"

    def refuses(self) -> Reply | None:
        return None

    def passage(self, _envelope: Envelope) -> None:
        """Messages are queued."""

    def new_content(self) -> ContentWriter:
        self.text = b""
        return Keeping(self)

    async def submit(self, message: Message) -> Reply:
        message.content.body.close()
        octets = self.text
        envelope = self.adapter.envelope
        envelope.original_content = octets
        envelope.content = octets.decode("utf-8", "surrogateescape") if self.adapter._decode_data else octets
        answer = as_reply(await self.adapter._call_handler_hook("DATA"), reply.OK)
        self.adapter.envelope = self.adapter._create_envelope()
        return answer

    # --- gate --------------------------------------------------------------------------------------------------------
    def enter(self, session: Session) -> Reply | None:
        return None

    def locate(self, session: Session) -> Reply | None:
        return None

    def may_tell(self, session: Session) -> bool:
        return True

    def leave(self, session: Session) -> None: ...


class Keeping(ContentWriter):
    """Keeps the octets as they came: the relay's own content has its header and body apart."""

    def __init__(self, hooks: Hooks) -> None:
        super().__init__(DIRECTORY)
        self._hooks = hooks

    def write(self, data: bytes) -> None:
        self._hooks.text += data
        super().write(data)


def as_reply(status: Any, default: Any) -> Any:
    """A hook's answer."""
    if status is MISSING or status is None:
        return default
    code, _, text = status.partition(" ")
    return Reply(int(code), "", text)


# --- what the suite's modules import ----------------------------------------------------------------------------------
def _resource_filename(package: str, name: str) -> str:
    return str(Path(os.environ["AIOSMTPD_SUITE"]).joinpath(*package.split(".")[2:], name))


resources: Any = types.ModuleType("pkg_resources")  # setuptools has dropped it
resources.resource_filename = _resource_filename
sys.modules["pkg_resources"] = resources

aiosmtpd.smtp.SMTP = Adapter  # type: ignore[misc] - that is the purpose
aiosmtpd.controller.SMTP = Adapter  # type: ignore[misc,attr-defined] - that is the purpose
asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())


def _equal(expected: Any, given: object) -> bool:
    if not isinstance(given, tuple) or len(given) != 2:
        return NotImplemented
    comparisons["same words" if given[1] == expected[1] else "other words"] += given[0] == expected[0]
    return bool(given[0] == expected[0])


Status: Any = StatusCode
Status.__eq__ = _equal
Status.__ne__ = lambda expected, given: not _equal(expected, given)
Status.__hash__ = tuple.__hash__


# --- the report -------------------------------------------------------------------------------------------------------
outcomes: dict[str, str] = {}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    name = report.nodeid.partition("/")[2] or report.nodeid
    if report.when == "call" or report.outcome != "passed":
        outcomes[name] = report.outcome if outcomes.get(name, "passed") == "passed" else outcomes[name]


def pytest_sessionfinish() -> None:
    report = {"outcomes": outcomes, "comparisons": comparisons}
    Path(os.environ["AIOSMTPD_REPORT"]).write_text(json.dumps(report))
