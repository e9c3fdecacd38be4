"""Charts of what runs kept beside their scores: how they learned, what they reconstruct, what priors generate."""

import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from bench.core.errors import Damaged
from bench.core.plots import whole_windows
from bench.core.runs import FAILURES, Run
from bench.instruments import robustness

from . import looks, vectors
from .frames import METRICS, best_first, main_metric
from .labels import BITS, brief, label_of
from .looks import Drawing, is_number, look_of
from .slices import Scope, first_sweep, representative, seeds_of

HUES = 8  # values of one setting among learning curves and pictures
CURVE_SEEDS, CURVES, CURVE_POINTS = 5, 150, 60  # seeds of one setting; runs in all; points of one run
FINE_POINTS = 300  # of a curve whose roughness is to be seen
STRETCH = 1, 99  # percentiles of the pixels that become black and white
PICTURES = 8  # images side by side
SCORED = "scores are means over all images that were scored."
UNTRAINED = (
    "encoder and decoder with the weights that training starts from, without the quantizer. The contrast of each row "
    f"is stretched: percentiles {STRETCH[0]} and {STRETCH[1]} of its pixels are black and white. The grids were "
    "measured before that, on 64 images."
)
ROBUST = {"psnr": "PSNR, dB ↑", "lpips": "LPIPS (alex) ↓"}
QUANTITIES = {"reconstruction": "reconstruction loss ↓", "lpips": "LPIPS loss ↓", "perplexity": "perplexity ↑"}


def learning_curves(scope: Scope) -> Iterator[Drawing]:
    """``learning_curves``: training losses and perplexity against steps, of the first swept setting's values.

    Runs that failed are dashed up to ×, where they stopped.
    """
    stopped = scope.unscored[scope.unscored.status.isin(FAILURES)]
    field, rows, words = first_sweep(pd.concat([scope.rows, stopped], ignore_index=True))
    by = field or "backbone"
    values = looks.levels_of(rows[by], HUES)
    rows = rows[rows[by].isin(values)]
    setting = ["backbone", field] if field else ["backbone"]
    seeds = max(1, min(CURVE_SEEDS, CURVES // rows.groupby(setting).ngroups))
    rows = rows.sort_values("seed", kind="stable").groupby(setting).head(seeds)
    curves = {index: _history(folder) for index, folder in rows.folder.items()}
    known = [name for name in QUANTITIES if any(name in curve for curve in curves.values())]
    if not known:
        return
    ramp = sns.color_palette("viridis" if is_number(rows[by]) else "Dark2", len(values) + 1)
    drawn = {value: {"color": ramp[i]} if field else look_of(value) for i, value in enumerate(values)}
    figure, grid = _curve_axes(known, sorted(rows.backbone.unique()) if field else [""])
    for (quantity, backbone), axes in grid.items():
        shown = rows[rows.backbone == backbone] if backbone else rows
        for value, runs in shown.groupby(by):
            _curves(axes, runs, curves, quantity, drawn[value])
    lines = {brief(value): {"markersize": 4, **drawn[value]} for value in values}  # viridis' last is too faint a yellow
    if (rows.status != "finished").any():
        lines["stopped"] = {"color": "0.3", "linestyle": "--", "marker": "x", "markersize": 5}
    looks.add_legend(figure, [], lines, title=label_of(field) if field else None)
    caption = f"Thin: {len(rows)} of {len(scope.rows) + len(stopped)} runs, at most {seeds} seeds of a setting{words}, "
    caption += f"averaged to {CURVE_POINTS} points; bold: mean over finished seeds."
    if field and len(values) < scope.rows[field].nunique():
        caption += f" Not all values of {label_of(field)} are shown."
    title = f"Learning curves by {label_of(field)}" if field else "Learning curves"
    yield Drawing("learning_curves", title, caption, figure)


def _history(folder: str, points: int = CURVE_POINTS) -> pd.DataFrame:
    """A run's history as means over at most ``points`` windows; no rows where it has none."""
    history = pd.DataFrame(whole_windows(Run(Path(folder)).history()))
    return history.groupby(np.arange(len(history)) // math.ceil(max(1, len(history) / points))).mean()


def _curve_axes(quantities: list[str], names: list[str]) -> tuple[Figure, dict[tuple[str, str], Axes]]:
    """One axes per quantity, as rows, and column of ``names``; for the single name "", the quantities side by side."""
    if names == [""]:
        figure = looks.new_figure(2.9)
        panels = figure.subplots(1, len(quantities), squeeze=False).T
    else:
        figure = looks.new_figure(0.8 + 1.7 * len(quantities))
        panels = figure.subplots(len(quantities), len(names), squeeze=False, sharex="col", sharey="row")
    grid = {(quantity, name): panels[i, j] for i, quantity in enumerate(quantities) for j, name in enumerate(names)}
    for (quantity, name), axes in grid.items():
        if quantity != "perplexity":
            axes.set_yscale("log")
            looks.plain_log(axes.yaxis)
        axes.xaxis.set_major_locator(MaxNLocator(3, integer=True))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        if name == names[0]:
            axes.set_ylabel(QUANTITIES[quantity])
        if quantity == quantities[0]:
            axes.set_title(name, fontsize=9)
        if quantity == quantities[-1] or names == [""]:
            axes.set_xlabel("step")
    return figure, grid


def _curves(axes: Axes, rows: pd.DataFrame, curves: dict[int, pd.DataFrame], quantity: str, look: dict) -> None:
    """One thin line per run, dashed to × for one that failed, and the bold mean of the finished with its markers."""
    finished, colour = [], look["color"]
    for index, row in rows.iterrows():
        if quantity not in curves[index]:
            continue
        line = curves[index].set_index("step")[quantity]
        line = line[np.isfinite(line)]
        if row.status == "finished":
            finished.append(line)
            (thin,) = axes.plot(line.index, line, color=colour, linewidth=0.6, alpha=0.5)
            vectors.tell(thin, [f"{row.run_id}, seed {row.seed}"])
        else:
            axes.plot(line.index, line, color=colour, linewidth=1, linestyle="--")
            axes.plot(line.index[-1:], line.iloc[-1:], color=colour, marker="x", markersize=5, markeredgewidth=1.5)
    if finished:
        mean = pd.concat(finished, axis=1).mean(axis=1)
        axes.plot(mean.index, mean, linewidth=1.4, markersize=4, markevery=looks.EVERY, **look)


def codebook_loss(scope: Scope) -> Iterator[Drawing]:
    """``codebook_loss``: the codebook's loss against steps, of all backbones on one axes, and how rough each is."""
    rows, words = representative(scope.rows)
    rows = rows.sort_values("seed", kind="stable").groupby("backbone").head(CURVE_SEEDS)
    figure, entries = looks.new_figure(3.4), {}
    axes = figure.subplots()
    for backbone, own in rows.groupby("backbone"):
        curves = [_history(folder, FINE_POINTS) for folder in own.folder]
        lines = [curve.set_index("step").quantizer for curve in curves if "quantizer" in curve]
        losses = pd.concat(lines, axis=1) if lines else pd.DataFrame()
        losses = losses.where(losses > 0).dropna(how="all")
        if losses.empty:
            continue  # no loss of its own, as of fixed codes
        look = {"markersize": 4, "markevery": looks.EVERY, **look_of(backbone)}
        axes.plot(losses.index, np.exp(np.log(losses).mean(axis=1)), linewidth=1.2, **look)
        axes.fill_between(losses.index, losses.min(axis=1), losses.max(axis=1), color=look["color"], alpha=0.2, lw=0)
        entries[f"{backbone}{_roughness(own)}"] = {**look, "markevery": None}
    if len(entries) < 2:
        return
    axes.set(xlabel="step", ylabel="codebook loss", yscale="log")
    looks.plain_log(axes.yaxis)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    looks.add_legend(figure, [], entries, title="roughness", columns=3)
    caption = (
        f"Line: geometric mean over {seeds_of(rows)} of a backbone{words}; band: from the lowest to the highest. "
        "Roughness: mean |second difference| of the loss's logarithm from one logged row to the next, after the "
        "warm-up; 0 is an exponential, 0.05 a slope that changes by five per cent of the loss from row to row."
    )
    yield Drawing("codebook_loss", "Codebook loss", caption, figure)


def _roughness(rows: pd.DataFrame) -> str:
    """Mean ± standard deviation over seeds, after a space; nothing where no run has one."""
    known, form = rows.codebook_roughness.dropna(), METRICS["codebook_roughness"].form
    spread = f" ± {known.std():{form}}" if len(known) > 1 else ""
    return f" {known.mean():{form}}{spread}" if len(known) else ""


def wrong_codes(scope: Scope) -> Iterator[Drawing]:
    """``wrong_codes``: what is left of images when a share of their codes is replaced, by backbone, where the
    instrument ``robustness`` has looked at the runs of two at least."""
    looked = scope.rows.dropna(subset="loss_random")
    if looked.backbone.nunique() < 2:
        return
    rows, others = representative(looked)
    figure, panels = looks.new_panels(len(ROBUST))
    shares = [100 * share for share in robustness.SHARES]
    styles = dict(zip(robustness.KINDS, ("-", "--"), strict=True))
    for axes, (score, label) in zip(panels, ROBUST.items(), strict=True):
        for backbone, own in rows.groupby("backbone"):
            for kind, style in styles.items():
                names = [f"{score}_{kind}_{share:.0f}" for share in shares]
                look = {**look_of(backbone), "linestyle": style, "linewidth": 1.2, "markersize": 4}
                axes.errorbar(shares, own[names].mean(), own[names].std().fillna(0.0), capsize=2, **look)
        axes.set(xlabel="replaced codes, %", ylabel=label)
    lines = {words: {"color": "0.3", "linestyle": styles[kind]} for kind, words in robustness.KINDS.items()}
    looks.add_legend(figure, list(rows.backbone.unique()), lines, title="replaced", columns=4)
    caption = (
        f"Means ± standard deviation over {seeds_of(rows)} of a backbone{others}, each over {robustness.IMAGES} "
        "images at most: a share of their codes is replaced by any others, or by the nearest others in use, as a prior "
        "will mistake them. A flat line forgives mistakes."
    )
    yield Drawing("wrong_codes", "What wrong codes cost", caption, figure)


class Shown(NamedTuple):
    """What a gallery shows of each run."""

    array: str  # that runs keep, see KEPT
    metrics: tuple[str, ...]  # beside each row
    stretched: bool  # to full contrast, row by row
    told: str  # the rest of the caption, after which runs are shown


KEPT = {"untrained": "untrained.npz"}  # the file that runs keep an array in, where it is not samples.npz


def reconstructions(scope: Scope) -> Iterator[Drawing]:
    """``reconstructions``: the same images by every backbone, where a search is confirmed by its winners and the
    defaults; ``reconstructions_FIELD``: by the first swept setting's values, in the backbone that is best there."""
    shown = Shown("x_hat", (main_metric(scope.rows), "psnr"), False, SCORED)
    rows, words, by = *representative(scope.rows), "backbone"
    if "role" in scope.rows and scope.rows.role.notna().any():
        rows, words, by = scope.rows.dropna(subset="role"), ", the search's winners and the presets' defaults", "model"
        rows = rows.assign(model=rows.backbone + ", " + rows.role)
    yield from _gallery(rows, words, by, "reconstructions", "Reconstructions", shown)
    field, rows, words = first_sweep(scope.rows)
    if field:
        metric = main_metric(rows)
        best = best_first(rows.groupby("backbone")[[metric]].mean(), metric).index[0]
        rows = rows[(rows.backbone == best) & rows[field].isin(looks.levels_of(rows[field], HUES))]
        title, words = f"Reconstructions by {label_of(field)}, {best}", f"{words}, of the backbone that is best there"
        yield from _gallery(rows, words, field, f"reconstructions_{field}", title, shown)


def untrained(scope: Scope) -> Iterator[Drawing]:
    """``untrained``: what every backbone makes of the same images before it is trained, where grids of patches show."""
    shown = Shown("untrained", ("grid_energy_init", "grid_edges_init"), True, UNTRAINED)
    yield from _gallery(*representative(scope.rows), "backbone", "untrained", "Before training", shown)


def _gallery(rows: pd.DataFrame, words: str, by: str, name: str, title: str, shown: Shown) -> Iterator[Drawing]:
    """Originals, then a row of what is ``shown`` per value of ``by``: of its lowest seed that kept such pictures."""
    kept, damaged = [], []
    for _, own in rows.sort_values("seed", kind="stable").groupby(by):
        found = ((row, *pair) for row, pair in pictures_of(own, damaged, "x", shown.array))
        kept += itertools.islice(found, 1)
    same = [found for found in kept if np.array_equal(found[1], kept[0][1])]
    if not same:
        yield from _nothing(name, title, damaged)
        return
    labels, images = ["original"], [same[0][1]]
    for row, _, pictures in same:
        scores = [_score(row, metric) for metric in dict.fromkeys(shown.metrics)]
        contrast, pictures = stretched(pictures) if shown.stretched else (1, pictures)
        scores += [f"contrast ×{contrast:.1f}"] if shown.stretched else []
        labels.append(
            "\n".join([row[by] if by in ("backbone", "model") else f"{label_of(by)} = {brief(row[by])}", *scores])
        )
        images.append(pictures)
    figure = looks.picture_rows(images, labels)
    caption = f"One run per row, the lowest seed{words}; {shown.told}"
    if by in BITS:
        caption += " The bits of an image differ between rows."
    if len(same) < len(kept):
        caption += f" {len(kept) - len(same)} of {len(kept)} runs kept other images and are left out."
    yield Drawing(name, title, caption + _note(damaged), figure)


def _score(row: pd.Series, metric: str) -> str:
    """A metric of a run in a few words; that the weights are untrained is said elsewhere."""
    return f"{METRICS[metric].label.removesuffix(', untrained')} {row[metric]:{METRICS[metric].form}}"


def stretched(images: np.ndarray) -> tuple[float, np.ndarray]:
    """``images`` (N, H, W, 3) uint8 with one contrast for all of them and their colours: what lies beyond the STRETCH
    percentiles of all pixels becomes black or white. And how many times as large differences are."""
    low, high = np.percentile(images, STRETCH)
    contrast = 255 / max(1, high - low)
    return contrast, ((images - low) * contrast).clip(0, 255).round().astype(np.uint8)


def samples(rows: pd.DataFrame, words: str = "") -> Iterator[Drawing]:
    """``samples``: a row of samples per prior and backbone, of the largest grid's lowest seed. ``words``: at which
    settings all ``rows`` are."""
    rows = rows[rows.grid_size == rows.grid_size.max()].sort_values(["backbone", "prior", "seed"], kind="stable")
    rows = rows.groupby(["backbone", "prior"]).head(1).sort_values("coded_bits_per_pixel").head(HUES)
    damaged: list[str] = []
    kept = list(pictures_of(rows, damaged, "x"))
    if not kept:
        yield from _nothing("samples", "Samples", damaged)
        return
    labels = [f"{row.prior}\nover {row.backbone}\n{row.coded_bits_per_token:.2f} bits" for row, _ in kept]
    figure = looks.picture_rows([images for _, (images,) in kept], labels)
    seed, grid = kept[0][0][["seed", "grid_size"]]
    caption = f"One prior per row, of seed {seed}, at the grid of {grid}×{grid} codes{words}, lowest rate first; "
    caption += f"bits per token. Samples are not chosen.{_note(damaged)}"
    yield Drawing("samples", "Samples", caption, figure)


def pictures_of(rows: pd.DataFrame, damaged: list[str], *names: str) -> Iterator[tuple[pd.Series, list[np.ndarray]]]:
    """Of each of ``rows`` that kept them, PICTURES images at most of each of ``names``, (N, H, W, 3) uint8; adds what
    to say of damaged files to ``damaged``."""
    for _, row in rows.iterrows():
        try:
            yield row, [_images(Run(Path(row.folder)), name) for name in names]
        except FileNotFoundError:
            continue  # older runs kept none
        except Damaged as error:
            damaged.append(str(error))


def _images(run: Run, name: str) -> np.ndarray:
    """The first images of the array ``name`` that ``run`` kept."""
    file = KEPT.get(name, "samples.npz")
    images = run.arrays(file).get(name)
    if images is None or images.ndim != 4 or images.shape[3] != 3 or images.dtype != np.uint8:
        raise Damaged(run.folder / file, f"it has no images {name}")
    return images[:PICTURES]


def _nothing(name: str, title: str, damaged: list[str]) -> Iterator[Drawing]:
    """A gallery of which nothing is left but what is said of ``damaged`` files."""
    if damaged:
        yield Drawing(name, title, _note(damaged).strip(), looks.new_figure(0.4))


def _note(damaged: list[str]) -> str:
    return f" Left out: {'. '.join(damaged)}." if damaged else ""
