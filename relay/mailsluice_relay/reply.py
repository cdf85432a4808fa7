"""Replies and reasons: each stands once, here.

A `Reply` is what the client reads. A `Reason` is why, from a closed enumeration; the same name is the metric's label,
the log's field, the Event's text and the row in docs/reasons.md. A `Verdict` is both.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from functools import cached_property

MAXIMUM_REPLY_LINE = 512
"""Octets with CRLF (RFC 5321 section 4.5.3.1.5)."""


class Reason(enum.StrEnum):
    """Why a session, a message or a recipient ended as it did. Closed: a client cannot make a new one."""

    NONE = "none"
    ACCEPTED = "accepted"

    # Who is it (RFC 4954)
    TLS_REQUIRED = "tls_required"
    AUTHENTICATION_REQUIRED = "authentication_required"
    SHORT_LOGIN = "short_login"
    CREDENTIALS_INVALID = "credentials_invalid"
    TOO_MANY_FAILURES = "too_many_failures"
    AUTHENTICATION_UNAVAILABLE = "authentication_unavailable"
    AUTHENTICATION_ABORTED = "authentication_aborted"
    MECHANISM_UNSUPPORTED = "mechanism_unsupported"
    LOGIN_SUSPENDED = "login_suspended"

    # What may they
    SENDER_NOT_OWNED = "sender_not_owned"
    HEADER_FROM_NOT_OWNED = "header_from_not_owned"
    SENDER_DOMAIN_NOT_ALLOWED = "sender_domain_not_allowed"
    RECIPIENT_DOMAIN_NOT_ALLOWED = "recipient_domain_not_allowed"
    RATE_LIMITED = "rate_limited"
    LIMIT_STORE_UNAVAILABLE = "limit_store_unavailable"

    # What does it look like
    SPAM = "spam"
    MALWARE = "malware"
    ENGINE_UNAVAILABLE = "engine_unavailable"
    FORGED_HEADER_FROM = "forged_header_from"
    RECIPIENT_BURST = "recipient_burst"
    UNKNOWN_RECIPIENTS = "unknown_recipients"
    NEW_NETWORKS = "new_networks"
    VOLUME_ANOMALY = "volume_anomaly"
    SAME_BODY_FAN_OUT = "same_body_fan_out"
    LINK_SHORTENER = "link_shortener"
    EXECUTABLE_ATTACHMENT = "executable_attachment"

    # What the protocol forbids
    LINE_ENDING = "line_ending"
    SYNTAX = "syntax"
    BAD_SEQUENCE = "bad_sequence"
    UNAUTHORIZED_PIPELINING = "unauthorized_pipelining"
    ADDRESS_SYNTAX = "address_syntax"
    SMTPUTF8_REQUIRED = "smtputf8_required"
    HEADER_MALFORMED = "header_malformed"
    MAIL_LOOP = "mail_loop"
    MESSAGE_TOO_BIG = "message_too_big"
    TOO_MANY_RECIPIENTS = "too_many_recipients"
    OTHER_ROUTE = "other_route"
    TOO_MANY_ERRORS = "too_many_errors"
    TLS_HANDSHAKE = "tls_handshake"
    PROXY_PROTOCOL = "proxy_protocol"

    # What the relay cannot take now
    QUEUE_FULL = "queue_full"
    TOO_MANY_CONNECTIONS = "too_many_connections"
    SHUTTING_DOWN = "shutting_down"
    TIMEOUT = "timeout"
    INTERNAL_ERROR = "internal_error"

    # What the next server says (PassThrough)
    UPSTREAM_REFUSED = "upstream_refused"
    UPSTREAM_UNAVAILABLE = "upstream_unavailable"


SUSPICION_REASONS = frozenset(
    {
        Reason.FORGED_HEADER_FROM,
        Reason.RECIPIENT_BURST,
        Reason.UNKNOWN_RECIPIENTS,
        Reason.NEW_NETWORKS,
        Reason.VOLUME_ANOMALY,
        Reason.SAME_BODY_FAN_OUT,
        Reason.LINK_SHORTENER,
        Reason.EXECUTABLE_ATTACHMENT,
        Reason.SPAM,
    }
)
"""The reasons that a `suspected_spam` session can have."""


class Result(enum.StrEnum):
    """How a session ended; on a session with several events the first in this order wins."""

    SUSPECTED_SPAM = "suspected_spam"
    ACCEPTED = "accepted"
    REJECTED = "rejected"
    NONE = "none"


@dataclass(frozen=True)
class Reply:
    """An SMTP reply.

    `status` is the enhanced status code (RFC 3463), empty where RFC 2034 forbids one (greeting, EHLO, 3yz).
    """

    code: int
    status: str
    text: str
    close: bool = False
    """The connection is closed after this reply."""

    @property
    def is_positive(self) -> bool:
        return self.code < 400

    @property
    def is_transient(self) -> bool:
        return 400 <= self.code < 500

    @cached_property
    def encoded(self) -> bytes:
        """The reply on the wire: every line with code and status (RFC 2034 section 4), none over 512 octets."""
        prefix = f"{self.status} " if self.status else ""
        room = MAXIMUM_REPLY_LINE - len(prefix) - 6
        if len(self.text) <= room and self.text.isascii() and "\n" not in self.text:  # nearly all
            return f"{self.code} {prefix}{self.text}\r\n".encode()
        lines: list[str] = []
        for line in self.text.split("\n"):
            rest = line.encode("utf-8", "replace").decode("utf-8")
            while len(rest.encode()) > room:
                cut = rest.encode()[:room].decode("utf-8", "ignore")
                cut = cut[: cut.rfind(" ")] if " " in cut else cut
                lines.append(cut)
                rest = rest[len(cut) :].lstrip(" ")
            lines.append(rest)
        last = len(lines) - 1
        return b"".join(
            f"{self.code}{' ' if number == last else '-'}{prefix}{line}\r\n".encode()
            for number, line in enumerate(lines)
        )

    def __str__(self) -> str:
        return f"{self.code} {self.status} {self.text}" if self.status else f"{self.code} {self.text}"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is answered, and the named reason for it."""

    reply: Reply
    reason: Reason

    @property
    def is_positive(self) -> bool:
        return self.reply.is_positive


GUIDE = "configure your mail client"

# --- positive -------------------------------------------------------------------------------------------------------
OK = Reply(250, "2.0.0", "OK")
SENDER_OK = Reply(250, "2.1.0", "Sender OK")
RECIPIENT_OK = Reply(250, "2.1.5", "Recipient OK")
START_DATA = Reply(354, "", "End data with <CR><LF>.<CR><LF>")
BYE = Reply(221, "2.0.0", "Bye", close=True)
READY_FOR_TLS = Reply(220, "2.0.0", "Ready to start TLS")
AUTHENTICATED = Reply(235, "2.7.0", "Authentication successful")
VERIFY_DECLINED = Reply(252, "2.5.2", "Cannot verify the user, but will take a message for delivery")
HELP = Reply(
    214,
    "2.0.0",
    "This server relays mail for those who log in.\nEHLO HELO MAIL RCPT DATA RSET NOOP QUIT STARTTLS AUTH VRFY HELP",
)

# --- who is it (RFC 4954, RFC 6409 section 4.3) ---------------------------------------------------------------------
TLS_REQUIRED = Reply(
    530,
    "5.7.0",
    f"Must issue a STARTTLS command first, then log in: {GUIDE} to use STARTTLS on this port, or SSL/TLS on port 465, "
    "and to log in with your full e-mail address and password",
)
AUTHENTICATION_REQUIRED = Reply(
    530,
    "5.7.0",
    f"Authentication required: {GUIDE} to log in to this outgoing server with your full e-mail address and password",
)
TLS_BEFORE_AUTH = Reply(
    538,
    "5.7.11",
    "Encryption required for the requested authentication mechanism: use STARTTLS first, or a port with TLS",
)
SHORT_LOGIN = Reply(
    535,
    "5.7.8",
    "Authentication failed: log in with the full e-mail address (name@domain) and not only the account name",
)
CREDENTIALS_INVALID = Reply(535, "5.7.8", "Authentication failed: wrong login or password")
TOO_MANY_FAILURES = Reply(
    421, "4.7.0", "Too many failed logins; check login and password and try again later", close=True
)
AUTHENTICATION_UNAVAILABLE = Reply(454, "4.7.0", "Temporary authentication failure; try again later")
AUTHENTICATION_ABORTED = Reply(501, "5.7.0", "Authentication aborted by the client")
MECHANISM_UNSUPPORTED = Reply(504, "5.5.4", "Authentication mechanism not supported")
SASL_SYNTAX = Reply(501, "5.5.2", "Cannot decode the authentication response (base64 expected)")
SASL_LINE_TOO_LONG = Reply(500, "5.5.6", "Authentication exchange line is too long")
ALREADY_AUTHENTICATED = Reply(503, "5.5.1", "Already authenticated")

# --- what the protocol forbids (RFC 5321 section 4.2) ---------------------------------------------------------------
COMMAND_UNKNOWN = Reply(500, "5.5.1", "Command not recognized")
COMMAND_NOT_IMPLEMENTED = Reply(502, "5.5.1", "Command not implemented")
COMMAND_TOO_LONG = Reply(500, "5.5.2", "Command line too long")
COMMAND_LINE_ENDING = Reply(500, "5.5.2", "Bare CR, bare LF or NUL in a command; lines end with CRLF")
DATA_LINE_ENDING = Reply(
    550,
    "5.5.2",
    "Bare CR, bare LF or NUL in the message; every line must end with CRLF (nothing was queued)",
    close=True,
)
HELLO_FIRST = Reply(503, "5.5.1", "Send EHLO or HELO first")
NESTED_MAIL = Reply(503, "5.5.1", "Sender already given; RSET starts over")
MAIL_FIRST = Reply(503, "5.5.1", "Send MAIL first")
RECIPIENT_FIRST = Reply(503, "5.5.1", "Send RCPT first")
AUTH_IN_TRANSACTION = Reply(503, "5.5.1", "AUTH is not allowed during a mail transaction")
TLS_ALREADY_ACTIVE = Reply(503, "5.5.1", "TLS is already active")
TLS_NOT_OFFERED = Reply(502, "5.5.1", "STARTTLS is not offered here")
TLS_PIPELINED = Reply(501, "5.5.2", "Nothing may follow STARTTLS before its reply (RFC 3207 section 4.2)", close=True)
UNAUTHORIZED_PIPELINING = Reply(503, "5.5.0", "Improper use of command pipelining (RFC 2920 section 3.1)", close=True)
NO_VALID_RECIPIENTS = Reply(554, "5.5.1", "No valid recipients")
PARAMETER_UNKNOWN = Reply(555, "5.5.4", "Parameter not recognized or not implemented")
PARAMETER_SYNTAX = Reply(501, "5.5.4", "Syntax error in parameters")
SENDER_SYNTAX = Reply(553, "5.1.7", "The sender address is not valid; expected MAIL FROM:<user@domain>")
RECIPIENT_SYNTAX = Reply(553, "5.1.3", "The recipient address is not valid; expected RCPT TO:<user@domain>")
SMTPUTF8_REQUIRED = Reply(553, "5.6.7", "The address is not ASCII: give the SMTPUTF8 parameter with MAIL (RFC 6531)")
MESSAGE_TOO_BIG = Reply(552, "5.3.4", "Message size exceeds the limit")
TOO_MANY_RECIPIENTS = Reply(452, "4.5.3", "Too many recipients; send the rest in another message")
TOO_MANY_ERRORS = Reply(421, "4.7.0", "Too many errors on this connection", close=True)
MAIL_LOOP = Reply(554, "5.4.6", "Mail loop: too many Received header fields")

PROXY_REQUIRED = Reply(
    421, "4.7.0", "Only a trusted load balancer may connect here, with a PROXY protocol header", close=True
)

# --- what the relay cannot take now ---------------------------------------------------------------------------------
QUEUE_FULL = Reply(452, "4.3.1", "Insufficient storage; try again later")
TOO_MANY_CONNECTIONS = Reply(421, "4.7.0", "Too many connections; try again later", close=True)
SHUTTING_DOWN = Reply(421, "4.3.2", "Service is shutting down; try again", close=True)
TIMED_OUT = Reply(421, "4.4.2", "Timeout waiting for the client", close=True)
INTERNAL_ERROR = Reply(451, "4.3.0", "Local error in processing; try again later")
ENGINE_UNAVAILABLE = Reply(451, "4.7.1", "The message cannot be scanned now; try again later")
LIMIT_STORE_UNAVAILABLE = Reply(451, "4.7.1", "Rate limits cannot be checked now; try again later")
OTHER_ROUTE = Reply(452, "4.5.3", "This recipient goes another way than the first; send it in another message")
UPSTREAM_UNAVAILABLE = Reply(451, "4.4.1", "The next server cannot be reached now; try again later")
LOGIN_SUSPENDED_STATUS = "4.7.1"


def syntax_error(expected: str) -> Reply:
    return Reply(501, "5.5.4", f"Syntax: {expected}")


def greeting(hostname: str) -> Reply:
    """RFC 5321 section 4.2: the greeting names the host, and nothing of the software or its version."""
    return Reply(220, "", f"{hostname} ESMTP")


def queued(queue_id: str) -> Reply:
    return Reply(250, "2.0.0", f"OK: queued as {queue_id}")


def passed_on(queue_id: str, answer: str) -> Reply:
    return Reply(250, "2.0.0", f"OK: {queue_id} was taken by the next server: {answer}")


def login_suspended(login: str) -> Reply:
    return Reply(450, LOGIN_SUSPENDED_STATUS, f"{login} is suspended; ask the owner of this relay")


def sender_not_owned(login: str, sender: str) -> Reply:
    """At MAIL: the reverse-path is not the login's (RFC 6409 section 6.1)."""
    return Reply(553, "5.7.1", f"Sender address rejected: {login} may not send as {sender}")


def header_from_not_owned(login: str, sender: str) -> Reply:
    """After the data: an author address (From, Sender, Resent-*) is not the login's."""
    return Reply(550, "5.7.1", f"Sender address rejected: {login} may not send as {sender}")


def sender_domain_not_allowed(domain: str) -> Reply:
    return Reply(550, "5.7.1", f"Sender domain {domain} is not allowed on this relay")


def recipient_domain_not_allowed(domain: str) -> Reply:
    return Reply(550, "5.7.1", f"Recipient domain {domain} is not allowed on this relay")


def rate_limited(limit: str, retry_after: float, reject: bool) -> Reply:
    """`retry_after` is in seconds."""
    if reject:
        return Reply(550, "5.7.1", f"Rate limit {limit} is used up")
    return Reply(450, "4.7.1", f"Rate limit {limit} is used up; retry after {max(1, round(retry_after))} s")


def more_than_limit(limit: str) -> Reply:
    """The message alone is more than the limit lets through at once: trying again is to no purpose."""
    return Reply(550, "5.7.1", f"The message alone is over rate limit {limit}; send it in smaller parts")


def spam_rejected(reason: Reason) -> Reply:
    return Reply(550, "5.7.1", f"Message rejected as spam ({reason})")


def malware_found(name: str) -> Reply:
    return Reply(550, "5.7.1", f"Message rejected: malware found ({name})")


def header_malformed(what: str) -> Reply:
    return Reply(550, "5.6.0", f"The message header is malformed: {what}")
