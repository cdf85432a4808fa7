"""One connection to a Valkey or Redis server, on which calls that are under way together share round trips.

What is called while an exchange runs goes out as the next one, in one write: the more the relay has to do, the fewer
round trips a call costs, and nobody overtakes anybody. Nothing is tried twice, as nobody knows what a server has done
that did not answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from valkey.asyncio import Connection
from valkey.exceptions import ResponseError, ValkeyError

TIMEOUT: Final = 1.0
"""Seconds for an exchange, connecting included. A call waits for the exchange before it at most as long again."""
LARGEST: Final = 100
"""Calls in one exchange."""
IDLE: Final = 1.0
"""Seconds of silence after which the connection is looked at before it is used: the server may have closed it."""

LineErrors: Final = (ValkeyError, OSError, TimeoutError)
"""What a call may end with when not with an answer. `ResponseError`, one of them, is the server's refusal."""


@dataclass(frozen=True, slots=True)
class _Call:
    arguments: tuple[str | int, ...]
    answer: asyncio.Future[Any]


class Line:
    """Connects when it is first used, and again after a failure."""

    def __init__(self, connect: Callable[[], Connection]) -> None:
        self._connection = connect()
        self._waiting: list[_Call] = []
        self._worker: asyncio.Task[None] | None = None
        self._used = 0.0

    async def call(self, *arguments: str | int) -> Any:
        """The server's answer. Raises one of LineErrors."""
        loop = asyncio.get_running_loop()
        call = _Call(arguments, loop.create_future())
        self._waiting.append(call)
        if self._worker is None:
            self._worker = loop.create_task(self._work())
        return await call.answer

    async def close(self) -> None:
        if self._worker is not None:
            self._worker.cancel()
            await asyncio.gather(self._worker, return_exceptions=True)
        _fail(self._waiting, ConnectionError("the connection is closed"))
        await self._connection.disconnect(nowait=True)

    async def _work(self) -> None:
        try:
            while self._waiting:
                calls = [call for call in self._waiting[:LARGEST] if not call.answer.done()]  # some have gone since
                del self._waiting[:LARGEST]
                if calls:
                    await self._exchange(calls)
        finally:
            self._worker = None

    async def _exchange(self, calls: list[_Call]) -> None:
        connection = self._connection
        try:
            async with asyncio.timeout(TIMEOUT):
                await self._ready()
                packed = connection.pack_commands(call.arguments for call in calls)
                await connection.send_packed_command(packed, check_health=False)
                for call in calls:
                    await _read(connection, call.answer)
            self._used = asyncio.get_running_loop().time()
        except LineErrors as error:
            await connection.disconnect(nowait=True)  # an answer that comes after all must not be taken for the next
            _fail([*calls, *self._waiting], error)
            self._waiting.clear()
        except asyncio.CancelledError:
            _fail(calls, ConnectionError("the connection is closed"))
            raise

    async def _ready(self) -> None:
        """A connection, and one that the server has not closed while nobody looked."""
        connection = self._connection
        if connection.is_connected and asyncio.get_running_loop().time() - self._used > IDLE:
            try:
                is_stale = await connection.can_read_destructive()  # nothing is due; what there is, is the end
            except LineErrors:
                is_stale = True
            if is_stale:
                await connection.disconnect(nowait=True)
        await connection.connect()


async def _read(connection: Connection, answer: asyncio.Future[Any]) -> None:
    try:
        value = await connection.read_response()
    except ResponseError as refusal:
        if not answer.done():
            answer.set_exception(refusal)
    else:
        if not answer.done():
            answer.set_result(value)


def _fail(calls: list[_Call], error: Exception) -> None:
    for call in calls:
        if not call.answer.done():
            call.answer.set_exception(error)
