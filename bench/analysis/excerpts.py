"""Tables of a report with the columns that are asked for, as Markdown: for a page or a paper."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import pandas as pd
from rich.markup import escape

from bench.core.errors import UserError
from bench.core.progress import say
from bench.core.runs import FAILURES

from . import frames, rankings
from .frames import LABELS, METRICS
from .report import priors_over, select, title_of
from .statistics import Images, backbone_verdicts, setting_verdicts
from .tables import NONE, Sheet, as_markdown, inline


def excerpt(names: Sequence[str], results: Path, columns: Sequence[str] = (), verdicts: Sequence[str] = ()) -> str:
    """Of the runs that ``names`` mean (see ``select``) each table, of scores, of what instruments found and of priors,
    that has all ``columns``, with these alone; and the verdicts on each metric of ``verdicts``, of backbones against
    each other and then of settings.

    Columns are keys of LABELS, for verdicts those of METRICS with a direction. Rows are those of a report to the digit;
    what was swept stays, and failed runs where there are any. Raises UserError as ``select`` does, on a metric without
    verdicts, and where nothing is left to print."""
    if unfit := [name for name in verdicts if name not in METRICS or not METRICS[name].better]:
        known = ", ".join(name for name, one in METRICS.items() if one.better)
        raise UserError(f"no verdicts are given on {unfit[0]!r}; there are some on {known}")
    selection = select(names, results)
    table, damaged = frames.read(selection.runs)
    priors, further = priors_over(selection)
    for sentence in (*damaged, *further):
        say(f"[yellow]left out:[/] {escape(sentence)}")
    parts, known = [], {}
    for title, sheet, block in _rankings(table, priors):
        here = dict.fromkeys(key for key in sheet.keys if key in LABELS)
        found = [_of_columns(sheet, columns)] if columns and {*columns} <= {*here} else []
        read = Images(block) if block is not None and verdicts else None
        for metric in verdicts if read else ():
            every = backbone_verdicts(block, (metric,), read), setting_verdicts(block, (metric,), read)
            found += [rankings.verdict_list(ones, read.part) for ones in every if ones]
        for sentence in read.damaged if read else ():
            say(f"[yellow]left out:[/] {escape(sentence)}")
        notes = dict.fromkeys(inline(note) for one in found for note in one.notes)
        tables = (as_markdown(one._replace(notes=())) for one in found)
        parts += [f"**{inline(title)}**", *tables, *notes] if found else []
        known |= here
    if not parts:
        wanted = f"has all of {', '.join(columns)}; there are {', '.join(known)}"
        wanted = wanted if columns else "can be compared; name two backbones, or two values of a setting, at least"
        raise UserError(f"none of these runs {wanted if known else 'has scores yet; finish one of them first'}")
    return "\n\n".join(parts)


def _rankings(table: pd.DataFrame, priors: pd.DataFrame) -> Iterator[tuple[str, Sheet, pd.DataFrame | None]]:
    """Title and ranking of each block of tokenizers, with that block, what instruments found of it, and each group of
    priors."""
    failed = table[table.status.isin({*FAILURES} - {"pruned"})]
    latents = frames.continuous(table)
    for block in frames.blocks(table):
        title = f"{title_of(block)}, protocol {block.protocol_version.iloc[0]}"
        yield title, rankings.ranking(block, failed, latents), block
        yield title, rankings.instruments(block, latents), None
    for title, sheet in rankings.generation(priors):
        yield title, sheet, None


def _of_columns(sheet: Sheet, columns: Sequence[str]) -> Sheet:
    """``sheet`` with what its rows are called by and ``columns``, without references that have none of them, and
    without notes but that on unequal budgets."""
    keys = [*sheet.keys]
    named = keys.index("n") + 1
    failed = [keys.index("failed")] if "failed" in keys else []  # in tables of tokenizers alone
    counted = [i for i in failed if any(row[i].order for row in sheet.rows)]
    places = [*range(named), *counted, *map(keys.index, columns)]
    rows, references = ([[row[i] for i in places] for row in every] for every in (sheet.rows, sheet.references))
    references = [row for row in references if any(cell.text != NONE for cell in row[-len(columns) :])]
    notes = [note for note in sheet.notes if note.startswith((frames.UNMATCHED, frames.ELSEWHERE))]
    return Sheet([keys[i] for i in places], rows, references, notes)
