"""The composition root: makes the parts, starts them in order, hands them each new configuration, stops them in order.

Stopping (SIGTERM, SIGINT) is graceful: no new connections, 421 to idle sessions, running transactions finish, what can
be delivered within the grace period is delivered, and the rest stays on disk.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import importlib.metadata
import json
import logging
import os
import random
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

import msgspec
import structlog
import uvloop

from mailsluice_relay import reload
from mailsluice_relay.admin import Administration, Health
from mailsluice_relay.admission import Admission
from mailsluice_relay.config import Configuration, ConfigurationError
from mailsluice_relay.dispatch import Dispatcher
from mailsluice_relay.listener import Listeners
from mailsluice_relay.metrics import Metrics

log = structlog.get_logger()

LOG_DELAY: Final = 0.05
"""Seconds."""
LOG_LINES: Final = 256
"""Lines that are not kept back any longer."""
MINIMUM_GRACE = 1.0
"""Seconds that deliveries under way get, even when sessions have used up the grace period."""


class UnexpectedEndError(Exception):
    """A part that has to go on for as long as the process has ended. The cause says why."""


@dataclass(frozen=True, slots=True)
class Options:
    """How a process is started; everything else is configuration."""

    config_directory: Path
    data_directory: Path
    bind: tuple[str, ...]
    http_port: int
    ready_file: Path | None = None
    grace: float = 25.0
    """Seconds for sessions and deliveries to finish after SIGTERM."""


class Application:
    """One relay process."""

    def __init__(self, options: Options, loaded: reload.Loaded) -> None:
        self.options = options
        self.configuration = loaded.configuration
        self.metrics = Metrics()
        self.metrics.build_info.labels(importlib.metadata.version("mailsluice")).set(1)
        self.health = Health(revision=loaded.configuration.revision)
        self.admission = Admission(
            loaded.configuration,
            credentials=loaded.credentials,
            metrics=self.metrics,
            monotonic=time.monotonic,
            now=time.time,
        )
        self.dispatcher = Dispatcher(
            loaded.configuration,
            loaded.credentials,
            directory=options.data_directory,
            metrics=self.metrics,
            now=time.time,
            monotonic=time.monotonic,
            random=random.SystemRandom(),
            ordinal=ordinal(socket.gethostname()),
            on_settled=self.admission.learn,
        )
        self.listeners = Listeners(
            loaded.configuration,
            loaded.credentials,
            bind=options.bind,
            admission=self.admission,
            dispatcher=self.dispatcher,
            metrics=self.metrics,
            now=time.time,
            monotonic=time.monotonic,
        )
        self.administration = Administration(
            health=self.health,
            admission=self.admission,
            dispatcher=self.dispatcher,
            metrics=self.metrics,
            bind=options.bind,
            http_port=options.http_port,
            socket_path=options.data_directory / "control.sock",
        )
        self._stop = asyncio.Event()
        self._reload = asyncio.Event()
        self._deadline: float | None = None

    async def run(self) -> None:
        """Serve until a signal says stop.

        Raises UnexpectedEndError: a process without one of its parts would look well and do only half of its work, so
        it ends, and what started it starts it again. What was accepted is on the disk.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        loop.add_signal_handler(signal.SIGHUP, self._reload.set)
        async with self._started():
            watcher = loop.create_task(self._follow_configuration(), name="configuration")
            try:
                await self._stop_or_failure({"configuration": watcher, "dispatcher": self.dispatcher.failed})
            finally:
                self.health.stopping = True
                self._stop.set()  # a failure stops the others, too
                await asyncio.wait({watcher})

    async def _stop_or_failure(self, parts: Mapping[str, asyncio.Future[None]]) -> None:
        """Wait for the signal; raises UnexpectedEndError when a part ends before it."""
        stop = asyncio.ensure_future(self._stop.wait())
        futures: list[asyncio.Future[Any]] = [stop, *parts.values()]
        try:
            await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)
        finally:
            stop.cancel()
        for name, part in parts.items():
            if not part.done() or (self._stop.is_set() and part.exception() is None):
                continue
            cause = part.exception()
            log.critical("relay.failed", part=name, exc_info=cause)
            raise UnexpectedEndError(f"{name}: ended unexpectedly ({cause!r})") from cause

    @contextlib.asynccontextmanager
    async def _started(self) -> AsyncIterator[None]:
        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_callback(self.admission.close)
            stack.push_async_callback(self.administration.stop)  # last: what is delivered at the end is seen, too
            await self.dispatcher.start()  # first: it takes the lock on the data directory, which is one process's
            stack.push_async_callback(self._stop_in_time, self.dispatcher.stop)
            await self.admission.start()
            await self.administration.start()
            await self.listeners.start()
            stack.push_async_callback(self._stop_in_time, self.listeners.stop)
            self._in_force(self.configuration)
            self.health.listening = True
            self._write_ready_file()
            log.info("relay.ready", listeners=self._addresses(), revision=self.configuration.revision)
            yield
            log.info("relay.stopping", grace=self.options.grace)
        log.info("relay.stopped")

    async def _stop_in_time(self, stop: Callable[[float], Awaitable[None]]) -> None:
        """Stop a part within what is left of the grace period: sessions and deliveries share it."""
        if self._deadline is None:
            self._deadline = time.monotonic() + self.options.grace
        await stop(max(self._deadline - time.monotonic(), MINIMUM_GRACE))

    async def _follow_configuration(self) -> None:
        async for found in reload.changes(self.options.config_directory, self._stop, self._reload):
            if isinstance(found, ConfigurationError):
                self._refuse(found)
            elif found.configuration.revision != self.configuration.revision or self.health.configuration_error:
                try:
                    self._adopt(found)
                except ConfigurationError as error:
                    self._refuse(error)

    def _adopt(self, loaded: reload.Loaded) -> None:
        """Take a new configuration everywhere or nowhere: every part may refuse it before any part changes."""
        for part in (self.listeners, self.dispatcher, self.admission):
            part.check(loaded.configuration, loaded.credentials)
        self.listeners.reconfigure(loaded.configuration, loaded.credentials)
        self.dispatcher.reconfigure(loaded.configuration, loaded.credentials)
        self.admission.reconfigure(loaded.configuration, loaded.credentials)
        configure_logging(loaded.configuration)
        self._in_force(loaded.configuration)
        log.info("configuration.adopted", revision=loaded.configuration.revision)

    def _in_force(self, configuration: Configuration) -> None:
        self.configuration = configuration
        self.health.revision = configuration.revision
        self.health.configuration_error = ""
        self.metrics.configure(configuration, self.listeners.certificate_expiry(), self.admission.spam_rules)
        self.metrics.configuration_reload_success.set(1)

    def _refuse(self, error: ConfigurationError) -> None:
        """Keep what is in force; say so once for each cause."""
        self.metrics.configuration_reload_success.set(0)
        if str(error) != self.health.configuration_error:
            log.error("configuration.refused", error=str(error), in_force=self.configuration.revision)
        self.health.configuration_error = str(error)

    def _addresses(self) -> dict[str, str]:
        return {name: host_port(*address) for name, address in self.listeners.addresses.items()}

    def _write_ready_file(self) -> None:
        path = self.options.ready_file
        if path is None:
            return
        content = {
            "listeners": self._addresses(),
            "http": host_port(*self.administration.address),
            "ca": str(self.options.config_directory / "credentials" / "ca.crt"),
            "pid": os.getpid(),
        }
        draft = path.with_name(f".{path.name}.{os.getpid()}")
        draft.write_text(json.dumps(content) + "\n")
        draft.replace(path)


def host_port(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def ordinal(hostname: str) -> int | None:
    """A StatefulSet pod's ordinal, from its host name; None for others."""
    found = re.fullmatch(r".+-(\d{1,6})", hostname.partition(".")[0])
    return int(found[1]) if found else None


class LogStream:
    """JSON lines on their way to a file. Those that tell of nothing wrong go together, soon; all others at once.

    A system call for each would cost more than the line, and gives the interpreter's lock to other threads.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._lines: list[bytes] = []
        self._lock = threading.Lock()

    def _add(self, line: bytes) -> None:
        with self._lock:
            self._lines.append(line)
            number = len(self._lines)
        if number >= LOG_LINES:
            self.flush()
        elif number == 1:
            try:
                asyncio.get_running_loop().call_later(LOG_DELAY, self.flush)
            except RuntimeError:  # before the event loop, or in another thread
                self.flush()

    def _write(self, line: bytes) -> None:
        with self._lock:
            self._lines.append(line)
        self.flush()

    def flush(self) -> None:
        with self._lock:
            lines, self._lines = self._lines, []
            if lines:
                self._stream.write(b"\n".join(lines) + b"\n")
                self._stream.flush()

    debug = info = _add
    msg = log = warn = warning = err = error = critical = fatal = failure = exception = _write


def configure_logging(configuration: Configuration) -> None:
    """One line an event on standard error: JSON, or text for people."""
    level = logging.getLevelName(configuration.logging.level.upper())
    renderer: structlog.typing.Processor
    factory: Callable[..., object]
    if configuration.logging.format == "JSON":
        encoder = msgspec.json.Encoder(enc_hook=repr)
        renderer = structlog.processors.JSONRenderer(serializer=lambda event, **_: encoder.encode(event))
        stream = LogStream(sys.stderr.buffer)
        atexit.register(stream.flush)

        def factory(*_: object) -> LogStream:
            return stream
    else:
        renderer = structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
        factory = structlog.PrintLoggerFactory(sys.stderr)
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=factory,
        cache_logger_on_first_use=False,
    )


def serve(options: Options) -> None:
    """Run a relay until it is told to stop.

    Raises ConfigurationError when it cannot start, SystemExit when a part of it failed.
    """
    loaded = reload.load(options.config_directory)
    options.data_directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    configure_logging(loaded.configuration)

    async def main() -> None:
        await Application(options, loaded).run()

    try:
        uvloop.run(main())
    except UnexpectedEndError as error:
        raise SystemExit(f"mailsluice-relay: {error}") from error
