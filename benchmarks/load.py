"""The load and its end: Postfix's smtp-source and smtp-sink, both in C, and a probe that measures waiting times.

The probe is one more client, which sends a message every few milliseconds while smtp-source runs, and notes the time
from its final dot to the answer.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import statistics
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from benchmarks.machine import accepts, free_port, wait_for

SENDER: Final = "app@example.test"
RECIPIENT: Final = "person@example.org"
PROBE_PAUSE: Final = 0.015
"""Seconds between the probe's messages."""
RUN_LIMIT: Final = 90.0
"""Seconds after which one run is given up."""


def program(name: str) -> str | None:
    """Where one of Postfix's programs is; /usr/sbin is not on everybody's path."""
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")


@dataclass(frozen=True)
class Load:
    """What smtp-source sends."""

    name: str
    messages: int
    size: int = 2048
    connections: int = 20
    kept: bool = False
    """Sessions go on until all is sent; else one message each."""

    @property
    def label(self) -> str:
        size = f"{self.size // 1000} KB" if self.size > 2048 else "2 KB"
        each = f"{self.messages // self.connections} a session" if self.kept else "1 a session"
        return f"{size}, {each}, {self.connections} connections"


def send(load: Load, port: int) -> None:
    """Returns when everything has been answered with 250. Raises CalledProcessError when something was not."""
    source = program("smtp-source")
    if source is None:
        raise FileNotFoundError("smtp-source is missing: install Debian's package postfix")
    command = [source, *(["-d"] if load.kept else []), "-s", str(load.connections), "-m", str(load.messages)]
    command += ["-l", str(load.size), "-f", SENDER, "-t", RECIPIENT, "-M", "client.example.test", f"127.0.0.1:{port}"]
    subprocess.run(command, check=True, capture_output=True, timeout=RUN_LIMIT)


class Sink:
    """Takes all mail, drops it and counts it. The same one for all."""

    def __init__(self, directory: Path) -> None:
        self.port = free_port()
        sink = program("smtp-sink")
        if sink is None:
            raise FileNotFoundError("smtp-sink is missing: install Debian's package postfix")
        self._counts = directory / "sink.counts"
        as_user = ["-u", "nobody"] if os.geteuid() == 0 else []
        with self._counts.open("wb") as counts:
            self._process = subprocess.Popen(
                [sink, *as_user, "-c", f"127.0.0.1:{self.port}", "1024"], stdout=counts, stderr=subprocess.DEVNULL
            )
        wait_for(lambda: accepts(self.port), "smtp-sink", seconds=5)

    @property
    def messages(self) -> int:
        """How many have come since it began."""
        with self._counts.open("rb") as counts:
            counts.seek(max(0, self._counts.stat().st_size - 200))
            last = counts.read().rstrip(b"\r").rpartition(b"mesg=")[2]
        return int(last) if last.isdigit() else 0

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()


@dataclass
class Probe:
    """Waiting times, in seconds, from the end of data to 250."""

    port: int
    waits: list[float] = field(default_factory=list)
    error: Exception | None = None
    _stop: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        text = b"From: <%b>\r\nTo: <%b>\r\nSubject: probe\r\n\r\n" % (SENDER.encode(), RECIPIENT.encode())
        text += (b"x" * 78 + b"\r\n") * 25 + b".\r\n"
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=30) as connection:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                answers = connection.makefile("rb")
                self._ask(connection, answers, b"")
                self._ask(connection, answers, b"EHLO probe.example.test\r\n")
                while not self._stop.is_set():
                    for command in (f"MAIL FROM:<{SENDER}>", f"RCPT TO:<{RECIPIENT}>", "DATA"):
                        self._ask(connection, answers, f"{command}\r\n".encode())
                    began = time.perf_counter()
                    self._ask(connection, answers, text)
                    self.waits.append(time.perf_counter() - began)
                    self._stop.wait(PROBE_PAUSE)
                self._ask(connection, answers, b"QUIT\r\n")
        except (OSError, ValueError) as error:
            self.error = error

    @staticmethod
    def _ask(connection: socket.socket, answers: Iterator[bytes], command: bytes) -> None:
        if command:
            connection.sendall(command)
        for line in answers:
            if line[:1] not in b"23":
                raise ValueError(f"the probe was answered {line!r}")
            if line[3:4] != b"-":
                return
        raise ValueError("the probe's connection was closed")

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        thread = threading.Thread(target=self.run)
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            thread.join()
        if self.error is not None:
            raise self.error


def percentile(values: list[float], percent: int) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1] if len(values) > 1 else values[0]
