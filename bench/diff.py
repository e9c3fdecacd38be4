"""How two runs differ: configuration, environment, protocol and metrics.

    python -m bench.diff RUN_A RUN_B
    python -m bench.diff cnn-ema-9fd1 vit-ema --results results

A run is named by its folder, or by its id below --results or the beginning of it, as long as no other run shares that.
"Better" and "worse" are said of B, and only where the two may be ranked against each other.
"""

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import tyro
from rich import box
from rich.markup import escape
from rich.table import Table

from bench import instruments
from bench.analysis.frames import CLOCKED, CONFIG, METRICS, differing, frame, read, unsteady
from bench.analysis.tables import put
from bench.core.cli import command, command_line
from bench.core.errors import UserError
from bench.core.progress import runnable, say, stdout
from bench.core.runs import Run
from bench.core.store import Store
from bench.priors.config import PriorConfig

LABEL = 30  # characters of what a metric is called in one line
TIMELESS = ("seed", "beta", "lr", "weight_decay")  # settings that no clock shows
Pairs = dict[str, tuple[Any, Any]]  # by name the value in run A and the one in run B, where they are not equal


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

    def work(words: list[str]) -> int:
        options = command_line(Options, words, "python -m bench.diff", __doc__)
        store = Store(options.results)
        runs = [store.find(name) for name in (options.run_a, options.run_b)]
        for run in runs:
            if run.folder.resolve().parent.name == PriorConfig.SHELF:
                raise UserError(f"{run.folder} is the run of a prior; name two tokenizers")
        show(*runs)
        return 0

    return command(work, arguments)


def show(a: Run, b: Run) -> None:
    """Prints how ``b`` differs from ``a``. Clocked metrics of two environments or a busy machine are not ranked."""
    for letter, run in (("A", a), ("B", b)):
        _say(f"{letter}: {run.folder}" + ("" if run.finished else f" ({run.status}: {run.reason or 'no scores yet'})"))

    config = _unequal(a.config(), b.config())
    _show_pairs("Configuration", config, "The same configuration.")
    if set(config) == {"seed"}:
        _say("The same configuration with another seed: the differences are seed noise.")
    environment = _unequal(_flat(a.environment()), _flat(b.environment()))
    _show_pairs("Environment", environment, "The same environment.")
    if not (a.finished and b.finished):
        _say("No metrics to compare: both runs must be finished.")
        return

    table, damaged = read([a, b])
    if len(table) < 2:
        raise UserError(damaged[0])
    for sentence in damaged:  # on what instruments found
        say(f"[yellow]left out:[/] {escape(sentence)}")
    refusals = differing(table[:1], table[1:])
    _show_pairs("Protocol", refusals, "The same protocol and equal bits per image: the two may be ranked.")
    if refusals:
        _say(f"The two must not be ranked against each other: they differ in {', '.join(refusals)}.")
    ranked = set() if refusals else {name for name, metric in METRICS.items() if metric.better}
    if environment.keys() - {"commit"}:
        ranked -= set(CLOCKED)
    elif busy := busy_clocks(a, b):
        ranked -= busy.keys()
        each = ", ".join(f"{METRICS[name].label} (×{times:.1f})" for name, times in busy.items())
        _say(f"Not ranked, as equal work differs from run to run, so that the machine was busy: {each}.")
    shown, equal = metric_table(table, ranked)
    if shown.row_count:
        put(shown, "a wider terminal")
    if equal:
        _say(f"Equal in both: {'; '.join(equal)}.")
    if table[[*instruments.SHOWN]].notna().any(axis=None):
        _say("All that instruments found is in instruments.json of either run.")
    if ranked:
        _say(_images(a, b))
        if set(config) - {"seed"}:
            _say(runnable(chance(a, b)))


def busy_clocks(a: Run, b: Run) -> dict[str, float]:
    """The clocks that measured what else the machine did, as reports have it (see ``unsteady``): by the runs beside
    ``a`` and ``b`` that are the same work as one of them, on the same machine. None of unfinished ones."""
    if not (a.finished and b.finished):
        return {}
    kinds = {run.folder.name.rpartition("-")[0] for run in (a, b)}  # an id is what is trained, and a digest
    shelves = {run.folder.resolve().parent for run in (a, b)}
    beside = {path for shelf in shelves for path in shelf.iterdir() if path.name.rpartition("-")[0] in kinds}
    own, others = frame([a, b]), frame(map(Run, sorted({*beside} | {a.folder.resolve(), b.folder.resolve()})))
    same = [name for name in (*CONFIG, "processor", "threads") if name not in TIMELESS]
    alike = others[others.status == "finished"].merge(own[same].drop_duplicates(), on=same)
    return unsteady(alike.assign(**dict.fromkeys(TIMELESS, 0)))


def chance(a: Run, b: Run) -> str:
    """What one run each does not tell, and the command that does, in a sentence."""
    words = "One run each says nothing about chance: "
    files = [run.folder / "config.toml" for run in (a, b)]
    if not all(file.is_file() for file in files):  # older runs have none
        return f"{words}train more seeds of both, and python -m bench.report tells whether they agree."
    each = [["--config", file, "--seeds", 0, 1, 2, "--results", file.parent.parent.parent] for file in files]
    first, second = (f"python -m bench.run {shlex.join(map(str, one))}" for one in each)
    return f"{words}{first}, then {second}, and python -m bench.report tells whether other seeds agree."


def metric_table(table: pd.DataFrame, ranked: set[str]) -> tuple[Table, list[str]]:
    """A row per metric that both rows of a frame have and that differs as shown, with a word on the second where it may
    be ``ranked``, those first; and the others, with their values. Of what instruments found those that reports show."""
    shown = Table(title="Metrics", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    shown.add_column("metric", max_width=LABEL)
    for heading in ("A", "B", "B - A", "change", "B is"):
        shown.add_column(heading, justify="left" if heading == "B is" else "right", no_wrap=True)
    equal = []
    names = [name for name in METRICS if name not in instruments.METRICS or name in instruments.SHOWN]
    for name in sorted(names, key=lambda name: name not in ranked):
        metric, (a, b) = METRICS[name], table[name]
        if pd.isna(a) or pd.isna(b):
            continue
        unit, form = (1e6, ",.2f") if min(abs(a), abs(b)) >= 1e6 else (1, metric.form)
        texts = [f"{value / unit:{form}}" for value in (a, b)]
        label = metric.label + " M" * (unit > 1)
        if texts[0] == texts[1]:
            equal.append(f"{label} {texts[0]}")
            continue
        verdict = "–"
        if name in ranked:
            verdict = "[green]better[/]" if (b < a) == (metric.better == "lower") else "[red]worse[/]"
        change = f"{100 * (b - a) / abs(a):+.1f} %" if a else "–"
        shown.add_row(f"{label} {metric.arrow}", *texts, f"{(b - a) / unit:+{form}}", change, verdict)
    return shown, equal


def _images(a: Run, b: Run) -> str:
    """On how many images ``b`` is better, or why that cannot be told."""
    scores = [run.per_image() for run in (a, b)]
    if shares := _wins(*scores):
        return f"B better on {', '.join(shares)}."
    paths = [run.folder / "per_image.npz" for run in (a, b)]
    lost = [str(path) for path, own in zip(paths, scores, strict=True) if not own] or map(str, paths)
    return f"On how many images B is better is not known: {' and '.join(lost)} missing or damaged."


def _wins(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> list[str]:
    """By each metric that has scores per image, (N,), on how many of them B is better, in words."""
    shares = []
    for name, metric in METRICS.items():
        if name in a and name in b:
            won = b[name] < a[name] if metric.better == "lower" else b[name] > a[name]
            shares.append(f"{100 * won.mean():.0f} % of {len(won)} images by {metric.label}")
    return shares


def _unequal(a: dict[str, Any], b: dict[str, Any]) -> Pairs:
    pairs = {name: (a.get(name), b.get(name)) for name in {**a, **b}}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _flat(environment: dict[str, Any]) -> dict[str, Any]:
    versions = environment.get("versions", {})
    rest = {name: value for name, value in environment.items() if name != "versions"}
    return rest | {f"versions.{name}": version for name, version in versions.items()}


def _show_pairs(title: str, pairs: Pairs, otherwise: str) -> None:
    if not pairs:
        _say(otherwise)
        return
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for heading in (title.lower(), "A", "B"):
        table.add_column(heading, overflow="fold")
    for name, pair in pairs.items():
        texts = list(map(_text, pair))
        table.add_row(name, *(texts if texts[0] != texts[1] else map(str, pair)))  # beyond the digits that are shown
    stdout.print(table)


def _text(value: Any) -> str:
    if value is None or value == "":
        return "–"
    return f"{value:g}" if isinstance(value, float) else escape(str(value))


def _say(line: str) -> None:
    stdout.print(escape(line), soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
