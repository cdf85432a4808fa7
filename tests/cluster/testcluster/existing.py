"""A cluster that is there already, by MAILSLUICE_TEST_KUBECONFIG: used only when it cannot be somebody's production."""

from __future__ import annotations

import ipaddress
import json
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from testcluster.binaries import require
from testcluster.processes import ClusterError

KUBECONFIG: Final = "MAILSLUICE_TEST_KUBECONFIG"
ALLOWED_CONTEXT: Final = "MAILSLUICE_TEST_ALLOW_CONTEXT"

TEST_CONTEXT: Final = re.compile(r"(kind|k3d)-.+|minikube|docker-desktop|rancher-desktop|mailsluice-test")
"""How the tools for local clusters name their contexts."""


def existing_kubeconfig(environment: Mapping[str, str]) -> Path | None:
    """The kubeconfig that the environment names, after a look at where its current context leads."""
    if not environment.get(KUBECONFIG):
        return None
    path = Path(environment[KUBECONFIG]).expanduser()
    view = [require("kubectl"), "--kubeconfig", str(path), "config", "view", "--minify", "-o", "json"]
    shown = subprocess.run(view, capture_output=True, text=True, check=False)
    if shown.returncode:
        raise ClusterError(f"{KUBECONFIG}={path}: {shown.stderr.strip()}")
    document = json.loads(shown.stdout)
    context, server = document["current-context"], document["clusters"][0]["cluster"]["server"]
    refuse_production(context, server, environment.get(ALLOWED_CONTEXT, ""))
    return path


def refuse_production(context: str, server: str, allowed: str) -> None:
    """Tests make namespaces, CRDs and an operator: only on a local cluster, or where someone said so."""
    if allowed == context or (TEST_CONTEXT.fullmatch(context) and is_local(server)):
        return
    raise ClusterError(
        f"{KUBECONFIG}: context {context} ({server}) is not known as a local test cluster. The tests install CRDs and "
        f"make and delete namespaces in it; if that is meant, set {ALLOWED_CONTEXT}={context}"
    )


def is_local(server: str) -> bool:
    host = urlsplit(server).hostname or ""
    try:
        return ipaddress.ip_address(host).is_private
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
