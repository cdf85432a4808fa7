"""The text after DATA: finds its end, undoes dot-stuffing, detects wrong line endings (RFC 5321 sections 2.3.8, 4.5.2).

- CR LF . CR LF ends the text, and nothing else does. How the octets were split on their way changes nothing.
- A CR or LF alone, or a NUL, is a defect: the text must not be queued. A lenient server further on could take
  LF . LF for an end and what follows for commands (SMTP smuggling, CVE-2023-51764 to 51766).
- With `normalize`, a lone CR or LF becomes CR LF. A NUL stays a defect, and so does CR CR LF . CR LF: its sender and
  this reader do not agree on where the text ends.

Works on whole pieces with `bytes` methods: no line is looked at in Python.
"""

from __future__ import annotations

from typing import Final

END: Final = b"\r\n.\r\n"
DOT: Final = END[:3]
"""A dot at the beginning of a line: stuffed, or the end."""
_PREFIXES: Final = (b"\r\n.\r", b"\r\n.", b"\r\n", b"\r")
"""What END may have begun with, longest first."""


def find_dot(text: bytes, start: int) -> int:
    """Where the first DOT from `start` is; -1 for none. Base64 has no dots at all, and one octet is found fastest."""
    dot = text.find(b".", start)
    return text.find(DOT, max(start, dot - 2)) if dot >= 0 else -1


class DataReader:
    """Reads one text. After its end it is used up."""

    __slots__ = ("_before", "_held", "_normalize", "_trim", "defective")

    def __init__(self, *, normalize: bool = False) -> None:
        self._normalize = normalize
        self._held: bytes | None = None
        """Octets that may belong to END and are not given out yet; None before the first octet."""
        self._trim = 0
        """Octets at the front that are not the text's."""
        self._before = b""
        """The octet given out last, as it came."""
        self.defective = False
        """A wrong line ending or a NUL has been seen; nothing more is given out."""

    def feed(self, data: bytes, start: int = 0) -> tuple[bytes, int]:
        """The text in `data` from `start`, and the offset behind the end of the text, or -1 while there is more.

        No CR LF and no stuffed dot is ever split over two pieces.
        """
        held = self._held
        if held is None:
            # The text begins as if after a CR LF, the DATA command's own. Mostly it is here in one piece:
            if data.startswith(b".\r\n", start):
                return b"", start + 3
            dot = find_dot(data, start)  # rare, and there is no END without it
            end = data.find(END, dot) if dot >= 0 else -1
            if end >= 0:
                first = start + 1 if data.startswith(b".", start) else start
                return self._clean(data[first : end + 2], last=True, stuffed=dot < end), end + 5
            if start == len(data):
                return b"", -1
            held = END[:2]
            self._trim = 2
        work = held + data[start:]
        dot = find_dot(work, 0)
        end = work.find(END, dot) if dot >= 0 else -1
        if end >= 0:
            return self._give(work[: end + 2], last=True, stuffed=dot < end), start + end + 5 - len(held)
        keep = next((len(prefix) for prefix in _PREFIXES if work.endswith(prefix)), 0)
        self._held = work[len(work) - keep :]
        return self._give(work[: len(work) - keep], last=False, stuffed=dot >= 0), -1

    def _give(self, piece: bytes, *, last: bool, stuffed: bool) -> bytes:
        if not piece:
            return b""
        text = self._clean(piece, last=last, stuffed=stuffed)
        self._before = piece[-1:]
        if self._trim:
            text = text[self._trim :]
            self._trim = 0
        return text

    def _clean(self, piece: bytes, *, last: bool, stuffed: bool) -> bytes:
        """`stuffed`: a line may begin with a dot."""
        if self.defective:
            return b""
        # `splitlines` takes CR LF, a CR and an LF alone each for one end of a line; it is faster than counting CR LF.
        ends = len(piece.splitlines()) - (not piece.endswith((b"\r", b"\n")))
        alone = piece.count(b"\r") + piece.count(b"\n") != 2 * ends
        disputed = last and self._normalize and (self._before + piece[-3:]).endswith(b"\r\r\n")
        if disputed or b"\0" in piece or (alone and not self._normalize):
            self.defective = True
            return b""
        if stuffed:
            piece = piece.replace(b"\r\n.", b"\r\n")
        if alone:
            piece = piece.replace(b"\r\n", b"\n").replace(b"\r", b"\n").replace(b"\n", b"\r\n")
        return piece
