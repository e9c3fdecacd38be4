"""Which runs a report is about, and what it says: facts, rankings, how they were measured, and verdicts in words."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from bench.core.errors import UserError
from bench.core.progress import Bar
from bench.core.store import FAILURES, Run, Store

from .frames import CONFIG, blocks, main_metric, settings
from .rankings import failures, generation, protocol_of, ranking, refusals, run_list, trained_on, verdict_list
from .statistics import COMPARED, backbone_verdicts, setting_verdicts
from .tables import Sheet, text_of

BRIEF = 8  # rows, sentences or names where there is little room


class Selection(NamedTuple):
    """Which runs a report is about, the results folder that it goes to, and the study's JSON where it is one."""

    name: str
    runs: list[Run]
    root: Path
    study: dict[str, Any] | None = None


class Block(NamedTuple):
    """Rows that may be ranked against each other, how they were measured, the settings they share, and verdicts: the
    main ones as sentences that hold ``within``, the others as sentences, all of them as tables by title."""

    title: str
    ranking: Sheet
    protocol: dict[str, str]
    equal: dict[str, str]
    within: str
    headline: list[str]
    others: list[str]
    verdicts: dict[str, Sheet]


class Report(NamedTuple):
    """What page, Markdown and terminal show, apart from the charts. There are no blocks when no run has scores.
    ``generation``: rankings of priors, with their titles."""

    title: str
    facts: dict[str, str]
    blocks: list[Block]
    refusals: Sheet
    unscored: Sheet
    runs: Sheet
    trained_on: str
    generation: list[tuple[str, Sheet]]


def select(names: Sequence[str], results: Path) -> Selection:
    """The runs that ``names`` mean: studies (NAME or the path of its json), run folders, run ids or results folders.

    Nothing named means every run below ``results``. Raises UserError on a name that is none of these, and when there
    are no runs.
    """
    found = [_find(name, results) for name in names] or [Selection("all", Store(results).runs(), results)]
    runs = {run.folder.resolve(): run for part in found for run in part.runs}
    ordered = [runs[folder] for folder in sorted(runs)]
    selection = found[0]._replace(runs=ordered) if len(found) == 1 else Selection("selection", ordered, results)
    if not selection.runs:
        what = f" of study {selection.name}" if selection.study else ""
        raise UserError(f"no runs{what} below {selection.root / 'runs'}; start with python -m bench.run")
    return selection


def _find(name: str, results: Path) -> Selection:
    path, store = Path(name), Store(results)
    if name in store.studies():
        return _study(store, name)
    if path.suffix == ".json" and path.is_file():
        return _study(Store(path.resolve().parent.parent), path.stem)
    for run in (Run(path), store.named(name)):
        if (run.folder / "config.json").is_file():
            return Selection("selection", [run], results)
    if (path / "runs").is_dir():
        return Selection("all", Store(path).runs(), path)
    known = f"studies: {_few(store.studies())}; runs: {_few([run.folder.name for run in store.runs()])}"
    raise UserError(f"unknown study or run {name!r} in {results}; it has {known}")


def _study(store: Store, name: str) -> Selection:
    study = store.study(name)
    started = [run for run in map(store.named, study["runs"]) if (run.folder / "config.json").is_file()]
    return Selection(name, started, store.root, study)


def _few(names: list[str]) -> str:
    return (", ".join(names[:BRIEF]) or "none") + (f" and {len(names) - BRIEF} more" if len(names) > BRIEF else "")


def contents(selection: Selection, table: pd.DataFrame, priors: pd.DataFrame) -> Report:
    """The report of ``selection``, whose frame is ``table``, and of the frame ``priors`` over it. Reads the runs'
    per-image scores for the verdicts."""
    parts = list(blocks(table))
    unscored = table[table.status != "finished"]
    found = []
    with Bar("comparing", len(parts)) as bar:
        for number, block in enumerate(parts, 1):
            head = f"{number}. " if len(parts) > 1 else ""
            found.append(_block(head + _title(block), block, unscored))
            bar.advance()
    return Report(
        title={"all": "All runs", "selection": "Selected runs"}.get(selection.name, f"Study {selection.name}"),
        facts=_facts(selection, table),
        blocks=found,
        refusals=refusals(parts),
        unscored=failures(unscored),
        runs=run_list(table, parts),
        trained_on=trained_on(table),
        generation=list(generation(priors)),
    )


def _block(title: str, block: pd.DataFrame, unscored: pd.DataFrame) -> Block:
    main = main_metric(block)
    metrics = tuple(dict.fromkeys([main, *COMPARED]))
    backbones, swept = backbone_verdicts(block, metrics), setting_verdicts(block, metrics)
    first = [one for metric in dict.fromkeys([main, "psnr"]) for one in backbones if one.metric == metric]
    others = [one.sentence() for one in backbones + swept if one not in first]
    within = first[0].within if len({one.within for one in first}) == 1 else ""
    verdicts = {"Backbones against each other": backbones, "Settings within a backbone": swept}
    failed = unscored[unscored.status.isin(set(FAILURES) - {"pruned"})]
    return Block(
        title=title,
        ranking=ranking(block, failed),
        protocol=protocol_of(block),
        equal=_equal(block),
        within=within,
        headline=[replace(one, within="" if within else one.within).sentence() for one in first],
        others=others,
        verdicts={name: verdict_list(ones) for name, ones in verdicts.items() if ones},
    )


def _title(block: pd.DataFrame) -> str:
    first = block.iloc[0]
    title = f"{first.protocol_data} {first.image_size}×{first.image_size}, {first.bits_per_image:.0f} bits per image"
    if len(block[["grid_size", "codebook_size"]].drop_duplicates()) > 1:
        return title
    return f"{title} ({first.grid_size}×{first.grid_size} codes, K = {first.codebook_size})"


def _equal(block: pd.DataFrame) -> dict[str, str]:
    """Config fields that all rows share."""
    return {name: text_of(block[name].iloc[0]) for name in CONFIG if block[name].nunique(dropna=False) == 1}


def _facts(selection: Selection, table: pd.DataFrame) -> dict[str, str]:
    counts = table.status.value_counts()
    runs = [f"{counts[status]} {status}" for status in ("finished", *FAILURES, "unfinished") if status in counts]
    facts = {"backbones": ", ".join(sorted(table.backbone.unique()))}
    facts["swept"] = "; ".join(f"{name} {_values(table[name])}" for name in settings(table)) or "nothing"
    if selection.study:
        facts = {"kind": selection.study["kind"], **facts}
        planned = len(selection.study["runs"]) - len(table)
        runs += [f"{planned} planned but not started"] if planned else []
    return {**facts, "seeds": _values(table.seed), "runs": ", ".join(runs).replace("_", " ")}


def _values(column: pd.Series) -> str:
    values = sorted(column.dropna().unique(), key=lambda value: (isinstance(value, str), value))
    texts = list(map(text_of, values))
    return ", ".join(texts) if len(texts) <= 2 * BRIEF else f"{texts[0]} to {texts[-1]} ({len(texts)} values)"
