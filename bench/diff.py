"""How two runs differ: configuration, environment, protocol and metrics.

    python -m bench.diff RUN_A RUN_B
    python -m bench.diff cnn-ema-9fd1 vit-ema --results results

A run is named by its folder, or by its id below --results or the beginning of it, as long as no other run shares that.
"Better" and "worse" are said of B, and only where the two may be ranked against each other.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich import box
from rich.markup import escape
from rich.table import Table

from bench.analysis.differences import Change, Pairs, compare
from bench.analysis.frames import METRICS
from bench.core.cli import guarded
from bench.core.progress import stdout
from bench.core.store import Run, Store


@dataclass(frozen=True)
class Options:
    """The command line."""

    run_a: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN_A")]
    """folder, id or beginning of the id of run A"""
    run_b: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN_B")]
    """the same of run B"""
    results: Path = Path("results")
    """ids are looked up below it, in runs/"""


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns the exit code: 0, or 2 for what the user can fix."""
    options = tyro.cli(Options, args=arguments, prog="python -m bench.diff", description=__doc__)

    def work() -> int:
        store = Store(options.results)
        show(store.find(options.run_a), store.find(options.run_b))
        return 0

    return guarded(work)


def show(a: Run, b: Run) -> None:
    """Prints how ``b`` differs from ``a``."""
    for letter, run in (("A", a), ("B", b)):
        _say(f"{letter}: {run.folder}" + ("" if run.finished else f" ({run.status}: {run.reason or 'no scores yet'})"))

    found = compare(a, b)
    _show_pairs("Configuration", found.config, "The same configuration.")
    if set(found.config) == {"seed"}:
        _say("The same configuration with another seed: the differences are seed noise.")
    _show_pairs("Environment", found.environment, "The same environment.")
    if not (a.finished and b.finished):
        _say("No metrics to compare: both runs must be finished.")
        return

    _show_pairs("Protocol", found.refusals, "The same protocol and equal bits per image: the two may be ranked.")
    if found.refusals:
        _say(f"The two must not be ranked against each other: they differ in {', '.join(found.refusals)}.")
    stdout.print(metric_table(found.changes))
    if found.wins:
        each = f"% of {found.images} images by"
        shares = [f"{100 * share:.0f} {each} {METRICS[name].label}" for name, share in found.wins.items()]
        _say(f"B better on {', '.join(shares)}.")


def metric_table(changes: list[Change]) -> Table:
    """A row per metric that both runs have, with a word on B where the two may be ranked."""
    shown = Table(title="Metrics", title_justify="left", box=box.SIMPLE_HEAD)
    shown.add_column("metric", no_wrap=True)
    for heading in ("A", "B", "B - A", "change"):
        shown.add_column(heading, justify="right", no_wrap=True)
    shown.add_column("B is")
    words = {"better": "[green]better[/]", "worse": "[red]worse[/]", "equal": "equal", "": "–"}
    for metric, a, b, verdict in changes:
        numbers = [f"{value:{metric.form}}" for value in (a, b)] + [f"{b - a:+{metric.form}}"]
        change = f"{100 * (b - a) / abs(a):+.1f} %" if a else "–"
        shown.add_row(f"{metric.label} {metric.arrow}", *numbers, change, words[verdict])
    return shown


def _show_pairs(title: str, pairs: Pairs, otherwise: str) -> None:
    if not pairs:
        _say(otherwise)
        return
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for heading in (title.lower(), "A", "B"):
        table.add_column(heading, overflow="fold")
    for name, pair in pairs.items():
        table.add_row(name, *map(_text, pair))
    stdout.print(table)


def _text(value: Any) -> str:
    if value is None or value == "":
        return "–"
    return f"{value:g}" if isinstance(value, float) else escape(str(value))


def _say(line: str) -> None:
    stdout.print(escape(line), soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
