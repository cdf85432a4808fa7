"""Memory that idle TLS sessions and a long queue take."""

from __future__ import annotations

import contextlib
import resource
import time
from collections.abc import Iterator
from pathlib import Path

import trustme
import uvloop

from benchmarks import relays
from benchmarks.load import Load, send
from benchmarks.logins import open_idle
from benchmarks.machine import free_port, pss
from mailsluice_relay.config import Listener, ListenerMode

FILLING_LIMIT = 150.0
"""Seconds after which no more is queued: what has been is reported."""


@contextlib.contextmanager
def _many_files(number: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(max(soft, number), hard), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def idle_sessions(directory: Path, *, implicit: bool, sessions: int) -> dict[str, float]:
    """Growth in octets while so many TLS sessions are open and idle."""
    certificate = trustme.CA().issue_cert("relay.example.test")
    credentials = {
        "tls.crt": b"".join(blob.bytes() for blob in certificate.cert_chain_pems),
        "tls.key": certificate.private_key_pem.bytes(),
    }
    mode = ListenerMode.IMPLICIT_TLS if implicit else ListenerMode.START_TLS
    listeners = (Listener(name="tls", port=0, mode=mode),)

    async def measure(running: relays.Running) -> dict[str, float]:
        first = await open_idle(running.port, sessions=20, implicit=implicit)
        before = pss(running.pid)
        writers = await open_idle(running.port, sessions=sessions, implicit=implicit)
        grown = pss(running.pid) - before
        for writer in (*first, *writers):
            writer.transport.abort()
        return {"sessions": sessions, "grown": grown, "each": grown / sessions}

    with (
        _many_files(sessions + 500),
        relays.mailsluice(directory, free_port(), listeners=listeners, credentials=credentials) as running,
    ):
        return uvloop.run(measure(running))


def long_queue(directory: Path, *, messages: int) -> dict[str, float]:
    """Memory with a tenth of the messages queued, and with all of them; the upstream is down."""
    tenth = messages // 10
    queued, began, first = 0, time.perf_counter(), 0
    with relays.mailsluice(directory, free_port()) as running:
        while queued < messages and time.perf_counter() - began < FILLING_LIMIT:
            send(Load("queue", tenth, kept=True), running.port)
            queued += tenth
            first = first or pss(running.pid)
        return {"messages": queued, "tenth": first, "all": pss(running.pid), "seconds": time.perf_counter() - began}


__all__ = ["idle_sessions", "long_queue"]
