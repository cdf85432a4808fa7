"""Takes the Lease, keeps it, and gives it back."""

from __future__ import annotations

import asyncio
import datetime
import logging
from collections.abc import Awaitable, Callable
from typing import Final

from mailsluice_operator.cluster.client import ApiError, Cluster, ConflictError, NotFoundError
from mailsluice_operator.cluster.objects import LEASE, Object, Reference
from mailsluice_operator.election.candidate import POLL, RENEWAL, Candidate, Record

log = logging.getLogger(__name__)

RETRY: Final = 0.5
"""Seconds after which a renewal that failed is tried again."""


class LeadershipLostError(Exception):
    """This process led and may not write any more; it has to end."""


class Election:
    """One process's part in it. `cluster` neither repeats requests nor waits long for an answer."""

    def __init__(
        self,
        candidate: Candidate,
        lease: Reference,
        cluster: Cluster,
        *,
        clock: Callable[[], float],
        now: Callable[[], datetime.datetime],
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """`clock` never goes back, and goes on while the machine sleeps; `now` is for the people who read the Lease."""
        self._candidate = candidate
        self._lease = lease
        self._cluster = cluster
        self._clock = clock
        self._now = now
        self._sleep = sleep
        self._body: Object | None = None

    def may_write_for(self) -> float:
        """Seconds in which this process may still write; not above 0: it may not."""
        return self._candidate.may_write_for(self._clock())

    async def acquire(self) -> None:
        """Return when this process leads."""
        while True:
            try:
                await self._look()
                if self._candidate.free_in(self._clock()) <= 0 and await self._bid():
                    return
            except ApiError as error:
                log.warning("election: %s; again in %.0f s", error, POLL)
            # Not a moment later than the Lease may be free.
            await self._sleep(min(POLL, self._candidate.free_in(self._clock()) or POLL))

    async def keep(self) -> None:
        """Renew the Lease for as long as that goes. Raises LeadershipLostError; never returns."""
        pause = RENEWAL
        while True:
            await self._sleep(min(pause, max(0.0, self.may_write_for())))
            if self.may_write_for() <= 0:
                raise LeadershipLostError(f"{self._lease} could not be renewed in time")
            try:
                pause = RENEWAL if await self._bid() else 0.0
                if not pause:  # somebody wrote into it: another leader, or a person
                    await self._look()
            except ApiError as error:
                log.warning("election: %s; again in %.1f s", error, RETRY)
                pause = RETRY
                continue
            if not self._candidate.holds():
                self._candidate.gives_up()
                raise LeadershipLostError(f"{self._lease} belongs to another process now")

    async def release(self) -> None:
        """Write nothing more, and let the next one begin at once."""
        led = self.may_write_for() > 0
        self._candidate.gives_up()
        if not led or self._body is None:
            return
        freed = {**self._body, "spec": {**self._body["spec"], "holderIdentity": ""}}
        try:
            await self._cluster.update(freed)
        except ApiError as error:  # then the others wait until it expires
            log.warning("election: %s", error)

    async def _look(self) -> None:
        self._body = await self._cluster.get(self._lease)
        self._candidate.saw(_record(self._body) if self._body is not None else None, self._clock())

    async def _bid(self) -> bool:
        """Write our name; False when the Lease is not as it was last seen."""
        asked_at = self._clock()
        bid = self._candidate.bid(_micro_time(self._now()))
        body = _body(self._lease, bid, self._body)
        try:
            self._body = await (self._cluster.create(body) if self._body is None else self._cluster.update(body))
        except (ConflictError, NotFoundError):
            return False
        self._candidate.won(bid, asked_at, self._clock())
        return True


def _record(body: Object) -> Record:
    spec = body.get("spec") or {}
    return Record(
        holder=spec.get("holderIdentity") or "",
        duration=float(spec.get("leaseDurationSeconds") or 0),
        renewed=spec.get("renewTime") or "",
        acquired=spec.get("acquireTime") or "",
        transitions=int(spec.get("leaseTransitions") or 0),
    )


def _body(lease: Reference, record: Record, before: Object | None) -> Object:
    metadata: Object = {"name": lease.name, "namespace": lease.namespace}
    if before is not None:  # with its resourceVersion: of two who bid one wins
        metadata = before["metadata"]
    return {
        "apiVersion": LEASE.api_version,
        "kind": LEASE.name,
        "metadata": metadata,
        "spec": {
            "holderIdentity": record.holder,
            "leaseDurationSeconds": round(record.duration),
            "renewTime": record.renewed,
            "acquireTime": record.acquired,
            "leaseTransitions": record.transitions,
        },
    }


def _micro_time(moment: datetime.datetime) -> str:
    """As meta/v1's MicroTime is written."""
    return moment.astimezone(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
