"""etcd, the API server, the controllers and the scheduler on loopback: all of Kubernetes but a node. Needs no root.

Every control plane has a state directory and ports of its own, so that several run beside each other.
"""

from __future__ import annotations

import json
import random
import shutil
import socket
import ssl
import sys
import urllib.request
from pathlib import Path
from typing import Final

from testcluster.binaries import find, require
from testcluster.certificates import ADMIN_TOKEN, make_certificates, write_kubeconfig
from testcluster.processes import ClusterError, Processes, wait_for

SERVICE_CIDR: Final = "10.96.0.0/16"
API_SERVICE_ADDRESS: Final = "10.96.0.1"
POD_CIDR: Final = "10.244.0.0/24"
LOOPBACK: Final = "127.0.0.1"

PORTS: Final = range(20000, 32000)
"""Below Linux' ephemeral range (32768 and up), whose ports any outgoing connection may take after our look."""


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now, chosen at random so that two clusters seldom choose the same."""
    found: list[int] = []
    for port in random.sample(PORTS, len(PORTS)):
        with socket.socket() as candidate:
            try:
                candidate.bind((LOOPBACK, port))
            except OSError:
                continue
        found.append(port)
        if len(found) == count:
            return found
    raise ClusterError("no free ports between 20000 and 32000")


class ControlPlane:
    """The one of this state directory: `start` it, or find again what an earlier command started."""

    def __init__(self, state: Path, *, node_gateway: str | None = None, audit: bool = False) -> None:
        """`node_gateway` is this machine's address as a node in a network namespace of its own sees it. With `audit`
        the API server writes down who asked for what, one JSON object a line, in `audit_log`."""
        self.state = state
        self.pki = state / "pki"
        self.kubeconfig = state / "kubeconfig"
        self.node_kubeconfig = state / "node.kubeconfig"
        self.node_gateway = node_gateway
        self.audit_log = state / "audit.log" if audit else None
        self.processes = Processes(state)

    def start(self) -> None:
        """Return when the API server is ready. Another process may have taken a port meanwhile: then once more."""
        addresses = [LOOPBACK, API_SERVICE_ADDRESS, *([self.node_gateway] if self.node_gateway else [])]
        # The node's own address is one further in its /30; its kubelet serves with the same authority.
        make_certificates(self.pki, [*addresses, "10.200.0.2"])
        for attempts_left in (2, 1, 0):
            try:
                self._start_on(*free_ports(5))
                return
            except ClusterError as error:
                logs = "".join(log.read_text(errors="replace") for log in self.processes.logs.glob("*.log"))
                self.processes.stop()
                if not attempts_left or "address already in use" not in logs:
                    raise
                shutil.rmtree(self.state / "etcd", ignore_errors=True)
                print(f"cluster: once more on other ports: {error}", file=sys.stderr)

    def _start_on(self, etcd: int, etcd_peer: int, api: int, controllers: int, scheduler: int) -> None:
        pki, gateway = self.pki, self.node_gateway
        auditing = []
        if self.audit_log is not None:
            policy = self.state / "audit-policy.json"
            # Requests as they come in, so that one without an answer is there too.
            rules = [{"level": "Metadata", "omitStages": ["ResponseStarted", "ResponseComplete"]}]
            policy.write_text(json.dumps({"apiVersion": "audit.k8s.io/v1", "kind": "Policy", "rules": rules}))
            auditing = [
                f"--audit-policy-file={policy}",
                f"--audit-log-path={self.audit_log}",
                "--audit-log-mode=blocking",
            ]
        self.processes.spawn(
            "etcd",
            [
                require("etcd"),
                f"--data-dir={self.state}/etcd",
                "--unsafe-no-fsync",
                f"--listen-client-urls=http://{LOOPBACK}:{etcd}",
                f"--advertise-client-urls=http://{LOOPBACK}:{etcd}",
                f"--listen-peer-urls=http://{LOOPBACK}:{etcd_peer}",
            ],
        )
        self.processes.spawn(
            "kube-apiserver",
            [
                require("kube-apiserver"),
                f"--etcd-servers=http://{LOOPBACK}:{etcd}",
                f"--secure-port={api}",
                # A node reaches the API server over its veth pair, hence not by loopback alone.
                f"--bind-address={'0.0.0.0' if gateway else LOOPBACK}",  # noqa: S104  # see above
                # Loopback must not become an endpoint of the Service `kubernetes`; without a node nobody uses it.
                *([f"--advertise-address={gateway}"] if gateway else ["--endpoint-reconciler-type=none"]),
                f"--service-cluster-ip-range={SERVICE_CIDR}",
                "--authorization-mode=Node,RBAC",
                "--allow-privileged=true",
                f"--token-auth-file={pki}/tokens.csv",
                f"--client-ca-file={pki}/ca.crt",
                f"--tls-cert-file={pki}/apiserver.crt",
                f"--tls-private-key-file={pki}/apiserver.key",
                f"--kubelet-client-certificate={pki}/apiserver-kubelet-client.crt",
                f"--kubelet-client-key={pki}/apiserver-kubelet-client.key",
                f"--kubelet-certificate-authority={pki}/ca.crt",
                "--kubelet-preferred-address-types=InternalIP",
                f"--service-account-key-file={pki}/service-accounts.pub",
                f"--service-account-signing-key-file={pki}/service-accounts.key",
                "--service-account-issuer=https://kubernetes.default.svc.cluster.local",
                *auditing,
            ],
        )
        self._wait(f"the API server on port {api}", f"https://{LOOPBACK}:{api}/readyz", 60)
        write_kubeconfig(self.kubeconfig, f"https://{LOOPBACK}:{api}", pki / "ca.crt")
        if gateway:
            write_kubeconfig(self.node_kubeconfig, f"https://{gateway}:{api}", pki / "ca.crt")
        # KUBEBUILDER_ASSETS has neither of these: objects are then served, but nobody acts on them.
        common = [f"--kubeconfig={self.kubeconfig}", "--leader-elect=false", f"--bind-address={LOOPBACK}"]
        if controller_manager := find("kube-controller-manager"):
            self.processes.spawn(
                "kube-controller-manager",
                [
                    str(controller_manager),
                    *common,
                    f"--secure-port={controllers}",
                    f"--root-ca-file={pki}/ca.crt",
                    f"--service-account-private-key-file={pki}/service-accounts.key",
                    "--use-service-account-credentials=true",
                    f"--cluster-cidr={POD_CIDR}",
                    "--allocate-node-cidrs=false",
                ],
            )
            self._wait("the controller manager", f"https://{LOOPBACK}:{controllers}/healthz", 60)
        if scheduler_program := find("kube-scheduler"):
            self.processes.spawn("kube-scheduler", [str(scheduler_program), *common, f"--secure-port={scheduler}"])

    def stop(self) -> None:
        self.processes.stop()

    def _wait(self, what: str, url: str, seconds: float) -> None:
        # The controllers serve with a certificate that they sign themselves; both listen on loopback alone.
        context = ssl.create_default_context()
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        request = urllib.request.Request(url, headers={"Authorization": f"Bearer {ADMIN_TOKEN}"})  # noqa: S310  # always https

        def ready() -> bool:
            self.processes.check()
            with urllib.request.urlopen(request, context=context, timeout=3) as reply:  # noqa: S310  # see above
                return bool(reply.status == 200)

        try:
            wait_for(what, ready, seconds)
        except ClusterError as error:
            raise ClusterError(f"{error}; logs in {self.processes.logs}") from error
