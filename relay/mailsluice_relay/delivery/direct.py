"""Delivery to the mail servers of the recipients' own domains (`type: DirectToMX`), behind the interface of a `Pool`.

Each address of each server has a pool of its own, so that connections are kept, limited and slowed down by destination,
and one that is down costs nothing but its first attempts. Pools that nobody used for a while are closed.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final

from mailsluice_relay.config import UpstreamLimits
from mailsluice_relay.delivery.allowance import Allowance
from mailsluice_relay.delivery.client import Connection, Mail, Timeouts
from mailsluice_relay.delivery.mx import Destination, MailExchangers
from mailsluice_relay.delivery.outcome import (
    FailureClass,
    Fault,
    Outcome,
    Retry,
    Stage,
    UndeliverableError,
    should_fail_over,
)
from mailsluice_relay.delivery.pace import Pace
from mailsluice_relay.delivery.pool import PATIENCE, Clocks, Pool, UpstreamState
from mailsluice_relay.delivery.target import Target
from mailsluice_relay.envelope import Mailbox

PER_DESTINATION: Final = 5
"""Connections to one address, and never more than half of the upstream's: others get mail, too."""
KEPT_FOR: Final = 600.0
"""Seconds that a destination is remembered after its last mail."""
MAXIMUM_POOLS: Final = 1000


class Direct:
    def __init__(
        self,
        target: Target,
        limits: UpstreamLimits,
        *,
        exchangers: MailExchangers,
        clocks: Clocks,
        on_throttled: Callable[[float], None],
        timeouts: Timeouts | None = None,
        allowance: Allowance | None = None,
    ) -> None:
        self.target = target
        self.limits = limits
        self._exchangers = exchangers
        self._clocks = clocks
        self._on_throttled = on_throttled
        self._timeouts = timeouts
        self._pace = Pace(limits, allowance)
        self._slots = asyncio.Semaphore(limits.connections)
        self._pools: OrderedDict[Destination, tuple[Pool, float]] = OrderedDict()
        self._leased: dict[Connection, Pool] = {}
        self._farewells: set[asyncio.Task[None]] = set()
        self._closed = False

    # --- what is known ------------------------------------------------------------------------------------------------
    @property
    def is_up(self) -> bool:
        """There is no one server that could be down."""
        return not self._closed

    @property
    def connections(self) -> int:
        return sum(pool.connections for pool, _ in self._pools.values())

    @property
    def state(self) -> UpstreamState:
        return UpstreamState(self.is_up, "", None, self.connections, 0.0)

    @property
    def is_available(self) -> bool:
        return not self._closed and self.resumes_in() <= PATIENCE

    def resumes_in(self) -> float:
        """Seconds until the next day's allowance."""
        now = self._clocks.now()
        when = self._pace.used_up_until(now)
        return 0.0 if when is None else when - now

    @property
    def why_not(self) -> str:
        if self._closed:
            return f"upstream {self.target.name} has just been given another configuration"
        return f"the messages per day of upstream {self.target.name} are used up"

    def probe(self, *, at_once: bool = False) -> None:
        """Nobody to look at before there is mail: destinations look after themselves."""

    async def check(self) -> None:
        """As `probe`."""

    def route_of(self, recipient: Mailbox) -> str:
        """Recipients of one route can share a transaction: those of one domain."""
        return recipient.domain.lower()

    # --- mail ---------------------------------------------------------------------------------------------------------
    async def deliver(self, mail: Mail) -> list[Outcome]:
        """One transaction for each domain; an outcome for each recipient."""
        domains: dict[str, list[int]] = {}
        for position, recipient in enumerate(mail.recipients):
            domains.setdefault(self.route_of(recipient.mailbox), []).append(position)
        outcomes: dict[int, Outcome] = {}

        async def one(domain: str, positions: Sequence[int]) -> None:
            part = replace(mail, recipients=[mail.recipients[position] for position in positions])
            outcomes.update(zip(positions, await self._to_domain(domain, part), strict=True))

        async with asyncio.TaskGroup() as group:
            for domain, positions in domains.items():
                group.create_task(one(domain, positions))
        return [outcomes[position] for position in range(len(mail.recipients))]

    async def _to_domain(self, domain: str, mail: Mail) -> list[Outcome]:
        async with self._slots:
            try:
                await self._keep_pace()
                destinations = await self._exchangers.destinations(domain, hostname=self.target.hostname)
            except UndeliverableError as error:
                return [error.outcome for _ in mail.recipients]
            except Fault as fault:
                return [fault.retry for _ in mail.recipients]
            outcomes: list[Outcome] = [_nobody(domain) for _ in mail.recipients]
            todo = list(range(len(mail.recipients)))
            for destination in destinations:
                pool = self._pool(destination)
                part = replace(mail, recipients=[mail.recipients[position] for position in todo])
                for position, outcome in zip(todo, await pool.deliver(part), strict=True):
                    outcomes[position] = replace(outcome, host=destination.host)
                todo = [position for position in todo if _may_try_next(outcomes[position])]
                if not todo:
                    break
            return outcomes

    async def lease(self, recipient: Mailbox) -> Connection:
        """As `Pool.lease`, to a server of the recipient's domain. Raises Fault and UndeliverableError."""
        await self._keep_pace()
        domain = self.route_of(recipient)
        destinations = await self._exchangers.destinations(domain, hostname=self.target.hostname)
        fault = Fault(FailureClass.CONNECTION, Stage.CONNECT, _nobody(domain).text)
        for destination in destinations:
            pool = self._pool(destination)
            try:
                connection = await pool.lease(recipient)
            except Fault as error:
                fault = error
                continue
            self._leased[connection] = pool
            return connection
        raise fault

    def end_lease(self, connection: Connection, outcomes: list[Outcome]) -> None:
        self._leased.pop(connection).end_lease(connection, outcomes)

    async def _keep_pace(self) -> None:
        wait = self._pace.reserve(self._clocks.monotonic())
        if wait > 0:
            await asyncio.sleep(wait)
        if self._pace.used_up_until(self._clocks.now()) is not None:
            raise Fault(FailureClass.UNAVAILABLE, Stage.CONNECT, self.why_not)
        self._pace.count(self._clocks.now())

    # --- destinations -------------------------------------------------------------------------------------------------
    def _pool(self, destination: Destination) -> Pool:
        now = self._clocks.monotonic()
        pool, _ = self._pools.pop(destination, (None, 0.0))
        if pool is None:
            pool = self._new_pool(destination)
        self._pools[destination] = pool, now
        while (oldest := next(iter(self._pools.values())))[1] < now - KEPT_FOR or len(self._pools) > MAXIMUM_POOLS:
            self._pools.popitem(last=False)
            self._say_goodbye(oldest[0])
        return pool

    def _new_pool(self, destination: Destination) -> Pool:
        target = replace(self.target, host=destination.host, address=destination.address)
        return Pool(
            target,
            UpstreamLimits(connections=max(1, min(PER_DESTINATION, self.limits.connections // 2))),
            clocks=self._clocks,
            on_up=_nothing_waits,
            on_throttled=self._on_throttled,
            timeouts=self._timeouts,
        )

    def _say_goodbye(self, pool: Pool) -> None:
        task = asyncio.get_running_loop().create_task(pool.close())
        self._farewells.add(task)
        task.add_done_callback(self._farewells.discard)

    async def close(self) -> None:
        self._closed = True
        for pool, _ in self._pools.values():
            self._say_goodbye(pool)
        self._pools.clear()
        if self._farewells:
            await asyncio.wait(list(self._farewells))


def _may_try_next(outcome: Outcome) -> bool:
    """Not for one that wants us slower: the next server of a domain is the same people's."""
    return isinstance(outcome, Retry) and outcome.failure is not FailureClass.THROTTLED and should_fail_over(outcome)


def _nobody(domain: str) -> Retry:
    return Retry(FailureClass.CONNECTION, Stage.CONNECT, f"no mail server of {domain} can be reached")


def _nothing_waits() -> None:
    """A destination that is up again: what is for it comes when its time comes."""
