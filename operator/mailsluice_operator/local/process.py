"""Runs a compiled relay as a child process, and hands it what becomes new in its files."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec
import watchfiles

from mailsluice_operator.local.compilation import Compiled, compiled, data_directory
from mailsluice_operator.local.documents import LocalError
from mailsluice_operator.local.mount import write_atomically, write_mount
from mailsluice_relay.config import ConfigurationError, encode

PROGRAM: Final = "mailsluice-relay"
START_TIMEOUT: Final = 30.0
"""Seconds until every listener has to accept."""
STOP_TIMEOUT: Final = 40.0
"""Seconds that a relay gets to drain, a little more than its own grace period."""
PR_SET_PDEATHSIG: Final = 1
"""prctl(2): the signal that a child gets when its parent dies."""


@dataclass(frozen=True, slots=True)
class Started:
    """A running relay: where each listener and HTTP answer, and whom its certificate comes from."""

    listeners: Mapping[str, str]
    http: str
    ca: str
    pid: int

    def address(self, listener: str) -> tuple[str, int]:
        host, _, port = self.listeners[listener].rpartition(":")
        return host.strip("[]"), int(port)


class LocalRelay:
    """One SmtpRelay of some files, run on this machine.

    `name` chooses among several. `ports` replaces listeners' ports; 0 picks a free one. The data directory is the
    queue, so that a second run on it continues.
    """

    def __init__(
        self,
        files: Sequence[Path],
        *,
        name: str | None = None,
        data_directory: Path | None = None,
        bind: str = "127.0.0.1",
        ports: Mapping[str, int] | None = None,
        http_port: int = 9090,
        quiet: bool = False,
    ) -> None:
        self.files = files
        self._name = name
        self._data_directory = data_directory
        self._bind = bind
        self._ports = dict(ports or {})
        self._http_port = http_port
        self._quiet = quiet
        self._shown = ""
        self.warnings: tuple[str, ...] = ()
        """Of the files as they were read last."""
        self.read: list[bytes | None] = []
        """What the files held then; None for one that could not be read."""
        self._process: asyncio.subprocess.Process | None = None

    @contextlib.asynccontextmanager
    async def started(self) -> AsyncIterator[Started]:
        """The relay, from when every listener accepts until it has drained. Raises LocalError."""
        directory = data_directory(self.files, self._name, self._data_directory)
        with claimed(directory):
            async with self._serving(directory) as started:
                yield started

    @contextlib.asynccontextmanager
    async def _serving(self, directory: Path) -> AsyncIterator[Started]:
        self.refresh()
        ready_file = directory / "ready.json"
        ready_file.unlink(missing_ok=True)
        process = await asyncio.create_subprocess_exec(
            relay_program(),
            "serve",
            *("--config-dir", str(directory / "mounts"), "--data-dir", str(directory), "--bind", self._bind),
            *("--http-port", str(self._http_port), "--ready-file", str(ready_file)),
            stderr=subprocess.DEVNULL if self._quiet else None,
            preexec_fn=die_with_parent,
        )
        self._process = process
        try:
            yield await _ready(process, ready_file)
        finally:
            await _stop(process)

    async def ended(self) -> int:
        """Returns when the relay's process has ended: its exit code, or less than zero for a signal."""
        if self._process is None:
            raise LocalError("the relay has not been started")
        return await self._process.wait()

    def refresh(self) -> Compiled:
        """Read the files and show the relay what is new. Raises LocalError and changes nothing."""
        self.read = _contents(self.files)
        made = compiled(self.files, self._name, self._data_directory, self._ports)
        packed = encode(made.configuration)
        if made.configuration.revision != self._shown:
            revision = made.configuration.credentials_revision.encode()
            mounts = made.directory / "mounts"
            write_mount(mounts / "credentials", {**made.files, "revision": revision})
            write_mount(mounts / "config", {"config.json.gz": packed})
            self._shown = made.configuration.revision
        self.warnings = made.warnings
        return made


def run(relay: LocalRelay, *, ready_file: Path | None) -> None:
    """Run the relay in the foreground until SIGTERM or SIGINT; follow its files meanwhile. Raises LocalError."""
    asyncio.run(_run(relay, ready_file))


async def _run(relay: LocalRelay, ready_file: Path | None) -> None:
    loop = asyncio.get_running_loop()
    stop, again = asyncio.Event(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    loop.add_signal_handler(signal.SIGHUP, again.set)
    async with relay.started() as started:
        if ready_file is not None:
            content = {**msgspec.to_builtins(started), "pid": os.getpid()}
            write_atomically(ready_file, json.dumps(content).encode() + b"\n")
        for name, address in started.listeners.items():
            _say(f"{name:12} {address}")
        _say(f"metrics      http://{started.http}/metrics\nCA           {started.ca}\nCtrl-C drains and ends.")
        for warning in relay.warnings:
            _say(f"warning: {warning}")
        following = asyncio.ensure_future(_follow(relay, stop, again))
        dying = asyncio.ensure_future(relay.ended())
        stopping = asyncio.ensure_future(stop.wait())
        await asyncio.wait({stopping, dying, following}, return_when=asyncio.FIRST_COMPLETED)
        ended = dying.result() if dying.done() and not stop.is_set() else None
        stop.set()
        dying.cancel()
        await following
    if ended is not None:
        how = f"was killed by signal {-ended}" if ended < 0 else f"ended by itself with exit code {ended}"
        raise LocalError(f"the relay {how}; its queue is on disk, and the next run continues it")


async def _follow(relay: LocalRelay, stop: asyncio.Event, again: asyncio.Event) -> None:
    """Take over changed files, and all of them on SIGHUP; a wrong file is told and changes nothing."""
    # The folders: who replaces a file by renaming leaves a watch on the file itself with the old one.
    folders = {path.resolve().parent for path in relay.files} | {path.absolute().parent for path in relay.files}
    watched = watchfiles.awatch(*folders, stop_event=stop, recursive=False, watch_filter=None)
    if _contents(relay.files) != relay.read:  # changed while the relay started
        again.set()
    changed = asyncio.ensure_future(anext(watched, None))
    stopping = asyncio.ensure_future(stop.wait())
    while not stop.is_set():
        forced = asyncio.ensure_future(again.wait())
        await asyncio.wait({changed, forced, stopping}, return_when=asyncio.FIRST_COMPLETED)
        asked = forced.done()
        forced.cancel()
        again.clear()
        if stop.is_set():
            break
        if changed.done():
            changed = asyncio.ensure_future(anext(watched, None))
        if _contents(relay.files) == relay.read and not asked:
            continue
        try:
            made = relay.refresh()
            for warning in made.warnings:
                _say(f"warning: {warning}")
            _say(f"read again: revision {made.configuration.revision}")
        except (LocalError, ConfigurationError) as error:
            _say(f"not taken, the relay goes on as before: {error}")
    changed.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await changed


def _contents(files: Sequence[Path]) -> list[bytes | None]:
    """What the files hold; None for one that cannot be read just now."""

    def content(path: Path) -> bytes | None:
        try:
            return path.read_bytes()
        except OSError:
            return None

    return [content(path) for path in files]


async def _ready(process: asyncio.subprocess.Process, ready_file: Path) -> Started:
    """Waits for the ready file, which the relay writes when it accepts."""
    ended = asyncio.ensure_future(process.wait())
    try:
        async with asyncio.timeout(START_TIMEOUT):
            while not ready_file.exists():
                done, _ = await asyncio.wait({ended}, timeout=0.02)
                if done:
                    raise LocalError(f"the relay did not start (exit code {process.returncode}); its messages say why")
    except TimeoutError as error:
        raise LocalError(f"the relay did not accept within {START_TIMEOUT:.0f} s; its messages say why") from error
    finally:
        ended.cancel()
    return msgspec.json.decode(ready_file.read_bytes(), type=Started)


async def _stop(process: asyncio.subprocess.Process) -> None:
    if process.returncode is not None:
        return
    process.terminate()
    try:
        await asyncio.wait_for(process.wait(), STOP_TIMEOUT)
    except TimeoutError:
        process.kill()  # the queue is on disk; the next run continues it
        await process.wait()


@contextlib.contextmanager
def claimed(directory: Path) -> Iterator[None]:
    """Hold the data directory for this process. Raises LocalError when another one has it, and changes nothing."""
    with (directory / "run.lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise LocalError(f"{directory} is used by another run; stop that one or name another --data-dir") from error
        yield


def relay_program() -> str:
    """Path of `mailsluice-relay`: beside this interpreter, where the same distribution put it, else on PATH."""
    beside = Path(sys.executable).with_name(PROGRAM)
    found = str(beside) if beside.exists() else shutil.which(PROGRAM)
    if found is None:
        raise LocalError(f"{PROGRAM} is not installed beside {sys.executable}; install mailsluice[relay]")
    return found


def die_with_parent() -> None:
    """In the child, before it starts: when this process is killed, so is the relay; what got 250 is on disk."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
