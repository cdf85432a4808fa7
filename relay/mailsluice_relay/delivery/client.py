"""An SMTP client for one connection to an upstream, on the event loop's public API.

`connect` brings a session to the point where mail may be sent (greeting, EHLO, STARTTLS, AUTH) or raises a `Fault`;
`Connection.send` does one transaction and returns an outcome for each recipient, whatever happens. With PIPELINING
(RFC 2920), MAIL, all RCPTs and DATA go in one write. The text is sent as it is, only its dots are doubled: octets over
127 also go to an upstream that does not offer 8BITMIME, as nearly all servers take them and a conversion would break
signatures (most servers that relay do the same).

A connection that is lost after the final dot and before its reply means a retry, and perhaps a duplicate: SMTP has no
way to tell, and a mail twice is better than none (RFC 1047; RFC 5321 section 6.1).
"""

from __future__ import annotations

import asyncio
import base64
import functools
import ssl
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Final, cast

from mailsluice_relay.config import UpstreamTLSMode
from mailsluice_relay.delivery.oauth import TokenError, Tokens
from mailsluice_relay.delivery.outcome import (
    Delivered,
    Failed,
    FailureClass,
    Fault,
    Outcome,
    Stage,
    classify,
    session_fault,
)
from mailsluice_relay.delivery.sasl import WITH_PASSWORD, WITH_TOKEN, Mechanism, SaslError
from mailsluice_relay.delivery.target import Login, Target
from mailsluice_relay.delivery.wire import Capabilities, ReplyParser, WireError, capabilities, dot_stuffed
from mailsluice_relay.envelope import BodyType, Content, Mailbox, Notify, Recipient
from mailsluice_relay.reply import Reply


@dataclass(frozen=True)
class Timeouts:
    """Seconds for each step (RFC 5321 section 4.5.3.2, which gives minima for the server's answers)."""

    connect: float = 30.0
    greeting: float = 300.0
    command: float = 300.0
    data: float = 120.0
    block: float = 180.0
    end_of_data: float = 600.0
    quit: float = 5.0


@dataclass(frozen=True)
class Mail:
    """One transaction."""

    sender: Mailbox | None
    recipients: Sequence[Recipient]
    content: Content
    body: BodyType = BodyType.SEVEN_BIT
    internationalized: bool = False
    ret: str | None = None
    envid: str | None = None


MAXIMUM_CHALLENGES: Final = 8
"""Of one AUTH command; SCRAM, the longest, has two."""

SMALL: Final = 64 * 1024
"""Octets of a text that goes in one write: a system call costs more than the copy."""

_NOTIFY_WORDS: Final = ((Notify.SUCCESS, "SUCCESS"), (Notify.FAILURE, "FAILURE"), (Notify.DELAY, "DELAY"))


async def connect(target: Target, timeouts: Timeouts, tokens: Tokens | None = None) -> Connection:
    """A session that is ready for mail. `tokens` are of the target's login, where that is a grant. Raises Fault."""
    try:
        return await _connect(target, timeouts, tokens, with_tls=target.tls is not UpstreamTLSMode.PLAIN)
    except Fault as fault:
        if (
            fault.failure is not FailureClass.TLS
            or target.tls is not UpstreamTLSMode.OPPORTUNISTIC
            or (target.login is not None and not target.allow_plaintext_authentication)
        ):
            raise
    return await _connect(target, timeouts, tokens, with_tls=False)


async def _connect(target: Target, timeouts: Timeouts, tokens: Tokens | None, *, with_tls: bool) -> Connection:
    implicit = target.tls is UpstreamTLSMode.IMPLICIT_TLS
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(timeouts.connect):
            _, connection = await loop.create_connection(
                lambda: Connection(target.name, timeouts),
                target.address or target.host,
                target.port,
                ssl=target.context if implicit else None,
                server_hostname=target.host if implicit else None,
            )
    except TimeoutError as error:
        text = f"{target.host}:{target.port} does not answer within {timeouts.connect:.0f} s"
        raise Fault(FailureClass.CONNECTION, Stage.CONNECT, text) from error
    except ssl.SSLError as error:
        raise Fault(FailureClass.TLS, Stage.CONNECT, f"{target.host}:{target.port}: {_tls_text(error)}") from error
    except OSError as error:
        raise Fault(FailureClass.CONNECTION, Stage.CONNECT, f"{target.host}:{target.port}: {error}") from error
    try:
        await connection.greet(target.hostname)
        if with_tls and not implicit:
            await _start_tls(connection, target)
        if target.login is not None:
            await _authenticate(connection, target, tokens)
    except BaseException:
        connection.abort()
        raise
    return connection


async def _start_tls(connection: Connection, target: Target) -> None:
    if "STARTTLS" not in connection.capabilities:
        if target.tls is UpstreamTLSMode.OPPORTUNISTIC:
            return
        raise Fault(FailureClass.TLS, Stage.STARTTLS, "STARTTLS is not offered, and this upstream requires it")
    if target.context is None:
        raise Fault(FailureClass.TLS, Stage.STARTTLS, "there is no TLS context for this upstream")
    await connection.start_tls(target.context, target.host, target.hostname)


async def _authenticate(connection: Connection, target: Target, tokens: Tokens | None) -> None:
    stage = Stage.AUTHENTICATION
    if not connection.is_encrypted and not target.allow_plaintext_authentication:
        raise Fault(FailureClass.TLS, stage, "no TLS, and the password may not go in the clear")
    known = WITH_TOKEN if tokens is not None else WITH_PASSWORD
    offered = connection.capabilities.mechanisms
    usable = [name for name in target.mechanisms if name in offered and name in known]
    if not usable:
        text = f"AUTH offers {', '.join(sorted(offered)) or 'nothing'}, and none of {', '.join(target.mechanisms)}"
        raise Fault(FailureClass.AUTHENTICATION, stage, text)
    name = usable[0]
    if tokens is not None:
        await _authenticate_with_token(connection, name, tokens)
    elif isinstance(target.login, Login):
        login = target.login
        await _exchange(connection, name, lambda: known[name](login.username, login.password), login.password)


async def _authenticate_with_token(connection: Connection, name: str, tokens: Tokens) -> None:
    while True:
        try:
            token = await tokens.get()
        except TokenError as error:
            text = f"no access token: {error}"
            raise Fault(FailureClass.AUTHENTICATION, Stage.AUTHENTICATION, text) from error
        make = functools.partial(WITH_TOKEN[name], tokens.grant.user, token)
        try:
            await _exchange(connection, name, make, token)
            return
        except Fault as fault:
            if fault.failure is not FailureClass.AUTHENTICATION:
                raise
            if not tokens.refused(token) or not connection.is_usable:
                raise


async def _exchange(connection: Connection, name: str, make: Callable[[], Mechanism], secret: str) -> None:
    """One AUTH command with what follows (RFC 4954 section 4). Raises Fault, whose text holds nothing that was sent."""
    stage = Stage.AUTHENTICATION
    sent = [secret]

    def encoded(octets: bytes) -> bytes:
        text = base64.b64encode(octets)
        sent.append(text.decode())
        return text

    def clean(reply: Reply) -> Reply:
        text = reply.text
        for words in sent:  # some servers repeat the line that they do not like
            text = text.replace(words, "***") if words else text
        return replace(reply, text=text)

    try:
        mechanism = make()
        initial = mechanism.initial()
        line = f"AUTH {name}".encode()
        if initial is not None:
            line += b" " + (encoded(initial) or b"=")
        reply = await connection.command(line, stage)
        for _ in range(MAXIMUM_CHALLENGES):
            if reply.code != 334:
                break
            response = mechanism.respond(_decoded(reply.text))
            reply = await connection.command(encoded(response), stage)
        if reply.code != 235:
            raise session_fault(stage, clean(reply))
        mechanism.succeeded()
    except SaslError as error:
        raise Fault(FailureClass.AUTHENTICATION, stage, f"{stage}: {error}") from error


def _decoded(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except ValueError:
        return text.encode()  # LOGIN's questions in the clear: nobody reads them


class Connection(asyncio.Protocol):
    def __init__(self, upstream: str, timeouts: Timeouts) -> None:
        self._upstream = upstream
        self._timeouts = timeouts
        self._transport: asyncio.Transport | None = None
        self._parser = ReplyParser()
        self._replies: deque[Reply] = deque()
        self._reply_waiter: asyncio.Future[None] | None = None
        self._reply_due = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._write_waiter: asyncio.Future[None] | None = None
        self._paused = False
        self._lost: str | None = None
        self._needs_reset = False
        self.capabilities = Capabilities()
        self.is_encrypted = False
        self.transactions = 0

    # --- asyncio.Protocol --------------------------------------------------------------------------------------------
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's are no subclasses, but have the same interface
        self.is_encrypted = transport.get_extra_info("ssl_object") is not None

    def data_received(self, data: bytes) -> None:
        try:
            self._replies.extend(self._parser.feed(data))
        except WireError as error:
            self._end(str(error))
            self.abort()
            return
        if self._replies:  # a reply of several lines may come in pieces
            self._wake(self._reply_waiter)

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        self._end(f"connection lost: {exc}" if exc else "connection closed by the upstream")

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        self._wake(self._write_waiter)

    def _end(self, why: str) -> None:
        if self._lost is None:
            self._lost = why
        self._wake(self._reply_waiter)
        self._wake(self._write_waiter)

    @staticmethod
    def _wake(waiter: asyncio.Future[None] | None) -> None:
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    # --- the session -------------------------------------------------------------------------------------------------
    @property
    def is_usable(self) -> bool:
        """Open, with nothing unasked for (a 421 while idle, say) waiting to be read."""
        return (
            self._lost is None
            and self._transport is not None
            and not self._transport.is_closing()
            and not self._replies
            and self._parser.is_empty
        )

    async def greet(self, hostname: str) -> None:
        reply = await self._reply(Stage.GREETING, self._timeouts.greeting)
        if reply.code != 220:
            raise session_fault(Stage.GREETING, reply)
        await self._hello(hostname)

    async def _hello(self, hostname: str) -> None:
        reply = await self.command(f"EHLO {hostname}".encode(), Stage.HELLO)
        if reply.is_positive:
            self.capabilities = capabilities(reply)
            return
        if not reply.is_transient:  # RFC 5321 section 3.2: an old server that only knows HELO
            reply = await self.command(f"HELO {hostname}".encode(), Stage.HELLO)
            if reply.is_positive:
                self.capabilities = Capabilities()
                return
        raise session_fault(Stage.HELLO, reply)

    async def start_tls(self, context: ssl.SSLContext, host: str, hostname: str) -> None:
        reply = await self.command(b"STARTTLS", Stage.STARTTLS)
        if reply.code != 220:
            raise session_fault(Stage.STARTTLS, reply)
        if self._replies or not self._parser.is_empty or self._transport is None:
            # Anybody on the way can have put it there: what came before TLS is not the server's (CVE-2011-0411).
            raise Fault(FailureClass.TLS, Stage.STARTTLS, "octets after the reply to STARTTLS, before TLS")
        loop = asyncio.get_running_loop()
        try:
            transport = await loop.start_tls(
                self._transport,
                self,
                context,
                server_hostname=host,
                ssl_handshake_timeout=self._timeouts.connect,
            )
        except (OSError, TimeoutError) as error:  # ssl.SSLError is an OSError
            raise Fault(FailureClass.TLS, Stage.STARTTLS, f"{host}: {_tls_text(error)}") from error
        if transport is None:
            raise Fault(FailureClass.TLS, Stage.STARTTLS, f"{host}: closed during the TLS handshake")
        self._transport = transport
        self.is_encrypted = True
        await self._hello(hostname)  # RFC 3207 section 4.2: what was offered before is forgotten

    async def command(self, line: bytes, stage: Stage) -> Reply:
        """One line and its reply. Raises Fault when there is none."""
        self._write(line + b"\r\n")
        return await self._reply(stage, self._timeouts.data if stage is Stage.DATA else self._timeouts.command)

    async def end_of_data(self) -> Reply:
        """The reply to the text. Raises Fault when there is none."""
        return await self._reply(Stage.END_OF_DATA, self._timeouts.end_of_data)

    def _write(self, data: bytes) -> None:
        if self._transport is not None and self._lost is None:
            self._transport.write(data)

    async def _reply(self, stage: Stage, timeout: float) -> Reply:  # noqa: ASYNC109 - each step has its own (RFC 5321)
        if not self._replies and self._lost is None:
            self._reply_waiter = asyncio.get_running_loop().create_future()
            self._expect_within(timeout)
            try:
                await self._reply_waiter
            except TimeoutError as error:
                self.abort()
                text = f"{stage}: no reply within {timeout:.0f} s"
                raise Fault(FailureClass.CONNECTION, stage, text) from error
            finally:
                self._reply_waiter = None
        if self._replies:
            return self._replies.popleft()
        raise Fault(FailureClass.CONNECTION, stage, f"{stage}: {self._lost}")

    def _expect_within(self, seconds: float) -> None:
        """One timer a connection looks whether a reply is really late; one for each reply would be many calls."""
        loop = asyncio.get_running_loop()
        self._reply_due = loop.time() + seconds
        if self._timer is None or self._timer.when() > self._reply_due:
            self._stop_timer()
            self._timer = loop.call_at(self._reply_due, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        loop, waiter = asyncio.get_running_loop(), self._reply_waiter
        if waiter is None or waiter.done():
            return
        if loop.time() < self._reply_due:
            self._timer = loop.call_at(self._reply_due, self._on_timer)
        else:
            waiter.set_exception(TimeoutError())

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    async def quit(self) -> None:
        """End the session politely; the reply is not worth much waiting."""
        if self._lost is None:
            self._write(b"QUIT\r\n")
            try:
                await self._reply(Stage.HELLO, self._timeouts.quit)
            except Fault:
                pass
            finally:
                self.close()

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    # --- a transaction -----------------------------------------------------------------------------------------------
    async def send(self, mail: Mail) -> list[Outcome]:
        """One outcome for each recipient, in their order. Afterwards `is_usable` says whether there may be another."""
        transaction = _Transaction(mail, self.capabilities)
        if not transaction.to_send:
            return transaction.outcomes
        try:
            await self.begin()
            await self._transact(transaction)
        except Fault as fault:
            transaction.fill(fault.retry)
            self.abort()
        except BaseException:
            self.abort()  # cancelled in the middle: nobody knows where the dialogue is
            raise
        self.transactions += 1
        return transaction.outcomes

    async def begin(self) -> None:
        """Make sure that nothing is left of an earlier transaction. Raises Fault."""
        if not self._needs_reset:
            return
        reply = await self.command(b"RSET", Stage.MAIL)
        if not reply.is_positive:
            raise session_fault(Stage.HELLO, reply)
        self._needs_reset = False

    def leave(self) -> None:
        """Give up the transaction that runs: the next one begins with RSET."""
        self._needs_reset = True

    async def _transact(self, transaction: _Transaction) -> None:
        pipelining = "PIPELINING" in self.capabilities
        commands = [transaction.mail_command, *(command for _, command in transaction.to_send)]
        if pipelining:
            self._write(b"".join([*commands, b"DATA\r\n"]))
        else:
            self._write(commands[0])
        reply = await self._reply(Stage.MAIL, self._timeouts.command)
        refused = None if reply.code // 100 == 2 else classify(Stage.MAIL, reply)
        self.heed(reply)
        if refused is not None and (not pipelining or reply.code == 421):
            transaction.fill(refused)
            return
        accepted: list[int] = []
        for position, command in transaction.to_send:
            if not pipelining:
                self._write(command)
            reply = await self._reply(Stage.RECIPIENT, self._timeouts.command)
            self.heed(reply)
            if reply.code // 100 == 2:
                accepted.append(position)
            elif refused is None:
                transaction.outcomes_by_position[position] = classify(Stage.RECIPIENT, reply)
        if refused is not None:
            transaction.fill(refused)
            accepted = []
        if not accepted and not pipelining:
            self._needs_reset = True
            return
        if not pipelining:
            self._write(b"DATA\r\n")
        reply = await self._reply(Stage.DATA, self._timeouts.data)
        self.heed(reply)
        if reply.code != 354:
            self._needs_reset = True
            transaction.fill(classify(Stage.DATA, reply))
            return
        if not accepted:  # RFC 2920 section 3.1: a server may say 354 without any recipient; the text is then empty
            self._write(b".\r\n")
            await self._reply(Stage.END_OF_DATA, self._timeouts.end_of_data)
            self._needs_reset = True
            return
        await self.send_text(transaction.mail.content)
        reply = await self._reply(Stage.END_OF_DATA, self._timeouts.end_of_data)
        self.heed(reply)
        transaction.fill(
            Delivered(reply, notifies="DSN" in self.capabilities)
            if reply.code // 100 == 2
            else classify(Stage.END_OF_DATA, reply)
        )

    async def send_text(self, content: Content) -> None:
        """The text, no faster than the upstream reads it."""
        chunks: Iterable[bytes] = dot_stuffed(content.chunks())
        if content.size <= SMALL:
            chunks = (b"".join(chunks),)
        for chunk in chunks:
            if self._lost is not None:
                return
            self._write(chunk)
            if self._paused:
                self._write_waiter = asyncio.get_running_loop().create_future()
                try:
                    async with asyncio.timeout(self._timeouts.block):
                        await self._write_waiter
                except TimeoutError as error:
                    text = f"the upstream reads nothing for {self._timeouts.block:.0f} s"
                    raise Fault(FailureClass.CONNECTION, Stage.DATA, text) from error
                finally:
                    self._write_waiter = None

    def heed(self, reply: Reply) -> None:
        """After 421 the server closes, whatever it answered (RFC 5321 section 3.8)."""
        if reply.code == 421:
            self._end(str(reply))
            self.close()


class _Transaction:
    """What is sent for a mail to a server with these capabilities, and what is known about each recipient."""

    def __init__(self, mail: Mail, offered: Capabilities) -> None:
        self.mail = mail
        self._offered = offered
        self.outcomes_by_position: dict[int, Outcome] = {}
        addresses = [r.mailbox for r in mail.recipients] + ([mail.sender] if mail.sender is not None else [])
        utf8 = any(mailbox.is_internationalized for mailbox in addresses) or (
            mail.internationalized and not mail.content.header.isascii()
        )
        self._utf8 = utf8 and "SMTPUTF8" in offered
        self._refuse_unsendable()
        self.to_send = [
            (position, self._recipient_command(recipient))
            for position, recipient in enumerate(mail.recipients)
            if position not in self.outcomes_by_position
        ]

    @property
    def outcomes(self) -> list[Outcome]:
        return [self.outcomes_by_position[position] for position in range(len(self.mail.recipients))]

    def fill(self, outcome: Outcome) -> None:
        """For all recipients about whom nothing else is known yet."""
        for position in range(len(self.mail.recipients)):
            self.outcomes_by_position.setdefault(position, outcome)

    def _refuse_unsendable(self) -> None:
        mail, limit = self.mail, self._offered.size
        if limit is not None and mail.content.size > limit:
            text = f"the message has {mail.content.size} octets, and the next server takes {limit}"
            self.fill(Failed(FailureClass.MESSAGE, Stage.MAIL, text, "5.3.4"))
        if self._utf8:
            return
        text = "the next server does not take internationalized addresses (SMTPUTF8)"
        failed = Failed(FailureClass.MESSAGE, Stage.MAIL, text, "5.6.7")  # RFC 6531 section 3.5
        if (mail.sender is not None and mail.sender.is_internationalized) or (
            mail.internationalized and not mail.content.header.isascii()
        ):
            self.fill(failed)
        for position, recipient in enumerate(mail.recipients):
            if recipient.mailbox.is_internationalized:
                self.outcomes_by_position.setdefault(position, failed)

    @property
    def mail_command(self) -> bytes:
        mail = self.mail
        return mail_command(
            mail.sender,
            self._offered,
            size=mail.content.size,
            eight_bit=mail.body is BodyType.EIGHT_BIT_MIME or not mail.content.header.isascii(),
            utf8=self._utf8,
            ret=mail.ret,
            envid=mail.envid,
        )

    def _recipient_command(self, recipient: Recipient) -> bytes:
        return recipient_command(recipient, self._offered)


def mail_command(
    sender: Mailbox | None,
    offered: Capabilities,
    *,
    size: int | None,
    eight_bit: bool,
    utf8: bool,
    ret: str | None,
    envid: str | None,
) -> bytes:
    """MAIL with the parameters that the server knows. `size` is None where it is not known yet."""
    words = [f"MAIL FROM:<{sender or ''}>"]
    if "SIZE" in offered and size is not None:
        words.append(f"SIZE={size}")
    if "8BITMIME" in offered and eight_bit:
        words.append("BODY=8BITMIME")
    if utf8:
        words.append("SMTPUTF8")
    if "DSN" in offered:
        words += [f"RET={ret}"] if ret else []
        words += [f"ENVID={envid}"] if envid else []
    return _line(words)


def recipient_command(recipient: Recipient, offered: Capabilities) -> bytes:
    words = [f"RCPT TO:<{recipient.mailbox}>"]
    if "DSN" in offered:
        if recipient.notify is not None:
            names = [name for flag, name in _NOTIFY_WORDS if flag in recipient.notify]
            words.append(f"NOTIFY={','.join(names) or 'NEVER'}")
        if recipient.original is not None:
            words.append(f"ORCPT={recipient.original}")
    return _line(words)


def _line(words: list[str]) -> bytes:
    """A command. What it is made of was parsed by our own grammar; this is the second lock on that door."""
    line = " ".join(words)
    if "\r" in line or "\n" in line:
        raise ValueError("a line break in an address or parameter of the envelope")
    return f"{line}\r\n".encode()


def _tls_text(error: BaseException) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"certificate not accepted: {error.verify_message}"
    return str(error) or type(error).__name__
