"""The SMTP server's protocol engine: octets in, events out; replies in, octets out (RFC 5321 and its extensions).

No I/O, no clock, and no opinion: it knows which command may come when, and what a command must look like. Who may
send what to whom is asked. The one who drives it

- hands it what was read (`receive`) and takes the events (`next_event`) until there is none;
- answers each `Question` (`answer`; an `Authenticate` or a `SaslResponse` also by `challenge`). Until then there are no
  further events, and what was read meanwhile waits;
- sends what has gathered (`take`) when there are no more events. So the replies to a pipelined group leave in one
  write (RFC 2920 section 3.2), in order;
- closes the connection when the state is CLOSED.

The rules:

- A command line ends with CR LF. A lone CR, a lone LF or a NUL is refused, and so is everything up to the next CR LF:
  nothing behind a lenient end of line is ever run. How the octets were split changes nothing.
- Which command may come in which phase of the session stands in SEQUENCE; which must be the last of a pipelined group
  in LAST_IN_GROUP. Something behind such a command means that the client did not wait for an answer that it needed to
  know; it is refused and the connection closed.
- Every refusal by the engine is told as a `Refused` event. MAXIMUM_ERRORS of them end the connection.
- After STARTTLS everything that the client said before is forgotten (RFC 3207 section 4.2).
"""

from __future__ import annotations

import binascii
import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Final

from mailsluice_relay import reply
from mailsluice_relay.envelope import Envelope, Recipient
from mailsluice_relay.reply import Reason, Reply, Verdict
from mailsluice_relay.smtp import grammar, parameters
from mailsluice_relay.smtp.data import DataReader

MAXIMUM_COMMAND: Final = 512
"""Octets of a command line with CR LF (RFC 5321 section 4.5.3.1.4)."""
MAXIMUM_COMMAND_WITH_PARAMETERS: Final = 2048
"""MAIL may grow by SIZE (26), AUTH (500), SMTPUTF8 (10), RET and ENVID (108); RCPT by NOTIFY (28) and ORCPT (500)."""
MAXIMUM_SASL: Final = 12288
"""Octets of base64 (RFC 4954 section 4). OAuth clients send as much in the AUTH command, too."""
MAXIMUM_ERRORS: Final = 10
"""Refusals by the engine on one connection (as Haraka's `errors`, and the middle of Postfix's soft and hard limit)."""
MAXIMUM_JUNK: Final = 100
"""Commands between two messages that bring none nearer (as Postfix's smtpd_junk_command_limit)."""
MAXIMUM_REFUSED_RECIPIENTS: Final = 1000
"""In one transaction (as Postfix's smtpd_recipient_overshoot_limit)."""


class LocalProtocolError(Exception):
    """The driver did what the rules at the head of this file forbid."""


class State(enum.IntEnum):
    """What the engine does with the next octets."""

    COMMAND = enum.auto()
    SASL = enum.auto()
    DATA = enum.auto()
    ASKING = enum.auto()
    """Nothing: a question is open."""
    TLS = enum.auto()
    """Nothing: they belong to the TLS handshake."""
    CLOSED = enum.auto()
    """Nothing: they are dropped."""


class Phase(enum.IntEnum):  # an int, as keys of SEQUENCE are hashed for every command
    """How far the session has come."""

    CONNECTED = enum.auto()
    """No EHLO or HELO yet."""
    READY = enum.auto()
    SENDER = enum.auto()
    """MAIL was accepted."""
    RECIPIENTS = enum.auto()
    """MAIL and at least one RCPT were accepted."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the sessions of a listener have in common, with the replies that follow from it, encoded once."""

    hostname: str
    message_size: int
    """Octets; told with SIZE (RFC 1870)."""
    mechanisms: tuple[str, ...] = ()
    """SASL mechanisms, in capitals; none: no AUTH."""
    start_tls: bool = False
    plaintext_authentication: bool = False
    """AUTH is offered without TLS, too."""
    normalize_line_endings: bool = False

    @cached_property
    def greeting(self) -> Reply:
        return reply.greeting(self.hostname)

    @cached_property
    def hello(self) -> Reply:
        """To HELO."""
        return Reply(250, "", self.hostname)

    @cached_property
    def capabilities(self) -> Reply:
        """To EHLO in the clear."""
        offers = ["STARTTLS"] if self.start_tls else []
        return self._extended(offers, authentication=self.plaintext_authentication)

    @cached_property
    def capabilities_with_tls(self) -> Reply:
        """To EHLO under TLS."""
        return self._extended([], authentication=True)

    def _extended(self, offers: list[str], *, authentication: bool) -> Reply:
        lines = [
            self.hostname,
            f"SIZE {self.message_size}",
            "8BITMIME",
            "SMTPUTF8",
            "PIPELINING",
            "ENHANCEDSTATUSCODES",
            "DSN",
            *offers,
        ]
        if authentication and self.mechanisms:
            lines.append(f"AUTH {' '.join(self.mechanisms)}")
        lines.append("HELP")
        return Reply(250, "", "\n".join(lines))


# --- events -----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Refused:
    """The engine has answered by itself."""

    verdict: Verdict


@dataclass(frozen=True, slots=True)
class StartTLS:
    """Send what has gathered, do the handshake, then call `tls_started`."""


@dataclass(frozen=True, slots=True)
class DataStarted:
    """354 was answered; `Content` and in the end `EndOfData` follow."""


@dataclass(frozen=True, slots=True)
class Content:
    """A piece of the message, unstuffed."""

    data: bytes


@dataclass(frozen=True, slots=True)
class Hello:
    """Question. `reply` is what the engine would answer."""

    name: str
    extended: bool
    reply: Reply


@dataclass(frozen=True, slots=True)
class Command:
    """Question: NOOP, RSET, VRFY, HELP or QUIT. `reply` is what the engine would answer."""

    verb: bytes
    argument: bytes
    reply: Reply


@dataclass(frozen=True, slots=True)
class Authenticate:
    """Question: an exchange begins. `initial_response` is decoded; None where there was none."""

    mechanism: str
    initial_response: bytes | None


@dataclass(frozen=True, slots=True)
class SaslResponse:
    """Question: the decoded answer to the last challenge."""

    data: bytes


@dataclass(frozen=True, slots=True)
class Mail:
    """Question. With a positive answer the transaction is open."""

    envelope: Envelope


@dataclass(frozen=True, slots=True)
class Rcpt:
    """Question. With a positive answer the recipient is added to the envelope."""

    envelope: Envelope
    recipient: Recipient


@dataclass(frozen=True, slots=True)
class EndOfData:
    """Question: the text is complete; `data` is its last piece. With the answer the transaction is over."""

    envelope: Envelope
    data: bytes
    defective: bool
    """Wrong line endings or NUL: it must not be queued, and the connection must be closed."""


Question = Hello | Command | Authenticate | SaslResponse | Mail | Rcpt | EndOfData
Event = Question | Refused | StartTLS | DataStarted | Content

DATA_STARTED: Final = DataStarted()
START_TLS: Final = StartTLS()

# --- the table of what may come when (RFC 5321 section 4.1.4) ---------------------------------------------------------
SEQUENCE: Final[Mapping[tuple[Phase, bytes], Reply]] = {
    (Phase.CONNECTED, b"AUTH"): reply.HELLO_FIRST,
    (Phase.CONNECTED, b"MAIL"): reply.HELLO_FIRST,
    (Phase.CONNECTED, b"RCPT"): reply.HELLO_FIRST,
    (Phase.CONNECTED, b"DATA"): reply.HELLO_FIRST,
    (Phase.READY, b"RCPT"): reply.MAIL_FIRST,
    (Phase.READY, b"DATA"): reply.MAIL_FIRST,
    (Phase.SENDER, b"AUTH"): reply.AUTH_IN_TRANSACTION,
    (Phase.SENDER, b"MAIL"): reply.NESTED_MAIL,
    (Phase.SENDER, b"DATA"): reply.RECIPIENT_FIRST,
    (Phase.RECIPIENTS, b"AUTH"): reply.AUTH_IN_TRANSACTION,
    (Phase.RECIPIENTS, b"MAIL"): reply.NESTED_MAIL,
}
"""The refusals; what is not here may come."""

LAST_IN_GROUP: Final = frozenset(
    {b"EHLO", b"HELO", b"DATA", b"VRFY", b"EXPN", b"NOOP", b"AUTH", b"STARTTLS", b"BDAT"},
)
"""RFC 2920 section 3.1, RFC 4954 section 4, RFC 3207 section 4.2. Behind QUIT nothing is looked at anyway. BDAT is not
offered, and the octets behind it would be taken for commands."""

JUNK: Final = frozenset({b"EHLO", b"HELO", b"AUTH", b"RSET", b"NOOP", b"VRFY", b"HELP"})


class Engine:
    """The protocol of one connection."""

    def __init__(self, settings: Settings, *, tls: bool = False) -> None:
        self.state = State.COMMAND
        self.phase = Phase.CONNECTED
        self.tls = tls
        self.authenticated = False
        self.extended = False
        self._settings = settings
        self._buffer = b""
        self._position = 0
        self._output: list[bytes] = []
        self._question: Question | None = None
        self._envelope: Envelope | None = None
        self._reader: DataReader | None = None
        self._refused_recipients = 0
        self._errors = 0
        self._junk = 0
        self._tainted = False
        """In a command line with a lone CR, a lone LF or a NUL, up to its CR LF."""
        self._discarding = False
        """In a line that is too long, and was answered."""

    # --- for the driver ----------------------------------------------------------------------------------------------
    def receive(self, data: bytes) -> None:
        """Take what was read."""
        if self.state is State.CLOSED:
            return
        if self._position == len(self._buffer):
            self._buffer = data
        else:
            self._buffer = self._buffer[self._position :] + data
        self._position = 0

    def next_event(self) -> Event | None:
        """What has happened; None when more octets, or an answer, are needed."""
        state = self.state
        if state is State.COMMAND:
            line = self._read_line()
            return self._run(line) if isinstance(line, bytes) else line
        if state is State.DATA:
            return self._read_data()
        if state is State.SASL:
            line = self._read_line()
            return self._read_sasl(line) if isinstance(line, bytes) else line
        return None

    def answer(self, answer: Reply) -> None:
        """Answer the open question."""
        question, self._question = self._question, None
        if question is None:
            raise LocalProtocolError("there is no open question")
        self._output.append(answer.encoded)
        self.state = State.COMMAND
        self._settle(question, answer)
        if answer.close:
            self._close()

    def challenge(self, data: bytes) -> None:
        """Answer an `Authenticate` or a `SaslResponse` with a challenge (RFC 4954 section 4)."""
        if not isinstance(self._question, Authenticate | SaslResponse):
            raise LocalProtocolError("there is no open SASL exchange")
        self._question = None
        self._output.append(b"334 " + binascii.b2a_base64(data, newline=False) + b"\r\n")
        self.state = State.SASL

    def tls_started(self) -> None:
        """The handshake is done: forget everything that came before (RFC 3207 section 4.2)."""
        self.tls = True
        self.state = State.COMMAND
        self.phase = Phase.CONNECTED
        self.extended = False
        self._envelope = None
        self._buffer = b""
        self._position = 0

    def greet(self) -> None:
        """Put the greeting (RFC 5321 section 3.1)."""
        self._output.append(self._settings.greeting.encoded)

    def close(self, last: Reply) -> None:
        """Say a last word that no command asked for (421; RFC 5321 section 3.8), and end the session."""
        self._question = None
        self._output.append(last.encoded)
        self._close()

    def take(self) -> bytes:
        """What is to be sent."""
        output = self._output
        data = output[0] if len(output) == 1 else b"".join(output)
        output.clear()
        return data

    @property
    def buffered(self) -> int:
        """Octets received and not yet looked at."""
        return len(self._buffer) - self._position

    @property
    def in_transaction(self) -> bool:
        return self._envelope is not None

    @property
    def data_defective(self) -> bool:
        """A text is being read that will be refused (see `EndOfData.defective`)."""
        return self._reader is not None and self._reader.defective

    # --- lines -------------------------------------------------------------------------------------------------------
    def _read_line(self) -> bytes | Refused | None:
        """The next line without its CR LF; a refusal; or None while there is no whole line."""
        buffer, start = self._buffer, self._position
        if self._discarding:
            end = buffer.find(b"\r\n", start)
            if end < 0:
                self._drop_partial_line()
                return None
            self._discarding = False
            start = self._position = end + 2
        end = buffer.find(b"\n", start)
        length = (end + 1 if end >= 0 else len(buffer) + 1) - start
        if length > MAXIMUM_COMMAND and length > self._limit(buffer[start : start + 5]):
            self._tainted = False
            if end > start and buffer[end - 1] == 0x0D:
                self._position = end + 1
            else:
                self._discarding = True
                if end >= 0:
                    self._position = end + 1
                else:
                    self._drop_partial_line()
            if self.state is State.SASL or buffer[start : start + 5].upper() == b"AUTH ":
                return self._refuse(reply.SASL_LINE_TOO_LONG, Reason.SYNTAX)
            return self._refuse(reply.COMMAND_TOO_LONG, Reason.SYNTAX)
        if end < 0:
            return None
        self._position = end + 1
        if end == start or buffer[end - 1] != 0x0D:
            self._tainted = True
            return self._refuse(reply.COMMAND_LINE_ENDING, Reason.LINE_ENDING)
        line = buffer[start : end - 1]
        if self._tainted or b"\r" in line or b"\0" in line:
            self._tainted = False
            return self._refuse(reply.COMMAND_LINE_ENDING, Reason.LINE_ENDING)
        return line

    def _drop_partial_line(self) -> None:
        """Keep nothing of a line that goes on, but a CR that may begin its end."""
        self._buffer = b"\r" if self.buffered and self._buffer.endswith(b"\r") else b""
        self._position = 0

    def _limit(self, beginning: bytes) -> int:
        if self.state is State.SASL:
            return MAXIMUM_SASL + 2
        verb = beginning.upper()
        if verb in {b"MAIL ", b"RCPT "}:
            return MAXIMUM_COMMAND_WITH_PARAMETERS
        if verb == b"AUTH ":
            return MAXIMUM_COMMAND + MAXIMUM_SASL
        return MAXIMUM_COMMAND

    # --- commands ----------------------------------------------------------------------------------------------------
    def _run(self, line: bytes) -> Event:
        verb, argument = grammar.split_command(line)
        command = COMMANDS.get(verb)
        if command is None:
            return self._refuse(reply.COMMAND_UNKNOWN, Reason.SYNTAX)
        if verb in LAST_IN_GROUP and self._position < len(self._buffer):
            # On STARTTLS this is command injection (CVE-2011-0411), elsewhere perhaps HTTP from a browser.
            refusal = reply.TLS_PIPELINED if verb == b"STARTTLS" else reply.UNAUTHORIZED_PIPELINING
            return self._refuse(refusal, Reason.UNAUTHORIZED_PIPELINING)
        out_of_sequence = SEQUENCE.get((self.phase, verb))
        if out_of_sequence is not None:
            if out_of_sequence is reply.RECIPIENT_FIRST and self._refused_recipients:
                # RFC 5321 section 3.3. Not the client's error: it was told of each.
                self._output.append(reply.NO_VALID_RECIPIENTS.encoded)
                return Refused(Verdict(reply.NO_VALID_RECIPIENTS, Reason.BAD_SEQUENCE))
            return self._refuse(out_of_sequence, Reason.BAD_SEQUENCE)
        if verb in JUNK:
            self._junk += 1
            if self._junk > MAXIMUM_JUNK:
                return self._refuse(reply.TOO_MANY_ERRORS, Reason.TOO_MANY_ERRORS)
        return command(self, argument)

    def _hello(self, argument: bytes, *, extended: bool) -> Event:
        name = grammar.hello_name(argument)
        if name is None:
            return self._refuse(reply.syntax_error("EHLO hostname" if extended else "HELO hostname"), Reason.SYNTAX)
        settings = self._settings
        if not extended:
            return self._ask(Hello(name, extended, settings.hello))
        return self._ask(Hello(name, extended, settings.capabilities_with_tls if self.tls else settings.capabilities))

    def _ehlo(self, argument: bytes) -> Event:
        return self._hello(argument, extended=True)

    def _helo(self, argument: bytes) -> Event:
        return self._hello(argument, extended=False)

    def _starttls(self, argument: bytes) -> Event:
        if self.tls:
            return self._refuse(reply.TLS_ALREADY_ACTIVE, Reason.BAD_SEQUENCE)
        if not self._settings.start_tls:
            return self._refuse(reply.TLS_NOT_OFFERED, Reason.SYNTAX)
        if argument:
            return self._refuse(reply.syntax_error("STARTTLS"), Reason.SYNTAX)
        if self.authenticated:
            # What was agreed in the clear, perhaps by somebody in the middle, must not live on under TLS.
            return self._refuse(reply.ALREADY_AUTHENTICATED, Reason.BAD_SEQUENCE)
        self._output.append(reply.READY_FOR_TLS.encoded)
        self.state = State.TLS
        return START_TLS

    def _auth(self, argument: bytes) -> Event:
        settings = self._settings
        if not self.extended or not settings.mechanisms:
            return self._refuse(reply.COMMAND_NOT_IMPLEMENTED, Reason.BAD_SEQUENCE)
        if self.authenticated:
            return self._refuse(reply.ALREADY_AUTHENTICATED, Reason.BAD_SEQUENCE)
        if not self.tls and not settings.plaintext_authentication:
            return self._refuse(reply.TLS_BEFORE_AUTH, Reason.TLS_REQUIRED)
        name, _, response = argument.partition(b" ")
        if not name or b" " in response:
            return self._refuse(reply.syntax_error("AUTH mechanism [initial-response]"), Reason.SYNTAX)
        mechanism = name.decode("ascii", "replace").upper()
        if mechanism not in settings.mechanisms:
            return self._refuse(reply.MECHANISM_UNSUPPORTED, Reason.MECHANISM_UNSUPPORTED)
        if not response:
            return self._ask(Authenticate(mechanism, None))
        initial = _decode(b"" if response == b"=" else response)
        if initial is None:
            return self._refuse(reply.SASL_SYNTAX, Reason.SYNTAX)
        return self._ask(Authenticate(mechanism, initial))

    def _read_sasl(self, line: bytes) -> Event:
        self.state = State.COMMAND
        if self._position < len(self._buffer):
            return self._refuse(reply.UNAUTHORIZED_PIPELINING, Reason.UNAUTHORIZED_PIPELINING)
        if line == b"*":
            return self._refuse(reply.AUTHENTICATION_ABORTED, Reason.AUTHENTICATION_ABORTED)
        data = _decode(line)
        if data is None:
            return self._refuse(reply.SASL_SYNTAX, Reason.SYNTAX)
        return self._ask(SaslResponse(data))

    def _mail(self, argument: bytes) -> Event:
        try:
            envelope = parameters.parse_mail(argument.decode())
        except parameters.ParameterError as error:
            return self._refuse(error.reply, Reason.SYNTAX)
        except (grammar.AddressError, UnicodeDecodeError):
            return self._refuse(reply.SENDER_SYNTAX, Reason.ADDRESS_SYNTAX)
        if not argument.isascii() and not envelope.internationalized:
            return self._refuse(reply.SMTPUTF8_REQUIRED, Reason.SMTPUTF8_REQUIRED)
        if not self.extended and argument[-1:] != b">":
            return self._refuse(reply.PARAMETER_UNKNOWN, Reason.SYNTAX)  # RFC 5321 section 2.2.1: HELO, no extensions
        return self._ask(Mail(envelope))

    def _rcpt(self, argument: bytes) -> Event:
        envelope = self._envelope
        if envelope is None:
            raise LocalProtocolError("RCPT outside a transaction passed SEQUENCE")
        try:
            recipient = parameters.parse_rcpt(argument.decode())
        except parameters.ParameterError as error:
            return self._refuse(error.reply, Reason.SYNTAX)
        except (grammar.AddressError, UnicodeDecodeError):
            self._refused_recipients += 1
            return self._refuse(reply.RECIPIENT_SYNTAX, Reason.ADDRESS_SYNTAX)
        if not argument.isascii() and not envelope.internationalized:
            self._refused_recipients += 1
            return self._refuse(reply.SMTPUTF8_REQUIRED, Reason.SMTPUTF8_REQUIRED)
        if not self.extended and argument[-1:] != b">":
            return self._refuse(reply.PARAMETER_UNKNOWN, Reason.SYNTAX)
        return self._ask(Rcpt(envelope, recipient))

    def _data(self, argument: bytes) -> Event:
        if argument:
            return self._refuse(reply.syntax_error("DATA"), Reason.SYNTAX)
        self._reader = DataReader(normalize=self._settings.normalize_line_endings)
        self._output.append(reply.START_DATA.encoded)
        self.state = State.DATA
        return DATA_STARTED

    def _read_data(self) -> Event | None:
        reader, envelope = self._reader, self._envelope
        if reader is None or envelope is None:
            raise LocalProtocolError("reading data outside a transaction")
        data, end = reader.feed(self._buffer, self._position)
        if end >= 0:
            self._position = end
            return self._ask(EndOfData(envelope, data, reader.defective))
        self._position = len(self._buffer)
        return Content(data) if data else None

    def _rset(self, argument: bytes) -> Event:
        if argument:
            return self._refuse(reply.syntax_error("RSET"), Reason.SYNTAX)
        return self._ask(Command(b"RSET", argument, reply.OK))

    def _noop(self, argument: bytes) -> Event:
        return self._ask(Command(b"NOOP", argument, reply.OK))

    def _vrfy(self, argument: bytes) -> Event:
        if not argument:
            return self._refuse(reply.syntax_error("VRFY address"), Reason.SYNTAX)
        return self._ask(Command(b"VRFY", argument, reply.VERIFY_DECLINED))

    def _help(self, argument: bytes) -> Event:
        return self._ask(Command(b"HELP", argument, reply.HELP))

    def _quit(self, argument: bytes) -> Event:
        if argument:
            return self._refuse(reply.syntax_error("QUIT"), Reason.SYNTAX)
        return self._ask(Command(b"QUIT", argument, reply.BYE))

    def _not_implemented(self, _argument: bytes) -> Event:
        return self._refuse(reply.COMMAND_NOT_IMPLEMENTED, Reason.SYNTAX)

    # --- outcomes ----------------------------------------------------------------------------------------------------
    def _ask(self, question: Question) -> Question:
        self._question = question
        self.state = State.ASKING
        return question

    def _settle(self, question: Question, answer: Reply) -> None:
        """Go on from an answered question."""
        match question:
            case Rcpt(envelope, recipient):
                if answer.is_positive:
                    envelope.recipients.append(recipient)
                    self.phase = Phase.RECIPIENTS
                else:
                    self._refused_recipients += 1
                    if self._refused_recipients > MAXIMUM_REFUSED_RECIPIENTS:
                        self.close(reply.TOO_MANY_ERRORS)
            case Mail(envelope):
                if answer.is_positive:
                    self._envelope = envelope
                    self.phase = Phase.SENDER
                    self._refused_recipients = 0
                else:
                    self._junk += 1
                    if self._junk > MAXIMUM_JUNK:
                        self.close(reply.TOO_MANY_ERRORS)
            case EndOfData():
                self._end_transaction()
                if answer.is_positive:
                    self._junk = 0
            case Hello(_, extended, _):
                if answer.is_positive:
                    self.extended = extended
                    self.phase = Phase.READY
                    self._end_transaction()
            case Authenticate() | SaslResponse():
                self.authenticated = answer.code == reply.AUTHENTICATED.code
            case Command(verb, _, _) if verb == b"RSET" and answer.is_positive:
                self._end_transaction()
            case Command():
                pass

    def _end_transaction(self) -> None:
        self._envelope = None
        self._reader = None
        if self.phase is not Phase.CONNECTED:
            self.phase = Phase.READY

    def _refuse(self, refusal: Reply, reason: Reason) -> Refused:
        self._errors += 1
        if self._errors >= MAXIMUM_ERRORS and not refusal.close:
            refusal, reason = reply.TOO_MANY_ERRORS, Reason.TOO_MANY_ERRORS
        self._output.append(refusal.encoded)
        self.state = State.COMMAND
        if refusal.close:
            self._close()
        return Refused(Verdict(refusal, reason))

    def _close(self) -> None:
        self.state = State.CLOSED
        self._buffer = b""
        self._position = 0


def _decode(text: bytes) -> bytes | None:
    """Base64 (RFC 4648 section 4), strictly; None where it is not."""
    try:
        return binascii.a2b_base64(text, strict_mode=True) if text else b""
    except binascii.Error:
        return None


COMMANDS: Final[Mapping[bytes, Callable[[Engine, bytes], Event]]] = {
    b"EHLO": Engine._ehlo,
    b"HELO": Engine._helo,
    b"STARTTLS": Engine._starttls,
    b"AUTH": Engine._auth,
    b"MAIL": Engine._mail,
    b"RCPT": Engine._rcpt,
    b"DATA": Engine._data,
    b"RSET": Engine._rset,
    b"NOOP": Engine._noop,
    b"VRFY": Engine._vrfy,
    b"HELP": Engine._help,
    b"QUIT": Engine._quit,
    b"EXPN": Engine._not_implemented,
    b"BDAT": Engine._not_implemented,
}
