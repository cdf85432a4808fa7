"""What `mailsluice` does on a cluster as the person who calls it: through their own kubectl, with their own rights."""

from __future__ import annotations

import json
import shutil
import subprocess
from typing import Any, Final

RELAY_LABEL: Final = "mailsluice.dev/relay"
CONTAINER: Final = "relay"
TIMEOUT: Final = 60.0
"""Seconds for one call."""


class KubectlError(Exception):
    """kubectl is missing, or said no; the text is what it said."""


def get(kind: str, namespace: str | None, everywhere: bool = False, selector: str = "") -> list[dict[str, Any]]:
    """Objects of `kind` as the API server shows them to the caller."""
    scope = ["--all-namespaces"] if everywhere else ["-n", namespace] if namespace else []
    selection = ["-l", selector] if selector else []
    found = json.loads(_kubectl("get", kind, *scope, *selection, "-o", "json"))
    items: list[dict[str, Any]] = found["items"]
    return items


def pods_of(relay: str, namespace: str | None) -> list[str]:
    """Names of the running pods of a relay."""
    pods = get("pods", namespace, selector=f"{RELAY_LABEL}={relay}")
    return [pod["metadata"]["name"] for pod in pods if pod.get("status", {}).get("phase") == "Running"]


def exec_in(pod: str, namespace: str | None, *command: str) -> str:
    """Run a command in a relay's pod; what it printed."""
    scope = ["-n", namespace] if namespace else []
    return _kubectl("exec", *scope, pod, "-c", CONTAINER, "--", *command)


def _kubectl(*arguments: str) -> str:
    program = shutil.which("kubectl")
    if program is None:
        raise KubectlError("kubectl is not on PATH; install it, or use --data-dir for a relay on this machine")
    try:
        done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=TIMEOUT, check=False)  # noqa: S603 (no shell; kubectl checks its own arguments)
    except subprocess.TimeoutExpired as error:
        raise KubectlError(f"kubectl {arguments[0]} gave no answer in {TIMEOUT:.0f} s") from error
    if done.returncode:
        last_line = done.stderr.strip().rpartition("\n")[2]
        raise KubectlError(last_line or f"kubectl {arguments[0]} ended with {done.returncode}")
    return done.stdout
