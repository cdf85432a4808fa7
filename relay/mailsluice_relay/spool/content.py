"""Takes a message's text while it is read from a client, and gives it back as header section and body.

Small ones stay in memory and go into the queue's database; past MEMORY_LIMIT the text goes to a file in `incoming/`,
so that memory stays flat whatever clients send. Files are named at random: nothing of a name comes from a client.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Final

from mailsluice_relay.envelope import Content
from mailsluice_relay.spool.errors import SpoolError, translated

MEMORY_LIMIT: Final = 256 * 1024
"""Octets of a message that are kept in memory. A longer header section is not told apart from the body."""

CHUNK: Final = 64 * 1024

_FIELD = re.compile(rb"[!-9;-~]+[ \t]*:")
"""A header field's name and colon (RFC 5322 sections 2.2 and 4.5.3: old forms have space before the colon)."""


class MemoryBody:
    """A body in memory."""

    __slots__ = ("_data",)

    def __init__(self, data: bytes) -> None:
        self._data = data

    @property
    def size(self) -> int:
        return len(self._data)

    def chunks(self) -> Iterator[bytes]:
        if self._data:
            yield self._data

    def close(self) -> None:
        """Nothing to give up: the memory goes with the last reference."""


class FileBody:
    """A body in a file. The file goes with `close`, unless the queue has taken it over (`adopt`)."""

    __slots__ = ("_size", "_temporary", "path")

    def __init__(self, path: Path, size: int, *, temporary: bool) -> None:
        self.path = path
        self._size = size
        self._temporary = temporary

    @property
    def size(self) -> int:
        return self._size

    def chunks(self) -> Iterator[bytes]:
        with self.path.open("rb", buffering=0) as stream:
            while chunk := stream.read(CHUNK):
                yield chunk

    def sync(self) -> None:
        """Put the octets on the disk (fsync). Blocks."""
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def adopt(self, path: Path) -> None:
        """Move the file to `path`, where it belongs to the queue: `close` leaves it there from now on."""
        self.path.rename(path)
        self.path = path
        self._temporary = False

    def close(self) -> None:
        if self._temporary:
            self._temporary = False
            with contextlib.suppress(FileNotFoundError):
                self.path.unlink()


def write_file(directory: Path, data: bytes) -> FileBody:
    """A body from memory in a file of its own, on the disk (fsync). Blocks. Raises OSError."""
    descriptor, name = tempfile.mkstemp(dir=directory, suffix=".body")
    body = FileBody(Path(name), len(data), temporary=True)
    try:
        with os.fdopen(descriptor, "wb", buffering=0) as stream:
            view = memoryview(data)
            while view:
                view = view[stream.write(view) :]
            os.fsync(descriptor)
    except OSError:
        body.close()
        raise
    return body


class ContentWriter:
    """Takes a message in pieces. `finish` or `discard` ends it; after an error `discard` alone is left.

    Writes block for as long as the page cache takes them; waiting for the disk itself is the queue's (group commit).
    """

    def __init__(self, directory: Path, *, memory_limit: int = MEMORY_LIMIT) -> None:
        self._directory = directory
        self._memory_limit = memory_limit
        self._head = bytearray()
        """Everything while in memory; once there is a file, the header section (perhaps none) with its blank line."""
        self._file: BinaryIO | None = None
        self._path: Path | None = None
        self._size = 0

    @property
    def size(self) -> int:
        return self._size

    def write(self, data: bytes) -> None:
        """Add octets. Raises SpoolFull or SpoolError."""
        self._size += len(data)
        try:
            if self._file is not None:
                self._file.write(data)
                return
            self._head += data
            if len(self._head) > self._memory_limit:
                self._spill()
        except OSError as error:
            raise translated(error) from error

    def finish(self) -> Content:
        """The text as header section and body, split at the first blank line. Raises SpoolFull or SpoolError."""
        header, rest = _split(bytes(self._head))
        self._head = bytearray()
        if self._file is None or self._path is None:
            return Content(header, MemoryBody(rest))
        try:
            self._file.close()
            size = self._path.stat().st_size
        except OSError as error:
            raise translated(error) from error
        self._file = None
        return Content(header, FileBody(self._path, size, temporary=True))

    def discard(self) -> None:
        """Forget the text. Idempotent."""
        self._head = bytearray()
        if self._file is not None and self._path is not None:
            with contextlib.suppress(OSError):  # what was buffered does not matter any more, nor that it fits nowhere
                self._file.close()
            self._file = None
            with contextlib.suppress(FileNotFoundError):
                self._path.unlink()

    def _spill(self) -> None:
        """From memory to a file: the header section stays, the body goes."""
        end = _header_end(self._head)
        descriptor, name = tempfile.mkstemp(dir=self._directory, suffix=".body")
        self._path = Path(name)
        self._file = os.fdopen(descriptor, "wb", buffering=CHUNK)
        self._file.write(memoryview(self._head)[end:])
        self._head = self._head[:end]


def _header_end(text: bytes | bytearray) -> int:
    """Where the body begins; 0 when the text has no header section."""
    if text.startswith(b"\r\n"):
        return 2
    if not _FIELD.match(text):
        return 0
    blank = text.find(b"\r\n\r\n")
    return 0 if blank < 0 else blank + 4


def _split(text: bytes) -> tuple[bytes, bytes]:
    """Header section (without the blank line) and body."""
    end = _header_end(text)
    if end:
        return text[: end - 2], text[end:]
    if _FIELD.match(text) and b"\r\n\r\n" not in text:  # fields up to the end, and no body
        return (text if text.endswith(b"\r\n") else text + b"\r\n"), b""
    return b"", text


__all__ = ["CHUNK", "MEMORY_LIMIT", "ContentWriter", "FileBody", "MemoryBody", "SpoolError", "write_file"]
