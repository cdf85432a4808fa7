"""Writes files as the kubelet mounts a Secret, and files that their owner alone may read."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path


def write_mount(directory: Path, files: Mapping[str, bytes]) -> None:
    """Show `files` in `directory` as the kubelet does: a new hidden directory, then one rename of the link `..data`."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    data = directory / "..data"
    former = data.resolve() if data.is_symlink() else None
    versioned = Path(tempfile.mkdtemp(prefix="..", dir=directory))
    for name, content in files.items():
        write_private(versioned / name, content)
    draft = directory / "..data_tmp"
    draft.unlink(missing_ok=True)
    draft.symlink_to(versioned.name)
    draft.replace(data)
    for entry in directory.iterdir():
        if not entry.name.startswith("..") and entry.name not in files:
            entry.unlink()
    for name in files:
        link = directory / name
        if not link.is_symlink():
            link.symlink_to(Path("..data") / name)
    if former is not None:
        shutil.rmtree(former)


def write_private(path: Path, content: bytes) -> None:
    """Write a file that its owner alone can read, from its first octet on."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)


def write_atomically(path: Path, content: bytes) -> None:
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_bytes(content)
    draft.replace(path)
