"""The operator as its users run it: `kubectl apply -k deploy`, and the command with the rights of its ServiceAccount.

No node runs pods here: the tests play the kubelet (a pod's status) and the relay (its /readyz) where they need them.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import http.server
import itertools
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from prometheus_client.parser import text_string_to_metric_families

from testcluster.binaries import CONTROL_PLANE, how_to_get, missing
from testcluster.control_plane import ControlPlane
from testcluster.kubectl import Kubectl
from testcluster.plugin import unavailable, wait_until

Object = dict[str, Any]

ROOT: Final = Path(__file__).resolve().parents[2]
WRITES: Final = frozenset({"apply", "patch", "create", "delete"})
IMAGE: Final = "registry.example.test/relay:1"
# `mailsluice-shop`, hashed once: bcrypt at its lowest cost.
HTPASSWD: Final = "shop@example.test:$2b$04$abcdefghijklmnopqrstuuH3YMMpQKF0UiRqzl.Pr1eQmBXK2WbVO\n"


@dataclasses.dataclass
class OperatorProcess:
    """A running `mailsluice-operator`."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path
    provoked: float = 0
    """Requests that were forbidden because a test wanted it so."""

    def get(self, path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=5) as reply:
                return reply.status, reply.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def requests(self) -> dict[tuple[str, str], float]:
        """Requests so far by verb and code."""
        return {
            (sample.labels["verb"], sample.labels["code"]): sample.value
            for family in text_string_to_metric_families(self.get("/metrics")[1])
            for sample in family.samples
            if sample.name == "mailsluice_operator_api_requests_total"
        }

    def writes(self) -> float:
        return sum(count for (verb, _), count in self.requests().items() if verb in WRITES)

    def value(self, name: str, **labels: str) -> float:
        return sum(
            sample.value
            for family in text_string_to_metric_families(self.get("/metrics")[1])
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    def forbidden(self) -> float:
        return sum(count for (_, code), count in self.requests().items() if code in {"401", "403"})

    @contextlib.contextmanager
    def provoking(self) -> Iterator[None]:
        """What is forbidden within is no lack of rights."""
        before = self.forbidden()
        yield
        self.provoked += self.forbidden() - before

    def stop(self) -> int:
        self.process.terminate()
        return self.process.wait(30)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def running_operator(kubeconfig: Path, folder: Path, *arguments: str) -> Iterator[OperatorProcess]:
    """The command, from its start until it watches, to its end by SIGTERM."""
    port, log = free_port(), folder / f"operator-{free_port()}.log"
    command = [str(Path(sys.executable).with_name("mailsluice-operator")), "--relay-image", IMAGE]
    command += ["--http-host", "127.0.0.1", "--http-port", str(port), *arguments]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env={**os.environ, "KUBECONFIG": str(kubeconfig)}, stdout=output, stderr=output
        )
    operator = OperatorProcess(process, port, log)

    def ready() -> bool:
        assert process.poll() is None, log.read_text()[-3000:]
        return operator.get("/readyz")[0] == 200

    try:
        wait_until(ready, 60)
        yield operator
    finally:
        if process.poll() is None:
            operator.stop()


@dataclasses.dataclass(frozen=True)
class Platform:
    """A control plane with the operator's manifests applied."""

    kubectl: Kubectl
    folder: Path
    audit_log: Path | None = None

    def fill(self, kubectl: Kubectl) -> None:
        """The Secrets that the relays of the tests name."""
        kubectl.apply(
            secret("users", htpasswd=HTPASSWD), secret("provider", username="platform", password="provider-secret")
        )

    def kubeconfig_of(self, account: str, namespace: str) -> Path:
        """A kubeconfig with the rights of a ServiceAccount."""
        document = json.loads(self.kubectl.kubeconfig.read_text())
        token = self.kubectl("create", "token", account, "--namespace", namespace, "--duration=24h").strip()
        document["users"][0]["user"] = {"token": token}
        path = self.folder / f"{namespace}-{account}.kubeconfig"
        path.write_text(json.dumps(document))
        return path


def foreign_definition(kind: str) -> Object:
    """A CustomResourceDefinition of the Prometheus operator, without its schema."""
    names = {"kind": kind, "plural": f"{kind.lower()}s", "singular": kind.lower(), "listKind": f"{kind}List"}
    schema = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {
            "name": f"{names['plural']}.monitoring.coreos.com",
            "annotations": {"api-approved.kubernetes.io": "unapproved, test only"},
        },
        "spec": {
            "group": "monitoring.coreos.com",
            "names": names,
            "scope": "Namespaced",
            "versions": [{"name": "v1", "served": True, "storage": True, "schema": {"openAPIV3Schema": schema}}],
        },
    }


@contextlib.contextmanager
def new_platform(*, audit: bool = False) -> Iterator[Platform]:
    if absent := missing(CONTROL_PLANE):
        unavailable(how_to_get(absent))
    with tempfile.TemporaryDirectory(prefix="mailsluice-operator-") as folder:
        control_plane = ControlPlane(Path(folder) / "api", audit=audit)
        control_plane.start()
        try:
            kubectl = Kubectl(control_plane.kubeconfig)
            kubectl("apply", "-k", str(ROOT / "deploy"))
            kubectl("wait", "--for=condition=Established", "--timeout=30s", "crd", "--all")
            # No node would run it: the tests start the command themselves.
            kubectl("delete", "deployment", "--namespace=mailsluice-system", "mailsluice-operator")
            yield Platform(kubectl, Path(folder), control_plane.audit_log)
        finally:
            control_plane.stop()


@pytest.fixture(scope="session")
def platform() -> Iterator[Platform]:
    with new_platform() as made:
        made.kubectl.apply(*map(foreign_definition, ("PodMonitor", "PrometheusRule")))
        made.kubectl("wait", "--for=condition=Established", "--timeout=30s", "crd", "--all")
        yield made


@pytest.fixture(scope="module")
def audited_platform() -> Iterator[Platform]:
    """Another one, that no operator works on yet, and where Prometheus' kinds are unknown."""
    with new_platform(audit=True) as made:
        yield made


@pytest.fixture(scope="session")
def prometheus_definitions() -> list[Object]:
    return list(map(foreign_definition, ("PodMonitor", "PrometheusRule")))


@pytest.fixture(scope="session")
def operator(platform: Platform) -> Iterator[OperatorProcess]:
    """The cluster-wide operator with exactly the ClusterRole of deploy/; whatever the tests do, that must be enough."""
    kubeconfig = platform.kubeconfig_of("mailsluice-operator", "mailsluice-system")
    with running_operator(kubeconfig, platform.folder) as process:
        yield process
        assert process.forbidden() == process.provoked
        assert process.get("/healthz") == (200, "ok\n")
        assert process.stop() == 0


@pytest.fixture
def run_operator() -> Callable[..., contextlib.AbstractContextManager[OperatorProcess]]:
    """Another operator process."""
    return running_operator


_numbers = itertools.count(1)


@pytest.fixture
def make_namespace(platform: Platform) -> Iterator[Callable[..., Kubectl]]:
    """Namespaces that go with the test."""
    made: list[str] = []

    def make(**labels: str) -> Kubectl:
        name = f"test-{os.getpid()}-{next(_numbers)}"
        metadata = {"name": name, "labels": labels}
        platform.kubectl.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": metadata})
        made.append(name)
        return platform.kubectl.within(name)

    yield make
    for name in made:
        # Not the namespace alone: what the operator does while it goes would count for the next test.
        kubectl = platform.kubectl.within(name)
        if kubectl.attempt("get", "namespace", name).returncode == 0:
            kubectl.attempt("annotate", "smtprelay", "--all", "mailsluice.dev/discard-queue=true")
            kubectl("delete", "smtprelay,smtpuser", "--all", "--timeout=30s")
            kubectl("delete", "namespace", name, "--wait=false")


@pytest.fixture
def mail(platform: Platform, make_namespace: Callable[..., Kubectl]) -> Kubectl:
    """kubectl within the namespace of the test's relays, with the Secrets that they name."""
    kubectl = make_namespace()
    platform.fill(kubectl)
    return kubectl


def secret(name: str, **data: str) -> Object:
    return {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}, "stringData": data}


class FakePod:
    """Plays a relay pod: an address of its own on loopback, and a /readyz that says what the test wants."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.answer: Object = {"ready": True, "revision": "", "draining": False, "queue": {}, "upstreams": {}}
        pod = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = json.dumps(pod.answer).encode()
                self.send_response(200 if pod.answer["ready"] else 503)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                """Quiet."""

        self.server = http.server.ThreadingHTTPServer((address, 9090), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def queue(self, **counts: int) -> None:
        self.answer["queue"] = counts


@pytest.fixture
def fake_pod() -> Iterator[Callable[[], FakePod]]:
    pods: list[FakePod] = []

    def make() -> FakePod:
        for last in range(2, 250):  # another run on this machine may have some of them
            try:
                pods.append(FakePod(f"127.9.{os.getpid() % 250}.{last}"))
            except OSError:
                continue
            return pods[-1]
        raise AssertionError("no free loopback address")

    yield make
    for pod in pods:
        pod.server.shutdown()
        pod.server.server_close()


def values(body: Object) -> dict[str, bytes]:
    """What a Secret holds."""
    return {key: base64.b64decode(value) for key, value in body["data"].items()}


@pytest.fixture(scope="session")
def within_two_seconds() -> Callable[[Callable[[], Any]], float]:
    """Wait for a repair, and say how long it took."""

    def wait(probe: Callable[[], Any]) -> float:
        started = time.monotonic()
        wait_until(probe, 2, every=0.02)
        return time.monotonic() - started

    return wait
