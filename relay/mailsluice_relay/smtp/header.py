"""Header fields: reading them as the receiver will, and the relay's own work on them. Pure.

What is judged must be what the receiver shows. Where mail programs are known to differ (two From fields, a space
before the colon, a line of blanks inside the header, a comment inside an address), the header is refused with
`HeaderError` and not interpreted: whichever reading we chose, somebody would see the other one.

Octets outside ASCII are let through in field bodies, as UTF-8 in those with addresses (RFC 6532); in an address itself
they need SMTPUTF8. Encoded words (RFC 2047) are decoded for display names only, never into an address.
"""

from __future__ import annotations

import datetime
import email.errors
import email.header
import email.utils
import functools
import itertools
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from mailsluice_relay.envelope import Mailbox

MAXIMUM_HEADER: Final = 256 * 1024
"""Octets of the whole header section."""
MAXIMUM_FIELDS: Final = 1000
MAXIMUM_LINE: Final = 998
"""Octets without CRLF (RFC 5322 section 2.1.1)."""
MAXIMUM_RECEIVED: Final = 50
"""Hops after which mail is taken to go round. As Postfix's hopcount_limit; RFC 5321 section 6.3 would have 100 for
servers in the middle of a path, and here it begins."""
MAXIMUM_AUTHOR_FIELD: Final = 16 * 1024
"""Octets of a From or a Sender: reading one in Python takes a millisecond for each thousand."""
MAXIMUM_AUTHORS: Final = 100
_MAXIMUM_DISPLAY: Final = 100
"""Characters of a display name that the relay writes itself: encoded, they are still one line."""

AUTHOR_FIELDS: Final = ("from", "sender", "resent-from", "resent-sender")
"""Fields that say who wrote or sent the message (RFC 5322 sections 3.6.2 and 3.6.6)."""

SUSPECTED_FIELD: Final = "X-Mailsluice-Suspected"

_SINGLE_FIELDS: Final = frozenset(
    {
        *("from", "sender", "reply-to", "subject", "date", "message-id"),
        *("mime-version", "content-type", "content-transfer-encoding"),
    }
)
"""Fields that stand at most once (RFC 5322 section 3.6), as far as a second one shows or hides something."""

_REMOVED_FIELDS: Final = frozenset({"bcc", "resent-bcc", SUSPECTED_FIELD.lower()})
"""Whom a blind copy went to is nobody's business (RFC 5322 section 3.6.3); the mark is ours to set."""

_FIELD = re.compile(
    rb"([!-9;-~]+):"  # ftext (RFC 5322 section 2.2)
    rb"([^\r\n\0]*\r\n"
    rb"(?:[ \t]+[^ \t\r\n\0][^\r\n\0]*\r\n)*)"  # continuation lines, none of them blank
)
_FIELD_NAME = re.compile(rb"[!-9;-~]+")


class HeaderError(ValueError):
    """The header can be read in more than one way, or in none. The text is fit for the reply."""


class Field(NamedTuple):
    """A header field. `key` is the name in lower case, `value` the unfolded body, `raw` all octets with their CRLFs."""

    key: str
    value: bytes
    raw: bytes


@dataclass(frozen=True, slots=True)
class Author:
    """An address in one of AUTHOR_FIELDS, and what a mail program shows beside it."""

    field: str
    mailbox: Mailbox
    display: str
    """Display name and comments, encoded words decoded."""


@dataclass(frozen=True, slots=True)
class Trace:
    """What the Received field tells (RFC 5321 section 4.4)."""

    hostname: str
    hello: str
    client_address: str
    protocol: str
    queue_id: str
    date: float
    """Seconds since the epoch."""


# --- fields ---------------------------------------------------------------------------------------------------------


def parse(header: bytes) -> tuple[Field, ...]:
    """The fields of a header section in which every line ends with CRLF. Raises HeaderError."""
    if len(header) > MAXIMUM_HEADER:
        raise HeaderError(f"it is larger than {MAXIMUM_HEADER} octets")
    fields: list[Field] = []
    seen: set[str] = set()
    position = 0
    while position < len(header):
        found = _FIELD.match(header, position)
        if found is None:
            raise HeaderError(_malformation(header[position:], is_first=position == 0))
        name, body = found.groups()
        key = name.decode("ascii").lower()
        # Unfolding removes the CRLF and keeps the blanks (RFC 5322 section 2.2.3).
        fields.append(Field(key, body.replace(b"\r\n", b"").strip(b" \t"), found[0]))
        if len(found[0]) > MAXIMUM_LINE and any(len(line) > MAXIMUM_LINE for line in found[0].split(b"\r\n")):
            raise HeaderError(f"a line of the field {_shown(key)} is longer than {MAXIMUM_LINE} octets")
        if key in _SINGLE_FIELDS and key in seen:
            raise HeaderError(f"the field {key} stands twice")
        seen.add(key)
        position = found.end()
        if len(fields) > MAXIMUM_FIELDS:
            raise HeaderError(f"it has more than {MAXIMUM_FIELDS} fields")
    return tuple(fields)


def _malformation(rest: bytes, *, is_first: bool) -> str:
    """What is wrong with octets that do not begin with a field."""
    line, ending, _ = rest.partition(b"\r\n")
    name, colon, _ = line.partition(b":")
    if b"\0" in line:
        return "it contains NUL"
    if b"\r" in line or b"\n" in line:
        return "it contains a bare CR or a bare LF"
    if not ending:
        return "its last line does not end with CRLF"
    if not line.strip(b" \t"):  # some programs take such a line for the end of the header
        return "a line is blank"
    if line[:1] in (b" ", b"\t"):
        return "it begins with a continuation line" if is_first else "a continuation line cannot be read"
    if not colon:
        return "a line has no colon"
    if not _FIELD_NAME.fullmatch(name):
        return "a field name has a blank or an octet that is not printable ASCII"
    return "a line cannot be read"


def _shown(key: str) -> str:
    return key[:40]


def value_of(fields: Iterable[Field], key: str) -> bytes | None:
    return next((field.value for field in fields if field.key == key), None)


# --- addresses ------------------------------------------------------------------------------------------------------


def authors(fields: Iterable[Field], *, internationalized: bool) -> tuple[Author, ...]:
    """All addresses of the AUTHOR_FIELDS. Raises HeaderError when one cannot be read in exactly one way."""
    found: list[Author] = []
    for field in fields:
        if field.key not in AUTHOR_FIELDS:
            continue
        if len(field.value) > MAXIMUM_AUTHOR_FIELD:
            raise HeaderError(f"the field {field.key} is longer than {MAXIMUM_AUTHOR_FIELD} octets")
        try:
            text = field.value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise HeaderError(f"the field {field.key} is neither ASCII nor UTF-8") from error
        addresses = _remembered(text, field.key) if len(text) <= _SHORT else _addresses(text, field.key)
        for author in addresses:
            if author.mailbox.is_internationalized and not internationalized:
                raise HeaderError(f"an address in the field {field.key} is not ASCII; give SMTPUTF8 with MAIL")
            found.append(author)
        if len(found) > MAXIMUM_AUTHORS:
            raise HeaderError(f"it names more than {MAXIMUM_AUTHORS} authors")
    return tuple(found)


def _addresses(text: str, key: str) -> tuple[Author, ...]:
    """Raises HeaderError."""
    found = tuple(_AddressList(text, key).parse())
    if not found:
        raise HeaderError(f"the field {key} has no address")
    return found


_SHORT = 256
"""Characters of an author field that is remembered: programs send with the same few all day."""
_remembered = functools.lru_cache(2048)(_addresses)


@dataclass(frozen=True, slots=True)
class _Token:
    kind: str
    """atom, quoted, literal, comment, or the special character itself."""
    text: str
    """As written; of a comment what is inside."""
    start: int
    end: int


_ATOM = re.compile(r"[A-Za-z0-9!#$%&'*+\-/=?^_`{|}~\u0080-\U0010ffff]+")
_QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"')
_LITERAL = re.compile(r"\[[^\[\]\\]*\]")
_QUOTED_PAIR = re.compile(r"\\(.)")
_ENCODED_WORD = re.compile(r"=\?[^?]*\?[bBqQ]\?[^?]*\?=")
_SPECIALS = frozenset("<>@,;:.")
_MAXIMUM_COMMENT_DEPTH = 16


_FORBIDDEN = re.compile("[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
"""Controls save TAB, and separators and directions that change what a reader sees."""


class _AddressList:
    """A parser of RFC 5322 section 3.4 `address-list`, with the obsolete route, and dots in display names.

    Refused, though section 4.4 allows it: blanks and comments inside an address.
    """

    def __init__(self, text: str, field: str) -> None:
        self._field = field
        if _FORBIDDEN.search(text):
            raise self._error("has a control character")
        self._tokens = self._scan(text)
        self._position = 0

    def parse(self) -> list[Author]:
        found: list[Author] = []
        in_group = False
        while self._kind != "end":
            if self._kind in {"comment", ","}:  # a list element may be empty (RFC 5322 section 4.4)
                self._next()
            elif self._kind == ";":
                if not in_group:
                    raise self._error("has a semicolon outside a group")
                in_group = False
                self._next()
                self._expect_end_of_address()
            else:
                author = self._address(in_group)
                if author is None:
                    in_group = True
                else:
                    found.append(author)
        if in_group:
            raise self._error("has a group without its semicolon")
        return found

    def _address(self, in_group: bool) -> Author | None:
        """One mailbox; None when a group began."""
        words: list[_Token] = []
        comments: list[str] = []
        while self._kind in {"atom", "quoted", "literal", ".", "comment"}:
            token = self._next()
            if token.kind == "comment":
                comments.append(token.text)
            else:
                words.append(token)
        if self._kind == "<":
            mailbox = self._angle()
            display = _display(words)
        elif self._kind == "@":
            mailbox = self._plain(words)
            display = ""
        elif self._kind == ":" and words and not in_group:
            self._next()
            return None
        else:
            raise self._error("has something that is no address")
        while self._kind == "comment":
            comments.append(self._next().text)
        self._expect_end_of_address()
        shown = " ".join(part for part in (display, *(decoded(comment) for comment in comments)) if part)
        return Author(self._field, mailbox, shown)

    def _angle(self) -> Mailbox:
        self._next()
        if self._kind == "@":  # obs-route: "@" domain *("," "@" domain) ":"; what it says is ignored
            while self._kind == "@":
                self._next()
                self._domain()
                while self._kind == ",":
                    self._next()
            if self._kind != ":":
                raise self._error("has a route that does not end")
            self._next()
        words: list[_Token] = []
        while self._kind in {"atom", "quoted", "."}:
            words.append(self._next())
        mailbox = self._plain(words)
        if self._kind != ">":
            raise self._error("has an address without its closing bracket")
        self._next()
        return mailbox

    def _plain(self, words: Sequence[_Token]) -> Mailbox:
        """local-part "@" domain, of which `words` is the local part, in one piece."""
        if self._kind != "@":
            raise self._error("has an address without a domain")
        at = self._next()
        domain, start = self._domain()
        parts = [*words, at]
        together = all(left.end == right.start for left, right in itertools.pairwise(parts))
        if not words or not together or start != at.end:
            raise self._error("has a blank or a comment inside an address")
        local_part = "".join(token.text for token in words)
        if len(words) % 2 == 0 or any((token.kind == ".") != (index % 2 == 1) for index, token in enumerate(words)):
            raise self._error("has a local part with a misplaced dot or quote")
        if any(token.kind == "literal" for token in words):
            raise self._error("has brackets in a local part")
        # RFC 2047 section 5: never within an address; a program that decodes it there would see another address.
        if _ENCODED_WORD.search(local_part) or _ENCODED_WORD.search(domain):
            raise self._error("has an encoded word in an address")
        return Mailbox(local_part, domain)

    def _domain(self) -> tuple[str, int]:
        """dot-atom or domain-literal, and where it starts."""
        token = self._next()
        if token.kind == "literal":
            return token.text, token.start
        if token.kind != "atom":
            raise self._error("has an address without a domain")
        text, start, end = token.text, token.start, token.end
        while self._kind == ".":
            dot, label = self._next(), self._next()
            if label.kind != "atom" or dot.start != end or label.start != dot.end:
                raise self._error("has a domain with a misplaced dot or blank")
            text, end = f"{text}.{label.text}", label.end
        return text, start

    def _expect_end_of_address(self) -> None:
        if self._kind not in {",", ";", "comment", "end"}:
            raise self._error("has more than an address between commas")

    @property
    def _kind(self) -> str:
        return self._tokens[self._position].kind

    def _next(self) -> _Token:
        token = self._tokens[self._position]
        if token.kind != "end":
            self._position += 1
        return token

    def _error(self, what: str) -> HeaderError:
        return HeaderError(f"the field {self._field} {what}")

    def _scan(self, text: str) -> list[_Token]:
        tokens: list[_Token] = []
        position = 0
        while position < len(text):
            character = text[position]
            if character in " \t":
                position += 1
                continue
            if character == "(":
                token = self._comment(text, position)
            elif character in _SPECIALS:
                token = _Token(character, character, position, position + 1)
            elif found := _QUOTED.match(text, position):
                token = _Token("quoted", found[0], position, found.end())
            elif found := _LITERAL.match(text, position):
                token = _Token("literal", found[0], position, found.end())
            elif found := _ATOM.match(text, position):
                token = _Token("atom", found[0], position, found.end())
            else:
                raise self._error(f"has a misplaced {character}")
            tokens.append(token)
            position = token.end
        tokens.append(_Token("end", "", len(text), len(text)))
        return tokens

    def _comment(self, text: str, start: int) -> _Token:
        depth = 0
        position = start
        while position < len(text):
            character = text[position]
            if character == "\\":
                position += 1
            elif character == "(":
                depth += 1
                if depth > _MAXIMUM_COMMENT_DEPTH:
                    break
            elif character == ")":
                depth -= 1
                if depth == 0:
                    return _Token("comment", text[start + 1 : position], start, position + 1)
            position += 1
        raise self._error("has a comment that does not end")


def _display(words: Sequence[_Token]) -> str:
    pieces: list[str] = []
    for index, token in enumerate(words):
        if index and words[index - 1].end != token.start:
            pieces.append(" ")
        pieces.append(_QUOTED_PAIR.sub(r"\1", token.text[1:-1]) if token.kind == "quoted" else token.text)
    return decoded("".join(pieces))


def decoded(text: str) -> str:
    """The text with its encoded words decoded, as a mail program shows it; as it is where they are broken.

    Encoded words within quotes are decoded too: they should not be (RFC 2047 section 5), and programs do.
    """
    if "=?" not in text:
        return text
    try:
        shown = str(email.header.make_header(email.header.decode_header(text)))
    except (email.errors.MessageError, ValueError, LookupError):  # bad base64, octets or charset
        return text
    # Decoding makes controls possible: nobody sees a format character (Cf), and a line end must not reach a header.
    return "".join(
        character if character.isprintable() else "" if unicodedata.category(character) == "Cf" else " "
        for character in shown
    )


# --- the relay's own work -------------------------------------------------------------------------------------------


def received_count(fields: Iterable[Field]) -> int:
    return sum(field.key == "received" for field in fields)


def readdress(
    fields: Sequence[Field], found: Sequence[Author], is_local: Callable[[str], bool], replacement: Mailbox
) -> tuple[Field, ...]:
    """The fields with `replacement` for an author that is an account of some machine (`root@localhost`).

    `replacement` is ASCII. Where From has such an author it becomes the replacement under the same display name, and
    what it was becomes Reply-To unless there is one; such a Sender goes away.
    """
    local = {author.field: author for author in found if is_local(author.mailbox.domain)}
    changed: list[Field] = []
    for field in fields:
        if field.key == "sender" and "sender" in local:
            continue
        if field.key == "from" and "from" in local:
            name = local["from"].display[:_MAXIMUM_DISPLAY]
            value = email.utils.formataddr((name, str(replacement))).encode("ascii")
            changed.append(Field("from", value, b"From: " + value + b"\r\n"))
            if not any(other.key == "reply-to" for other in fields):
                changed.append(Field("reply-to", field.value, b"Reply-To" + field.raw[field.raw.index(b":") :]))
            continue
        changed.append(field)
    return tuple(changed)


def prepare(
    fields: Sequence[Field],
    trace: Trace,
    *,
    sender: Mailbox | None,
    suspected: str = "",
) -> bytes:
    """The header section to send on: Received before it, what a submission lacks after it (RFC 6409 section 8).

    Added when missing: Date, Message-ID, and From out of the reverse-path. Removed: Bcc. `suspected` is the text of
    the mark for receivers; empty for none. Every other field stays octet for octet, for the sake of signatures.
    """
    present = {field.key for field in fields}
    date = _date(int(trace.date))
    lines = [_received(trace, date)]
    if suspected:
        lines.append(f"{SUSPECTED_FIELD}: {suspected}\r\n".encode("ascii", "backslashreplace"))
    lines += [field.raw for field in fields if field.key not in _REMOVED_FIELDS]
    if "from" not in present and sender is not None:
        lines.append(f"From: <{sender}>\r\n".encode())
    if "date" not in present:
        lines.append(f"Date: {date}\r\n".encode())
    if "message-id" not in present:
        lines.append(f"Message-ID: <{trace.queue_id}@{trace.hostname}>\r\n".encode())
    return b"".join(lines)


@functools.lru_cache(4)
def _date(seconds: int) -> str:
    """RFC 5322 section 3.3."""
    return email.utils.format_datetime(datetime.datetime.fromtimestamp(seconds, datetime.UTC))


_HELLO = re.compile(r"[A-Za-z0-9._:\[\]-]{1,255}")


def _received(trace: Trace, date: str) -> bytes:
    """No `for` clause, and no login: neither is for the eyes of whoever gets the mail."""
    hello = trace.hello if _HELLO.fullmatch(trace.hello) else "unknown"
    literal = f"IPv6:{trace.client_address}" if ":" in trace.client_address else trace.client_address
    return (
        f"Received: from {hello} ([{literal}])\r\n"
        f"\tby {trace.hostname} with {trace.protocol} id {trace.queue_id};\r\n"
        f"\t{date}\r\n"
    ).encode()


def protocol(*, extended: bool, tls: bool, authenticated: bool, internationalized: bool) -> str:
    """The `with` of Received (RFC 3848; RFC 6531 section 4.3)."""
    if not extended:
        return "SMTP"
    name = "UTF8SMTP" if internationalized else "ESMTP"
    return f"{name}{'S' if tls else ''}{'A' if authenticated else ''}"
