"""Every file of the fuzzer's corpus keeps what `checks` says: seeds, and what once broke something."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def checks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fuzz_checks", HERE / "checks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", sorted((HERE / "corpus").iterdir()), ids=lambda path: path.name)
@pytest.mark.parametrize("split", [0, 1, 7, 0x83])
def test_nothing_in_the_corpus_breaks_anything(checks: ModuleType, path: Path, split: int) -> None:
    octets = path.read_bytes()
    for target in range(len(checks.TARGETS)):
        checks.check(bytes([target, split]) + octets[2:])
    checks.check(octets)
