"""One report of many runs: which runs it is about, what it says, and how a page, Markdown and the terminal say it."""

import itertools
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from rich import box
from rich.markup import escape
from rich.table import Table

from bench.core.errors import Damaged, UserError
from bench.core.files import atomic_path
from bench.core.progress import Bar, runnable, say, stdout
from bench.core.runs import FAILURES, Run
from bench.core.store import Store
from bench.priors.pixels import over_pixels

from . import charts, claims, frames, onward, rankings, searches, viewer
from .advice import Advice, advice
from .data import write_data
from .frames import CONFIG, PRIOR, main_metric, settings
from .page import html
from .statistics import COMPARED, Images, Verdict, backbone_verdicts, sentences, setting_verdicts
from .tables import BRIEF, Sheet, as_markdown, fits, heading, inline, put, so_many, text_of

SIZES = ("width", "depth")  # which a budget may set
CHECKED = 1000  # runs whose files are all compared with their digests: of more, that takes longer than the report


class Selection(NamedTuple):
    """Which runs a report is about, the results folder that it goes to, and the study's JSON where it is one."""

    name: str
    runs: list[Run]
    root: Path
    study: dict[str, Any] | None = None


class Block(NamedTuple):
    """Rows that may be ranked against each other, what to take from them, how they were measured, the settings they
    share, and verdicts: the main ones as sentences that hold ``within``, the first of the others, ``more`` in all, as
    sentences, both as tables by title; and sentences on the damaged scores per image that they do without."""

    title: str
    advice: Advice
    ranking: Sheet
    instruments: Sheet
    protocol: dict[str, str]
    equal: dict[str, str]
    within: str
    headline: list[str]
    others: list[str]
    more: int
    verdicts: dict[str, Sheet]
    damaged: list[str]


class Report(NamedTuple):
    """What page, Markdown and terminal show, apart from the charts. There are no blocks when no run has scores.
    ``claims``: the study's, answered. ``damaged``: sentences on runs, or scores per image, that cannot be read.
    ``search``: what a search found and what is left of it on the test, and ``answers``, the same of each backbone
    in a sentence; ``generation``: rankings of priors; both with their titles."""

    title: str
    facts: dict[str, str]
    blocks: list[Block]
    refusals: Sheet
    unscored: Sheet
    damaged: list[str]
    runs: Sheet
    trained_on: str
    search: list[tuple[str, Sheet]]
    answers: list[str]
    generation: list[tuple[str, Sheet]]
    claims: Sheet


class Written(NamedTuple):
    """What ``write_report`` wrote: the path of report.html, and the charts."""

    page: Path
    charts: list[charts.Chart]


def write_report(
    names: Sequence[str] = (),
    results: Path = Path("results"),
    out: Path | None = None,
    importances: Callable[[pd.DataFrame, str], pd.DataFrame] | None = None,
) -> Written:
    """Writes the report of the runs that ``names`` mean (see ``select``), and prints it in brief.

    Into ``out``, RESULTS/reports/NAME by default, go report.html, tables.md, plots/ and data (see ``write_data``).
    ``importances`` says how much each setting mattered, from a frame and the name of a metric (see ``bench.sweeps``);
    without it that chart is left out. Raises UserError as ``select`` does, and where ``out`` cannot be written.
    """
    selection = select(names, results)
    folder = out or selection.root / "reports" / selection.name
    if os.path.lexists(folder) and not folder.is_dir():
        raise UserError(f"{folder} is no folder; name one with --out")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}; name another folder with --out") from error
    table, damaged = frames.read(_watched("reading runs", selection.runs))
    if selection.study and selection.study["kind"] == "search":
        roles = {run_id: row.get("role") for run_id, row in selection.study.get("confirmed", {}).items()}
        table["role"] = table.run_id.map(roles)
    priors, further = priors_over(selection)
    pixels, beyond = frames.read(_over_pixels(selection), PRIOR)
    table = frames.with_rates(table, priors) if len(priors) else table
    report = contents(selection, table, priors, damaged)
    report.generation.extend(rankings.generation(pixels))
    scored = [folder for rows in (table, priors, pixels) for folder in rows[rows.status == "finished"].folder]
    if len(scored) > CHECKED:
        say(f"more than {CHECKED} runs: their files are checked where they are read, and not all of them")
        scored = []
    altered = (Run(Path(folder)).snapshot().altered() for folder in _watched("checking files", scored))
    others = dict.fromkeys(itertools.chain(further, beyond, *altered))
    report.damaged.extend(sentence for sentence in others if sentence not in report.damaged)
    figures = []
    if report.blocks:
        say("drawing charts")
        most = frames.protocols(frames.coded(table))[0]  # scores of several protocols do not mix
        shares = importances(most, main_metric(most)) if importances else None
        figures = charts.draw(table, folder / "plots", shares, priors)
    for old in (folder / "plots").glob("*.*"):
        if old.stem not in {chart.name for chart in figures} and not old.name.startswith("."):
            old.unlink(missing_ok=True)  # of an earlier report; hidden ones are being written by another worker
    every = [rows for rows in (priors, pixels) if len(rows)]
    write_data(table, pd.concat(every) if every else priors, folder)
    page = html(report, figures, viewer.look(table), folder)
    for name, text in (("tables.md", markdown(report)), ("report.html", page)):
        with atomic_path(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    show(report)
    stdout.print(f"Report: {escape(str(folder / 'report.html'))}", soft_wrap=True)
    for line in onward.commands(report.blocks, table, selection.study):
        stdout.print(escape(runnable(line)), soft_wrap=True)
    return Written(folder / "report.html", figures)


def priors_over(selection: Selection) -> tuple[pd.DataFrame, list[str]]:
    """The frame of the priors over the runs of ``selection``, and sentences on those that are damaged."""
    known = {run.folder.name for run in selection.runs}
    return frames.read((run for run in Store(selection.root).priors() if _is_over(known, run)), PRIOR)


def _is_over(tokenizers: set[str], prior: Run) -> bool:
    """Whether a prior is over one of ``tokenizers``, or so damaged that it does not tell."""
    try:
        return str(prior.config().get("tokenizer")) in tokenizers
    except Damaged:
        return True


def _over_pixels(selection: Selection) -> list[Run]:
    """Of a whole store the priors over no tokenizer at all."""
    found = []
    for prior in Store(selection.root).priors() if selection.name == "all" else ():
        with suppress(Damaged):  # it is told as one that may be over any
            found += [prior] * over_pixels(prior)
    return found


def _watched(label: str, items: list[Any]) -> Iterator[Any]:
    """``items``, counted by a bar."""
    with Bar(label, len(items)) as bar:
        for item in items:
            yield item
            bar.advance()


def select(names: Sequence[str], results: Path) -> Selection:
    """The runs that ``names`` mean: studies (NAME, or how exactly one name begins, or the path of its json), run
    folders, run ids or results folders.

    Nothing named means every run below ``results``. Raises UserError on a name that is none of these, and when there
    are no runs.
    """
    found = [_find(name, results) for name in names] or [Selection("all", Store(results).runs(), results)]
    if len(found) == 1:
        selection = found[0]._replace(runs=sorted(found[0].runs, key=lambda run: str(run.folder)))
    else:  # which may mean the same run twice
        runs = {run.folder.resolve(): run for part in found for run in part.runs}
        selection = Selection("selection", [runs[folder] for folder in sorted(runs)], results)
    if not selection.runs and not _over_pixels(selection):
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
        if run.started:
            return Selection("selection", [run], results)
    if (path / "runs").is_dir():
        return Selection("all", Store(path).runs(), path)
    if len(begun := [study for study in store.studies() if name and study.startswith(name)]) == 1:
        return _study(store, begun[0])
    known = f"studies: {_few(store.studies())}; runs: {_few([run.folder.name for run in store.runs()])}"
    raise UserError(f"unknown study or run {name!r} in {results}; it has {known}")


def _study(store: Store, name: str) -> Selection:
    study = store.study(name)
    started = [run for run in map(store.named, {**study["runs"], **study.get("confirmed", {})}) if run.started]
    return Selection(name, started, store.root, study)


def _few(names: list[str]) -> str:
    return (", ".join(names[:BRIEF]) or "none") + (f" and {len(names) - BRIEF} more" if len(names) > BRIEF else "")


def contents(selection: Selection, table: pd.DataFrame, priors: pd.DataFrame, damaged: Sequence[str] = ()) -> Report:
    """The report of ``selection``, whose frame is ``table``, and of the frame ``priors`` over it; ``damaged`` tells of
    runs in neither. Reads the runs' per-image scores for the verdicts."""
    parts = list(frames.blocks(table))
    unscored = table[table.status != "finished"]
    latents = frames.continuous(table)
    search, answers = searches.report(selection.study, table, priors) if selection.study else ([], [])
    claimed = _claims(selection, table)
    found = []
    for number, block in enumerate(_watched("comparing", parts), 1):
        head = f"{number}. " if len(parts) > 1 else ""
        found.append(_block(head + title_of(block), block, unscored, latents))
    return Report(
        title={"all": "All runs", "selection": "Selected runs"}.get(selection.name, f"Study {selection.name}"),
        facts=_facts(selection, table, len(damaged)),
        blocks=found,
        refusals=rankings.refusals(parts),
        unscored=rankings.failures(unscored),
        damaged=[*damaged, *(sentence for block in found for sentence in block.damaged)],
        runs=rankings.run_list(table, parts),
        trained_on=rankings.trained_on(table),
        search=search,
        answers=answers,
        generation=list(rankings.generation(priors)),
        claims=claims.sheet(claimed),
    )


def _claims(selection: Selection, table: pd.DataFrame) -> list[claims.Answer]:
    """The answers to the claims of a study. Raises Damaged where its file has others than a study has."""
    stored = (selection.study or {}).get("claims", [])
    try:
        return claims.answers(table, claims.read_claims(stored)) if stored else []
    except ValueError as error:
        raise Damaged(selection.root / "studies" / f"{selection.name}.json", str(error)) from error


def _advice(block: pd.DataFrame, verdicts: list[Verdict]) -> Advice:
    """What to take from ``block``, given the verdicts on its backbones; of runs of several lengths from the longest.
    Those that were trained elsewhere recommend no backbone."""
    if (foreign := frames.elsewhere(block)).any():
        block, others = block[~foreign], set(block.backbone[foreign])
        verdicts = [one for one in verdicts if not {one.a, one.b} & others]
    if block.empty:
        return Advice("No recommendation: all of these were trained elsewhere.", [])
    longest = block[block.steps == block.steps.max()]
    if len(longest) == len(block):
        return advice(block, verdicts)
    line, warnings, _ = advice(longest, backbone_verdicts(longest, (main_metric(longest),)))
    return Advice(
        f"At {longest.steps.iloc[0]:,.0f} steps, the most that were run: {line[0].lower()}{line[1:]}", warnings
    )


def _block(title: str, block: pd.DataFrame, unscored: pd.DataFrame, latents: pd.DataFrame) -> Block:
    main = main_metric(block)
    metrics = tuple(dict.fromkeys([main, *COMPARED]))
    read = Images(block)
    backbones, swept = backbone_verdicts(block, metrics, read), setting_verdicts(block, metrics, read)
    foreign = set(block.backbone[frames.elsewhere(block)])
    own = [one for one in backbones if not {one.a, one.b} & foreign]
    first = [one for metric in dict.fromkeys([main, "psnr"]) for one in own if one.metric == metric]
    others = [one for one in backbones + swept if one not in first]
    within = first[0].within if len({one.within for one in first}) == 1 else ""
    verdicts = {"Backbones against each other": backbones, "Settings within a backbone": swept}
    failed = unscored[unscored.status.isin(set(FAILURES) - {"pruned"})]
    return Block(
        title=title,
        advice=_advice(block, backbones),
        ranking=rankings.ranking(block, failed, latents),
        instruments=rankings.instruments(block, latents),
        protocol=rankings.protocol_of(block),
        equal=_equal(block),
        within=within,
        headline=sentences([replace(one, within="" if within else one.within) for one in first]),
        others=sentences(others[: rankings.LIMIT]),
        more=len(others),
        verdicts={name: rankings.verdict_list(ones, read.part) for name, ones in verdicts.items() if ones},
        damaged=read.damaged,
    )


def title_of(block: pd.DataFrame) -> str:
    """What a block is of: images, bits, and the grid and K that they follow from where these are the same."""
    first = block.iloc[0]
    title = f"{rankings.images_of(block)}, {first.bits_per_image:.0f} bits per image"
    shapes = block[["grid_size", "codebook_size"]].drop_duplicates()
    if len(shapes) > 1 or shapes.isna().any(axis=None):  # which image formats have none of
        return title
    return title + f" ({first.grid_size:.0f}×{first.grid_size:.0f} codes, K = {first.codebook_size:.0f})"


def _equal(block: pd.DataFrame) -> dict[str, str]:
    """Config fields that all rows share."""
    rows = frames.ours(block)
    rows = block if rows.empty else rows
    return {name: text_of(rows[name].iloc[0]) for name in CONFIG if rows[name].nunique(dropna=False) == 1}


def _facts(selection: Selection, table: pd.DataFrame, damaged: int) -> dict[str, str]:
    counts = Counter(table.status) + Counter(damaged=damaged)
    known = dict.fromkeys(("finished", *FAILURES, *sorted(counts)))
    runs = [f"{counts[status]} {status}" for status in known if counts[status]]
    facts = {"backbones": ", ".join(sorted(table.backbone.unique()))}
    ended = table[table.status == "finished"]
    rows = table if ended.empty else ended
    facts["swept"] = "; ".join(f"{name} {_values(rows[name])}" for name in _swept(table)) or "nothing"
    if selection.study:
        facts = {"kind": selection.study["kind"], **facts}
        planned = len(selection.study["runs"] | selection.study.get("confirmed", {})) - len(table) - damaged
        runs += [f"{planned} planned but not started"] if planned else []
    facts |= {"seeds": _values(table.seed), "runs": ", ".join(runs).replace("_", " ")}
    return {name: text or "none" for name, text in facts.items()}


def _swept(table: pd.DataFrame) -> list[str]:
    """Fields that take several values among the finished rows that were measured the same way, or among all where none
    is; a width or depth that follows from the other fields, as one that is solved for a budget does, is none."""
    found: dict[str, None] = {}
    for rows in frames.protocols(frames.coded(table)) or [table]:
        names = settings(rows)
        others = [name for name in names if name not in SIZES]
        sizes = rows.groupby(["backbone", *others], dropna=False)[[*SIZES]].nunique().max() > 1
        found |= dict.fromkeys(name for name in names if name in others or not others or sizes[name])
    return [name for name in CONFIG if name in found]


def _values(column: pd.Series) -> str:
    values = sorted(column.dropna().unique(), key=lambda value: (isinstance(value, str), value))
    texts = list(map(text_of, values))
    return ", ".join(texts) if len(texts) <= 2 * BRIEF else f"{texts[0]} to {texts[-1]} ({len(texts)} values)"


def markdown(report: Report) -> str:
    """Rankings, verdicts and refusals as Markdown that a paper could print."""
    facts = "\n".join(f"- {name}: {inline(text)}" for name, text in report.facts.items())
    parts = [f"# {inline(report.title)}"]
    for block in report.blocks:
        parts += [f"**{inline(block.title)}.** {inline(block.advice.line)}"]
        parts += ["\n".join(f"- {inline(sentence)}" for sentence in block.advice.warnings)]
    parts += [facts, "\n".join(f"- {inline(sentence)}" for sentence in report.answers)]
    for block in report.blocks:
        parts += [f"## {inline(block.title)}", as_markdown(block.ranking)]
        found = block.instruments.rows or block.instruments.references
        parts += ["### Instruments", as_markdown(block.instruments)] if found else []
        parts += [f"{inline(block.within)}:" if block.within else ""]
        parts += ["\n".join(f"- {inline(sentence)}" for sentence in block.headline)]
    parts += ["## What was claimed", as_markdown(report.claims)] if report.claims.rows else []
    for title, sheet in report.search:
        parts += [f"## {inline(title)}", as_markdown(sheet)]
    for title, sheet in report.generation:
        parts += [f"## Generation: {inline(title)}", as_markdown(sheet)]
    for title, sheet in (("Not ranked against each other", report.refusals), ("Without scores", report.unscored)):
        parts += [f"## {title}", as_markdown(sheet)] if sheet.rows else []
    if report.damaged:
        parts += ["## Damaged, and left out", "\n".join(f"- {inline(sentence)}" for sentence in report.damaged)]
    return "\n\n".join(filter(None, parts)) + "\n"


def _brief(ranking: Sheet, title: str, shown: Sequence[str]) -> Table:
    """The first rows of a ranking, and all references, of the columns ``shown``, for the terminal."""
    table = Table(title=escape(title), title_justify="left", box=box.SIMPLE_HEAD, padding=0)
    places = [ranking.keys.index(key) for key in shown]
    for i in places:
        words = escape(heading(ranking.keys[i])).replace(" ", "\n").replace("_", "_\n")
        table.add_column(words, justify="right" if ranking.numeric[i] else "left", no_wrap=True)
    grey = [(row, "bright_black") for row in ranking.references]
    for row, style in (*((row, None) for row in ranking.rows[:BRIEF]), *grey):
        cells = [(escape(f"{row[i].text} {row[i].spread}".strip()), row[i].best) for i in places]
        table.add_row(*(f"[bold]{text}[/]" if best else text for text, best in cells), style=style)
    return table


def show(report: Report) -> None:
    """Prints the best rows of each block, what it says about its backbones, and what has no scores."""
    first = report.blocks[:BRIEF]
    for block in first:
        stdout.print(f"[bold]{escape(block.title)}.[/] {escape(block.advice.line)}", soft_wrap=True)
        for sentence in block.advice.warnings:
            stdout.print(f"[yellow]{escape(sentence)}[/]", soft_wrap=True)
    for block in first:
        ranking, keys = block.ranking, block.ranking.keys
        settings = [key for key in keys[1:] if key not in (*rankings.RANKED, "n", "failed")]
        scores = [key for key in dict.fromkeys((ranking.order, "psnr", "perplexity")) if key in keys]
        shown, gone = [keys[0], *settings, "n", *scores], []
        spare = [*scores[:0:-1], "n", *reversed(settings)]  # what there is least need of comes first
        while not fits(table := _brief(ranking, block.title, shown)) and stdout.is_terminal and spare:
            gone.insert(0, spare.pop(0))
            shown.remove(gone[0])
        put(table, "the report", [heading(key) for key in gone])
        for sentence in filter(None, [block.within, *block.headline[:BRIEF]]):
            stdout.print(escape(sentence), soft_wrap=True)
        if (rows := len(ranking.rows) - BRIEF) > 0 or len(block.headline) > BRIEF:
            what = [so_many(rows, "more row")] * (rows > 0)
            what += [so_many(len(block.headline) - BRIEF, "more sentence")] * (len(block.headline) > BRIEF)
            stdout.print(f"{' and '.join(what)} in the report.")
    if len(report.blocks) > BRIEF:
        stdout.print(f"{so_many(len(report.blocks) - BRIEF, 'more block')}, of other bits or protocols, in the report.")
    for sentence in report.answers:
        stdout.print(escape(sentence), soft_wrap=True)
    for claim, answer, evidence in report.claims.rows:
        stdout.print(escape(f"{answer.text}: {claim.text} ({evidence.text})"), soft_wrap=True)
    for title, sheet in report.search:
        stdout.print(escape(f"{title}: {so_many(len(sheet.rows), 'row')}; see the report."), soft_wrap=True)
    for title, sheet in report.generation:
        rows = so_many(len(sheet.rows), "row")
        stdout.print(escape(f"Generation, {title}: {rows}; see the report."), soft_wrap=True)
    if report.refusals.rows:
        names = ", ".join(dict.fromkeys(row[1].text for row in report.refusals.rows))
        stdout.print(f"{len(report.blocks)} blocks are not ranked against each other: they differ in {names}.")
    for sentence in report.damaged:
        say(f"[yellow]left out:[/] {escape(sentence)}")
    stdout.print(f"Runs: {escape(report.facts['runs'])}.", soft_wrap=True)
