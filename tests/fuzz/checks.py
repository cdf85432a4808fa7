"""What must hold for any octets at all: of the parsers, the protocol engine, the header work and a session.

`check(octets)` raises where it does not. The first octet chooses what is looked at, the second how the rest is split.
"""

from __future__ import annotations

import asyncio
import re
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final, cast

from mailsluice_relay import reply
from mailsluice_relay.admission import Authentication, Judgement
from mailsluice_relay.auth import sasl
from mailsluice_relay.config import Configuration, Limits, Listener, ListenerMode, Relay, Upstream
from mailsluice_relay.envelope import Client, Content, Envelope, Login, Message, Recipient
from mailsluice_relay.metrics import Metrics
from mailsluice_relay.reply import Reason, Reply, Verdict
from mailsluice_relay.session import Service, Session
from mailsluice_relay.smtp import engine, grammar, header, parameters
from mailsluice_relay.smtp.proxy import HeaderReader, ProxyError
from mailsluice_relay.spool.content import ContentWriter

_REPLY: Final = re.compile(rb"(?:(?:[2-5][0-9]{2}-[^\r\n]*\r\n)*[2-5][0-9]{2} [^\r\n]*\r\n)*")
_STRAY: Final = re.compile(rb"(?<!\r)\n|\r(?!\n)|\0")


def check(octets: bytes) -> None:
    if len(octets) >= 2:
        targets = list(TARGETS.values())
        targets[octets[0] % len(targets)](octets[2:], octets[1])


def pieces(octets: bytes, size: int) -> Iterable[bytes]:
    """The octets in pieces of a size; 0: in one."""
    step = size or len(octets) or 1
    return (octets[start : start + step] for start in range(0, len(octets), step))


def check_replies(output: bytes) -> None:
    assert _REPLY.fullmatch(output), output
    assert all(len(line) <= 510 for line in output.split(b"\r\n")), output


def check_words(error: Exception) -> None:
    """They go into replies and logs."""
    assert str(error).isprintable(), error


# --- the engine -------------------------------------------------------------------------------------------------------
class Dialogue:
    """An engine, with one who says yes to everything."""

    def __init__(self, *, normalize: bool) -> None:
        settings = engine.Settings(
            hostname="relay.test",
            message_size=1000,
            mechanisms=("PLAIN", "LOGIN"),
            start_tls=True,
            plaintext_authentication=True,
            normalize_line_endings=normalize,
        )
        self.engine = engine.Engine(settings)
        self.output = b""
        self.messages: list[bytes] = []
        self.reasons: list[Reason] = []
        self._text = b""

    def say(self, octets: bytes) -> None:
        machine = self.engine
        machine.receive(octets)
        while (event := machine.next_event()) is not None:
            self._react(event)
        self.output += machine.take()
        assert machine.buffered <= engine.MAXIMUM_COMMAND + engine.MAXIMUM_SASL or machine.state is not STATE.COMMAND

    def _react(self, event: engine.Event) -> None:
        machine = self.engine
        match event:
            case engine.Refused(verdict):
                assert not verdict.is_positive
                self.reasons.append(verdict.reason)
            case engine.Hello() | engine.Command():
                machine.answer(event.reply)
            case engine.Authenticate(_, None):
                machine.challenge(b"")
            case engine.Authenticate() | engine.SaslResponse():
                machine.answer(reply.AUTHENTICATED)
            case engine.Mail(envelope):
                check_mailbox(envelope.sender)
                machine.answer(reply.SENDER_OK)
            case engine.Rcpt(_, recipient):
                check_mailbox(recipient.mailbox)
                machine.answer(reply.RECIPIENT_OK)
            case engine.DataStarted():
                self._text = b""
            case engine.Content(data):
                self._text += data
            case engine.EndOfData(envelope, data, defective):
                assert envelope.recipients
                if not defective:
                    self.messages.append(self._text + data)
                machine.answer(reply.DATA_LINE_ENDING if defective else reply.OK)
            case engine.StartTLS():
                self.output += machine.take()
                machine.tls_started()
                assert machine.phase is engine.Phase.CONNECTED
                assert not machine.in_transaction


STATE = engine.State


def check_engine(octets: bytes, how: int) -> None:
    """No octets are misread, and how they were split changes nothing but whether a client was too hasty."""
    normalize = bool(how & 0x80)
    runs = [Dialogue(normalize=normalize) for _ in range(2)]
    runs[0].say(octets)
    for piece in pieces(octets, how & 0x7F or 1):
        runs[1].say(piece)
    for run in runs:
        check_replies(run.output)
        for message in run.messages:
            assert not _STRAY.search(message), message
            assert not message or message.endswith(b"\r\n"), message
    if not any(Reason.UNAUTHORIZED_PIPELINING in run.reasons for run in runs):
        # An error may be noticed sooner or later; behind 421 nothing is said any more.
        assert runs[0].messages == runs[1].messages
        assert runs[0].output == runs[1].output


# --- addresses and parameters -----------------------------------------------------------------------------------------
def check_mailbox(mailbox: Any) -> None:
    """Nothing that was taken for an address can break out of the line that it will be written into."""
    if mailbox is None:
        return
    text = str(mailbox)
    assert text.isprintable(), text
    assert len(text.encode()) <= grammar.MAXIMUM_PATH, text
    if mailbox.domain:
        assert grammar.mailbox(text) == mailbox
        assert grammar.forward_path(f"<{text}>") == (mailbox, "")


def check_parameters(octets: bytes, how: int) -> None:
    text = octets.decode("utf-8", "replace")
    for begin, parse in (("FROM:", parameters.parse_mail), ("TO:", parameters.parse_rcpt)):
        try:
            found = cast(Callable[[str], Envelope | Recipient], parse)(begin + text)
        except (parameters.ParameterError, grammar.AddressError):
            continue
        if isinstance(found, Envelope):
            check_mailbox(found.sender)
            assert found.envid is None or found.envid.isascii()
        else:
            check_mailbox(found.mailbox)
            assert found.original is None or " " not in found.original


# --- the header -------------------------------------------------------------------------------------------------------
TRACE: Final = header.Trace(
    hello="client.test",
    client_address="192.0.2.1",
    hostname="relay.test",
    protocol="ESMTPSA",
    queue_id="Q1",
    date=1_000_000_000.0,
)


def check_header(octets: bytes, how: int) -> None:
    """A header that is read is sent on with the same authors, and can be read again."""
    try:
        fields = header.parse(octets)
        assert b"".join(field.raw for field in fields) == octets
        authors = header.authors(fields, internationalized=bool(how & 1))
    except header.HeaderError as error:
        check_words(error)
        return
    for author in authors:  # RFC 5322 allows domain literals that SMTP does not
        assert str(author.mailbox).isprintable(), author
    prepared = header.prepare(fields, TRACE, sender=None, suspected="what it is" if how & 2 else "")
    assert not _STRAY.search(prepared), prepared
    try:
        again = header.parse(prepared)
    except header.HeaderError as error:
        limits = ("larger", "fields")  # with what was added
        if not any(word in str(error) for word in limits):
            raise
        return
    assert header.authors(again, internationalized=bool(how & 1)) == authors


# --- the PROXY header -------------------------------------------------------------------------------------------------
def check_proxy(octets: bytes, how: int) -> None:
    """In whatever pieces it comes, it is the same header, or none."""

    def read(size: int) -> object:
        reader, position = HeaderReader(), 0
        while position < len(octets):
            assert reader.wanted > 0
            piece = octets[position : position + min(size, reader.wanted)]
            position += len(piece)
            try:
                if (found := reader.feed(piece)) is not None:
                    return found, position
            except ProxyError as error:
                check_words(error)
                return None
        return "more"

    whole, split = read(10_000), read(how % 16 + 1)
    assert whole == split or None in (whole, split)
    assert not (isinstance(whole, tuple) or isinstance(split, tuple)) or whole == split


# --- SASL -------------------------------------------------------------------------------------------------------------
def check_sasl(octets: bytes, how: int) -> None:
    """Two responses to each mechanism are challenges, an attempt, or refused."""
    responses = pieces(octets, how) if how else [octets]
    for name, mechanism in sasl.MECHANISMS.items():
        exchange = mechanism()
        for response in [*responses][:2]:
            try:
                outcome = exchange.step(response)
            except sasl.SaslError as error:
                check_words(error)
                break
            if isinstance(outcome, sasl.Attempt):
                assert outcome.mechanism == name
                assert outcome.evidence is mechanism.evidence
                assert outcome.login.isprintable()
                assert outcome.authorization.isprintable()
                assert outcome.password not in repr(outcome) or len(outcome.password) < 40
                break


# --- a session --------------------------------------------------------------------------------------------------------
class Wire(asyncio.Transport):
    """The transport of a session that is fed by hand."""

    def __init__(self, session: Session) -> None:
        super().__init__({"peername": ("192.0.2.1", 40000)})
        self.session = session
        self.written = b""
        self.closed = False

    def write(self, data: Any) -> None:
        assert not self.closed
        self.written += data

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None: ...

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...

    def close(self) -> None:
        self.abort()

    def abort(self) -> None:
        if not self.closed:
            self.closed = True
            self.session.connection_lost(None)


class Willing:
    """Admission, dispatcher and gate that say yes, and keep what they are given."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.sessions: set[Session] = set()
        self.texts: list[bytes] = []
        self.writers: list[ContentWriter] = []

    async def authenticate(self, client: Client, attempt: Any) -> Authentication:
        await asyncio.sleep(0)
        assert attempt.login.isprintable()
        login = Login(attempt.login, attempt.mechanism)
        return Authentication(login, Verdict(reply.AUTHENTICATED, Reason.ACCEPTED))

    asks_others = True

    async def mail(self, client: Client, envelope: Envelope) -> Verdict:
        await asyncio.sleep(0)
        return Verdict(reply.SENDER_OK, Reason.ACCEPTED)

    def recipient(self, client: Client, envelope: Envelope, recipient: Recipient) -> Verdict:
        return Verdict(reply.RECIPIENT_OK, Reason.ACCEPTED)

    async def message(self, client: Client, envelope: Envelope, content: Content, *, queue_id: str) -> Judgement:
        await asyncio.sleep(0)
        return Judgement(Verdict(reply.OK, Reason.ACCEPTED), content)

    def refund(self, judgement: Judgement) -> None: ...

    def new_queue_id(self) -> str:
        return f"Q{len(self.texts)}"

    def refuses(self) -> Reply | None:
        return None

    def passage(self, _envelope: Envelope) -> None:
        """Messages are queued."""

    def new_content(self) -> ContentWriter:
        return ContentWriter(self.directory)

    async def submit(self, message: Message) -> Reply:
        await asyncio.sleep(0)
        self.texts.append(b"".join(message.content.chunks()))
        message.content.body.close()
        return reply.queued(message.queue_id)

    def enter(self, session: Session) -> Reply | None:
        self.sessions.add(session)
        return None

    def locate(self, session: Session) -> Reply | None:
        return None

    def may_tell(self, session: Session) -> bool:
        return True

    def leave(self, session: Session) -> None:
        self.sessions.discard(session)


class Bench:
    """What every session that is looked at has in common."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.metrics = Metrics()
        self.willing = Willing(Path(tempfile.mkdtemp(prefix="mailsluice-fuzz-")))
        listener = Listener(name="open", port=0, mode=ListenerMode.PLAIN, allow_plaintext_authentication=True)
        configuration = Configuration(
            revision="1",
            credentials_revision="1",
            relay=Relay(name="fuzzed", namespace="mail"),
            hostname="relay.test",
            listeners=(listener,),
            upstreams=(Upstream(name="nowhere", host="upstream.test"),),
            limits=Limits(message_size=2000, recipients_per_message=3),
        )
        willing = cast(Any, self.willing)
        self.service = Service(
            configuration=configuration,
            listener=listener,
            admission=willing,
            dispatcher=willing,
            metrics=self.metrics,
            gate=willing,
            now=lambda: 1_000_000_000.0,
            new_session_id=lambda: "s1",
            tls_context=cast(Any, None),
        )

    async def run(self, octets: bytes, size: int) -> Wire:
        session = Session(self.service)
        wire = Wire(session)
        session.connection_made(wire)
        for piece in pieces(octets, size):
            if wire.closed:
                break
            session.data_received(piece)
            await _settled(session)
        wire.abort()
        return wire

    def sessions(self) -> dict[tuple[str, str], float]:
        (family,) = self.metrics.sessions.collect()
        return {
            (sample.labels["result"], sample.labels["reason"]): sample.value
            for sample in family.samples
            if sample.name.endswith("_total")
        }


async def _settled(session: Session) -> None:
    while session.is_deciding:  # noqa: ASYNC110 - nothing that is decided here waits for anything
        await asyncio.sleep(0)


_bench: Bench | None = None


def check_session(octets: bytes, how: int) -> None:
    """A session is counted once and leaves nothing behind, and no error is one of ours."""
    global _bench
    bench = _bench = _bench or Bench()
    before = bench.sessions()
    bench.willing.texts.clear()
    wire = bench.loop.run_until_complete(bench.run(octets, how & 0x7F))
    after = bench.sessions()
    check_replies(wire.written)
    ended = {key: value - before.get(key, 0.0) for key, value in after.items() if value != before.get(key, 0.0)}
    assert list(ended.values()) == [1.0], ended
    assert ("rejected", Reason.INTERNAL_ERROR) not in ended
    assert not bench.willing.sessions
    assert not list(bench.willing.directory.iterdir())
    for text in bench.willing.texts:
        assert not _STRAY.search(text), text
    if bench.willing.texts:
        assert set(ended) == {("accepted", "accepted")}


TARGETS: Final[dict[str, Callable[[bytes, int], None]]] = {
    "engine": check_engine,
    "session": check_session,
    "header": check_header,
    "parameters": check_parameters,
    "proxy": check_proxy,
    "sasl": check_sasl,
}
