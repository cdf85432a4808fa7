"""The parts of a MIME message (RFC 2045, 2046), as far as a rule looks: names, types and the octets in front.

Works on a bounded prefix of the body, and searches for boundaries instead of reading lines: a megabyte of attachment
is a few memory scans. Depth and number of parts are bounded; what goes deeper is told (`Part.is_too_deep`), because
nesting is also a way to hide.
"""

from __future__ import annotations

import base64
import email.message
import quopri
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from mailsluice_relay.smtp.header import Field, decoded

MAXIMUM_DEPTH: Final = 10
MAXIMUM_PARTS: Final = 200
_MAXIMUM_PART_HEADER: Final = 16 * 1024

_MIME_FIELDS = re.compile(
    rb"^(content-type|content-disposition|content-transfer-encoding):([^\r\n]*\r\n(?:[ \t][^\r\n]*\r\n)*)",
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


def parts(fields: Iterable[Field], body: bytes) -> Iterator[Part]:
    """The leaves in order, of a message with these header fields; `body` is possibly cut."""
    own = [(field.key.encode(), field.value) for field in fields if field.key.startswith("content-")]
    if own:
        yield from _walk(own, body, 0, [MAXIMUM_PARTS])
    else:
        yield Part("text/plain", "", "", body)  # RFC 2045 section 5.2


def _walk(fields: Iterable[tuple[bytes, bytes]], body: bytes, depth: int, budget: list[int]) -> Iterator[Part]:
    if budget[0] <= 0:
        return
    budget[0] -= 1
    # The standard library's message reads the parameters (RFC 2231); its parser would cost more than all the rest.
    header = email.message.Message()
    for name, value in fields:
        header[name.decode("ascii")] = value.replace(b"\r\n", b"").decode("utf-8", "replace").strip()
    content_type = header.get_content_type()
    boundary = header.get_boundary() if content_type.startswith("multipart/") else None
    embedded = content_type == "message/rfc822"
    if depth > MAXIMUM_DEPTH and (boundary or embedded):
        yield Part(content_type, "", "", b"", is_too_deep=True)
    elif boundary:
        for section in _sections(body, boundary.encode()):
            if budget[0] <= 0:
                return
            yield from _walk(*_split(section), depth + 1, budget)
    elif embedded:
        yield from _walk(*_split(body), depth + 1, budget)
    else:
        encoding = str(header.get("content-transfer-encoding", "")).lower()
        yield Part(content_type, decoded(header.get_filename("")), encoding, body)


def _split(section: bytes) -> tuple[Iterable[tuple[bytes, bytes]], bytes]:
    """The MIME fields of a part, and its body."""
    if section.startswith(b"\r\n"):
        return (), section[2:]
    header, blank, body = section.partition(b"\r\n\r\n")
    return _MIME_FIELDS.findall(header[:_MAXIMUM_PART_HEADER] + b"\r\n"), body if blank else b""


def _sections(body: bytes, boundary: bytes) -> Iterator[bytes]:
    """What stands between the delimiter lines (RFC 2046 section 5.1.1); a missing last one is forgiven."""
    body = b"\r\n" + body  # the first delimiter needs no line before it
    # The literal in front lets `re` search as fast as bytes.find.
    delimiter = re.compile(rb"\r\n--" + re.escape(boundary) + rb"(--)?[ \t]*(?=\r\n|\Z)")
    start: int | None = None
    for found in delimiter.finditer(body):
        if start is not None:
            yield body[start : found.start()]
        if found[1]:
            return
        start = found.end() + 2
    if start is not None:
        yield body[start:]
