"""The composition root: everything is made here, with the real clocks, randomness and network, and run."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import logging
import math
import os
import random
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Final

import aiohttp
import kopf
from kubernetes.aio.client import ApiClient

from mailsluice_operator import handlers
from mailsluice_operator.app.metrics import Metrics
from mailsluice_operator.app.probe import PodProbe
from mailsluice_operator.app.server import serve
from mailsluice_operator.children.metadata import RELAY_LABEL
from mailsluice_operator.children.workload import PodSettings
from mailsluice_operator.cluster.client import (
    FIELD_MANAGER,
    ApiError,
    Cluster,
    NotFoundError,
    NotLeaderError,
    connect,
    credentials_of,
)
from mailsluice_operator.cluster.objects import LEASE, OPTIONAL, Kind, Reference
from mailsluice_operator.cluster.store import Store
from mailsluice_operator.election import Candidate, Election
from mailsluice_operator.handlers import Intake
from mailsluice_operator.reconcile.context import Context, Key, Probe
from mailsluice_operator.reconcile.index import Index
from mailsluice_operator.reconcile.reconciler import KINDS, Reconciler
from mailsluice_operator.work_queue import WorkQueue

log = logging.getLogger(__name__)

FIRST_RESYNC: Final = 30.0
"""Seconds after the start: what was deleted between our listing and the watch's own is then noticed."""
RESYNC: Final = 600.0
"""Seconds between resyncs: certificates are looked at, and the watches are checked against a listing."""
CRD_RETRY: Final = 5.0
KINDS_CHECK: Final = 20.0
"""Seconds between the looks at which optional kinds the cluster serves."""
LEASE_TIMEOUT: Final = 3.0
"""For one request of the election: several fit before the deadline."""

# The edge: from here on clocks are arguments.
_wall_clock = time.time  # noqa: TID251
_monotonic = time.monotonic  # noqa: TID251
_randomness = os.urandom  # noqa: TID251


def _boot_clock() -> float:
    """Goes on while the machine is suspended, as the clocks of the other candidates do."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)  # noqa: TID251 - as above


@dataclass(frozen=True)
class Options:
    """What the command line decides."""

    pods: PodSettings
    namespaces: tuple[str, ...] = ()
    """Empty: the whole cluster."""
    kubeconfig: str | None = None
    """None: the cluster whose pod this is."""
    http_host: str = "0.0.0.0"  # noqa: S104 - probes and Prometheus come from other hosts; nothing here is secret
    http_port: int = 8080
    workers: int = 8
    lease: tuple[str, str] | None = None
    """Namespace and name of the Lease by which one of several processes leads; None: this is the only one."""


class _Observer:
    """Metrics and log lines of the work queue."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def started(self, key: Key, waited: float) -> None:
        self._metrics.waited(waited)

    def finished(self, key: Key, seconds: float, error: BaseException | None, retry_in: float | None) -> None:
        self._metrics.reconciled(key, seconds, failed=error is not None)
        if isinstance(error, ApiError | NotLeaderError):  # it says all there is to say
            log.warning("%s: %s; again in %.0f s", key, error, retry_in)
        elif error is not None:
            log.error("%s: again in %.0f s", key, retry_in, exc_info=error)


class Operator:
    """One operator process. `run` returns when it was told to stop or has to start anew, raises when a part failed."""

    def __init__(self, options: Options, *, probe: Probe | None = None) -> None:
        """`probe` asks relay pods in place of HTTP, for tests without pods."""
        self._options = options
        self._probe = probe
        self._rng = random.Random()  # noqa: S311 - jitter, not a secret
        self._kinds = handlers.watched(namespaced=bool(options.namespaces), unserved=frozenset(OPTIONAL))
        self._following = options.lease is not None
        self._election: Election | None = None
        self.store = Store(RELAY_LABEL)
        self.metrics = Metrics(self.store, self._kinds, _wall_clock)
        self.synced = asyncio.Event()
        """Set when everything that existed at the start is known and watched, and keys are being worked on."""
        self.http_address: tuple[str, int] | None = None
        self._stop = asyncio.Event()

    def stop(self) -> None:
        self._stop.set()

    async def run(self) -> None:
        agent = f"{FIELD_MANAGER}/{version('mailsluice')}"
        api = await connect(self._options.kubeconfig, agent)
        election = self._election = self._new_election(api)
        cluster = Cluster(
            api,
            observe=self.metrics.request,
            rng=self._rng,
            may_write_for=election.may_write_for if election is not None else lambda: math.inf,
        )
        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_callback(cluster.close)
            session = await stack.enter_async_context(aiohttp.ClientSession())
            queue = WorkQueue[Key](
                self._work,
                observer=_Observer(self.metrics),
                monotonic=_monotonic,
                rng=self._rng,
                workers=self._options.workers,
            )
            self.context = Context(
                cluster=cluster,
                store=self.store,
                index=Index(),
                settings=self._options.pods,
                now=_now,
                monotonic=_monotonic,
                randomness=_randomness,
                probe=self._probe if self._probe is not None else PodProbe(session),
                enqueue=queue.add,
                namespaced=bool(self._options.namespaces),
            )
            self._reconciler = Reconciler(self.context)
            self.queue = queue
            self.metrics.read_depth_from(lambda: queue.depth)
            self.intake = Intake(self.context, self.metrics.saw_event, _monotonic)
            runner = await serve(
                self._options.http_host,
                self._options.http_port,
                self.metrics.registry,
                alive=self.intake.silent_watch,
                ready=self._unready,
            )
            stack.push_async_callback(runner.cleanup)
            host, port = runner.addresses[0][:2]
            self.http_address = (host, port)
            await self._run_parts(api, cluster, queue)

    def _new_election(self, api: ApiClient) -> Election | None:
        if self._options.lease is None:
            return None
        namespace, name = self._options.lease
        identity = f"{socket.gethostname()}_{_randomness(8).hex()}"  # another one after every start
        cluster = Cluster(
            api,
            observe=self.metrics.request,
            rng=self._rng,
            attempts=1,
            timeout=LEASE_TIMEOUT,
        )
        return Election(Candidate(identity), Reference(LEASE, namespace, name), cluster, clock=_boot_clock, now=_now)

    def _unready(self) -> str | None:
        """One that waits to lead is ready: a roll-out goes on, and the other one leads."""
        if self._following or self.synced.is_set():
            return None
        return "not yet synchronised with the API server"

    async def _work(self, key: Key) -> float | None:
        return await self._reconciler(key)

    async def _run_parts(self, api: ApiClient, cluster: Cluster, queue: WorkQueue[Key]) -> None:
        """Wait to lead, then lead, until a part ends or `stop` is called."""
        self._catch_signals()
        stop = asyncio.create_task(self._stop.wait())
        parts: set[asyncio.Task[Any]] = {stop}
        try:
            if self._election is not None:
                acquire = asyncio.create_task(self._election.acquire())
                parts.add(acquire)
                await asyncio.wait(parts, return_when=asyncio.FIRST_COMPLETED)
                if not acquire.done():
                    return
                parts.remove(acquire)
                acquire.result()
                parts.add(asyncio.create_task(self._election.keep()))
            self._following = False
            parts.add(asyncio.create_task(self._lead(api, cluster, queue)))
            done, _ = await asyncio.wait(parts, return_when=asyncio.FIRST_COMPLETED)
            for part in done:
                part.result()
        finally:
            for part in parts:
                part.cancel()
            await asyncio.gather(*parts, return_exceptions=True)
            if self._election is not None:
                await self._election.release()

    async def _lead(self, api: ApiClient, cluster: Cluster, queue: WorkQueue[Key]) -> None:
        """Watch, work and resync until one of them ends, or this is cancelled."""
        self.context.unserved = await self._unserved(cluster)
        self._kinds = handlers.watched(namespaced=bool(self._options.namespaces), unserved=self.context.unserved)
        for kind in self._kinds:
            await self._list(cluster, kind, wait=True)
        started = asyncio.Event()
        stop_watching = asyncio.Event()
        watching = asyncio.create_task(self._watch(api, started, stop_watching))
        start = asyncio.create_task(started.wait())
        parts: set[asyncio.Task[Any]] = {watching, start}
        try:
            await asyncio.wait(parts, return_when=asyncio.FIRST_COMPLETED)
            parts.remove(start)
            if start.done():
                self._catch_signals()
                self.metrics.leads(True)
                parts |= {
                    asyncio.create_task(queue.run()),
                    asyncio.create_task(self._resync(cluster, queue)),
                    asyncio.create_task(self._look_for_kinds(cluster)),
                }
                self.synced.set()
                log.info("watching %s", ", ".join(self._options.namespaces) or "all namespaces")
            done, _ = await asyncio.wait(parts, return_when=asyncio.FIRST_COMPLETED)
            for part in done:
                part.result()
            if watching in done:
                raise RuntimeError("the watches ended by themselves; see the log lines of kopf above")
        finally:
            self.metrics.leads(False)
            stop_watching.set()
            for part in parts - {watching}:
                part.cancel()
            start.cancel()
            for result in await asyncio.gather(*parts, return_exceptions=True):
                if isinstance(result, Exception):
                    log.error("while stopping", exc_info=result)

    async def _unserved(self, cluster: Cluster) -> frozenset[Kind]:
        return frozenset([kind for kind in OPTIONAL if not await cluster.serves(kind)])

    async def _look_for_kinds(self, cluster: Cluster) -> None:
        """Return when the cluster has begun or ceased to serve an optional kind: what is watched is chosen at start."""
        while True:
            await asyncio.sleep(KINDS_CHECK)
            try:
                changed = await self._unserved(cluster) ^ self.context.unserved
            except ApiError as error:
                log.warning("%s; again in %.0f s", error, KINDS_CHECK)
                continue
            if changed:
                names = ", ".join(kind.name for kind in changed)
                log.warning("%s: not served as it was at the start; ending, to be started anew", names)
                return

    async def _list(self, cluster: Cluster, kind: Kind, *, wait: bool = False) -> None:
        """Take in a listing of a kind. `wait` for the CustomResourceDefinitions, which may be installed after us."""
        scopes: tuple[str | None, ...] = self._options.namespaces or (None,)
        listed: set[Reference] = set()
        versions: list[int] = []
        while True:
            try:
                for namespace in scopes:
                    async for items, version in cluster.pages(kind, namespace, handlers.selectors()[kind]):
                        listed |= self.intake.page(kind, items)
                        versions.append(version)
            except NotFoundError as error:
                if not wait:
                    raise
                log.warning("%s; install the CustomResourceDefinitions (kubectl apply -k crds)", error)
                await asyncio.sleep(CRD_RETRY)
                continue
            self.intake.listed(kind, listed, min(versions))
            return

    async def _watch(self, api: ApiClient, started: asyncio.Event, stop: asyncio.Event) -> None:
        registry = kopf.OperatorRegistry()

        async def login(**_: Any) -> kopf.ConnectionInfo:
            """Our own client's credentials; asked for again when the API server refuses them."""
            found = await credentials_of(api)
            return kopf.ConnectionInfo(
                server=found.server,
                ca_path=found.authority_file,
                insecure=not found.verify,
                scheme="Bearer" if found.token else None,
                token=found.token,
                certificate_path=found.certificate_file,
                private_key_path=found.key_file,
                proxy_url=found.proxy,
            )

        kopf.on.login(registry=registry, id="login")(login)
        handlers.register(registry, self.intake, self._kinds)
        await kopf.operator(
            registry=registry,
            settings=handlers.settings(self._kinds),
            standalone=True,
            # Else Kopf makes itself a name of the user's, and an arbitrary uid (OpenShift) has none.
            identity=FIELD_MANAGER,  # type: ignore[arg-type]  # Kopf's NewType of str, which it does not export
            clusterwide=not self._options.namespaces,
            namespaces=self._options.namespaces,
            stop_flag=stop,
            ready_flag=started,
        )

    def _catch_signals(self) -> None:
        """After Kopf has set its own: it would stop by itself, and end our tasks as left-overs of its own."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):  # not the main thread
                loop.add_signal_handler(number, self.stop)

    async def _resync(self, cluster: Cluster, queue: WorkQueue[Key]) -> None:
        pause = FIRST_RESYNC
        while True:
            await asyncio.sleep(pause)
            pause = RESYNC * (0.9 + 0.2 * self._rng.random())
            try:
                for kind in self._kinds:
                    await self._list(cluster, kind)
            except ApiError as error:
                log.warning("resync: %s; again in %.0f s", error, pause)
                continue
            for kind in KINDS[:2]:
                for body in self.store.all(kind):
                    metadata = body["metadata"]
                    # Spread over a minute: a thousand relays need not be looked at in one second.
                    queue.add(Key(kind, metadata["namespace"], metadata["name"]), 60.0 * self._rng.random())


def run(options: Options, on_start: Callable[[Operator], None] = lambda _: None) -> None:
    """Run one operator until a signal."""

    async def main() -> None:
        operator = Operator(options)
        on_start(operator)
        await operator.run()

    asyncio.run(main())
