"""What a process and its descendants use (from /proc), free ports, and waiting for conditions."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class _Process:
    parent: int
    ticks: int
    """Of itself and of its children that have ended."""


def _processes() -> dict[int, _Process]:
    found: dict[int, _Process] = {}
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            with contextlib.suppress(OSError):  # it ended meanwhile
                fields = (path / "stat").read_text().rpartition(")")[2].split()
                found[int(path.name)] = _Process(int(fields[1]), sum(map(int, fields[11:15])))
    return found


def tree(root: int) -> dict[int, _Process]:
    """A process and all its descendants."""
    processes = _processes()
    members = {root: processes[root]} if root in processes else {}
    grown = True
    while grown:
        more = {pid: p for pid, p in processes.items() if p.parent in members and pid not in members}
        members |= more
        grown = bool(more)
    return members


def cpu_seconds(root: int) -> float:
    """User and system time of the whole tree, that of ended processes included."""
    return sum(process.ticks for process in tree(root).values()) / _TICKS


def busy_seconds() -> float:
    """Processor time that the whole machine has used."""
    fields = [int(field) for field in Path("/proc/stat").read_text().splitlines()[0].split()[1:]]
    idle, waiting = fields[3:5]
    return (sum(fields[:8]) - idle - waiting) / _TICKS


class Neighbours:
    """How much of the machine everybody else takes while something is measured."""

    def __init__(self) -> None:
        self._began, self._busy, self._ours = time.monotonic(), busy_seconds(), cpu_seconds(os.getpid())

    @property
    def cores(self) -> float:
        """On average, since the beginning."""
        others = busy_seconds() - self._busy - (cpu_seconds(os.getpid()) - self._ours)
        return max(0.0, others / (time.monotonic() - self._began))


def pss(root: int) -> int:
    """Proportional set size of the whole tree, in octets: shared pages are counted once."""
    total = 0
    for pid in tree(root):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) * 1024
    return total


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def accepts(port: int) -> bool:
    """Whether a server greets there."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=2) as connection:
            return connection.recv(3) == b"220"
    except OSError:
        return False


def wait_for(condition: Callable[[], bool], what: str, *, seconds: float) -> None:
    """Raises TimeoutError, naming what did not come."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {seconds:g} s")
        time.sleep(0.01)
