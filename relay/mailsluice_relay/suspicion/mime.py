"""The parts of a MIME message (RFC 2045, 2046), as far as a rule looks: names, types and the octets in front.

Works on a bounded prefix of the body, and searches for boundaries instead of reading lines: a megabyte of attachment
is a few memory scans. Depth and number of parts are bounded; what goes deeper is told (`Part.is_too_deep`), because
nesting is also a way to hide.
"""

from __future__ import annotations

import base64
import email.message
import email.parser
import quopri
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from mailsluice_relay.smtp.header import decoded

MAXIMUM_DEPTH: Final = 10
MAXIMUM_PARTS: Final = 200
_MAXIMUM_PART_HEADER: Final = 16 * 1024

_MIME_FIELDS = re.compile(
    rb"^(?:content-type|content-disposition|content-transfer-encoding):[^\r\n]*\r\n(?:[ \t][^\r\n]*\r\n)*",
    re.IGNORECASE | re.MULTILINE,
)
_NOT_BASE64 = re.compile(rb"[^A-Za-z0-9+/]")


@dataclass(frozen=True, slots=True)
class Part:
    """A leaf of the tree."""

    content_type: str
    filename: str
    """Of Content-Disposition or Content-Type, decoded (RFC 2231, RFC 2047); empty for none."""
    encoding: str
    payload: bytes
    """As it stands in the message, cut where the prefix ends."""
    is_too_deep: bool = False

    def decoded(self, limit: int) -> bytes:
        """The first octets of the content, its transfer encoding undone."""
        if self.encoding == "base64":
            # Twice what is needed, for line ends and junk between the digits.
            digits = _NOT_BASE64.sub(b"", self.payload[: limit * 2 + 4])
            if len(digits) % 4 == 1:  # six bits are no octet
                digits = digits[:-1]
            return base64.b64decode(digits + b"=" * (-len(digits) % 4))[:limit]
        if self.encoding == "quoted-printable":
            return quopri.decodestring(self.payload[: limit * 3])[:limit]
        return self.payload[:limit]


def parts(header: bytes, body: bytes) -> Iterator[Part]:
    """The leaves in order. `header` and `body` are of the message, `body` possibly cut."""
    budget = [MAXIMUM_PARTS]
    yield from _walk(header, body, 0, budget)


def _walk(header: bytes, body: bytes, depth: int, budget: list[int]) -> Iterator[Part]:
    if budget[0] <= 0:
        return
    budget[0] -= 1
    fields = _fields(header)
    content_type = fields.get_content_type()
    boundary = fields.get_boundary() if content_type.startswith("multipart/") else None
    embedded = content_type == "message/rfc822"
    if depth > MAXIMUM_DEPTH and (boundary or embedded):
        yield Part(content_type, "", "", b"", is_too_deep=True)
    elif boundary:
        for section in _sections(body, boundary.encode("ascii", "replace")):
            yield from _walk(*_split(section), depth + 1, budget)
    elif embedded:
        yield from _walk(*_split(body), depth + 1, budget)
    else:
        encoding = str(fields.get("content-transfer-encoding", "")).strip().lower()
        yield Part(content_type, decoded(fields.get_filename("")), encoding, body)


def _fields(header: bytes) -> email.message.Message:
    """The MIME fields alone: a header has many more, and parsing those would be most of the work."""
    fields = b"".join(_MIME_FIELDS.findall(header[:_MAXIMUM_PART_HEADER]))
    return email.parser.BytesParser().parsebytes(fields, headersonly=True)


def _split(section: bytes) -> tuple[bytes, bytes]:
    """Header with the CRLF of its last field, and body."""
    if section.startswith(b"\r\n"):
        return b"", section[2:]
    header, blank, body = section.partition(b"\r\n\r\n")
    return header + b"\r\n", body if blank else b""


def _sections(body: bytes, boundary: bytes) -> Iterator[bytes]:
    """What stands between the delimiter lines (RFC 2046 section 5.1.1); a missing last one is forgiven."""
    delimiter = re.compile(rb"(?:\A|\r\n)--" + re.escape(boundary) + rb"(--)?[ \t]*(?=\r\n|\Z)")
    start: int | None = None
    for found in delimiter.finditer(body):
        if start is not None:
            yield body[start : found.start()]
        if found[1]:
            return
        start = found.end() + 2
    if start is not None:
        yield body[start:]
