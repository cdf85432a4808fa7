"""What an upstream's answer, or its silence, means for one recipient and for the upstream. Pure.

Three ends: delivered, retry, failed. Each of the last two has a failure class; whether the *upstream* is the problem
(and another one should be tried, and this one be left alone for a while) follows from the class. A refusal before MAIL
is never the mail's fault: wrong credentials defer mail, they do not bounce it.
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass
from typing import Final

from mailsluice_relay.reply import Reply


class Stage(enum.StrEnum):
    """How far the dialogue had come."""

    CONNECT = "connect"
    GREETING = "greeting"
    HELLO = "EHLO"
    STARTTLS = "STARTTLS"
    AUTHENTICATION = "AUTH"
    MAIL = "MAIL"
    RECIPIENT = "RCPT"
    DATA = "DATA"
    END_OF_DATA = "end of data"


class FailureClass(enum.StrEnum):
    # The upstream's
    CONNECTION = "connection"
    """Not reached, cut off, silent, or not speaking SMTP."""
    TLS = "tls"
    AUTHENTICATION = "authentication"
    UNAVAILABLE = "unavailable"
    """It says that it cannot work now, or will not work with us."""
    THROTTLED = "throttled"
    """Too much, too fast: it wants us slower."""
    # The mail's
    POLICY = "policy"
    MAILBOX = "mailbox"
    MESSAGE = "message"
    """Size, content, or a protocol extension that it needs."""
    RECIPIENTS = "recipients"
    """More recipients than one transaction may have: the rest goes in another one."""
    OTHER = "other"


UPSTREAM_PROBLEMS: Final = frozenset(
    {
        FailureClass.CONNECTION,
        FailureClass.TLS,
        FailureClass.AUTHENTICATION,
        FailureClass.UNAVAILABLE,
        FailureClass.THROTTLED,
    }
)


@dataclass(frozen=True, slots=True)
class Delivered:
    reply: Reply
    notifies: bool = False
    """The upstream was told what the sender wants to be notified of (RFC 3461 section 5.2.1), and answers for it."""
    host: str = ""
    """Who answered, where that is not the upstream's own host."""


@dataclass(frozen=True, slots=True)
class Retry:
    failure: FailureClass
    stage: Stage
    text: str
    """For people: the reply, or the fault."""
    reply: Reply | None = None
    host: str = ""

    @property
    def is_upstream_problem(self) -> bool:
        return self.failure in UPSTREAM_PROBLEMS


@dataclass(frozen=True, slots=True)
class Failed:
    failure: FailureClass
    stage: Stage
    text: str
    status: str
    """Enhanced status code, 5.x.x."""
    reply: Reply | None = None
    host: str = ""


Outcome = Delivered | Retry | Failed


class UndeliverableError(Exception):
    """There is nowhere to deliver to: now, or ever."""

    def __init__(self, outcome: Retry | Failed) -> None:
        super().__init__(outcome.text)
        self.outcome = outcome


def should_fail_over(outcome: Retry) -> bool:
    """Not where the upstream may have taken the mail already: another one would make the duplicate certain."""
    maybe_taken = outcome.stage is Stage.END_OF_DATA and outcome.reply is None
    return outcome.is_upstream_problem and not maybe_taken


class Fault(Exception):  # noqa: N818 - the peers' word (RFC 5321 says failure for the mail's)
    """The session with an upstream cannot go on."""

    def __init__(self, failure: FailureClass, stage: Stage, text: str, reply: Reply | None = None) -> None:
        super().__init__(text)
        self.failure = failure
        self.stage = stage
        self.text = text
        self.reply = reply

    @property
    def retry(self) -> Retry:
        return Retry(self.failure, self.stage, self.text, self.reply)


_SESSION_STAGES: Final = frozenset({Stage.CONNECT, Stage.GREETING, Stage.HELLO, Stage.STARTTLS, Stage.AUTHENTICATION})

_AUTHENTICATION_CODES: Final = frozenset({530, 534, 535, 538})
"""RFC 4954 section 6: whatever command they answer, it is about who we are."""

_THROTTLING = re.compile(
    r"throttl|too (?:many|much) (?:mail|message|connection|request|recipient.* per|error)|too fast|slow down"
    r"|(?:sending|mail|message|hourly|daily|rate|user|account).{0,30}(?:rate|quota|limit).{0,40}(?:exceed|reach|hit)"
    r"|(?:rate|quota|limit).{0,20}exceed|rate[- ]?limit",
    re.IGNORECASE,
)
_SENDER = re.compile(r"sender|send as|mail from|from address|return-path|reverse-path|envelope", re.IGNORECASE)
_GREYLISTING = re.compile(r"gr[ae]y-?list", re.IGNORECASE)
_POLICY = re.compile(r"spam|block(?:ed|list)|black-?list|polic(?:y|ies)|reputation|dmarc|dkim|\bspf\b", re.IGNORECASE)
_TOO_MANY_RECIPIENTS = re.compile(r"too many recipients", re.IGNORECASE)


def is_about_sender(outcome: Failed) -> bool:
    """Whether another reverse-path could help. Some look at it at RCPT, and Microsoft 365 after the data (5.7.60)."""
    if outcome.stage is Stage.MAIL:
        return outcome.failure is not FailureClass.MESSAGE
    return outcome.reply is not None and bool(_SENDER.search(outcome.reply.text))


def is_throttling(reply: Reply) -> bool:
    """Whether the upstream asks us to be slower. Greylisting is about one recipient, not about our speed."""
    if _GREYLISTING.search(reply.text):
        return False
    if reply.code in {421, 454} or (reply.is_transient and reply.status.startswith("4.7.")):
        return True
    # Gmail says `550 5.4.5 Daily user sending limit exceeded`; tomorrow it takes the same mail.
    return bool(_THROTTLING.search(reply.text)) and (reply.is_transient or reply.status in {"5.4.5", "5.7.0", ""})


def session_fault(stage: Stage, reply: Reply) -> Fault:
    """A negative reply before MAIL: the upstream's problem, whatever its first digit says."""
    if stage is Stage.STARTTLS:
        failure = FailureClass.TLS
    elif reply.code in _AUTHENTICATION_CODES or (stage is Stage.AUTHENTICATION and not reply.is_transient):
        failure = FailureClass.AUTHENTICATION
    elif reply.is_transient and bool(_THROTTLING.search(reply.text)):
        failure = FailureClass.THROTTLED
    else:
        failure = FailureClass.UNAVAILABLE
    return Fault(failure, stage, f"{stage}: {reply}", reply)


def classify(stage: Stage, reply: Reply) -> Retry | Failed:
    """A negative reply to MAIL, RCPT, DATA or the text."""
    text = f"{stage}: {reply}"
    if stage in _SESSION_STAGES:
        return session_fault(stage, reply).retry
    if reply.code < 400:  # 2yz for 3yz or the other way round: nobody knows what it did
        return Retry(FailureClass.CONNECTION, stage, f"{stage}: unexpected reply {reply}", reply)
    if reply.code in _AUTHENTICATION_CODES and stage is not Stage.END_OF_DATA:
        return Retry(FailureClass.AUTHENTICATION, stage, text, reply)
    if stage is Stage.RECIPIENT and (
        reply.status in {"4.5.3", "5.5.3"}
        or (reply.code in {452, 552} and not reply.status)  # RFC 5321 section 4.5.3.1.10: 552 of old means 452
        or _TOO_MANY_RECIPIENTS.search(reply.text)
    ):
        return Retry(FailureClass.RECIPIENTS, stage, text, reply)
    if is_throttling(reply):
        return Retry(FailureClass.THROTTLED, stage, text, reply)
    failure = _failure(stage, reply)
    if reply.is_transient:
        return Retry(failure, stage, text, reply)
    return Failed(failure, stage, text, reply.status or _status(stage, reply), reply)


def _failure(stage: Stage, reply: Reply) -> FailureClass:
    """Of a reply that is about this mail: by the enhanced status code (RFC 3463), else by where it came."""
    subject, _, detail = reply.status[2:].partition(".")
    if subject == "7" or (subject not in {"1", "2"} and _POLICY.search(reply.text)):
        return FailureClass.POLICY
    if subject in {"1", "2"}:
        return FailureClass.MAILBOX
    if subject == "6" or (subject == "3" and detail == "4"):
        return FailureClass.MESSAGE
    if subject == "3" and reply.is_transient and stage in {Stage.MAIL, Stage.DATA}:
        return FailureClass.UNAVAILABLE
    if stage is Stage.RECIPIENT:
        return FailureClass.MAILBOX
    if stage in {Stage.DATA, Stage.END_OF_DATA}:
        return FailureClass.MESSAGE
    return FailureClass.OTHER


def _status(stage: Stage, reply: Reply) -> str:
    """An enhanced status code for a 5yz reply that has none (RFC 3463 section 3)."""
    if reply.code == 552:
        return "5.3.4"
    if stage is Stage.RECIPIENT:
        return "5.1.1" if reply.code in {550, 551, 553} else "5.1.0"
    return "5.6.0" if stage is Stage.END_OF_DATA else "5.0.0"
