"""Plays a dialogue into a server over a real socket, in bounded time, and tells what was answered.

It judges nothing: `Played.answers` stand beside the dialogue's expectations, in order.
"""

from __future__ import annotations

import base64
import contextlib
import re
import socket
import ssl
import time
from dataclasses import dataclass, field, replace
from typing import Final

from corpus import WITHOUT_LOGIN, Dialogue, Expect, HalfClose, Handshake, Send

LOGIN: Final = "app@example.test"
PASSWORD: Final = "right"
PATIENCE: Final = 5.0
"""Seconds that a reply may take; longer than any server's own waiting for the rest of a line it will not get."""
MAXIMUM_REPLY: Final = 64 * 1024
_STATUS: Final = re.compile(r"([245]\.[0-9]{1,3}\.[0-9]{1,3}) ")


class BrokenError(Exception):
    """The session cannot go on: the text says why, in the table's words (`closed`, `silent`, `no TLS`)."""


@dataclass(frozen=True)
class Answer:
    """A reply, or `closed` or `silent` in its place."""

    code: str
    lines: tuple[str, ...] = ()

    @property
    def status(self) -> str:
        """The enhanced status code, empty where there is none."""
        match = _STATUS.match(self.lines[0]) if self.lines else None
        return match[1] if match else ""

    @property
    def reply_class(self) -> str:
        """The code's first digit (RFC 5321 section 4.2.1), or what was there instead of a reply."""
        return self.code[0] if self.code.isdigit() else self.code

    def __str__(self) -> str:
        return f"{self.code} {self.lines[0]}" if self.lines else self.code

    def is_of_class(self, expected: Expect) -> bool:
        return self.reply_class == expected.text[: 1 if expected.code else None]

    def satisfies(self, expected: Expect) -> bool:
        if expected.code is None:
            return self.code == "closed"
        return (
            bool(expected.code.fullmatch(self.code))
            and (expected.status is None or bool(expected.status.fullmatch(self.status)))
            and all(any(line.startswith(word) for line in self.lines) for word in expected.present)
            and not any(line.startswith(word) for line in self.lines for word in expected.absent)
        )


@dataclass
class Played:
    """What was answered, beside what the client had said before."""

    answers: list[Answer] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    """What the client had sent last, for each answer."""
    beginning: Answer | None = None
    """The reply that kept the dialogue from beginning."""


@dataclass(frozen=True)
class Address:
    """Where a listener is reached, and how."""

    port: int
    implicit_tls: bool
    context: ssl.SSLContext


class Connection:
    """One client's connection."""

    def __init__(self, address: Address) -> None:
        self._context = address.context
        self._socket: socket.socket = socket.create_connection(("127.0.0.1", address.port), timeout=PATIENCE)
        self._buffer = b""
        if address.implicit_tls:
            self.start_tls()

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def send(self, octets: bytes) -> None:
        # A server may have closed already, with a reply that can still be read.
        with contextlib.suppress(OSError):
            self._socket.sendall(octets)

    def half_close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)

    def start_tls(self) -> None:
        try:
            self._socket = self._context.wrap_socket(self._socket, server_hostname="relay.test")
        except (OSError, EOFError) as error:
            raise BrokenError("no TLS") from error

    def answer(self) -> Answer:
        """The next reply with all its lines."""
        deadline = time.monotonic() + PATIENCE
        lines: list[str] = []
        code = ""
        while True:
            line = self._line(deadline)
            if line is None:
                return Answer("closed")
            if line == "":
                return Answer("silent")
            if line.startswith("\x15"):  # a TLS alert (RFC 8446 section 6): the handshake has failed
                return Answer("closed")
            code, mark, text = line[:3], line[3:4], line[4:]
            lines.append(text)
            if mark != "-":
                return Answer(code, tuple(lines))

    def _line(self, deadline: float) -> str | None:
        """A line; None at the end of the connection, empty when none comes in time."""
        while b"\n" not in self._buffer:
            left = deadline - time.monotonic()
            if left <= 0 or len(self._buffer) > MAXIMUM_REPLY:
                return ""
            self._socket.settimeout(left)
            try:
                data = self._socket.recv(4096)
            except TimeoutError:
                return ""
            except OSError:
                return None
            if not data:
                return None
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line.decode("utf-8", "replace").rstrip("\r") or " "


def auth_plain(login: str = LOGIN, password: str = PASSWORD) -> str:
    return "AUTH PLAIN " + base64.b64encode(f"\0{login}\0{password}".encode()).decode()


def play(dialogue: Dialogue, address: Address, *, to_the_end: bool = True) -> Played:
    """The dialogue, up to its end or to where the server no longer answers.

    Not `to_the_end`: up to the first reply of another class than the expected one, too. What comes after it is no
    longer the same dialogue.
    """
    played = Played()
    try:
        connection = Connection(replace(address, implicit_tls=False) if dialogue.state == "raw" else address)
    except (BrokenError, OSError) as error:
        played.beginning = Answer(str(error) if isinstance(error, BrokenError) else "refused")
        return played
    with connection:
        played.beginning = begin(connection, dialogue)
        if played.beginning is None:
            _play(connection, dialogue, played, to_the_end)
    return played


def _play(connection: Connection, dialogue: Dialogue, played: Played, to_the_end: bool) -> None:
    said = "the connection" if dialogue.state in {"raw", "connected"} else "the beginning"
    for step in dialogue.steps:
        match step:
            case Send(octets, shown):
                said = shown
                connection.send(octets)
            case HalfClose():
                connection.half_close()
            case Handshake():
                said = "the TLS handshake"
                try:
                    connection.start_tls()
                except BrokenError as error:
                    played.answers.append(Answer(str(error)))
                    played.said.append(said)
                    return
            case Expect() as expected:
                answer = connection.answer()
                played.answers.append(answer)
                played.said.append(said)
                if not answer.code.isdigit() or not (to_the_end or answer.is_of_class(expected)):
                    return


def begin(connection: Connection, dialogue: Dialogue) -> Answer | None:
    """Bring the session to the dialogue's state; what was answered instead where that fails."""
    order = ("connected", "greeted", "hello", "sender", "recipient", "data")
    state, listener = dialogue.state, dialogue.listener
    if state in {"raw", "connected"}:
        return None
    commands: list[tuple[str, str]] = [("", "220")]
    if state != "greeted":
        commands.append(("EHLO client.test", "250"))
    reached = order.index(state) if state in order else 0
    is_secured = state in {"tls", "login"} or (listener not in WITHOUT_LOGIN and reached >= order.index("sender"))
    if is_secured and listener != "submissions":
        commands += [("STARTTLS", "220"), ("EHLO client.test", "250")]
    if is_secured and state != "tls":
        commands.append((auth_plain(), "235"))
    if reached >= order.index("sender"):
        commands.append((f"MAIL FROM:<{LOGIN}>", "250"))
    if reached >= order.index("recipient"):
        commands.append(("RCPT TO:<person@example.org>", "250"))
    if reached >= order.index("data"):
        commands.append(("DATA", "354"))
    for command, wanted in commands:
        if command:
            connection.send(command.encode() + b"\r\n")
        answer = connection.answer()
        if answer.code != wanted:
            return answer
        if command == "STARTTLS":
            try:
                connection.start_tls()
            except BrokenError as error:
                return Answer(str(error))
    return None
