"""The dialogue with an upstream, on real sockets, under asyncio and uvloop."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Any

import pytest
import trustme

from mailsluice_relay.config import UpstreamTLSMode
from mailsluice_relay.delivery.client import Connection, Mail, Timeouts, connect
from mailsluice_relay.delivery.outcome import Delivered, Failed, FailureClass, Fault, Retry, Stage
from mailsluice_relay.delivery.target import Login, Target
from mailsluice_relay.envelope import BodyType, Content, Mailbox, Notify, Recipient
from mailsluice_relay.spool.content import FileBody, MemoryBody

SHORT = Timeouts(connect=2, greeting=0.3, command=0.3, data=0.3, block=0.5, end_of_data=0.3, quit=0.3)


def target(upstream: Any, **fields: Any) -> Target:
    settings = {"host": "127.0.0.1", "tls": UpstreamTLSMode.PLAIN, "hostname": "relay.test", **fields}
    return Target(name="up", port=upstream.port, **settings)


def mail(*to: str, body: bytes = b"Hello.\r\n", header: bytes = b"Subject: x\r\n", **fields: Any) -> Mail:
    recipients = [Recipient(Mailbox(*address.rsplit("@", 1))) for address in to or ("a@x.test",)]
    settings = {
        "sender": Mailbox("app", "example.test"),
        "recipients": recipients,
        "content": Content(header, MemoryBody(body)),
        **fields,
    }
    return Mail(**settings)


async def opened(upstream: Any, **fields: Any) -> Connection:
    return await connect(target(upstream, **fields), SHORT)


# --- the text ---
@pytest.mark.parametrize(
    "body",
    [b"plain\r\n", b"", b".\r\n", b"..\r\n.a\r\n\r\n.\r\nb\r\n", b"no end", "ü\r\n".encode("latin-1")],
)
async def test_the_text_arrives_as_it_was_taken(make_upstream: Any, body: bytes) -> None:
    upstream = await make_upstream()
    connection = await opened(upstream)
    assert [type(o) for o in await connection.send(mail(body=body))] == [Delivered]
    ended = body if body.endswith(b"\r\n") or not body else body + b"\r\n"
    assert upstream.texts() == [b"Subject: x\r\n\r\n" + ended]
    await connection.quit()


async def test_a_large_body_is_streamed_from_its_file(make_upstream: Any, tmp_path: Path) -> None:
    body = (b".dot\r\n" + b"x" * 61 + b"\r\n") * 40_000
    (tmp_path / "body").write_bytes(body)
    upstream = await make_upstream()
    connection = await opened(upstream)
    content = Content(b"Subject: x\r\n", FileBody(tmp_path / "body", len(body), temporary=False))
    assert [type(o) for o in await connection.send(mail(content=content))] == [Delivered]
    assert upstream.texts() == [b"Subject: x\r\n\r\n" + body]
    await connection.quit()


# --- pipelining and replies per recipient ---
@pytest.mark.parametrize("extensions", [("PIPELINING",), ()])
async def test_each_recipient_has_the_answer_of_its_own(make_upstream: Any, extensions: tuple[str, ...]) -> None:
    upstream = await make_upstream(
        extensions=extensions,
        answers={"RCPT TO:<no@x.test>": "550 5.1.1 unknown", "RCPT TO:<later@x.test>": "451 4.2.0 busy"},
    )
    connection = await opened(upstream)
    outcomes = await connection.send(mail("a@x.test", "no@x.test", "later@x.test", "b@x.test"))
    assert [type(o) for o in outcomes] == [Delivered, Failed, Retry, Delivered]
    assert isinstance(outcomes[1], Failed)
    assert (outcomes[1].failure, outcomes[1].status) == (FailureClass.MAILBOX, "5.1.1")
    assert upstream.received[0].recipients == ["RCPT TO:<a@x.test>", "RCPT TO:<b@x.test>"]
    assert connection.is_usable
    await connection.quit()


@pytest.mark.parametrize("extensions", [("PIPELINING",), ()])
@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ({"MAIL": ["550 5.7.1 not you"]}, (Failed, Stage.MAIL, FailureClass.POLICY)),
        ({"RCPT": ["550 5.1.1 no"]}, (Failed, Stage.RECIPIENT, FailureClass.MAILBOX)),
        ({"RCPT": ["550 5.1.1 no"], "DATA": ["354 all the same"]}, (Failed, Stage.RECIPIENT, FailureClass.MAILBOX)),
        ({"DATA": ["451 4.3.0 not now"]}, (Retry, Stage.DATA, FailureClass.UNAVAILABLE)),
        ({".": ["554 5.6.0 no such content"]}, (Failed, Stage.END_OF_DATA, FailureClass.MESSAGE)),
        ({".": ["452 4.2.2 full"]}, (Retry, Stage.END_OF_DATA, FailureClass.MAILBOX)),
    ],
)
async def test_after_a_refusal_the_connection_takes_the_next_mail(
    make_upstream: Any, extensions: tuple[str, ...], answers: dict[str, list[str]], expected: tuple[Any, ...]
) -> None:
    upstream = await make_upstream(extensions=extensions, answers={k: list(v) for k, v in answers.items()})
    connection = await opened(upstream)
    (outcome,) = await connection.send(mail(body=b"first\r\n"))
    assert (type(outcome), outcome.stage, outcome.failure) == expected  # type: ignore[union-attr] - see expected
    assert connection.is_usable
    assert [type(o) for o in await connection.send(mail(body=b"second\r\n"))] == [Delivered]
    assert upstream.texts() == [b"Subject: x\r\n\r\nsecond\r\n"]
    await connection.quit()


# --- parameters ---
async def test_parameters_go_to_servers_that_offer_them(make_upstream: Any) -> None:
    upstream = await make_upstream()
    connection = await opened(upstream)
    await connection.send(
        mail(
            recipients=[
                Recipient(Mailbox("a", "x.test"), Notify.SUCCESS | Notify.DELAY, "rfc822;A+40x.test"),
                Recipient(Mailbox("b", "x.test"), Notify.NEVER),
            ],
            body=b"8\r\n",
            ret="HDRS",
            envid="QQ+3D",
        )
    )
    await connection.send(mail("jörg@x.test", content=Content(b"Subject: x\r\n", MemoryBody(b"")), sender=None))
    first, second = upstream.received
    assert first.mail == "MAIL FROM:<app@example.test> SIZE=17 RET=HDRS ENVID=QQ+3D"
    assert first.recipients == [
        "RCPT TO:<a@x.test> NOTIFY=SUCCESS,DELAY ORCPT=rfc822;A+40x.test",
        "RCPT TO:<b@x.test> NOTIFY=NEVER",
    ]
    assert second.mail == "MAIL FROM:<> SIZE=14 SMTPUTF8"
    assert second.recipients == ["RCPT TO:<jörg@x.test>"]
    await connection.quit()


async def test_a_server_without_extensions_gets_bare_commands(make_upstream: Any) -> None:
    upstream = await make_upstream(extensions=())
    connection = await opened(upstream)
    recipient = Recipient(Mailbox("a", "x.test"), Notify.SUCCESS, "rfc822;a")
    content = Content(b"Subject: x\r\n", MemoryBody(b"\xfc\r\n"))
    sender = Mailbox("app", "example.test")
    outcome = await connection.send(Mail(sender, [recipient], content, BodyType.EIGHT_BIT_MIME))
    assert upstream.received[0].mail == "MAIL FROM:<app@example.test>"
    assert upstream.received[0].recipients == ["RCPT TO:<a@x.test>"]
    assert upstream.texts() == [b"Subject: x\r\n\r\n\xfc\r\n"]  # as it is: a conversion would break signatures
    assert isinstance(outcome[0], Delivered)
    assert not outcome[0].notifies
    await connection.quit()


async def test_an_internationalized_address_fails_where_smtputf8_is_not_offered(make_upstream: Any) -> None:
    upstream = await make_upstream(extensions=("PIPELINING",))
    connection = await opened(upstream)
    outcomes = await connection.send(mail("jörg@x.test", "a@x.test"))
    assert isinstance(outcomes[0], Failed)
    assert outcomes[0].status == "5.6.7"
    assert isinstance(outcomes[1], Delivered)
    (whole,) = await connection.send(mail(sender=Mailbox("jörg", "x.test")))
    assert isinstance(whole, Failed)
    assert whole.status == "5.6.7"
    await connection.quit()


async def test_a_message_over_the_servers_size_is_not_even_offered(make_upstream: Any) -> None:
    upstream = await make_upstream(extensions=("SIZE 100",))
    connection = await opened(upstream)
    (outcome,) = await connection.send(mail(body=b"x" * 200))
    assert isinstance(outcome, Failed)
    assert (outcome.failure, outcome.status) == (FailureClass.MESSAGE, "5.3.4")
    assert upstream.commands == ["EHLO relay.test"]
    await connection.quit()


async def test_a_line_break_in_an_address_never_reaches_the_wire(make_upstream: Any) -> None:
    upstream = await make_upstream()
    connection = await opened(upstream)
    with pytest.raises(ValueError, match="line break"):
        await connection.send(mail(recipients=[Recipient(Mailbox("a>\r\nRCPT TO:<b", "x.test"))]))
    assert upstream.commands == ["EHLO relay.test"]
    connection.abort()


# --- faults ---
@pytest.mark.parametrize(
    ("answers", "stage"),
    [
        ({"MAIL": "close"}, Stage.MAIL),
        ({"RCPT": "close"}, Stage.RECIPIENT),
        ({"DATA": "close"}, Stage.DATA),
        ({".": "close"}, Stage.END_OF_DATA),
        ({"MAIL": "hang"}, Stage.MAIL),
        ({"DATA": "hang"}, Stage.DATA),
        ({".": "hang"}, Stage.END_OF_DATA),
        ({"MAIL": "not smtp at all"}, Stage.MAIL),
        ({".": "354 what now"}, Stage.END_OF_DATA),
    ],
)
async def test_whatever_breaks_off_is_tried_again(make_upstream: Any, answers: dict[str, str], stage: Stage) -> None:
    upstream = await make_upstream(answers=answers)
    connection = await opened(upstream)
    outcomes = await connection.send(mail("a@x.test", "b@x.test"))
    for outcome in outcomes:
        assert isinstance(outcome, Retry)
        assert (outcome.stage, outcome.failure) == (stage, FailureClass.CONNECTION)
    assert connection.is_usable is (answers == {".": "354 what now"})
    connection.abort()


async def test_421_in_the_middle_of_a_pipeline(make_upstream: Any) -> None:
    """The first recipient's refusal is final; the others, and the mail, come again."""
    upstream = await make_upstream(answers={"RCPT TO:<no@x.test>": "550 5.1.1 no", "RCPT": "421 4.3.2 bye"})
    connection = await opened(upstream)
    outcomes = await connection.send(mail("no@x.test", "a@x.test", "b@x.test"))
    assert [type(o) for o in outcomes] == [Failed, Retry, Retry]
    assert not connection.is_usable
    connection.abort()


@pytest.mark.parametrize(
    ("settings", "failure", "stage"),
    [
        ({"greeting": "554 5.7.1 no mail from you"}, FailureClass.UNAVAILABLE, Stage.GREETING),
        ({"greeting": "421 4.7.0 too many connections"}, FailureClass.THROTTLED, Stage.GREETING),
        ({"greeting": "hang"}, FailureClass.CONNECTION, Stage.GREETING),
        ({"greeting": "HTTP/1.1 400 Bad Request"}, FailureClass.CONNECTION, Stage.GREETING),
        (
            {"answers": {"EHLO": "550 5.7.1 go away", "HELO": "550 5.7.1 go away"}},
            FailureClass.UNAVAILABLE,
            Stage.HELLO,
        ),
    ],
)
async def test_a_session_that_cannot_begin_is_the_upstreams_fault(
    make_upstream: Any, settings: dict[str, Any], failure: FailureClass, stage: Stage
) -> None:
    upstream = await make_upstream(**settings)
    with pytest.raises(Fault) as caught:
        await opened(upstream)
    assert (caught.value.failure, caught.value.stage) == (failure, stage)


async def test_nobody_listening(make_upstream: Any) -> None:
    upstream = await make_upstream()
    await upstream.stop()
    with pytest.raises(Fault) as caught:
        await opened(upstream)
    assert (caught.value.failure, caught.value.stage) == (FailureClass.CONNECTION, Stage.CONNECT)


async def test_a_server_that_only_knows_helo(make_upstream: Any) -> None:
    upstream = await make_upstream(answers={"EHLO": "500 what?"})
    connection = await opened(upstream)
    assert [type(o) for o in await connection.send(mail())] == [Delivered]
    await connection.quit()


@pytest.mark.parametrize("segment", [1, 7, 40])
async def test_replies_may_come_in_pieces(make_upstream: Any, segment: int) -> None:
    upstream = await make_upstream(segment=segment)
    connection = await opened(upstream)
    assert "PIPELINING" in connection.capabilities
    assert [type(o) for o in await connection.send(mail("a@x.test", "b@x.test"))] == [Delivered, Delivered]
    await connection.quit()


# --- TLS and AUTH ---
@pytest.fixture
def server_tls(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    return context


@pytest.fixture
def client_tls(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.create_default_context(cadata="")
    authority.configure_trust(context)
    return context


@pytest.mark.parametrize("implicit", [False, True])
async def test_tls_with_a_verified_name(
    make_upstream: Any, server_tls: ssl.SSLContext, client_tls: ssl.SSLContext, implicit: bool
) -> None:
    upstream = await make_upstream(tls=server_tls, implicit_tls=implicit)
    mode = UpstreamTLSMode.IMPLICIT_TLS if implicit else UpstreamTLSMode.START_TLS
    connection = await opened(upstream, tls=mode, context=client_tls)
    assert connection.is_encrypted
    assert [type(o) for o in await connection.send(mail())] == [Delivered]
    await connection.quit()


@pytest.mark.parametrize("implicit", [False, True])
@pytest.mark.parametrize("wrong", ["name", "authority"])
async def test_a_certificate_that_does_not_fit_is_not_sent_any_mail(
    make_upstream: Any, authority: trustme.CA, implicit: bool, wrong: str
) -> None:
    server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.create_default_context(cadata="")
    authority.issue_cert("other.test" if wrong == "name" else "127.0.0.1").configure_cert(server)
    (authority if wrong == "name" else trustme.CA()).configure_trust(client)
    upstream = await make_upstream(tls=server, implicit_tls=implicit)
    mode = UpstreamTLSMode.IMPLICIT_TLS if implicit else UpstreamTLSMode.START_TLS
    with pytest.raises(Fault) as caught:
        await opened(upstream, tls=mode, context=client)
    assert caught.value.failure is FailureClass.TLS
    assert "MAIL" not in "".join(upstream.commands)


async def test_start_tls_that_is_not_offered_is_required_all_the_same(
    make_upstream: Any, client_tls: ssl.SSLContext
) -> None:
    """Anybody on the way can strike it from the offer (RFC 3207 section 6)."""
    upstream = await make_upstream()
    with pytest.raises(Fault) as caught:
        await opened(upstream, tls=UpstreamTLSMode.START_TLS, context=client_tls)
    assert (caught.value.failure, caught.value.stage) == (FailureClass.TLS, Stage.STARTTLS)


async def test_octets_put_before_the_handshake_are_not_taken_for_the_servers(
    make_upstream: Any, server_tls: ssl.SSLContext, client_tls: ssl.SSLContext
) -> None:
    upstream = await make_upstream(tls=server_tls, answers={"STARTTLS": "220 go\r\n250 injected"})
    with pytest.raises(Fault) as caught:
        await opened(upstream, tls=UpstreamTLSMode.START_TLS, context=client_tls)
    assert caught.value.failure is FailureClass.TLS


async def test_opportunistic_takes_what_it_gets_but_not_for_a_password(
    make_upstream: Any, server_tls: ssl.SSLContext, client_tls: ssl.SSLContext
) -> None:
    careless = ssl.create_default_context()
    careless.check_hostname, careless.verify_mode = False, ssl.CERT_NONE
    mode = UpstreamTLSMode.OPPORTUNISTIC
    encrypted = await opened(await make_upstream(tls=server_tls), tls=mode, context=careless)
    assert encrypted.is_encrypted
    await encrypted.quit()
    broken = await make_upstream(tls=server_tls, answers={"STARTTLS": ["454 4.7.0 no TLS today"]})
    plain = await opened(broken, tls=mode, context=careless)
    assert not plain.is_encrypted
    await plain.quit()
    with pytest.raises(Fault) as caught:
        await opened(await make_upstream(password="p"), tls=mode, context=client_tls, login=Login("u", "p"))
    assert (caught.value.failure, caught.value.stage) == (FailureClass.TLS, Stage.AUTHENTICATION)


@pytest.mark.parametrize("mechanisms", [("PLAIN", "LOGIN"), ("LOGIN", "PLAIN"), ("XOAUTH2", "LOGIN")])
async def test_logs_in_with_the_first_mechanism_that_both_know(
    make_upstream: Any, server_tls: ssl.SSLContext, client_tls: ssl.SSLContext, mechanisms: tuple[str, ...]
) -> None:
    upstream = await make_upstream(tls=server_tls, password="pässword")
    connection = await opened(
        upstream,
        tls=UpstreamTLSMode.START_TLS,
        context=client_tls,
        login=Login("user", "pässword"),
        mechanisms=mechanisms,
    )
    used = next(command for command in upstream.commands if command.startswith("AUTH")).split(" ")[1]
    assert used == next(name for name in mechanisms if name != "XOAUTH2")
    assert [type(o) for o in await connection.send(mail())] == [Delivered]
    await connection.quit()


@pytest.mark.parametrize(
    ("answers", "offer", "failure"),
    [
        ({}, True, FailureClass.AUTHENTICATION),
        ({"AUTH": "454 4.7.0 temporary failure"}, True, FailureClass.UNAVAILABLE),
        ({"AUTH": "454 4.7.0 Too many login attempts, rate limit exceeded"}, True, FailureClass.THROTTLED),
        ({}, False, FailureClass.AUTHENTICATION),
    ],
)
async def test_a_login_that_fails_is_the_upstreams_problem(
    make_upstream: Any,
    server_tls: ssl.SSLContext,
    client_tls: ssl.SSLContext,
    answers: dict[str, str],
    offer: bool,
    failure: FailureClass,
) -> None:
    upstream = await make_upstream(tls=server_tls, password="right" if offer else None, answers=answers)
    with pytest.raises(Fault) as caught:
        await opened(upstream, tls=UpstreamTLSMode.START_TLS, context=client_tls, login=Login("user", "wrong"))
    assert caught.value.failure is failure
    assert "wrong" not in caught.value.text.replace("5.7.8 wrong", "")


def test_a_login_never_shows_its_password() -> None:
    assert "secret" not in repr(Login("user", "secret"))
