#!/usr/bin/env python3
"""A real one-node Kubernetes cluster on this machine, without Docker and without an image registry.

    cluster.py build                      build its programs from pinned Go modules (once; 20 to 25 min on two cores)
    cluster.py up --control-plane-only    etcd, API server, controllers, scheduler; needs no root
    cluster.py up                         with a node, as root; images come in by `load`
    cluster.py load IMAGE.tar...          import OCI archives into the node
    cluster.py down                       end it and take its state away

`up` prints the path of the kubeconfig. Needs nothing but Python; tests/cluster/testcluster does the work.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from pathlib import Path

from testcluster.binaries import CONTROL_PLANE, NODE, MissingBinariesError, build, cache_folder, how_to_get, missing
from testcluster.control_plane import ControlPlane
from testcluster.node import NodeCluster, is_running, the_only_node
from testcluster.processes import ClusterError, Processes

KEPT = Path("/tmp/mailsluice-cluster")


def say(text: str) -> None:
    print(f"cluster: {text}", file=sys.stderr, flush=True)


def up(state: Path, *, control_plane_only: bool) -> None:
    if absent := missing(CONTROL_PLANE if control_plane_only else NODE):
        raise MissingBinariesError(how_to_get(absent))
    started = time.monotonic()
    if control_plane_only:
        if Processes(state).running():
            raise ClusterError(f"{state} holds a cluster already: `cluster.py down` ends it")
        kubeconfig = start(ControlPlane(state))
    else:
        with the_only_node():
            kubeconfig = start(NodeCluster())
    say(f"ready after {time.monotonic() - started:.1f} s")
    print(kubeconfig)


def start(cluster: ControlPlane | NodeCluster) -> Path:
    cluster.start()
    return cluster.kubeconfig


def down(state: Path) -> None:
    if (state / "pids").exists():
        ControlPlane(state).stop()
        shutil.rmtree(state, ignore_errors=True)
    if os.geteuid() == 0 and is_running():
        # A test run holds the lock as long as it needs its node.
        with the_only_node():
            NodeCluster().stop()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--state", type=Path, default=KEPT, help=f"keeps a cluster without a node (default {KEPT})")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("build")
    commands.add_parser("cache", help="print where built programs are kept")
    commands.add_parser("up").add_argument("--control-plane-only", action="store_true")
    commands.add_parser("load").add_argument("archives", nargs="+", type=Path)
    commands.add_parser("down")
    arguments = parser.parse_args()
    try:
        match arguments.command:
            case "build":
                print(build(say))
            case "cache":
                print(cache_folder())
            case "up":
                up(arguments.state, control_plane_only=arguments.control_plane_only)
            case "load":
                for archive in arguments.archives:
                    NodeCluster().load(archive)
            case "down":
                down(arguments.state)
    except (ClusterError, MissingBinariesError) as error:
        say(str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
