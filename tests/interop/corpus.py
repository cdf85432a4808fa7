r"""Reads the dialogues: tests/interop/dialogues/*.txt.

A file holds the dialogues of one topic. A dialogue is a heading, what is said about it, and its lines:

    == a declared size over the limit is refused before the text is sent
    Rule: RFC 1870 section 6.1
    Listener: submission
    State: login
    C: MAIL FROM:<app@example.test> SIZE=100001
    S: 552 5.3.4
    Why exim, postfix: RFC 1870 section 6.1 ...

`Rule`      what the expectation rests on; every dialogue has one.
`Listener`  `open` (the default: in the clear, no login needed from loopback), `lenient` (the same, and wrong line
            endings of a text are mended), `mixed` (STARTTLS and login may be used, from loopback neither is needed),
            `submission` (STARTTLS and login needed) or `submissions` (TLS from the start, login needed).
`State`     how far the session is when the dialogue begins: `raw` (connected, and no handshake where TLS comes first),
            `connected` (nothing was read yet), `greeted`, `hello` (the default), `tls`, `login`, `sender`, `recipient`,
            `data`. On `submission` and `submissions` the last three include the login.
`Why`       why servers (a list of names) answer otherwise with good reason, or without. It names an RFC with section.
            A server whose reply is of another class and which no `Why` names is an error, and so is a `Why` without a
            difference.
`Alone`     why the dialogue is not played into other servers.
`#`         a comment.

Lines:

`C: octets`      what the client sends, with CR LF. Several in a row leave in one write.
`C+ octets`      the same without CR LF.
`C*99: octets`   99 lines; `{#}` is the number of each.
`S: 250 2.1.0`   the reply expected. `.` stands for any digit of the code; the enhanced status code may be left out.
                 Behind them `+WORDS` is a line that the reply must have (its beginning), `-WORDS` one that it must not
                 have.
`S*99: 250`      99 replies.
`S: closed`      the server closes the connection.
`TLS`            the TLS handshake.
`EOF`            the client ends its side of the connection, and still reads.

In octets `\r \n \0 \t \\ \{ \}` and `\xHH` are what they are elsewhere, `{a*600}` is 600 times `a`, `{base64:text}` is
what it says. Everything else is UTF-8 as it stands.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

DIALOGUES: Final = Path(__file__).parent / "dialogues"

LISTENERS: Final = ("open", "lenient", "mixed", "submission", "submissions")
WITHOUT_TLS: Final = ("open", "lenient")
WITHOUT_LOGIN: Final = (*WITHOUT_TLS, "mixed")
STATES: Final = ("raw", "connected", "greeted", "hello", "tls", "login", "sender", "recipient", "data")

_ESCAPE: Final = re.compile(r"\\(?:([rn0t\\{}])|x([0-9A-Fa-f]{2}))|\{([^{}*]+)\*([0-9]+)\}|\{base64:((?:\\.|[^{}])*)\}")
_ESCAPED: Final = {"r": b"\r", "n": b"\n", "0": b"\0", "t": b"\t", "\\": b"\\", "{": b"{", "}": b"}"}
_SENT: Final = re.compile(r"C(?:\*([0-9]+))?([:+])(?: (.*))?")
_EXPECTED: Final = re.compile(r"S(?:\*([0-9]+))?: (.*)")
_REPLY: Final = re.compile(r"([2-5.][0-9.]{2})(?: ([245.]\.[0-9.]+))?((?: [+-]\S.*?)*)")
_REFERENCE: Final = re.compile(r"\bRFC [0-9]+ (?:sections? [0-9]|appendix [A-Z])")


class CorpusError(ValueError):
    """A dialogue cannot be read. The text names file and line."""


@dataclass(frozen=True)
class Send:
    """The client sends octets in one write."""

    octets: bytes
    shown: str


@dataclass(frozen=True)
class Expect:
    """The server answers."""

    text: str
    """As it stands in the file, for messages."""
    code: re.Pattern[str] | None
    """None: the connection is closed."""
    status: re.Pattern[str] | None = None
    present: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()


@dataclass(frozen=True)
class Handshake:
    """The client begins TLS."""


@dataclass(frozen=True)
class HalfClose:
    """The client sends nothing more, and still reads."""


Step = Send | Expect | Handshake | HalfClose


@dataclass(frozen=True, kw_only=True)
class Dialogue:
    topic: str
    """The file's name."""
    title: str
    line: int
    rule: str
    listener: str
    state: str
    steps: tuple[Step, ...]
    whys: Mapping[str, str]
    """By server."""
    alone: str

    @property
    def name(self) -> str:
        return f"{self.topic}: {self.title}"

    @property
    def needs_tls(self) -> bool:
        before_tls = {"connected", "greeted", "hello"}
        return (
            self.listener == "submissions"
            or (self.listener == "submission" and self.state not in before_tls)
            or self.state in {"tls", "login"}
            or any(isinstance(step, Handshake) for step in self.steps)
        )


def octets(text: str) -> bytes:
    """The octets that a line's text stands for."""
    result = b""
    position = 0
    for match in _ESCAPE.finditer(text):
        result += text[position : match.start()].encode()
        position = match.end()
        letter, code, repeated, times, encoded = match.groups()
        if letter is not None:
            result += _ESCAPED[letter]
        elif code is not None:
            result += bytes([int(code, 16)])
        elif repeated is not None:
            result += octets(repeated) * int(times)
        else:
            result += base64.b64encode(octets(encoded))
    return result + text[position:].encode()


def read() -> list[Dialogue]:
    """All dialogues, in the order of the files' names. Raises CorpusError."""
    dialogues = [
        dialogue for path in sorted(DIALOGUES.glob("*.txt")) for dialogue in parse(path.stem, path.read_text())
    ]
    names = [dialogue.name for dialogue in dialogues]
    for name in names:
        if names.count(name) > 1:
            raise CorpusError(f"{name}: there are two of this name")
    return dialogues


def parse(topic: str, text: str) -> Iterator[Dialogue]:
    """The dialogues of one file. Raises CorpusError."""
    lines = [(number, line.rstrip()) for number, line in enumerate(text.splitlines(), 1)]
    heads = [index for index, (_, line) in enumerate(lines) if line.startswith("== ")]
    for number, line in lines[: heads[0] if heads else None]:
        if line and not line.startswith("#"):
            raise CorpusError(f"{topic}:{number}: a dialogue begins with `== title`")
    for begin, end in zip(heads, [*heads[1:], None], strict=True):
        yield _dialogue(topic, lines[begin:end])


def _dialogue(topic: str, lines: Sequence[tuple[int, str]]) -> Dialogue:
    (first, heading), *rest = lines
    said: dict[str, str] = {}
    whys: dict[str, str] = {}
    steps: list[Step] = []
    pending: list[tuple[bytes, str]] = []

    def flush() -> None:
        if pending:
            steps.append(Send(b"".join(octets for octets, _ in pending), pending[-1][1]))
            pending.clear()

    for number, line in rest:
        if not line or line.startswith("#"):
            continue
        try:
            if match := _SENT.fullmatch(line):
                pending.append(_sent(*match.groups(default="")))
            elif match := _EXPECTED.fullmatch(line):
                flush()
                steps += [_expected(match[2])] * int(match[1] or 1)
            elif line == "TLS":
                flush()
                steps.append(Handshake())
            elif line == "EOF":
                flush()
                steps.append(HalfClose())
            elif match := re.fullmatch(r"Why ([a-z, ]+): (.+)", line):
                for server in match[1].split(", "):
                    whys[server] = _reference(match[2])
            else:
                name, value = _said(line)
                said[name] = value
        except ValueError as error:
            raise CorpusError(f"{topic}:{number}: {error}: {line}") from error
    flush()
    listener, state = said.get("Listener", "open"), said.get("State", "hello")
    if listener not in LISTENERS or state not in STATES or (listener in WITHOUT_TLS and state in {"tls", "login"}):
        raise CorpusError(f"{topic}:{first}: there is no state {state} of a listener {listener}")
    if "Rule" not in said or not any(isinstance(step, Expect) for step in steps):
        raise CorpusError(f"{topic}:{first}: a dialogue has a rule and at least one reply")
    return Dialogue(
        topic=topic,
        title=heading.removeprefix("== "),
        line=first,
        rule=said["Rule"],
        listener=listener,
        state=state,
        steps=tuple(steps),
        whys=whys,
        alone=said.get("Alone", ""),
    )


def _said(line: str) -> tuple[str, str]:
    match = re.fullmatch(r"(Rule|Listener|State|Alone): (.+)", line)
    if not match:
        raise ValueError("neither a line of a dialogue nor something said about one")
    return match[1], _reference(match[2]) if match[1] == "Rule" else match[2]


def _reference(text: str) -> str:
    if not _REFERENCE.search(text):
        raise ValueError("it names no RFC with its section")
    return text


def _sent(times: str, kind: str, text: str) -> tuple[bytes, str]:
    end = b"\r\n" if kind == ":" else b""
    lines = [octets(text.replace("{#}", str(number))) + end for number in range(1, int(times or 1) + 1)]
    return b"".join(lines), text


def _expected(text: str) -> Expect:
    if text == "closed":
        return Expect(text, None)
    match = _REPLY.fullmatch(text)
    if not match:
        raise ValueError("not a reply")
    words = re.findall(r" ([+-])(\S.*?)(?= [+-]|$)", match[3])
    return Expect(
        text,
        _pattern(match[1]),
        _pattern(match[2]) if match[2] else None,
        present=tuple(word for sign, word in words if sign == "+"),
        absent=tuple(word for sign, word in words if sign == "-"),
    )


def _pattern(text: str) -> re.Pattern[str]:
    """`.` for any digit, save where it stands between the numbers of an enhanced status code."""
    if len(text) == 3:
        return re.compile(text.replace(".", "[0-9]"))
    return re.compile(re.escape(text))
