"""A mail's journey through a real cluster: the operator from deploy/, a relay that it runs, an application that sends.

Everything is what users get: the images from the Dockerfile, the manifests from deploy/, pods under the `restricted`
Pod Security Standard, a Service, cluster DNS, TLS verified by the relay's CA. Only the provider's server is a sink.
The tests build on each other in their order, as a relay's life does.
"""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import bcrypt
import pytest

from testcluster.kubectl import Kubectl, Object
from testcluster.node import NodeCluster

pytestmark = [pytest.mark.node, pytest.mark.timeout(600)]

ROOT: Final = Path(__file__).resolve().parents[2]
RELAY_IMAGE: Final = "localhost/mailsluice-relay:dev"
OPERATOR_IMAGE: Final = "localhost/mailsluice-operator:dev"
NAMESPACE: Final = "shop"
LOGIN: Final = "shop@example.test"
FIRST: Final = "first-password"
SECOND: Final = "second-password"
CLIENT_PROGRAM: Final = Path(__file__).with_name("send_mail.py").read_text()

Eventually = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What the application saw: subjects that got 250, and the reply that ended it, if one did."""

    accepted: list[str]
    refused: tuple[int, str] | None


@dataclasses.dataclass(frozen=True)
class Shop:
    """The namespace of an application, with its relay, and the sink that the relay sends to."""

    kubectl: Kubectl

    def apply_users(self, password: str) -> None:
        hashed = bcrypt.hashpw(password.encode(), bcrypt.gensalt(10)).decode()
        self.kubectl.apply(secret("shop-users", {"htpasswd": f"{LOGIN}:{hashed}\n"}))

    def send(self, *subjects: str, port: int = 587, password: str | None = FIRST, sender: str = LOGIN) -> Outcome:
        order = {
            "ca": self.kubectl.get("configmap", "outbound-ca")["data"]["ca.crt"],
            "host": f"outbound.{NAMESPACE}.svc",
            "port": port,
            "implicit_tls": port == 465,
            "login": LOGIN,
            "password": password,
            "sender": sender,
            "recipient": "customer@example.org",
            "subjects": subjects,
        }
        printed = self.kubectl("exec", "-i", "client", "--", "python3", "-c", CLIENT_PROGRAM, stdin=json.dumps(order))
        outcome = json.loads(printed)
        return Outcome(outcome["accepted"], tuple(outcome["refused"]) if outcome["refused"] else None)

    def start_sink(self) -> None:
        listen = ["-n", "-l", "0.0.0.0:2525", "-c", "aiosmtpd.handlers.Mailbox", "/tmp/mail"]
        sink = pod("sink", "python3", "-m", "aiosmtpd", *listen)
        # Ready means that it listens, and the Service has it from then on.
        sink["spec"]["containers"][0]["readinessProbe"] = {"tcpSocket": {"port": 2525}, "periodSeconds": 1}
        self.kubectl.apply(sink)
        self.kubectl("wait", "pod/sink", "--for=condition=Ready", "--timeout=60s", timeout=90)

    def stop_sink(self) -> None:
        self.kubectl("delete", "pod", "sink", "--grace-period=1", timeout=90)

    def arrived(self) -> str:
        """Every mail of the sink, one after the other."""
        found = self.kubectl.attempt("exec", "sink", "--", "sh", "-c", "cat /tmp/mail/new/* 2>/dev/null || true")
        return found.stdout

    def subjects(self) -> list[str]:
        return re.findall(r"(?m)^Subject: (.*?)\r?$", self.arrived())

    def relay_pod(self) -> Object:
        found = self.kubectl.list("pods", selector="mailsluice.dev/relay=outbound")
        assert len(found) == 1
        return found[0]

    def metrics(self) -> dict[str, float]:
        """The relay's samples by name and labels, by way of the API server."""
        name = self.relay_pod()["metadata"]["name"]
        page = self.kubectl("get", "--raw", f"/api/v1/namespaces/{NAMESPACE}/pods/{name}:9090/proxy/metrics")
        samples = (line.rpartition(" ") for line in page.splitlines() if line and not line.startswith("#"))
        return {series: float(value) for series, _, value in samples}

    def revision(self) -> str:
        """Of the configuration that the relay works by."""
        series = [series for series in self.metrics() if series.startswith("mailsluice_configuration_info{")]
        assert len(series) == 1
        return series[0]

    def count(self, metric: str, **labels: str) -> float:
        """The sum over all series of this metric that have these labels."""
        wanted = [f'{name}="{value}"' for name, value in labels.items()]
        return sum(
            value
            for series, value in self.metrics().items()
            if series.partition("{")[0] == metric and all(label in series for label in wanted)
        )


def secret(name: str, content: dict[str, str]) -> Object:
    return {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}, "stringData": content}


def pod(name: str, *command: str) -> Object:
    """A pod from the relay's image, which has Python and aiosmtpd, as restricted as the relay itself."""
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "labels": {"app": name}},
        "spec": {
            "terminationGracePeriodSeconds": 1,
            "automountServiceAccountToken": False,
            "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
            "containers": [
                {
                    "name": "main",
                    "image": RELAY_IMAGE,
                    "imagePullPolicy": "Never",
                    "command": list(command),
                    "securityContext": {
                        "allowPrivilegeEscalation": False,
                        "readOnlyRootFilesystem": True,
                        "capabilities": {"drop": ["ALL"]},
                    },
                    "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],
                }
            ],
            "volumes": [{"name": "tmp", "emptyDir": {}}],
        },
    }


SINK_SERVICE: Final[Object] = {
    "apiVersion": "v1",
    "kind": "Service",
    "metadata": {"name": "sink"},
    "spec": {"selector": {"app": "sink"}, "ports": [{"port": 25, "targetPort": 2525}]},
}

RELAY: Final[Object] = {
    "apiVersion": "mailsluice.dev/v1alpha1",
    "kind": "SmtpRelay",
    "metadata": {"name": "outbound"},
    "spec": {
        "hostname": "mail.example.test",
        "authentication": {"users": [{"secretRef": {"name": "shop-users"}}]},
        "senders": {"allowedDomains": ["example.test"]},
        "upstreams": [{"name": "provider", "host": f"sink.{NAMESPACE}.svc", "port": 25, "tls": {"mode": "Plain"}}],
        "queue": {"retry": {"initial": "2s", "maximum": "5s"}},
    },
}


@pytest.fixture(scope="module")
def cluster(node_cluster: NodeCluster, tmp_path_factory: pytest.TempPathFactory) -> NodeCluster:
    """The node with both images, and the operator running as deploy/ has it."""
    images = tmp_path_factory.mktemp("images")
    subprocess.run([ROOT / "tools/build-images", "--output", images, "relay", "operator"], check=True, timeout=500)
    for name in ("relay", "operator"):
        node_cluster.load(images / f"mailsluice-{name}.tar")
    node_cluster.kubectl("apply", "--server-side", "-f", "-", stdin=operator_manifests(node_cluster.kubectl))
    rollout = ("rollout", "status", "deployment/mailsluice-operator", "-n", "mailsluice-system", "--timeout=120s")
    node_cluster.kubectl(*rollout, timeout=150)
    return node_cluster


def operator_manifests(kubectl: Kubectl) -> str:
    """deploy/ with the images that were just built in place of the published ones."""
    manifests = kubectl("kustomize", str(ROOT / "deploy"))
    manifests = re.sub(r"\S*mailsluice-operator(:[\w.-]+|@sha256:\w+)(?=\s|$)", OPERATOR_IMAGE, manifests)
    return re.sub(r"[\w./-]*/mailsluice-relay(:[\w.-]+|@sha256:\w+)(?=\s|$)", RELAY_IMAGE, manifests)


@pytest.fixture(scope="module")
def shop(cluster: NodeCluster) -> Shop:
    enforced = {"pod-security.kubernetes.io/enforce": "restricted"}
    cluster.kubectl.apply(
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE, "labels": enforced}}
    )
    cluster.kubectl("wait", "--for=create", "serviceaccount/default", "-n", NAMESPACE, "--timeout=30s")
    shop = Shop(cluster.kubectl.within(NAMESPACE))
    shop.kubectl.apply(SINK_SERVICE, pod("client", "python3", "-c", "import signal; signal.pause()"))
    shop.start_sink()
    shop.kubectl("wait", "pod/client", "--for=condition=Ready", "--timeout=60s", timeout=90)
    return shop


def test_the_relay_image_holds_only_what_a_relay_needs(shop: Shop) -> None:
    look = """
import importlib.util, json, os, shutil
unwanted = ("kopf", "kubernetes", "mailsluice_operator", "pip", "ensurepip")
modules = [name for name in unwanted if importlib.util.find_spec(name)]
programs = [name for name in ("pip", "pip3", "cc", "gcc", "mailsluice-operator") if shutil.which(name)]
print(json.dumps([os.getuid(), modules, programs]))
"""
    assert json.loads(shop.kubectl("exec", "client", "--", "python3", "-c", look)) == [65532, [], []]


def test_a_relay_takes_mail_soon_after_it_was_applied(
    shop: Shop, eventually: Eventually, capsys: pytest.CaptureFixture[str]
) -> None:
    shop.apply_users(FIRST)
    applied = time.monotonic()
    shop.kubectl.apply(RELAY)

    eventually(lambda: shop.send("first").accepted == ["first"], 180, every=0.3)
    took = time.monotonic() - applied
    with capsys.disabled():
        print(f"\nfrom apply to the first accepted mail: {took:.1f} s")

    shop.kubectl("wait", "smtprelay/outbound", "--for=condition=Ready", "--timeout=30s", timeout=60)
    eventually(lambda: "first" in shop.subjects(), 30)


@pytest.mark.parametrize("port", [465, 587, 25])
def test_mail_with_login_and_verified_tls_reaches_the_upstream(shop: Shop, eventually: Eventually, port: int) -> None:
    assert shop.send(f"by {port}", port=port) == Outcome([f"by {port}"], None)
    eventually(lambda: f"by {port}" in shop.subjects(), 30)


def test_mail_without_login_or_in_another_name_is_refused(shop: Shop) -> None:
    without_login = shop.send("spam", password=None)
    assert without_login.refused is not None
    assert (without_login.accepted, without_login.refused[0]) == ([], 530)

    wrong_password = shop.send("guessed", password="guess")
    assert wrong_password.refused is not None
    assert (wrong_password.accepted, wrong_password.refused[0]) == ([], 535)

    forged = shop.send("forged", sender="boss@example.test")
    assert forged.refused is not None
    assert (forged.accepted, forged.refused[0]) == ([], 553)
    assert "boss@example.test" in forged.refused[1]


def test_sessions_are_counted_by_what_became_of_them(shop: Shop, eventually: Eventually) -> None:
    accepted = shop.count("mailsluice_sessions_total", result="accepted")
    rejected = shop.count("mailsluice_sessions_total", result="rejected")
    assert shop.send("counted").accepted == ["counted"]
    assert shop.send("refused", password=None).accepted == []
    eventually(lambda: shop.count("mailsluice_sessions_total", result="accepted") == accepted + 1)
    eventually(lambda: shop.count("mailsluice_sessions_total", result="rejected") == rejected + 1)


def test_a_new_password_is_valid_without_a_new_pod(
    shop: Shop, eventually: Eventually, capsys: pytest.CaptureFixture[str]
) -> None:
    before, revision = shop.relay_pod(), shop.revision()
    changed = time.monotonic()
    shop.apply_users(SECOND)
    # Not by trying to log in: too many failures, and the relay would refuse the right password too.
    eventually(lambda: shop.revision() != revision, 150)
    took = time.monotonic() - changed
    assert shop.send("rotated", password=SECOND) == Outcome(["rotated"], None)
    with capsys.disabled():
        print(f"\nfrom a changed Secret to a login with the new password: {took:.1f} s")

    after = shop.relay_pod()
    assert after["metadata"]["uid"] == before["metadata"]["uid"]
    assert [c["restartCount"] for c in after["status"]["containerStatuses"]] == [0]
    refused = shop.send("old", password=FIRST).refused
    assert refused is not None
    assert refused[0] == 535


def test_accepted_mail_outlives_its_pod(shop: Shop, eventually: Eventually) -> None:
    sent = [f"queued {number}" for number in range(20)]
    shop.stop_sink()
    assert shop.send(*sent, password=SECOND).accepted == sent
    eventually(lambda: shop.count("mailsluice_queue_messages") == len(sent))

    before = shop.relay_pod()["metadata"]
    shop.kubectl("delete", "pod", before["name"], "--wait=false")

    def replaced() -> bool:
        return bool(shop.relay_pod()["metadata"]["uid"] != before["uid"])

    eventually(replaced, 120, every=0.5)
    shop.kubectl("wait", f"pod/{before['name']}", "--for=condition=Ready", "--timeout=60s", timeout=90)
    eventually(lambda: shop.count("mailsluice_queue_messages") == len(sent))

    shop.start_sink()
    eventually(lambda: set(sent) <= set(shop.subjects()), 120, every=0.5)
    assert len(shop.subjects()) == len(sent), "delivered twice"
    eventually(lambda: shop.count("mailsluice_queue_messages") == 0)
