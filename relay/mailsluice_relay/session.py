"""One client's session: drives the protocol engine, asks admission, hands what may pass to the dispatcher.

The only file that knows aiosmtpd. `Session` is aiosmtpd's protocol class with the bytes taken over: `data_received`
feeds `smtp.engine` from one buffer, and what needs no waiting is decided there and then. A task exists only while a
decision waits (login, end of data, TLS handshake), and then the engine takes nothing further.

What is promised:

- A client that hangs up before the end of data leaves nothing behind. Once the end of data is read, judging and
  queueing run to their end whatever the connection does.
- Reading stops while a decision waits and BUFFER_LIMIT is reached, and while the client does not read its replies.
- No reply tells anything of the inside, whatever fails.
- When a session is over it is counted once and logged in one line.
"""

from __future__ import annotations

import asyncio
import functools
import ipaddress
import ssl
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Protocol, cast

import aiosmtpd.smtp
import structlog

from mailsluice_relay import reply
from mailsluice_relay.auth import sasl
from mailsluice_relay.config import Configuration, Listener, ListenerMode
from mailsluice_relay.envelope import Client, Envelope, Message, Recipient, TLSState
from mailsluice_relay.metrics import Metrics
from mailsluice_relay.policy.networks import Networks
from mailsluice_relay.reply import Reason, Reply, Result, Verdict
from mailsluice_relay.smtp import engine
from mailsluice_relay.smtp.engine import Engine, State
from mailsluice_relay.smtp.proxy import Header
from mailsluice_relay.spool.errors import SpoolError, SpoolFull

if TYPE_CHECKING:
    from mailsluice_relay.admission import Admission, Judgement
    from mailsluice_relay.dispatch import Dispatcher
    from mailsluice_relay.dispatch.passage import Passage
    from mailsluice_relay.spool.content import ContentWriter

log = structlog.get_logger()

BUFFER_LIMIT: Final = 64 * 1024
"""Octets read ahead while a decision waits."""
MINIMUM_PROGRESS: Final = 4096
"""Octets of a message that must come within the idle timeout: 14 a second with the default of 300 s."""
DEFECTIVE_SILENCE: Final = 2.0
"""Seconds. A client that ends lines with LF alone never sends CR LF . CR LF; it has said all that it will."""
LINGER: Final = 2.0
"""Seconds for the client to read a last reply: closing with unread input makes TCP discard it (RFC 1122 4.2.2.13)."""
TLS_HANDSHAKE_TIMEOUT: Final = 30.0
"""Seconds."""
TLS_SHUTDOWN_TIMEOUT: Final = 5.0
"""Seconds that a client has to answer close_notify."""

_BEFORE_HELLO: Final = frozenset({Reason.SYNTAX, Reason.LINE_ENDING, Reason.UNAUTHORIZED_PIPELINING})
"""Refusals which, before EHLO, only show that something else than a mail client knocked: a port scan, a browser."""
_REACTIONS: Final[Mapping[type, str]] = {
    engine.Refused: "_on_refused",
    engine.Hello: "_on_hello",
    engine.Command: "_on_command",
    engine.StartTLS: "_on_start_tls",
    engine.Authenticate: "_on_authenticate",
    engine.SaslResponse: "_on_sasl_response",
    engine.Mail: "_on_mail",
    engine.Rcpt: "_on_rcpt",
    engine.DataStarted: "_on_data_started",
    engine.Content: "_on_content",
    engine.EndOfData: "_on_end_of_data",
}
"""The method for each event. By name, as aiosmtpd finds its smtp_* methods, so that a subclass can replace one."""
VERIFIABLE: Final = frozenset({sasl.Evidence.PASSWORD})
"""What admission can verify: it knows neither tokens nor the logins of certificates yet."""
_CLASSES: Final = (Result.SUSPECTED_SPAM, Result.ACCEPTED, Result.REJECTED)


class Gate(Protocol):
    """Who may have how many connections; knows the sessions that there are."""

    def enter(self, session: Session) -> Reply | None:
        """There is a connection; who it is may not be known yet. None, or why the session may not begin."""
        ...

    def locate(self, session: Session) -> Reply | None:
        """The client's address is known. None, or why the session may not begin."""
        ...

    def may_tell(self, session: Session) -> bool:
        """Whether a session that may not begin may have a connection for as long as it takes to be told so."""
        ...

    def leave(self, session: Session) -> None:
        """The session is over, its decisions included; or it could not begin."""
        ...


class Counters:
    """The metrics that sessions keep. `labels` is slow and its values are few, so each series is looked up once."""

    def __init__(self, metrics: Metrics) -> None:
        self.sessions_active = functools.cache(metrics.sessions_active.labels)
        self.sessions = functools.cache(metrics.sessions.labels)
        self.session_seconds = metrics.session_seconds
        self.tls_sessions = functools.cache(metrics.tls_sessions.labels)
        self.recipients = functools.cache(metrics.recipients.labels)
        self.messages = functools.cache(metrics.messages.labels)
        self.message_size = metrics.message_size
        self.accept_seconds = metrics.accept_seconds
        self.user_messages = functools.cache(metrics.user_messages.labels)
        self.user_recipients = functools.cache(metrics.user_recipients.labels)
        self.user = metrics.user


@dataclass(frozen=True)
class Service:
    """What the sessions of one listener share. A new configuration makes a new one, for new sessions."""

    configuration: Configuration
    listener: Listener
    admission: Admission
    dispatcher: Dispatcher
    metrics: Metrics
    gate: Gate
    now: Callable[[], float]
    """Seconds since the epoch."""
    new_session_id: Callable[[], str]
    tls_context: ssl.SSLContext
    """Not used on a listener without TLS."""
    settings: engine.Settings = field(init=False)
    counters: Counters = field(init=False)
    trusted_balancers: Networks | None = field(init=False)
    """Who has to say for whom it connects, with a PROXY header; None: there is no header on this listener."""

    def __post_init__(self) -> None:
        """Raises ConfigurationError."""
        trusted, where = self.listener.proxy_trusted_networks, f"listeners.{self.listener.name}.proxyProtocol"
        object.__setattr__(
            self, "trusted_balancers", Networks(trusted, f"{where}.trustedNetworks") if trusted else None
        )
        settings = engine.Settings(
            hostname=self.configuration.hostname,
            message_size=self.configuration.limits.message_size,
            mechanisms=sasl.offered(VERIFIABLE),
            start_tls=self.listener.mode is ListenerMode.START_TLS,
            plaintext_authentication=self.listener.allow_plaintext_authentication,
            normalize_line_endings=self.listener.normalize_line_endings,
        )
        object.__setattr__(self, "settings", settings)
        object.__setattr__(self, "counters", Counters(self.metrics))


class Session(aiosmtpd.smtp.SMTP):
    """The protocol of one connection."""

    def __init__(self, service: Service) -> None:
        # aiosmtpd's own __init__ finds hooks and methods by reflection, for every connection anew, and makes a stream
        # reader. Neither is used here, and together they cost more than the rest of a short session.
        self.loop = asyncio.get_running_loop()
        self.hostname = service.configuration.hostname
        self.service = service
        self._limits = service.configuration.limits
        self._engine = Engine(service.settings)
        self._tcp: asyncio.Transport | None = None
        """The connection; None before it is there and after it is lost."""
        self._task: asyncio.Future[Any] | None = None
        """The decision that waits, or what it waits for."""
        self._exchange: sasl.Exchange | None = None
        self._announced: Reply | None = None
        """The refusal of a login whose failure the client has been told by a challenge."""
        self._passage: Passage | None = None
        """Where nothing is queued: the transaction's way to its upstream."""
        self._incoming: ContentWriter | None = None
        self._size = 0
        self._failed: Verdict | None = None
        """Why the message that is being read will be refused."""
        self._timer: asyncio.TimerHandle | None = None
        self._deadline = 0.0
        """By when the client must have got on."""
        self._progress = 0
        self._reading_paused = False
        self._writing_paused = False
        self._arrived = False
        self._refusal: Reply | None = None
        """Why the session may not begin."""
        self._closing = False
        self._stopping = False
        self._half_closed = False
        self._finished = False
        self._said_hello = False
        self._said_quit = False
        self._firsts: dict[Result, Reason] = {}
        """The first event of each class."""
        self._queue_ids: list[str] = []
        self._senders: list[str] = []
        """The reverse-path of each message that was queued."""
        self._recipients = 0

    # --- the connection ----------------------------------------------------------------------------------------------
    def arrive(self, address: str, port: int) -> None:
        """There is a connection from there. It counts, though much may come before `connection_made`."""
        service = self.service
        self._arrived = True
        self._started = self.loop.time()
        self._session_end = self._started + self._limits.session_timeout
        self.client = Client(
            session_id=service.new_session_id(),
            listener=service.listener.name,
            address=canonical_address(address),
            port=port,
        )
        service.counters.sessions_active(self.client.listener).inc()
        self._refuse_connection(service.gate.enter(self))

    def introduce(self, header: Header) -> None:
        """A trusted load balancer says who the client is: somebody, or the balancer itself."""
        if header.address is None:
            self.client.is_balancer = True
        else:
            self.client.address = canonical_address(header.address)
            self.client.port = header.port

    def locate(self) -> None:
        """The client's address is settled."""
        if self._refusal is None:
            self._refuse_connection(self.service.gate.locate(self))

    def refuse(self, verdict: Verdict) -> None:
        """The session may not begin. Where it still gets a connection, it tells so."""
        if self._refusal is None:
            self._refusal = verdict.reply
            self._record(Result.REJECTED, verdict.reason)

    @property
    def is_refused(self) -> bool:
        return self._refusal is not None

    def abandon(self, reason: Reason | None = None) -> None:
        """There will be no `connection_made`, for this reason if there is one to be counted."""
        if reason is not None:
            self._record(Result.REJECTED, reason)
        self._closing = True
        self._finish()

    def _refuse_connection(self, refusal: Reply | None) -> None:
        if refusal is not None:
            self.refuse(Verdict(refusal, Reason.TOO_MANY_CONNECTIONS))

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._tcp = self.transport = cast(asyncio.Transport, transport)
        if not self._arrived:
            peer = transport.get_extra_info("peername") or ("", 0)
            self.arrive(peer[0], peer[1])
            self.locate()
        self._note_tls(self._tcp)
        if self._refusal is not None:
            self._engine.close(self._refusal)
        else:
            self._engine.greet()
        self._deadline = self.loop.time() + self._limits.idle_timeout
        self._set_timer(min(self._deadline, self._session_end))
        self._flush()

    def data_received(self, data: bytes) -> None:
        if self._closing:
            return
        machine = self._engine
        reading_message = machine.state is State.DATA
        machine.receive(data)
        if machine.state is State.ASKING:
            self._steer_reading()
            return
        self._advance()
        if reading_message and machine.state is State.DATA:
            self._watch_progress(len(data))

    def eof_received(self) -> bool:
        if self._task is not None and self.client.tls is None and not self._closing:
            self._half_closed = True  # the reply to what was sent can still be read
            return True
        return False

    def connection_lost(self, error: Exception | None) -> None:
        self._tcp = None
        self._closing = True
        if self._timer is not None:
            self._timer.cancel()
        self._discard_content()
        if self._task is None:
            self._finish()

    def pause_writing(self) -> None:
        self._writing_paused = True
        self._steer_reading()

    def resume_writing(self) -> None:
        self._writing_paused = False
        self._steer_reading()

    def _steer_reading(self) -> None:
        """Read only what can be dealt with."""
        transport = self._tcp
        if transport is None or self._engine.state is State.TLS:
            return
        pause = self._writing_paused or (self._engine.state is State.ASKING and self._engine.buffered > BUFFER_LIMIT)
        if pause != self._reading_paused:
            self._reading_paused = pause
            if pause:
                transport.pause_reading()
            else:
                transport.resume_reading()

    def _flush(self) -> None:
        """Send what has gathered, in one write."""
        data = self._engine.take()
        transport = self._tcp
        if transport is None:
            return
        if data:
            transport.write(data)
        if self._engine.state is State.CLOSED and not self._closing:
            self._close(transport)

    def _close(self, transport: asyncio.Transport) -> None:
        self._closing = True
        self._discard_content()
        self._set_timer(self.loop.time() + LINGER)
        # Connections over the limit are not worth the wait.
        worthwhile = self._refusal is not reply.TOO_MANY_CONNECTIONS and not self._said_quit
        if worthwhile and self.client.tls is None and transport.can_write_eof():
            # The client closes on its side once it has read the reply; what it sends until then is read and dropped.
            if self._reading_paused:
                transport.resume_reading()
            transport.write_eof()
        else:
            transport.close()

    # --- time --------------------------------------------------------------------------------------------------------
    def _set_timer(self, when: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.loop.call_at(when, self._on_timer)

    def _on_timer(self) -> None:
        """One timer a session: it looks whether the deadline has really passed, so that moving that costs nothing."""
        if self._tcp is None:
            return
        now = self.loop.time()
        if self._closing:
            self._tcp.abort()
        elif self._task is not None:
            self._set_timer(now + self._limits.idle_timeout)
        elif (due := min(self._deadline, self._session_end)) > now:
            self._set_timer(due)
        elif self._engine.data_defective:
            self._refuse_message(Verdict(reply.DATA_LINE_ENDING, Reason.LINE_ENDING))
            self._engine.close(reply.DATA_LINE_ENDING)
            self._flush()
        else:
            if self._said_hello and not self.client.is_balancer:
                self._record(Result.REJECTED, Reason.TIMEOUT)
            self._engine.close(reply.TIMED_OUT)
            self._flush()

    def _watch_progress(self, received: int) -> None:
        """While a message comes in: it must come at a minimal rate."""
        now = self.loop.time()
        self._progress += received
        if self._progress >= MINIMUM_PROGRESS:
            self._progress = 0
            self._deadline = now + self._limits.idle_timeout
        if self._engine.data_defective:
            self._set_timer(min(now + DEFECTIVE_SILENCE, self._deadline))
            self._deadline = min(now + DEFECTIVE_SILENCE, self._deadline)

    # --- driving the engine ------------------------------------------------------------------------------------------
    def _advance(self) -> None:
        """Take the engine's events until it needs more octets or a decision that waits, and send the replies."""
        machine = self._engine
        while (event := machine.next_event()) is not None:
            try:
                getattr(self, _REACTIONS[type(event)])(event)
            except Exception:
                log.exception("session.failed", session=self.client.session_id)
                self._fail()
            if type(event) is not engine.Content:
                self._progress = 0
                self._deadline = self.loop.time() + self._limits.idle_timeout
        if self._stopping and self._is_idle():
            machine.close(reply.SHUTTING_DOWN)
        if self._passage is not None and not machine.in_transaction and self._task is None:
            self._leave_passage()  # RSET, EHLO, QUIT, or a message that was refused
        self._flush()
        self._steer_reading()

    def _decide(self, decision: Coroutine[Any, Any, None]) -> None:
        """Let a decision wait; the engine asks no further until it has answered."""
        self._task = self.loop.create_task(self._await_decision(decision))

    async def _await_decision(self, decision: Coroutine[Any, Any, None]) -> None:
        try:
            await decision
        except Exception:
            log.exception("session.failed", session=self.client.session_id)
            self._fail()
        self._task = None
        self._go_on()

    def _decide_on_mail(self, decision: Coroutine[Any, Any, None]) -> None:
        """As `_decide`, and mostly at once: where admission asks nobody, the only wait is for the queue."""
        if self.service.admission.asks_others:
            self._decide(decision)
        else:
            self._proceed(decision)

    def _proceed(self, decision: Coroutine[Any, Any, None], awaited: asyncio.Future[Any] | None = None) -> None:
        """Run a decision as far as it goes, from future to future. A task for each would cost more than most of them.

        Nothing in it may ask for the current task (as `asyncio.timeout` does): there is none.
        """
        try:
            waits_for: asyncio.Future[Any] = decision.send(None)
        except StopIteration:
            self._task = None
        except Exception:
            log.exception("session.failed", session=self.client.session_id)
            self._task = None
            self._fail()
        else:
            self._task = waits_for
            waits_for.add_done_callback(functools.partial(self._proceed, decision))
            return
        if awaited is not None:
            self._go_on()

    def _go_on(self) -> None:
        """A decision was waited for, and is made."""
        if self._tcp is None:
            self._finish()
            return
        self._deadline = self.loop.time() + self._limits.idle_timeout
        self._advance()
        if self._half_closed and not self.is_deciding and not self._closing:
            self._closing = True
            self._tcp.close()

    @property
    def is_deciding(self) -> bool:
        """A decision waits; the engine takes nothing further."""
        return self._task is not None

    def _fail(self) -> None:
        """Something of ours went wrong: answer without a word of it."""
        self._record(Result.REJECTED, Reason.INTERNAL_ERROR)
        match self._engine.state:
            case State.ASKING:
                self._engine.answer(reply.INTERNAL_ERROR)
            case State.DATA:
                self._failed = Verdict(reply.INTERNAL_ERROR, Reason.INTERNAL_ERROR)
                self._discard_content()
            case State.TLS:
                self.abort()

    async def handle_exception(self, error: Exception) -> str:
        """aiosmtpd's own tells the client the exception's class and text."""
        return str(reply.INTERNAL_ERROR)

    # --- reactions to the engine's events ----------------------------------------------------------------------------
    def _on_refused(self, event: engine.Refused) -> None:
        verdict = event.verdict
        self._exchange = self._announced = None
        if self.client.is_balancer:
            return  # how it knocks is its own affair
        if self._said_hello or verdict.reason not in _BEFORE_HELLO:
            self._record(Result.REJECTED, verdict.reason)

    def _on_hello(self, event: engine.Hello) -> None:
        self._said_hello = True
        self.client.hello = event.name
        self.client.extended = event.extended
        self._engine.answer(event.reply)

    def _on_command(self, event: engine.Command) -> None:
        self._said_quit = event.verb == b"QUIT"
        self._engine.answer(event.reply)

    def _on_start_tls(self, _event: engine.StartTLS) -> None:
        if self._tcp is None:
            return
        # From here on, what the client sends belongs to the handshake.
        self._tcp.pause_reading()
        self._flush()
        self._decide(self._start_tls(self._tcp))

    async def _start_tls(self, transport: asyncio.Transport) -> None:
        try:
            encrypted = await self.loop.start_tls(
                transport,
                self,
                self.service.tls_context,
                server_side=True,
                ssl_handshake_timeout=TLS_HANDSHAKE_TIMEOUT,
                ssl_shutdown_timeout=TLS_SHUTDOWN_TIMEOUT,
            )
        except OSError:  # ssl.SSLError, ConnectionError and TimeoutError are among them
            encrypted = None
        if encrypted is None:
            # The loop does not tell the protocol of a connection that is lost during the handshake.
            self._record(Result.REJECTED, Reason.TLS_HANDSHAKE)
            transport.abort()
            self._tcp = None
            if self._timer is not None:
                self._timer.cancel()
            return
        self._tcp = self.transport = encrypted
        self._reading_paused = self._writing_paused = False
        self.client.hello = ""
        self.client.extended = False
        self.client.login = None
        self._engine.tls_started()
        self._note_tls(encrypted)

    def _note_tls(self, transport: asyncio.Transport) -> None:
        tls = transport.get_extra_info("ssl_object")
        if tls is None:
            return
        cipher = tls.cipher()
        self.client.tls = TLSState(tls.version() or "", cipher[0] if cipher else "")
        self._engine.tls = True
        self.service.counters.tls_sessions(self.client.tls.version).inc()

    # --- login -------------------------------------------------------------------------------------------------------
    def _on_authenticate(self, event: engine.Authenticate) -> None:
        self._exchange = sasl.MECHANISMS[event.mechanism]()
        self._step(self._exchange, event.initial_response)

    def _on_sasl_response(self, event: engine.SaslResponse) -> None:
        if self._announced is not None:
            self._engine.answer(self._announced)
            self._announced = None
        elif self._exchange is not None:
            self._step(self._exchange, event.data)

    def _step(self, exchange: sasl.Exchange, response: bytes | None) -> None:
        try:
            outcome = exchange.step(response)
        except sasl.SaslError:
            self._exchange = None
            self._record(Result.REJECTED, Reason.SYNTAX)
            self._engine.answer(reply.SASL_SYNTAX)
            return
        if isinstance(outcome, sasl.Attempt):
            self._exchange = None
            self._decide(self._log_in(outcome, exchange.failure))
        else:
            self._engine.challenge(outcome)

    async def _log_in(self, attempt: sasl.Attempt, failure: bytes | None) -> None:
        authentication = await self.service.admission.authenticate(self.client, attempt)
        verdict = authentication.verdict
        if verdict.is_positive and authentication.login is not None:
            self.client.login = authentication.login
        else:
            if verdict.reason is not Reason.AUTHENTICATION_UNAVAILABLE:
                self.client.authentication_failures += 1
            self._record(Result.REJECTED, verdict.reason)
            if failure is not None and not verdict.reply.close:
                self._announced = verdict.reply
                self._engine.challenge(failure)
                return
        self._engine.answer(verdict.reply)

    # --- the transaction ---------------------------------------------------------------------------------------------
    def _on_mail(self, event: engine.Mail) -> None:
        self._decide_on_mail(self._consider_sender(event.envelope))

    async def _consider_sender(self, envelope: Envelope) -> None:
        if self._stopping:
            verdict = Verdict(reply.SHUTTING_DOWN, Reason.SHUTTING_DOWN)
        else:
            verdict = await self.service.admission.mail(self.client, envelope)
        if verdict.is_positive:
            if (envelope.declared_size or 0) > self._limits.message_size:
                verdict = Verdict(reply.MESSAGE_TOO_BIG, Reason.MESSAGE_TOO_BIG)
            elif (refusal := self.service.dispatcher.refuses()) is not None:
                verdict = Verdict(refusal, _queue_reason(refusal))
        if verdict.is_positive:
            self._passage = self.service.dispatcher.passage(envelope)
        else:
            self._refuse_message(verdict)
        self._engine.answer(verdict.reply)

    def _on_rcpt(self, event: engine.Rcpt) -> None:
        if len(event.envelope.recipients) >= self._limits.recipients_per_message:
            verdict = Verdict(reply.TOO_MANY_RECIPIENTS, Reason.TOO_MANY_RECIPIENTS)
        else:
            verdict = self.service.admission.recipient(self.client, event.envelope, event.recipient)
        if verdict.is_positive and self._passage is not None:
            self._decide(self._ask_upstream(self._passage, event.recipient))
        else:
            self._answer_recipient(verdict)

    async def _ask_upstream(self, passage: Passage, recipient: Recipient) -> None:
        self._answer_recipient(await passage.recipient(recipient))

    def _answer_recipient(self, verdict: Verdict) -> None:
        if verdict.is_positive:
            result = "accepted"
        else:
            result = "deferred" if verdict.reply.is_transient else "rejected"
            self._record(Result.REJECTED, verdict.reason)
        self.service.counters.recipients(result).inc()
        self._engine.answer(verdict.reply)

    def _on_data_started(self, _event: engine.DataStarted) -> None:
        self._size = 0
        self._failed = None

    def _on_content(self, event: engine.Content) -> None:
        self._write(event.data)

    def _on_end_of_data(self, event: engine.EndOfData) -> None:
        ended = self.loop.time()
        if event.defective:
            self._failed = Verdict(reply.DATA_LINE_ENDING, Reason.LINE_ENDING)
        else:
            self._write(event.data)
        writer, self._incoming = self._incoming, None
        if self._failed is not None:
            if writer is not None:
                writer.discard()
            self._refuse_message(self._failed)
            self._engine.answer(self._failed.reply)
            return
        writer = writer or self.service.dispatcher.new_content()
        decide = self._decide if self._passage is not None else self._decide_on_mail
        decide(self._take_message(event.envelope, writer, ended))

    def _write(self, data: bytes) -> None:
        """Add to the message that is being read; a message that will be refused is read on and dropped."""
        if self._failed is not None or not data:
            return
        self._size += len(data)
        try:
            if self._size > self._limits.message_size:
                self._failed = Verdict(reply.MESSAGE_TOO_BIG, Reason.MESSAGE_TOO_BIG)
            else:
                if self._incoming is None:
                    self._incoming = self.service.dispatcher.new_content()
                self._incoming.write(data)
        except SpoolError as error:
            self._failed = _not_kept(error)
        if self._failed is not None:
            self._discard_content()

    def _leave_passage(self) -> None:
        if self._passage is not None:
            self._passage.close()
            self._passage = None

    def _discard_content(self) -> None:
        if self._incoming is not None:
            self._incoming.discard()
            self._incoming = None

    async def _take_message(self, envelope: Envelope, writer: ContentWriter, ended: float) -> None:
        """Judge a whole message and queue it. Nothing of it depends on the connection any more."""
        service, client = self.service, self.client
        try:
            content = writer.finish()
        except SpoolError as error:
            writer.discard()
            verdict = _not_kept(error)
            self._refuse_message(verdict)
            self._engine.answer(verdict.reply)
            return
        queue_id = service.dispatcher.new_queue_id()
        login = client.login.name if client.login is not None else None
        judgement: Judgement | None = None
        taken: Verdict | None = None
        try:
            judgement = await service.admission.message(client, envelope, content, queue_id=queue_id)
            content = judgement.content
            if judgement.verdict.is_positive:
                size, recipients = content.size, len(envelope.recipients)
                taken = await self._hand_over(
                    Message(
                        queue_id=queue_id,
                        envelope=envelope,
                        content=content,
                        login=login,
                        listener=client.listener,
                        client_address=client.address,
                        received_at=service.now(),
                        held=judgement.held,
                        reason=judgement.reason,
                    )
                )
        finally:
            # Not taken, whether refused or failed: neither the text nor the charge is kept.
            if taken is None or not taken.is_positive:
                content.body.close()
                if judgement is not None and judgement.verdict.is_positive:
                    service.admission.refund(judgement)
            self._leave_passage()
        if judgement.suspected:
            self._record(Result.SUSPECTED_SPAM, judgement.reason)
        if taken is None or not taken.is_positive:
            verdict = taken or judgement.verdict
            self._refuse_message(verdict)
            self._engine.answer(verdict.reply)
            return
        self._engine.answer(taken.reply)
        if not judgement.suspected:
            self._record(Result.ACCEPTED, Reason.ACCEPTED)
        self._queue_ids.append(queue_id)
        self._senders.append(str(envelope.sender) if envelope.sender is not None else "<>")
        self._recipients += recipients
        counters = service.counters
        self._count_message(
            "held" if judgement.held else "suspected" if judgement.suspected else "accepted", judgement.reason
        )
        counters.user_recipients(counters.user(login)).inc(recipients)
        counters.message_size.observe(size)
        counters.accept_seconds.observe(self.loop.time() - ended)

    async def _hand_over(self, message: Message) -> Verdict:
        """To the queue, or straight to the upstream."""
        if self._passage is not None:
            return await self._passage.submit(message)
        answer = await self.service.dispatcher.submit(message)
        return Verdict(answer, Reason.ACCEPTED if answer.is_positive else _queue_reason(answer))

    # --- the end -----------------------------------------------------------------------------------------------------
    def shut_down(self) -> None:
        """Finish the transaction that runs, if there is one, and no other (421 4.3.2)."""
        self._stopping = True
        if not self._closing and self._is_idle():
            self._engine.close(reply.SHUTTING_DOWN)
            self._flush()

    def abort(self) -> None:
        """Drop the connection. A decision that waits is not stopped by that."""
        if self._tcp is not None:
            self._tcp.abort()

    def _is_idle(self) -> bool:
        return self._engine.state in {State.COMMAND, State.SASL} and not self._engine.in_transaction

    def _refuse_message(self, verdict: Verdict) -> None:
        self._record(Result.REJECTED, verdict.reason)
        self._count_message("deferred" if verdict.reply.is_transient else "rejected", verdict.reason)

    def _count_message(self, result: str, reason: Reason) -> None:
        counters = self.service.counters
        counters.messages(result, reason).inc()
        if self.client.login is not None:
            counters.user_messages(counters.user(self.client.login.name), result).inc()

    def _record(self, result: Result, reason: Reason) -> None:
        self._firsts.setdefault(result, reason)

    def _finish(self) -> None:
        """Count and log the session, once."""
        if self._finished:
            return
        self._finished = True
        self._leave_passage()
        service, client = self.service, self.client
        service.gate.leave(self)
        result = next((each for each in _CLASSES if each in self._firsts), Result.NONE)
        reason = self._firsts.get(result, Reason.NONE)
        seconds = self.loop.time() - self._started
        counters = service.counters
        counters.sessions_active(client.listener).dec()
        counters.sessions(client.listener, result, reason).inc()
        counters.session_seconds.observe(seconds)
        shown = redacted if service.configuration.logging.redact_addresses else str
        # Load balancers knock every few seconds.
        write = log.debug if result is Result.NONE else log.info
        write(
            "session",
            session=client.session_id,
            listener=client.listener,
            client=client.address,
            tls=client.tls.version if client.tls is not None else None,
            login=shown(client.login.name) if client.login is not None else None,
            result=result.value,
            reason=reason.value,
            queue_ids=self._queue_ids,
            senders=[shown(sender) for sender in self._senders],
            recipients=self._recipients,
            seconds=round(seconds, 3),
        )


def _not_kept(error: SpoolError) -> Verdict:
    """No room, or a disk that fails: for the client it is the same."""
    if not isinstance(error, SpoolFull):
        log.error("session.spool_failed", error=str(error))
    return Verdict(reply.QUEUE_FULL, Reason.QUEUE_FULL)


def _queue_reason(answer: Reply) -> Reason:
    """Why the dispatcher did not take a message."""
    return {
        reply.QUEUE_FULL.code: Reason.QUEUE_FULL,
        reply.SHUTTING_DOWN.code: Reason.SHUTTING_DOWN,
    }.get(answer.code, Reason.INTERNAL_ERROR)


def canonical_address(text: str) -> str:
    """An IP address without its zone; IPv4 as such, also where a dual-stack socket says ::ffff:192.0.2.1."""
    text = text.partition("%")[0]
    if not text.lower().startswith("::ffff:"):
        return text
    mapped = ipaddress.IPv6Address(text).ipv4_mapped
    return str(mapped) if mapped is not None else text


def redacted(address: str) -> str:
    """An address without the part that names a person."""
    _, at, domain = address.rpartition("@")
    return f"***@{domain}" if at else "***"
