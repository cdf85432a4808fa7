"""pytest fixtures and scheduling for tests that need a real Kubernetes API server or node.

    @pytest.mark.apiserver
    def test_defaults(kubectl, eventually): ...          # a control plane with our CRDs, a namespace of its own

    @pytest.mark.node
    def test_journey(node_cluster): ...                  # root; a node that runs pods

The control plane starts once a run, and the workers of pytest-xdist share it. Tests that need it run last: when its
programs must first be built, that happens in the background while the other tests run.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any, Final, TypeVar

import pytest

from testcluster.binaries import (
    API_SERVER,
    CONTROL_PLANE,
    NODE,
    MissingBinariesError,
    can_build,
    find,
    how_to_get,
    locked,
    missing,
)
from testcluster.control_plane import ControlPlane
from testcluster.existing import KUBECONFIG, existing_kubeconfig
from testcluster.kubectl import Kubectl
from testcluster.node import NodeCluster, is_orphaned, is_running, the_only_node, what_is_missing
from testcluster.processes import ClusterError, start_time

Result = TypeVar("Result")

ROOT: Final = Path(__file__).resolve().parents[3]
RUN_PREFIX: Final = "mailsluice-test-"
PROGRAMS: Final = {"apiserver": API_SERVER, "node": NODE}
"""What each marker needs."""


@dataclasses.dataclass(frozen=True)
class ApiServer:
    """A running API server with the CRDs installed."""

    kubeconfig: Path
    kubectl: Kubectl
    has_controllers: bool
    """False with KUBEBUILDER_ASSETS alone: no garbage collection, no default ServiceAccounts."""


class Supply:
    """The programs of a cluster for this run: there, or being built in the background."""

    def __init__(self, programs: tuple[str, ...], log: Path) -> None:
        self.programs = programs
        self.log = log
        self._build: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Begin to build what is missing, when this machine can."""
        if missing(self.programs) and can_build():
            command = [sys.executable, str(ROOT / "tests/cluster/cluster.py"), "build"]
            with self.log.open("wb") as log:
                # A session of its own, so that `stop` reaches the compilers too.
                self._build = subprocess.Popen(
                    command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
                )

    def wait(self, report: Callable[[str], None]) -> None:
        """Return when nothing is being built any more; every half minute say how far it is."""
        if self._build is None:
            return
        started = told = time.monotonic()
        while self._build.poll() is None:
            time.sleep(0.5)
            if time.monotonic() - told >= 30:
                told = time.monotonic()
                progress = [line for line in self._lines() if line.startswith("cluster:")]
                report(f"{progress[-1] if progress else 'building'} ({told - started:.0f} s waited)")
        if self._build.returncode:
            report("\n".join(self._lines()[-20:]))
        self._build = None

    def stop(self) -> None:
        if self._build is not None:
            os.killpg(self._build.pid, signal.SIGTERM)
            self._build.wait()

    def _lines(self) -> list[str]:
        return self.log.read_text(errors="replace").splitlines()


RUN: Final = pytest.StashKey[Path]()
SUPPLY: Final = pytest.StashKey[Supply]()
NODE_CLUSTER: Final = pytest.StashKey[NodeCluster]()


def is_worker(config: pytest.Config) -> bool:
    return hasattr(config, "workerinput")


def pytest_configure(config: pytest.Config) -> None:
    worker = getattr(config, "workerinput", None)  # pytest-xdist's
    if worker is not None:
        config.stash[RUN] = Path(worker["mailsluice_run"])
        return
    end_abandoned_runs()
    config.stash[RUN] = Path(tempfile.mkdtemp(prefix=RUN_PREFIX))
    (config.stash[RUN] / "owner").write_text(f"{os.getpid()} {start_time(os.getpid())}")


@pytest.hookimpl(optionalhook=True)  # pytest-xdist's
def pytest_configure_node(node: Any) -> None:
    node.workerinput["mailsluice_run"] = str(node.config.stash[RUN])


def pytest_unconfigure(config: pytest.Config) -> None:
    if supply := config.stash.get(SUPPLY, None):
        supply.stop()
    if not is_worker(config) and (run := config.stash.get(RUN, None)):
        end_run(run)


def end_run(run: Path) -> None:
    if (run / "api").exists():
        ControlPlane(run / "api").stop()
    shutil.rmtree(run, ignore_errors=True)


def end_abandoned_runs() -> None:
    """A run that was killed could not end its control plane: the next one does."""
    for owner in Path(tempfile.gettempdir()).glob(f"{RUN_PREFIX}*/owner"):
        try:
            pid, _, started = owner.read_text().partition(" ")
        except OSError:
            continue  # another user's, or it just ended itself
        if pid and start_time(int(pid)) != started:
            end_run(owner.parent)


def needs(item: pytest.Item) -> str | None:
    """The marker that says what kind of cluster this test needs."""
    return next((name for name in ("node", "apiserver") if item.get_closest_marker(name)), None)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: (None, "apiserver", "node").index(needs(item)))


def pytest_collection_finish(session: pytest.Session) -> None:
    kinds = {kind for item in session.items if (kind := needs(item))}
    first = getattr(session.config, "workerinput", {}).get("workerid", "gw0") == "gw0"
    if kinds and first and not session.config.option.collectonly:
        supply = Supply(PROGRAMS["node" if "node" in kinds else "apiserver"], session.config.stash[RUN] / "build.log")
        supply.start()
        session.config.stash[SUPPLY] = supply


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Wait for the programs before the test's own time limit begins."""
    kind = needs(item)
    if kind and (supply := item.config.stash.get(SUPPLY, None)):
        supply.wait(lambda text: print(text, file=sys.__stderr__, flush=True))
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Beside a failed test, what the node's cluster looked like then: it is gone when somebody reads the report."""
    report = yield
    if report.failed and (cluster := item.config.stash.get(NODE_CLUSTER, None)) and cluster.kubeconfig.exists():
        report.sections.append(("the cluster", cluster.description()))
    return report


def unavailable(why: str) -> None:
    """Without a cluster a developer's run goes on and says what was left out; in CI that is a failure."""
    if os.environ.get("CI"):
        pytest.fail(f"no test cluster: {why}", pytrace=False)
    pytest.skip(f"no test cluster: {why}")


@pytest.fixture(scope="session")
def api_server(pytestconfig: pytest.Config) -> ApiServer:
    """The API server of this run, with the CRDs of crds/ applied by server-side apply."""
    run = pytestconfig.stash[RUN]
    try:
        existing = existing_kubeconfig(os.environ)
        with locked(run / "lock"):
            kubeconfig = existing or started_kubeconfig(run / "api")
            kubectl = Kubectl(kubeconfig)
            if not (run / "ready").exists():
                install_crds(kubectl)
                (run / "ready").touch()
    except (MissingBinariesError, ClusterError) as error:
        if isinstance(error, ClusterError):
            raise
        unavailable(str(error))
    return ApiServer(kubeconfig, kubectl, existing is not None or not missing(CONTROL_PLANE))


def started_kubeconfig(state: Path) -> Path:
    control_plane = ControlPlane(state)
    if not control_plane.kubeconfig.exists():
        if absent := missing(API_SERVER):
            raise MissingBinariesError(how_to_get(absent))
        control_plane.start()
    return control_plane.kubeconfig


def install_crds(kubectl: Kubectl) -> None:
    if crds := sorted((ROOT / "crds").glob("*.mailsluice.dev.yaml")):
        kubectl.apply_files(crds)
        kubectl(
            "wait", "--for=condition=Established", "--timeout=30s", *[o for path in crds for o in ("-f", str(path))]
        )


@pytest.fixture
def namespace(api_server: ApiServer, request: pytest.FixtureRequest) -> Iterator[str]:
    """A namespace for this test alone, named after it."""
    name = re.sub(r"[^a-z0-9]+", "-", request.node.name.lower()).strip("-")[:50].strip("-") + f"-{uuid.uuid4().hex[:6]}"
    api_server.kubectl("create", "namespace", name)
    if api_server.has_controllers:
        api_server.kubectl("wait", "--for=create", "serviceaccount/default", "-n", name, "--timeout=30s")
    yield name
    api_server.kubectl("delete", "namespace", name, "--wait=false")


@pytest.fixture
def kubectl(api_server: ApiServer, namespace: str) -> Kubectl:
    """kubectl within the test's own namespace."""
    return api_server.kubectl.within(namespace)


@pytest.fixture(scope="session")
def helm() -> str:
    """The path of helm."""
    found = find("helm")
    if found is None:
        unavailable(how_to_get(["helm"]))
    return str(found)


@pytest.fixture(scope="session")
def node_cluster(pytestconfig: pytest.Config) -> Iterator[NodeCluster]:
    """A cluster whose node runs pods, from images that a test loads into it. The CRDs are not installed."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        pytest.fail("a machine has one node: run the tests marked `node` without -n", pytrace=False)
    if os.environ.get(KUBECONFIG):
        pytest.skip(f"{KUBECONFIG}: images cannot be loaded into the nodes of a cluster that is there already")
    absent = missing(NODE)
    if problems := [*what_is_missing(), *([how_to_get(absent)] if absent else [])]:
        unavailable("; ".join(problems))
    with the_only_node():
        if is_running() and is_orphaned():
            NodeCluster().stop()
        cluster = NodeCluster()
        try:
            pytestconfig.stash[NODE_CLUSTER] = cluster
            cluster.start(owner=os.getpid())
            yield cluster
        finally:
            cluster.stop()


@pytest.fixture(scope="session")
def eventually() -> Callable[..., Any]:
    """`eventually(probe, seconds=30)`: what `probe()` returns once it is true; a failing assert in it means not yet."""
    return wait_until


def wait_until(probe: Callable[[], Result], seconds: float = 30, *, every: float = 0.1) -> Result:
    deadline = time.monotonic() + seconds
    while True:
        try:
            result, error = probe(), None
        except (AssertionError, ClusterError, OSError) as failure:
            result, error = None, failure
        if error is None and result:
            return result
        if time.monotonic() >= deadline:
            raise AssertionError(f"not within {seconds:g} s: {error or repr(result)}") from error
        time.sleep(every)
