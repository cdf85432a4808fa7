"""One measurement of one server under one load, and the values that come of several."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field

from benchmarks.load import Load, Probe, Sink, percentile, send
from benchmarks.logins import log_in
from benchmarks.machine import cpu_seconds, pss, wait_for
from benchmarks.relays import Running

DRAIN_LIMIT = 60.0
"""Seconds for the sink to have everything after the last message was accepted."""


@dataclass(frozen=True)
class Run:
    """Rates are a second's, times seconds."""

    rate: float
    """Messages (or sessions) a second, until all are where they should be."""
    accepted_rate: float
    cpu: float
    """Seconds of processor time a message, whole process tree."""
    pss: int
    waits: tuple[float, ...] = ()
    """From the end of data to 250."""

    def value(self, name: str) -> float:
        return float(getattr(self, name))


@dataclass
class Series:
    """The runs of one server under one load."""

    runs: list[Run] = field(default_factory=list)

    def median(self, name: str) -> float:
        return statistics.median(run.value(name) for run in self.runs)

    def wait(self, percent: int) -> float | None:
        waits = [wait for run in self.runs for wait in run.waits]
        return percentile(waits, percent) if waits else None


def ratio(ours: Series, theirs: Series, name: str) -> float:
    """The median over rounds of ours to theirs: in a round both had the same neighbours."""
    pairs = zip(ours.runs, theirs.runs, strict=True)
    return statistics.median(a.value(name) / (b.value(name) or 1e-9) for a, b in pairs)


def delivered(running: Running, load: Load, sink: Sink) -> Run:
    """End to end: until the sink has all."""
    before, cpu, began = sink.messages, cpu_seconds(running.pid), time.perf_counter()
    probe = Probe(running.port)
    with probe.running():
        send(load, running.port)
        accepted = time.perf_counter() - began
    total = load.messages + len(probe.waits)
    wait_for(lambda: sink.messages - before >= total, f"{load.label}: the rest at the sink", seconds=DRAIN_LIMIT)
    seconds = time.perf_counter() - began
    memory = pss(running.pid)
    time.sleep(0.2)  # what a server does after delivery is a part of the message's cost
    used = cpu_seconds(running.pid) - cpu
    return Run(total / seconds, load.messages / accepted, used / total, memory, tuple(probe.waits))


def received(running: Running, load: Load) -> Run:
    """The receive path alone: until the last 250."""
    cpu, began = cpu_seconds(running.pid), time.perf_counter()
    send(load, running.port)
    seconds = time.perf_counter() - began
    used = cpu_seconds(running.pid) - cpu
    rate = load.messages / seconds
    return Run(rate, rate, used / load.messages, pss(running.pid))


def logged_in(running: Running, port: int, sessions: int) -> Run:
    cpu = cpu_seconds(running.pid)
    rate = sessions / log_in(port, sessions=sessions)
    return Run(rate, rate, (cpu_seconds(running.pid) - cpu) / sessions, pss(running.pid))
