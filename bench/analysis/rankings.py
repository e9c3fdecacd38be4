"""The sheets of a report: which model is best, which blocks are not compared, verdicts, failures, all runs."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd

from bench.core.runs import HELD_OUT
from bench.instruments import INSTRUMENTS, SHOWN
from bench.metrics import EVALUATORS, EXTRACTORS
from bench.priors.models.masked import BOUND
from bench.priors.pixels import BITS, PIXELS
from bench.tokenizers import curves

from . import frames, references
from .data import WIDE
from .frames import BUDGETS, CLOCKED, ELSEWHERE, METRICS, UNMATCHED, best_first, blocks, machines, settings
from .slices import listed
from .statistics import Verdict
from .tables import NONE, Cell, Sheet, best_of, cell, sampling, text_of

FEW = 1000  # images, of which a Fréchet distance is of little use outside of its table
LIMIT = 500  # rows of one table on the page
FIXED = ("bits_per_image", "params", "flops")  # follow from the settings, not the seed: shown without a spread
# What evaluators measure, but for what says the same again, follows from the settings, or is of untrained weights.
UNSHOWN = ("dead_codes", "tokens", "bits_per_image", "bits_per_pixel", "grid_energy_init", "grid_edges_init")
SCORES = tuple(name for evaluator in EVALUATORS for name in evaluator.METRICS if name not in UNSHOWN)
RANKED = (*SCORES, *curves.METRICS, *FIXED, *(name for name in CLOCKED if name in METRICS))
FIRST = (  # scores that a page shows at first; the others when asked
    *("fid", "lpips_alex", "lpips_vgg", "fid_vgg16", "psnr", "perplexity"),
    *(*FIXED, *(name for name in CLOCKED if name in METRICS)),
)
GENERATED = (
    *("coded_bits_per_token", "coded_bits_per_image", "coded_bits_per_pixel", "gfid", "gfid_vgg16", "gkid_vgg16"),
    *("gfd_dinov2", "precision_vgg16", "recall_vgg16", "nearest_train_psnr", "copy_rate"),
    *("params_prior", "flops_prior", "images_per_second_sample", "sampling_speedup", "train_seconds"),
)


def ranking(block: pd.DataFrame, failed: pd.DataFrame, latents: pd.DataFrame | None = None) -> Sheet:
    """Mean ± standard deviation over seeds per backbone and setting of ``block``, the best in its main metric first.

    Marked is the best of a column, as shown; not in columns without a better or where all are equal, and in clocked
    ones only when all rows were measured on one machine. ``failed``: runs to be counted beside the scored ones.
    ``latents``: scored ones that are continuous, of which those of the same budget are references.
    """
    latents = block.iloc[:0] if latents is None else latents
    main = frames.main_metric(block)
    table = best_first(frames.summary(block, failed), main)
    by = list(table.loc[:, :"failed"])
    names = [name for name in RANKED if name in table]
    off, backbones = frames.unmatched(table), table.backbone
    foreign = backbones.isin(block.backbone[frames.elsewhere(block)])
    table["backbone"] = backbones.where(~off, backbones + f" {UNMATCHED}").where(~foreign, backbones + f" {ELSEWHERE}")
    unequal = [name for name in CLOCKED if name in names and machines(block) > 1]
    busy = {name: times for name, times in frames.unsteady(block).items() if name in names and name not in unequal}
    swept = [name for name in by if name not in ("backbone", "n", "failed")]
    notes = [_protocol_line(protocol_of(block)), *_every_row(swept), *_uneven(block), *_cut(len(table))]
    notes += references.notes(block, latents)
    if block.protocol_count.iloc[0] < FEW and any(one.metric in names for one in EXTRACTORS.values()):
        notes.append(
            f"Fréchet distances of fewer than {FEW:,} images are too large, the more so the fewer they are: "
            "compare none with one of another number of images."
        )
    if unequal:
        labels = ", ".join(METRICS[name].label for name in unequal)
        notes.append(f"Measured on {machines(block)} different machines and therefore not ranked: {labels}.")
    if busy:
        each = ", ".join(f"{METRICS[name].label} (×{times:.1f})" for name, times in busy.items())
        notes.append(f"Not ranked, as equal work differs from seed to seed, so that the machine was busy: {each}.")
    if off.any():
        limits = ", ".join(f"{METRICS[name].label} {limit:.0%}" for name, limit in BUDGETS.items())
        notes.append(f"{UNMATCHED} off the backbones' median in every budget ({limits}); --match gives equal ones.")
    if foreign.any():
        notes.append(f"{ELSEWHERE} trained elsewhere, on other images or at another budget, and scored here alike.")
    if nets := trained_on(block):
        notes.append(f"Runs were trained on {nets}, which flatters them in that column; k-means was not.")
    keys = [*by, *names]
    grey = references.reference_cells(block, latents, keys)
    rows = _ranked(table, by, names, [*unequal, *busy])
    if len(block) <= LIMIT:  # else not all runs are listed
        runs = table[by[:-2]].assign(backbone=backbones).merge(_lowest(block, by[:-2]), how="left").run_id.fillna("")
        rows = [[row[0]._replace(run=run), *row[1:]] for row, run in zip(rows, runs, strict=False)]
    return Sheet(keys, rows, grey, notes, main)


def _lowest(block: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """The id of the run of the lowest seed of each combination of columns ``by``."""
    return block.sort_values("seed", kind="stable").drop_duplicates(by)[[*by, "run_id"]]


def _ranked(table: pd.DataFrame, by: list[str], names: list[str], unequal: Sequence[str]) -> list[list[Cell]]:
    """Rows of a ``summary``: columns ``by`` as they are, scores ``names`` with spread and mark, those of ``unequal``
    without a mark."""
    best = {name: best_of(table[name], name) for name in names if name not in unequal}
    return [
        [cell(name, row[name]) for name in by]
        + [cell(name, row[name], None if name in FIXED else row[f"{name}_std"], best.get(name)) for name in names]
        for row in table.head(LIMIT).to_dict("records")
    ]


def instruments(block: pd.DataFrame, latents: pd.DataFrame | None = None) -> Sheet:
    """What instruments found, mean ± standard deviation over seeds per backbone and setting of ``block``, the best in
    its main metric first; no rows where none has looked at any. Nothing is marked as the best of its column, where a
    worse tokenizer may have less to lose. ``latents``: continuous ones, of which those of the same budget are
    references."""
    own = references.beside(block, block.iloc[:0] if latents is None else latents)
    own = own[own[[*SHOWN]].notna().any(axis=1)]
    names = [name for name in SHOWN if pd.concat([block[name], own[name]]).notna().any()]
    table = best_first(frames.summary(block), frames.main_metric(block))
    by = [name for name in table.loc[:, :"failed"] if name != "failed"]
    table = table.reindex(columns=dict.fromkeys([*table, *names, *(f"{name}_std" for name in names)]))
    looked = table[table[names].notna().any(axis=1)]
    used = [f"{name}: {each.about}" for name, each in INSTRUMENTS.items() if {*each.shown} & {*names}]
    keys = [*by, *names]
    grey = references.latent_cells(own, keys)
    return Sheet(keys, _ranked(looked, by, names, names), grey, [*used, *_cut(len(looked))])


def generation(priors: pd.DataFrame) -> Iterator[tuple[str, Sheet]]:
    """Title and ranking of each group of priors over tokenizers that spend equal bits, or over pixels, scored by one
    protocol; and the priors without scores."""
    finished = priors[priors.status == "finished"]
    bits = finished.grid_size**2 * np.log2(finished.codebook_size.astype(float))
    bits = finished.get("bits_per_image", bits).fillna(bits)  # which pixels alone are told by
    for block in blocks(finished.assign(bits_per_image=bits)):
        first = block.iloc[0]
        what = f"{images_of(block)}, {first.bits_per_image:.0f} bits per image before coding, {sampling(first)}"
        yield what, prior_ranking(block)
    if len(unfinished := priors[priors.status != "finished"]):
        yield "Priors without scores", _listing(unfinished, ["status", "reason", "prior", "seed", "tokenizer"])


def images_of(block: pd.DataFrame) -> str:
    """Which images ``block`` was scored on, briefly."""
    first = block.iloc[0]
    held_out = f"{first.protocol_count:.0f} {HELD_OUT[first.protocol_scored_on]} images"
    return f"{first.data} {first.image_size}×{first.image_size} ({held_out})"


def prior_ranking(block: pd.DataFrame) -> Sheet:
    """Mean ± standard deviation over seeds per backbone, setting and prior of ``block``, the best in gFID first, with
    the rows that bound them."""
    main = "gfid" if "gfid" in block and block.gfid.notna().all() else "gfid_vgg16"
    table = frames.summary(block, kind=frames.PRIOR).sort_values(main, kind="stable")
    by = list(table.loc[:, :"n"])
    names = [name for name in GENERATED if name in table]
    rows = _ranked(table, by, names, CLOCKED if machines(block) > 1 else ())
    bounds = []
    for suffix, label in (("_real", "real codes"), ("_shuffled", "shuffled codes")):
        for backbone, own in block.groupby("backbone"):
            known, means = {"backbone": backbone, "prior": label}, own.filter(like=suffix).mean()
            bounds.append([cell(key, known.get(key, means.get(f"{key}{suffix}"))) for key in (*by, *names)])
    first, floor = block.iloc[0], block.coded_bits_per_token_independent
    images = f"{HELD_OUT[first.protocol_scored_on]} images of {first.data} at {first.image_size}×{first.image_size}"
    notes = [
        f"{sampling(first)}, against all {first.protocol_count:.0f} {images}; bits on their codes. "
        f"Extractor: {first.protocol_extractor_vgg16}. Independent codes take {floor.min():.2f} to "
        f"{floor.max():.2f} bits per token.",
        "Real codes are those of training images, decoded: what a perfect prior would reach. Shuffled ones are "
        "the same in random order within each grid. Copies: samples nearer to a training image than 95 % of "
        "reconstructed held-out images are; 0.05 is innocent.",
    ]
    notes += [BOUND] if "masked" in {*block.prior} else []
    notes += [BITS] if PIXELS in {*block.backbone} else []
    notes += _every_row([name for name in by if name not in (*frames.PRIOR.models, "n")])
    return Sheet([*by, *names], rows, bounds, [*notes, *_cut(len(table))], main)


def protocol_of(block: pd.DataFrame) -> dict[str, str]:
    """How all rows of a block were measured, and on how many images they were trained where that is not all."""
    first = block.filter(like="protocol_").iloc[0]
    told = {name.removeprefix("protocol_"): text_of(value) for name, value in first.items()}
    counts = [f"{count:.0f}" if count else "all" for count in sorted(block.train_images.unique())]
    return told | ({"trained_on": f"{' or '.join(counts)} of the training images"} if counts != ["all"] else {})


def _protocol_line(protocol: dict[str, str]) -> str:
    shown = ("data", "split", "trained_on", "scored_on", "count", "image_size", "rounding", "extractor_vgg16", "device")
    shown = (*shown, "version")
    each = [f"{name.replace('_', ' ')} {_short(protocol[name])}" for name in shown if name in protocol]
    return f"Protocol: {'; '.join(each)}."


def _uneven(block: pd.DataFrame) -> list[str]:
    values = block.groupby("backbone")[frames.uneven(block)].first()
    each = [f"{name} ({', '.join(f'{who} {text_of(v)}' for who, v in values[name].items())})" for name in values]
    return [f"Not equal across backbones: {', '.join(each)}."] if each else []


def trained_on(table: pd.DataFrame) -> str:
    """Labels of the perceptual metrics that some run was trained on."""
    names = [f"lpips_{net}" for net in sorted(set(table.lpips_net[table.lpips_weight > 0]))]
    return " and ".join(
        METRICS[name].label if name in METRICS else name for name in names
    )  # later versions have others


def refusals(parts: list[pd.DataFrame]) -> Sheet:
    """Why blocks are not ranked against the first one: a row per block and field that differs."""
    rows = [
        [Cell(str(number), order=number), *(Cell(text, order=text) for text in (name, _short(its), _short(first)))]
        for number, block in enumerate(parts[1:], 2)
        for name, (first, its) in frames.differing(parts[0], block).items()
    ]
    return Sheet(["block", "differs in", "its value", "block 1 has"], rows)


def verdict_list(verdicts: Sequence[Verdict], part: float = 1.0) -> Sheet:
    """Pairs of backbones or settings: difference, intervals over seeds and over images, adjusted p, and the verdict.
    ``part``: that of the settings whose scores per image were read."""
    rows = []
    for one in verdicts[:LIMIT]:
        form = f"+.{int(METRICS[one.metric].form.partition('.')[2][:-1]) + 1}f"
        words = f"{one.better} better" if one.better else "not distinguishable" if one.interval else "too few seeds"
        words += ", both below k-means in PSNR" if one.below else ""
        texts = (METRICS[one.metric].label, one.a, one.b, one.within)
        rows.append([Cell(text, order=text) for text in texts])
        rows[-1] += [Cell(str(one.n), order=one.n), Cell(_signed([one.difference], form), order=one.difference)]
        rows[-1] += [Cell(_signed(ends, form), order=ends and ends[0]) for ends in (one.interval, one.image_interval)]
        rows[-1] += [Cell(NONE if one.p is None else f"{one.p:.2g}", order=one.p), Cell(words, "", words, one.better)]
    keys = ["metric", "a", "b", "within", "n", "a − b", "95 % over seeds", "95 % over images", "p", "verdict"]
    paired = "Where further settings were swept, both sides are paired at equal values of them, as within says, and "
    alone = "Intervals are of each pair alone; p is corrected for the number of pairs, and no verdict goes without it."
    notes = [alone] if any(one.interval for one in verdicts) else []
    notes += [f"{paired}averaged."] if any("over " in one.within for one in verdicts) else []
    notes += [f"Intervals over images are of a random {part:.1%} of these settings."] if part < 1 else []
    return Sheet(keys, rows, notes=[*notes, *_cut(len(verdicts))])


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
    sheet = _listing(table, [*keys, "status", *scores, "run_id"])
    rows = [[*row[:-1], row[-1]._replace(folder=folder)] for row, folder in zip(sheet.rows, table.folder, strict=False)]
    return sheet._replace(rows=rows)


def _listing(table: pd.DataFrame, keys: list[str]) -> Sheet:
    rows = [[cell(key, row[key]) for key in keys] for row in table[keys].head(LIMIT).to_dict("records")]
    notes = _every_row([name for name in settings(table) if name in keys], "and so is each seed: nothing is averaged")
    return Sheet(keys, rows, notes=notes + [f"{note} All are in {WIDE}." for note in _cut(len(table))])


def _signed(values: Sequence[float] | None, form: str) -> str:
    """One number or the ends of an interval, with minus signs."""
    if values is None or pd.isna(values[0]):
        return NONE
    return " to ".join(f"{value:{form}}" for value in values).replace("-", "−")


def _short(value: Any) -> str:
    """A value with long digests cut."""
    return re.sub(r"\b([0-9a-f]{10})[0-9a-f]{10,}\b", r"\1…", text_of(value))


def _every_row(swept: list[str], averaged: str = "averaged over seeds alone") -> list[str]:
    """How rows of several ``swept`` settings came about."""
    return [f"Each combination of {listed(swept)} that was run is a row of its own, {averaged}."] if swept else []


def _cut(count: int) -> list[str]:
    return [f"The first {LIMIT} of {count:,} rows."] if count > LIMIT else []
