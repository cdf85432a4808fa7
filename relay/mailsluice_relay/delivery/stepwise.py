"""A transaction with an upstream that somebody else drives step by step: MAIL, each RCPT as it comes, the text last.

Each step has the upstream's own answer before the next is taken. What cannot be known at MAIL (the size, whether the
header needs SMTPUTF8) is looked at before the text is sent.
"""

from __future__ import annotations

from mailsluice_relay.delivery.client import Connection, mail_command, recipient_command
from mailsluice_relay.delivery.outcome import Delivered, Failed, FailureClass, Fault, Outcome, Retry, Stage, classify
from mailsluice_relay.envelope import BodyType, Content, Envelope, Recipient

Refusal = Retry | Failed


class StepwiseTransaction:
    """On a connection of its own. Whatever happens, `connection.is_usable` tells whether it is good for another."""

    def __init__(self, connection: Connection, envelope: Envelope) -> None:
        self.connection = connection
        self._envelope = envelope
        offered = connection.capabilities
        self._utf8 = envelope.internationalized and "SMTPUTF8" in offered

    async def open(self) -> Refusal | None:
        """MAIL. None: taken."""
        self.connection.transactions += 1
        envelope, offered = self._envelope, self.connection.capabilities
        if envelope.sender is not None and envelope.sender.is_internationalized and not self._utf8:
            return _NO_UTF8
        if offered.size is not None and (envelope.declared_size or 0) > offered.size:
            return _too_big(offered.size)
        command = mail_command(
            envelope.sender,
            offered,
            size=envelope.declared_size,
            eight_bit=envelope.body is BodyType.EIGHT_BIT_MIME,
            utf8=self._utf8,
            ret=envelope.ret,
            envid=envelope.envid,
        )
        try:
            await self.connection.begin()
        except Fault as fault:
            return self._broken(fault)
        return await self._ask(command, Stage.MAIL)

    async def add(self, recipient: Recipient) -> Refusal | None:
        """RCPT. None: taken."""
        if recipient.mailbox.is_internationalized and not self._utf8:
            return _NO_UTF8
        return await self._ask(recipient_command(recipient, self.connection.capabilities), Stage.RECIPIENT)

    async def finish(self, content: Content) -> Outcome:
        """DATA and the text: for all recipients that were taken."""
        connection = self.connection
        limit = connection.capabilities.size
        if limit is not None and content.size > limit:
            connection.leave()
            return _too_big(limit)
        if self._envelope.internationalized and not self._utf8 and not content.header.isascii():
            connection.leave()
            return _NO_UTF8
        try:
            reply = await connection.command(b"DATA", Stage.DATA)
            connection.heed(reply)
            if reply.code != 354:
                connection.leave()
                return classify(Stage.DATA, reply)
            await connection.send_text(content)
            reply = await connection.end_of_data()
        except Fault as fault:
            return self._broken(fault)
        except BaseException:
            connection.abort()  # cancelled in the middle: nobody knows where the dialogue is
            raise
        connection.heed(reply)
        if reply.code // 100 == 2:
            return Delivered(reply, notifies="DSN" in connection.capabilities)
        return classify(Stage.END_OF_DATA, reply)

    async def _ask(self, command: bytes, stage: Stage) -> Refusal | None:
        connection = self.connection
        try:
            reply = await connection.command(command.removesuffix(b"\r\n"), stage)
        except Fault as fault:
            return self._broken(fault)
        except BaseException:
            connection.abort()
            raise
        connection.heed(reply)
        return None if reply.code // 100 == 2 else classify(stage, reply)

    def _broken(self, fault: Fault) -> Retry:
        self.connection.abort()
        return fault.retry


_NO_UTF8 = Failed(
    FailureClass.MESSAGE,
    Stage.MAIL,
    "the next server does not take internationalized addresses (SMTPUTF8)",
    "5.6.7",  # RFC 6531 section 3.5
)


def _too_big(limit: int) -> Failed:
    return Failed(FailureClass.MESSAGE, Stage.MAIL, f"the next server takes no more than {limit} octets", "5.3.4")
