"""Whole relays with a durable queue, each started by the benchmark with a configuration and a queue of its own.

All deliver to the same sink over at most CONNECTIONS connections, keep their log in a file, and have their queue on the
same disk. What else is set is what its makers recommend for such a load, or switches off a brake.
"""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks.load import SENDER, program
from benchmarks.machine import accepts, free_port, wait_for
from mailsluice_relay import config

CONNECTIONS: Final = 20
HARAKA_VERSION: Final = "3"
INSTALL_LIMIT: Final = 90.0
"""Seconds that npm has to install Haraka."""


@dataclass(frozen=True)
class Running:
    port: int
    pid: int
    """The root of its processes."""


Start = Callable[[Path, int], contextlib.AbstractContextManager[Running]]
"""Directory and sink's port in; a context in which the relay runs out."""


def configuration(listeners: tuple[config.Listener, ...], sink: int, *, hashes: tuple[str, ...] = ()) -> bytes:
    """Policy, limits and rules are all in force; none of them hits, as the load is one mail from one network."""
    often = config.SpamRule(score=4, limit=1_000_000_000, window=600.0)
    return config.encode(
        config.Configuration(
            revision="1",
            credentials_revision="1",
            relay=config.Relay(name="bench", namespace="bench"),
            hostname="relay.example.test",
            listeners=listeners,
            authentication=config.Authentication(
                users=(config.User(login=SENDER, hashes=hashes),), allowed_networks=("127.0.0.0/8",)
            ),
            senders=config.Senders(allowed_domains=("example.test",)),
            rate_limits=(
                config.RateLimit(name="messages", unit=config.RateLimitUnit.MESSAGES, limit=10**9, window=3600.0),
                config.RateLimit(name="recipients", unit=config.RateLimitUnit.RECIPIENTS, limit=10**9, window=60.0),
            ),
            spam=config.Spam(
                rules={
                    "forgedHeaderFrom": config.SpamRule(score=6),
                    "executableAttachment": config.SpamRule(score=8),
                    "recipientBurst": often,
                    "newNetworks": config.SpamRule(score=3),
                    "sameBodyFanOut": often,
                    "linkShortener": config.SpamRule(score=2),
                }
            ),
            upstreams=(
                config.Upstream(
                    name="sink",
                    host="127.0.0.1",
                    port=sink,
                    tls=config.UpstreamTLSMode.PLAIN,
                    limits=config.UpstreamLimits(connections=CONNECTIONS),
                ),
            ),
            limits=config.Limits(connections=5000, connections_per_network=5000),
        )
    )


@contextlib.contextmanager
def mailsluice(
    directory: Path,
    sink: int,
    *,
    listeners: tuple[config.Listener, ...] = (
        config.Listener(name="plain", port=0, mode=config.ListenerMode.PLAIN, authentication_required=False),
    ),
    credentials: dict[str, bytes] | None = None,
    ports: dict[str, int] | None = None,
) -> Iterator[Running]:
    """`ports` is filled with each listener's."""
    for name, files in {
        "config": {"config.json.gz": configuration(listeners, sink)},
        "credentials": {"revision": b"1", **(credentials or {})},
    }.items():
        (directory / name).mkdir(parents=True)
        for file, content in files.items():
            (directory / name / file).write_bytes(content)
    ready = directory / "ready.json"
    command = [str(Path(sys.executable).with_name("mailsluice-relay")), "serve", "--config-dir", str(directory)]
    command += ["--data-dir", str(directory / "data"), "--bind", "127.0.0.1", "--http-port", "0"]
    with _started([*command, "--ready-file", str(ready), "--grace", "2"], directory / "log") as process:
        wait_for(ready.exists, "mailsluice-relay", seconds=20)
        found = json.loads(ready.read_text())["listeners"]
        numbers = {name: int(address.rpartition(":")[2]) for name, address in found.items()}
        if ports is not None:
            ports.update(numbers)
        yield Running(next(iter(numbers.values())), process.pid)


_MAIN_CF: Final = """
compatibility_level = 3.6
queue_directory = {directory}/queue
data_directory = {directory}/data
maillog_file = {directory}/mail.log
maillog_file_prefixes = {directory}
myhostname = relay.example.test
mydestination =
alias_maps =
inet_interfaces = 127.0.0.1
inet_protocols = ipv4
mynetworks = 127.0.0.0/8
smtpd_relay_restrictions = permit_mynetworks, reject
relayhost = [127.0.0.1]:{sink}
in_flow_delay = 0
default_process_limit = 300
smtpd_client_connection_count_limit = 0
default_destination_concurrency_limit = {connections}
initial_destination_concurrency = {connections}
"""
_MASTER_CF: Final = """
127.0.0.1:{port} inet n - n - - smtpd
cleanup unix n - n - 0 cleanup
qmgr unix n - n 300 1 qmgr
rewrite unix - - n - - trivial-rewrite
bounce unix - - n - 0 bounce
defer unix - - n - 0 bounce
trace unix - - n - 0 bounce
verify unix - - n - 1 verify
flush unix n - n 1000? 0 flush
proxymap unix - - n - - proxymap
smtp unix - - n - - smtp
error unix - - n - - error
retry unix - - n - - error
anvil unix - - n - 1 anvil
scache unix - - n - 1 scache
postlog unix-dgram n - n - 1 postlogd
"""


def can_run_postfix() -> bool:
    """Its master process runs as root alone."""
    return program("postfix") is not None and os.geteuid() == 0


@contextlib.contextmanager
def postfix(directory: Path, sink: int) -> Iterator[Running]:
    port = free_port()
    owner = pwd.getpwnam("postfix")
    for name in ("config", "queue", "data"):
        (directory / name).mkdir(parents=True)
    os.chown(directory / "data", owner.pw_uid, owner.pw_gid)
    (directory / "config" / "main.cf").write_text(
        _MAIN_CF.format(directory=directory, sink=sink, connections=CONNECTIONS)
    )
    (directory / "config" / "master.cf").write_text(_MASTER_CF.format(port=port))
    control = [program("postfix") or "postfix", "-c", str(directory / "config")]
    with _started([*control, "start-fg"], directory / "log") as process:
        wait_for(lambda: accepts(port), "Postfix", seconds=30)
        try:
            yield Running(port, process.pid)
        finally:
            subprocess.run([*control, "stop"], check=False, capture_output=True, timeout=30)


_HARAKA_PLUGIN: Final = """
exports.register = function () {
  this.register_hook('mail', 'accept'); this.register_hook('rcpt', 'accept'); this.register_hook('get_mx', 'sink')
}
exports.accept = (next, connection) => { connection.relaying = true; next(OK) }
exports.sink = (next) => next(OK, { priority: 0, exchange: '127.0.0.1', port: %d })
"""


def haraka_directory(cache: Path) -> Path | None:
    """Where Haraka is installed, which this does; None where that cannot be, or not quickly."""
    program = cache / "node_modules" / "Haraka" / "bin" / "haraka"
    npm = shutil.which("npm")
    if not program.exists() and npm is not None:
        cache.mkdir(parents=True, exist_ok=True)
        command = [npm, "install", "--no-audit", "--no-fund", "--prefix", str(cache), f"Haraka@{HARAKA_VERSION}"]
        with contextlib.suppress(subprocess.SubprocessError):
            subprocess.run(command, check=True, capture_output=True, timeout=INSTALL_LIMIT)
    return program if program.exists() else None


def haraka(program: Path) -> Start:
    @contextlib.contextmanager
    def start(directory: Path, sink: int) -> Iterator[Running]:
        port = free_port()
        directory.mkdir(parents=True)
        shutil.copytree(program.parents[1] / "config", directory / "config")  # it has no defaults without
        for name in ("plugins", "queue"):
            (directory / name).mkdir()
        for name, content in {
            "config/smtp.ini": f"listen=127.0.0.1:{port}\nnodes=0\n",
            "config/outbound.ini": f"concurrency_max={CONNECTIONS}\nlocal_mx_ok=true\nenable_tls=false\n",
            "config/plugins": "bench\n",
            "config/log.ini": "level=notice\n",
            "config/me": "relay.example.test\n",
            "plugins/bench.js": _HARAKA_PLUGIN % sink,
        }.items():
            (directory / name).write_text(content)
        command = [shutil.which("node") or "node", str(program), "-c", str(directory)]
        with _started(command, directory / "log") as process:
            wait_for(lambda: accepts(port), "Haraka", seconds=30)
            yield Running(port, process.pid)

    return start


@contextlib.contextmanager
def _started(command: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
