"""The protocol engine alone: octets in, replies out, and which events there were."""

from __future__ import annotations

import base64
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mailsluice_relay import reply
from mailsluice_relay.reply import Reason, Reply
from mailsluice_relay.smtp import engine
from mailsluice_relay.smtp.engine import Engine, Settings, State

SETTINGS = Settings(hostname="relay.test", message_size=1000, mechanisms=("PLAIN", "LOGIN"), start_tls=True)
Answer = Callable[[engine.Question], Reply | bytes]


def willing(question: engine.Question) -> Reply | bytes:
    """Says yes to everything."""
    match question:
        case engine.Hello() | engine.Command():
            return question.reply
        case engine.Authenticate(_, None):
            return b""
        case engine.Authenticate() | engine.SaslResponse():
            return reply.AUTHENTICATED
        case engine.Mail():
            return reply.SENDER_OK
        case engine.Rcpt():
            return reply.RECIPIENT_OK
        case engine.EndOfData(_, _, defective):
            return reply.DATA_LINE_ENDING if defective else reply.OK


class Dialogue:
    """An engine with one who answers its questions, and what has happened."""

    def __init__(self, settings: Settings = SETTINGS, *, tls: bool = False, answer: Answer = willing) -> None:
        self.engine = Engine(settings, tls=tls)
        self.answer = answer
        self.events: list[engine.Event] = []
        self.messages: list[bytes] = []
        self._text = b""

    def say(self, *pieces: bytes) -> list[str]:
        """Send octets, piece by piece; the reply lines to all of them."""
        output = b""
        for piece in pieces:
            self.engine.receive(piece)
            while (event := self.engine.next_event()) is not None:
                self.events.append(event)
                match event:
                    case engine.Content(data):
                        self._text += data
                    case engine.EndOfData(_, data, defective):
                        if not defective:
                            self.messages.append(self._text + data)
                        self._text = b""
                if isinstance(event, engine.Question):
                    answer = self.answer(event)
                    if isinstance(answer, Reply):
                        self.engine.answer(answer)
                    else:
                        self.engine.challenge(answer)
            output += self.engine.take()
        return output.decode().splitlines()

    def codes(self, *pieces: bytes) -> list[str]:
        return [line[:3] for line in self.say(*pieces)]

    def reasons(self) -> list[Reason]:
        return [event.verdict.reason for event in self.events if isinstance(event, engine.Refused)]


def greeted(settings: Settings = SETTINGS, *, tls: bool = True, answer: Answer = willing) -> Dialogue:
    dialogue = Dialogue(settings, tls=tls, answer=answer)
    dialogue.say(b"EHLO client.test\r\n")
    return dialogue


def in_data(settings: Settings = SETTINGS) -> Dialogue:
    dialogue = greeted(settings)
    assert dialogue.codes(b"MAIL FROM:<a@b.test>\r\nRCPT TO:<c@d.test>\r\nDATA\r\n") == ["250", "250", "354"]
    return dialogue


# --- EHLO -------------------------------------------------------------------------------------------------------------
def test_the_greeting_names_the_host_and_no_software() -> None:
    machine = Engine(SETTINGS)
    machine.greet()
    assert machine.take() == b"220 relay.test ESMTP\r\n"


def test_ehlo_offers_tls_first_and_login_after() -> None:
    before = Dialogue().say(b"EHLO client.test\r\n")
    assert before == [
        "250-relay.test",
        "250-SIZE 1000",
        "250-8BITMIME",
        "250-SMTPUTF8",
        "250-PIPELINING",
        "250-ENHANCEDSTATUSCODES",
        "250-DSN",
        "250-STARTTLS",
        "250 HELP",
    ]
    after = Dialogue(tls=True).say(b"EHLO client.test\r\n")
    assert "250-AUTH PLAIN LOGIN" in after
    assert "250-STARTTLS" not in after


def test_helo_has_no_extensions() -> None:
    dialogue = Dialogue(tls=True)
    assert dialogue.say(b"HELO client.test\r\n") == ["250 relay.test"]
    assert dialogue.say(b"MAIL FROM:<a@b.test> SIZE=1\r\n") == [str(reply.PARAMETER_UNKNOWN)]
    assert dialogue.say(b"AUTH PLAIN\r\n") == [str(reply.COMMAND_NOT_IMPLEMENTED)]
    assert dialogue.codes(b"MAIL FROM:<a@b.test>\r\n") == ["250"]


def test_ehlo_in_a_transaction_ends_it() -> None:
    dialogue = greeted()
    dialogue.say(b"MAIL FROM:<a@b.test>\r\nRCPT TO:<c@d.test>\r\n")
    assert dialogue.codes(b"EHLO client.test\r\n")[-1] == "250"
    assert dialogue.say(b"DATA\r\n") == [str(reply.MAIL_FIRST)]


# --- sequence ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("before", "command", "expected"),
    [
        (b"", b"MAIL FROM:<a@b.test>", reply.HELLO_FIRST),
        (b"", b"RCPT TO:<a@b.test>", reply.HELLO_FIRST),
        (b"", b"DATA", reply.HELLO_FIRST),
        (b"", b"AUTH PLAIN", reply.HELLO_FIRST),
        (b"EHLO c\r\n", b"RCPT TO:<a@b.test>", reply.MAIL_FIRST),
        (b"EHLO c\r\n", b"DATA", reply.MAIL_FIRST),
        (b"EHLO c\r\n|MAIL FROM:<a@b.test>\r\n", b"MAIL FROM:<a@b.test>", reply.NESTED_MAIL),
        (b"EHLO c\r\n|MAIL FROM:<a@b.test>\r\n", b"DATA", reply.RECIPIENT_FIRST),
        (b"EHLO c\r\n|MAIL FROM:<a@b.test>\r\n", b"AUTH PLAIN", reply.AUTH_IN_TRANSACTION),
        (b"EHLO c\r\n|MAIL FROM:<a@b.test>\r\nRCPT TO:<c@d.test>\r\n", b"AUTH PLAIN", reply.AUTH_IN_TRANSACTION),
        (b"EHLO c\r\n|MAIL FROM:<a@b.test>\r\nRSET\r\n", b"RCPT TO:<a@b.test>", reply.MAIL_FIRST),
        (b"EHLO c\r\n|AUTH PLAIN AGEAYg==\r\n", b"AUTH PLAIN", reply.ALREADY_AUTHENTICATED),
        (b"EHLO c\r\n", b"STARTTLS", reply.TLS_ALREADY_ACTIVE),
    ],
)
def test_commands_out_of_sequence(before: bytes, command: bytes, expected: Reply) -> None:
    dialogue = Dialogue(tls=True)
    dialogue.say(*before.split(b"|"))
    assert dialogue.say(command + b"\r\n") == [str(expected)]
    assert dialogue.reasons() == [Reason.BAD_SEQUENCE]


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (b"VRFY someone", reply.VERIFY_DECLINED),
        (b"EXPN list", reply.COMMAND_NOT_IMPLEMENTED),
        (b"BDAT 10 LAST", reply.COMMAND_NOT_IMPLEMENTED),
        (b"NOOP anything", reply.OK),
        (b"RSET", reply.OK),
        (b"QUIT", reply.BYE),
        (b"GET / HTTP/1.1", reply.COMMAND_UNKNOWN),
        (b"", reply.COMMAND_UNKNOWN),
        (b"EHLO", reply.syntax_error("EHLO hostname")),
        (b"RSET now", reply.syntax_error("RSET")),
        (b"QUIT now", reply.syntax_error("QUIT")),
        (b"VRFY", reply.syntax_error("VRFY address")),
        (b"MAIL a@b.test", reply.syntax_error("MAIL FROM:<address> [parameters]")),
        (b"MAIL FROM:a@b.test", reply.SENDER_SYNTAX),
        (b"MAIL FROM:<\xff@b.test>", reply.SENDER_SYNTAX),
        (b"MAIL FROM:<a@b.test> FOO=bar", reply.PARAMETER_UNKNOWN),
        (b"MAIL FROM:<\xc3\xbc@b.test>", reply.SMTPUTF8_REQUIRED),
        (b"AUTH", reply.syntax_error("AUTH mechanism [initial-response]")),
        (b"AUTH PLAIN a b", reply.syntax_error("AUTH mechanism [initial-response]")),
        (b"AUTH CRAM-MD5", reply.MECHANISM_UNSUPPORTED),
        (b"AUTH PLAIN !!!!", reply.SASL_SYNTAX),
    ],
)
def test_replies_to_single_commands(command: bytes, expected: Reply) -> None:
    assert greeted().say(command + b"\r\n") == [str(expected)]


def test_every_reply_but_the_excepted_has_an_enhanced_code() -> None:
    """RFC 2034 section 4."""
    dialogue = greeted()
    lines = dialogue.say(
        b"HELP\r\n", b"NOOP\r\n", b"FOO\r\n", b"MAIL FROM:<a@b.test>\r\n", b"RCPT TO:<x>\r\n", b"QUIT\r\n"
    )
    assert all(line[4] == line[0] and line[5] == "." for line in lines)


def test_postmaster_and_the_null_sender() -> None:
    assert greeted().codes(b"MAIL FROM:<>\r\nRCPT TO:<Postmaster>\r\n") == ["250", "250"]


def test_smtputf8_is_needed_for_recipients_too() -> None:
    recipient = "RCPT TO:<ü@b.test>\r\n".encode()
    without = greeted()
    without.say(b"MAIL FROM:<a@b.test>\r\n")
    assert without.say(recipient) == [str(reply.SMTPUTF8_REQUIRED)]
    with_it = greeted()
    with_it.say(b"MAIL FROM:<a@b.test> SMTPUTF8\r\n")
    assert with_it.codes(recipient) == ["250"]


def test_data_without_an_accepted_recipient_is_refused() -> None:
    """RFC 5321 section 3.3 and RFC 2920 section 3.1: better than 354 and a refusal after the text."""

    def no_recipients(question: engine.Question) -> Reply | bytes:
        return reply.TOO_MANY_RECIPIENTS if isinstance(question, engine.Rcpt) else willing(question)

    dialogue = greeted(answer=no_recipients)
    lines = dialogue.say(b"MAIL FROM:<a@b.test>\r\nRCPT TO:<c@d.test>\r\nDATA\r\n")
    assert [line[:3] for line in lines] == ["250", "452", "554"]


# --- lines ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "line",
    [b"NOOP\nRSET\r\n", b"NOOP\rRSET\r\n", b"NOOP\0\r\n", b"\0\r\n", b"NOOP\r\r\n", b"MAIL FROM:<a\r@b.test>\r\n"],
)
def test_wrong_line_endings_in_commands_are_refused_and_nothing_behind_them_runs(line: bytes) -> None:
    dialogue = greeted()
    assert set(dialogue.say(line)) == {str(reply.COMMAND_LINE_ENDING)}
    assert not any(isinstance(event, engine.Command) for event in dialogue.events)
    assert dialogue.codes(b"NOOP\r\n") == ["250"]


def test_a_client_with_bare_lf_is_told_at_once() -> None:
    assert Dialogue().say(b"EHLO client.test\n") == [str(reply.COMMAND_LINE_ENDING)]


@pytest.mark.parametrize(
    ("beginning", "limit"),
    [(b"NOOP ", 512), (b"MAIL FROM:<a@b.test> ENVID=", 2048), (b"RCPT TO:<a@b.test> ORCPT=", 2048)],
)
def test_command_lines_have_a_length_limit(beginning: bytes, limit: int) -> None:
    fits = beginning + b"x" * (limit - 2 - len(beginning)) + b"\r\n"
    assert str(reply.COMMAND_TOO_LONG) not in greeted().say(fits)
    too_long = beginning + b"x" * (limit - 1 - len(beginning)) + b"\r\n"
    assert greeted().say(too_long) == [str(reply.COMMAND_TOO_LONG)]


def test_an_endless_line_is_answered_once_and_not_kept() -> None:
    dialogue = greeted()
    assert dialogue.say(*[b"x" * 1000] * 50) == [str(reply.COMMAND_TOO_LONG)]
    assert dialogue.engine.buffered <= 1
    assert dialogue.say(b"xx\r\n") == []
    assert dialogue.codes(b"NOOP\r\n") == ["250"]


def test_errors_have_a_budget() -> None:
    dialogue = greeted()
    lines = dialogue.say(*[b"FOO\r\n"] * 20)
    assert lines == [str(reply.COMMAND_UNKNOWN)] * 9 + [str(reply.TOO_MANY_ERRORS)]
    assert dialogue.engine.state is State.CLOSED


def test_commands_that_bring_no_message_nearer_have_a_budget() -> None:
    dialogue = greeted()
    codes = dialogue.codes(*[b"NOOP\r\n"] * 200)
    assert codes == ["250"] * 99 + ["421"]


def test_messages_renew_the_budget() -> None:
    dialogue = greeted()
    for _ in range(150):
        codes = dialogue.codes(b"RSET\r\nMAIL FROM:<a@b.test>\r\nRCPT TO:<c@d.test>\r\nDATA\r\n", b"x\r\n.\r\n")
        assert codes == ["250", "250", "250", "354", "250"]


def test_refused_senders_are_bounded() -> None:
    def no_senders(question: engine.Question) -> Reply | bytes:
        return reply.AUTHENTICATION_REQUIRED if isinstance(question, engine.Mail) else willing(question)

    codes = greeted(answer=no_senders).codes(*[b"MAIL FROM:<a@b.test>\r\n"] * 200)
    assert codes.count("530") <= 101
    assert codes[-1] == "421"


# --- pipelining -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "group",
    [
        b"EHLO client.test\r\nMAIL FROM:<a@b.test>\r\n",
        b"NOOP\r\nNOOP\r\n",
        b"AUTH LOGIN\r\nYXBw\r\nc2VjcmV0\r\n",
        b"MAIL FROM:<a@b.test>\r\nRCPT TO:<c@d.test>\r\nDATA\r\nSubject: x\r\n\r\nbody\r\n.\r\n",
        b"BDAT 5 LAST\r\nQUIT\r\n",
        b"VRFY a\r\nQUIT\r\n",
    ],
)
def test_what_follows_a_command_that_must_be_last_is_refused(group: bytes) -> None:
    dialogue = greeted()
    assert dialogue.say(group)[-1] == str(reply.UNAUTHORIZED_PIPELINING)
    assert dialogue.engine.state is State.CLOSED
    assert dialogue.messages == []
    assert dialogue.say(b"NOOP\r\n") == []


def test_two_messages_in_pipelined_groups() -> None:
    """RFC 2920 section 3.1: the end of the text may be followed by the next group."""
    dialogue = greeted()
    group = b"MAIL FROM:<a@b.test>\r\nRCPT TO:<c@d.test>\r\nDATA\r\n"
    assert dialogue.codes(group) == ["250", "250", "354"]
    assert dialogue.codes(b"one\r\n.\r\n" + group) == ["250", "250", "250", "354"]
    assert dialogue.codes(b"two\r\n.\r\nQUIT\r\n") == ["250", "221"]
    assert dialogue.messages == [b"one\r\n", b"two\r\n"]


def test_nothing_behind_quit_is_run() -> None:
    assert greeted().codes(b"QUIT\r\nNOOP\r\n") == ["221"]


# --- STARTTLS ---------------------------------------------------------------------------------------------------------
def test_starttls_forgets_what_was_said_before() -> None:
    dialogue = greeted(tls=False)
    dialogue.say(b"MAIL FROM:<a@b.test>\r\n")
    assert dialogue.say(b"STARTTLS\r\n") == [str(reply.READY_FOR_TLS)]
    assert dialogue.engine.state is State.TLS
    dialogue.engine.tls_started()
    assert dialogue.say(b"MAIL FROM:<a@b.test>\r\n") == [str(reply.HELLO_FIRST)]
    assert "250-AUTH PLAIN LOGIN" in dialogue.say(b"EHLO client.test\r\n")
    assert dialogue.say(b"STARTTLS\r\n") == [str(reply.TLS_ALREADY_ACTIVE)]


@pytest.mark.parametrize("injected", [b"EHLO evil.test\r\n", b"x", b"\x16\x03\x01"])
def test_nothing_may_follow_starttls(injected: bytes) -> None:
    dialogue = greeted(tls=False)
    assert dialogue.say(b"STARTTLS\r\n" + injected) == [str(reply.TLS_PIPELINED)]
    assert dialogue.engine.state is State.CLOSED


def test_starttls_where_it_is_not_offered_or_malformed() -> None:
    assert greeted(Settings(hostname="relay.test", message_size=1), tls=False).say(b"STARTTLS\r\n") == [
        str(reply.TLS_NOT_OFFERED)
    ]
    assert greeted(tls=False).say(b"STARTTLS now\r\n") == [str(reply.syntax_error("STARTTLS"))]


def test_what_was_authenticated_in_the_clear_does_not_go_on_under_tls() -> None:
    settings = Settings(
        hostname="relay.test", message_size=1, mechanisms=("PLAIN",), start_tls=True, plaintext_authentication=True
    )
    dialogue = greeted(settings, tls=False)
    assert dialogue.codes(b"AUTH PLAIN AGEAYg==\r\n") == ["235"]
    assert dialogue.codes(b"STARTTLS\r\n") == ["503"]


# --- AUTH -------------------------------------------------------------------------------------------------------------
def test_auth_before_tls_is_neither_offered_nor_taken() -> None:
    dialogue = greeted(tls=False)
    assert dialogue.say(b"AUTH PLAIN AGEAYg==\r\n") == [str(reply.TLS_BEFORE_AUTH)]
    assert dialogue.reasons() == [Reason.TLS_REQUIRED]
    assert not any(isinstance(event, engine.Authenticate) for event in dialogue.events)


def test_mechanisms_in_any_case_and_responses_decoded() -> None:
    dialogue = greeted()
    assert dialogue.codes(b"auth plain AGEAYg==\r\n") == ["235"]
    assert engine.Authenticate("PLAIN", b"\0a\0b") in dialogue.events


def test_an_initial_response_may_be_empty() -> None:
    dialogue = greeted()
    dialogue.say(b"AUTH PLAIN =\r\n")
    assert engine.Authenticate("PLAIN", b"") in dialogue.events


def test_challenges_and_responses() -> None:
    dialogue = greeted()
    assert dialogue.say(b"AUTH PLAIN\r\n") == ["334 "]
    assert dialogue.codes(b"AGEAYg==\r\n") == ["235"]
    assert engine.SaslResponse(b"\0a\0b") in dialogue.events


def test_an_asterisk_cancels() -> None:
    dialogue = greeted()
    dialogue.say(b"AUTH PLAIN\r\n")
    assert dialogue.say(b"*\r\n") == [str(reply.AUTHENTICATION_ABORTED)]
    assert dialogue.reasons() == [Reason.AUTHENTICATION_ABORTED]
    assert dialogue.codes(b"NOOP\r\n") == ["250"]


def test_responses_that_are_no_base64() -> None:
    dialogue = greeted()
    dialogue.say(b"AUTH PLAIN\r\n")
    assert dialogue.say(b"AGEA Yg==\r\n") == [str(reply.SASL_SYNTAX)]


@pytest.mark.parametrize("initial", [True, False])
def test_long_responses_fit_and_longer_ones_do_not(initial: bool) -> None:
    fits = base64.b64encode(b"\0a\0" + b"t" * 9213)
    assert len(fits) == 12288
    for response, expected in ((fits, "235"), (fits + b"AAAA" * 200, "500")):
        dialogue = greeted()
        if initial:
            codes = dialogue.codes(b"AUTH PLAIN " + response + b"\r\n")
        else:
            dialogue.say(b"AUTH PLAIN\r\n")
            codes = dialogue.codes(response + b"\r\n")
        assert codes == [expected]
        if expected == "500":
            assert dialogue.codes(b"NOOP\r\n") == ["250"]


# --- DATA -------------------------------------------------------------------------------------------------------------
def test_a_message_with_wrong_line_endings_is_refused_and_what_follows_does_not_run() -> None:
    dialogue = in_data()
    lines = dialogue.say(b"x\n.\nMAIL FROM:<evil@b.test>\r\n\r\n.\r\nMAIL FROM:<evil@b.test>\r\n")
    assert lines == [str(reply.DATA_LINE_ENDING)]
    assert dialogue.engine.state is State.CLOSED
    assert dialogue.messages == []


def test_a_defect_is_known_before_the_end() -> None:
    dialogue = in_data()
    dialogue.say(b"x\n.\n")
    assert dialogue.engine.data_defective


def test_the_answer_to_the_data_ends_the_transaction() -> None:
    def unwilling(question: engine.Question) -> Reply | bytes:
        return reply.QUEUE_FULL if isinstance(question, engine.EndOfData) else willing(question)

    dialogue = in_data()
    dialogue.answer = unwilling
    assert dialogue.codes(b"x\r\n.\r\n") == ["452"]
    assert not dialogue.engine.in_transaction
    assert dialogue.say(b"DATA\r\n") == [str(reply.MAIL_FIRST)]


def test_while_a_question_is_open_nothing_is_taken() -> None:
    machine = Engine(SETTINGS, tls=True)
    machine.receive(b"RSET\r\nRSET\r\n")
    assert isinstance(machine.next_event(), engine.Command)
    assert machine.next_event() is None
    machine.answer(reply.OK)
    assert isinstance(machine.next_event(), engine.Command)


# --- any split --------------------------------------------------------------------------------------------------------
GROUPS = (
    b"EHLO client.test\r\n",
    b"FOO\r\nMAIL FROM:<a@b.test>\r\nRCPT TO:<c@d.test>\r\nRCPT TO:<>\r\nDATA\r\n",
    b"Subject: x\r\n\r\n..dot\r\nbody\r\n.\r\nMAIL FROM:<\xc3\xbc@b.test> SMTPUTF8 BODY=8BITMIME\r\nRSET\r\nNOOP\r\n",
    b"AUTH LOGIN\r\n",
    b"YXBw\r\n",
    b"NO\nOP\r\nNO\rOP\r\n" + b"x" * 600 + b"\n\r\nRSET\r\n",
    b"MAIL FROM:<>\r\nRCPT TO:<c@d.test>\r\nDATA\r\n",
    b"bad\n.\r\n\r\n.\r\nRSET\r\n",
)
"""Each is sent whole once the replies to the one before have been read."""


@given(st.lists(st.lists(st.integers(1, 60), max_size=6), min_size=len(GROUPS), max_size=len(GROUPS)))
def test_any_split_of_the_octets_gives_the_same_replies(cuts: list[list[int]]) -> None:
    whole, split = Dialogue(tls=True), Dialogue(tls=True)
    for group, lengths in zip(GROUPS, cuts, strict=True):
        pieces, rest = [], group
        for length in lengths:
            pieces.append(rest[:length])
            rest = rest[length:]
        assert split.say(*pieces, rest) == whole.say(group)
    assert split.messages == whole.messages == [b"Subject: x\r\n\r\n.dot\r\nbody\r\n"]
    assert split.reasons() == whole.reasons()
    assert whole.engine.state is State.CLOSED


WORDS = st.sampled_from(
    [
        b"EHLO c\r\n",
        b"MAIL FROM:<a@b.test>",
        b"RCPT TO:<",
        b"c@d.test>",
        b"DATA\r\n",
        b"AUTH LOGIN",
        b"YQ==",
        b"*",
        b"\r\n",
        *[b"STARTTLS\r\n", b"RSET\r\n", b" SIZE=", b"=", b"\r", b"\n", b".", b"\0", b"\xff", b"x" * 700, b"BDAT 1\r\n"],
    ]
)


@given(st.lists(st.lists(st.one_of(WORDS, st.binary(max_size=8)), max_size=8).map(b"".join), max_size=30))
def test_whatever_comes_is_answered_in_whole_replies(pieces: list[bytes]) -> None:
    dialogue = Dialogue(tls=True)
    for line in dialogue.say(*pieces):
        assert line[:3].isdigit()
        assert line[3] in " -"
        assert len(line) <= 510
    assert dialogue.engine.buffered <= 12288 + 512
    assert all(b"\0" not in text and text.count(b"\n") == text.count(b"\r\n") for text in dialogue.messages)
