"""The test cluster itself: what the other tests rely on when they talk to an API server."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from testcluster.binaries import find
from testcluster.control_plane import ControlPlane
from testcluster.existing import refuse_production
from testcluster.kubectl import Kubectl
from testcluster.processes import ClusterError, Processes


def config_map(name: str, value: str) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": {"key": value}}


@pytest.mark.apiserver
def test_namespaces_keep_tests_apart(kubectl: Kubectl, namespace: str) -> None:
    kubectl.apply(config_map("settings", "ours"))
    assert kubectl.get("configmap", "settings")["metadata"]["namespace"] == namespace
    assert [o for o in kubectl.within("default").list("configmap") if o["metadata"]["name"] == "settings"] == []


@pytest.mark.apiserver
def test_apply_without_a_change_writes_nothing(kubectl: Kubectl) -> None:
    kubectl.apply(config_map("settings", "same"))
    before = kubectl.get("configmap", "settings")["metadata"]["resourceVersion"]
    kubectl.apply(config_map("settings", "same"))
    assert kubectl.get("configmap", "settings")["metadata"]["resourceVersion"] == before


@pytest.mark.apiserver
def test_controllers_collect_what_lost_its_owner(
    kubectl: Kubectl, api_server: Any, eventually: Callable[..., Any]
) -> None:
    if not api_server.has_controllers:
        pytest.skip("KUBEBUILDER_ASSETS has no controller manager")
    kubectl.apply(config_map("owner", "1"))
    uid = kubectl.get("configmap", "owner")["metadata"]["uid"]
    child = config_map("child", "1")
    child["metadata"]["ownerReferences"] = [{"apiVersion": "v1", "kind": "ConfigMap", "name": "owner", "uid": uid}]
    kubectl.apply(child)
    kubectl("delete", "configmap", "owner")
    eventually(lambda: "child" not in [o["metadata"]["name"] for o in kubectl.list("configmap")], 30)


@pytest.mark.apiserver
def test_two_control_planes_run_beside_each_other(api_server: Any, tmp_path: Path) -> None:
    second = ControlPlane(tmp_path)
    second.start()
    try:
        assert server_of(second.kubeconfig) != server_of(api_server.kubeconfig)
        assert Kubectl(second.kubeconfig)("get", "namespace", "default", "-o", "name") == "namespace/default\n"
    finally:
        second.stop()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(server_of(second.kubeconfig), timeout=1)
    assert api_server.kubectl("get", "namespace", "default", "-o", "name") == "namespace/default\n"


def server_of(kubeconfig: Path) -> tuple[str, int]:
    server = json.loads(kubeconfig.read_text())["clusters"][0]["cluster"]["server"]
    host, _, port = server.removeprefix("https://").partition(":")
    return host, int(port)


@pytest.mark.parametrize(
    ("context", "server", "allowed"),
    [
        ("kind-mailsluice", "https://127.0.0.1:6443", ""),
        ("minikube", "https://192.168.49.2:8443", ""),
        ("staging", "https://staging.example.test", "staging"),
    ],
)
def test_a_cluster_for_tests_is_accepted(context: str, server: str, allowed: str) -> None:
    refuse_production(context, server, allowed)


@pytest.mark.parametrize(
    ("context", "server", "allowed"),
    [
        ("production", "https://10.1.2.3:6443", ""),
        ("kind-of-production", "https://api.example.test", ""),
        ("production", "https://10.1.2.3:6443", "staging"),
    ],
)
def test_any_other_cluster_is_refused_by_name(context: str, server: str, allowed: str) -> None:
    with pytest.raises(ClusterError, match=f"MAILSLUICE_TEST_ALLOW_CONTEXT={context}"):
        refuse_production(context, server, allowed)


def test_programs_are_looked_for_where_the_environment_says_first(tmp_path: Path) -> None:
    for folder in ("assets", "bin", "path"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "kubectl").touch(mode=0o755)
    (tmp_path / "path" / "server").touch(mode=0o755)
    environment = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "PATH": str(tmp_path / "path")}
    assert find("kubectl", environment) == tmp_path / "path/kubectl"
    environment["CLUSTER_BIN"] = str(tmp_path / "bin")
    assert find("kubectl", environment) == tmp_path / "bin/kubectl"
    environment["KUBEBUILDER_ASSETS"] = str(tmp_path / "assets")
    assert find("kubectl", environment) == tmp_path / "assets/kubectl"
    # Any program may be named `server`; it is etcd only where this project's own build put it.
    assert find("etcd", environment) is None


def test_a_process_id_that_was_given_to_another_process_is_left_alone(
    tmp_path: Path, eventually: Callable[..., Any]
) -> None:
    processes = Processes(tmp_path)
    processes.spawn("sleeper", ["sleep", "60"])
    pid, _, started = (tmp_path / "pids/sleeper").read_text().partition(" ")
    (tmp_path / "pids/sleeper").write_text(f"{pid} {int(started) - 1}")
    processes.stop()
    assert Path(f"/proc/{pid}").exists()
    (tmp_path / "pids/sleeper").write_text(f"{pid} {started}")
    assert processes.running() == ["sleeper"]
    processes.stop()
    eventually(lambda: processes.running() == [])
