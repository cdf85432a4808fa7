"""Where the command writes, and how it ends when something is wrong."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Final

from rich.console import Console

from mailsluice_operator.kubectl import KubectlError
from mailsluice_operator.local import LocalError
from mailsluice_relay.config import ConfigurationError

console: Final = Console()


@contextlib.contextmanager
def reported() -> Iterator[None]:
    """Ends the command with the message of an error that a person can mend; others stay what they are."""
    try:
        yield
    except (ConfigurationError, KubectlError, LocalError) as error:
        raise SystemExit(f"mailsluice: {error}") from error
