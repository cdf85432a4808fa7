"""One transaction passed straight through to an upstream (`queue.mode: PassThrough`): the client hears its answers.

The upstream is asked about a recipient before the client is answered, so that those who were told 250 are exactly those
that the upstream has taken. All recipients go one way; who would go another is told to come again (452). What the
upstream could not answer for, because it was lost on the way, is refused as a whole after the data (451): nothing is
ever sent to a part of the recipients that the client believes in.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import structlog

from mailsluice_relay import reply
from mailsluice_relay.delivery.outcome import (
    Delivered,
    Failed,
    FailureClass,
    Fault,
    Outcome,
    Retry,
    Stage,
    UndeliverableError,
    should_fail_over,
)
from mailsluice_relay.delivery.pool import Pool
from mailsluice_relay.delivery.stepwise import Refusal, StepwiseTransaction
from mailsluice_relay.dispatch.upstreams import Upstreams
from mailsluice_relay.envelope import Envelope, Mailbox, Message, Recipient
from mailsluice_relay.metrics import Metrics
from mailsluice_relay.reply import Reason, Reply, Verdict

if TYPE_CHECKING:
    from mailsluice_relay.delivery.direct import Direct

log = structlog.get_logger("mailsluice.dispatch")

_TAKEN = Verdict(reply.RECIPIENT_OK, Reason.ACCEPTED)
_OTHER_ROUTE = Verdict(reply.OTHER_ROUTE, Reason.OTHER_ROUTE)
_UNAVAILABLE = Verdict(reply.UPSTREAM_UNAVAILABLE, Reason.UPSTREAM_UNAVAILABLE)


class Passage:
    """From MAIL to its end. The steps are taken one after the other; `close` ends it at any time."""

    def __init__(
        self,
        upstreams: Upstreams,
        envelope: Envelope,
        *,
        metrics: Metrics,
        now: Callable[[], float],
        sign: Callable[[Message], Awaitable[Message]],
        redirect_to: Mailbox | None,
    ) -> None:
        self._upstreams = upstreams
        self._envelope = envelope
        self._metrics = metrics
        self._now = now
        self._sign = sign
        self._redirect_to = redirect_to
        self._name = ""
        self._route = ""
        """The domain, where each has servers of its own (`DirectToMX`)."""
        self._pool: Pool | Direct | None = None
        self._transaction: StepwiseTransaction | None = None
        self._tried: set[str] = set()
        self._taken: list[Recipient] = []
        self._outcomes: list[Outcome] = []
        """What was learnt of the upstream in this transaction."""
        self._is_broken = False
        """The upstream has not answered for everybody who was told 250."""

    # --- the steps ----------------------------------------------------------------------------------------------------
    async def recipient(self, recipient: Recipient) -> Verdict:
        """What to answer to this RCPT."""
        if self._is_broken:
            return _UNAVAILABLE
        if self._redirect_to is not None:
            if self._taken:
                return _TAKEN  # everything goes to the one address, once
            recipient = Recipient(self._redirect_to)
        try:
            refusal = await self._add(recipient)
        except BaseException:
            self._is_broken = True  # it may have been taken, and the client will not be told so
            raise
        if refusal is None:
            self._taken.append(recipient)
            return _TAKEN
        return refusal if isinstance(refusal, Verdict) else told(refusal)

    async def submit(self, message: Message) -> Verdict:
        """Send the text; what to answer to it."""
        transaction, pool = self._transaction, self._pool
        if self._is_broken or transaction is None or pool is None:
            return _UNAVAILABLE
        message = await self._sign(message)
        self._is_broken = True  # whatever happens from here on, there is no second try
        outcome = await transaction.finish(message.content)
        self._outcomes = [outcome]
        self._count(message, outcome)
        self.close()
        if not isinstance(outcome, Delivered):
            return told(outcome)
        message.content.body.close()
        return Verdict(reply.passed_on(message.queue_id, _ascii(str(outcome.reply))), Reason.ACCEPTED)

    def close(self) -> None:
        """Leave the upstream; a transaction that was not finished is given up there. Idempotent."""
        if self._transaction is not None and self._pool is not None:
            if not self._outcomes:
                self._transaction.connection.leave()
            self._pool.end_lease(self._transaction.connection, self._outcomes)
        self._transaction = self._pool = None
        self._outcomes = []

    # --- the upstream -------------------------------------------------------------------------------------------------
    async def _add(self, recipient: Recipient) -> Refusal | Verdict | None:
        while True:
            preferred = self._name or None
            name = self._upstreams.next_upstream(self._envelope.sender, recipient.mailbox, self._tried, preferred)
            if not isinstance(name, str):
                return _UNAVAILABLE
            pool = self._upstreams.pool(name)
            route = pool.route_of(recipient.mailbox) if pool is not None else ""
            is_same = self._transaction is not None and (name, route) == (self._name, self._route)
            if self._taken and not is_same:
                return _OTHER_ROUTE
            if not is_same:
                self.close()
                self._name, self._route = name, route
            refusal = await self._ask(pool, recipient)
            if refusal is None:
                return None
            self._metrics.delivery_attempts.labels(name, _word(refusal)).inc()
            if not (isinstance(refusal, Retry) and should_fail_over(refusal)):
                return refusal
            self._tried.add(name)
            self._outcomes = [refusal]
            self.close()
            if self._taken:  # they were this upstream's
                self._is_broken = True
                return refusal

    async def _ask(self, pool: Pool | Direct | None, recipient: Recipient) -> Refusal | None:
        transaction = self._transaction
        if transaction is None:
            try:
                opened = await self._open(pool, recipient)
            except Fault as fault:
                return fault.retry
            except UndeliverableError as error:
                return error.outcome
            if not isinstance(opened, StepwiseTransaction):
                return opened
            transaction = opened
        return await transaction.add(recipient)

    async def _open(self, pool: Pool | Direct | None, recipient: Recipient) -> StepwiseTransaction | Refusal:
        """MAIL, on a connection of the pool's; again where one had been closed while nobody used it.

        Raises Fault and UndeliverableError.
        """
        if pool is None:
            raise Fault(FailureClass.UNAVAILABLE, Stage.CONNECT, "just configured away")
        while True:
            connection = await pool.lease(recipient.mailbox)
            transaction = StepwiseTransaction(connection, self._envelope)
            try:
                refusal = await transaction.open()
            except BaseException:
                pool.end_lease(connection, [])
                raise
            if refusal is None:
                self._pool, self._transaction = pool, transaction
                return transaction
            is_stale = connection.transactions > 1 and not connection.is_usable
            pool.end_lease(connection, [] if is_stale else [refusal])
            if not is_stale:
                return refusal

    def _count(self, message: Message, outcome: Outcome) -> None:
        now = self._now()
        word = "delivered" if isinstance(outcome, Delivered) else _word(outcome)
        self._metrics.delivery_attempts.labels(self._name, word).inc(len(self._taken))
        if isinstance(outcome, Delivered):
            self._metrics.delivery_seconds.labels(self._name).observe(now - message.received_at)
        log.info(
            f"passed_on_{word}",
            queue_id=message.queue_id,
            login=message.login,
            upstream=self._name,
            recipients=len(self._taken),
            answer=str(outcome.reply) if isinstance(outcome, Delivered) else outcome.text,
            seconds=round(now - message.received_at, 3),
        )


def _word(refusal: Refusal) -> str:
    """As `mailsluice_delivery_attempts` counts it."""
    return "failed" if isinstance(refusal, Failed) else "deferred"


def told(refusal: Refusal) -> Verdict:
    """An upstream's refusal as the client hears it. What concerns the upstream and us alone is no client's business."""
    answer = refusal.reply
    if isinstance(refusal, Failed):
        code = answer.code if answer is not None else 552 if refusal.status == "5.3.4" else 550
        text = answer.text if answer is not None else refusal.text
        return Verdict(Reply(code, refusal.status, _ascii(text)), Reason.UPSTREAM_REFUSED)
    if answer is None or (refusal.is_upstream_problem and refusal.failure is not FailureClass.THROTTLED):
        return _UNAVAILABLE
    # 421 and 454 would be about the client's own session, and 5yz that time heals is not for ever.
    code = answer.code if answer.code in {450, 451, 452} else 451
    status = f"4.{answer.status[2:]}" if answer.status else "4.0.0"
    return Verdict(Reply(code, status, _ascii(answer.text)), Reason.UPSTREAM_REFUSED)


def _ascii(text: str) -> str:
    """Replies are ASCII (RFC 5321 section 4.2)."""
    return text.encode("ascii", "backslashreplace").decode()


__all__ = ["Passage", "told"]
