"""The processes of one cluster: started with a log each, found again by a later command, and ended for certain."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path


class ClusterError(Exception):
    """The cluster could not be brought to the wanted state. The text says what was waited for."""


class CommandFailedError(ClusterError):
    """A command's exit code was not zero. While something is waited for this means: not yet."""


def run(*argv: str, check: bool = True, **options: object) -> subprocess.CompletedProcess[str]:
    """Run to the end; an error's text carries what the command said."""
    if shutil.which(argv[0]) is None:
        raise ClusterError(f"{argv[0]} is not installed")
    done = subprocess.run(argv, check=False, capture_output=True, text=True, **options)  # type: ignore[call-overload]  # passed through
    if check and done.returncode:
        raise CommandFailedError(
            f"{' '.join(argv)}: exit {done.returncode}: {done.stderr.strip() or done.stdout.strip()}"
        )
    return done  # type: ignore[no-any-return]  # text=True makes it str


def wait_for(what: str, probe: Callable[[], bool], seconds: float, *, every: float = 0.1) -> None:
    """Return when `probe` is true; one that cannot answer yet (refused, failing command) counts as false."""
    deadline = time.monotonic() + seconds
    last: Exception | None = None
    while time.monotonic() < deadline:
        try:
            if probe():
                return
        except (OSError, CommandFailedError) as error:
            last = error
        time.sleep(every)
    raise ClusterError(f"{what} was not ready after {seconds:.0f} s" + (f": {last}" if last else ""))


def start_time(pid: int) -> str:
    """When this process started, in the kernel's ticks: with it a process id names one process for good."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


class Processes:
    """Kept in files below `state`, so that another command, or the next run, can end what this one started."""

    def __init__(self, state: Path) -> None:
        self.state = state
        self.logs = state / "logs"
        self.pids = state / "pids"
        for folder in (self.logs, self.pids):
            folder.mkdir(parents=True, exist_ok=True)

    def spawn(self, name: str, argv: Sequence[str], *, environment: Mapping[str, str] | None = None) -> None:
        with (self.logs / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={**os.environ, **(environment or {})},
            )
        (self.pids / name).write_text(f"{process.pid} {start_time(process.pid)}")

    def running(self) -> list[str]:
        """The names of those that run."""
        return [path.name for path in sorted(self.pids.iterdir()) if self._alive(path) is not None]

    def check(self) -> None:
        """Raise with the end of its log when a process has ended by itself."""
        running = self.running()
        for name in sorted(path.name for path in self.pids.iterdir() if path.name not in running):
            lines = (self.logs / f"{name}.log").read_text(errors="replace").splitlines()
            raise ClusterError(f"{name} ended by itself; the end of {self.logs}/{name}.log:\n" + "\n".join(lines[-5:]))

    def stop(self) -> None:
        """Kill all. Nothing of a test cluster is worth a graceful end, and etcd runs without fsync anyway."""
        for path in sorted(self.pids.iterdir()):
            pid = self._alive(path)
            if pid is not None:
                kill(pid)
            path.unlink()

    def _alive(self, path: Path) -> int | None:
        pid, _, started = path.read_text().partition(" ")
        return int(pid) if started and start_time(int(pid)) == started and not is_gone(int(pid)) else None


def is_gone(pid: int) -> bool:
    """Whether nothing of it runs any more: the first thread is a zombie before the others let go of their files."""
    process = Path(f"/proc/{pid}")
    try:
        state = (process / "stat").read_text().rpartition(")")[2].split()[0]
        return state in "ZX" and len(list((process / "task").iterdir())) <= 1
    except OSError:
        return True


def kill(pid: int) -> None:
    """Kill one process and wait until it is gone, so that its ports, mounts and files are free."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    wait_for(f"the end of process {pid}", lambda: is_gone(pid), 10, every=0.02)


def descendants_of(marker: str) -> list[int]:
    """Process ids whose command line names `marker`, with all their descendants, but not ourselves."""
    parents: dict[int, int] = {}
    chosen: set[int] = set()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            if marker in (entry / "cmdline").read_text(errors="replace"):
                chosen.add(int(entry.name))
        except (OSError, ValueError):
            continue  # ended while we looked
    chosen.discard(os.getpid())
    while children := {pid for pid, parent in parents.items() if parent in chosen} - chosen:
        chosen |= children
    return sorted(chosen)
