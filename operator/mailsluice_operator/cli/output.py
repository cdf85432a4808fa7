"""Where the command writes, and how it ends when something is wrong."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mailsluice_operator.kubectl import KubectlError
from mailsluice_operator.local import LocalError
from mailsluice_relay.config import ConfigurationError

UNLIMITED: Final = 10_000
"""Columns of what is no terminal: nothing is cut there."""

console: Final = Console(width=None if sys.stdout.isatty() else UNLIMITED)


@contextlib.contextmanager
def reported() -> Iterator[None]:
    """Ends the command with the message of an error that a person can mend; others stay what they are."""
    try:
        yield
    except (ConfigurationError, KubectlError, LocalError) as error:
        raise SystemExit(f"mailsluice: {error}") from error
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise SystemExit(f"mailsluice: {where}{error.strerror or error}") from error


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Rows as they are, whatever stands in them. The first column, which people copy, is never cut."""
    table = Table(box=None, pad_edge=False)
    for number, name in enumerate(columns):
        table.add_column(name, no_wrap=number == 0, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console.print(table)
