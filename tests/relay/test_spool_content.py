"""How a message's text is taken and split."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mailsluice_relay.envelope import Content
from mailsluice_relay.spool.content import CHUNK, ContentWriter, FileBody, MemoryBody
from mailsluice_relay.spool.errors import SpoolError, SpoolFull


def taken(directory: Path, *pieces: bytes, memory_limit: int = 1000) -> Content:
    writer = ContentWriter(directory, memory_limit=memory_limit)
    for piece in pieces:
        writer.write(piece)
    return writer.finish()


def body(content: Content) -> bytes:
    return b"".join(content.body.chunks())


@pytest.mark.parametrize(
    ("text", "header", "rest"),
    [
        (b"Subject: a\r\n\r\nbody\r\n", b"Subject: a\r\n", b"body\r\n"),
        (b"Subject: a\r\n folded\r\nTo: b\r\n\r\n\r\nbody", b"Subject: a\r\n folded\r\nTo: b\r\n", b"\r\nbody"),
        (b"Subject: no body\r\n", b"Subject: no body\r\n", b""),
        (b"Subject: no end", b"Subject: no end\r\n", b""),
        (b"\r\nonly a body\r\n", b"", b"only a body\r\n"),
        (b"no field\r\n\r\nrest\r\n", b"", b"no field\r\n\r\nrest\r\n"),
        (b"From old mailbox\r\nSubject: a\r\n\r\nb", b"", b"From old mailbox\r\nSubject: a\r\n\r\nb"),
        (b"", b"", b""),
    ],
)
def test_the_header_section_ends_at_the_first_blank_line(
    tmp_path: Path, text: bytes, header: bytes, rest: bytes
) -> None:
    content = taken(tmp_path, text)
    assert (content.header, body(content)) == (header, rest)


@given(st.binary(max_size=300), st.integers(1, 50), st.integers(0, 200))
def test_no_octet_of_a_body_is_lost_however_it_arrives(
    tmp_path_factory: pytest.TempPathFactory, rest: bytes, step: int, limit: int
) -> None:
    directory = tmp_path_factory.mktemp("incoming")
    text = b"Subject: a\r\n\r\n" + rest
    pieces = [text[n : n + step] for n in range(0, len(text), step)]
    content = taken(directory, *pieces, memory_limit=max(limit, 14 + step))
    assert content.header == b"Subject: a\r\n"
    assert body(content) == rest
    assert content.size == len(text)


def test_a_small_message_never_touches_the_disk(tmp_path: Path) -> None:
    content = taken(tmp_path, b"Subject: a\r\n\r\n", b"x" * 900)
    assert isinstance(content.body, MemoryBody)
    assert list(tmp_path.iterdir()) == []


def test_a_large_body_is_a_file_read_in_bounded_pieces(tmp_path: Path) -> None:
    content = taken(tmp_path, b"Subject: a\r\n\r\n", *[b"x" * 50_000] * 5)
    assert isinstance(content.body, FileBody)
    assert content.body.size == 250_000
    assert max(map(len, content.body.chunks())) <= CHUNK
    assert body(content) == b"x" * 250_000


def test_closing_or_discarding_removes_the_file_and_may_be_repeated(tmp_path: Path) -> None:
    content = taken(tmp_path, b"Subject: a\r\n\r\n", b"x" * 2000)
    content.body.close()
    content.body.close()
    writer = ContentWriter(tmp_path, memory_limit=10)
    writer.write(b"x" * 2000)
    writer.discard()
    writer.discard()
    assert list(tmp_path.iterdir()) == []


def test_a_body_that_the_queue_took_over_survives_close(tmp_path: Path) -> None:
    content = taken(tmp_path, b"Subject: a\r\n\r\n", b"x" * 2000)
    assert isinstance(content.body, FileBody)
    content.body.adopt(tmp_path / "kept")
    content.body.close()
    assert body(content) == b"x" * 2000


def test_no_space_left_is_told_apart_from_other_faults() -> None:
    full = ContentWriter(Path("/dev"), memory_limit=0)
    full._file = open("/dev/full", "wb", buffering=0)  # noqa: SIM115, PTH123 - closed below; the kernel's own disk without room
    with pytest.raises(SpoolFull) as caught:
        full.write(b"x")
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.ENOSPC
    full._file.close()

    gone = ContentWriter(Path("/nonexistent"), memory_limit=0)
    with pytest.raises(SpoolError) as other:
        gone.write(b"x")
    assert not isinstance(other.value, SpoolFull)
