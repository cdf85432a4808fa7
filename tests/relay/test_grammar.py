"""RFC 5321 section 4.1.2, as `smtp.grammar` reads it."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mailsluice_relay.envelope import Mailbox
from mailsluice_relay.smtp import grammar
from mailsluice_relay.smtp.grammar import AddressError


@pytest.mark.parametrize(
    ("text", "local_part", "domain"),
    [
        ("<app@example.test>", "app", "example.test"),
        ("<App.Name+tag@Example.TEST>", "App.Name+tag", "Example.TEST"),
        ("<!#$%&'*+-/=?^_`{|}~@example.test>", "!#$%&'*+-/=?^_`{|}~", "example.test"),
        ("<a@b>", "a", "b"),
        ("<a@xn--bcher-kva.test>", "a", "xn--bcher-kva.test"),
        ('<"a b"@example.test>', '"a b"', "example.test"),
        ('<"a\\"b\\\\c>@"@example.test>', '"a\\"b\\\\c>@"', "example.test"),
        ('<""@example.test>', '""', "example.test"),
        ("<a@[192.0.2.1]>", "a", "[192.0.2.1]"),
        ("<a@[IPv6:2001:db8::1]>", "a", "[IPv6:2001:db8::1]"),
        ("<@relay.test,@other.test:a@example.test>", "a", "example.test"),
        ("<grüße@bücher.test>", "grüße", "bücher.test"),
        (f"<{'l' * 64}@example.test>", "l" * 64, "example.test"),
        (f"<a@{'l' * 63}.test>", "a", f"{'l' * 63}.test"),
    ],
)
def test_paths_are_given_back_as_they_came(text: str, local_part: str, domain: str) -> None:
    assert grammar.reverse_path(text + " SIZE=1") == (Mailbox(local_part, domain), " SIZE=1")
    assert grammar.forward_path(text) == (Mailbox(local_part, domain), "")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "<",
        "<@>",
        "a@b.test",  # no angle brackets
        "<a@b.test",  # aiosmtpd #564
        "<a>",
        "<a@>",
        "<@b.test>",
        "<.a@b.test>",  # aiosmtpd #563
        "<a.@b.test>",
        "<a..b@b.test>",
        "<a b@b.test>",
        "<a@b..test>",
        "<a@.test>",
        "<a@b.test.>",
        "<a@-b.test>",
        "<a@b-.test>",
        "<a@b_c.test>",
        "<a@b.test(comment)>",
        "<(comment)a@b.test>",
        "<a(comment)@b.test>",
        "<a@b@c.test>",
        '<"a@b.test>',
        '<"a"b@c.test>',
        '<"a\x00b"@c.test>',
        '<"a\nb"@c.test>',
        "<a\r@b.test>",
        "<a\x00@b.test>",
        "<a@b.test\n>",
        "<a@[192.0.2.256]>",
        "<a@[192.0.2]>",
        "<a@[2001:db8::1]>",
        "<a@[IPv6:192.0.2.1]>",
        "<a@[IPv6:fe80::1%eth0]>",
        "<a@[tag:content]>",
        "<a@[]>",
        "<@relay.test:>",
        "<a\u200b@b.test>",  # zero width space
        "<a\u202e@b.test>",  # right-to-left override
        "<a\u0085@b.test>",  # a line end in Unicode's eyes
        "<u\u0308@b.test>",  # not NFC
        "<a@b\u2024test>",  # one dot leader
        f"<{'l' * 65}@example.test>",
        f"<{'ü' * 33}@example.test>",  # 66 octets
        f"<a@{'l' * 64}.test>",
        f"<{'l' * 64}@{'.'.join(['d' * 47] * 4)}>",  # each part fits, the path does not
    ],
)
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(AddressError):
        grammar.reverse_path(text)
    with pytest.raises(AddressError):
        grammar.forward_path(text)


def test_encoded_words_are_not_decoded() -> None:
    """aiosmtpd makes `"x@evil.test>"@b.test` of this."""
    mailbox, _ = grammar.forward_path("<=?utf-8?q?x=40evil.test=3e?=@b.test>")
    assert mailbox == Mailbox("=?utf-8?q?x=40evil.test=3e?=", "b.test")


def test_the_null_path_is_a_sender_and_no_recipient() -> None:
    assert grammar.reverse_path("<> RET=HDRS") == (None, " RET=HDRS")
    with pytest.raises(AddressError):
        grammar.forward_path("<>")


@pytest.mark.parametrize("text", ["<Postmaster>", "<POSTMASTER>", "<postmaster>"])
def test_postmaster_needs_no_domain_as_a_recipient(text: str) -> None:
    assert grammar.forward_path(text) == (Mailbox(text[1:-1], ""), "")
    with pytest.raises(AddressError):
        grammar.reverse_path(text)


def test_a_mailbox_is_all_of_the_text() -> None:
    assert grammar.mailbox("app@example.test") == Mailbox("app", "example.test")
    for text in ("app@example.test>", "app@example.test ", "<app@example.test>", "app"):
        with pytest.raises(AddressError):
            grammar.mailbox(text)


@given(st.text(max_size=80))
@example("<" + "a." * 40 + "@")
@example("<" + "a@" + "a-" * 40)
def test_what_is_accepted_holds_nothing_that_ends_a_line_or_a_path(text: str) -> None:
    try:
        mailbox, rest = grammar.forward_path("<" + text)
    except AddressError:
        return
    written = str(mailbox)
    assert not set(written) & set("\r\n\x00\x85\u2028\u2029")
    assert ("<" + text).endswith(f"{written}>{rest}")
    if not written.startswith('"'):
        assert not set(written) & set('<> (),;:\\"') or "[" in mailbox.domain


@pytest.mark.parametrize(
    ("line", "verb", "argument"),
    [
        (b"ehlo client.test", b"EHLO", b"client.test"),
        (b"QUIT", b"QUIT", b""),
        (b"QUIT ", b"QUIT", b""),
        (b"MAIL FROM:<a@b.test> SIZE=1", b"MAIL", b"FROM:<a@b.test> SIZE=1"),
        (b" NOOP", b"", b"NOOP"),
        (b"", b"", b""),
    ],
)
def test_a_command_is_a_verb_and_an_argument(line: bytes, verb: bytes, argument: bytes) -> None:
    assert grammar.split_command(line) == (verb, argument)


@pytest.mark.parametrize("name", [b"client.test", b"[192.0.2.1]", b"[IPv6:2001:db8::1]", b"WORK_STATION", b"localhost"])
def test_names_that_clients_give_themselves(name: bytes) -> None:
    assert grammar.hello_name(name) == name.decode()


@pytest.mark.parametrize("name", [b"", b"two words", b"a<b>", b"a\tb", b"(comment)", "bücher".encode(), b"a" * 256])
def test_names_that_could_not_stand_in_a_received_field(name: bytes) -> None:
    assert grammar.hello_name(name) is None
