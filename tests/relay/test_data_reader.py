"""Where a message ends, and what must never be taken for its end (SMTP smuggling)."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mailsluice_relay.smtp.data import DataReader

NOT_THE_END = [
    b"\n.\n",
    b"\r.\r",
    b"\r.\n",
    b"\n.\r",
    b"\n.\r\n",
    b"\r\n.\n",
    b"\r.\r\n",
    b"\r\n.\r",
    b"\r\n\0.\r\n",
    b"\r\n.\0\r\n",
    b"\r\n.\r\r\n",
    b"\r\r\n.\r\r\n",
    b"\n\r.\n\r",
]
ENDS_BADLY = b"\r\r\n.\r\n"
"""It holds CR LF . CR LF and so ends the text for everybody, but a CR is left over before."""


def read(pieces: list[bytes], *, normalize: bool = False) -> tuple[bytes, bytes | None, bool]:
    """The text, what follows it (None: it has not ended), and whether it is defective."""
    reader = DataReader(normalize=normalize)
    text = b""
    for number, piece in enumerate(pieces):
        data, end = reader.feed(piece)
        text += data
        if end >= 0:
            return text, piece[end:] + b"".join(pieces[number + 1 :]), reader.defective
    return text, None, reader.defective


@pytest.mark.parametrize(
    ("wire", "text", "rest"),
    [
        (b".\r\n", b"", b""),
        (b".\r\nQUIT\r\n", b"", b"QUIT\r\n"),
        (b"hello\r\n.\r\n", b"hello\r\n", b""),
        (b"\r\n.\r\n", b"\r\n", b""),
        (b"..\r\n.\r\n", b".\r\n", b""),
        (b"a\r\n..b\r\n...\r\n.\r\n", b"a\r\n.b\r\n..\r\n", b""),
        (b".a\r\n.\r\n", b"a\r\n", b""),  # RFC 5321 section 4.5.2: the first dot goes, whatever follows
        (b"a\r\n.\r\nb\r\n.\r\n", b"a\r\n", b"b\r\n.\r\n"),
    ],
)
def test_texts(wire: bytes, text: bytes, rest: bytes) -> None:
    assert read([wire]) == (text, rest, False)
    assert read([wire[i : i + 1] for i in range(len(wire))]) == (text, rest, False)


@pytest.mark.parametrize("variant", NOT_THE_END)
def test_only_crlf_dot_crlf_ends_the_text_and_the_rest_is_a_defect(variant: bytes) -> None:
    _, rest, defective = read([b"Subject: 1\r\n\r\nbody" + variant + b"MAIL FROM:<x@y.test>\r\nRCPT\r\n.\r\nQUIT\r\n"])
    assert rest == b"QUIT\r\n"
    assert defective


def test_a_stray_cr_before_the_end_is_a_defect() -> None:
    for normalize in (False, True):
        _, rest, defective = read([b"body" + ENDS_BADLY + b"MAIL FROM:<x@y.test>\r\n"], normalize=normalize)
        assert rest == b"MAIL FROM:<x@y.test>\r\n"
        assert defective


@pytest.mark.parametrize(
    ("wire", "text"),
    [
        (b"a\nb\r\n.\r\n", b"a\r\nb\r\n"),
        (b"a\rb\r\n.\r\n", b"a\r\nb\r\n"),
        (b"a\r\rb\n\nc\r\n.\r\n", b"a\r\n\r\nb\r\n\r\nc\r\n"),
        (b"a\n.\nb\r\n.\r\n", b"a\r\n.\r\nb\r\n"),  # goes out dot-stuffed
        (b"a\n..b\r\n.\r\n", b"a\r\n..b\r\n"),  # stuffed only where the wire had CR LF before
    ],
)
def test_normalizing_makes_crlf_of_lone_ones(wire: bytes, text: bytes) -> None:
    assert read([wire], normalize=True) == (text, b"", False)


def test_normalizing_does_not_let_nul_through() -> None:
    assert read([b"a\0b\r\n.\r\n"], normalize=True)[2]


@given(
    wire=st.lists(st.sampled_from([b"\r", b"\n", b"\r\n", b".", b"\0", b"a", b"\r\n.", b"\r\n..\r\n"]), max_size=20),
    cuts=st.lists(st.integers(0, 60), max_size=8),
    normalize=st.booleans(),
)
def test_any_split_gives_the_same_text(wire: list[bytes], cuts: list[int], normalize: bool) -> None:
    octets = b"".join(wire) + b"\r\n.\r\nQUIT\r\n"
    edges = sorted({min(cut, len(octets)) for cut in cuts} | {0, len(octets)})
    pieces = [octets[a:b] for a, b in itertools.pairwise(edges)]
    whole_text, whole_rest, whole_defect = read([octets], normalize=normalize)
    text, rest, defect = read(pieces, normalize=normalize)
    assert (rest, defect) == (whole_rest, whole_defect)
    if not defect:  # of a defective text nothing is used
        assert text == whole_text
        assert text.count(b"\r") == text.count(b"\n") == text.count(b"\r\n")
