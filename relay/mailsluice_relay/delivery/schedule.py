"""When a deferred mail is tried again, when its sender is warned, when it is given up. Pure."""

from __future__ import annotations

from collections.abc import Callable

from mailsluice_relay.config import Queue, Retry

JITTER = 0.25
"""Of the delay, up or down: what was deferred together does not come back together."""


def delay(retry: Retry, attempts: int, random: Callable[[], float]) -> float:
    """Seconds to wait after so many attempts (1 after the first)."""
    # Bounded exponent: 2.0 ** 2000 would be an error, and `maximum` is reached long before.
    grown = retry.initial * retry.factor ** min(attempts - 1, 64)
    return min(grown, retry.maximum) * (1 - JITTER + 2 * JITTER * random())


def next_attempt(
    queue: Queue, *, now: float, received_at: float, attempts: int, random: Callable[[], float], not_before: float = 0.0
) -> float | None:
    """When to try again (seconds since the epoch); None: the lifetime is over.

    The last attempt falls on the end of the lifetime, so that an upstream that is back by then still gets the mail.
    """
    end = received_at + queue.lifetime
    if now >= end:
        return None
    return min(max(now + delay(queue.retry, attempts, random), not_before), end)


def warning_due(queue: Queue, *, now: float, received_at: float) -> bool:
    """Whether the sender should know by now that the mail is late (RFC 3461 section 4.1, DELAY)."""
    return queue.delay_warning is not None and now - received_at >= queue.delay_warning
