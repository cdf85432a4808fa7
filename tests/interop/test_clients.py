"""Mail clients and libraries of other people: each logs in and sends, and what it sent arrives octet for octet.

tools/interop-clients gets them; the test of one that is not there skips.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import smtplib
import ssl
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import aiosmtplib
import pytest

from mailsluice_relay.config import Listener, ListenerMode
from relay_process import LOGIN, PASSWORD, RunningRelay, running_relay, until

pytestmark = [pytest.mark.interop, pytest.mark.timeout(300)]

HERE: Final = Path(__file__).parent
CACHE: Final = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mailsluice" / "clients"
RECIPIENT: Final = "person@example.org"
HEADER: Final = (
    "From: App <app@example.test>\r\n"
    "To: person@example.org\r\n"
    "Date: Tue, 1 Jul 2025 10:52:37 +0200\r\n"
    "Message-ID: <{client}.{mode}@example.test>\r\n"
    "Subject: a header that\r\n\tis folded\r\n"
    "MIME-Version: 1.0\r\n"
    "Content-Type: text/plain; charset=utf-8\r\n"
    "Content-Transfer-Encoding: 8bit\r\n"
    "\r\n"
)
BODY: Final = (
    ".\r\n..\r\n.hidden\r\n. \r\n\r\nblanks at the end  \t\r\nGrüße, 日本語, 🎉\r\n"
    + "x" * 998
    + "\r\nFrom the beginning of a line\r\nMAIL FROM:<evil@example.test>\r\n\r\n\r\n.\r\nend\r\n"
)


@dataclass(frozen=True)
class Mail:
    """What a client is to do."""

    file: Path
    """With CR LF."""
    text: bytes
    host: str
    port: int
    implicit: bool
    authority: Path

    @property
    def tls(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=str(self.authority))

    @property
    def environment(self) -> dict[str, str]:
        return os.environ | {
            "MAIL_HOST": self.host,
            "MAIL_PORT": str(self.port),
            "MAIL_TLS": "implicit" if self.implicit else "starttls",
            "MAIL_CA": str(self.authority),
            "MAIL_LOGIN": LOGIN,
            "MAIL_PASSWORD": PASSWORD,
            "MAIL_FROM": LOGIN,
            "MAIL_TO": RECIPIENT,
            "MAIL_FILE": str(self.file),
            "MAIL_MODULES": str(CACHE / "node"),
        }


def program(name: str | Path) -> str:
    """Skips where it is not there."""
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not there; see what tools/interop-clients says")
    return found


def run(mail: Mail, *command: str, stdin: bytes = b"") -> None:
    done = subprocess.run(
        command, input=stdin, capture_output=True, env=mail.environment, timeout=120, cwd=mail.file.parent, check=False
    )
    assert done.returncode == 0, (done.stdout + done.stderr).decode(errors="replace")


# --- the clients ------------------------------------------------------------------------------------------------------
def by_smtplib(mail: Mail) -> None:
    client: smtplib.SMTP
    if mail.implicit:
        client = smtplib.SMTP_SSL(mail.host, mail.port, context=mail.tls, timeout=30)
    else:
        client = smtplib.SMTP(mail.host, mail.port, timeout=30)
    with client:
        if not mail.implicit:
            client.starttls(context=mail.tls)
        client.login(LOGIN, PASSWORD)
        assert client.sendmail(LOGIN, [RECIPIENT], mail.text, ["BODY=8BITMIME"]) == {}


def by_aiosmtplib(mail: Mail) -> None:
    sending = aiosmtplib.send(
        mail.text,
        sender=LOGIN,
        recipients=[RECIPIENT],
        hostname=mail.host,
        port=mail.port,
        use_tls=mail.implicit,
        start_tls=not mail.implicit,
        username=LOGIN,
        password=PASSWORD,
        tls_context=mail.tls,
        timeout=30,
    )
    asyncio.run(sending)


def by_swaks(mail: Mail) -> None:
    # Swaks reads lines with LF alone, and ends the last one itself.
    lines = mail.file.with_suffix(".lf")
    lines.write_bytes(mail.text.removesuffix(b"\r\n").replace(b"\r\n", b"\n"))
    run(
        mail,
        program("swaks"),
        *("--server", mail.host, "--port", str(mail.port), "--from", LOGIN, "--to", RECIPIENT),
        *("--auth", "PLAIN", "--auth-user", LOGIN, "--auth-password", PASSWORD),
        *("--tls-on-connect" if mail.implicit else "--tls", "--tls-verify", "--tls-ca-path", str(mail.authority)),
        *("--data", f"@{lines}", "--timeout", "30"),
    )


def by_curl(mail: Mail) -> None:
    run(
        mail,
        program("curl"),
        *("--silent", "--show-error", "--max-time", "30", "--cacert", str(mail.authority), "--ssl-reqd"),
        *("--url", f"{'smtps' if mail.implicit else 'smtp'}://{mail.host}:{mail.port}/client.test"),
        *("--mail-from", LOGIN, "--mail-rcpt", RECIPIENT, "--user", f"{LOGIN}:{PASSWORD}"),
        *("--upload-file", str(mail.file)),
    )


def by_msmtp(mail: Mail) -> None:
    settings = mail.file.with_suffix(".msmtprc")
    settings.write_text(
        f"account default\nhost {mail.host}\nport {mail.port}\nfrom {LOGIN}\n"
        f"auth plain\nuser {LOGIN}\npassword {PASSWORD}\n"
        f"tls on\ntls_starttls {'off' if mail.implicit else 'on'}\ntls_trust_file {mail.authority}\n"
        "set_date_header off\nset_msgid_header off\nset_from_header off\n"
    )
    settings.chmod(0o600)
    run(mail, program("msmtp"), f"--file={settings}", RECIPIENT, stdin=mail.text)


def by_nodemailer(mail: Mail) -> None:
    if not (CACHE / "node" / ".state").exists():
        pytest.skip("nodemailer is not there; see what tools/interop-clients says")
    run(mail, program("node"), str(HERE / "clients" / "send.mjs"))


def by_go(mail: Mail) -> None:
    run(mail, program(CACHE / "go" / "send"))


def by_java(mail: Mail) -> None:
    if not (CACHE / "java" / ".state").exists():
        pytest.skip("Jakarta Mail is not there; see what tools/interop-clients says")
    run(mail, program("java"), "-cp", f"{CACHE / 'java'}/*", str(HERE / "clients" / "Send.java"))


def by_rust(mail: Mail) -> None:
    # lettre ends the text with CR LF, whether it has that already or not.
    mail.file.write_bytes(mail.text.removesuffix(b"\r\n"))
    run(mail, program(CACHE / "rust" / "send"))


CLIENTS: Final[dict[str, Callable[[Mail], None]]] = {
    "smtplib": by_smtplib,
    "aiosmtplib": by_aiosmtplib,
    "swaks": by_swaks,
    "curl": by_curl,
    "msmtp": by_msmtp,
    "nodemailer": by_nodemailer,
    "go": by_go,
    "java": by_java,
    "rust": by_rust,
}


@pytest.fixture(scope="module")
def relay(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningRelay]:
    submission = Listener(name="submission", port=0, mode=ListenerMode.START_TLS)
    submissions = Listener(name="submissions", port=0, mode=ListenerMode.IMPLICIT_TLS)
    with running_relay(tmp_path_factory.mktemp("relay"), submission, submissions) as running:
        yield running


@pytest.mark.parametrize("listener", ["submission", "submissions"])
@pytest.mark.parametrize("name", CLIENTS)
def test_what_a_client_sends_arrives_octet_for_octet(
    relay: RunningRelay, tmp_path: Path, name: str, listener: str
) -> None:
    text = (HEADER.format(client=name, mode=listener) + BODY).encode()
    file = tmp_path / "mail.eml"
    file.write_bytes(text)
    _, port = relay.addresses[listener]
    CLIENTS[name](Mail(file, text, "localhost", port, listener == "submissions", relay.authority))
    key = f"Message-ID: <{name}.{listener}@example.test>".encode()
    until(lambda: any(key in received for received in relay.sink.texts), f"mail of {name} at the sink")
    (received,) = (received for received in relay.sink.texts if key in received)
    ours, theirs = received[: -len(text)], received[-len(text) :]
    assert theirs == text
    assert ours.startswith(b"Received: from ")
    assert ours.count(b"\r\n") == 3
    # Go asks for SMTPUTF8 wherever it is offered.
    assert (b"with UTF8SMTPSA" if name == "go" else b"with ESMTPSA") in ours
