"""One report of many runs: tables, charts and verdicts, as a page, as Markdown and as data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from rich.markup import escape

from bench.core.errors import UserError
from bench.core.files import atomic_path
from bench.core.progress import Bar, say, stdout
from bench.core.store import Run, Store

from . import charts
from .charts import Chart
from .contents import contents, select
from .frames import CONFIG, METRICS, PRIOR, frame, main_metric, protocols, with_rates
from .pages import html, markdown, show


class Written(NamedTuple):
    """What ``write_report`` wrote: the path of report.html, and the charts."""

    page: Path
    charts: list[Chart]


def write_report(
    names: Sequence[str] = (),
    results: Path = Path("results"),
    out: Path | None = None,
    importances: Callable[[pd.DataFrame, str], pd.DataFrame] | None = None,
) -> Written:
    """Writes the report of the runs that ``names`` mean (see ``select``), and prints it in brief.

    Into ``out``, RESULTS/reports/NAME by default, go report.html, tables.md, runs.parquet, runs.csv and plots/.
    ``importances`` says how much each setting mattered, from a frame and the name of a metric (see ``bench.sweeps``);
    without it that chart is left out. Raises UserError as ``select`` does, and when ``out`` is a file.
    """
    selection = select(names, results)
    folder = out or selection.root / "reports" / selection.name
    if folder.is_file():
        raise UserError(f"{folder} is a file; name a folder with --out")
    with Bar("reading runs", len(selection.runs)) as bar:
        table = frame(_counted(selection.runs, bar))
    known = {run.folder.name for run in selection.runs}
    priors = frame((run for run in Store(selection.root).priors() if run.config()["tokenizer"] in known), PRIOR)
    table = with_rates(table, priors) if len(priors) else table
    report = contents(selection, table, priors)
    figures = []
    if report.blocks:
        say("drawing charts")
        most = protocols(table)[0]  # scores of several protocols do not mix
        shares = importances(most, main_metric(most)) if importances else None
        figures = charts.draw(table, folder / "plots", shares, priors)
    for old in (folder / "plots").glob("*.*"):
        if old.stem not in {chart.name for chart in figures} and not old.name.startswith("."):
            old.unlink(missing_ok=True)  # of an earlier report; hidden ones are being written by another worker
    write_data(table, folder)
    if len(priors):
        with atomic_path(folder / "priors.csv") as temporary:
            priors.to_csv(temporary, index=False)
    for name, text in (("tables.md", markdown(report)), ("report.html", html(report, figures))):
        with atomic_path(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    show(report)
    stdout.print(f"Report: {escape(str(folder / 'report.html'))}", soft_wrap=True)
    return Written(folder / "report.html", figures)


def _counted(runs: list[Run], bar: Bar) -> Iterator[Run]:
    for run in runs:
        yield run
        bar.advance()


def write_data(table: pd.DataFrame, folder: Path) -> None:
    """runs.csv is ``table`` as it is; runs.parquet is long: a row per run and metric that it has, with its Config."""
    with atomic_path(folder / "runs.csv") as temporary:
        table.to_csv(temporary, index=False)
    names = [name for name in table if name in METRICS or name.endswith("_kmeans")]
    long = table.melt(["run_id", *CONFIG, "status"], names, "metric", "value").dropna(subset="value")
    mixed = [name for name in CONFIG if long[name].dtype == object]  # Parquet has one type per column
    long = long.astype(dict.fromkeys(mixed, "string")).sort_values(["run_id", "metric"], ignore_index=True)
    with atomic_path(folder / "runs.parquet") as temporary:
        long.to_parquet(temporary, index=False)
