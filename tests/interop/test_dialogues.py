"""The dialogues, played into Mailsluice as a real process, and compared with Postfix, Exim and OpenSMTPD."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping

import pytest

import corpus
import differences
import servers
from corpus import CorpusError, Dialogue, Expect
from player import Answer, play

DIALOGUES = corpus.read()


# --- Mailsluice -------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def mailsluice() -> Iterator[servers.Server]:
    with servers.mailsluice(servers.Certificates.make()) as server:
        yield server


@pytest.mark.parametrize("dialogue", DIALOGUES, ids=lambda dialogue: dialogue.name)
def test_mailsluice_answers_as_expected(mailsluice: servers.Server, dialogue: Dialogue) -> None:
    played = play(dialogue, mailsluice.addresses[dialogue.listener])
    assert played.beginning is None
    expectations = [step for step in dialogue.steps if isinstance(step, Expect)]
    for expected, answer, said in zip(expectations, played.answers, played.said, strict=False):
        assert answer.satisfies(expected), f"after `{said}`: expected {expected.text}, answered {answer}"
    assert len(played.answers) == len(expectations)


def test_there_are_enough_dialogues() -> None:
    assert len(DIALOGUES) >= 415


# --- the other servers ------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def comparisons() -> Mapping[str, differences.Comparison]:
    try:
        return differences.compare_all(DIALOGUES)
    except servers.UnavailableError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))


@pytest.mark.interop
@pytest.mark.parametrize("server", servers.FOREIGN)
def test_every_difference_is_justified(comparisons: Mapping[str, differences.Comparison], server: str) -> None:
    assert [
        f"{each.dialogue.name}: after `{each.said}` expected {each.expected.text}, answered {each.answer}"
        for each in comparisons[server].differences
        if server not in each.dialogue.whys
    ] == []


@pytest.mark.interop
@pytest.mark.parametrize("server", servers.FOREIGN)
def test_nothing_is_justified_that_is_no_difference(
    comparisons: Mapping[str, differences.Comparison], server: str
) -> None:
    differing = {each.dialogue.name for each in comparisons[server].differences}
    assert [each.name for each in DIALOGUES if server in each.whys and each.name not in differing] == []


@pytest.mark.interop
def test_the_page_is_current(comparisons: Mapping[str, differences.Comparison]) -> None:
    assert differences.render(DIALOGUES, comparisons) == differences.PAGE.read_text(), (
        "docs/dialogue-differences.md is not what was measured: make dialogues"
    )


# --- the corpus itself ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "octets"),
    [
        ("NOOP", b"NOOP"),
        (r"a\r\n\0\t\\b", b"a\r\n\0\t\\b"),
        (r"\xff\x2E", b"\xff."),
        ("{a*3}-{xy*2}", b"aaa-xyxy"),
        (r"{\xe9*2}", b"\xe9\xe9"),
        (r"{base64:\0user\0pass}", b"AHVzZXIAcGFzcw=="),
        (r"\{a*3\}", b"{a*3}"),
        ("é", "é".encode()),
    ],
)
def test_what_octets_a_text_stands_for(text: str, octets: bytes) -> None:
    assert corpus.octets(text) == octets


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("C: NOOP\n", "begins with `== title`"),
        ("== a\nC: NOOP\nS: 250\n", "has a rule"),
        ("== a\nRule: RFC 5321 section 4\nC: NOOP\n", "at least one reply"),
        ("== a\nRule: because\nC: NOOP\nS: 250\n", "no RFC"),
        ("== a\nRule: RFC 5321 section 4\nWhy exim: it is old\nC: NOOP\nS: 250\n", "no RFC"),
        ("== a\nRule: RFC 5321 section 4\nC: NOOP\nS: fine\n", "not a reply"),
        ("== a\nRule: RFC 5321 section 4\nState: login\nC: NOOP\nS: 250\n", "no state login of a listener open"),
        ("== a\nRule: RFC 5321 section 4\nNOOP\n", "neither a line"),
    ],
)
def test_a_dialogue_that_cannot_be_read_is_refused(text: str, message: str) -> None:
    with pytest.raises(CorpusError, match=message):
        list(corpus.parse("topic", text))


def test_lines_in_a_row_leave_in_one_write() -> None:
    (dialogue,) = corpus.parse("t", "== a\nRule: RFC 2920 section 3.1\nC: A\nC+ B\nS: 250\nC*2: C{#}\nS*2: 250\n")
    sent = [step.octets for step in dialogue.steps if isinstance(step, corpus.Send)]
    assert sent == [b"A\r\nB", b"C1\r\nC2\r\n"]
    assert len(dialogue.steps) == 5


@pytest.mark.parametrize(
    ("expected", "answer", "satisfied"),
    [
        ("250", Answer("250", ("2.0.0 OK",)), True),
        ("250 2.0.0", Answer("250", ("2.0.0 OK",)), True),
        ("250 2.0.0", Answer("250", ("2.0.1 OK",)), False),
        ("250 2.0.0", Answer("250", ("OK",)), False),
        ("5.. 5.5.1", Answer("503", ("5.5.1 no",)), True),
        ("5..", Answer("450", ("4.7.1 no",)), False),
        ("250 +SIZE +AUTH PLAIN -STARTTLS", Answer("250", ("relay.test", "SIZE 1", "AUTH PLAIN LOGIN")), True),
        ("250 +SIZE -STARTTLS", Answer("250", ("relay.test", "SIZE 1", "STARTTLS")), False),
        ("250 +SIZE", Answer("250", ("relay.test",)), False),
        ("closed", Answer("closed"), True),
        ("closed", Answer("silent"), False),
        ("250", Answer("closed"), False),
    ],
)
def test_what_answer_satisfies_an_expectation(expected: str, answer: Answer, satisfied: bool) -> None:
    (dialogue,) = corpus.parse("t", f"== a\nRule: RFC 5321 section 4\nC: NOOP\nS: {expected}\n")
    expectation = dialogue.steps[-1]
    assert isinstance(expectation, Expect)
    assert answer.satisfies(expectation) is satisfied
