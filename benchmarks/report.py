"""The table for people, the same as JSON, and the floor below which the benchmark fails."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.load import Load
from benchmarks.measure import Series, ratio


@dataclass(frozen=True)
class Bound:
    """`value` of Mailsluice to the peer, at least (for cost: at most)."""

    value: str
    floor: float
    goal: float
    at_most: bool = False

    def holds(self, measured: float, limit: float) -> bool:
        return measured <= limit if self.at_most else measured >= limit


@dataclass
class Comparison:
    """One load on several servers. The first is ours, the second the one that bounds are about."""

    load: Load | str
    series: dict[str, Series]
    bounds: tuple[Bound, ...] = ()

    @property
    def label(self) -> str:
        return self.load if isinstance(self.load, str) else self.load.label

    def checks(self) -> list[tuple[Bound, str, float]]:
        """Each bound with the peer's name and the measured ratio; nothing where the peer is not there."""
        names = list(self.series)
        if len(names) < 2:
            return []
        ours, peer = self.series[names[0]], self.series[names[1]]
        return [(bound, names[1], ratio(ours, peer, bound.value)) for bound in self.bounds]


@dataclass
class Report:
    sections: dict[str, list[Comparison]] = field(default_factory=dict)
    memory: dict[str, dict[str, float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def misses(self, *, goal: bool = False) -> list[str]:
        """What is below the floor, or below the goal."""
        found = []
        for section, comparisons in self.sections.items():
            for comparison in comparisons:
                for bound, peer, measured in comparison.checks():
                    limit = bound.goal if goal else bound.floor
                    if not bound.holds(measured, limit):
                        word = "at most" if bound.at_most else "at least"
                        found.append(
                            f"{section}: {comparison.label}: {_WHAT[bound.value]} {measured:.2f} of {peer}'s, "
                            f"wanted {word} {limit:g}"
                        )
        return found

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self._as_json(), indent=2) + "\n")

    def _as_json(self) -> dict[str, Any]:
        return {
            "machine": {"cores": os.cpu_count(), "python": platform.python_version(), "system": platform.system()},
            "sections": {
                section: [_comparison_as_json(comparison) for comparison in comparisons]
                for section, comparisons in self.sections.items()
            },
            "memory": self.memory,
            "notes": self.notes,
            "below_floor": self.misses(),
            "below_goal": self.misses(goal=True),
        }

    def show(self, *, judged: bool) -> None:
        """`judged`: with what is below the goal or the floor."""
        console = Console()
        if not console.is_terminal:
            console = Console(width=132)
        for section, comparisons in self.sections.items():
            console.print(_table(section, comparisons))
        for name, values in self.memory.items():
            shown = ", ".join(f"{key} {_memory_value(key, value)}" for key, value in values.items())
            console.print(f"{name}: {shown}")
        for note in self.notes:
            console.print(note)
        if not judged:
            return
        for miss in self.misses(goal=True):
            console.print(f"below the goal: {miss}")
        for miss in self.misses():
            console.print(f"BELOW THE FLOOR: {miss}", style="bold red")


_WHAT = {"rate": "rate", "cpu": "CPU per message"}


def _table(section: str, comparisons: list[Comparison]) -> Table:
    table = Table(title=section, title_justify="left")
    table.add_column("load")
    for column in ("server", "a second", "MB/s", "CPU ms", "p50 ms", "p99 ms", "PSS MB", "rate of it", "CPU of it"):
        table.add_column(column, justify="right" if column != "server" else "left")
    for comparison in comparisons:
        ours = next(iter(comparison.series.values()))
        for number, (name, series) in enumerate(comparison.series.items()):
            p50, p99 = series.wait(50), series.wait(99)
            megabytes = (
                series.median("rate") * comparison.load.size / 1e6 if isinstance(comparison.load, Load) else None
            )
            table.add_row(
                comparison.label if number == 0 else "",
                name,
                f"{series.median('rate'):.0f}",
                "" if megabytes is None else f"{megabytes:.1f}",
                f"{series.median('cpu') * 1e3:.2f}",
                "" if p50 is None else f"{p50 * 1e3:.1f}",
                "" if p99 is None else f"{p99 * 1e3:.1f}",
                f"{series.median('pss') / 1e6:.0f}",
                "" if number == 0 else f"{ratio(ours, series, 'rate'):.2f}x",
                "" if number == 0 else f"{ratio(ours, series, 'cpu'):.2f}x",
                end_section=number == len(comparison.series) - 1,
            )
    return table


def _comparison_as_json(comparison: Comparison) -> dict[str, Any]:
    return {
        "load": comparison.label,
        "servers": {
            name: {
                "rate": series.median("rate"),
                "accepted_rate": series.median("accepted_rate"),
                "cpu_seconds_per_message": series.median("cpu"),
                "pss": series.median("pss"),
                "wait_p50": series.wait(50),
                "wait_p99": series.wait(99),
                "runs": [{"rate": run.rate, "cpu": run.cpu} for run in series.runs],
            }
            for name, series in comparison.series.items()
        },
        "bounds": [
            {"of": bound.value, "to": peer, "measured": measured, "floor": bound.floor, "goal": bound.goal}
            for bound, peer, measured in comparison.checks()
        ],
    }


def _memory_value(key: str, value: float) -> str:
    if key in {"grown", "tenth", "all"}:
        return f"{value / 1e6:.1f} MB"
    return f"{value / 1e3:.1f} KB" if key == "each" else f"{value:.0f}"
