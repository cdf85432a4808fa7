"""The lock files: the images install what was tested, and no more than they need."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).resolve().parent.parent
IMAGE_LOCKS: Final = ("requirements-relay.lock", "requirements-operator.lock", "requirements-build.lock")


def pins(lock: str) -> dict[str, str]:
    """Each package's version, and the condition under which it is installed."""
    return dict(re.findall(r"(?m)^([A-Za-z0-9._-]+)==(\S+)", (ROOT / lock).read_text()))


@pytest.mark.parametrize("lock", IMAGE_LOCKS)
def test_an_image_installs_the_versions_that_were_tested(lock: str) -> None:
    tested = pins("requirements.lock")
    assert pins(lock)
    assert {name: version for name, version in pins(lock).items() if tested.get(name) != version} == {}


@pytest.mark.parametrize("lock", ["requirements.lock", *IMAGE_LOCKS])
def test_every_requirement_has_hashes(lock: str) -> None:
    requirements = re.split(r"(?m)^(?=[A-Za-z0-9])", (ROOT / lock).read_text())[1:]
    assert [requirement for requirement in requirements if "--hash=sha256:" not in requirement] == []


def test_the_relay_image_has_no_kubernetes_client() -> None:
    assert {"kopf", "kubernetes"} & pins("requirements-relay.lock").keys() == set()
    assert {"kopf", "kubernetes"} <= pins("requirements-operator.lock").keys()


def test_the_images_have_no_development_tools() -> None:
    for lock in ("requirements-relay.lock", "requirements-operator.lock"):
        assert {"pytest", "mypy", "ruff", "hatchling", "pip"} & pins(lock).keys() == set()
