"""kubectl on one kubeconfig: what tests do to a cluster as a person would."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from testcluster.binaries import require
from testcluster.processes import CommandFailedError

SERVER_SIDE: Final = ("--server-side", "--force-conflicts")

Object = dict[str, Any]
"""A Kubernetes object, as JSON has it."""


@dataclasses.dataclass(frozen=True)
class Kubectl:
    """`kubectl(...)` runs one command and returns what it prints; a failing one raises with what it said."""

    kubeconfig: Path
    namespace: str | None = None

    def __call__(self, *argv: str, stdin: str | None = None, timeout: float = 60) -> str:
        done = self.attempt(*argv, stdin=stdin, timeout=timeout)
        if done.returncode:
            raise CommandFailedError(f"kubectl {' '.join(argv)}: {done.stderr.strip()}")
        return done.stdout

    def attempt(self, *argv: str, stdin: str | None = None, timeout: float = 60) -> subprocess.CompletedProcess[str]:
        """The same, for commands that may fail: the caller looks at the exit code."""
        where = ["--kubeconfig", str(self.kubeconfig)] + (["--namespace", self.namespace] if self.namespace else [])
        return subprocess.run(
            [require("kubectl"), *where, *argv],
            input=stdin,
            text=True,
            capture_output=True,
            timeout=timeout,
            check=False,
        )

    def within(self, namespace: str) -> Kubectl:
        return dataclasses.replace(self, namespace=namespace)

    def apply(self, *objects: Mapping[str, Any], field_manager: str = "mailsluice-test") -> None:
        """Server-side apply, as the operator does it."""
        document = json.dumps({"apiVersion": "v1", "kind": "List", "items": list(objects)})
        self("apply", *SERVER_SIDE, f"--field-manager={field_manager}", "-f", "-", stdin=document)

    def apply_files(self, paths: Iterable[Path]) -> None:
        files = [option for path in paths for option in ("-f", str(path))]
        self("apply", *SERVER_SIDE, "--field-manager=mailsluice-test", *files)

    def get(self, kind: str, name: str) -> Object:
        document: Object = json.loads(self("get", kind, name, "-o", "json"))
        return document

    def list(self, kind: str, *, selector: str = "", everywhere: bool = False) -> list[Object]:
        options = [f"--selector={selector}", *(["--all-namespaces"] if everywhere else [])]
        document = json.loads(self("get", kind, "-o", "json", *options))
        items: list[Object] = document["items"]
        return items
