"""Two operator processes on a real API server, whose audit log says which of them wrote what and when."""

from __future__ import annotations

import datetime
import json
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from mailsluice_operator.election.candidate import DURATION, MARGIN
from testcluster.kubectl import Kubectl

pytestmark = pytest.mark.apiserver

Object = dict[str, Any]
Eventually = Callable[..., Any]

SYSTEM = "mailsluice-system"
ACCOUNTS = ("mailsluice-operator", "second-operator")
SPEC = {"upstreams": [{"name": "provider", "host": "smtp.provider.test"}]}


def relay(name: str) -> Object:
    metadata = {"name": name}
    return {"apiVersion": "mailsluice.dev/v1alpha1", "kind": "SmtpRelay", "metadata": metadata, "spec": SPEC}


def bind_second(kubectl: Kubectl) -> None:
    """A ServiceAccount of its own for the second process, with the same rights, so that the audit log tells them
    apart."""
    kubectl("create", "serviceaccount", ACCOUNTS[1], "-n", SYSTEM)
    subject = f"--serviceaccount={SYSTEM}:{ACCOUNTS[1]}"
    kubectl("create", "clusterrolebinding", ACCOUNTS[1], "--clusterrole=mailsluice-operator", subject)
    kubectl("create", "rolebinding", ACCOUNTS[1], "--role=mailsluice-operator", subject, "-n", SYSTEM)


@pytest.fixture(scope="module")
def kubectl(audited_platform: Any) -> Kubectl:
    found: Kubectl = audited_platform.kubectl
    bind_second(found)
    found("create", "namespace", "mail")
    return found.within("mail")


class Pair:
    """The two processes: which one leads, and which one waits."""

    def __init__(self, processes: dict[str, Any]) -> None:
        self.processes = processes

    def leaders(self) -> list[str]:
        alive = {name: process for name, process in self.processes.items() if process.process.poll() is None}
        return [name for name, process in alive.items() if process.value("mailsluice_operator_leader") == 1]

    def other(self, leader: str) -> str:
        return next(name for name in self.processes if name != leader)


@pytest.fixture
def pair(audited_platform: Any, kubectl: Kubectl, run_operator: Any, eventually: Eventually) -> Iterator[Pair]:
    with ExitStack() as stack:
        processes = {}
        for account in ACCOUNTS:
            kubeconfig = audited_platform.kubeconfig_of(account, SYSTEM)
            # It returns when the process is ready: one that only waits to lead is, too.
            processes[account] = stack.enter_context(
                run_operator(kubeconfig, audited_platform.folder, "--lease-namespace", SYSTEM)
            )
        made = Pair(processes)
        eventually(lambda: len(made.leaders()) == 1)
        yield made


def exists(kubectl: Kubectl, resource: str) -> bool:
    return kubectl.attempt("get", resource).returncode == 0


def test_the_other_takes_over_from_a_leader_that_was_killed(
    pair: Pair, kubectl: Kubectl, eventually: Eventually
) -> None:
    kubectl.apply(relay("first"))
    eventually(lambda: exists(kubectl, "statefulset/first"))
    (leader,) = pair.leaders()
    assert pair.processes[pair.other(leader)].writes() == 0
    pair.processes[leader].process.kill()
    killed = time.monotonic()
    kubectl("delete", "service/first", "--wait=false")
    eventually(lambda: exists(kubectl, "service/first"), 25)
    assert time.monotonic() - killed < 20
    assert pair.leaders() == [pair.other(leader)]


def test_a_leader_that_is_told_to_stop_makes_way_at_once(pair: Pair, kubectl: Kubectl, eventually: Eventually) -> None:
    (leader,) = pair.leaders()
    assert pair.processes[leader].stop() == 0
    stopped = time.monotonic()
    eventually(lambda: pair.leaders() == [pair.other(leader)])
    assert time.monotonic() - stopped < DURATION / 2


def moment(event: Object) -> float:
    return datetime.datetime.fromisoformat(event["requestReceivedTimestamp"]).timestamp()


def test_a_leader_that_was_frozen_writes_nothing_any_more(
    pair: Pair, audited_platform: Any, kubectl: Kubectl, eventually: Eventually
) -> None:
    (leader,) = pair.leaders()
    process = pair.processes[leader].process
    kubectl.apply(*(relay(f"before-{number}") for number in range(10)))
    eventually(lambda: exists(kubectl, "statefulset/before-0"))
    process.send_signal(signal.SIGSTOP)  # in the midst of its work
    try:
        eventually(lambda: pair.processes[pair.other(leader)].value("mailsluice_operator_leader") == 1, 30)
        kubectl.apply(*(relay(f"meanwhile-{number}") for number in range(5)))
        eventually(lambda: exists(kubectl, "statefulset/meanwhile-4"), 60)
        # What it will hear of first: plenty to do.
        kubectl("delete", "services", "--all", "--wait=false")
    finally:
        process.send_signal(signal.SIGCONT)
    assert process.wait(40) != 0

    events = [json.loads(line) for line in audited_platform.audit_log.read_text().splitlines()]
    account = f"system:serviceaccount:{SYSTEM}:{leader}"
    writes = [
        event
        for event in events
        if event["user"]["username"] == account and event["verb"] in {"create", "update", "patch", "delete"}
    ]
    renewals = [moment(event) for event in writes if event["objectRef"]["resource"] == "leases"]
    others = [moment(event) for event in writes if event["objectRef"]["resource"] != "leases"]
    assert others
    assert max(others) <= max(renewals) + DURATION - MARGIN
    assert pair.leaders() == [pair.other(leader)]


def test_the_process_ends_when_optional_kinds_appear_and_watches_them_from_its_next_start_on(
    audited_platform: Any,
    kubectl: Kubectl,
    run_operator: Any,
    prometheus_definitions: list[Object],
    eventually: Eventually,
) -> None:
    asked = relay("monitored")
    asked["spec"] = {**SPEC, "monitoring": {"podMonitor": True}}
    kubectl.apply(asked)

    def degraded() -> str:
        conditions = kubectl.get("smtprelay", "monitored").get("status", {}).get("conditions", ())
        return next((item["reason"] for item in conditions if item["type"] == "Degraded"), "")

    kubeconfig = audited_platform.kubeconfig_of(ACCOUNTS[0], SYSTEM)
    arguments = (kubeconfig, audited_platform.folder, "--lease-namespace", SYSTEM)
    with run_operator(*arguments) as process:
        eventually(lambda: degraded() == "KindNotServed")
        kubectl.apply(*prometheus_definitions)
        assert process.process.wait(60) == 0
    with run_operator(*arguments):
        eventually(lambda: exists(kubectl, "podmonitor/monitored"))
        eventually(lambda: degraded() != "KindNotServed")  # but no node takes the pod
        kubectl("delete", "podmonitor/monitored", "--wait=false")
        eventually(lambda: exists(kubectl, "podmonitor/monitored"), 5)
