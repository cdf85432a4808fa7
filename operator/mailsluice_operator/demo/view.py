"""How the demo shows itself: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from mailsluice_operator.demo.applications import Application

NEXT_STEPS: Final = """
Next:
  mailsluice passwd you@example.com          make a login
  mailsluice check -f examples/minimal.yaml  validate a relay of your own
  mailsluice run -f relay.yaml               run it on this machine
  kubectl apply -k deploy                    install the operator; then kubectl apply -f relay.yaml
  docs/reasons.md                            what each reason means, and what to do"""


@dataclass(slots=True)
class Totals:
    """What the relay has counted so far, and what arrived."""

    sessions: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(("accepted", "rejected", "suspected_spam", "none"), 0)
    )
    refused_reasons: dict[str, int] = field(default_factory=dict)
    delivered: int = 0


class View(Protocol):
    """Shows the course of the demo; one for a terminal, one for everything else."""

    def show(self, totals: Totals, applications: list[Application]) -> None: ...


class TerminalView:
    """A live table with a progress bar."""

    def __init__(self, live: Live) -> None:
        self._live = live

    def show(self, totals: Totals, applications: list[Application]) -> None:
        self._live.update(screen(totals, applications))


class PlainView:
    """A line for each change, for pipes and logs."""

    def __init__(self, write: Callable[[str], object]) -> None:
        self._write = write
        self._last = ""

    def show(self, totals: Totals, applications: list[Application]) -> None:
        line = (
            "  ".join(f"{name}={count}" for name, count in totals.sessions.items()) + f"  delivered={totals.delivered}"
        )
        if line != self._last:
            self._write(line)
            self._last = line


def screen(totals: Totals, senders: list[Application]) -> Group:
    counts = Table(title="Sessions", title_justify="left")
    for column in ("accepted", "rejected", "suspected spam", "none", "delivered"):
        counts.add_column(column, justify="right")
    results = totals.sessions
    counts.add_row(
        f"[green]{results['accepted']}[/]",
        f"[red]{results['rejected']}[/]",
        f"[yellow]{results['suspected_spam']}[/]",
        str(results["none"]),
        f"[bold]{totals.delivered}[/]",
    )
    done = sum(1 for sender in senders if sender.told)
    bar = Progress(TextColumn("applications"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    bar.add_task("", total=len(senders), completed=done)
    return Group(counts, bar, outcome(senders, one_line=True))


def outcome(senders: list[Application], *, one_line: bool = False) -> Table:
    """What each application did, and what the relay told it; `one_line`: as far as it fits a line each."""
    table = Table(title="Applications", title_justify="left")
    table.add_column("application", no_wrap=True)
    table.add_column("what it does", no_wrap=one_line)
    table.add_column("accepted", justify="right")
    table.add_column("refused", justify="right")
    table.add_column("what the relay told it last", no_wrap=one_line, overflow="ellipsis" if one_line else "fold")
    for sender in senders:
        table.add_row(sender.name, sender.intent, str(sender.sent), str(sender.refused), Text(sender.told))
    return table


def conclude(console: Console, totals: Totals, applications: list[Application]) -> None:
    """What happened, and where to go next."""
    if console.is_terminal:
        console.print(outcome(applications))
    else:
        for sender in applications:
            told = f"accepted {sender.sent}, refused {sender.refused}; told last: {sender.told}"
            console.print(f"{sender.name} ({sender.intent}): {told}", soft_wrap=True)
    results = totals.sessions
    reasons = ", ".join(f"{name} {count}" for name, count in sorted(totals.refused_reasons.items()))
    console.print(
        f"\n{results['accepted']} sessions were accepted, {results['rejected']} rejected, {results['suspected_spam']} "
        f"suspected of spam (counted and marked, not stopped), {results['none']} tried nothing; "
        f"{totals.delivered} mails reached the upstream.\nRefused because of: {reasons}.",
        soft_wrap=True,
        highlight=False,
    )
    console.print(NEXT_STEPS, soft_wrap=True, highlight=False)
