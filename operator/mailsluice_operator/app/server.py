"""HTTP of the operator: /metrics, /healthz and /readyz."""

from __future__ import annotations

from collections.abc import Callable

from aiohttp import web
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

Problem = Callable[[], str | None]
"""What is wrong now, in words; None while nothing is."""


async def serve(host: str, port: int, registry: CollectorRegistry, *, alive: Problem, ready: Problem) -> web.AppRunner:
    """Serve until the runner is cleaned up; its `addresses` say where."""

    def check(problem: Problem) -> Callable[[web.Request], web.StreamResponse]:
        def answer(_: web.Request) -> web.StreamResponse:
            found = problem()
            return web.Response(text=f"{found or 'ok'}\n", status=503 if found else 200)

        return answer

    async def healthz(request: web.Request) -> web.StreamResponse:
        return check(alive)(request)

    async def readyz(request: web.Request) -> web.StreamResponse:
        return check(ready)(request)

    async def metrics(request: web.Request) -> web.StreamResponse:
        encode, content_type = choose_encoder(request.headers.get("Accept", ""))
        return web.Response(body=encode(registry), headers={"Content-Type": content_type})

    application = web.Application()
    application.router.add_get("/healthz", healthz)
    application.router.add_get("/readyz", readyz)
    application.router.add_get("/metrics", metrics)
    runner = web.AppRunner(application, access_log=None, shutdown_timeout=1)
    await runner.setup()
    await web.TCPSite(runner, host, port).start()
    return runner
