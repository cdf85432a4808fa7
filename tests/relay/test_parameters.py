"""Parameters of MAIL and RCPT, and the replies to wrong ones."""

from __future__ import annotations

import pytest

from mailsluice_relay.envelope import BodyType, Envelope, Mailbox, Notify, Recipient
from mailsluice_relay.smtp.parameters import ParameterError, parse_mail, parse_rcpt

SENDER = Mailbox("a", "b.test")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", Envelope(SENDER)),
        (" SIZE=1000", Envelope(SENDER, declared_size=1000)),
        (" size=0", Envelope(SENDER, declared_size=0)),
        (" BODY=8BITMIME", Envelope(SENDER, body=BodyType.EIGHT_BIT_MIME)),
        (" body=7bit", Envelope(SENDER, body=BodyType.SEVEN_BIT)),
        (" SMTPUTF8", Envelope(SENDER, internationalized=True)),
        (" RET=hdrs", Envelope(SENDER, ret="HDRS")),
        (" ENVID=AbC+20xyz", Envelope(SENDER, envid="AbC+20xyz")),
        (" AUTH=<>", Envelope(SENDER)),
        (" AUTH=e+3Dmc2@example.test", Envelope(SENDER)),
        ("  SIZE=1   BODY=8BITMIME", Envelope(SENDER, declared_size=1, body=BodyType.EIGHT_BIT_MIME)),
    ],
)
def test_mail(text: str, expected: Envelope) -> None:
    assert parse_mail(f"FROM:<a@b.test>{text}") == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", Recipient(SENDER)),
        (" NOTIFY=NEVER", Recipient(SENDER, notify=Notify.NEVER)),
        (" notify=success,Failure", Recipient(SENDER, notify=Notify.SUCCESS | Notify.FAILURE)),
        (" ORCPT=rfc822;AbC+2Bd@b.test", Recipient(SENDER, original="rfc822;AbC+2Bd@b.test")),
        (" ORCPT=utf-8;grüße@b.test", Recipient(SENDER, original="utf-8;grüße@b.test")),
        (" ORCPT=utf-8;gr\\x{FC}e@b.test", Recipient(SENDER, original="utf-8;gr\\x{FC}e@b.test")),
    ],
)
def test_rcpt(text: str, expected: Recipient) -> None:
    assert parse_rcpt(f"TO:<a@b.test>{text}") == expected


@pytest.mark.parametrize("argument", ["FROM: <a@b.test>", "from:<a@b.test>"])
def test_the_spellings_of_from_that_clients_use(argument: str) -> None:
    assert parse_mail(argument) == Envelope(SENDER)


@pytest.mark.parametrize(
    "text",
    [
        " SIZE",
        " SIZE=",
        " SIZE=-1",
        " SIZE=1k",
        " SIZE=١",  # digits, but not SMTP's
        " SIZE=123456789012345678901",
        " SIZE=1 SIZE=1",
        " BODY=BINARYMIME",
        " BODY",
        " SMTPUTF8=yes",
        " RET=ALL",
        " RET",
        f" ENVID={'x' * 101}",
        " ENVID=a=b",
        " ENVID=a+2",
        " ENVID=a+2b",  # RFC 3461 section 4: hexchar is in capitals
        " AUTH",
        " AUTH=a=b",
        " =1",
        " -X=1",
        "SIZE=1",
    ],
)
def test_wrong_values_of_mail(text: str) -> None:
    with pytest.raises(ParameterError) as caught:
        parse_mail(f"FROM:<a@b.test>{text}")
    assert (caught.value.reply.code, caught.value.reply.status) == (501, "5.5.4")


@pytest.mark.parametrize(
    "text",
    [
        " NOTIFY",
        " NOTIFY=NEVER,SUCCESS",
        " NOTIFY=SUCCESS,SUCCESS",
        " NOTIFY=SUCCESS,",
        " NOTIFY=ALWAYS",
        " NOTIFY=NEVER NOTIFY=NEVER",
        " ORCPT",
        " ORCPT=rfc822",
        " ORCPT=rfc822;",
        " ORCPT=;a@b.test",
        " ORCPT=rfc822;a=b",
        " ORCPT=rfc822;grüße@b.test",
        f" ORCPT=rfc822;{'x' * 500}",
    ],
)
def test_wrong_values_of_rcpt(text: str) -> None:
    with pytest.raises(ParameterError) as caught:
        parse_rcpt(f"TO:<a@b.test>{text}")
    assert (caught.value.reply.code, caught.value.reply.status) == (501, "5.5.4")


def test_unknown_parameters_have_a_reply_of_their_own() -> None:
    """RFC 5321 section 4.1.1.11."""
    for parse, argument in ((parse_mail, "FROM:<a@b.test> NOTIFY=NEVER"), (parse_rcpt, "TO:<a@b.test> SIZE=1")):
        with pytest.raises(ParameterError) as caught:
            parse(argument)
        assert (caught.value.reply.code, caught.value.reply.status) == (555, "5.5.4")


@pytest.mark.parametrize(
    ("parse", "argument"), [(parse_mail, "TO:<a@b.test>"), (parse_mail, ""), (parse_rcpt, "<a@b.test>")]
)
def test_a_missing_keyword_is_a_syntax_error(parse: object, argument: str) -> None:
    assert callable(parse)
    with pytest.raises(ParameterError) as caught:
        parse(argument)
    assert caught.value.reply.code == 501
