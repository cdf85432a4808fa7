"""Delivery status notifications (RFC 3464): what a sender is told of mail that failed, is late, or was passed on.

Pure: clock and names are arguments. The report has three parts: a text for a person, the fields for programs, and the
returned header section, or the whole message where RET=FULL asks for it and it is small (RFC 3461 section 4.3). It is
sent with the null reverse-path and says that a machine wrote it (RFC 3834), so that it is never itself answered.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Sequence
from dataclasses import dataclass
from email.utils import formatdate
from typing import Final

from mailsluice_relay.envelope import BodyType, Content, Envelope, Mailbox, Notify, Recipient

MAXIMUM_RETURNED: Final = 64 * 1024
"""Octets of the original that come back: of a longer message the header section, cut if it is longer still."""

MAXIMUM_TEXT: Final = 700
"""Characters of an upstream's words in one field: a line has at most 998 octets (RFC 5322 section 2.1.1)."""

_MESSAGE_ID = re.compile(rb"^message-id[ \t]*:[ \t\r\n]*(<[!-~]{1,250}>)", re.IGNORECASE | re.MULTILINE)
_XTEXT = re.compile(r"\+([0-9A-F]{2})")


class Action(enum.StrEnum):
    """RFC 3464 section 2.3.3."""

    FAILED = "failed"
    DELAYED = "delayed"
    RELAYED = "relayed"


@dataclass(frozen=True, slots=True)
class RecipientReport:
    recipient: Recipient
    action: Action
    status: str
    """Enhanced status code (RFC 3463)."""
    text: str
    """What was answered, or what happened."""
    reply: str | None = None
    """The SMTP reply, if there was one."""
    remote: str | None = None
    """The host that gave it."""


@dataclass(frozen=True, slots=True)
class Notification:
    """A mail to queue."""

    envelope: Envelope
    header: bytes
    body: bytes


def wanted(recipient: Recipient, action: Action) -> bool:
    """Whether the sender asked to hear of this (RFC 3461 section 4.1); without NOTIFY: of failures and delays."""
    notify = Notify.FAILURE | Notify.DELAY if recipient.notify is None else recipient.notify
    flag = {Action.FAILED: Notify.FAILURE, Action.DELAYED: Notify.DELAY, Action.RELAYED: Notify.SUCCESS}[action]
    return flag in notify


def build(
    reports: Sequence[RecipientReport],
    *,
    original: Envelope,
    content: Content,
    queue_id: str,
    received_at: float,
    retry_until: float | None,
    to: Mailbox,
    hostname: str,
    sender: str,
    notification_id: str,
    now: float,
) -> Notification:
    """One notification about recipients of one mail, all with the same action. `sender` is the author that is shown."""
    action = reports[0].action
    fields = [
        ("From", f"Mail Delivery System <{sender}>"),
        ("To", f"<{to}>"),
        ("Date", formatdate(now)),
        ("Message-ID", f"<{notification_id}@{hostname}>"),
        ("Subject", _SUBJECTS[action]),
        ("Auto-Submitted", "auto-replied"),
        ("MIME-Version", "1.0"),
        ("Content-Type", f'multipart/report; report-type=delivery-status; boundary="=_{notification_id}"'),
    ]
    if match := _MESSAGE_ID.search(content.header):
        about = match.group(1).decode("ascii")
        fields += [("In-Reply-To", about), ("References", about)]
    words = _words(reports, action, hostname, queue_id, received_at, retry_until)
    groups = _groups(reports, original, hostname, queue_id, received_at, retry_until, now)
    is_global = any(report.recipient.mailbox.is_internationalized for report in reports)
    parts = (
        ("text/plain; charset=utf-8", words.encode()),
        _status_part(groups, is_global=is_global),
        _returned(content, full=original.ret == "FULL" and action is Action.FAILED),
    )
    body = _multipart(parts, f"=_{notification_id}".encode())
    return Notification(
        Envelope(
            sender=None,
            body=BodyType.SEVEN_BIT if body.isascii() else BodyType.EIGHT_BIT_MIME,
            internationalized=to.is_internationalized,
            recipients=[Recipient(to, Notify.NEVER)],
        ),
        "".join(f"{name}: {value}\r\n" for name, value in fields).encode(),
        body,
    )


def _multipart(parts: Sequence[tuple[str, bytes]], boundary: bytes) -> bytes:
    """RFC 2046 section 5.1. By hand, as the email package does not write octets over 127 in message/* parts."""
    pieces = []
    for kind, octets in parts:
        encoding = "7bit" if octets.isascii() else "8bit"
        head = f"Content-Type: {kind}\r\nContent-Transfer-Encoding: {encoding}\r\n\r\n"
        pieces.append(b"--" + boundary + b"\r\n" + head.encode("ascii") + octets + b"\r\n")
    return b"".join(pieces) + b"--" + boundary + b"--\r\n"


_SUBJECTS: Final = {
    Action.FAILED: "Undelivered mail: your message could not be delivered",
    Action.DELAYED: "Delayed mail: your message is still waiting (no action needed)",
    Action.RELAYED: "Relayed mail: your message was passed on",
}

_OPENINGS: Final = {
    Action.FAILED: "your message could not be delivered to:",
    Action.DELAYED: "your message has not been delivered yet to:",
    Action.RELAYED: (
        "your message was passed on to a server that does not report on delivery.\n"
        "You will hear no more about it, unless it fails:"
    ),
}

_ADVICE: Final = (
    ("5.1.", "Check the address for typing mistakes, and ask the person for the present one."),
    ("5.2.2", "The mailbox is full. Try again later, or reach the person another way."),
    ("5.2.", "The mailbox does not take mail at present. Reach the person another way."),
    ("5.3.4", "The message is too big. Send it smaller, for instance with a link instead of an attachment."),
    ("5.4.7", "The server was not reached in time. Send the message again later, or ask the owner of this mail relay."),
    ("4.4.7", "The server was not reached in time. Send the message again later, or ask the owner of this mail relay."),
    ("5.6.7", "The next mail server does not take addresses with other than ASCII letters. Use another address."),
    ("5.7.", "The mail provider refused it by its own rules. Show this message to the owner of this mail relay."),
)


def _advice(report: RecipientReport) -> str:
    if report.action is Action.DELAYED:
        return "Nothing needs to be done: delivery goes on by itself."
    if report.action is Action.RELAYED:
        return ""
    for prefix, advice in _ADVICE:
        if report.status.startswith(prefix):
            return advice
    return "Read what the mail provider answered; the owner of this mail relay can help."


def _words(
    reports: Sequence[RecipientReport],
    action: Action,
    hostname: str,
    queue_id: str,
    received_at: float,
    retry_until: float | None,
) -> str:
    lines = [f"This is the mail relay {hostname}. I am sorry:" if action is Action.FAILED else f"This is {hostname}:"]
    lines += [_OPENINGS[action], ""]
    for report in reports:
        lines.append(f"  {report.recipient.mailbox}")
        by = f"{report.remote} answered" if report.reply and report.remote else "What happened"
        lines.append(f"    {by}: {_one_line(report.reply or report.text)}")
        if advice := _advice(report):
            lines.append(f"    What to do: {advice}")
        lines.append("")
    lines.append(f"The message was taken on {formatdate(received_at)} and has the queue id {queue_id}.")
    if action is Action.DELAYED and retry_until is not None:
        lines.append(f"Delivery is tried until {formatdate(retry_until)}.")
    lines.append("What programs read about it, and your message or its header, follow.")
    return "\r\n".join(lines) + "\r\n"


def _groups(
    reports: Sequence[RecipientReport],
    original: Envelope,
    hostname: str,
    queue_id: str,
    received_at: float,
    retry_until: float | None,
    now: float,
) -> list[list[tuple[str, str]]]:
    """The fields for programs: those of the message, then those of each recipient (RFC 3464 section 2)."""
    about_message = [("Reporting-MTA", f"dns; {hostname}"), ("X-Mailsluice-Queue-ID", queue_id)]
    if original.envid is not None:
        about_message.append(("Original-Envelope-Id", _xtext(original.envid)))
    about_message.append(("Arrival-Date", formatdate(received_at)))
    groups = [about_message]
    for report in reports:
        fields = []
        if report.recipient.original is not None:
            fields.append(("Original-Recipient", _xtext(report.recipient.original)))
        kind = "utf-8" if report.recipient.mailbox.is_internationalized else "rfc822"
        fields.append(("Final-Recipient", f"{kind}; {report.recipient.mailbox}"))
        fields.append(("Action", report.action.value))
        fields.append(("Status", report.status))
        if report.remote is not None:
            fields.append(("Remote-MTA", f"dns; {report.remote}"))
        if report.reply is not None:
            fields.append(("Diagnostic-Code", f"smtp; {_one_line(report.reply)}"))
        fields.append(("Last-Attempt-Date", formatdate(now)))
        if report.action is Action.DELAYED and retry_until is not None:
            fields.append(("Will-Retry-Until", formatdate(retry_until)))
        groups.append(fields)
    return groups


def _status_part(groups: list[list[tuple[str, str]]], *, is_global: bool) -> tuple[str, bytes]:
    """In UTF-8 for internationalized recipients (RFC 6533 section 3), else in ASCII."""
    text = "\r\n".join("".join(f"{name}: {value}\r\n" for name, value in fields) for fields in groups)
    if is_global:
        return "message/global-delivery-status", text.encode()
    return "message/delivery-status", text.encode("ascii", "replace")


def _returned(content: Content, *, full: bool) -> tuple[str, bytes]:
    if full and content.size <= MAXIMUM_RETURNED:
        return "message/rfc822", b"".join(content.chunks())
    octets = content.header
    if len(octets) > MAXIMUM_RETURNED:
        octets = octets[: octets.rfind(b"\r\n", 0, MAXIMUM_RETURNED) + 2]
    return "text/rfc822-headers", octets


def _one_line(text: str) -> str:
    return " ".join(text.split())[:MAXIMUM_TEXT]


def _xtext(text: str) -> str:
    """RFC 3461 section 4 decoded; what would not be printable ASCII stays encoded."""
    return _XTEXT.sub(
        lambda m: c if (c := chr(int(m.group(1), 16))).isprintable() and c.isascii() else m.group(0), text
    )
