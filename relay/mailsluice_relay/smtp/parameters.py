"""Parameters of MAIL and RCPT (RFC 5321 section 4.1.2): SIZE, BODY, SMTPUTF8, RET, ENVID, AUTH; NOTIFY, ORCPT.

Values keep their case: ENVID and ORCPT come back to the sender in a DSN (RFC 3461 sections 4.2 and 4.4). A parameter
more is one function and one line in a table.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Final

from mailsluice_relay import reply
from mailsluice_relay.envelope import BodyType, Envelope, Mailbox, Notify, Recipient
from mailsluice_relay.reply import Reply
from mailsluice_relay.smtp import grammar

MAXIMUM_ENVID: Final = 100
"""Characters (RFC 3461 section 4.4)."""
MAXIMUM_ORCPT: Final = 500
"""Characters of parameter and value (RFC 3461 section 4.2)."""

_PARAMETER: Final = re.compile(r"([A-Za-z0-9][A-Za-z0-9\-]*+)(?:=([!-<>-~\x80-\U0010ffff]++))?+")
"""esmtp-param (RFC 5321 section 4.1.2; esmtp-value widened by RFC 6531 section 3.3)."""
_SIZE: Final = re.compile(r"[0-9]{1,20}")
_XTEXT: Final = re.compile(r"(?:[!-*,-<>-~]|\+[0-9A-F]{2})*+")
"""RFC 3461 section 4."""
_UTF_8_ADDRESS: Final = re.compile(r"(?:[!-*,-<>-\[\]-~\x80-\U0010ffff]|\\x\{[0-9A-F]{2,6}\}|\+[0-9A-F]{2})*+")
"""utf-8-addr-xtext and utf-8-addr-unitext (RFC 6533 section 3)."""
_ADDRESS_TYPE: Final = re.compile(r"[A-Za-z0-9\-]++")
_NOTIFICATIONS: Final = {"SUCCESS": Notify.SUCCESS, "FAILURE": Notify.FAILURE, "DELAY": Notify.DELAY}


class ParameterError(ValueError):
    """A parameter that is unknown or wrong; `reply` is the answer."""

    def __init__(self, reply: Reply) -> None:
        super().__init__(reply.text)
        self.reply = reply


def _bad(text: str) -> ParameterError:
    return ParameterError(Reply(reply.PARAMETER_SYNTAX.code, reply.PARAMETER_SYNTAX.status, text))


def envelope(sender: Mailbox | None, text: str) -> Envelope:
    """The transaction that MAIL begins. `text` is what follows the reverse-path. Raises ParameterError."""
    result = Envelope(sender)
    if text:
        for name, value in _split(text, _MAIL):
            _MAIL[name](result, value)
    return result


def recipient(mailbox: Mailbox, text: str) -> Recipient:
    """The recipient that RCPT names. `text` is what follows the forward-path. Raises ParameterError."""
    if not text:
        return Recipient(mailbox)
    found = dict(_split(text, _RCPT))
    return Recipient(
        mailbox,
        notify=_notify(found["NOTIFY"]) if "NOTIFY" in found else None,
        original=_original_recipient(found["ORCPT"]) if "ORCPT" in found else None,
    )


def _split(text: str, known: Mapping[str, object] | frozenset[str]) -> list[tuple[str, str | None]]:
    """Names in capitals and values as they came; each name at most once, and a known one."""
    if not text.startswith(" "):
        raise _bad("Expected a space between address and parameters")
    result: dict[str, str | None] = {}
    for parameter in text.split():
        match = _PARAMETER.fullmatch(parameter)
        if not match:
            raise _bad("Syntax error in parameters")
        name = match[1].upper()
        if name not in known:
            raise ParameterError(reply.PARAMETER_UNKNOWN)
        if name in result:
            raise _bad(f"{name} is given twice")
        result[name] = match[2]
    return list(result.items())


def _size(result: Envelope, value: str | None) -> None:
    """RFC 1870 section 3: one to twenty digits."""
    if value is None or not _SIZE.fullmatch(value):
        raise _bad("Expected SIZE=octets")
    result.declared_size = int(value)


def _body(result: Envelope, value: str | None) -> None:
    """RFC 6152 section 2."""
    try:
        result.body = BodyType((value or "").upper())
    except ValueError as error:
        raise _bad("Expected BODY=7BIT or BODY=8BITMIME") from error


def _smtputf8(result: Envelope, value: str | None) -> None:
    """RFC 6531 section 3.4."""
    if value is not None:
        raise _bad("SMTPUTF8 has no value")
    result.internationalized = True


def _ret(result: Envelope, value: str | None) -> None:
    """RFC 3461 section 4.3."""
    kind = (value or "").upper()
    if kind not in {"FULL", "HDRS"}:
        raise _bad("Expected RET=FULL or RET=HDRS")
    result.ret = kind


def _envid(result: Envelope, value: str | None) -> None:
    """RFC 3461 section 4.4."""
    if value is None or len(value) > MAXIMUM_ENVID or not _XTEXT.fullmatch(value):
        raise _bad(f"Expected ENVID=xtext of at most {MAXIMUM_ENVID} characters")
    result.envid = value


def _auth(_result: Envelope, value: str | None) -> None:
    """RFC 4954 section 5: must be accepted; since no client here is trusted to name others, it is taken as `<>`."""
    if value is None or not _XTEXT.fullmatch(value):
        raise _bad("Expected AUTH=<> or AUTH=xtext")


def _notify(value: str | None) -> Notify:
    """RFC 3461 section 4.1: NEVER alone, or a list of the others."""
    if value is None:
        raise _bad("Expected NOTIFY=NEVER or a list of SUCCESS, FAILURE, DELAY")
    words = value.upper().split(",")
    if words == ["NEVER"]:
        return Notify.NEVER
    result = Notify(0)
    for word in words:
        if word not in _NOTIFICATIONS or _NOTIFICATIONS[word] in result:
            raise _bad("Expected NOTIFY=NEVER or a list of SUCCESS, FAILURE, DELAY")
        result |= _NOTIFICATIONS[word]
    return result


def _original_recipient(value: str | None) -> str:
    """RFC 3461 section 4.2; with `utf-8` as the type RFC 6533 section 3."""
    kind, _, address = (value or "").partition(";")
    form = _UTF_8_ADDRESS if kind.lower() == "utf-8" else _XTEXT
    if (
        value is None
        or len(value) + len("ORCPT=") > MAXIMUM_ORCPT
        or not _ADDRESS_TYPE.fullmatch(kind)
        or not address
        or not form.fullmatch(address)
    ):
        raise _bad("Expected ORCPT=addr-type;xtext")
    return value


_MAIL: Final[Mapping[str, Callable[[Envelope, str | None], None]]] = {
    "SIZE": _size,
    "BODY": _body,
    "SMTPUTF8": _smtputf8,
    "RET": _ret,
    "ENVID": _envid,
    "AUTH": _auth,
}
_RCPT: Final = frozenset({"NOTIFY", "ORCPT"})


def parse_mail(argument: str) -> Envelope:
    """`FROM:<reverse-path> [parameters]`. Raises ParameterError or grammar.AddressError."""
    if argument[:5].upper() != "FROM:":
        raise ParameterError(reply.syntax_error("MAIL FROM:<address> [parameters]"))
    # A space after the colon is wrong (RFC 5321 section 3.3) and everywhere.
    sender, rest = grammar.reverse_path(argument[5:].lstrip(" "))
    return envelope(sender, rest)


def parse_rcpt(argument: str) -> Recipient:
    """`TO:<forward-path> [parameters]`. Raises ParameterError or grammar.AddressError."""
    if argument[:3].upper() != "TO:":
        raise ParameterError(reply.syntax_error("RCPT TO:<address> [parameters]"))
    mailbox, rest = grammar.forward_path(argument[3:].lstrip(" "))
    return recipient(mailbox, rest)
