"""A node for the control plane: containerd, kubelet, kube-proxy and CoreDNS in a network namespace. Needs root.

The namespace is joined to this machine by one veth pair, so that none of the node's routes and NAT rules touch the
machine itself. Its addresses are fixed: a machine has one such node at a time, and a file lock sees to that.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from testcluster.binaries import require
from testcluster.control_plane import POD_CIDR, SERVICE_CIDR, ControlPlane
from testcluster.kubectl import Kubectl, Object
from testcluster.processes import (
    ClusterError,
    CommandFailedError,
    Processes,
    descendants_of,
    kill,
    run,
    start_time,
    wait_for,
)

NETWORK_NAMESPACE: Final = "mailsluice-node"
GATEWAY: Final = "10.200.0.1"
ADDRESS: Final = "10.200.0.2"
PREFIX: Final = "10.200.0.0/30"
STATE: Final = Path("/tmp/mailsluice-node")
RUNTIME: Final = Path("/run/mailsluice-containerd")
SOCKET: Final = RUNTIME / "containerd.sock"
LOCK: Final = Path("/tmp/mailsluice-node.lock")
VOLUMES: Final = 12
"""How many local PersistentVolumes stand ready: there is no provisioner."""

DEBIAN_PACKAGES: Final = {
    "runc": "runc",
    "iptables": "iptables",
    "conntrack": "conntrack",
    "ipset": "ipset",
    "ip": "iproute2",
    "socat": "socat",
    "buildah": "buildah",
    "openssl": "openssl",
}

CONTAINERD_CONFIGURATION: Final = """
version = 3
root = "{state}/containerd"
state = "{runtime}"
[grpc]
  address = "{runtime}/containerd.sock"
[ttrpc]
  address = "{runtime}/containerd.sock.ttrpc"
[plugins."io.containerd.cri.v1.images"]
  snapshotter = "overlayfs"
[plugins."io.containerd.cri.v1.images".pinned_images]
  sandbox = "localhost/pause:1"
[plugins."io.containerd.cri.v1.runtime"]
  restrict_oom_score_adj = true
[plugins."io.containerd.cri.v1.runtime".cni]
  bin_dirs = ["/usr/lib/cni", "/opt/cni/bin"]
  conf_dir = "{state}/cni"
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
  runtime_type = "io.containerd.runc.v2"
"""

CNI_CONFIGURATION: Final = {
    "cniVersion": "1.0.0",
    "name": "bridge",
    "plugins": [
        {
            "type": "bridge",
            "bridge": "cni0",
            "isGateway": True,
            "ipMasq": False,
            # A pod reaches itself through its own Service.
            "hairpinMode": True,
            "ipam": {
                "type": "host-local",
                "ranges": [[{"subnet": POD_CIDR}]],
                "routes": [{"dst": "0.0.0.0/0"}],
            },
        },
        {"type": "portmap", "capabilities": {"portMappings": True}},
    ],
}

COREDNS_CONFIGURATION: Final = """
cluster.local in-addr.arpa {{
  bind {address}
  errors
  kubernetes cluster.local in-addr.arpa {{
    kubeconfig {kubeconfig}
    ttl 5
  }}
}}
. {{
  bind {address}
  template ANY ANY {{
    rcode NXDOMAIN
  }}
}}
"""


def what_is_missing() -> list[str]:
    """What keeps this machine from running a node, each with the remedy."""
    wanted = [package for program, package in DEBIAN_PACKAGES.items() if shutil.which(program) is None]
    if not any(Path(folder, "bridge").exists() for folder in ("/usr/lib/cni", "/opt/cni/bin")):
        wanted.append("containernetworking-plugins")
    problems = ["root: the node makes network namespaces and mounts"] if os.geteuid() else []
    return problems + ([f"apt-get install {' '.join(sorted(wanted))}"] if wanted else [])


@contextmanager
def the_only_node() -> Iterator[None]:
    """Wait until no other process of this machine runs a node, and keep others waiting meanwhile."""
    with LOCK.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


class NodeCluster:
    """A control plane with one node, `node-1`."""

    def __init__(self, state: Path = STATE) -> None:
        self.state = state
        self.control_plane = ControlPlane(state, node_gateway=GATEWAY)
        self.kubeconfig = self.control_plane.kubeconfig
        self.kubectl = Kubectl(self.kubeconfig)
        self.processes: Processes = self.control_plane.processes

    def start(self, *, owner: int | None = None) -> None:
        """Return when the node is Ready. `owner`: the process with whose end the cluster is of no use any more."""
        if problems := what_is_missing():
            raise ClusterError("; ".join(problems))
        if is_running():
            raise ClusterError("a node runs on this machine already: `make cluster-down` ends it")
        (self.state / "owner").write_text(f"{owner} {start_time(owner)}" if owner else "")
        (self.state / "namespaces-before").write_text("\n".join(network_namespaces()))
        self.control_plane.start()
        self._make_network()
        self._start_containerd()
        self.load(self._pause_image())
        self._start_node_services()
        wait_for("the node", self._is_ready, 120)
        self.kubectl.apply(*self._storage())

    def load(self, archive: Path) -> None:
        """Import an OCI archive: pods use its image with `imagePullPolicy: Never` or `IfNotPresent`."""
        run(require("ctr"), "-a", str(SOCKET), "-n", "k8s.io", "images", "import", str(archive))

    def description(self) -> str:
        """Pods, relays, events and our programs' logs, for somebody who wonders why a test failed."""
        views = (
            ("get", "pods", "-A", "-o", "wide"),
            ("get", "smtprelays,smtpusers", "-A", "-o", "yaml"),
            ("get", "events", "-A", "--sort-by=.lastTimestamp"),
            *(
                ("logs", "-n", pod["metadata"]["namespace"], pod["metadata"]["name"], "--tail=60")
                for pod in self.kubectl.list("pods", selector="app.kubernetes.io/name=mailsluice", everywhere=True)
            ),
        )
        shown = [(view, self.kubectl.attempt(*view)) for view in views]
        return "\n".join(f"$ kubectl {' '.join(view)}\n{done.stdout}{done.stderr}" for view, done in shown)

    def stop(self) -> None:
        """End the processes and take away what they leave: mounts, network namespaces, control groups, state."""
        self.processes.stop()
        for pid in descendants_of(f"{RUNTIME}/"):  # the shims, and the containers below them
            kill(pid)
        before = self.state / "namespaces-before"
        kept = before.read_text().split() if before.exists() else []
        for name in network_namespaces():
            if name.startswith("cni-") and name not in kept:
                run("ip", "netns", "del", name, check=False)
        mounts = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
        for mount in sorted((m for m in mounts if m.startswith((f"{self.state}/", f"{RUNTIME}/"))), reverse=True):
            run("umount", "-l", mount, check=False)
        run("ip", "netns", "del", NETWORK_NAMESPACE, check=False)
        run("ip", "link", "del", "msl-host", check=False)
        remove_control_groups()
        shutil.rmtree(self.state, ignore_errors=True)
        shutil.rmtree(RUNTIME, ignore_errors=True)

    def _is_ready(self) -> bool:
        self.processes.check()
        condition = '{.status.conditions[?(@.type=="Ready")].status}'
        return self.kubectl("get", "node", "node-1", "-o", f"jsonpath={condition}") == "True"

    def _make_network(self) -> None:
        run("ip", "netns", "add", NETWORK_NAMESPACE)
        run("ip", "link", "add", "msl-host", "type", "veth", "peer", "name", "eth0", "netns", NETWORK_NAMESPACE)
        run("ip", "addr", "add", f"{GATEWAY}/30", "dev", "msl-host")
        run("ip", "link", "set", "msl-host", "up")
        inside = ("ip", "-n", NETWORK_NAMESPACE)
        run(*inside, "link", "set", "lo", "up")
        run(*inside, "addr", "add", f"{ADDRESS}/30", "dev", "eth0")
        run(*inside, "link", "set", "eth0", "up")
        run(*inside, "route", "add", "default", "via", GATEWAY)
        for network in (POD_CIDR, SERVICE_CIDR):
            run("ip", "route", "replace", network, "via", ADDRESS)
        for setting in ("net/ipv4/ip_forward", "net/bridge/bridge-nf-call-iptables"):
            # The bridge's setting is there only where the kernel has br_netfilter.
            run(*self._inside("sh", "-c", f"echo 1 > /proc/sys/{setting}"), check=False)

    @staticmethod
    def _inside(*argv: str) -> list[str]:
        return ["nsenter", f"--net=/var/run/netns/{NETWORK_NAMESPACE}", *argv]

    def _start_containerd(self) -> None:
        cni = self.state / "cni"
        cni.mkdir(exist_ok=True)
        (cni / "10-bridge.conflist").write_text(json.dumps(CNI_CONFIGURATION))
        configuration = self.state / "containerd.toml"
        configuration.write_text(CONTAINERD_CONFIGURATION.format(state=self.state, runtime=RUNTIME))
        shims = Path(require("containerd-shim-runc-v2")).parent
        self.processes.spawn(
            "containerd",
            self._inside(require("containerd"), "-c", str(configuration)),
            environment={"PATH": f"{shims}{os.pathsep}{os.environ['PATH']}"},
        )

        def answers() -> bool:
            self.processes.check()
            return bool(run(require("ctr"), "-a", str(SOCKET), "version"))

        wait_for("containerd", answers, 30)

    def _pause_image(self) -> Path:
        folder, archive = self.state / "pause", self.state / "pause.tar"
        folder.mkdir(exist_ok=True)
        shutil.copy(require("pause"), folder / "pause")
        (folder / "Dockerfile").write_text('FROM scratch\nCOPY pause /pause\nUSER 65535:65535\nENTRYPOINT ["/pause"]\n')
        # These two work in virtual machines and containers too, where overlays and user namespaces may not.
        settings = {**os.environ, "STORAGE_DRIVER": "vfs", "BUILDAH_ISOLATION": "chroot"}
        run("buildah", "bud", "--quiet", "--tag", "localhost/pause:1", str(folder), env=settings)
        run("buildah", "push", "--quiet", "localhost/pause:1", f"oci-archive:{archive}:localhost/pause:1", env=settings)
        return archive

    def _start_node_services(self) -> None:
        pki, kubeconfig = self.control_plane.pki, self.control_plane.node_kubeconfig
        (self.state / "resolv.conf").write_text(f"nameserver {ADDRESS}\n")
        (self.state / "Corefile").write_text(COREDNS_CONFIGURATION.format(address=ADDRESS, kubeconfig=kubeconfig))
        configuration = {
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "authentication": {
                "anonymous": {"enabled": False},
                "webhook": {"enabled": False},
                "x509": {"clientCAFile": f"{pki}/ca.crt"},
            },
            "authorization": {"mode": "AlwaysAllow"},
            "cgroupDriver": "cgroupfs",
            "failCgroupV1": False,
            "failSwapOn": False,
            "clusterDomain": "cluster.local",
            "clusterDNS": [ADDRESS],
            "resolvConf": f"{self.state}/resolv.conf",
            "containerRuntimeEndpoint": f"unix://{SOCKET}",
            "tlsCertFile": f"{pki}/kubelet.crt",
            "tlsPrivateKeyFile": f"{pki}/kubelet.key",
            "address": ADDRESS,
            "enforceNodeAllocatable": [],
            "podLogsDir": f"{self.state}/pod-logs",
            "volumePluginDir": f"{self.state}/volume-plugins",
            # A developer's disk is often nearly full; nothing here may be evicted for that.
            "evictionHard": {"nodefs.available": "1%", "imagefs.available": "1%", "memory.available": "50Mi"},
            "imageGCHighThresholdPercent": 100,
        }
        (self.state / "kubelet.json").write_text(json.dumps(configuration))
        self.processes.spawn(
            "kubelet",
            self._inside(
                require("kubelet"),
                f"--config={self.state}/kubelet.json",
                f"--kubeconfig={kubeconfig}",
                f"--root-dir={self.state}/kubelet",
                "--hostname-override=node-1",
                f"--node-ip={ADDRESS}",
            ),
        )
        self.processes.spawn(
            "kube-proxy",
            self._inside(
                require("kube-proxy"),
                f"--kubeconfig={kubeconfig}",
                "--hostname-override=node-1",
                f"--cluster-cidr={POD_CIDR}",
                "--proxy-mode=iptables",
                "--conntrack-max-per-core=0",
                f"--nodeport-addresses={PREFIX}",
                f"--healthz-bind-address={ADDRESS}:10256",
                f"--metrics-bind-address={ADDRESS}:10249",
            ),
        )
        self.processes.spawn("coredns", self._inside(require("coredns"), "-conf", f"{self.state}/Corefile"))

    def _storage(self) -> list[Object]:
        """A default StorageClass `local`, and volumes for it as folders of the state directory."""
        objects: list[Object] = [
            {
                "apiVersion": "storage.k8s.io/v1",
                "kind": "StorageClass",
                "metadata": {
                    "name": "local",
                    "annotations": {"storageclass.kubernetes.io/is-default-class": "true"},
                },
                "provisioner": "kubernetes.io/no-provisioner",
                "volumeBindingMode": "WaitForFirstConsumer",
            }
        ]
        for number in range(VOLUMES):
            folder = self.state / "volumes" / str(number)
            folder.mkdir(parents=True, exist_ok=True)
            folder.chmod(0o777)
            terms = [{"key": "kubernetes.io/hostname", "operator": "In", "values": ["node-1"]}]
            objects.append(
                {
                    "apiVersion": "v1",
                    "kind": "PersistentVolume",
                    "metadata": {"name": f"local-{number}"},
                    "spec": {
                        "capacity": {"storage": "10Gi"},
                        "accessModes": ["ReadWriteOnce"],
                        "storageClassName": "local",
                        "persistentVolumeReclaimPolicy": "Retain",
                        "local": {"path": str(folder)},
                        "nodeAffinity": {"required": {"nodeSelectorTerms": [{"matchExpressions": terms}]}},
                    },
                }
            )
        return objects


def is_running() -> bool:
    """Whether this machine has a node, or the remains of one."""
    return NETWORK_NAMESPACE in network_namespaces()


def is_orphaned(state: Path = STATE) -> bool:
    """Whether the process that this cluster was started for is gone; one that a person started is never an orphan."""
    owner = state / "owner"
    pid, _, started = (owner.read_text() if owner.exists() else "").partition(" ")
    return bool(pid) and start_time(int(pid)) != started


def network_namespaces() -> list[str]:
    try:
        listing = run("ip", "netns", "list").stdout
    except (OSError, CommandFailedError):
        return []
    return [line.split()[0] for line in listing.splitlines() if line.strip()]


def remove_control_groups() -> None:
    root = Path("/sys/fs/cgroup")
    for group in sorted({*root.glob("kubepods*"), *root.glob("*/kubepods*")}):
        for folder in sorted((path for path in group.rglob("*") if path.is_dir()), reverse=True):
            run("rmdir", str(folder), check=False)
        run("rmdir", str(group), check=False)
