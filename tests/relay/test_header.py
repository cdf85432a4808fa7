"""The header as the receiver sees it: what can be read in two ways is refused, what is sent on keeps its octets."""

import email
import email.policy
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mailsluice_relay.envelope import Mailbox
from mailsluice_relay.policy.ownership import is_local_name
from mailsluice_relay.smtp import header
from mailsluice_relay.smtp.header import Author, HeaderError, Trace

TRACE = Trace(
    hostname="relay.example.test",
    hello="app-1.example.test",
    client_address="192.0.2.7",
    protocol="ESMTPSA",
    queue_id="Q1",
    date=1_700_000_000.9,
)


def read(value: str, name: str = "From", *, internationalized: bool = False) -> Sequence[Author]:
    fields = header.parse(f"{name}: {value}\r\n".encode())
    return header.authors(fields, internationalized=internationalized)


def addresses(value: str, *, internationalized: bool = False) -> list[str]:
    return [str(author.mailbox) for author in read(value, internationalized=internationalized)]


def prepared(text: str, sender: str | None = "ann@example.test", suspected: str = "") -> str:
    mailbox = Mailbox(*sender.split("@")) if sender else None
    return header.prepare(header.parse(text.encode()), TRACE, sender=mailbox, suspected=suspected).decode()


# --- fields ---------------------------------------------------------------------------------------------------------


def test_fields_are_unfolded_and_keep_their_octets() -> None:
    fields = header.parse(b"Subject: one\r\n two\r\n\tthree\r\nX-Empty:\r\n")
    assert [(field.key, field.value) for field in fields] == [("subject", b"one two\tthree"), ("x-empty", b"")]
    assert fields[0].raw == b"Subject: one\r\n two\r\n\tthree\r\n"
    assert header.parse(b"") == ()


@pytest.mark.parametrize(
    ("octets", "what"),
    [
        (b"From: a@b.test\r\nFrom: c@d.test\r\n", "from stands twice"),
        (b"From: a@b.test\r\nFROM: c@d.test\r\n", "from stands twice"),
        (b"Sender: a@b.test\r\nsender: c@d.test\r\n", "sender stands twice"),
        (b"Content-Type: text/plain\r\nContent-Type: text/html\r\n", "content-type stands twice"),
        (b"Subject: a\0b\r\n", "NUL"),
        (b"From : a@b.test\r\n", "field name"),
        (b"From\t: a@b.test\r\n", "field name"),
        (b"Fr\xc3\xb6m: a@b.test\r\n", "field name"),
        (b": a@b.test\r\n", "field name"),
        (b"Subject: x\r\nno colon here\r\n", "no colon"),
        (b" From: a@b.test\r\n", "begins with a continuation"),
        (b"Subject: x\r\n \t \r\nFrom: a@b.test\r\n", "a line is blank"),
        (b"Subject: x\r\n\r\nFrom: a@b.test\r\n", "a line is blank"),
        (b"Subject: x\rFrom: a@b.test\r\n", "bare CR"),
        (b"Subject: x\nFrom: a@b.test\r\n", "bare LF"),
        (b"Subject: x", "does not end with CRLF"),
        (b"X: " + b"x" * 1000 + b"\r\n", "a line of the field x is longer"),
        (b"X: x\r\n" * 1001, "more than 1000 fields"),
        (b"X: x\r\n" * 50_000, "larger than"),
        (b"From a@b.test Mon Jan 1 00:00:00 2026\r\nSubject: x\r\n", "field name"),
    ],
)
def test_what_mail_programs_read_differently_is_refused(octets: bytes, what: str) -> None:
    with pytest.raises(HeaderError, match=what):
        header.parse(octets)


# --- addresses ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("ann@example.test", ["ann@example.test"]),
        ("Ann <ann@example.test>", ["ann@example.test"]),
        ("<ann@example.test>", ["ann@example.test"]),
        ("< ann@example.test >", ["ann@example.test"]),
        ("John Q. Public <ann@example.test>", ["ann@example.test"]),
        ("[Alert] App <ann@example.test>", ["ann@example.test"]),
        ('"boss@corp.test" <ann@example.test>', ["ann@example.test"]),
        ('"a \\" <boss@corp.test>" <ann@example.test>', ["ann@example.test"]),
        ("ann@example.test (boss@corp.test)", ["ann@example.test"]),
        ("(boss@corp.test) ann@example.test", ["ann@example.test"]),
        ("a (one (two) \\) three) <ann@example.test>", ["ann@example.test"]),
        ("ann@example.test, Bob <bob@example.test>", ["ann@example.test", "bob@example.test"]),
        ("ann@example.test,,\r\n bob@example.test,", ["ann@example.test", "bob@example.test"]),
        ("Team: ann@example.test, Bob <bob@example.test>;", ["ann@example.test", "bob@example.test"]),
        ("Team: ann@example.test; (x), bob@example.test", ["ann@example.test", "bob@example.test"]),
        ("<@relay.test,@other.test:ann@example.test>", ["ann@example.test"]),
        ('"two words"@example.test', ['"two words"@example.test']),
        ('"a@b".c@example.test', ['"a@b".c@example.test']),
        ("ann@[192.0.2.1]", ["ann@[192.0.2.1]"]),
        ("=?utf-8?q?Ann_=3Cboss=40corp.test=3E?= <ann@example.test>", ["ann@example.test"]),
        ("Änn <ann@example.test>", ["ann@example.test"]),
    ],
)
def test_addresses(value: str, expected: list[str]) -> None:
    assert addresses(value) == expected


@pytest.mark.parametrize(
    "value",
    [
        "",
        "ann",
        "Ann",
        "undisclosed-recipients:;",
        "boss@corp.test <ann@example.test>",
        "<ann@example.test> <boss@corp.test>",
        "ann@example.test boss@corp.test",
        "<ann@example.test>boss@corp.test",
        "<ann@example.test> boss",
        "ann@example.test;",
        "boss@corp.test@example.test",
        "<boss@corp.test",
        "boss@corp.test>",
        "<<ann@example.test>>",
        '"unclosed <ann@example.test>',
        "(unclosed ann@example.test",
        "ann@example.test)",
        "ann@(comment)example.test",
        "ann(comment)@example.test",
        "ann @example.test",
        "ann@ example.test",
        "ann@example .test",
        "ann@example. test",
        "<ann@example.test (comment)>",
        ".ann@example.test",
        "ann.@example.test",
        "a..n@example.test",
        "ann@.example.test",
        "ann@example..test",
        "ann@example.test.",
        "@example.test",
        "<>",
        "ann@",
        'a"b"@example.test',
        "Team: ann@example.test",
        "Team: Inner: ann@example.test;;",
        "=?utf-8?q?boss=40corp.test?=@example.test",
        "<=?utf-8?q?x=40evil.test=3e?=@example.test>",
        "ann@example.test\x0bboss@corp.test",
        "Ann \u202etset.proc@ssob <ann@example.test>",
        "änn@example.test",
        "ann@exämple.test",
        "a\\b@example.test",
        "[x]@example.test",
        "(" * 100 + ")" * 100 + " ann@example.test",
        ", ".join(["ann@example.test"] * 101),
        "<@relay.test ann@example.test>",
        ", " * 20_000 + "ann@example.test",
    ],
)
def test_what_is_no_address_or_more_than_one_reading_is_refused(value: str) -> None:
    with pytest.raises(HeaderError):
        read(value.replace(", ", ",\r\n "))


def test_an_address_outside_ascii_needs_smtputf8() -> None:
    assert addresses("änn@exämple.test", internationalized=True) == ["änn@exämple.test"]
    with pytest.raises(HeaderError, match="neither ASCII nor UTF-8"):
        header.authors(header.parse(b"From: \xe4nn <ann@example.test>\r\n"), internationalized=True)


def test_every_author_field_is_read_and_no_other() -> None:
    text = "".join(
        f"{name}: {number}@example.test\r\n"
        for number, name in enumerate(["From", "Sender", "Resent-From", "Resent-Sender", "To", "Reply-To", "X-From"])
    )
    found = header.authors(header.parse(text.encode()), internationalized=False)
    assert [(author.field, author.mailbox.local_part) for author in found] == [
        ("from", "0"),
        ("sender", "1"),
        ("resent-from", "2"),
        ("resent-sender", "3"),
    ]


@pytest.mark.parametrize(
    ("value", "display"),
    [
        ("Ann B. <ann@example.test>", "Ann B."),
        ('"Boss <boss@corp.test>" <ann@example.test>', "Boss <boss@corp.test>"),
        ("=?utf-8?b?Ym9zc0Bjb3JwLnRlc3Q=?= <ann@example.test>", "boss@corp.test"),
        ('"=?utf-8?q?boss=40corp.test?=" <ann@example.test>', "boss@corp.test"),
        ("ann@example.test (boss@corp.test)", "boss@corp.test"),
        ("=?nonsense?q?x?= <ann@example.test>", "=?nonsense?q?x?="),
        ("=?utf-8?b?!?= <ann@example.test>", ""),
        ("ann@example.test", ""),
        ("=?utf-8?q?boss=E2=80=8B=40corp.test=0D=0AX=3A_y?= <ann@example.test>", "boss@corp.test  X: y"),
    ],
)
def test_what_is_shown_beside_an_address(value: str, display: str) -> None:
    assert read(value)[0].display == display


@settings(deadline=None)  # other work on the machine is no fault of the code
@given(st.binary(max_size=300))
def test_reading_any_octets_gives_fields_or_a_header_error(octets: bytes) -> None:
    try:
        fields = header.parse(octets)
    except HeaderError:
        return
    assert b"".join(field.raw for field in fields) == octets


ADDRESS_PIECES = st.sampled_from(
    ["a", "@", "b.test", "<", ">", '"', "(", ")", ",", ";", ":", ".", " ", "\\", "[", "]", "ä", "=?utf-8?q?x?=", "\t"]
)


@settings(deadline=None)  # other work on the machine is no fault of the code
@given(st.lists(ADDRESS_PIECES, max_size=25).map("".join))
def test_reading_any_address_list_gives_authors_or_a_header_error(value: str) -> None:
    try:
        found = read("x\r\n " + value if not value.strip() else value, internationalized=True)
    except HeaderError:
        return
    assert found
    for author in found:
        local_part = author.mailbox.local_part
        outside_quotes = local_part if not local_part.startswith('"') else ""
        assert not set(author.mailbox.domain) & set('@<>", ()')
        assert not set(outside_quotes) & set("@<>, ()")


@settings(deadline=None)  # other work on the machine is no fault of the code
@given(st.lists(ADDRESS_PIECES, max_size=12).map("".join))
def test_the_standard_library_sees_no_other_author(value: str) -> None:
    """Where both can read a list, both see the same mailboxes: no second reading slips through."""
    try:
        ours = read(value)
    except HeaderError:
        return
    theirs = email.message_from_bytes(f"From: {value}\r\n\r\n".encode(), policy=email.policy.SMTP)["From"]
    seen = [address.addr_spec for address in theirs.addresses if address.domain]
    if not theirs.defects and len(seen) == len(ours):
        assert [address.partition("@")[2] for address in seen] == [author.mailbox.domain for author in ours]


# --- the relay's own work -------------------------------------------------------------------------------------------


def test_received_stands_first_and_what_is_missing_is_added() -> None:
    assert prepared("Subject: x\r\n") == (
        "Received: from app-1.example.test ([192.0.2.7])\r\n"
        "\tby relay.example.test with ESMTPSA id Q1;\r\n"
        "\tTue, 14 Nov 2023 22:13:20 +0000\r\n"
        "Subject: x\r\n"
        "From: <ann@example.test>\r\n"
        "Date: Tue, 14 Nov 2023 22:13:20 +0000\r\n"
        "Message-ID: <Q1@relay.example.test>\r\n"
    )


def test_what_is_there_stays_octet_for_octet() -> None:
    text = "Received: from x\r\n\tby y; z\r\nFROM:ann@example.test\r\nDate:  odd\r\nmessage-id: <1>\r\nX: \t y \r\n"
    assert prepared(text).endswith("+0000\r\n" + text)


def test_bcc_goes_and_so_does_a_mark_that_is_not_ours() -> None:
    text = "From: a@b.test\r\nBcc: secret@example.test,\r\n other@example.test\r\nX-Mailsluice-Suspected: no\r\n"
    result = prepared(text + "Resent-Bcc: third@example.test\r\n", suspected="spam; score=6")
    assert "secret" not in result
    assert "other@" not in result
    assert "third" not in result
    assert result.count("X-Mailsluice-Suspected") == 1
    assert "X-Mailsluice-Suspected: spam; score=6\r\n" in result


@pytest.mark.parametrize("hello", ["evil) by other (x", "a\r\nX: y", "", "ä.test", "a b", "x" * 300])
def test_a_greeting_cannot_write_the_trace(hello: str) -> None:
    trace = Trace("relay.test", hello, "2001:db8::1", "ESMTP", "Q1", 0.0)
    assert header.prepare([], trace, sender=None).startswith(b"Received: from unknown ([IPv6:2001:db8::1])\r\n\tby")


@pytest.mark.parametrize(
    ("extended", "tls", "authenticated", "internationalized", "expected"),
    [
        (False, False, False, False, "SMTP"),
        (True, False, False, False, "ESMTP"),
        (True, True, False, False, "ESMTPS"),
        (True, False, True, False, "ESMTPA"),
        (True, True, True, False, "ESMTPSA"),
        (True, True, True, True, "UTF8SMTPSA"),
    ],
)
def test_protocol(extended: bool, tls: bool, authenticated: bool, internationalized: bool, expected: str) -> None:
    assert expected == header.protocol(
        extended=extended, tls=tls, authenticated=authenticated, internationalized=internationalized
    )


def test_an_account_of_a_machine_becomes_the_default_author_and_stays_in_reply_to() -> None:
    fields = header.parse(b"From: Cron Daemon <root@localhost>\r\nSender: root@web-1\r\nSubject: x\r\n")
    found = header.authors(fields, internationalized=False)
    changed = header.readdress(fields, found, is_local_name, Mailbox("noreply", "example.test"))
    assert b"".join(field.raw for field in changed) == (
        b"From: Cron Daemon <noreply@example.test>\r\nReply-To: Cron Daemon <root@localhost>\r\nSubject: x\r\n"
    )
    assert header.authors(changed, internationalized=False)[0].mailbox == Mailbox("noreply", "example.test")


def test_a_display_name_cannot_write_fields_or_long_lines() -> None:
    text = "From: =?utf-8?q?x=0D=0ABcc=3A_evil?=" + "\r\n ä" * 3000 + " <root@localhost>\r\n"
    fields = header.parse(text.encode())
    found = header.authors(fields, internationalized=False)
    changed = header.readdress(fields, found, is_local_name, Mailbox("noreply", "example.test"))
    again = header.parse(b"".join(field.raw for field in changed))
    assert [field.key for field in again] == ["from", "reply-to"]


def test_a_real_author_is_left_alone() -> None:
    fields = header.parse(b"From: Ann <ann@example.test>\r\nReply-To: x@localhost\r\n")
    found = header.authors(fields, internationalized=False)
    assert header.readdress(fields, found, is_local_name, Mailbox("noreply", "example.test")) == fields
