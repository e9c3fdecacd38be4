"""One report of many runs: tables, charts and verdicts, as a page, as Markdown and as data."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from rich import box
from rich.markup import escape
from rich.table import Table

from bench.core.errors import UserError
from bench.core.files import atomic_path
from bench.core.progress import Bar, say, stdout
from bench.core.store import FAILURES, Run, Store

from . import charts
from .charts import Chart
from .frames import (
    BUDGETS,
    CLOCKED,
    CONFIG,
    METRICS,
    PRIOR_CLOCKED,
    PRIOR_METRICS,
    UNMATCHED,
    blocks,
    differing,
    frame,
    prior_frame,
    prior_settings,
    protocols,
    settings,
    summary,
    uneven,
    unmatched,
    with_rates,
)
from .statistics import COMPARED, Verdict, backbone_verdicts, setting_verdicts

LIMIT = 500  # rows of one table on the page
BRIEF = 8  # rows, sentences or names where there is little room
SCORES = (
    *("fid", "fid_vgg16", "kid_vgg16", "lpips_alex", "lpips_vgg", "psnr", "ssim", "sharpness", "grid_energy"),
    *("grid_edges", "perplexity", "usage"),
)
FIXED = ("bits_per_image", "params", "flops")  # follow from the settings, not the seed: shown without a spread
RANKED = (*SCORES, *FIXED, *CLOCKED)  # dead codes are (1 − usage) · K
ON_TERMINAL = ("psnr", "perplexity")  # beside the main metric
LABELS = METRICS | PRIOR_METRICS
# Shown in millions, in this format.
MILLIONS = {"params": ".2f", "flops": ",.0f", "params_prior": ".2f", "flops_prior": ",.0f"}
HEADINGS = {"n": "seeds", "run_id": "run", **{name: f"{LABELS[name].label} M" for name in MILLIONS}}
GENERATED = (
    *("coded_bits_per_token", "coded_bits_per_image", "coded_bits_per_pixel", "gfid", "gfid_vgg16", "gkid_vgg16"),
    *("precision_vgg16", "recall_vgg16", "nearest_train_psnr", "copies", "params_prior", "flops_prior"),
    *("images_per_second_sample", "sampling_speedup", "train_seconds"),
)
NONE = "–"


class Selection(NamedTuple):
    """Which runs a report is about, the results folder that it goes to, and the study's JSON where it is one."""

    name: str
    runs: list[Run]
    root: Path
    study: dict[str, Any] | None = None


class Cell(NamedTuple):
    """One place of a table: its text, its spread, what sorting compares (None: goes last), whether it is the best."""

    text: str
    spread: str = ""
    order: float | str | None = None
    best: bool = False


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
    priors = prior_frame(run for run in Store(selection.root).priors() if run.config()["tokenizer"] in known)
    table = with_rates(table, priors) if len(priors) else table
    report = contents(selection, table, priors)
    figures = []
    if report.blocks:
        say("drawing charts")
        most = protocols(table)[0]  # scores of several protocols do not mix
        shares = importances(most, charts.main_metric(most)) if importances else None
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
    """The report of ``selection``, whose frame is ``table``, and of the ``priors`` over it (of ``prior_frame``). Reads
    the runs' per-image scores for the verdicts."""
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
        trained_on=_trained_on(table),
        generation=list(generation(priors)),
    )


def _block(title: str, block: pd.DataFrame, unscored: pd.DataFrame) -> Block:
    main = charts.main_metric(block)
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
        protocol=_protocol(block),
        equal=_equal(block),
        within=within,
        headline=[replace(one, within="" if within else one.within).sentence() for one in first],
        others=others,
        verdicts={name: verdict_list(ones) for name, ones in verdicts.items() if ones},
    )


def ranking(block: pd.DataFrame, failed: pd.DataFrame) -> Sheet:
    """Mean ± standard deviation over seeds per backbone and setting of ``block``, the best in its main metric first.

    Marked is the best of a column, as shown; not in columns without a better or where all are equal, and in clocked
    ones only when all rows were measured on one machine. ``failed``: runs to be counted beside the scored ones.
    """
    main = charts.main_metric(block)
    table = summary(block, failed).sort_values(main, ascending=METRICS[main].better == "lower", kind="stable")
    by = [*table.columns[: table.columns.get_loc("n")], "n", "failed"]
    names = [name for name in RANKED if name in table]
    machines = block[["processor", "threads"]].drop_duplicates()
    unequal = [name for name in CLOCKED if name in names and len(machines) > 1]
    best = {name: _best(table[name], name) for name in names if name not in unequal}
    off = unmatched(table)
    table["backbone"] = table.backbone.where(~off, table.backbone + f" {UNMATCHED}")
    rows = [
        [_cell(name, row[name]) for name in by]
        + [_cell(name, row[name], None if name in FIXED else row[f"{name}_std"], best.get(name)) for name in names]
        for row in table.head(LIMIT).to_dict("records")
    ]
    notes = [_protocol_line(_protocol(block)), *_uneven(block), *_cut(len(table))]
    if unequal:
        labels = ", ".join(METRICS[name].label for name in unequal)
        notes.append(f"Measured on {len(machines)} different machines and therefore not ranked: {labels}.")
    if off.any():
        limits = ", ".join(f"{METRICS[name].label} {limit:.0%}" for name, limit in BUDGETS.items())
        notes.append(f"{UNMATCHED} off the backbones' median in every budget ({limits}); --match gives equal ones.")
    if trained_on := _trained_on(block):
        notes.append(f"Runs were trained on {trained_on}, which flatters them in that column; k-means was not.")
    return Sheet([*by, *names], rows, list(_references(block, [*by, *names])), notes, main)


def _references(block: pd.DataFrame, keys: list[str]) -> Iterator[list[Cell]]:
    """k-means at each grid and K of the block: what the same bits buy without any network."""
    for _, group in block.groupby(["grid_size", "codebook_size"]):
        first = group.iloc[0]
        known = {"backbone": "k-means on patches", **first[["grid_size", "codebook_size", "bits_per_image"]]}
        yield [_cell(key, known.get(key, first.get(f"{key}_kmeans"))) for key in keys]


def generation(priors: pd.DataFrame) -> Iterator[tuple[str, Sheet]]:
    """Title and ranking of each group of priors over tokenizers that spend equal bits, scored by one protocol; and the
    priors without scores."""
    finished = priors[priors.status == "finished"]
    bits = finished.grid_size**2 * np.log2(finished.codebook_size.astype(float))
    for group in protocols(priors):
        for amount, block in group.groupby(bits[group.index]):
            first = block.iloc[0]
            size = f"{first.image_size}×{first.image_size}"
            title = f"{first.data} {size}, {amount:.0f} bits per image before coding, {_sampling(first)}"
            yield title, prior_ranking(block)
    if len(unfinished := priors[priors.status != "finished"]):
        yield "Priors without scores", _listing(unfinished, ["status", "reason", "prior", "seed", "tokenizer"])


def prior_ranking(block: pd.DataFrame) -> Sheet:
    """Mean ± standard deviation over seeds per backbone, setting and prior of ``block``, the best in gFID first, with
    the rows that bound them."""
    main = "gfid" if "gfid" in block and block.gfid.notna().all() else "gfid_vgg16"
    by = ["backbone", *prior_settings(block), "prior"]
    names = [name for name in GENERATED if name in block and block[name].notna().any()]
    groups = block.groupby(by, dropna=False)
    parts = [groups.size().rename("n"), groups[names].mean(), groups[names].std().add_suffix("_std")]
    table = pd.concat(parts, axis=1).reset_index().sort_values(main, kind="stable")
    machines = block[["processor", "threads"]].drop_duplicates()
    ranked = [name for name in names if name not in PRIOR_CLOCKED or len(machines) == 1]
    best = {name: _best(table[name], name) for name in ranked}
    rows = [
        [_cell(name, row[name]) for name in (*by, "n")]
        + [_cell(name, row[name], row[f"{name}_std"], best.get(name)) for name in names]
        for row in table.head(LIMIT).to_dict("records")
    ]
    references = []
    for suffix, label in (("_real", "real codes"), ("_shuffled", "shuffled codes")):
        for backbone, own in block.groupby("backbone"):
            known = {"backbone": backbone, "prior": label}
            known |= {name: own[f"{name}{suffix}"].mean() for name in names if f"{name}{suffix}" in own}
            references.append([_cell(key, known.get(key)) for key in (*by, "n", *names)])
    first, floor = block.iloc[0], block.coded_bits_per_token_independent
    notes = [
        f"{_sampling(first)}, against all {first.protocol_count:.0f} "
        f"validation images of {first.data} at {first.image_size}×{first.image_size}; bits on their codes. "
        f"Extractor: {first.protocol_extractor_vgg16}. Independent codes take {floor.min():.2f} to "
        f"{floor.max():.2f} bits per token.",
        "Real codes are those of training images, decoded: what a perfect prior would reach. Shuffled ones are "
        "the same in random order within each grid. Copies: samples nearer to a training image than 95 % of "
        "reconstructed validation images are; 0.05 is innocent.",
    ]
    return Sheet([*by, "n", *names], rows, references, [*notes, *_cut(len(table))], main)


def _sampling(prior: pd.Series) -> str:
    how = f"{prior.samples} samples, temperature {prior.temperature:g}"
    return how + (f", top {prior.top_k}" if prior.top_k else "")


def refusals(parts: list[pd.DataFrame]) -> Sheet:
    """Why blocks are not ranked against the first one: a row per block and field that differs."""
    rows = [
        [Cell(str(number), order=number), *(Cell(text, order=text) for text in (name, _short(its), _short(first)))]
        for number, block in enumerate(parts[1:], 2)
        for name, (first, its) in differing(parts[0], block).items()
    ]
    return Sheet(["block", "differs in", "its value", "block 1 has"], rows)


def verdict_list(verdicts: Sequence[Verdict]) -> Sheet:
    """Pairs of backbones or settings: difference, intervals over seeds and over images, adjusted p, and the verdict."""
    rows = []
    for one in verdicts[:LIMIT]:
        form = f"+.{int(METRICS[one.metric].form[1:-1]) + 1}f"
        words = f"{one.better} better" if one.better else "not distinguishable" if one.interval else "too few seeds"
        texts = (METRICS[one.metric].label, one.a, one.b, one.within)
        rows.append([Cell(text, order=text) for text in texts])
        rows[-1] += [Cell(str(one.n), order=one.n), Cell(_signed([one.difference], form), order=one.difference)]
        rows[-1] += [Cell(_signed(ends, form), order=ends and ends[0]) for ends in (one.interval, one.image_interval)]
        rows[-1] += [Cell(NONE if one.p is None else f"{one.p:.2g}", order=one.p), Cell(words, "", words, one.better)]
    keys = ["metric", "a", "b", "within", "n", "a − b", "95 % over seeds", "95 % over images", "p", "verdict"]
    return Sheet(keys, rows, notes=_cut(len(verdicts)))


def failures(unscored: pd.DataFrame) -> Sheet:
    """Runs without scores, by status."""
    keys = ["status", "reason", "backbone", *settings(unscored), "seed", "run_id"]
    return _listing(unscored.sort_values(["status", "run_id"]), keys)


def run_list(table: pd.DataFrame, parts: list[pd.DataFrame]) -> Sheet:
    """Every run with its settings, status and scores, and its block where there are several."""
    numbers = {row: number for number, part in enumerate(parts, 1) for row in part.index}
    keys = [*(["block"] if len(parts) > 1 else []), "backbone", *settings(table), "seed"]
    scores = [name for name in (*SCORES, *FIXED) if table[name].notna().any()]
    table = table.assign(block=pd.Series(numbers, dtype=float))
    table = table.sort_values(keys, key=lambda column: column.astype(str) if column.dtype == object else column)
    return _listing(table, [*keys, "status", *scores, "run_id"])


def _listing(table: pd.DataFrame, keys: list[str]) -> Sheet:
    rows = [[_cell(key, row[key]) for key in keys] for row in table[keys].head(LIMIT).to_dict("records")]
    return Sheet(keys, rows, notes=[f"{note} All are in runs.csv." for note in _cut(len(table))])


def _cut(count: int) -> list[str]:
    return [f"The first {LIMIT} of {count:,} rows."] if count > LIMIT else []


def _cell(key: str, value: Any, spread: float | None = None, best: str | None = None) -> Cell:
    """A value of column ``key`` with its standard deviation; ``best`` is the text that is marked."""
    if pd.isna(value):
        return Cell(NONE)
    width = "" if pd.isna(spread) else f"± {_text(spread, key)}"
    text = _text(value, key)
    return Cell(text, width, float(value) if isinstance(value, Real) else str(value), text == best)


def _text(value: Any, key: str = "") -> str:
    if not isinstance(value, Real):
        return "none" if pd.isna(value) else str(value)
    if key in MILLIONS:
        return f"{value / 1e6:{MILLIONS[key]}}"
    return f"{value:{LABELS[key].form}}" if key in LABELS else f"{value:.10g}"


def _best(column: pd.Series, key: str) -> str | None:
    """The best value as shown; None where none is better or all are shown equal."""
    better, known = LABELS[key].better, column.dropna()
    if not better or known.map(lambda value: _text(value, key)).nunique() < 2:
        return None
    return _text(known.min() if better == "lower" else known.max(), key)


def _signed(values: Sequence[float] | None, form: str) -> str:
    if values is None or pd.isna(values[0]):
        return NONE
    return " to ".join(f"{value:{form}}" for value in values).replace("-", "−")


def _short(value: Any) -> str:
    """A value with long digests cut."""
    return re.sub(r"\b([0-9a-f]{10})[0-9a-f]{10,}\b", r"\1…", _text(value))


def heading(key: str) -> str:
    """What a column is called, with an arrow towards the better values."""
    label, arrow = (LABELS[key].label, LABELS[key].arrow) if key in LABELS else (key, "")
    return f"{HEADINGS.get(key, label)}\u00a0{arrow}".strip()


def _title(block: pd.DataFrame) -> str:
    first = block.iloc[0]
    title = f"{first.protocol_data} {first.image_size}×{first.image_size}, {first.bits_per_image:.0f} bits per image"
    if len(block[["grid_size", "codebook_size"]].drop_duplicates()) > 1:
        return title
    return f"{title} ({first.grid_size}×{first.grid_size} codes, K = {first.codebook_size})"


def _protocol(block: pd.DataFrame) -> dict[str, str]:
    first = block.filter(like="protocol_").iloc[0]
    return {name.removeprefix("protocol_"): _text(value) for name, value in first.items()}


def _protocol_line(protocol: dict[str, str]) -> str:
    shown = ("data", "split", "count", "image_size", "rounding", "extractor_vgg16", "device", "version")
    each = [f"{name.replace('_', ' ')} {_short(protocol[name])}" for name in shown if name in protocol]
    return f"Protocol: {'; '.join(each)}."


def _equal(block: pd.DataFrame) -> dict[str, str]:
    """Config fields that all rows share."""
    return {name: _text(block[name].iloc[0]) for name in CONFIG if block[name].nunique(dropna=False) == 1}


def _uneven(block: pd.DataFrame) -> list[str]:
    values = block.groupby("backbone")[uneven(block)].first()
    each = [f"{name} ({', '.join(f'{who} {_text(v)}' for who, v in values[name].items())})" for name in values]
    return [f"Not equal across backbones: {', '.join(each)}."] if each else []


def _trained_on(table: pd.DataFrame) -> str:
    """Labels of the perceptual metrics that some run was trained on."""
    return " and ".join(METRICS[f"lpips_{net}"].label for net in sorted(set(table.lpips_net[table.lpips_weight > 0])))


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
    texts = list(map(_text, values))
    return ", ".join(texts) if len(texts) <= 2 * BRIEF else f"{texts[0]} to {texts[-1]} ({len(texts)} values)"


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


def show(report: Report) -> None:
    """Prints the best rows of each block, what it says about its backbones, and what has no scores."""
    for block in report.blocks[:BRIEF]:
        keys, kept = block.ranking.keys, (block.ranking.order, *ON_TERMINAL)
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
