"""Logging in at an upstream: every mechanism against a server that checks it, and servers that cheat."""

from __future__ import annotations

import asyncio
import base64
from types import SimpleNamespace
from typing import Any

import pytest

from mailsluice_relay.config import UpstreamTLSMode
from mailsluice_relay.delivery.client import Timeouts, connect
from mailsluice_relay.delivery.outcome import FailureClass, Fault, Stage
from mailsluice_relay.delivery.sasl import WITH_PASSWORD, SaslError, ScramSha256
from mailsluice_relay.delivery.target import Login, Target

SHORT = Timeouts(connect=2, greeting=1, command=1, data=1, block=1, end_of_data=1, quit=0.5)


def target(upstream: Any, password: str) -> Target:
    return Target(
        name="up",
        host="127.0.0.1",
        port=upstream.port,
        hostname="relay.test",
        login=Login("user", password),
        tls=UpstreamTLSMode.PLAIN,
        allow_plaintext_authentication=True,
    )


@pytest.mark.parametrize("mechanism", WITH_PASSWORD)
async def test_the_right_password_gets_in_and_a_wrong_one_does_not(make_upstream: Any, mechanism: str) -> None:
    upstream = await make_upstream(password="pässword", mechanisms=mechanism)
    connection = await connect(target(upstream, "pässword"), SHORT)
    await connection.quit()
    with pytest.raises(Fault) as caught:
        await connect(target(upstream, "pass"), SHORT)
    assert caught.value.failure is FailureClass.AUTHENTICATION
    assert [line.split(" ")[1] for line in upstream.commands if line.startswith("AUTH")] == [mechanism] * 2


async def test_a_challenge_is_answered_only_where_nothing_simpler_is_offered(make_upstream: Any) -> None:
    upstream = await make_upstream(password="p", mechanisms="CRAM-MD5 SCRAM-SHA-256 LOGIN PLAIN")
    connection = await connect(target(upstream, "p"), SHORT)
    await connection.quit()
    assert any(line.startswith("AUTH PLAIN ") for line in upstream.commands)


async def test_a_server_that_does_not_prove_itself_is_not_believed(make_upstream: Any) -> None:
    """SCRAM is there because the password may go to the wrong server (RFC 5802 section 9)."""
    upstream = await make_upstream(password="p", mechanisms="SCRAM-SHA-256", answers={"AUTH": "235 2.7.0 come in"})
    with pytest.raises(Fault, match="did not prove") as caught:
        await connect(target(upstream, "another"), SHORT)
    assert caught.value.failure is FailureClass.AUTHENTICATION


def test_a_server_cannot_make_us_compute_for_long() -> None:
    mechanism = ScramSha256("user", "p")
    initial = mechanism.initial()
    assert initial is not None
    nonce = initial.decode().rpartition("r=")[2]
    salt = base64.b64encode(b"0123456789abcdef").decode()
    with pytest.raises(SaslError, match="iterations"):
        mechanism.respond(f"r={nonce}server,s={salt},i=999999999".encode())


async def test_a_server_that_never_stops_asking_is_left() -> None:
    asked = 0

    async def ask_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal asked
        writer.write(b"220 hello\r\n")
        while line := await reader.readline():
            if line.startswith(b"EHLO"):
                writer.write(b"250-hello\r\n250 AUTH PLAIN\r\n")
            else:
                asked += 1
                writer.write(b"334 YW5kIG5vdz8=\r\n")
        writer.close()

    server = await asyncio.start_server(ask_on, "127.0.0.1", 0)
    async with server:
        where = SimpleNamespace(port=server.sockets[0].getsockname()[1])
        with pytest.raises(Fault) as caught:
            await connect(target(where, "p"), SHORT)
    assert caught.value.stage is Stage.AUTHENTICATION
    assert asked < 20


async def test_a_server_that_repeats_what_it_was_sent_gets_no_secret_into_our_words(
    make_upstream: Any,
) -> None:
    line = base64.b64encode(b"\0user\0swordfish").decode()
    upstream = await make_upstream(
        password="p", mechanisms="PLAIN", answers={"AUTH": f"500 5.5.2 what is AUTH PLAIN {line} or swordfish?"}
    )
    with pytest.raises(Fault) as caught:
        await connect(target(upstream, "swordfish"), SHORT)
    fault = caught.value
    assert fault.text == "AUTH: 500 5.5.2 what is AUTH PLAIN *** or ***?"
    assert "swordfish" not in f"{fault.reply}{fault.retry}"
    assert line not in f"{fault.reply}{fault.retry}"


async def test_a_token_is_nothing_for_a_server_that_wants_a_password(
    make_upstream: Any,
) -> None:
    upstream = await make_upstream(password="p", mechanisms="XOAUTH2")
    with pytest.raises(Fault, match="AUTH offers XOAUTH2, and none of PLAIN") as caught:
        await connect(target(upstream, "p"), SHORT)
    assert caught.value.failure is FailureClass.AUTHENTICATION
