"""Which upstreams a mail may go through, and which of them it does. Pure; the choice by weight takes a random number.

Upstreams with a `match` that fits come before those without one; in each of both groups a lower priority comes first
(as in MX). An upstream with a `match` that does not fit is never used for that mail.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mailsluice_relay.config import Upstream
from mailsluice_relay.envelope import Mailbox


def fits(pattern: str, mailbox: Mailbox | None) -> bool:
    """`user@domain`, `*@domain`, `*@*.domain` (its subdomains only), `<>` for the null reverse-path.

    Domains are compared without case, local-parts with it folded too: routing by `Finance@` and `finance@` apart helps
    nobody (RFC 5321 section 2.4 leaves it to the domain).
    """
    if mailbox is None:
        return pattern == "<>"
    local_part, _, domain = pattern.rpartition("@")
    if local_part not in {"*", ""} and local_part.casefold() != mailbox.local_part.casefold():
        return False
    given, wanted = mailbox.domain.casefold(), domain.casefold()
    if wanted == "*":
        return True
    if wanted.startswith("*."):
        return given.endswith(wanted[1:]) and len(given) > len(wanted) - 1
    return given == wanted


def candidates(upstreams: Sequence[Upstream], sender: Mailbox | None, recipient: Mailbox) -> tuple[Upstream, ...]:
    """All upstreams for this pair, best first."""
    if len(upstreams) == 1 and not (upstreams[0].match_senders or upstreams[0].match_recipients):
        return (upstreams[0],)
    ranked: list[tuple[bool, int, int, Upstream]] = []
    for position, upstream in enumerate(upstreams):
        by_sender, by_recipient = upstream.match_senders, upstream.match_recipients
        if by_sender and not any(fits(pattern, sender) for pattern in by_sender):
            continue
        if by_recipient and not any(fits(pattern, recipient) for pattern in by_recipient):
            continue
        ranked.append((not (by_sender or by_recipient), upstream.priority, position, upstream))
    return tuple(item[3] for item in sorted(ranked, key=lambda item: item[:3]))


def choose(
    ordered: Sequence[Upstream],
    *,
    available: Callable[[Upstream], bool],
    random: Callable[[], float],
    preferred: str | None = None,
) -> Upstream | None:
    """The best available one; among equals the preferred, else by weight. None: none of them can take mail now."""
    usable = [upstream for upstream in ordered if available(upstream)]
    if not usable:
        return None
    best = usable[0]
    equals = [upstream for upstream in usable if _rank(upstream) == _rank(best)]
    if len(equals) == 1:
        return best
    for upstream in equals:
        if upstream.name == preferred:
            return upstream
    at = random() * sum(upstream.weight for upstream in equals)
    for upstream in equals:
        at -= upstream.weight
        if at < 0:
            return upstream
    return equals[-1]


def _rank(upstream: Upstream) -> tuple[bool, int]:
    return not (upstream.match_senders or upstream.match_recipients), upstream.priority
