"""Sends mail as an application would, from inside a pod: JSON in says what, JSON out how it went.

Needs nothing but the standard library, for it runs as `python3 -c` in whatever image has Python.
"""

from __future__ import annotations

import json
import smtplib
import ssl
import sys
from email.message import EmailMessage
from typing import Any


def connect(order: dict[str, Any]) -> smtplib.SMTP:
    context = ssl.create_default_context(cadata=order["ca"])
    if order["implicit_tls"]:
        return smtplib.SMTP_SSL(order["host"], order["port"], context=context, timeout=20)
    client = smtplib.SMTP(order["host"], order["port"], timeout=20)
    client.starttls(context=context)
    return client


def send(order: dict[str, Any], accepted: list[str]) -> None:
    with connect(order) as client:
        if order["password"] is not None:
            client.login(order["login"], order["password"])
        for subject in order["subjects"]:
            message = EmailMessage()
            message["From"] = order["sender"]
            message["To"] = order["recipient"]
            message["Subject"] = subject
            message.set_content("Your order is on its way.\n")
            client.send_message(message)
            accepted.append(subject)


def refusal(error: OSError | smtplib.SMTPException) -> tuple[int, str]:
    """The reply that ended it; code 0 where there was none."""
    if isinstance(error, smtplib.SMTPRecipientsRefused):
        code, text = next(iter(error.recipients.values()))
        return code, text.decode()
    if isinstance(error, smtplib.SMTPResponseException):
        # Bytes as they came, but text where smtplib made it up itself.
        reply: bytes | str = error.smtp_error
        return error.smtp_code, reply.decode() if isinstance(reply, bytes) else reply
    return 0, f"{type(error).__name__}: {error}"


def main() -> None:
    accepted: list[str] = []
    refused = None
    try:
        send(json.load(sys.stdin), accepted)
    except (OSError, smtplib.SMTPException) as error:
        refused = refusal(error)
    json.dump({"accepted": accepted, "refused": refused}, sys.stdout)


if __name__ == "__main__":
    main()
