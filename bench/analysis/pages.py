"""A report as a page, as Markdown, and on the terminal."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from rich import box
from rich.markup import escape
from rich.table import Table

from bench.core.progress import stdout

from .charts import Chart
from .contents import BRIEF, Report
from .rankings import RANKED
from .tables import LABELS, Sheet, heading


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
