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
from email.generator import BytesGenerator
from email.message import Message as Part
from email.policy import Compat32
from email.utils import formatdate
from io import BytesIO
from typing import Final

from mailsluice_relay.envelope import BodyType, Content, Envelope, Mailbox, Notify, Recipient

MAXIMUM_RETURNED: Final = 64 * 1024
"""Octets of the original that come back: of a longer message the header section, cut if it is longer still."""

MAXIMUM_TEXT: Final = 700
"""Characters of an upstream's words in one field: a line has at most 998 octets (RFC 5322 section 2.1.1)."""

_POLICY: Final = Compat32(linesep="\r\n", max_line_length=None, mangle_from_=False)
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
    root = Part(policy=_POLICY)
    root["From"] = f"Mail Delivery System <{sender}>"
    root["To"] = f"<{to}>"
    root["Date"] = formatdate(now)
    root["Message-ID"] = f"<{notification_id}@{hostname}>"
    if match := _MESSAGE_ID.search(content.header):
        root["In-Reply-To"] = root["References"] = match.group(1).decode("ascii")
    root["Subject"] = _SUBJECTS[action]
    root["Auto-Submitted"] = "auto-replied"
    root["MIME-Version"] = "1.0"
    root["Content-Type"] = f'multipart/report; report-type=delivery-status; boundary="=_{notification_id}"'
    is_global = any(report.recipient.mailbox.is_internationalized for report in reports)
    returned = _returned(content, full=original.ret == "FULL" and action is Action.FAILED)
    root.attach(_text(_words(reports, action, hostname, queue_id, received_at, retry_until)))
    root.attach(_fields(reports, original, hostname, queue_id, received_at, retry_until, now, is_global=is_global))
    root.attach(returned)
    buffer = BytesIO()
    BytesGenerator(buffer, policy=_POLICY).flatten(root)
    header, _, body = buffer.getvalue().partition(b"\r\n\r\n")
    header += b"\r\n"
    if not body.endswith(b"\r\n"):
        body += b"\r\n"
    return Notification(
        Envelope(
            sender=None,
            body=BodyType.SEVEN_BIT if body.isascii() else BodyType.EIGHT_BIT_MIME,
            internationalized=to.is_internationalized,
            recipients=[Recipient(to, Notify.NEVER)],
        ),
        header,
        body,
    )


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


def _text(words: str) -> Part:
    part = Part(policy=_POLICY)
    part["Content-Type"] = "text/plain; charset=utf-8"
    part["Content-Transfer-Encoding"] = "7bit" if words.isascii() else "8bit"
    part.set_payload(_as_payload(words.encode()))
    return part


def _fields(
    reports: Sequence[RecipientReport],
    original: Envelope,
    hostname: str,
    queue_id: str,
    received_at: float,
    retry_until: float | None,
    now: float,
    *,
    is_global: bool,
) -> Part:
    """The machine's part; with `is_global` in UTF-8 (RFC 6533 section 3), else in ASCII."""
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
    part = Part(policy=_POLICY)
    if is_global:
        part["Content-Type"] = "message/global-delivery-status"
        part["Content-Transfer-Encoding"] = "8bit"
        blocks = ["".join(f"{name}: {value}\r\n" for name, value in fields) for fields in groups]
        part.set_payload(_as_payload("\r\n".join(blocks).encode()))
        return part
    part["Content-Type"] = "message/delivery-status"
    part.set_payload([])  # the email package writes this type from parts of header fields, one for each group
    for fields in groups:
        block = Part(policy=_POLICY)
        for name, value in fields:
            block[name] = value.encode("ascii", "replace").decode("ascii")
        part.attach(block)
    return part


def _returned(content: Content, *, full: bool) -> Part:
    part = Part(policy=_POLICY)
    if full and content.size <= MAXIMUM_RETURNED:
        octets = b"".join(content.chunks())
        part["Content-Type"] = "message/rfc822"
    else:
        octets = content.header
        if len(octets) > MAXIMUM_RETURNED:
            octets = octets[: octets.rfind(b"\r\n", 0, MAXIMUM_RETURNED) + 2]
        part["Content-Type"] = "text/rfc822-headers"
    part["Content-Transfer-Encoding"] = "7bit" if octets.isascii() else "8bit"
    part.set_payload(_as_payload(octets))
    return part


def _as_payload(octets: bytes) -> str:
    """How the email package carries octets that it is to write as they are."""
    return octets.decode("ascii", "surrogateescape")


def _one_line(text: str) -> str:
    return " ".join(text.split())[:MAXIMUM_TEXT]


def _xtext(text: str) -> str:
    """RFC 3461 section 4 decoded; what would not be printable ASCII stays encoded."""
    return _XTEXT.sub(
        lambda m: c if (c := chr(int(m.group(1), 16))).isprintable() and c.isascii() else m.group(0), text
    )
