"""`python -m benchmarks.operator_restart [--relays 1000]`: how long an operator takes to catch up after a restart.

A control plane without a node (tests/cluster) holds so many settled relays, each with its children, its pod (which no
node takes) and its volume claim. The operator that made them ends, and another one starts. It has caught up when it has
reconciled every relay and nothing is due; by then it must have written nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from benchmarks.machine import free_port

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "cluster"))

from testcluster.control_plane import ControlPlane  # noqa: E402 - found by the line above
from testcluster.kubectl import Kubectl  # noqa: E402 - as above

Object = dict[str, Any]

WRITES = frozenset({"apply", "patch", "create", "delete"})
RELAYS_A_NAMESPACE = 50
HTPASSWD = "shop@example.test:$2b$10$IACI.x37fVDOprQytsuhaeWnGGmQwF6NkJtIbSJ97fVJryUdwnZYG\n"
GOAL_SECONDS, GOAL_MIB = 30.0, 200.0


@dataclass(frozen=True)
class Restart:
    """What one restart took."""

    relays: int
    seconds: float
    cpu_seconds: float
    peak_mib: float
    writes: int
    requests: Mapping[str, int]


class Operator:
    """A running `mailsluice-operator` and its metrics."""

    def __init__(self, kubeconfig: Path, folder: Path) -> None:
        self.port = free_port()
        self.started = time.monotonic()
        command = [
            str(Path(sys.executable).with_name("mailsluice-operator")),
            "--relay-image",
            "relay.example.test/relay",
        ]
        command += ["--http-host", "127.0.0.1", "--http-port", str(self.port)]
        with (folder / f"operator-{self.port}.log").open("wb") as log:
            environment = {**os.environ, "KUBECONFIG": str(kubeconfig)}
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)

    def samples(self) -> list[Any]:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=30) as reply:
                text = reply.read().decode()
        except urllib.error.URLError:  # it has not got so far yet
            return []
        return [sample for family in text_string_to_metric_families(text) for sample in family.samples]

    def requests(self) -> dict[str, int]:
        found: dict[str, int] = {}
        for sample in self.samples():
            if sample.name == "mailsluice_operator_api_requests_total" and sample.value:
                found[sample.labels["verb"]] = found.get(sample.labels["verb"], 0) + int(sample.value)
        return found

    def writes(self) -> int:
        return sum(count for verb, count in self.requests().items() if verb in WRITES)

    def caught_up(self, relays: int) -> bool:
        """Every relay was reconciled, nothing is due, and it leads."""
        values: dict[str, float] = {}
        for sample in self.samples():
            if sample.labels.get("kind", "SmtpRelay") == "SmtpRelay" and sample.labels.get("result") != "error":
                values[sample.name] = values.get(sample.name, 0.0) + sample.value
        return (
            values.get("mailsluice_operator_leader") == 1
            and values["mailsluice_operator_reconciles_total"] >= relays
            and values["mailsluice_operator_work_queue_depth"] == 0
        )

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(60)


def _wait(what: str, seconds: float, done: Any) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {seconds:.0f} s")
        time.sleep(0.2)


def _manifests(namespace: str, relays: int) -> Iterator[Object]:
    yield {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}}
    for name, data in (("users", {"htpasswd": HTPASSWD}), ("provider", {"username": "platform", "password": "secret"})):
        metadata = {"name": name, "namespace": namespace}
        yield {"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "stringData": data}
    for number in range(relays):
        yield {
            "apiVersion": "mailsluice.dev/v1alpha1",
            "kind": "SmtpRelay",
            "metadata": {"name": f"out-{number}", "namespace": namespace},
            "spec": {
                "authentication": {"users": [{"secretRef": {"name": "users"}}]},
                "senders": {"allowedDomains": ["example.test"]},
                "upstreams": [
                    {"name": "p", "host": "smtp.provider.test", "credentialsSecretRef": {"name": "provider"}}
                ],
                "disruptionBudget": {},
                "networkPolicy": {"enabled": True},
            },
        }


@contextmanager
def _cluster(folder: Path) -> Iterator[Kubectl]:
    control_plane = ControlPlane(folder / "api")
    control_plane.start()
    try:
        kubectl = Kubectl(control_plane.kubeconfig)
        kubectl("apply", "-k", str(ROOT / "crds"))
        kubectl("wait", "--for=condition=Established", "--timeout=30s", "crd", "--all")
        yield kubectl
    finally:
        control_plane.stop()


def _settle(kubectl: Kubectl, folder: Path, relays: int) -> None:
    """Have an operator make everything, and wait until it writes nothing any more."""
    for start in range(0, relays, RELAYS_A_NAMESPACE):
        number = min(RELAYS_A_NAMESPACE, relays - start)
        kubectl.apply(*_manifests(f"mail-{start // RELAYS_A_NAMESPACE}", number))
    operator = Operator(kubectl.kubeconfig, folder)
    try:
        _wait("the relays' children", 1200, lambda: operator.caught_up(relays))
        before, quiet_since = -1, time.monotonic()
        while time.monotonic() - quiet_since < 15:
            time.sleep(1)
            writes = operator.writes()
            if writes != before:
                before, quiet_since = writes, time.monotonic()
        print(
            f"settled {relays} relays with {before} writes in {time.monotonic() - operator.started:.0f} s", flush=True
        )
    finally:
        operator.stop()


def _restart(kubectl: Kubectl, folder: Path, relays: int) -> Restart:
    operator = Operator(kubectl.kubeconfig, folder)
    try:
        _wait("catching up", 300, lambda: operator.caught_up(relays))
        seconds = time.monotonic() - operator.started
        status = Path(f"/proc/{operator.process.pid}/status").read_text()
        fields = Path(f"/proc/{operator.process.pid}/stat").read_text().rpartition(")")[2].split()
        peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
        cpu = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        return Restart(relays, round(seconds, 1), cpu, round(peak / 1024, 1), operator.writes(), operator.requests())
    finally:
        operator.stop()


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.operator_restart")
    parser.add_argument("--relays", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mailsluice-restart-") as name, _cluster(Path(name)) as kubectl:
        _settle(kubectl, Path(name), options.relays)
        restarts = [_restart(kubectl, Path(name), options.relays) for _ in range(options.rounds)]
    for restart in restarts:
        print(json.dumps(asdict(restart)))
    good = all(
        restart.writes == 0 and restart.seconds <= GOAL_SECONDS and restart.peak_mib <= GOAL_MIB for restart in restarts
    )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
