"""The connections to one upstream: kept, reused, limited, paced; and whether that upstream is up.

`deliver` does one transaction. A connection that the upstream closed while it was idle is replaced without anybody
noticing. While the upstream is down nothing is sent: a probe (connect, TLS, EHLO, AUTH) is made at growing intervals,
and the connection of the one that succeeds is the first in the pool.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import structlog

from mailsluice_relay.config import UpstreamLimits
from mailsluice_relay.delivery.allowance import Allowance
from mailsluice_relay.delivery.breaker import Breaker
from mailsluice_relay.delivery.client import Connection, Mail, Timeouts, connect
from mailsluice_relay.delivery.oauth import Grant, Tokens
from mailsluice_relay.delivery.outcome import Delivered, FailureClass, Fault, Outcome, Retry, Stage
from mailsluice_relay.delivery.pace import Pace
from mailsluice_relay.delivery.target import Target
from mailsluice_relay.envelope import Mailbox

log = structlog.get_logger("mailsluice.delivery")

IDLE_TIMEOUT: Final = 30.0
"""Seconds that an unused connection is kept; most providers close theirs after one to five minutes."""
MESSAGES_PER_CONNECTION: Final = 100
PATIENCE: Final = 5.0
"""Seconds of a pause that mail waits for with a connection in hand; a longer one sends it elsewhere or back."""


@dataclass(frozen=True, slots=True)
class UpstreamState:
    """For people and /readyz. `last_error` holds no credentials."""

    up: bool
    last_error: str
    failure: FailureClass | None
    connections: int
    paused_seconds: float


@dataclass(frozen=True, slots=True)
class Clocks:
    """`now` is seconds since the epoch; `monotonic` never goes back; `random` is in [0, 1)."""

    now: Callable[[], float]
    monotonic: Callable[[], float]
    random: Callable[[], float]


class Pool:
    def __init__(
        self,
        target: Target,
        limits: UpstreamLimits,
        *,
        clocks: Clocks,
        on_up: Callable[[], None],
        on_throttled: Callable[[float], None],
        timeouts: Timeouts | None = None,
        allowance: Allowance | None = None,
    ) -> None:
        self.target = target
        self.limits = limits
        self._clocks = clocks
        self._on_up = on_up
        self._on_throttled = on_throttled
        self._timeouts = timeouts or Timeouts()
        login = target.login
        self._tokens = Tokens(login, now=clocks.now, monotonic=clocks.monotonic) if isinstance(login, Grant) else None
        self._pace = Pace(limits, allowance)
        self._breaker = Breaker(clocks.random)
        self._slots = asyncio.Semaphore(limits.connections)
        self._idle: list[tuple[Connection, asyncio.TimerHandle]] = []
        self._open = 0
        self._probe: asyncio.Task[None] | None = None
        self._probe_now = asyncio.Event()
        self._farewells: set[asyncio.Task[None]] = set()
        self._closed = False

    # --- what is known ------------------------------------------------------------------------------------------------
    @property
    def is_up(self) -> bool:
        return self._breaker.is_up

    @property
    def connections(self) -> int:
        return self._open

    @property
    def state(self) -> UpstreamState:
        return UpstreamState(
            up=self._breaker.is_up,
            last_error=self._breaker.last_error,
            failure=self._breaker.failure,
            connections=self._open,
            paused_seconds=self._pace.paused_for(self._clocks.monotonic()),
        )

    @property
    def is_available(self) -> bool:
        """Whether mail given to it now would be sent soon."""
        return not self._closed and self._breaker.is_up and self.resumes_in() <= PATIENCE

    def resumes_in(self) -> float:
        """Seconds until it is worth trying: the next probe, the end of a pause, or the next day's allowance."""
        monotonic, now = self._clocks.monotonic(), self._clocks.now()
        waits = [self._pace.paused_for(monotonic)]
        if not self._breaker.is_up:
            waits.append(self._breaker.probe_at - monotonic)
        if (when := self._pace.used_up_until(now)) is not None:
            waits.append(when - now)
        return max(waits)

    @property
    def why_not(self) -> str:
        """Why it is not available, for people."""
        if self._closed:
            return f"upstream {self.target.name} has just been given another configuration"
        if not self._breaker.is_up:
            return f"upstream {self.target.name} is down: {self._breaker.last_error}"
        if self._pace.used_up_until(self._clocks.now()) is not None:
            return f"the messages per day of upstream {self.target.name} are used up"
        return f"upstream {self.target.name} asked for a pause"

    # --- mail ---------------------------------------------------------------------------------------------------------
    async def deliver(self, mail: Mail) -> list[Outcome]:
        """One transaction, as soon as a connection and the pace allow; an outcome for each recipient."""
        async with self._slots:
            if not self._breaker.is_up or self._closed:
                return self._everybody(mail, Retry(FailureClass.UNAVAILABLE, Stage.CONNECT, self.why_not))
            wait = self._pace.reserve(self._clocks.monotonic())
            if wait > 0:
                await asyncio.sleep(wait)
            if self._pace.used_up_until(self._clocks.now()) is not None:  # by others, meanwhile
                return self._everybody(mail, Retry(FailureClass.UNAVAILABLE, Stage.CONNECT, self.why_not))
            self._pace.count(self._clocks.now())
            outcomes = await self._send(mail)
        self._learn(outcomes)
        return outcomes

    def route_of(self, recipient: Mailbox) -> str:
        """Recipients of one route can share a transaction: here, all."""
        return ""

    async def lease(self, recipient: Mailbox) -> Connection:
        """A connection for a transaction that somebody else drives; `end_lease` gives it back. Raises Fault.

        `recipient` is its first, which decides nothing where there is one server for all.
        """
        try:
            async with asyncio.timeout(PATIENCE):
                await self._slots.acquire()
        except TimeoutError as error:
            text = f"all connections to upstream {self.target.name} are in use"
            raise Fault(FailureClass.UNAVAILABLE, Stage.CONNECT, text) from error
        try:
            return await self._leased()
        except BaseException:
            self._slots.release()
            raise

    async def _leased(self) -> Connection:
        if not self._breaker.is_up or self._closed:
            raise Fault(FailureClass.UNAVAILABLE, Stage.CONNECT, self.why_not)
        wait = self._pace.reserve(self._clocks.monotonic())
        if wait > 0:
            await asyncio.sleep(wait)
        if self._pace.used_up_until(self._clocks.now()) is not None:
            raise Fault(FailureClass.UNAVAILABLE, Stage.CONNECT, self.why_not)
        connection = self._take() or await self._connect()
        self._pace.count(self._clocks.now())
        return connection

    def end_lease(self, connection: Connection, outcomes: list[Outcome]) -> None:
        """`outcomes` are what was learnt about the upstream meanwhile."""
        self._give_back(connection)
        self._slots.release()
        self._learn(outcomes)

    @staticmethod
    def _everybody(mail: Mail, outcome: Outcome) -> list[Outcome]:
        return [outcome for _ in mail.recipients]

    async def _send(self, mail: Mail) -> list[Outcome]:
        while (connection := self._take()) is not None:
            outcomes = await self._use(connection, mail)
            if not _was_stale(outcomes, connection):
                return outcomes
        try:
            connection = await self._connect()
        except Fault as fault:
            return self._everybody(mail, fault.retry)
        return await self._use(connection, mail)

    async def _use(self, connection: Connection, mail: Mail) -> list[Outcome]:
        try:
            return await connection.send(mail)
        finally:
            self._give_back(connection)

    def _take(self) -> Connection | None:
        """An idle connection, the one used last first, so that those which are not needed time out."""
        while self._idle:
            connection, timer = self._idle.pop()
            timer.cancel()
            if connection.is_usable:
                return connection
            self._drop(connection)
        return None

    async def _connect(self) -> Connection:
        self._open += 1
        try:
            return await connect(self.target, self._timeouts, self._tokens)
        except BaseException as error:
            self._open -= 1
            if isinstance(error, Fault):
                self._failed(error)
            raise

    def _give_back(self, connection: Connection) -> None:
        if not connection.is_usable:
            self._drop(connection)
        elif self._closed or connection.transactions >= MESSAGES_PER_CONNECTION:
            self._say_goodbye(connection)
        else:
            timer = asyncio.get_running_loop().call_later(IDLE_TIMEOUT, self._expire, connection)
            self._idle.append((connection, timer))

    def _expire(self, connection: Connection) -> None:
        self._idle = [item for item in self._idle if item[0] is not connection]
        self._say_goodbye(connection)

    def _drop(self, connection: Connection) -> None:
        connection.abort()
        self._open -= 1

    def _say_goodbye(self, connection: Connection) -> None:
        self._open -= 1
        task = asyncio.get_running_loop().create_task(connection.quit())
        self._farewells.add(task)
        task.add_done_callback(self._farewells.discard)

    # --- what outcomes say about the upstream -------------------------------------------------------------------------
    def _learn(self, outcomes: list[Outcome]) -> None:
        problems = [o for o in outcomes if isinstance(o, Retry) and o.is_upstream_problem]
        throttling = next((o for o in problems if o.failure is FailureClass.THROTTLED), None)
        if throttling is not None:
            self._throttled()
        if any(isinstance(outcome, Delivered) for outcome in outcomes):
            self._pace.passed()
            self._breaker.succeeded()
        elif problems and throttling is None and problems[0].stage in {Stage.MAIL, Stage.DATA, Stage.END_OF_DATA}:
            # A fault before MAIL was counted when the connection was made.
            self._failed(Fault(problems[0].failure, problems[0].stage, problems[0].text, problems[0].reply))

    def _throttled(self) -> None:
        pause = self._pace.throttled(self._clocks.monotonic())
        if pause:
            self._on_throttled(pause)

    def _failed(self, fault: Fault) -> None:
        if fault.failure is FailureClass.THROTTLED and self._breaker.is_up:
            self._throttled()
            return
        self._breaker.failed(self._clocks.monotonic(), fault.failure, self._redacted(fault.text))
        if not self._breaker.is_up:
            self.probe()

    def _redacted(self, text: str) -> str:
        login = self.target.login
        return text if login is None else login.redacted(text)

    def probe(self, *, at_once: bool = False) -> None:
        """Look until the upstream is up; `at_once` also where the next look is only due later."""
        if self._closed:
            return
        if at_once:
            self._probe_now.set()
        if self._probe is None or self._probe.done():
            self._probe = asyncio.get_running_loop().create_task(self._probing(), name=f"probe-{self.target.name}")

    async def check(self) -> None:
        """Look once, before there is any mail: a wrong password should be known on the first day."""
        async with self._slots:
            if self._open or self._closed:
                return
            with contextlib.suppress(Fault):  # `_connect` has told the breaker, which goes on looking
                self._give_back(await self._connect())

    async def _probing(self) -> None:
        while not self._closed and not self._breaker.is_up:
            wait = self._breaker.probe_at - self._clocks.monotonic()
            if wait > 0:
                try:
                    async with asyncio.timeout(wait):
                        await self._probe_now.wait()
                except TimeoutError:
                    pass
            self._probe_now.clear()
            async with self._slots:
                try:
                    connection = await self._connect()
                except Fault:
                    continue
                except Exception:
                    # A fault of ours: without a probe the upstream would be down until the next start.
                    log.exception("probe_failed", upstream=self.target.name)
                    self._failed(Fault(FailureClass.UNAVAILABLE, Stage.CONNECT, "the probe failed"))
                    continue
                self._breaker.succeeded()
                self._give_back(connection)
            self._on_up()

    async def close(self) -> None:
        """End what is idle; running transactions end theirs when they are through."""
        self._closed = True
        if self._probe is not None:
            self._probe.cancel()
            await asyncio.wait([self._probe])
        for connection, timer in self._idle:
            timer.cancel()
            self._say_goodbye(connection)
        self._idle.clear()
        if self._tokens is not None:
            await self._tokens.close()
        if self._farewells:
            await asyncio.wait(list(self._farewells))


def _was_stale(outcomes: list[Outcome], connection: Connection) -> bool:
    """Whether a connection that had worked before was gone before it said anything about this mail."""
    return connection.transactions > 1 and all(
        isinstance(o, Retry)
        and o.stage is Stage.MAIL
        and (o.failure is FailureClass.CONNECTION or (o.reply is not None and o.reply.code == 421))
        for o in outcomes
    )
