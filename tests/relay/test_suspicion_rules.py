"""Each rule hits what it is for and leaves alone what resembles it."""

import base64
from collections.abc import Callable
from email.message import EmailMessage

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mailsluice_relay.config import ConfigurationError, Spam, SpamRule
from mailsluice_relay.envelope import Mailbox
from mailsluice_relay.reply import SUSPICION_REASONS, Reason
from mailsluice_relay.smtp import header
from mailsluice_relay.suspicion import mime
from mailsluice_relay.suspicion.behaviour import Behaviour, Volume
from mailsluice_relay.suspicion.rules import RULES, Judge, Mail, Opinion

DEFAULT = Judge(Spam())


def of_example_test(mailbox: Mailbox) -> bool:
    return mailbox.domain == "example.test"


def mail(
    text: bytes | EmailMessage,
    *,
    behaviour: Behaviour | None = None,
    recipients: int = 1,
    network: str = "192.0.2.0/24",
    now: float = 0.0,
    owns: Callable[[Mailbox], bool] = of_example_test,
) -> Mail:
    octets = text if isinstance(text, bytes) else text.as_bytes()
    head, _, body = octets.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n").partition(b"\r\n\r\n")
    fields = header.parse(head + b"\r\n")
    return Mail(
        fields=fields,
        body=body,
        authors=header.authors(fields, internationalized=False),
        owns=owns,
        recipients=recipients,
        network=network,
        now=now,
        behaviour=behaviour or Behaviour(),
    )


def letter(
    text: str = "Dear all,\n\nthe meeting is at noon, in the usual room.\n", subtype: str = "plain"
) -> EmailMessage:
    message = EmailMessage()
    message["From"] = "Ann <ann@example.test>"
    message["Subject"] = "Meeting"
    message.set_content(text, subtype=subtype)
    return message


def attached(filename: str, octets: bytes = b"harmless", maintype: str = "application") -> EmailMessage:
    message = letter()
    message.add_attachment(octets, maintype=maintype, subtype="octet-stream", filename=filename)
    return message


def reasons(opinion: Opinion) -> set[Reason]:
    return {hit.reason for hit in opinion.hits}


def test_a_plain_letter_hits_nothing() -> None:
    opinion = DEFAULT.opinion(mail(letter()))
    assert opinion == Opinion()
    assert opinion.reason is Reason.ACCEPTED


# --- the table ------------------------------------------------------------------------------------------------------


def test_every_rule_has_its_reason() -> None:
    assert len({rule.reason for rule in RULES.values()}) == len(RULES)
    assert {rule.reason for rule in RULES.values()} <= SUSPICION_REASONS


def test_an_unknown_rule_is_an_error() -> None:
    with pytest.raises(ConfigurationError, match="no rule linkShortner; known are"):
        Judge(Spam(rules={"linkShortner": SpamRule(score=1)}))


def test_a_score_of_nothing_switches_a_rule_off() -> None:
    rules = {name: SpamRule(score=0) for name in RULES}
    assert Judge(Spam(rules=rules)).rules == ()
    assert DEFAULT.opinion(mail(attached("a.exe"))).hits
    assert not Judge(Spam(rules=rules)).opinion(mail(attached("a.exe"))).hits


def test_without_settings_all_rules_apply_with_their_defaults() -> None:
    assert set(DEFAULT.rules) == set(RULES)


def test_what_a_setting_leaves_out_is_the_default() -> None:
    judge = Judge(Spam(rules={"recipientBurst": SpamRule(score=9, limit=5)}))
    hit = judge.opinion(mail(letter(), recipients=6)).hits[0]
    assert (hit.score, hit.observed, hit.threshold) == (9, "6 recipients", "5 in 60 s")


@pytest.mark.parametrize(
    ("score", "expected"),
    [
        (4.9, (False, False, False)),
        (5.0, (True, False, False)),
        (12.0, (True, True, False)),
        (20.0, (True, False, True)),
    ],
)
def test_thresholds(score: float, expected: tuple[bool, bool, bool]) -> None:
    judge = Judge(Spam(suspect_at=5, hold_at=12, reject_at=20, rules={"executableAttachment": SpamRule(score=score)}))
    opinion = judge.opinion(mail(attached("a.exe")))
    assert (opinion.suspected, opinion.held, opinion.rejected) == expected
    assert opinion.score == score


def test_scores_add_up_and_the_heaviest_gives_the_reason() -> None:
    message = attached("a.exe")
    message.replace_header("From", '"boss@corp.test" <ann@example.test>')
    opinion = DEFAULT.opinion(mail(message))
    assert opinion.score == 14
    assert opinion.reason is Reason.EXECUTABLE_ATTACHMENT
    assert reasons(opinion) == {Reason.EXECUTABLE_ATTACHMENT, Reason.FORGED_HEADER_FROM}


def test_by_default_mail_is_marked_and_neither_held_nor_rejected() -> None:
    opinion = DEFAULT.opinion(mail(attached("a.exe")))
    assert opinion.suspected
    assert not opinion.held
    assert not opinion.rejected


# --- forged_header_from ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ('"boss@corp.test" <ann@example.test>', True),
        ("=?utf-8?q?boss=40corp.test?= <ann@example.test>", True),
        ("ann@example.test (boss@corp.test)", True),
        ('"The Boss <boss@corp.test>" <ann@example.test>', True),
        ('"support@example.test" <ann@example.test>', False),
        ("Ann at corp.test <ann@example.test>", False),
        ("Ann <ann@example.test>", False),
        ("Boss <boss@corp.test>", True),  # ownership Log let it through
    ],
)
def test_forged_header_from(value: str, expected: bool) -> None:
    text = f"From: {value}\r\n\r\nhello".encode()
    assert (Reason.FORGED_HEADER_FROM in reasons(DEFAULT.opinion(mail(text)))) is expected


def test_an_address_of_ours_may_be_shown() -> None:
    text = b'From: "help@other.test" <ann@example.test>\r\n\r\nhello'
    assert reasons(DEFAULT.opinion(mail(text, owns=lambda mailbox: True))) == set()


# --- behaviour ------------------------------------------------------------------------------------------------------


def test_recipient_burst() -> None:
    behaviour = Behaviour()
    opinions = [
        DEFAULT.opinion(
            mail(
                letter(f"{'x' * number} a letter of its own to each of them\n"),
                behaviour=behaviour,
                recipients=50,
                now=1.0,
            )
        )
        for number in range(5)
    ]
    assert [Reason.RECIPIENT_BURST in reasons(opinion) for opinion in opinions] == [False] * 4 + [True]
    later = DEFAULT.opinion(mail(letter(), behaviour=behaviour, now=120.0))
    assert reasons(later) == set()


def test_new_networks() -> None:
    behaviour = Behaviour()
    seen = [
        reasons(DEFAULT.opinion(mail(letter(), behaviour=behaviour, network=f"10.0.{number}.0/24", now=number)))
        for number in range(6)
    ]
    assert seen == [set()] * 5 + [{Reason.NEW_NETWORKS}]
    again = mail(letter(), behaviour=behaviour, network="10.0.0.0/24", now=4000.0)
    assert reasons(DEFAULT.opinion(again)) == set()


def test_same_body_fan_out_sees_through_numbers_blanks_and_case() -> None:
    behaviour = Behaviour()
    texts = [f"Dear customer {number},\n\n  you have WON {number} Dollars, click now.\n" for number in range(51)]
    texts = [text.upper() if number % 2 else text for number, text in enumerate(texts)]
    seen = [reasons(DEFAULT.opinion(mail(letter(text), behaviour=behaviour, now=1.0))) for text in texts]
    assert seen == [set()] * 50 + [{Reason.SAME_BODY_FAN_OUT}]


def test_different_letters_and_tiny_ones_are_no_fan_out() -> None:
    behaviour = Behaviour()
    words = [chr(97 + number // 26) + chr(97 + number % 26) for number in range(60)]
    for word in words:
        text = f"A letter about {word * 3}, which no other letter is about at all.\n"
        assert reasons(DEFAULT.opinion(mail(letter(text), behaviour=behaviour))) == set()
        assert reasons(DEFAULT.opinion(mail(letter("OK\n"), behaviour=behaviour))) == set()


def test_the_boundary_of_a_multipart_does_not_make_another_body() -> None:
    behaviour = Behaviour()
    judge = Judge(Spam(rules={"sameBodyFanOut": SpamRule(score=5, limit=1, window=60)}))
    judge.opinion(mail(attached("a.txt"), behaviour=behaviour))
    assert judge.opinion(mail(attached("a.txt"), behaviour=behaviour)).hits


# --- content --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("see https://bit.ly/abc", True),
        ("see HTTP://WWW.TinyURL.com/abc", True),
        ("see https://user:x@bit.ly/abc", True),
        ("see https://notbit.ly/abc", False),
        ("see https://bit.ly.example.test/abc", False),
        ("see https://example.test/?u=bit.ly", False),
        ("bit.ly is a shortener", False),
    ],
)
def test_link_shortener(text: str, expected: bool) -> None:
    assert (Reason.LINK_SHORTENER in reasons(DEFAULT.opinion(mail(letter(text))))) is expected


@pytest.mark.parametrize("encoding", ["base64", "quoted-printable"])
def test_a_link_is_found_through_its_transfer_encoding(encoding: str) -> None:
    message = letter()
    message.clear_content()
    message.set_content("see <a href='https://bit.ly/abc'>=this</a> ü", subtype="html", cte=encoding)
    assert Reason.LINK_SHORTENER in reasons(DEFAULT.opinion(mail(message)))


@pytest.mark.parametrize(
    ("filename", "octets", "expected"),
    [
        ("invoice.exe", b"harmless", True),
        ("invoice.pdf.EXE", b"harmless", True),
        ("invoice.exe. . ", b"harmless", True),
        ("пример.js", b"harmless", True),
        ("invoice.pdf", b"MZ\x90\x00", True),
        ("a.bin", b"\x7fELF\x02", True),
        ("invoice.pdf", b"%PDF-1.7", False),
        ("exe", b"harmless", False),
        ("executable.txt", b"about MZ", False),
    ],
)
def test_executable_attachment(filename: str, octets: bytes, expected: bool) -> None:
    found = reasons(DEFAULT.opinion(mail(attached(filename, octets))))
    assert (Reason.EXECUTABLE_ATTACHMENT in found) is expected


def test_a_text_that_begins_like_a_program_is_a_text() -> None:
    assert reasons(DEFAULT.opinion(mail(letter("MZ is what DOS programs begin with.\n")))) == set()


def test_an_encoded_word_does_not_hide_a_name() -> None:
    name = base64.b64encode(b"evil.exe").decode()
    text = (
        "From: ann@example.test\r\nContent-Type: multipart/mixed; boundary=b\r\n\r\n--b\r\n"
        f'Content-Type: application/pdf; name="=?utf-8?b?{name}?="\r\n\r\nx\r\n--b--\r\n'
    )
    assert Reason.EXECUTABLE_ATTACHMENT in reasons(DEFAULT.opinion(mail(text.encode())))


def nested(depth: int) -> bytes:
    text = b"Content-Type: application/octet-stream; name=a.exe\r\n\r\nx\r\n"
    for level in range(depth):
        text = b"Content-Type: multipart/mixed; boundary=b%d\r\n\r\n--b%d\r\n%s\r\n--b%d--\r\n" % (
            level,
            level,
            text,
            level,
        )
    return b"From: ann@example.test\r\n" + text


@pytest.mark.parametrize("depth", [1, 9, 10, 11, 40, 500])
def test_nesting_does_not_hide_an_attachment(depth: int) -> None:
    assert Reason.EXECUTABLE_ATTACHMENT in reasons(DEFAULT.opinion(mail(nested(depth))))


def test_a_forwarded_message_is_looked_into() -> None:
    inner = attached("a.scr")
    outer = letter()
    outer.add_attachment(inner)
    assert Reason.EXECUTABLE_ATTACHMENT in reasons(DEFAULT.opinion(mail(outer)))


MULTIPART = header.parse(b"Content-Type: multipart/mixed; boundary=b\r\n")


def test_the_number_of_parts_is_bounded() -> None:
    body = b"--b\r\n\r\nx\r\n" * 10_000
    assert len(list(mime.parts(MULTIPART, body))) < mime.MAXIMUM_PARTS


PIECES = st.sampled_from(
    [
        *(b"Content-Type: ", b"multipart/mixed", b"; boundary=b", b"message/rfc822", b"; name*0*=utf-8''", b"\r\n"),
        *(b"; filename*=", b"utf-8'x'%ff", b'"', b"--b", b"--b--", b"\r\n\r\n", b"Content-Disposition: attachment"),
        *(b"Content-Transfer-Encoding: base64\r\n", b"=?utf-8?b?!?=", b"\xff", b"AAAA", b"=", b" ", b"=?x?q?=ff?="),
    ]
)


@settings(deadline=None)  # other work on the machine is no fault of the code
@given(st.lists(PIECES, max_size=40).map(b"".join))
def test_any_octets_have_parts(body: bytes) -> None:
    for part in mime.parts(MULTIPART, b"--b\r\n" + body):
        assert len(part.decoded(16)) <= 16


# --- recipients that do not exist -----------------------------------------------------------------------------------


def unknown(settled: int, missing: int, *, after: float = 1.0, **given: float) -> list[str]:
    """What the rule says of a message that comes `after` the outcomes of others."""
    judge = Judge(Spam(rules={"unknownRecipients": SpamRule(score=8, **given)}))  # type: ignore[arg-type] - by name
    behaviour = Behaviour()
    judge.learn(behaviour, settled, missing, 0.0)
    return [hit.observed for hit in judge.opinion(mail(letter(), behaviour=behaviour, now=after)).hits]


def test_a_list_of_which_too_many_do_not_exist() -> None:
    assert unknown(100, 30) == ["30 of 100 recipients unknown"]
    assert unknown(100, 29) == []
    assert unknown(100, 10, percent=10) == ["10 of 100 recipients unknown"]


def test_a_share_of_few_means_nothing() -> None:
    assert unknown(19, 19) == []
    assert unknown(20, 20) == ["20 of 20 recipients unknown"]
    assert unknown(19, 19, minimum=10) == ["19 of 19 recipients unknown"]


def test_unknown_recipients_are_forgotten_with_the_window() -> None:
    assert unknown(100, 100, after=3000.0) != []
    assert unknown(100, 100, after=3700.0) == []


def test_nobody_has_unknown_recipients_before_anything_is_known() -> None:
    assert unknown(0, 0, minimum=1, percent=0) == []


def test_a_rule_that_is_off_learns_nothing() -> None:
    off = Judge(Spam(rules={"unknownRecipients": SpamRule(score=0)}))
    behaviour = Behaviour()
    off.learn(behaviour, 100, 100, 0.0)
    assert DEFAULT.opinion(mail(letter(), behaviour=behaviour)).hits == ()


# --- more than usual ------------------------------------------------------------------------------------------------

HOUR = 3600.0
DAY = 24 * HOUR


def anomalies(hours: dict[float, int], **given: float) -> set[float]:
    """The hours, of those with so many recipients each, in which the rule hits."""
    judge = Judge(Spam(rules={"volumeAnomaly": SpamRule(score=4, **given)}))  # type: ignore[arg-type] - by name
    behaviour = Behaviour()
    return {
        hour
        for hour, count in sorted(hours.items())
        if judge.opinion(mail(letter(), behaviour=behaviour, recipients=count, now=hour * HOUR)).hits
    }


def nights(days: range, count: int) -> dict[float, int]:
    """A batch every night at three."""
    return {day * 24 + 3: count for day in days}


def test_far_more_than_usual_is_seen() -> None:
    assert anomalies({**nights(range(10), 1000), 10 * 24 + 12: 5000}) == {10 * 24 + 12}


def test_a_regular_batch_is_usual_and_so_is_a_little_more() -> None:
    assert anomalies({**nights(range(30), 1000), 31 * 24 + 3: 2000}) == set()


def test_days_without_mail_do_not_make_a_newsletter_unusual() -> None:
    assert anomalies({month * 30 * 24.0: 5000 for month in range(12)}) == set()


def test_nothing_is_unusual_before_three_days_with_mail() -> None:
    assert anomalies({**nights(range(3), 10), 2 * 24 + 12: 5000}) == set()
    assert anomalies({**nights(range(3), 10), 3 * 24 + 12: 5000}) == {3 * 24 + 12}


def test_few_are_never_unusual() -> None:
    assert anomalies({**nights(range(10), 1), 10 * 24 + 12: 50}) == set()
    assert anomalies({**nights(range(10), 1), 10 * 24 + 12: 51}) == {10 * 24 + 12}


def test_who_floods_for_a_day_does_not_make_that_usual() -> None:
    flood = {10 * 24.0: 100_000, 11 * 24.0: 100_000}
    assert anomalies({**nights(range(10), 1000), **flood}) == set(flood)


def test_growth_becomes_usual() -> None:
    """A tenth more every day, twenty times as much in a month."""
    assert anomalies({day * 24.0: int(1000 * 1.1**day) for day in range(32)}) == set()


def test_the_deviations_are_a_setting() -> None:
    hours = {**nights(range(10), 1000), 10 * 24 + 12: 2000}
    assert anomalies(hours) == set()
    assert anomalies(hours, deviations=3) == {10 * 24 + 12}


@given(st.lists(st.tuples(st.floats(0, 100 * DAY), st.integers(1, 10_000)), max_size=60))
def test_every_message_counts_in_its_hour(messages: list[tuple[float, int]]) -> None:
    volume = Volume()
    hours: dict[int, int] = {}
    for now, amount in sorted(messages):
        hour = int(now / HOUR)
        hours[hour] = hours.get(hour, 0) + amount
        assert volume.add(amount, now) == hours[hour]
