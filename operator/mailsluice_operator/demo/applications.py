"""The demo's applications: each sends the way that one kind of application does, good or bad."""

from __future__ import annotations

import contextlib
import email.message
import email.policy
import email.utils
import smtplib
import socket
import ssl
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Final

from mailsluice_operator.local import Started

PASSWORDS: Final = {
    "shop@example.test": "shop-password",
    "newsletter@example.test": "newsletter-password",
    "legacy@example.test": "legacy-password",
}
NEWSLETTERS: Final = 25
"""Messages that the flooding application tries; its limit lets 10 through at once."""
TIMEOUT: Final = 10.0
"""Seconds for each step of a session."""


@dataclass(slots=True)
class Application:
    """One sender. `told` holds the last line that the relay said to it."""

    name: str
    intent: str
    send: Callable[[Started, Application], None]
    sent: int = 0
    refused: int = 0
    told: str = ""


def mail(sender: str, subject: str, text: str = "Hello from the demo.\n") -> email.message.EmailMessage:
    message = email.message.EmailMessage(policy=email.policy.SMTP)
    message["From"] = sender
    message["To"] = "customer@example.org"
    message["Subject"] = subject
    message["Date"] = email.utils.localtime()
    message.set_content(text)
    return message


@contextlib.contextmanager
def session(relay: Started, listener: str, login: str | None, password: str = "") -> Iterator[smtplib.SMTP]:
    """A client's session: TLS verified against the relay's CA, logged in when `login` is given."""
    context = ssl.create_default_context(cafile=relay.ca)
    context.check_hostname = False  # the demo connects by address; the certificate names the relay
    host, port = relay.address(listener)
    client: smtplib.SMTP
    if listener == "submissions":
        client = smtplib.SMTP_SSL(host, port, timeout=TIMEOUT, context=context)
    else:
        client = smtplib.SMTP(host, port, timeout=TIMEOUT)
        client.starttls(context=context)
    with client:
        if login is not None:
            client.login(login, password or PASSWORDS[login])
        yield client


def attempt(application: Application, send: Callable[[], object]) -> None:
    """Count one try and keep the relay's words when it refuses."""
    try:
        send()
        application.sent += 1
        application.told = "250 accepted"
    except smtplib.SMTPRecipientsRefused as error:
        code, text = next(iter(error.recipients.values()))
        application.refused += 1
        application.told = f"{code} {text.decode(errors='replace')}"
    except smtplib.SMTPResponseException as error:
        application.refused += 1
        words = error.smtp_error
        application.told = f"{error.smtp_code} {words.decode(errors='replace') if isinstance(words, bytes) else words}"


def send_properly(relay: Started, application: Application) -> None:
    for number in range(1, 6):
        with session(relay, "submissions", "shop@example.test") as client:
            message = mail("Shop <shop@example.test>", f"Order {number} confirmed")
            attempt(application, partial(client.send_message, message))


def send_without_login(relay: Started, application: Application) -> None:
    for _ in range(3):
        with session(relay, "submission", None) as client:
            attempt(application, partial(client.send_message, mail("cron@example.test", "Nightly job")))


def send_with_short_login(relay: Started, application: Application) -> None:
    def log_in() -> None:
        with session(relay, "submission", "legacy", PASSWORDS["legacy@example.test"]):
            pass

    attempt(application, log_in)


def send_forged(relay: Started, application: Application) -> None:
    with session(relay, "submissions", "legacy@example.test") as client:
        attempt(application, partial(client.send_message, mail("CEO <ceo@example.test>", "Please pay this invoice")))


def flood(relay: Started, application: Application) -> None:
    with session(relay, "submission", "newsletter@example.test") as client:
        for number in range(NEWSLETTERS):
            message = mail("News <newsletter@example.test>", f"Issue {number}")
            attempt(application, partial(client.send_message, message))


def smuggle(relay: Started, application: Application) -> None:
    """A second mail behind `LF . CR LF`, for a lenient server further on to find (CVE-2023-51764 and its kin)."""
    hidden = (
        b"\n.\r\nMAIL FROM:<ceo@example.test>\r\nRCPT TO:<victim@example.org>\r\nDATA\r\n"
        b"From: ceo@example.test\r\n\r\nPay!"
    )
    with session(relay, "submissions", "legacy@example.test") as client:
        client.mail("legacy@example.test")
        client.rcpt("customer@example.org")
        client.putcmd("DATA")
        client.getreply()
        client.send(b"From: legacy@example.test\r\nSubject: harmless\r\n\r\nbody" + hidden + b"\r\n.\r\n")
        code, text = client.getreply()
        application.refused += 1
        application.told = f"{code} {text.decode(errors='replace')}"


def send_hijacked(relay: Started, application: Application) -> None:
    message = mail('"ceo@bank.example" <shop@example.test>', "Your account", "See http://bit.ly/3xample now.\n")
    message.add_attachment(
        b"MZ" + bytes(64), maintype="application", subtype="octet-stream", filename="invoice.pdf.exe"
    )
    with session(relay, "submissions", "shop@example.test") as client:
        attempt(application, partial(client.send_message, message))


def probe(relay: Started, application: Application) -> None:
    with socket.create_connection(relay.address("smtp"), timeout=TIMEOUT) as connection:
        application.told = connection.recv(512).decode(errors="replace").strip()


def applications() -> list[Application]:
    return [
        Application("shop", "logs in and sends its own mail", send_properly),
        Application("cron", "does not log in", send_without_login),
        Application("printer", "logs in with the account name only", send_with_short_login),
        Application("phisher", "forges the sender", send_forged),
        Application("newsletter", "floods", flood),
        Application("smuggler", "hides a second mail in the first", smuggle),
        Application("hijacked", "sends an executable in a bank's name", send_hijacked),
        Application("health check", "connects and hangs up", probe),
    ]
