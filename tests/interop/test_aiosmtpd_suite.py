"""aiosmtpd's own test-suite, run against the relay's session; each deviation is listed with its reason.

The suite comes from the sdist of the locked version, by its locked hash, and is kept in ~/.cache/mailsluice.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path
from typing import Any, Final

import pytest

pytestmark = [pytest.mark.interop, pytest.mark.timeout(400)]

HERE: Final = Path(__file__).parent
ROOT: Final = HERE.parents[1]
CACHE: Final = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mailsluice"
PORT: Final = 8025
"""The suite's own."""


def locked() -> tuple[str, set[str]]:
    """aiosmtpd's version, and the hashes of its files."""
    text = (ROOT / "requirements.lock").read_text()
    found = re.search(r"(?m)^aiosmtpd==([0-9.]+)((?: \\\n +--hash=sha256:[0-9a-f]{64})+)", text)
    assert found is not None
    return found[1], set(re.findall(r"sha256:([0-9a-f]{64})", found[2]))


def sdist() -> Path:
    version, hashes = locked()
    archive = CACHE / f"aiosmtpd-{version}.tar.gz"
    if not archive.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        wanted = ["--no-deps", "--no-binary", "aiosmtpd", f"aiosmtpd=={version}"]
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--dest", str(CACHE), *wanted]
        fetched = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        if fetched.returncode:
            pytest.skip(f"cannot fetch aiosmtpd's sdist: {fetched.stderr.strip().splitlines()[-1]}")
    assert hashlib.sha256(archive.read_bytes()).hexdigest() in hashes
    return archive


def unpacked(directory: Path) -> Path:
    """The suite as a package of its own: `aiosmtpd.tests` is the installed library's."""
    with tarfile.open(sdist()) as archive:
        archive.extractall(directory, filter="data")
    (source,) = directory.glob("aiosmtpd-*/aiosmtpd/tests")
    suite = directory / "run" / "aiosmtpd_suite"
    suite.parent.mkdir()
    source.rename(suite)
    markers = ["client_data", "handler_data", "controller_data"]
    lines = ["[pytest]", "asyncio_mode = auto", "markers =", *(f"    {marker}" for marker in markers)]
    (suite.parent / "pytest.ini").write_text("\n".join(lines) + "\n")
    return suite


def listed(deviations: dict[str, Any]) -> set[str]:
    """All tests of all groups. `name[a b]` stands for `name[a]` and `name[b]`."""
    tests: list[str] = []
    for group in deviations["group"]:
        assert group["reason"].strip(), group["name"]
        for entry in group["tests"]:
            base, bracket, parameters = entry.partition("[")
            names = parameters.removesuffix("]").split(" ")
            tests += [f"{base}[{name}]" for name in names] if bracket else [entry]
    assert len(tests) == len(set(tests)), "a test stands twice"
    return set(tests)


def test_the_session_does_what_aiosmtpds_own_suite_expects_or_says_why_not(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if probe.connect_ex(("127.0.0.1", PORT)) == 0:
            pytest.skip(f"port {PORT}, which the suite uses, is taken")
    deviations = tomllib.loads((HERE / "aiosmtpd_deviations.toml").read_text())
    suite, report = unpacked(tmp_path), tmp_path / "report.json"
    # Last the one that leaves smtplib changed.
    modules = sorted({path.name for path in suite.glob("test_*.py")} - set(deviations["not_run"]))
    modules.sort(key="test_smtpsmuggling.py".__eq__)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "aiosmtpd_adapter", "-p", "no:cacheprovider"]
    options = ["--timeout=30", "--tb=short", "--show-capture=no", *(f"{suite.name}/{module}" for module in modules)]
    environment = os.environ | {"AIOSMTPD_SUITE": str(suite), "AIOSMTPD_REPORT": str(report), "PYTHONPATH": str(HERE)}
    run = subprocess.run(
        [*command, *options],
        cwd=suite.parent,
        env=environment,
        capture_output=True,
        text=True,
        timeout=360,
        check=False,
    )
    assert report.exists(), run.stdout[-3000:] + run.stderr[-3000:]
    result = json.loads(report.read_text())
    failed = {name for name, outcome in result["outcomes"].items() if outcome == "failed"}
    expected = listed(deviations)
    passed, words = len(result["outcomes"]) - len(failed), result["comparisons"]
    print(f"{passed} of {len(result['outcomes'])} pass, {len(failed)} deviate in {len(deviations['group'])} groups;")
    print(
        f"replies with the expected code: {words['same words']} with the same words, {words['other words']} with others"
    )
    assert failed - expected == set(), run.stdout[-20_000:]
    assert expected - failed == set(), "these are listed as deviations, and pass or are gone"
