"""What an attempt comes to for a message: who is settled, when the rest is tried again, whom to tell. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from mailsluice_relay.config import Queue
from mailsluice_relay.delivery.outcome import Delivered, Failed, FailureClass, Outcome, Retry
from mailsluice_relay.delivery.schedule import next_attempt, warning_due
from mailsluice_relay.dsn import Action, RecipientReport, wanted
from mailsluice_relay.reply import Reply
from mailsluice_relay.spool.record import Entry, Progress, RecipientStatus, Standing

SHORTEST_WAIT = 1.0
"""Seconds before mail that could not be tried anywhere is looked at again."""


@dataclass(frozen=True, slots=True)
class Result:
    """Of one recipient in one attempt."""

    outcome: Outcome
    upstream: str | None = None
    """Who was tried last; None: nobody could be."""
    host: str | None = None
    resumes_in: float | None = None
    """With nobody tried: seconds until it is worth trying."""


@dataclass(slots=True)
class Conclusion:
    recipients: tuple[RecipientStatus, ...]
    """Where each of the envelope's recipients stands now."""
    progress: Progress | None = None
    """None: everybody is settled."""
    next_attempt: float | None = None
    reports: dict[Action, list[RecipientReport]] = field(default_factory=dict)
    """What the sender wants to hear."""
    bounces: list[str] = field(default_factory=list)
    """The class of each recipient's final failure, as `mailsluice_bounces` counts them."""


def conclude(
    entry: Entry, results: Mapping[int, Result], queue: Queue, *, now: float, random: Callable[[], float]
) -> Conclusion:
    """`results` holds every recipient that was pending."""
    recipients = entry.envelope.recipients
    if all(
        isinstance(result.outcome, Delivered) and (result.outcome.notifies or recipients[position].notify is None)
        for position, result in results.items()
    ):
        return _delivered(entry, results)
    tried = any(result.upstream is not None for result in results.values())
    attempts = entry.progress.attempts + tried
    again = _again(entry, results, queue, now=now, attempts=attempts, random=random)
    warn = not entry.progress.warned and warning_due(queue, now=now, received_at=entry.received_at)
    conclusion = Conclusion((), next_attempt=again)
    statuses = list(entry.progress.recipients)
    for position, result in results.items():
        status = statuses[position]
        standing, report, bounce = _recipient(result, expired=again is None, lifetime=queue.lifetime)
        outcome = result.outcome
        text = str(outcome.reply) if isinstance(outcome, Delivered) else outcome.text
        statuses[position] = RecipientStatus(standing, status.attempts + (result.upstream is not None), text)
        if bounce:
            conclusion.bounces.append(bounce)
        recipient = entry.envelope.recipients[position]
        if report is None or (report is Action.DELAYED and not warn):
            continue
        # NOTIFY is the sender's wish. Where there is no sender, who else hears of it is not for the envelope to say.
        if entry.envelope.sender is not None and not wanted(recipient, report):
            continue
        conclusion.reports.setdefault(report, []).append(
            RecipientReport(
                recipient=recipient,
                action=report,
                status=_status(outcome, report, expired=again is None),
                text=_explanation(outcome, expired=again is None, lifetime=queue.lifetime),
                reply=None if outcome.reply is None else _line(outcome.reply),
                remote=result.host if outcome.reply is not None else None,
            )
        )
    conclusion.recipients = tuple(statuses)
    if any(status.standing is Standing.PENDING for status in statuses):
        conclusion.progress = Progress(conclusion.recipients, attempts, entry.progress.warned or warn)
    return conclusion


def _delivered(entry: Entry, results: Mapping[int, Result]) -> Conclusion:
    """What nearly every attempt comes to: everybody has it, and nobody is to be told by us."""
    statuses = list(entry.progress.recipients)
    for position, result in results.items():
        reply = "" if result.outcome.reply is None else str(result.outcome.reply)
        statuses[position] = RecipientStatus(Standing.DELIVERED, statuses[position].attempts + 1, reply)
    return Conclusion(tuple(statuses))


def _again(
    entry: Entry,
    results: Mapping[int, Result],
    queue: Queue,
    *,
    now: float,
    attempts: int,
    random: Callable[[], float],
) -> float | None:
    """When what can be tried again is tried again; None: never."""
    waiting = [result for result in results.values() if isinstance(result.outcome, Retry)]
    not_tried = [result.resumes_in for result in waiting if result.resumes_in is not None]
    if waiting and len(not_tried) == len(waiting):
        # Nothing was tried, so nothing is to be learnt from waiting longer each time: be there when it can be tried.
        end = entry.received_at + queue.lifetime
        wait = max(min(not_tried), SHORTEST_WAIT) * (1 + 0.25 * random())
        return None if now >= end else min(now + wait, end)
    return next_attempt(queue, now=now, received_at=entry.received_at, attempts=max(attempts, 1), random=random)


def _recipient(result: Result, *, expired: bool, lifetime: float) -> tuple[Standing, Action | None, str | None]:
    """Where the recipient stands now, what there is to tell, and the bounce class."""
    outcome = result.outcome
    if isinstance(outcome, Delivered):
        return Standing.DELIVERED, None if outcome.notifies else Action.RELAYED, None
    if isinstance(outcome, Failed):
        bounce = "policy" if outcome.failure is FailureClass.POLICY else "permanent"
        return Standing.FAILED, Action.FAILED, bounce
    if expired:
        return Standing.FAILED, Action.FAILED, "expired"
    return Standing.PENDING, Action.DELAYED, None


def _status(outcome: Outcome, action: Action, *, expired: bool) -> str:
    if isinstance(outcome, Failed):
        return outcome.status
    if isinstance(outcome, Delivered):
        return outcome.reply.status or "2.0.0"
    if action is Action.FAILED and expired:
        return "5.4.7"  # RFC 3463 section 3.5: delivery time expired
    return (outcome.reply.status if outcome.reply is not None else "") or "4.4.1"


def _explanation(outcome: Outcome, *, expired: bool, lifetime: float) -> str:
    if isinstance(outcome, Delivered):
        return str(outcome.reply)
    if isinstance(outcome, Retry) and expired:
        return f"not delivered within {lifetime / 3600:.0f} hours; last: {outcome.text}"
    return outcome.text


def _line(reply: Reply) -> str:
    return str(reply).replace("\n", " ")
