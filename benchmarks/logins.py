"""Sessions that begin with STARTTLS and a login, and end there: what the handshake and the password's check cost."""

from __future__ import annotations

import asyncio
import base64
import ssl
import time

import uvloop

from benchmarks.discard import PASSWORD
from benchmarks.load import SENDER

_CREDENTIALS = base64.b64encode(f"\0{SENDER}\0{PASSWORD}".encode())


def context() -> ssl.SSLContext:
    """What is measured is the server: the client does not look at its certificate."""
    made = ssl.create_default_context()
    made.check_hostname = False
    made.verify_mode = ssl.CERT_NONE
    return made


def log_in(port: int, *, sessions: int, connections: int = 20) -> float:
    """The seconds that so many sessions take, every one with a full handshake."""
    began = time.perf_counter()
    uvloop.run(_log_in(port, sessions, connections))
    return time.perf_counter() - began


async def _log_in(port: int, sessions: int, connections: int) -> None:
    numbers = iter(range(sessions))
    tls = context()

    async def worker() -> None:
        for _ in numbers:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            await _ask(reader, writer, b"", b"220")
            await _ask(reader, writer, b"EHLO client.example.test", b"250")
            await _ask(reader, writer, b"STARTTLS", b"220")
            await writer.start_tls(tls)
            await _ask(reader, writer, b"EHLO client.example.test", b"250")
            await _ask(reader, writer, b"AUTH PLAIN " + _CREDENTIALS, b"235")
            await _ask(reader, writer, b"QUIT", b"221")
            writer.close()

    await asyncio.gather(*(worker() for _ in range(connections)))


async def _ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, command: bytes, wanted: bytes) -> None:
    if command:
        writer.write(command + b"\r\n")
    while True:
        line = await reader.readline()
        if not line.startswith(wanted):
            raise ValueError(f"{command[:10]!r} was answered {line!r}")
        if line[3:4] != b"-":
            return


async def open_idle(port: int, *, sessions: int, implicit: bool) -> list[asyncio.StreamWriter]:
    """TLS sessions that have said EHLO, and stay."""
    tls = context()
    gate = asyncio.Semaphore(50)

    async def one() -> asyncio.StreamWriter:
        async with gate:
            reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=tls if implicit else None)
            await _ask(reader, writer, b"", b"220")
            if not implicit:
                await _ask(reader, writer, b"STARTTLS", b"220")
                await writer.start_tls(tls)
            await _ask(reader, writer, b"EHLO client.example.test", b"250")
            return writer

    return await asyncio.gather(*(one() for _ in range(sessions)))
