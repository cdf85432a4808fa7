"""Rate limits counted in a Valkey or Redis server, for all replicas of a relay together.

One script, which the server runs as one step, does for all limits of a message what `policy.rates.MemoryStore` does in
this process: one round trip, all or nothing. Time is the server's, so that the clocks of pods do not matter, and a
count expires when it is worked off. The keys of a relay share a hash tag: they lie in one slot, so that one node of a
cluster serves the relay, and the reply MOVED leads there.

Every call is bounded in time. After one that failed nobody waits for the store until a probe has reached it; meanwhile
each replica counts for itself (Allow) or the client is told to come again (Defer). A charge whose answer was lost may
have been taken: that errs on the strict side. A store that forgets, having been restarted without a disk, gives every
limit its burst anew.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Final

import structlog
from valkey.asyncio import Connection, SSLConnection
from valkey.exceptions import NoScriptError, ResponseError

from mailsluice_relay.config import FailureAction
from mailsluice_relay.limit_store.line import TIMEOUT, Line, LineErrors
from mailsluice_relay.limit_store.target import Target
from mailsluice_relay.metrics import Metrics
from mailsluice_relay.policy.rates import Charge, Decision, Store, StoreUnavailableError, hopeless

PROBES: Final = (0.1, 5.0)
"""Seconds between probes of a store that failed: doubling, from the first to the second."""
_SHOWN: Final = 200
"""Characters of an error."""

# KEYS: a theoretical arrival time each, in microseconds. ARGV: 1 to take the charges, then cost and tolerance of each.
# Lua writes a number with 14 digits unless told otherwise, and microseconds since 1970 have 16.
_DECIDE: Final = """
local clock = redis.call('TIME')
local now = clock[1] * 1000000 + clock[2]
local arrivals, worst, excess = {}, 0, 0
for i, key in ipairs(KEYS) do
  local cost, tolerance = tonumber(ARGV[2 * i]), tonumber(ARGV[2 * i + 1])
  arrivals[i] = math.max(tonumber(redis.call('GET', key) or now), now) + cost
  local over = arrivals[i] - now - tolerance
  if over > 1e-6 * tolerance and over > excess then
    worst, excess = i, over
  end
end
if worst == 0 and ARGV[1] == '1' then
  for i, key in ipairs(KEYS) do
    redis.call('SET', key, string.format('%.17g', arrivals[i]), 'PX', math.ceil((arrivals[i] - now) / 1000))
  end
end
return {worst, string.format('%.17g', excess)}
"""

# ARGV: what each key gets back. A count that is worked off needs nothing back, and has no key.
_REFUND: Final = """
local clock = redis.call('TIME')
local now = clock[1] * 1000000 + clock[2]
for i, key in ipairs(KEYS) do
  local arrival = redis.call('GET', key)
  local rest = arrival and arrival - ARGV[i] - now
  if rest and rest > 0 then
    redis.call('SET', key, string.format('%.17g', now + rest), 'PX', math.ceil(rest / 1000))
  elseif rest then
    redis.call('DEL', key)
  end
end
return redis.status_reply('OK')
"""

_DIGESTS: Final = {
    script: hashlib.sha1(script.encode(), usedforsecurity=False).hexdigest()  # EVALSHA's name for it
    for script in (_DECIDE, _REFUND)
}

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class StoreState:
    """For people and /readyz. `last_error` holds no credentials."""

    up: bool
    last_error: str


class SharedStore:
    """Counts in the store at `target`; in `local` while that fails and the configuration allows it."""

    def __init__(self, target: Target, *, local: Store, metrics: Metrics) -> None:
        self.target = target
        self._local = local
        self._metrics = metrics
        self._error = ""
        """Of the call that failed; empty while the store is up."""
        self._home = (target.address.host, target.address.port)
        self._address = self._home
        """Where the keys are: another node than home, after MOVED."""
        self._line = Line(self._connect)
        self._background: set[asyncio.Task[None]] = set()
        metrics.limit_store_up.set(1)

    @property
    def state(self) -> StoreState:
        return StoreState(up=not self._error, last_error=self._error)

    def start(self) -> None:
        """Look whether the store is there, before a message needs it."""
        self._spawn(self._probe())

    async def charge(self, charges: Sequence[Charge]) -> Decision:
        return await self._decide(charges, take=True)

    async def peek(self, charges: Sequence[Charge]) -> Decision:
        return await self._decide(charges, take=False)

    def refund(self, charges: Sequence[Charge]) -> None:
        if charges:
            self._spawn(self._refund(charges))

    async def retire(self) -> None:
        """Another store takes over: calls under way end by themselves, in bounded time."""
        try:
            await asyncio.sleep(2 * TIMEOUT)
        finally:
            await self.close()

    async def close(self) -> None:
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        await self._line.close()

    # --- calls --------------------------------------------------------------------------------------------------------

    async def _decide(self, charges: Sequence[Charge], *, take: bool) -> Decision:
        if not charges:
            return Decision()
        if (never := hopeless(charges)) is not None:
            return Decision(never, math.inf)
        arguments = ["1" if take else "0"]
        for charge in charges:
            arguments += (repr(charge.seconds * 1e6), repr(charge.tolerance * 1e6))
        try:
            worst, excess = await self._call(_DECIDE, self._keys(charges), arguments)
        except StoreUnavailableError:
            if self.target.on_failure is FailureAction.DEFER:
                raise
            return await (self._local.charge(charges) if take else self._local.peek(charges))
        if worst:
            return Decision(charges[worst - 1], float(excess) / 1e6)
        return Decision(taken_by=self if take else None)

    async def _refund(self, charges: Sequence[Charge]) -> None:
        try:
            await self._call(_REFUND, self._keys(charges), [repr(charge.seconds * 1e6) for charge in charges])
        except StoreUnavailableError:
            return  # what stays charged is worked off by itself; that the store failed was counted and logged

    def _keys(self, charges: Sequence[Charge]) -> list[str]:
        return [f"mailsluice:{{{self.target.tag}}}:{charge.key}" for charge in charges]

    async def _call(self, script: str, keys: list[str], arguments: list[str]) -> Any:
        if self._error:
            raise StoreUnavailableError(self._error)
        try:
            return await self._run(script, keys, arguments)
        except LineErrors as error:
            raise self._failed(error) from error

    async def _run(self, script: str, keys: list[str], arguments: list[str]) -> Any:
        try:
            return await self._evaluate(script, keys, arguments)
        except ResponseError as error:
            moved = str(error).split()
            if moved[:1] != ["MOVED"] or len(moved) != 3:
                raise
            self._move(moved[2])
            return await self._evaluate(script, keys, arguments)

    async def _evaluate(self, script: str, keys: list[str], arguments: list[str]) -> Any:
        line = self._line
        try:
            return await line.call("EVALSHA", _DIGESTS[script], len(keys), *keys, *arguments)
        except NoScriptError:  # the server is new, or was restarted
            return await line.call("EVAL", script, len(keys), *keys, *arguments)

    # --- connections --------------------------------------------------------------------------------------------------

    def _connect(self) -> Connection:
        address = self.target.address
        settings: dict[str, Any] = {
            "host": self._address[0],
            "port": self._address[1],
            "db": address.database,
            "username": address.username,
            "password": address.password,
            "socket_timeout": None,  # the line's own bound holds
        }
        if not address.is_encrypted:
            return Connection(**settings)
        return SSLConnection(**settings, ssl_check_hostname=True, ssl_ca_data=self.target.authorities)

    def _move(self, address: str) -> None:
        """The keys are at another node of the cluster (`host:port`, the host empty for the same one)."""
        host, _, port = address.rpartition(":")
        self._go_to((host or self._address[0], int(port)))

    def _go_to(self, address: tuple[str, int]) -> None:
        if address == self._address:
            return
        retired, self._address = self._line, address
        self._line = Line(self._connect)
        self._spawn(_retire(retired))

    def _failed(self, error: Exception) -> StoreUnavailableError:
        """One call failed: the next ones do not wait, until a probe gets through."""
        text = _text(error)
        self._metrics.limit_store_failures.inc()
        if not self._error:
            self._error = text
            self._metrics.limit_store_up.set(0)
            _log.error("limit_store.down", error=self._error, on_failure=self.target.on_failure)
            self._go_to(self._home)
            self._spawn(self._probe_until_up())
        return StoreUnavailableError(text)

    async def _probe(self) -> None:
        try:
            await self._try()
        except LineErrors as error:
            self._failed(error)

    async def _probe_until_up(self) -> None:
        wait, longest = PROBES
        while self._error:
            await asyncio.sleep(wait)
            wait = min(wait * 2, longest)
            try:
                await self._try()
            except LineErrors as error:
                self._error = _text(error)
            else:
                self._error = ""
                self._metrics.limit_store_up.set(1)
                _log.info("limit_store.up")

    async def _try(self) -> None:
        """As a charge would, writing included: a read-only replica answers, and is of no use."""
        await self._run(_DECIDE, [f"mailsluice:{{{self.target.tag}}}:probe"], ["1", "1.0", "1e6"])

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)


async def _retire(line: Line) -> None:
    try:
        await asyncio.sleep(2 * TIMEOUT)  # calls under way end by themselves
    finally:
        await line.close()


def _text(error: Exception) -> str:
    return str(error)[:_SHOWN] or f"no answer within {TIMEOUT:g} s"
