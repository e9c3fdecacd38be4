"""Where to go from a report: what would complete it, what to look at next."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from .statistics import kmeans_margin
from .tables import Cell, Sheet

if TYPE_CHECKING:
    from .report import Block


def commands(blocks: Sequence["Block"], table: pd.DataFrame, study: dict[str, Any] | None = None) -> list[str]:
    """A command a line, with what it is for: from the ``blocks`` of a report, the frame ``table`` of its runs, and the
    file of the ``study`` where it is of one."""
    return [*_completing(blocks, table, study), *(_looking(blocks[0].ranking, table) if blocks else ())]


def _completing(blocks: Sequence["Block"], table: pd.DataFrame, study: dict[str, Any] | None) -> list[str]:
    """How to come by what the report lacks: the command that made these runs, whose flags no file has, again for what
    was planned and has not ended, and with what to add for a verdict on the first block."""
    study = study or {}
    name = f"studies.{study['study']}" if "study" in study else "bench.run"
    same = f"python -m {name} with the flags that these runs were started with"
    planned, ended = {**study.get("runs", {}), **study.get("confirmed", {})}, table.run_id[table.status != "unfinished"]
    lines = [f"Finish what was planned: {same}"] if planned.keys() - {*ended} else []
    flags = blocks[0].advice.flags if blocks and study.get("kind") != "search" else ()  # which has --confirm for that
    return lines + [f"Add what is missing: {same}, and {shlex.join(flags)}"] * bool(flags)


def _looking(ranking: Sheet, table: pd.DataFrame) -> list[str]:
    """The best row of ``ranking`` held against the best of another backbone at the same settings, or else the second;
    and images from the best that has its weights, unless that is worse than k-means on patches at the same bits."""
    runs = table.assign(margin=kmeans_margin(table)).drop_duplicates("run_id", keep="last").set_index("run_id")
    named = [row for row in ranking.rows if row[0].run]
    alike = [row for row in named[1:] if _settings(ranking, row) == _settings(ranking, named[0])]
    pair = [runs.folder[row[0].run] for row in (*named[:1], *(alike or named[1:])[:1])]
    whole = [row[0].run for row in named if (Path(runs.folder[row[0].run]) / "tokenizer.safetensors").is_file()]
    able = [shlex.quote(runs.folder[run]) for run in whole[:1] if not runs.margin[run] < 0]
    lines = [f"Compare the best two: python -m bench.diff {shlex.join(pair)}"] * (len(pair) > 1)
    return lines + [f"Generate images: python -m bench.prior {folder}" for folder in able]


def _settings(ranking: Sheet, row: list[Cell]) -> list[str]:
    """What was swept, as a ``row`` has it: two rows of equal settings are of two backbones."""
    return [cell.text for cell in row[1 : ranking.keys.index("n")]]
