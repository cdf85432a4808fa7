"""Asks a relay pod's /readyz what it runs and what it still has to deliver."""

from __future__ import annotations

import aiohttp
import msgspec

from mailsluice_operator.reconcile.context import PodReport
from mailsluice_operator.resource.models import HTTP_PORT
from mailsluice_operator.status import UpstreamDown

TIMEOUT = aiohttp.ClientTimeout(total=2.0)
"""A pod that a NetworkPolicy hides must not hold up the reconcile of its relay."""

MAXIMUM_ANSWER = 1024 * 1024


class _Queue(msgspec.Struct):
    active: int = 0
    deferred: int = 0
    held: int = 0
    oldest_seconds: float = 0.0


class _Upstream(msgspec.Struct):
    up: bool = True
    last_error: str = ""
    failure: str | None = None


class _Service(msgspec.Struct):
    """Somebody whom the relay asks about mail."""

    up: bool = True
    last_error: str = ""


class _Readiness(msgspec.Struct):
    revision: str
    configuration_error: str = msgspec.field(default="", name="configurationError")
    draining: bool = False
    queue: _Queue | None = None
    upstreams: dict[str, _Upstream] = {}
    limit_store: _Service | None = msgspec.field(default=None, name="limitStore")
    engines: dict[str, _Service] = {}


class PodProbe:
    """A callable as the reconcile takes it."""

    def __init__(self, session: aiohttp.ClientSession, port: int = HTTP_PORT) -> None:
        self._session = session
        self._port = port

    async def __call__(self, address: str) -> PodReport | None:
        host = f"[{address}]" if ":" in address else address
        try:
            async with self._session.get(f"http://{host}:{self._port}/readyz", timeout=TIMEOUT) as response:
                # 503 is the answer of a pod that is not ready, and says why in the same words.
                answer = msgspec.json.decode(await response.content.read(MAXIMUM_ANSWER), type=_Readiness)
        except (aiohttp.ClientError, TimeoutError, OSError, msgspec.MsgspecError):  # it has not told; asked again later
            return None
        queue = answer.queue
        return PodReport(
            revision=answer.revision,
            draining=answer.draining,
            queued=queue.active + queue.deferred + queue.held if queue is not None else None,
            oldest_seconds=queue.oldest_seconds if queue is not None else 0.0,
            configuration_error=answer.configuration_error,
            upstreams_down=tuple(
                UpstreamDown(name, state.last_error, refuses_login=state.failure == "authentication")
                for name, state in sorted(answer.upstreams.items())
                if not state.up
            ),
            limit_store_error=answer.limit_store.last_error or None if answer.limit_store is not None else None,
            engines_down=tuple(
                (name, state.last_error) for name, state in sorted(answer.engines.items()) if not state.up
            ),
        )
