"""SMTP as an upstream speaks it, as bytes: replies, capabilities, the text with its dots. Pure."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final

from mailsluice_relay.reply import Reply
from mailsluice_relay.smtp.data import DOT, find_dot

MAXIMUM_LINE: Final = 4096
"""Octets of one reply line. RFC 5321 section 4.5.3.1.5 says 512; some write longer ones."""

MAXIMUM_LINES: Final = 128

_LINE = re.compile(rb"([2-5][0-9]{2})(?:([ -])(.*))?", re.DOTALL)
_STATUS = re.compile(r"([245]\.[0-9]{1,3}\.[0-9]{1,3})(?: +|$)")


class WireError(ValueError):
    """What came is no SMTP reply."""


class ReplyParser:
    """Octets in, whole replies out; holds at most one incomplete reply, of bounded size."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._code = b""
        self._lines: list[bytes] = []

    @property
    def is_empty(self) -> bool:
        """No part of a reply has come."""
        return not self._buffer and not self._lines

    def feed(self, data: bytes) -> list[Reply]:
        """The replies that are complete now. Raises WireError."""
        self._buffer += data
        replies: list[Reply] = []
        start = 0
        while (end := self._buffer.find(b"\n", start)) >= 0:
            line = bytes(self._buffer[start:end]).removesuffix(b"\r")
            start = end + 1
            reply = self._line(line)
            if reply is not None:
                replies.append(reply)
        del self._buffer[:start]
        if len(self._buffer) > MAXIMUM_LINE:
            raise WireError(f"a reply line of more than {MAXIMUM_LINE} octets")
        return replies

    def _line(self, line: bytes) -> Reply | None:
        if not self._lines and len(line) <= _SHORT and line[3:4] == b" ":
            return _single(line)
        match = _LINE.fullmatch(line)
        if match is None or len(line) > MAXIMUM_LINE:
            raise WireError(f"not a reply: {line[:60].decode('utf-8', 'replace')!r}")
        code, separator, text = match.group(1), match.group(2), match.group(3) or b""
        if self._code and code != self._code:
            raise WireError(f"a reply that begins with {self._code.decode()} and goes on with {code.decode()}")
        self._code = code
        self._lines.append(text)
        if separator == b"-":
            if len(self._lines) >= MAXIMUM_LINES:
                raise WireError(f"a reply of more than {MAXIMUM_LINES} lines")
            return None
        lines, self._lines, self._code = self._lines, [], b""
        return _reply(int(code), [_printable(text) for text in lines])


_SHORT: Final = 128
"""Octets of a reply line that is remembered once it is parsed: servers say "250 2.1.0 Ok" all day."""


@functools.lru_cache(1024)
def _single(line: bytes) -> Reply:
    """A reply of one line. Raises WireError."""
    match = _LINE.fullmatch(line)
    if match is None:
        raise WireError(f"not a reply: {line[:60].decode('utf-8', 'replace')!r}")
    return _reply(int(match.group(1)), [_printable(match.group(3) or b"")])


def _printable(text: bytes) -> str:
    """For people and logs: what an upstream says must not move a terminal's cursor or break a log line."""
    decoded = text.decode("utf-8", "replace")
    if decoded.isprintable():
        return decoded.strip()
    return "".join(c if c.isprintable() else " " for c in decoded).strip()


def _reply(code: int, lines: list[str]) -> Reply:
    """Take the enhanced status code (RFC 2034) off every line; it counts when its class is the code's."""
    status = ""
    texts = []
    for line in lines:
        match = _STATUS.match(line)
        if match is not None and match.group(1)[0] == str(code)[0]:
            status = status or match.group(1)
            texts.append(line[match.end() :])
        else:
            texts.append(line)
    return Reply(code, status, "\n".join(texts))


@dataclass(frozen=True)
class Capabilities:
    """What EHLO offered, keywords in capitals (RFC 5321 section 4.1.1.1)."""

    keywords: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def __contains__(self, keyword: str) -> bool:
        return keyword in self.keywords

    @property
    def mechanisms(self) -> frozenset[str]:
        return frozenset(word.upper() for word in self.keywords.get("AUTH", ()))

    @property
    def size(self) -> int | None:
        """The largest message it takes; None: not said, or no limit (RFC 1870 section 4)."""
        words = self.keywords.get("SIZE", ())
        return (int(words[0]) or None) if words and words[0].isascii() and words[0].isdigit() else None


def capabilities(reply: Reply) -> Capabilities:
    """Of the reply to EHLO; its first line is the greeting."""
    keywords: dict[str, tuple[str, ...]] = {}
    for line in reply.text.split("\n")[1:]:
        # `AUTH=PLAIN` is how servers spoke before RFC 2554, and some still say both.
        words = line.replace("=", " ", 1).split() if line.upper().startswith("AUTH=") else line.split()
        if words:
            keyword = words[0].upper()
            keywords[keyword] = (*keywords.get(keyword, ()), *words[1:])
    return Capabilities(keywords)


def dot_stuffed(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """The text as DATA wants it (RFC 5321 section 4.5.2), with the line that ends it. Its lines end with CRLF."""
    tail = b"\r\n"  # the text begins a line
    for chunk in chunks:
        if not chunk:
            continue
        # A dot is doubled at the beginning of a line, also where CR LF and dot fall into different chunks.
        if find_dot(chunk, 0) >= 0 or DOT in tail + chunk[:2]:
            yield (tail + chunk).replace(DOT, DOT + b".")[len(tail) :]
        else:
            yield chunk  # mostly, and without a copy
        tail = (tail + chunk[-2:])[-2:]
    yield b".\r\n" if tail == b"\r\n" else b"\r\n.\r\n"
