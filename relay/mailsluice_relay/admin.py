"""The two doors for those who run a relay.

HTTP (port 9090): /metrics, /healthz, /readyz, to read only. A unix socket in the data directory: queue control, so that
only who may enter the pod (kubectl exec and its RBAC) or the data directory's owner can use it.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
from aiohttp import web
from prometheus_client.exposition import choose_encoder

from mailsluice_relay.admission import Admission
from mailsluice_relay.dispatch import Dispatcher
from mailsluice_relay.metrics import Metrics
from mailsluice_relay.spool.record import State

MAXIMUM_LISTED = 10_000
"""Messages that one list answers at most."""


@dataclass(slots=True)
class Health:
    """What the process says of itself; `app` keeps it current."""

    revision: str
    configuration_error: str = ""
    """Empty while the configuration read last is in force."""
    listening: bool = False
    stopping: bool = False


class Administration:
    """Serves both doors. `address` is the HTTP one, once started."""

    def __init__(
        self,
        *,
        health: Health,
        admission: Admission,
        dispatcher: Dispatcher,
        metrics: Metrics,
        bind: tuple[str, ...],
        http_port: int,
        socket_path: Path,
    ) -> None:
        self._health = health
        self._admission = admission
        self._dispatcher = dispatcher
        self._metrics = metrics
        self._bind = bind
        self._http_port = http_port
        self._socket_path = socket_path
        self._runners: list[web.AppRunner] = []
        self.address: tuple[str, int] = ("", 0)

    async def start(self) -> None:
        reading = web.Application()
        reading.router.add_get("/metrics", self._get_metrics)
        reading.router.add_get("/healthz", self._get_health)
        reading.router.add_get("/readyz", self._get_readiness)
        runner = await self._runner(reading)
        port = self._http_port
        for host in self._bind:
            await web.TCPSite(runner, host, port).start()
            if not port:
                port = runner.addresses[0][1]
        host, port = runner.addresses[0][:2]
        self.address = (host, port)

        control = web.Application(client_max_size=4096)
        control.router.add_get("/queue", self._list)
        control.router.add_post("/queue/flush", self._flush)
        control.router.add_get("/queue/{id}", self._show)
        for action in ("hold", "release", "requeue", "remove"):
            control.router.add_post(f"/queue/{{id}}/{action}", self._act(action))
        self._socket_path.unlink(missing_ok=True)
        mask = os.umask(0o177)  # the socket is its owner's alone from its first moment
        try:
            await web.UnixSite(await self._runner(control), str(self._socket_path)).start()
        finally:
            os.umask(mask)

    async def stop(self) -> None:
        """Close both doors, as far as they are open."""
        for runner in self._runners:
            await runner.cleanup()

    async def _runner(self, application: web.Application) -> web.AppRunner:
        runner = web.AppRunner(application, access_log=None, keepalive_timeout=30, shutdown_timeout=1)
        await runner.setup()
        self._runners.append(runner)
        return runner

    async def _get_metrics(self, request: web.Request) -> web.Response:
        encode, content_type = choose_encoder(request.headers.get("Accept", ""))
        return web.Response(body=encode(self._metrics.registry), headers={"Content-Type": content_type})

    async def _get_health(self, _: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def _get_readiness(self, _: web.Request) -> web.Response:
        health = self._health
        draining = self._dispatcher.draining
        ready = health.listening and not health.stopping and not draining
        body = {
            "ready": ready,
            "revision": health.revision,
            "configurationError": health.configuration_error,
            "draining": draining,
            "queue": self._dispatcher.counts() if health.listening else None,
            "limitStore": self._admission.limit_store_state,
            "engines": self._admission.engine_states,
            "upstreams": self._dispatcher.upstream_states() if health.listening else {},
        }
        return _json(body, status=200 if ready else 503)

    async def _list(self, request: web.Request) -> web.Response:
        query = request.query
        try:
            limit = min(int(query.get("limit", "1000")), MAXIMUM_LISTED)
        except ValueError:
            return _json({"error": "limit: not a number"}, status=400)
        if (state := query.get("state")) is not None and state not in set(State):
            return _json({"error": f"state: {state} is none of {', '.join(State)}"}, status=400)
        found = await self._dispatcher.list_messages(
            state=state, login=query.get("login"), recipient=query.get("recipient"), limit=limit
        )
        return _json(found)

    async def _show(self, request: web.Request) -> web.Response:
        found = await self._dispatcher.show(request.match_info["id"])
        return _not_found(request) if found is None else _json(found)

    async def _flush(self, _: web.Request) -> web.Response:
        return _json({"flushed": await self._dispatcher.flush()})

    def _act(self, action: str) -> Callable[[web.Request], Awaitable[web.Response]]:
        async def handler(request: web.Request) -> web.Response:
            operation: Callable[[str], Awaitable[bool]] = getattr(self._dispatcher, action)
            queue_id = request.match_info["id"]
            if await operation(queue_id):
                return _json({"id": queue_id, "done": action})
            found = await self._dispatcher.show(queue_id)
            if found is None:
                return _not_found(request)
            return _json({"error": f"message {queue_id} is {found.state}: nothing to {action}"}, status=409)

        return handler


def _json(value: object, status: int = 200) -> web.Response:
    return web.Response(body=msgspec.json.encode(value), status=status, content_type="application/json")


def _not_found(request: web.Request) -> web.Response:
    return _json({"error": f"no message {request.match_info['id']} in the queue"}, status=404)
