"""Signatures, verified by others: dkimpy everywhere, OpenDKIM where it is installed."""

from __future__ import annotations

import base64
import hashlib
import random
import re
import shutil
import subprocess
import tracemalloc
from pathlib import Path
from typing import Any

import dkim as dkimpy
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from dkim.canonicalization import Relaxed
from hypothesis import given
from hypothesis import strategies as st

from mailsluice_relay import config
from mailsluice_relay.config import ConfigurationError
from mailsluice_relay.dkim import BodyHash, Signer, signed
from mailsluice_relay.envelope import Content
from mailsluice_relay.spool.content import FileBody, MemoryBody

RSA = rsa.generate_private_key(65537, 2048)
ED25519 = Ed25519PrivateKey.generate()
HEADER = (
    b"Received: from app by relay\r\n"
    b"From: The Shop <shop@example.test>\r\n"
    b"To: person@example.org,\r\n\tother@example.org\r\n"
    b"SUBJECT:  two  blanks\t and a fold \r\n   here\r\n"
    b"Date: Tue, 24 Nov 2026 22:30:01 +0000\r\n"
    b"Message-ID: <1@example.test>\r\n"
    b"List-Unsubscribe: <https://example.test/u>\r\n"
    b"List-Unsubscribe-Post: List-Unsubscribe=One-Click\r\n"
)
BODY = b"Hello,  \t\r\n\r\n\tan indented line\r\n.\r\n \r\n\r\n"
NOW = 1_795_560_000.0


def pem(key: Any) -> bytes:
    text: bytes = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return text


CREDENTIALS = {"rsa.key": pem(RSA), "ed25519.key": pem(ED25519)}
BOTH = (
    config.Dkim(domain="example.test", selector="r1", key="rsa.key"),
    config.Dkim(domain="example.test", selector="e1", key="ed25519.key"),
)


def record(key: Any) -> str:
    """What stands in DNS."""
    public = key.public_key()
    if isinstance(key, Ed25519PrivateKey):
        raw = public.public_bytes(Encoding.Raw, PublicFormat.Raw)
        return f"v=DKIM1; k=ed25519; p={base64.b64encode(raw).decode()}"
    der = public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return f"v=DKIM1; k=rsa; p={base64.b64encode(der).decode()}"


RECORDS = {"r1": record(RSA), "e1": record(ED25519)}


def signer(*keys: config.Dkim, credentials: config.Credentials = CREDENTIALS) -> Signer:
    configuration = config.Configuration(
        revision="1",
        credentials_revision="1",
        relay=config.Relay(name="r", namespace="n"),
        hostname="relay.test",
        listeners=(config.Listener(name="submission", port=0),),
        upstreams=(config.Upstream(name="up", host="up.test"),),
        dkim=keys,
    )
    return Signer(configuration, credentials)


def sign(header: bytes = HEADER, body: bytes = BODY, keys: tuple[config.Dkim, ...] = BOTH) -> bytes:
    content = Content(header, MemoryBody(body))
    message = b"".join(signed(content, signer(*keys).keys_for(content), now=NOW).chunks())
    return message if message.endswith(b"\r\n") else message + b"\r\n"  # as DATA ends it


def verifies(message: bytes, index: int = 0) -> bool:
    """As dkimpy has it, which does its own canonicalization and arithmetic."""

    def look_up(name: bytes, timeout: int = 5) -> bytes:
        return RECORDS[name.decode().split(".")[0]].encode()

    try:
        return bool(dkimpy.DKIM(message).verify(idx=index, dnsfunc=look_up))
    except dkimpy.ValidationError:  # so it says that the body is another
        return False


# --- others verify it -------------------------------------------------------------------------------------------------
def test_both_kinds_of_keys_sign() -> None:
    message = sign()
    assert message.startswith(b"DKIM-Signature: v=1; a=rsa-sha256; c=relaxed/relaxed; d=example.test;\r\n\ts=r1;")
    assert b"a=ed25519-sha256" in message
    assert verifies(message, 0)
    assert verifies(message, 1)


@pytest.mark.skipif(shutil.which("opendkim") is None, reason="needs opendkim (Debian's opendkim)")
def test_opendkim_verifies_both(tmp_path: Path) -> None:
    records = "".join(f"{selector}._domainkey.example.test {text}\n" for selector, text in RECORDS.items())
    (tmp_path / "records").write_text(records)
    (tmp_path / "conf").write_text(f"Mode v\nTestDNSData file:{tmp_path}/records\nSocket local:{tmp_path}/socket\n")
    (tmp_path / "message").write_bytes(sign().replace(b"\r\n", b"\n"))
    ran = subprocess.run(
        ["opendkim", "-x", tmp_path / "conf", "-t", tmp_path / "message", "-vv"], capture_output=True, timeout=30
    )
    results = re.findall(r"dkim=(\w+)[^;]*header\.a=([\w-]+)", ran.stdout.decode())
    assert results == [("pass", "rsa-sha256"), ("pass", "ed25519-sha256")], ran.stdout + ran.stderr


@pytest.mark.parametrize(
    "body", [b"", b"\r\n", b"\r\n\r\n", b" \r\n", b"x", b"x ", b"\r\n\r\nx\r\n", "ü\r\n".encode("latin-1")]
)
def test_every_end_of_a_body(body: bytes) -> None:
    assert verifies(sign(body=body))


@pytest.mark.parametrize(
    "changed",
    [
        (b"shop@example.test>\r\nTo", b"shop@example.test>\r\nCc: more@example.org\r\nTo"),
        (b"shop@example.test>\r\nTo", b"shop@example.test>\r\nReply-To: x@example.org\r\nTo"),
        (b"two  blanks", b"three blanks"),
        (b"One-Click", b"Two-Clicks"),
        (b"Hello", b"Hallo"),
        (b"\tan indented", b"an indented"),
    ],
)
def test_what_a_receiver_shows_cannot_be_changed(changed: tuple[bytes, bytes]) -> None:
    message = sign()
    assert changed[0] in message
    assert not verifies(message.replace(*changed, 1))


@pytest.mark.parametrize(
    "changed",
    [
        (b"Date: Tue, 24", b"Date: Wed, 25"),
        (b"<1@example.test>", b"<0100018f@eu-west-1.amazonses.com>"),
        (b"Received: from app by relay\r\n", b"Received: by next\r\nReceived: from app by relay\r\n"),
        (b"SUBJECT:  two  blanks", b"Subject: two blanks"),
        (b"\r\n\r\n\tan indented", b"\r\n\r\n an indented"),
    ],
)
def test_what_servers_on_the_way_do_breaks_nothing(changed: tuple[bytes, bytes]) -> None:
    """Amazon SES writes Date and Message-ID anew; blanks and case are what relaxed is for."""
    message = sign()
    assert changed[0] in message
    assert verifies(message.replace(*changed, 1))


def test_lines_stay_short_with_many_fields_and_a_long_domain() -> None:
    domain = ".".join(["d" * 60] * 4)
    header = (
        HEADER.replace(b"example.test>", domain.encode() + b">") + b"References: <a@b>\r\n" + b"List-Id: x\r\n" * 40
    )
    content = Content(header, MemoryBody(BODY))
    keys = signer(config.Dkim(domain=domain, selector="r1", key="rsa.key")).keys_for(content)
    message = b"".join(signed(content, keys, now=NOW).chunks())
    assert max(map(len, message.partition(b"Received")[0].split(b"\r\n"))) < 330
    assert verifies(message)


# --- whose key --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("author", "selectors"),
    [
        (b"shop@example.test", ["r1", "e1"]),
        (b"SHOP@EXAMPLE.Test", ["r1", "e1"]),
        (b'"a@other.test" <shop@example.test>', ["r1", "e1"]),
        (b"x@nowhere.test, y@other.test", ["o1"]),
        (b"shop@sub.example.test", []),
        (b"shop@example.test.nowhere.test", []),
        ("x@bücher.test".encode(), ["b1"]),
    ],
)
def test_the_authors_domain_chooses_the_key(author: bytes, selectors: list[str]) -> None:
    keys = signer(
        *BOTH,
        config.Dkim(domain="Other.test", selector="o1", key="rsa.key"),
        config.Dkim(domain="xn--bcher-kva.test", selector="b1", key="rsa.key"),
    ).keys_for(Content(b"From: " + author + b"\r\nSender: a@example.test\r\n", MemoryBody(b"")))
    assert [key.selector for key in keys] == selectors


def test_what_has_no_author_is_not_signed() -> None:
    assert signer(*BOTH).keys_for(Content(b"Subject: x\r\n", MemoryBody(b""))) == ()
    assert signer(*BOTH).keys_for(Content(b"From: a@example.test\r\nFrom: b@example.test\r\n", MemoryBody(b""))) == ()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "the file x.key is missing from the credentials"),
        (b"s3cr3t", "x.key holds no PEM private key without a password"),
        (pem(ec.generate_private_key(ec.SECP256R1())), "x.key is neither RSA of at least 1024 bits nor Ed25519"),
    ],
    ids=["missing", "no key", "another kind"],
)
def test_a_key_that_cannot_sign_is_refused_with_its_field(content: bytes | None, said: str) -> None:
    credentials = {} if content is None else {"x.key": content}
    with pytest.raises(ConfigurationError) as caught:
        signer(config.Dkim(domain="example.test", selector="s", key="x.key"), credentials=credentials)
    assert str(caught.value) == f"dkim[0].key: {said}"


# --- the body ---------------------------------------------------------------------------------------------------------
@given(
    st.lists(st.sampled_from([b"a", b" ", b"\t", b"\r\n", b".", b"word"]), max_size=60).map(b"".join),
    st.integers(1, 7),
)
def test_the_hash_does_not_depend_on_how_the_body_is_cut(body: bytes, step: int) -> None:
    running = BodyHash()
    for start in range(0, len(body), step):
        running.update(body[start : start + step])
    # dkimpy leaves a blank at the very end of a body that has no last CRLF; our client sends that CRLF.
    ended = body if body.endswith(b"\r\n") or not body else body + b"\r\n"
    assert running.digest() == hashlib.sha256(Relaxed.canonicalize_body(ended)).digest()


def test_a_large_body_takes_next_to_no_memory(tmp_path: Path) -> None:
    lines = [random.Random(1).randbytes(54).hex().encode() + b"  end \r\n" for _ in range(100)]
    (tmp_path / "body").write_bytes(b"".join(lines) * 1500)
    size = (tmp_path / "body").stat().st_size
    content = Content(HEADER, FileBody(tmp_path / "body", size, temporary=False))
    keys = signer(*BOTH).keys_for(content)
    tracemalloc.start()
    out = signed(content, keys, now=NOW)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size > 16_000_000
    assert peak < 2_000_000
    assert verifies(b"".join(out.chunks()))
