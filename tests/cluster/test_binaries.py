"""Where the test cluster's programs are looked for, in which order."""

from __future__ import annotations

from pathlib import Path

from testcluster.binaries import API_SERVER, cache_folder, find


def put(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_text("#!/bin/sh\n")
        (folder / name).chmod(0o755)
    return folder


def test_assets_come_first_then_a_whole_api_server_on_path_then_the_cache(tmp_path: Path) -> None:
    environment = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "PATH": str(put(tmp_path / "path", *API_SERVER))}
    cache = put(cache_folder(environment), "server", "kube-apiserver", "kubectl")
    assert find("kubectl", environment) == tmp_path / "path" / "kubectl"
    assets = put(tmp_path / "assets", *API_SERVER)
    assert find("kubectl", {**environment, "KUBEBUILDER_ASSETS": str(assets)}) == assets / "kubectl"
    assert find("etcd", {**environment, "PATH": ""}) == cache / "server"


def test_a_kubectl_alone_on_path_does_not_replace_the_caches(tmp_path: Path) -> None:
    environment = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "PATH": str(put(tmp_path / "path", "kubectl"))}
    assert find("kubectl", environment) == tmp_path / "path" / "kubectl"
    cache = put(cache_folder(environment), "kubectl")
    assert find("kubectl", environment) == cache / "kubectl"
