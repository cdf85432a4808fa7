"""All upstreams together: routes a message's recipients, fails over, and keeps one pool for each upstream."""

from __future__ import annotations

import asyncio
import functools
from collections import defaultdict
from collections.abc import Callable, Coroutine, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING, Any, Final

import structlog

from mailsluice_relay.config import (
    Configuration,
    ConfigurationError,
    Credentials,
    QueueMode,
    Upstream,
    UpstreamType,
)
from mailsluice_relay.delivery.allowance import AllowanceBook
from mailsluice_relay.delivery.client import Mail, Timeouts
from mailsluice_relay.delivery.outcome import (
    Failed,
    FailureClass,
    Outcome,
    Retry,
    Stage,
    is_about_sender,
    should_fail_over,
)
from mailsluice_relay.delivery.pool import Clocks, Pool, UpstreamState
from mailsluice_relay.delivery.route import candidates, choose
from mailsluice_relay.delivery.target import Target, target_of
from mailsluice_relay.dispatch.conclusion import Result
from mailsluice_relay.envelope import Content, Mailbox
from mailsluice_relay.metrics import Metrics
from mailsluice_relay.spool.record import Entry

if TYPE_CHECKING:
    from mailsluice_relay.delivery.direct import Direct
    from mailsluice_relay.delivery.mx import MailExchangers

RECIPIENTS_PER_TRANSACTION: Final = 100
"""What every server must take (RFC 5321 section 4.5.3.1.8)."""

NO_ROUTE_WAIT: Final = 300.0
"""Seconds before mail that no upstream's `match` fits is looked at again: a new configuration may have one."""

log = structlog.get_logger("mailsluice.dispatch")


class Upstreams:
    def __init__(
        self,
        *,
        clocks: Clocks,
        metrics: Metrics,
        on_up: Callable[[], None],
        timeouts: Timeouts | None = None,
        exchangers: MailExchangers | None = None,
        book: AllowanceBook,
    ) -> None:
        self._clocks = clocks
        self._metrics = metrics
        self._attempts = functools.cache(metrics.delivery_attempts.labels)
        self._on_up = on_up
        self._timeouts = timeouts
        self._book = book
        self._exchangers = exchangers
        self._ordered: tuple[Upstream, ...] = ()
        self._pools: dict[str, Pool | Direct] = {}
        self._recipes: dict[str, object] = {}
        self._bounce_address: Mailbox | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    # --- configuration ------------------------------------------------------------------------------------------------
    @staticmethod
    def prepare(configuration: Configuration, credentials: Credentials) -> dict[str, Target]:
        """Raises ConfigurationError; nothing has changed then."""
        if configuration.queue.mode is QueueMode.PASS_THROUGH and configuration.spam.hold_at is not None:
            raise ConfigurationError(
                "spam.holdAt: with queue.mode PassThrough there is nowhere to hold mail; remove it"
            )
        names = [upstream.name for upstream in configuration.upstreams]
        for index, name in enumerate(names):
            if name in names[:index]:
                raise ConfigurationError(f"upstreams[{index}].name: there is another upstream {name}; names are unique")
        return {
            upstream.name: target_of(index, upstream, credentials, hostname=configuration.hostname)
            for index, upstream in enumerate(configuration.upstreams)
        }

    def apply(self, configuration: Configuration, credentials: Credentials, targets: Mapping[str, Target]) -> None:
        """Pools of upstreams that have not changed stay as they are, with their connections and what they know."""
        before, self._pools = self._pools, {}
        recipes, self._recipes = self._recipes, {}
        for upstream in configuration.upstreams:
            name = upstream.name
            self._recipes[name] = recipe = _recipe(configuration, credentials, upstream)
            if recipes.get(name) == recipe:
                self._pools[name] = before.pop(name)
                continue
            self._pools[name] = pool = self._new_pool(upstream, targets[name])
            self._observe(name, pool)
        for name, pool in before.items():
            self._spawn(pool.close())
            if name not in self._pools:
                self._metrics.upstream_up.remove(name)
                self._metrics.upstream_connections.remove(name)
        self._ordered = configuration.upstreams
        self._bounce_address = mailbox_of(configuration.bounces.address)

    def _new_pool(self, upstream: Upstream, target: Target) -> Pool | Direct:
        on_throttled = self._metrics.upstream_throttled.labels(upstream.name).inc
        if upstream.type is UpstreamType.DIRECT_TO_MX:
            return self._direct(upstream, target, on_throttled)
        return Pool(
            target,
            upstream.limits,
            clocks=self._clocks,
            on_up=self._on_up,
            on_throttled=on_throttled,
            timeouts=self._timeouts,
            allowance=self._book.of(upstream.name),
        )

    def _direct(self, upstream: Upstream, target: Target, on_throttled: Callable[[float], None]) -> Direct:
        # Here and not above: a resolver takes 6 MB, and few relays deliver by MX records.
        from mailsluice_relay.delivery.direct import Direct
        from mailsluice_relay.delivery.mx import MailExchangers, system_resolver

        if self._exchangers is None:
            self._exchangers = MailExchangers(system_resolver(), random=self._clocks.random)
        return Direct(
            target,
            upstream.limits,
            exchangers=self._exchangers,
            clocks=self._clocks,
            on_throttled=on_throttled,
            timeouts=self._timeouts,
            allowance=self._book.of(upstream.name),
        )

    def _observe(self, name: str, pool: Pool | Direct) -> None:
        self._metrics.upstream_up.labels(name).set_function(lambda: float(pool.is_up))
        self._metrics.upstream_connections.labels(name).set_function(lambda: float(pool.connections))

    @property
    def slots(self) -> Mapping[str, int]:
        """How many transactions each upstream takes at once."""
        return {upstream.name: upstream.limits.connections for upstream in self._ordered}

    # --- state --------------------------------------------------------------------------------------------------------
    def states(self) -> Mapping[str, UpstreamState]:
        return {name: pool.state for name, pool in self._pools.items()}

    def check(self) -> None:
        """Look at every upstream before there is any mail."""
        for pool in self._pools.values():
            self._spawn(pool.check())

    def probe(self) -> None:
        """Look at once at those that are down."""
        for pool in self._pools.values():
            if not pool.is_up:
                pool.probe(at_once=True)

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(pool.close() for pool in self._pools.values()))
        self._book.close()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # --- mail ---------------------------------------------------------------------------------------------------------
    def lane_of(self, entry: Entry) -> str:
        """Whose turn the message waits for: the upstream that its first pending recipient would go to now."""
        recipient = entry.envelope.recipients[entry.pending[0]].mailbox
        ordered = candidates(self._ordered, entry.envelope.sender, recipient)
        chosen = choose(ordered, available=self._is_available, random=self._clocks.random)
        if chosen is None:
            chosen = ordered[0] if ordered else self._ordered[0]
        return chosen.name

    def pool(self, name: str) -> Pool | Direct | None:
        """None: a new configuration has no such upstream any more."""
        return self._pools.get(name)

    def _is_available(self, upstream: Upstream) -> bool:
        return self._pools[upstream.name].is_available

    async def deliver(self, entry: Entry, content: Content, *, preferred: str) -> dict[int, Result]:
        """Try every pending recipient, at another upstream where one has a problem; a result for each of them.

        `preferred` is the lane that the message comes from: among equal upstreams all its recipients stay together.
        """
        results: dict[int, Result] = {}
        tried: defaultdict[int, set[str]] = defaultdict(set)
        todo: Sequence[int] = entry.pending
        while todo:
            groups: dict[str, list[int]] = {}
            for position in todo:
                recipient = entry.envelope.recipients[position].mailbox
                name = self.next_upstream(entry.envelope.sender, recipient, tried[position], preferred)
                if isinstance(name, Result):
                    results.setdefault(position, name)
                else:
                    groups.setdefault(name, []).append(position)
            todo = []
            for name, positions in groups.items():
                for start in range(0, len(positions), RECIPIENTS_PER_TRANSACTION):
                    part = positions[start : start + RECIPIENTS_PER_TRANSACTION]
                    todo += await self._transaction(name, entry, content, part, results, tried)
        return results

    def next_upstream(
        self, sender: Mailbox | None, recipient: Mailbox, tried: AbstractSet[str], preferred: str | None
    ) -> str | Result:
        """Where this recipient's mail goes now; or why nowhere."""
        ordered = candidates(self._ordered, sender, recipient)
        untried = [upstream for upstream in ordered if upstream.name not in tried]
        chosen = choose(untried, available=self._is_available, random=self._clocks.random, preferred=preferred)
        if chosen is not None:
            return chosen.name
        if not ordered:
            return _nowhere("no upstream's match fits this sender and recipient", NO_ROUTE_WAIT)
        pools = [self._pools[upstream.name] for upstream in ordered]
        return _nowhere(pools[0].why_not, min(pool.resumes_in() for pool in pools))

    async def _transaction(
        self,
        name: str,
        entry: Entry,
        content: Content,
        positions: Sequence[int],
        results: dict[int, Result],
        tried: defaultdict[int, set[str]],
    ) -> list[int]:
        """Fill in results; the positions that should be tried once more now."""
        pool = self._pools.get(name)
        if pool is None:  # reconfigured away while this message was under way
            for position in positions:
                tried[position].add(name)
            return list(positions)
        try:
            outcomes = await self._send(pool, entry, content, positions)
        except Exception as error:
            log.exception("transaction_broke", queue_id=entry.queue_id, upstream=name)
            broken = Retry(FailureClass.OTHER, Stage.CONNECT, f"local error: {type(error).__name__}")
            outcomes = [broken for _ in positions]
        has_progress = any(not _is_overflow(outcome) for outcome in outcomes)
        once_more = []
        for position, outcome in zip(positions, outcomes, strict=True):
            if _is_overflow(outcome) and has_progress:
                once_more.append(position)
                continue
            results[position] = Result(outcome, name, outcome.host or pool.target.host)
            if isinstance(outcome, Retry):
                self._attempts(name, "deferred").inc()
                if should_fail_over(outcome):
                    tried[position].add(name)
                    once_more.append(position)
            else:
                self._attempts(name, "failed" if isinstance(outcome, Failed) else "delivered").inc()
        return once_more

    async def _send(
        self, pool: Pool | Direct, entry: Entry, content: Content, positions: Sequence[int]
    ) -> list[Outcome]:
        envelope = entry.envelope
        recipients = [envelope.recipients[position] for position in positions]

        def mail(sender: Mailbox | None) -> Mail:
            return Mail(
                sender, recipients, content, envelope.body, envelope.internationalized, envelope.ret, envelope.envid
            )

        outcomes = await pool.deliver(mail(envelope.sender))
        if (
            envelope.sender is None
            and self._bounce_address is not None
            and all(isinstance(outcome, Failed) and is_about_sender(outcome) for outcome in outcomes)
        ):  # some providers refuse the null reverse-path from their customers
            outcomes = await pool.deliver(mail(self._bounce_address))
        return outcomes


def mailbox_of(address: str | None) -> Mailbox | None:
    if not address:
        return None
    local_part, _, domain = address.rpartition("@")
    return Mailbox(local_part, domain)


def _recipe(configuration: Configuration, credentials: Credentials, upstream: Upstream) -> object:
    """Everything that a pool is made from."""
    own = [] if upstream.credentials is None else [f"{upstream.credentials}."]
    files = {name: value for name, value in credentials.items() if name == upstream.ca or name.startswith(tuple(own))}
    return configuration.hostname, upstream, files


def _nowhere(text: str, resumes_in: float) -> Result:
    return Result(Retry(FailureClass.UNAVAILABLE, Stage.CONNECT, text), resumes_in=resumes_in)


def _is_overflow(outcome: Outcome) -> bool:
    """The transaction was full; the recipient itself is not refused."""
    return isinstance(outcome, Retry) and outcome.failure is FailureClass.RECIPIENTS


__all__ = ["Upstreams", "mailbox_of"]
