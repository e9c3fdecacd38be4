"""One report of many runs: tables, charts and verdicts, as a page, as Markdown and as data."""

import base64
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from rich import box
from rich.markup import escape
from rich.table import Table

from bench.core.errors import UserError
from bench.core.files import atomic_path
from bench.core.progress import Bar, say, stdout
from bench.core.store import Run, Store

from . import charts
from .charts import Chart
from .contents import BRIEF, Report, contents, select
from .frames import CONFIG, METRICS, PRIOR, frame, main_metric, protocols, with_rates
from .rankings import RANKED
from .tables import LABELS, Sheet, heading


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


def html(report: Report, figures: Sequence[Chart]) -> str:
    """The page: one file that needs no other. Reads the pictures of ``figures``."""
    loader = FileSystemLoader(Path(__file__).parent)
    page = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    pictures = [(chart, base64.b64encode(chart.path.read_bytes()).decode()) for chart in figures]
    template = page.get_template("report.html.jinja")
    return template.render(report=report, pictures=pictures, heading=heading, METRICS=LABELS)


def markdown(report: Report) -> str:
    """Rankings, verdicts and refusals as Markdown that a paper could print."""
    facts = "\n".join(f"- {name}: {_inline(text)}" for name, text in report.facts.items())
    parts = [f"# {_inline(report.title)}", facts]
    for block in report.blocks:
        parts += [f"## {_inline(block.title)}", _markdown(block.ranking)]
        parts += [f"{_inline(block.within)}:" if block.within else ""]
        parts += ["\n".join(f"- {_inline(sentence)}" for sentence in block.headline)]
    for title, sheet in report.generation:
        parts += [f"## Generation: {_inline(title)}", _markdown(sheet)]
    for title, sheet in (("Not ranked against each other", report.refusals), ("Without scores", report.unscored)):
        parts += [f"## {title}", _markdown(sheet)] if sheet.rows else []
    return "\n\n".join(filter(None, parts)) + "\n"


def _markdown(sheet: Sheet) -> str:
    lines = [[_inline(heading(key)) for key in sheet.keys], ["---:" if n else "---" for n in sheet.numeric]]
    for row in (*sheet.rows, *sheet.references):
        texts = [_inline(f"{cell.text} {cell.spread}") for cell in row]
        lines.append([f"**{text}**" if cell.best else text for text, cell in zip(texts, row, strict=True)])
    return "\n\n".join(["\n".join(f"| {' | '.join(line)} |" for line in lines), *map(_inline, sheet.notes)])


def _inline(text: str) -> str:
    """``text`` on one line, characters of Markdown and HTML taken literally."""
    return re.sub(r"([\\`*_|<>]|\](?=\())", r"\\\1", " ".join(text.split()))


def show(report: Report) -> None:
    """Prints the best rows of each block, what it says about its backbones, and what has no scores."""
    for block in report.blocks[:BRIEF]:
        keys, kept = block.ranking.keys, (block.ranking.order, "psnr", "perplexity")
        shown = [i for i, key in enumerate(keys) if key in kept or key not in (*RANKED, "failed")]
        table = Table(title=escape(block.title), title_justify="left", box=box.SIMPLE_HEAD, padding=0)
        for i in shown:
            words = escape(heading(keys[i])).replace(" ", "\n")
            table.add_column(words, justify="right" if block.ranking.numeric[i] else "left", no_wrap=True)
        for row in (*block.ranking.rows[:BRIEF], *block.ranking.references):
            cells = [(escape(f"{row[i].text} {row[i].spread}".strip()), row[i].best) for i in shown]
            table.add_row(*(f"[bold]{text}[/]" if best else text for text, best in cells))
        stdout.print(table)
        for sentence in filter(None, [block.within, *block.headline[:BRIEF]]):
            stdout.print(escape(sentence), soft_wrap=True)
    for title, sheet in report.generation:
        stdout.print(f"Generation, {title}: {len(sheet.rows)} rows; see the report.")
    if report.refusals.rows:
        names = ", ".join(dict.fromkeys(row[1].text for row in report.refusals.rows))
        stdout.print(f"{len(report.blocks)} blocks are not ranked against each other: they differ in {names}.")
    stdout.print(f"Runs: {escape(report.facts['runs'])}.", soft_wrap=True)
