"""`python -m benchmarks [--short] [--rounds N] [--only receive|logins|delivery|memory]`.

Every round measures every load on each server in turn, so that a neighbour's work falls on all of them alike.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks import discard, memory, relays
from benchmarks.load import Load, Sink
from benchmarks.machine import Neighbours
from benchmarks.measure import Run, Series, delivered, logged_in, received
from benchmarks.report import Bound, Comparison, Report

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "latest.json"

RECEIVE = (
    (Load("sessions", 1000), (Bound("rate", 0.0, 3.5),)),
    (Load("kept", 2000, kept=True), (Bound("rate", 0.0, 4.0),)),
    (Load("large", 200, size=200_000, kept=True), (Bound("rate", 0.0, 8.0),)),
)
"""Beside aiosmtpd. The design states goals here and no floor."""
_COST = Bound("cpu", 0.5, 0.25, at_most=True)
DELIVERY = (
    (Load("single, 20", 600), (Bound("rate", 2.0, 4.0), _COST)),
    (Load("single, 200", 600, connections=200), ()),
    (Load("kept, 20", 2000, kept=True), (Bound("rate", 3.0, 6.0), _COST)),
    (Load("kept, 200", 4000, connections=200, kept=True), ()),
    (Load("large", 200, size=200_000, kept=True), (Bound("rate", 1.5, 2.5),)),
)
"""Beside Postfix: floors and goals of the design, which are about ordinary numbers of connections."""
LOGINS = 300
IDLE_SESSIONS = 2000
QUEUED = 100_000


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks", description="Measure Mailsluice beside its peers.")
    parser.add_argument("--short", action="store_true", help="a few seconds, one round, no floor: does it all run?")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=["receive", "logins", "delivery", "memory"], action="append")
    options = parser.parse_args()
    parts = options.only or ["receive", "logins", "delivery", *([] if options.short else ["memory"])]
    rounds = 1 if options.short else options.rounds
    report = Report()
    neighbours = Neighbours()
    with _directory() as directory:
        if "receive" in parts:
            _receive(report, directory, rounds, short=options.short)
        if "logins" in parts:
            _logins(report, directory, rounds, short=options.short)
        if "delivery" in parts:
            _delivery(report, directory, rounds, short=options.short)
        if "memory" in parts:
            _memory(report, directory)
    report.notes.append(
        f"Others took {neighbours.cores:.1f} of {os.cpu_count()} cores meanwhile: the more, the less rates tell."
    )
    report.show(judged=not options.short)
    if options.short:
        return 0
    report.write(RESULTS)
    print(f"written to {RESULTS.relative_to(ROOT)}")
    return 1 if report.misses() else 0


@contextlib.contextmanager
def _directory() -> Iterator[Path]:
    """On a disk, also where /tmp is memory; Postfix's and smtp-sink's users have to come in."""
    directory = Path(tempfile.mkdtemp(prefix="mailsluice-bench-", dir="/var/tmp"))
    directory.chmod(0o755)
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _receive(report: Report, directory: Path, rounds: int, *, short: bool) -> None:
    with (
        discard.running("mailsluice", directory / "receive-mailsluice") as (ours, _),
        discard.running("aiosmtpd", directory / "receive-aiosmtpd") as (bare, _),
    ):
        servers = {"Mailsluice": ours, "aiosmtpd": bare}
        report.sections["Receiving, nothing kept"] = [
            _compare(report, load, bounds, servers, rounds, short=short, run=received) for load, bounds in RECEIVE
        ]


def _logins(report: Report, directory: Path, rounds: int, *, short: bool) -> None:
    number = 20 if short else LOGINS
    with (
        discard.running("mailsluice", directory / "logins-mailsluice") as (ours, ours_ports),
        discard.running("no-hash", directory / "logins-no-hash") as (bare, bare_ports),
    ):
        logged_in(ours, ours_ports["submission"], 1)  # the one that pays for bcrypt
        comparison = Comparison("STARTTLS, AUTH PLAIN", {"bcrypt cost 12, warm": Series(), "no hash": Series()})
        for _ in range(rounds):
            comparison.series["bcrypt cost 12, warm"].runs.append(logged_in(ours, ours_ports["submission"], number))
            comparison.series["no hash"].runs.append(logged_in(bare, bare_ports["submission"], number))
        report.sections["Logging in over TLS"] = [comparison]


def _delivery(report: Report, directory: Path, rounds: int, *, short: bool) -> None:
    starts: dict[str, relays.Start] = {"Mailsluice": relays.mailsluice}
    if relays.can_run_postfix():
        starts["Postfix"] = relays.postfix
    else:
        report.notes.append("Postfix was not measured: it needs root and Debian's package postfix.")
    haraka = None if short else relays.haraka_directory(ROOT / "build" / "haraka")
    if haraka is not None:
        starts["Haraka"] = relays.haraka(haraka)
        report.notes.append("Haraka writes its queue files without fsync: what it accepted is lost when power fails.")
    elif not short:
        report.notes.append("Haraka was not measured: npm could not install it quickly.")
    with contextlib.ExitStack() as stack:
        sink = Sink(directory)
        stack.callback(sink.close)
        servers = {
            name: stack.enter_context(start(directory / name.lower(), sink.port)) for name, start in starts.items()
        }
        report.sections["From client to next server, queue on disk"] = [
            _compare(
                report,
                load,
                bounds,
                servers,
                rounds,
                short=short,
                run=lambda running, load: delivered(running, load, sink),
            )
            for load, bounds in DELIVERY
        ]


def _compare(
    report: Report,
    load: Load,
    bounds: tuple[Bound, ...],
    servers: dict[str, relays.Running],
    rounds: int,
    *,
    short: bool,
    run: Callable[[relays.Running, Load], Run],
) -> Comparison:
    if short:
        load = Load(load.name, max(load.connections, 40), load.size, load.connections, load.kept)
    series = {name: Series() for name in servers}
    names = list(servers)
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            if name not in series:
                continue
            try:
                series[name].runs.append(run(servers[name], load))
            except (TimeoutError, subprocess.SubprocessError) as error:
                if name == names[0]:
                    raise
                del series[name]
                report.notes.append(f"{name} did not get through {load.label}: {type(error).__name__}.")
    if os.isatty(2):
        print(f"{load.label}: done", file=sys.stderr)
    return Comparison(load, series, bounds)


def _memory(report: Report, directory: Path) -> None:
    for name, implicit in {"implicit TLS": True, "STARTTLS": False}.items():
        report.memory[f"idle sessions, {name}"] = memory.idle_sessions(
            directory / f"idle-{implicit}", implicit=implicit, sessions=IDLE_SESSIONS
        )
    report.memory["long queue"] = memory.long_queue(directory / "queue", messages=QUEUED)


if __name__ == "__main__":
    sys.exit(main())
