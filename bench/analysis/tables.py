"""Cells and sheets, what page, Markdown and terminal are made of, and the table of scores that commands print."""

import re
from collections.abc import Sequence
from numbers import Real
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from rich import box
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

from bench.core.progress import stdout

from .frames import LABELS

MILLIONS = {"params": ".2f", "flops": ",.0f", "params_prior": ".2f", "flops_prior": ",.0f"}  # so shown
HEADINGS = {"n": "seeds", "run_id": "run", **{name: f"{LABELS[name].label} M" for name in MILLIONS}}
SHORT = {  # headings on the terminal, by lines, where labels are too wide
    "perplexity": "perp.\n",
    "images_per_second_encode": "enc.\n/s",
    "images_per_second_decode": "dec.\n/s",
    "coded_bits_per_token": "bits/\ntoken",
    "coded_bits_per_pixel": "bits/\npixel",
    "precision_vgg16": "prec.\n",
    "recall_vgg16": "rec.\n",
    "copy_rate": "copies\n",
    "images_per_second_sample": "draw\n/s",
}
NONE = "–"
WIDEST = 10_000  # characters of a table
BRIEF = 8  # rows, sentences or names where there is little room


class Cell(NamedTuple):
    """One place of a table: its text, its spread, what sorting compares (None: goes last), whether it is the best; the
    id of the run that stands for its row; and, where it names a run, the folder of that."""

    text: str
    spread: str = ""
    order: float | str | None = None
    best: bool = False
    run: str = ""
    folder: str = ""


class Sheet(NamedTuple):
    """A table for page, Markdown and terminal alike: a key per column, rows, grey reference rows and notes.

    ``order`` is the key of the column by which the rows are sorted.
    """

    keys: Sequence[str]
    rows: list[list[Cell]]
    references: Sequence[list[Cell]] = ()
    notes: Sequence[str] = ()
    order: str = ""

    @property
    def numeric(self) -> list[bool]:
        """Which columns hold numbers."""
        return [any(isinstance(cell.order, Real) for cell in column) for column in zip(*self.rows, strict=True)]


def cell(key: str, value: Any, spread: float | None = None, best: str | None = None) -> Cell:
    """A value of column ``key`` with its standard deviation; ``best`` is the text that is marked."""
    if pd.isna(value):
        return Cell(NONE)
    width = "" if pd.isna(spread) else f"± {text_of(spread, key)}"
    text = text_of(value, key)
    return Cell(text, width, float(value) if isinstance(value, Real) else str(value), text == best)


def text_of(value: Any, key: str = "") -> str:
    """A value as column ``key`` shows it."""
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if not isinstance(value, Real):
        return "none" if pd.isna(value) else str(value)
    if key in MILLIONS:
        return f"{value / 1e6:{MILLIONS[key]}}"
    if key in LABELS:
        text = f"{value:{LABELS[key].form}}"
        return text.lstrip("-") if not text.strip("-0.") else text  # no minus before a zero
    return f"{value:.5g}" if value % 1 else f"{value:.10g}"


def best_of(column: pd.Series, key: str) -> str | None:
    """The best value as shown; None where none is better or all are shown equal."""
    better, known = LABELS[key].better, column.dropna()
    if not better or known.empty:
        return None
    low, high = text_of(known.min(), key), text_of(known.max(), key)
    return None if low == high else low if better == "lower" else high


def sampling(prior: pd.Series) -> str:
    """How a prior, a row of a frame, was sampled from."""
    top = f", top {prior.top_k}" if prior.top_k else ""
    guided = prior.get("guidance", 1.0)
    guidance = f", guidance {guided:g}" if guided > 1 or guided < 1 else ""
    return f"{prior.samples} samples, temperature {prior.temperature:g}{top}{guidance}"


def heading(key: str) -> str:
    """What a column is called, with an arrow towards the better values."""
    label, arrow = (LABELS[key].label, LABELS[key].arrow) if key in LABELS else (key, "")
    return f"{HEADINGS.get(key, label)}\u00a0{arrow}".strip()


def as_markdown(sheet: Sheet) -> str:
    """A table of Markdown, references below the rows, the best of each column bold, and the notes."""
    lines = [[inline(heading(key)) for key in sheet.keys], ["---:" if n else "---" for n in sheet.numeric]]
    for row in (*sheet.rows, *sheet.references):
        texts = [inline(f"{cell.text} {cell.spread}") for cell in row]
        lines.append([f"**{text}**" if cell.best else text for text, cell in zip(texts, row, strict=True)])
    return "\n\n".join(["\n".join(f"| {' | '.join(line)} |" for line in lines), *map(inline, sheet.notes)])


def inline(text: str) -> str:
    """``text`` on one line, characters of Markdown and HTML taken literally."""
    return re.sub(r"([\\`*_|<>]|\](?=\())", r"\\\1", " ".join(text.split()))


def upright(sheet: Sheet, title: str) -> Table:
    """For the terminal: the rows of a sheet as columns under their first cells, references in grey, and its columns as
    rows, so that there is room for what they are called."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    rows = [*((row, None) for row in sheet.rows), *((row, "bright_black") for row in sheet.references)]
    for row, style in rows:
        label = escape(row[0].text).replace(", ", ",\n")
        table.add_column(label, justify="right", no_wrap=True, style=style, header_style=style)
    for i, key in enumerate(sheet.keys[1:], 1):
        cells = [(escape(f"{row[i].text} {row[i].spread}".strip()), row[i].best) for row, _ in rows]
        table.add_row(heading(key), *(f"[bold]{text}[/]" if best else text for text, best in cells))
    return table


def put(table: Table, whole: str, gone: Sequence[str] = ()) -> None:
    """Prints ``table``, on a terminal without the last columns that have no room there. A line says which these and
    those that are ``gone`` already are, and where the ``whole`` is."""
    last = []
    while not fits(table) and stdout.is_terminal and len(table.columns) > 2:
        last.insert(0, table.columns.pop())
    table.width = None if fits(table) else width(table)
    stdout.print(table, crop=False)
    if names := [*gone, *(str(column.header) for column in last)]:
        stdout.print(
            escape(f"No room for {', '.join(' '.join(name.split()) for name in names)}: see {whole}."), soft_wrap=True
        )


def so_many(count: int, what: str) -> str:
    """A number of things in words: 1 row, 2 rows."""
    return f"{count:,} {what}{'s' * (count != 1)}"


def fits(table: Table) -> bool:
    """Whether all columns of ``table`` have room side by side."""
    return width(table) <= stdout.width


def width(table: Table) -> int:
    """Characters that ``table`` takes."""
    return Measurement.get(stdout, stdout.options.update(max_width=WIDEST), table).maximum


class Group(NamedTuple):
    """Rows of a table of scores that compete, each with its label, number of parameters and scores; labels of those
    that diverged; and below them in grey references, alike."""

    rows: Sequence[tuple[str, float, dict[str, Any]]]
    references: Sequence[tuple[str, float, dict[str, Any]]]
    diverged: Sequence[str] = ()
    title: str = ""


def score_table(first: str, columns: Sequence[str], groups: Sequence[Group], title: str | None = None) -> Table:
    """For the terminal: a row per run under ``first``, and those of ``columns`` that all runs have, or where there are
    none all references.

    The best of a column within a group is bold, where there is more than one row to choose from.
    """
    known = [scores for group in groups for _, _, scores in group.rows or group.references]
    shown = {name: LABELS[name] for name in columns if all(name in scores for scores in known)}
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=0)
    table.add_column(first, no_wrap=True)
    table.add_column("M\npar.", justify="right", no_wrap=True)
    for name, metric in shown.items():
        words = SHORT.get(name, metric.label.replace(" ", "\n"))
        table.add_column(f"{words}\n{metric.arrow}", justify="right", no_wrap=True)
    for group in groups:
        if group.title:
            table.add_row(f"[italic]{group.title}[/]")
        for label, parameters, scores in group.rows:
            cells = [_millions(parameters)]
            for name, metric in shown.items():
                values = [others[name] for _, _, others in group.rows]
                best = {"lower": min(values), "higher": max(values), "": None}[metric.better]
                text = f"{scores[name]:{metric.form}}"
                cells.append(f"[bold]{text}[/]" if len(values) > 1 and scores[name] == best else text)
            table.add_row(label, *cells)
        for label in group.diverged:
            table.add_row(label, "[red]diverged[/]")
        table.add_section()
        for label, parameters, scores in group.references:
            values = [scores.get(name) for name in shown]
            texts = (NONE if v is None else f"{v:{m.form}}" for v, m in zip(values, shown.values(), strict=True))
            table.add_row(label, _millions(parameters), *texts, style="bright_black")
        table.add_section()
    return table


def with_suffix(scores: dict[str, Any], suffix: str) -> dict[str, Any]:
    """Those of ``scores`` whose names end in ``suffix``, without it."""
    return {name.removesuffix(suffix): value for name, value in scores.items() if name.endswith(suffix)}


def _millions(parameters: float) -> str:
    return f"{parameters / 1e6:.2f}" if parameters else NONE
