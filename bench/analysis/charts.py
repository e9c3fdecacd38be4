"""Comparison pictures across runs, drawn from a frame.

Only rows that were measured the same way share a picture, and only rows of equal bits are ranked in one: each chart is
drawn per protocol or per block (see ``bench.analysis.frames``). A chart that the rows cannot fill is not made.
"""

from __future__ import annotations

import math
import textwrap
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator
from matplotlib.transforms import Bbox
from PIL.Image import Image

from backbones import BACKBONES
from bench.core.files import atomic_path
from bench.core.plots import tile
from bench.core.store import FAILURES, Run
from bench.priors.models import PRIORS
from bench.tokenizers.config import Config

from .frames import CLOCKED, METRICS, PRIOR_METRICS, blocks, prior_settings, protocols, settings, summary

WIDTH = 7.2  # inches: at this width a printed page keeps the text at its size
DPI = 120
TEXT = 8  # points, the smallest text
STYLE = {  # files are the same bytes each time, SVG text stays text, and a $ in a folder's name is no formula
    "svg.hashsalt": "vqbench",
    "svg.fonttype": "none",
    "text.parse_math": False,
}
PROTOCOLS, BLOCKS = 3, 6  # drawn at most, the largest first
POINTS = 200  # of one series; an SVG holds more as an image
HEAT_VALUES = 12  # columns of a heat map
LABELS = 12  # points with a label each
TICKS = 12  # values with a tick each
HUES = 8  # values of one setting among learning curves
CURVE_SEEDS, CURVES, CURVE_POINTS = 5, 150, 60  # seeds of one setting; runs in all; points of one run
PICTURES = 8  # images side by side
REFERENCE = {"color": "0.45", "linestyle": "--", "linewidth": 1.2}  # k-means on patches

BITS = ("codebook_size", "grid_size")  # the settings that change the bits of an image
DOUBLED = (*BITS, "bits_per_pixel")  # their axes are logarithmic to base 2
COSTS = ("params", "flops", "train_seconds", "images_per_second_decode")
DEFAULTS = {field.name: field.default for field in fields(Config) if field.default is not MISSING}
FIELD_LABELS = {"beta": "β", "codebook_size": "K", "grid_size": "grid size", "code_dim": "d", "lr": "learning rate"}
QUANTITIES = {"reconstruction": "reconstruction loss ↓", "lpips": "LPIPS loss ↓", "perplexity": "perplexity ↑"}

# The same for a backbone in every chart, whichever others stand beside it.
PALETTE = dict(zip(sorted(BACKBONES), sns.color_palette("colorblind", len(BACKBONES)).as_hex(), strict=True))
PRIOR_MARKERS = dict(zip(sorted(PRIORS), "Xosv^DP*", strict=False))
MARKERS = {name: "osD^vP*X"[i % 8] for i, name in enumerate(sorted(BACKBONES))}


class Chart(NamedTuple):
    """A chart on disk."""

    name: str  # file stem
    title: str
    caption: str  # what is shown, from how many runs, how they were measured, and what was left out
    path: Path  # the PNG; the SVG lies beside it


class Scope(NamedTuple):
    """Rows that may share a chart: those of one protocol, or of one block within it."""

    rows: pd.DataFrame  # finished
    unscored: pd.DataFrame  # not finished, on the same data and, in a block, of the same bits
    fields: list[str]  # swept settings that may be an axis here: bits change between blocks, the others within one
    suffix: str  # appended to names where there are several scopes
    title: str  # what sets this scope apart from the others
    note: str  # protocol in brief, and which scopes are not drawn


class Drawing(NamedTuple):
    """A chart that is not saved yet."""

    name: str
    title: str
    caption: str
    figure: Figure


def draw(
    table: pd.DataFrame, folder: Path, importances: pd.DataFrame | None = None, priors: pd.DataFrame | None = None
) -> list[Chart]:
    """Draws what ``table`` (of ``frame``) can show into ``folder/NAME.png`` and ``NAME.svg``.

    ``priors`` (of ``prior_frame``) are those over the codes of ``table``. ``importances`` has one row per ``backbone``
    and ``parameter`` with its ``importance``, which sums to 1 within a backbone. Returns the charts in
    reading order; none for rows without scores. Equal rows give equal bytes. Raises OSError where ``folder`` cannot be
    written.
    """
    charts = []
    with matplotlib.rc_context(STYLE):
        for drawing in _drawings(table.reset_index(drop=True), importances, priors):
            path = folder / f"{drawing.name}.png"
            _save(drawing, path)
            charts.append(Chart(drawing.name, drawing.title, drawing.caption, path))
    return charts


def _drawings(table: pd.DataFrame, importances: pd.DataFrame | None, priors: pd.DataFrame | None) -> Iterator[Drawing]:
    wide = _protocol_scopes(table)
    scopes = {"protocol": wide, "block": [block for scope in wide for block in _block_scopes(scope, len(wide))]}
    for chart, extent in CHARTS:
        for scope in scopes[extent]:
            for drawing in chart(scope):
                title = f"{drawing.title}, {scope.title}" if scope.title else drawing.title
                caption = f"{drawing.caption} {scope.note}"
                yield Drawing(f"{drawing.name}{scope.suffix}", title, caption, drawing.figure)
    for group in protocols(priors)[:1] if priors is not None else ():
        yield from generation(_usual(group), len(group))
        yield from samples(_usual(group))
    if importances is not None and len(importances):
        yield importance(importances)


def _save(drawing: Drawing, path: Path) -> None:
    """Writes the PNG at ``path`` and the SVG beside it."""
    figure = drawing.figure
    figure.suptitle(textwrap.fill(drawing.title, 80), x=0.01, ha="left", fontsize=10)
    with atomic_path(path) as temporary:
        FigureCanvasAgg(figure).print_png(temporary, metadata={"Software": None})
    figure.set_layout_engine("none")  # once is enough
    with atomic_path(path.with_name(f"{drawing.name}.svg")) as temporary:
        FigureCanvasSVG(figure).print_svg(temporary, metadata={"Date": None})


# Which rows share a chart


def _protocol_scopes(table: pd.DataFrame) -> list[Scope]:
    groups = [rows[rows[main_metric(rows)].notna()] for rows in protocols(table)]
    groups = [rows for rows in groups if len(rows)]
    shown = groups[:PROTOCOLS]
    telling = _telling(shown)
    unscored = table[table.status != "finished"]
    scopes = []
    for index, rows in enumerate(shown):
        first = rows.iloc[0]
        size = f"{first.image_size}×{first.image_size}"
        note = f"{_show(first.data)}, {first.protocol_count:.0f} validation images of {size}."
        if len(groups) > len(shown):
            note += f" {len(groups) - len(shown)} smaller groups with another protocol are not drawn."
        suffix = f"_protocol{index + 1}" if len(groups) > 1 else ""
        title = ", ".join(f"{name.removeprefix('protocol_')} {_show(first[name])}" for name in telling)
        swept = [name for name in BITS if name in settings(rows)]
        scopes.append(Scope(rows, _alike(unscored, rows, ["data", "image_size"]), swept, suffix, title, note))
    return scopes


def _telling(groups: list[pd.DataFrame]) -> list[str]:
    """As few protocol columns as tell the groups apart, digests only where nothing readable does."""
    if len(groups) < 2:
        return []
    heads = pd.concat([group.head(1) for group in groups]).astype(str)
    names = [name for name in heads if name.startswith("protocol_")]
    chosen, apart = [], 1
    readable = ["protocol_data", "protocol_image_size"]
    digests = ["protocol_fingerprint", "protocol_split"]
    for name in sorted(names, key=lambda name: (name in digests) - (name in readable)):
        count = len(heads[[*chosen, name]].drop_duplicates())
        if count > apart:
            chosen, apart = [*chosen, name], count
    return chosen


def _block_scopes(scope: Scope, protocols_drawn: int) -> list[Scope]:
    found = list(blocks(scope.rows))
    shown = sorted(found, key=len, reverse=True)[: max(1, BLOCKS // protocols_drawn)]
    scopes = []
    for rows in sorted(shown, key=lambda rows: rows.bits_per_image.iloc[0]):
        bits = f"{rows.bits_per_image.iloc[0]:g}"
        title, suffix, note = scope.title, scope.suffix, scope.note
        if len(found) > 1:
            title = ", ".join(filter(None, [title, f"{bits} bits per image"]))
            suffix += f"_{bits}bits"
        if len(found) > len(shown):
            note += f" {len(found) - len(shown)} smaller blocks of other bits per image are not drawn."
        swept = [name for name in settings(rows) if name not in BITS]
        scopes.append(Scope(rows, _alike(scope.unscored, rows, ["bits_per_pixel"]), swept, suffix, title, note))
    return scopes


def _alike(unscored: pd.DataFrame, rows: pd.DataFrame, columns: list[str]) -> pd.DataFrame:
    """Rows of ``unscored`` whose ``columns`` are those of ``rows``."""
    return unscored.merge(rows[columns].drop_duplicates())


def main_metric(table: pd.DataFrame) -> str:
    """The column that ranks the finished rows of ``table``: an LPIPS that no run was trained on, where there is one.

    A perceptual loss flatters its own metric: runs trained on lpips_alex are ranked by lpips_vgg, others by lpips_alex.
    Falls back to the LPIPS that was scored, then to psnr.
    """
    scored = table[table.status == "finished"]
    trained_on = (scored.lpips_weight > 0) & (scored.lpips_net == "alex")
    names = ("lpips_vgg", "lpips_alex") if trained_on.any() else ("lpips_alex", "lpips_vgg")
    return next((name for name in names if scored[name].notna().any()), "psnr")


def _best_first(rows: pd.DataFrame, metric: str) -> pd.DataFrame:
    return rows.sort_values(metric, ascending=METRICS[metric].better == "lower", kind="stable")


def _key_metrics(rows: pd.DataFrame) -> list[str]:
    fid = "fid" if rows.fid.notna().any() else "fid_vgg16"
    names = dict.fromkeys([main_metric(rows), fid, "psnr", "perplexity"])  # without an LPIPS the main one is psnr
    return [name for name in names if rows[name].notna().any()]


def controlled(rows: pd.DataFrame, free: list[str]) -> tuple[pd.DataFrame, dict[str, Any]]:
    """The slice of ``rows`` in which nothing but the backbone, the seed and the settings ``free`` varies.

    The other swept settings stand at their most common combination, between equally common ones at the one with most
    Config defaults. Returns the slice and what was fixed at which value.
    """
    others = [name for name in settings(rows) if name not in free]
    if not others:
        return rows, {}
    cell = rows.groupby(others, dropna=False).ngroup()
    size = cell.map(cell.value_counts())
    usual = sum((rows[name] == DEFAULTS.get(name)).astype(int) for name in others)
    best = np.lexsort((-cell, usual, size))[-1]
    return rows[cell == cell.iloc[best]], {name: rows[name].iloc[best] for name in others}


def _first_sweep(rows: pd.DataFrame) -> tuple[str | None, pd.DataFrame, str]:
    """The first swept setting with a controlled slice of several values, that slice, and what was fixed in words.

    Where there is none, None and the representative runs.
    """
    for field in settings(rows):
        part, fixed = controlled(rows, [field])
        if part[field].nunique() > 1:
            return field, part, _at(fixed)
    return None, *_representative(rows)


def _representative(rows: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """The runs of the most common setting if every backbone has it, else of equal bits each backbone's best, and which
    of the two in words."""
    part, fixed = controlled(rows, [])
    if part.backbone.nunique() == rows.backbone.nunique():
        return part, _at(fixed)
    block = max(blocks(rows), key=len)
    metric = main_metric(block)
    best = _best_first(block, metric).groupby("backbone").head(1)
    return best, f", each backbone's best by {METRICS[metric].label} (settings differ)"


def pareto(cost: pd.Series, score: pd.Series) -> pd.Series:
    """Which points no other point dominates: none is at most as high in both and lower in one.

    Lower is better in ``cost`` and ``score``, both (N,) without missing values; gives (N,) bool.
    """
    least = score.groupby(cost).min()
    bound = least.cummin().shift(fill_value=math.inf)  # the best score at any lower cost
    return (score == cost.map(least)) & (score < cost.map(bound))


# Words


def _label(name: str) -> str:
    """A setting or metric as an axis calls it; the arrow points where it gets better."""
    if name in METRICS:
        return f"{METRICS[name].label} {METRICS[name].arrow}".strip()
    return FIELD_LABELS.get(name, name.replace("_", " "))


def _show(value: Any) -> str:
    """A value in few characters; of a folder its last part."""
    if isinstance(value, float):
        return f"{value:.3g}"
    text = str(value)
    text = text.rpartition("/")[2] if text.startswith("folder:") else text
    return text if len(text) <= 24 else f"{text[:8]}…"


def _at(fixed: dict[str, Any]) -> str:
    pairs = ", ".join(f"{_label(name)} = {_show(value)}" for name, value in fixed.items())
    return f", at {pairs}" if fixed else ""


def _counted(scope: Scope, rows: pd.DataFrame, by: list[str], fixed: dict[str, Any]) -> str:
    """How many runs and seeds are shown, at which fixed settings, and how many are not."""
    seeds = rows.groupby(["backbone", *by], dropna=False).size()
    few, many = int(seeds.min()), int(seeds.max())
    count = f"{many} seed{'s' * (many > 1)}" if few == many else f"{few} to {many} seeds"
    missing = len(scope.unscored)
    left_out = f" {missing} failed or unfinished run{'s are' if missing > 1 else ' is'} left out." if missing else ""
    return f"{len(rows)} of {len(scope.rows)} scored runs, {count} a point{_at(fixed)}.{left_out}"


# Parts of figures


def _figure(height: float) -> Figure:
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
    figure.get_layout_engine().set(rect=(0.01, 0, 0.98, 1))  # room for fonts that run wider than the one measured
    FigureCanvasAgg(figure)
    return figure


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    """A figure with ``count`` axes, two a row."""
    rows, columns = math.ceil(count / 2), min(2, count)
    figure = _figure(0.8 + 2.1 * rows)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for spare in axes[count:]:
        spare.remove()
    return figure, axes[:count]


def _look(backbone: str) -> dict[str, Any]:
    """Colour and marker; a backbone that is no longer registered is dark grey."""
    return {"color": PALETTE.get(backbone, "0.25"), "marker": MARKERS.get(backbone, "p")}


def _legend(figure: Figure, backbones: list[str], lines: dict[str, dict[str, Any]], title: str | None = None) -> None:
    """Markers of ``backbones`` and ``lines`` by their label, below the axes."""
    looks = {name: {"linestyle": "none", "markersize": 5, **_look(name)} for name in sorted(backbones)}
    handles = [Line2D([], [], label=label, **look) for label, look in {**looks, **lines}.items()]
    style = {"fontsize": TEXT + 0.5, "title_fontsize": TEXT + 0.5}
    figure.legend(handles=handles, loc="outside lower center", ncols=min(6, len(handles)), title=title, **style)


def _positions(values: pd.Series) -> pd.Series:
    """Where values stand on an axis: numbers at themselves, others at 0, 1, … in order."""
    if _is_number(values):
        return values.astype(float)
    return values.map({level: float(i) for i, level in enumerate(_levels(values))})


def _levels(values: pd.Series, most: int | None = None) -> list[Any]:
    """The different values in order; at most ``most`` of them, evenly spaced, with both ends."""
    levels = sorted(values.dropna().unique(), key=None if _is_number(values) else str)
    count = min(len(levels), most or len(levels))
    return [levels[round(i)] for i in np.linspace(0, len(levels) - 1, count)]


def _is_number(values: pd.Series) -> bool:
    return pd.api.types.is_numeric_dtype(values) and not pd.api.types.is_bool_dtype(values)


def _scale_x(axes: Axes, values: pd.Series, name: str) -> None:
    """Ticks at the values, without labels that would touch; logarithmic from a ratio of 10 on, or if DOUBLED."""
    positions = _positions(values)
    ticks = pd.Series(values.to_numpy(), index=positions).dropna()
    ticks = ticks[~ticks.index.duplicated()].sort_index()
    low, high = ticks.index.min(), ticks.index.max()
    logarithmic = _is_number(values) and low > 0 and (high >= 10 * low or name in DOUBLED)
    if logarithmic:
        axes.set_xscale("log", base=2 if name in DOUBLED else 10)
    axes.set_xlabel(_label(name))
    if not _is_number(values):
        axes.set_xlim(low - 0.5, high + 0.5)
    place = np.log(ticks.index) if logarithmic else np.asarray(ticks.index)
    place = (place - place[0]) / max(place[-1] - place[0], 1e-12)
    if len(ticks) > TICKS and _is_number(values):
        if logarithmic:
            _plain_log(axes.xaxis, (1, 3))
        return
    labels, end = [], -math.inf
    for at, value in zip(place, ticks, strict=True):
        half = 0.014 * len(_show(value)) + 0.01  # of the axis; a character is about 5 points wide
        labels.append(_show(value) if at - half > end else "")
        end = at + half if labels[-1] else end
    axes.set_xticks(list(ticks.index), labels)
    axes.xaxis.set_minor_locator(NullLocator())


def _plain_log(axis: Axis, steps: tuple[int, ...] = (1, 2, 5)) -> None:
    """Ticks of a logarithmic axis at these multiples of powers of ten, as plain numbers."""
    axis.set_major_locator(LogLocator(subs=steps))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def _against(
    name: str, lines: list[pd.DataFrame], metrics: list[str], means: bool, more: dict[str, dict[str, Any]] | None = None
) -> Figure:
    """One axes per metric: runs as points against column ``name``, with ``means`` also their mean per backbone and
    value, joined within each of ``lines``, and k-means on patches. ``more``: further entries of the legend."""
    rows = pd.concat(lines)
    x, dodge = _positions(rows[name]), 0.0 if _is_number(rows[name]) else 0.12
    figure, panels = _panels(len(metrics))
    references = {}
    for axes, metric in zip(panels, metrics, strict=True):
        for line in lines:
            _series(axes, line, x, metric, means, dodge)
            if means and _reference(axes, line, x, metric):
                references = {"k-means on patches": REFERENCE}
        _scale_x(axes, rows[name], name)
        axes.set_ylabel(_label(metric))
    _legend(figure, list(rows.backbone.unique()), references | (more or {}))
    return figure


def _series(axes: Axes, rows: pd.DataFrame, x: pd.Series, metric: str, means: bool, dodge: float) -> None:
    """Runs as points, and per backbone means over equal ``x`` ± standard deviation: joined, or side by side."""
    names = sorted(rows.backbone.unique())
    for index, name in enumerate(names):
        look = _look(name)
        own = rows[rows.backbone == name]
        at = x[own.index] + dodge * (index - (len(names) - 1) / 2)
        size = 9 if means else 24
        axes.scatter(at, own[metric], s=size, alpha=0.5, linewidths=0, rasterized=len(own) > POINTS, **look)
        mean, std = own[metric].groupby(at).mean(), own[metric].groupby(at).std()
        if means and dodge:
            axes.errorbar(mean.index, mean, std, linestyle="none", markersize=5, capsize=2, **look)
        elif means:
            axes.plot(mean.index, mean, markersize=4, linewidth=1.4, **look)
            axes.fill_between(mean.index, mean - std, mean + std, color=look["color"], alpha=0.15, linewidth=0)


def _reference(axes: Axes, rows: pd.DataFrame, x: pd.Series, metric: str) -> bool:
    """K-means on patches at the same bits, where it was scored. Tells whether it was."""
    name = f"{metric}_kmeans"
    if name not in rows or rows[name].isna().all():
        return False
    mean = rows[name].groupby(x[rows.index]).mean()
    axes.plot(mean.index, mean, marker="_", zorder=1, **REFERENCE)
    return True


# Charts


def sweeps(scope: Scope) -> Iterator[Drawing]:
    """``sweep_FIELD``: key metrics against each swept setting, the others fixed.

    Where no two runs differ in that setting alone, as after a random search, all runs are shown as points.
    """
    for field in scope.fields:
        rows, fixed = controlled(scope.rows, [field])
        alone = rows[field].nunique() > 1
        if not alone:
            rows, fixed = scope.rows, {}
        rows = rows[rows[field].notna()]
        if rows[field].nunique() < 2:
            continue
        figure = _against(field, [rows], _key_metrics(rows), means=alone)
        shape = "Line and band" if _is_number(rows[field]) else "Marker and bar"
        caption = f"{shape}: mean ± standard deviation over seeds. {_counted(scope, rows, [field], fixed)}"
        if not alone:
            caption = f"All {len(rows)} scored runs. The other settings vary too: this one's own effect does not show."
        if field in BITS:
            caption += " The bits of an image differ along the axis."
        yield Drawing(f"sweep_{field}", f"Effect of {_label(field)}", caption, figure)


def heatmaps(scope: Scope) -> Iterator[Drawing]:
    """``heatmap_backbone_FIELD``: the main metric's mean ± std per backbone and value of each swept setting."""
    for field in scope.fields:
        rows, fixed = controlled(scope.rows, [field])
        if rows.backbone.nunique() < 2 or not 2 <= rows[field].nunique() <= HEAT_VALUES:
            continue
        metric = main_metric(rows)
        groups = rows.groupby(["backbone", field])[metric]
        mean, std = groups.mean().unstack(), groups.std().unstack()
        form = METRICS[metric].form
        words = [
            [f"{m:{form}}" + (f"\n±{s:{form}}" if s == s else "") for m, s in zip(*pair, strict=True)]
            for pair in zip(mean.to_numpy(), std.to_numpy(), strict=True)
        ]
        figure = _figure(1.1 + 0.45 * len(mean))
        axes = figure.subplots()
        lower = METRICS[metric].better == "lower"
        sns.heatmap(
            mean.set_axis([_show(value) for value in mean.columns], axis=1),
            annot=np.array(words),
            fmt="",
            annot_kws={"fontsize": TEXT},
            cmap="viridis_r" if lower else "viridis",
            cbar_kws={"label": f"{_label(metric)}\nyellow is best", "format": f"{{x:{form}}}"},
            linewidths=1,
            ax=axes,
        )
        axes.set(xlabel=_label(field), ylabel="", facecolor="0.9")
        axes.grid(False)
        axes.tick_params(axis="y", rotation=0)
        caption = f"Mean ± standard deviation over seeds. {_counted(scope, rows, [field], fixed)}"
        caption += " The bits of an image differ between columns." if field in BITS else ""
        caption += " Grey: no run has a score." if mean.isna().any(axis=None) else ""
        title = f"{METRICS[metric].label} by backbone and {_label(field)}"
        yield Drawing(f"heatmap_backbone_{field}", title, caption, figure)


def rate_distortion(scope: Scope) -> Iterator[Drawing]:
    """``rate_distortion``: metrics against bits per pixel; where K is swept, one line per grid size."""
    rows, fixed = controlled(scope.rows, list(BITS))
    coded = rows[rows.coded_bits_per_pixel.notna()] if "coded_bits_per_pixel" in rows else rows.iloc[:0]
    if rows.bits_per_pixel.nunique() < 2 and coded.empty:
        return
    per_grid = rows.groupby("grid_size").codebook_size.nunique().max() > 1
    lines = [line for _, line in rows.groupby("grid_size")] if per_grid else [rows]
    metrics = [metric for metric in _key_metrics(rows) if metric != "perplexity"]
    hollow = {"marker": "o", "color": "0.4", "markerfacecolor": "white", "linestyle": ":", "linewidth": 0.8}
    more = {"entropy-coded": {**hollow, "markersize": 5}} if len(coded) else None
    figure = _against("bits_per_pixel", lines, metrics, means=True, more=more)
    if len(coded):
        _entropy_coded(figure, coded, metrics)
    joined = "Lines join equal grid sizes" if per_grid and len(lines) > 1 else "Lines join means over seeds"
    caption = f"{joined}; bands: ± standard deviation. {_counted(scope, rows, list(BITS), fixed)}"
    if len(coded):
        caption += " Hollow: the same at the rate of an entropy coder with the best prior trained over those codes."
    yield Drawing("rate_distortion", "Rate and distortion", caption, figure)


def _entropy_coded(figure: Figure, rows: pd.DataFrame, metrics: list[str]) -> None:
    """Adds to ``rate_distortion`` where each mean moves when codes are sent at the rate of their best prior."""
    means = rows.groupby(["backbone", "bits_per_pixel"])[["coded_bits_per_pixel", *metrics]].mean().reset_index()
    means = means[means.coded_bits_per_pixel > 0]  # one code in all takes none, and the axis is logarithmic
    if means.empty:
        return
    for axes, metric in zip(figure.axes, metrics, strict=True):
        for _, row in means.iterrows():
            look = _look(row.backbone)
            at = [row.coded_bits_per_pixel, row.bits_per_pixel], [row[metric], row[metric]]
            axes.plot(*at, color=look["color"], linewidth=0.8, linestyle=":", zorder=1)
            axes.plot(*(ends[:1] for ends in at), linestyle="none", markersize=5, markerfacecolor="white", **look)
        low = min(means.coded_bits_per_pixel.min(), axes.get_xticks().min())
        high = max(means.coded_bits_per_pixel.max(), axes.get_xticks().max())
        axes.set_xlim(low / (high / low) ** 0.1 / 1.05, high * (high / low) ** 0.1 * 1.05)
        ticks = [*axes.get_xticks(), *({low} if low < 0.8 * axes.get_xticks().min() else ())]
        axes.set_xticks(sorted(ticks), [f"{tick:.3g}" for tick in sorted(ticks)])


def _usual(priors: pd.DataFrame) -> pd.DataFrame:
    """Of each kind of prior those with its most common settings, grid and K apart."""
    names = [name for name in prior_settings(priors) if name not in BITS]
    if not names:
        return priors
    settings_of = priors[names].astype(str).agg(" ".join, axis=1)
    return priors[settings_of == settings_of.groupby(priors.prior).transform(lambda own: own.mode().iloc[0])]


def generation(rows: pd.DataFrame, known: int) -> Iterator[Drawing]:
    """``generation``: how far samples are from real images against what the prior makes of the codes, per backbone and
    prior; where the grid is swept, its sizes are joined."""
    metrics = [name for name in ("gfid", "gfid_vgg16", "gkid_vgg16") if rows[name].notna().all()][:2]
    names = ["coded_bits_per_pixel", *metrics, *(f"{metric}_real" for metric in metrics)]
    means = rows.groupby(["backbone", "prior", "grid_size", "codebook_size"])[names].mean().reset_index()
    figure, panels = _panels(len(metrics))
    rates = rows.coded_bits_per_pixel
    for axes, metric in zip(panels, metrics, strict=True):
        for (backbone, prior), line in means.groupby(["backbone", "prior"]):
            look = {"color": _look(backbone)["color"], "marker": PRIOR_MARKERS.get(prior, "p")}
            axes.plot(line.coded_bits_per_pixel, line[metric], markersize=5, linewidth=0.9, alpha=0.9, **look)
        for backbone, height in means.groupby("backbone")[f"{metric}_real"].min().items():
            axes.axhline(height, color=_look(backbone)["color"], linewidth=0.8, linestyle=":", zorder=0)
        if rates.max() > 4 * rates.min():
            axes.set_xscale("log")
            _plain_log(axes.xaxis)
        axes.set(xlabel="bits per pixel under the prior ↓", ylabel=f"{PRIOR_METRICS[metric].label} ↓")
    looks = {name: {"color": _look(name)["color"], "linewidth": 3} for name in sorted(rows.backbone.unique())}
    grey = {"color": "0.35", "linestyle": "none", "markersize": 5}
    looks |= {name: {"marker": PRIOR_MARKERS.get(name, "p"), **grey} for name in sorted(rows.prior.unique())}
    looks["real codes"] = {"color": "0.4", "linestyle": ":", "linewidth": 0.8}
    _legend(figure, [], looks)
    first = rows.iloc[0]
    count = f"{len(rows)} priors" if len(rows) == known else f"{len(rows)} of {known} priors, those with equal settings"
    caption = f"{count}, means over seeds; {first.samples} samples each, at temperature "
    caption += (
        f"{first.temperature:g}, against all {first.protocol_count:.0f} validation images of {_show(first.data)} "
    )
    caption += (
        f"at {first.image_size}×{first.image_size}. Lines join grid sizes. Dotted: training codes, decoded, which "
    )
    caption += "a perfect prior would reach, at the grid where they are best."
    yield Drawing("generation", "Rate and generation", caption, figure)


def samples(rows: pd.DataFrame) -> Iterator[Drawing]:
    """``samples``: a row of samples per prior and backbone, of the largest grid's lowest seed."""
    rows = rows[rows.grid_size == rows.grid_size.max()].sort_values(["backbone", "prior", "seed"], kind="stable")
    rows = rows.groupby(["backbone", "prior"]).head(1).sort_values("coded_bits_per_pixel").head(HUES)
    kept = [(row, images) for _, row in rows.iterrows() if (images := _kept(row.folder, "x")) is not None]
    if not kept:
        return
    labels = [f"{row.prior}\nover {row.backbone}\n{row.coded_bits_per_token:.2f} bits" for row, _ in kept]
    picture = tile([images for _, images in kept], scale=max(1, 128 // kept[0][1].shape[1]))
    caption = f"One prior per row, of seed {kept[0][0].seed}, at the grid of {kept[0][0].grid_size}×"
    caption += f"{kept[0][0].grid_size} codes, lowest rate first; bits per token. Samples are not chosen."
    yield Drawing("samples", "Samples", caption, _rows(picture, labels))


def cost(scope: Scope) -> Iterator[Drawing]:
    """``cost``: the main metric against what a tokenizer costs; clocked costs only if one machine made all rows."""
    metric = main_metric(scope.rows)
    table = summary(scope.rows)
    one_machine = len(scope.rows[["processor", "threads"]].drop_duplicates()) == 1
    scored = [name for name in COSTS if scope.rows[name].notna().any()]
    names = [name for name in scored if one_machine or name not in CLOCKED]
    if len(table) < 2 or not names:
        return
    figure, panels = _panels(len(names))
    for axes, name in zip(panels, names, strict=True):
        _cost_panel(axes, table.dropna(subset=[name, metric]), name, metric)
    _legend(figure, list(table.backbone), {"Pareto front": {"color": "0.3", "linewidth": 1}})
    figure.draw_without_rendering()
    varied = settings(scope.rows)
    for axes, name in zip(panels, names, strict=True):
        _annotate(axes, table.dropna(subset=[name, metric]), name, metric, varied or ["backbone"])
    caption = "Mean ± standard deviation over seeds; ringed: no other point is both cheaper and better. "
    caption += f"Beside the points: {', '.join(map(_label, varied))}. " if varied else ""
    if len(names) < len(scored):
        caption += "Times are left out: the runs were made on different processors or numbers of threads. "
    caption += _counted(scope, scope.rows, varied, {})
    yield Drawing("cost", f"{METRICS[metric].label} against cost", caption, figure)


def _cost_panel(axes: Axes, table: pd.DataFrame, name: str, metric: str) -> None:
    """Means with error bars, and the Pareto front as steps through ringed points."""
    for backbone, own in table.groupby("backbone"):
        axes.errorbar(
            own[name],
            own[metric],
            yerr=own[f"{metric}_std"],
            linestyle="none",
            markersize=5,
            elinewidth=0.8,
            **_look(backbone),
        )
    front = _front(table, name, metric)
    axes.plot(front[name], front[metric], color="0.3", linewidth=1, drawstyle="steps-post", zorder=1)
    axes.scatter(front[name], front[metric], s=80, facecolors="none", edgecolors="0.3", linewidths=1, zorder=3)
    if table[name].min() > 0 and table[name].max() >= 3 * table[name].min():
        axes.set_xscale("log")
        _plain_log(axes.xaxis)
    else:  # so narrow that a logarithm looks the same and has no round ticks
        axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.margins(0.2)
    axes.set(xlabel=_label(name), ylabel=_label(metric))


def _front(table: pd.DataFrame, name: str, metric: str) -> pd.DataFrame:
    """The rows on the Pareto front, cheapest first."""
    cost, score = (table[column] * {"lower": 1, "higher": -1}[METRICS[column].better] for column in (name, metric))
    return table[pareto(cost, score)].sort_values(name, ascending=METRICS[name].better == "lower")


def _occupied(axes: Axes, table: pd.DataFrame, name: str, metric: str) -> list[Bbox]:
    """Where points with their error bars, and the Pareto front's steps, lie in the picture."""

    def boxes(starts: np.ndarray, ends: np.ndarray, margin: float) -> list[Bbox]:
        starts, ends = axes.transData.transform(starts), axes.transData.transform(ends)
        low, high = np.minimum(starts, ends) - margin, np.maximum(starts, ends) + margin
        return [Bbox(pair) for pair in zip(low, high, strict=True)]

    points = table[[name, metric]].to_numpy()
    bars = np.column_stack([np.zeros(len(table)), table[f"{metric}_std"].fillna(0)])
    steps = _front(table, name, metric)[[name, metric]].to_numpy()
    corners = np.column_stack([steps[1:, 0], steps[:-1, 1]])
    radius = 5 * DPI / 72  # 5 points
    return boxes(points - bars, points + bars, radius) + boxes(steps[:-1], corners, 1) + boxes(corners, steps[1:], 1)


def _annotate(axes: Axes, table: pd.DataFrame, name: str, metric: str, words: list[str]) -> None:
    """Writes each point's ``words`` beside it where they cover neither a point nor each other; of many, the front's."""
    places = [(7, 0), (-7, 0), (0, 8), (0, -8), (6, 7), (-6, 7), (6, -7), (-6, -7)]  # offsets in points
    taken = _occupied(axes, table, name, metric)
    shown = table if len(table) <= LABELS else _front(table, name, metric)
    for _, row in shown.iterrows():
        for dx, dy in places:
            label = axes.annotate(
                ", ".join(_show(row[word]) for word in words),
                (row[name], row[metric]),
                (dx, dy),
                textcoords="offset points",
                ha="left" if dx > 0 else "right" if dx < 0 else "center",
                va="bottom" if dy > 0 else "top" if dy < 0 else "center",
                fontsize=TEXT,
            )
            label.set_in_layout(False)
            box = label.get_window_extent()
            inside = axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1 and axes.bbox.y0 <= box.y0 <= axes.bbox.y1
            if inside and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
            label.remove()


def learning_curves(scope: Scope) -> Iterator[Drawing]:
    """``learning_curves``: training losses and perplexity against steps, of the first swept setting's values.

    Runs that failed are dashed up to ×, where they stopped.
    """
    stopped = scope.unscored[scope.unscored.status.isin(FAILURES)]
    field, rows, words = _first_sweep(pd.concat([scope.rows, stopped], ignore_index=True))
    values = _levels(rows[field or "backbone"], HUES)
    rows = rows[rows[field or "backbone"].isin(values)]
    setting = ["backbone", field] if field else ["backbone"]
    seeds = max(1, min(CURVE_SEEDS, CURVES // rows.groupby(setting).ngroups))
    rows = rows.sort_values("seed", kind="stable").groupby(setting).head(seeds)
    curves = {index: _history(folder) for index, folder in rows.folder.items()}
    known = [name for name in QUANTITIES if any(name in curve for curve in curves.values())]
    if not known:
        return
    ramp = sns.color_palette("viridis" if _is_number(rows[field or "backbone"]) else "Dark2", len(values) + 1)
    colours = {value: ramp[i] if field else _look(value)["color"] for i, value in enumerate(values)}
    figure, grid = _curve_axes(known, sorted(rows.backbone.unique()) if field else [""])
    for (quantity, backbone), axes in grid.items():
        shown = rows[rows.backbone == backbone] if backbone else rows
        for value, runs in shown.groupby(field or "backbone"):
            _curves(axes, runs, curves, quantity, colours[value])
    lines = {_show(value): {"color": colours[value]} for value in values}  # without viridis' last: too faint a yellow
    if (rows.status != "finished").any():
        lines["stopped"] = {"color": "0.3", "linestyle": "--", "marker": "x", "markersize": 5}
    _legend(figure, [], lines, title=_label(field) if field else None)
    caption = f"Thin: {len(rows)} of {len(scope.rows) + len(stopped)} runs, at most {seeds} seeds of a setting{words}, "
    caption += f"averaged to {CURVE_POINTS} points; bold: mean over finished seeds."
    if field and len(values) < scope.rows[field].nunique():
        caption += f" Not all values of {_label(field)} are shown."
    title = f"Learning curves by {_label(field)}" if field else "Learning curves"
    yield Drawing("learning_curves", title, caption, figure)


def _history(folder: str) -> pd.DataFrame:
    """A run's history as means over at most CURVE_POINTS windows; no rows where it cannot be read."""
    try:
        history = pd.DataFrame(Run(Path(folder)).history())
    except (OSError, ValueError):
        return pd.DataFrame()
    return history.groupby(np.arange(len(history)) // math.ceil(max(1, len(history) / CURVE_POINTS))).mean()


def _curve_axes(quantities: list[str], names: list[str]) -> tuple[Figure, dict[tuple[str, str], Axes]]:
    """One axes per quantity and column of ``names``; without names, the quantities side by side."""
    if names == [""]:
        figure = _figure(2.9)
        panels = figure.subplots(1, len(quantities), squeeze=False).T
    else:
        figure = _figure(0.8 + 1.7 * len(quantities))
        panels = figure.subplots(len(quantities), len(names), squeeze=False, sharex="col", sharey="row")
    grid = {(quantity, name): panels[i, j] for i, quantity in enumerate(quantities) for j, name in enumerate(names)}
    for (quantity, name), axes in grid.items():
        if quantity != "perplexity":
            axes.set_yscale("log")
            _plain_log(axes.yaxis)
        axes.xaxis.set_major_locator(MaxNLocator(3))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        if name == names[0]:
            axes.set_ylabel(QUANTITIES[quantity])
        if quantity == quantities[0]:
            axes.set_title(name, fontsize=9)
        if quantity == quantities[-1] or names == [""]:
            axes.set_xlabel("step")
    return figure, grid


def _curves(axes: Axes, rows: pd.DataFrame, curves: dict[int, pd.DataFrame], quantity: str, colour: Any) -> None:
    """One thin line per run, dashed to × for one that failed, and the bold mean of the finished."""
    finished = []
    for index, row in rows.iterrows():
        if quantity not in curves[index]:
            continue
        line = curves[index].set_index("step")[quantity]
        line = line[np.isfinite(line)]
        if row.status == "finished":
            finished.append(line)
            axes.plot(line.index, line, color=colour, linewidth=0.6, alpha=0.5)
        else:
            axes.plot(line.index, line, color=colour, linewidth=1, linestyle="--")
            axes.plot(line.index[-1:], line.iloc[-1:], color=colour, marker="x", markersize=5, markeredgewidth=1.5)
    if finished:
        mean = pd.concat(finished, axis=1).mean(axis=1)
        axes.plot(mean.index, mean, color=colour, linewidth=1.4)


def importance(importances: pd.DataFrame) -> Drawing:
    """``importance``: how much each setting matters, per backbone, largest on top."""
    order = importances.groupby("parameter").importance.mean().sort_values(ascending=False).index
    backbones = sorted(importances.backbone.unique())
    figure = _figure(1.1 + 0.14 * len(order) * (len(backbones) + 1))
    axes = figure.subplots()
    thick = 0.8 / len(backbones)
    for i, backbone in enumerate(backbones):
        own = importances[importances.backbone == backbone].groupby("parameter").importance.mean().reindex(order)
        axes.barh(np.arange(len(order)) + (i + 0.5) * thick - 0.4, own, 0.9 * thick, color=_look(backbone)["color"])
    axes.set_yticks(range(len(order)), [_label(name) for name in order])
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    axes.set_xlabel("importance (share within a backbone)")
    _legend(figure, backbones, {})
    caption = "How much of the variation between runs each setting, or the seed, explains: shares within a backbone."
    return Drawing("importance", "Which settings matter", caption, figure)


def reconstructions(scope: Scope) -> Iterator[Drawing]:
    """``reconstructions``: the same images by every backbone; ``reconstructions_FIELD``: by the first swept setting's
    values, in the backbone that is best there."""
    yield from _gallery(*_representative(scope.rows), "backbone", "reconstructions", "Reconstructions")
    field, rows, words = _first_sweep(scope.rows)
    if field:
        metric = main_metric(rows)
        best = _best_first(rows.groupby("backbone")[[metric]].mean(), metric).index[0]
        rows = rows[(rows.backbone == best) & rows[field].isin(_levels(rows[field], HUES))]
        title = f"Reconstructions by {_label(field)}, {best}"
        yield from _gallery(rows, words, field, f"reconstructions_{field}", title)


def _gallery(rows: pd.DataFrame, words: str, by: str, name: str, title: str) -> Iterator[Drawing]:
    """Originals, then a row of reconstructions per value of ``by``: of its lowest seed that kept samples of them."""
    seeds = [own.iterrows() for _, own in rows.sort_values("seed", kind="stable").groupby(by)]
    kept = [next(((row, *pair) for _, row in own if (pair := _samples(row.folder))), None) for own in seeds]
    kept = [found for found in kept if found]
    same = [found for found in kept if np.array_equal(found[1], kept[0][1])]
    if not same:
        return
    metrics = dict.fromkeys([main_metric(rows), "psnr"])
    labels = ["original"]
    for row, _, _ in same:
        scores = [f"{METRICS[metric].label} {row[metric]:{METRICS[metric].form}}" for metric in metrics]
        labels.append("\n".join([row.backbone if by == "backbone" else f"{_label(by)} = {_show(row[by])}", *scores]))
    picture = tile([same[0][1], *(x_hat for _, _, x_hat in same)], scale=max(1, 128 // same[0][1].shape[1]))
    figure = _rows(picture, labels)
    caption = f"One run per row, the lowest seed{words}; scores are means over the whole validation set."
    if by in BITS:
        caption += " The bits of an image differ between rows."
    if len(same) < len(kept):
        caption += f" {len(kept) - len(same)} of {len(kept)} runs kept other images and are left out."
    yield Drawing(name, title, caption, figure)


def _rows(picture: Image, labels: list[str]) -> Figure:
    """A figure of ``picture``, rows of tiles with a label each."""
    figure = _figure(0.4 + min(0.83 * WIDTH * picture.height / picture.width, 1.2 * len(labels)))
    axes = figure.subplots()
    axes.imshow(picture)
    axes.set_yticks((np.arange(len(labels)) + 0.5) * picture.height / len(labels), labels, fontsize=TEXT)
    axes.tick_params(length=0)
    axes.set_xticks([])
    axes.grid(False)
    sns.despine(ax=axes, left=True, bottom=True)
    return figure


def _samples(folder: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Up to PICTURES images that a run kept and their reconstructions, (N, H, W, 3) uint8; None without them."""
    pair = _kept(folder, "x"), _kept(folder, "x_hat")
    return pair if all(images is not None for images in pair) else None


def _kept(folder: str, name: str) -> np.ndarray | None:
    """Up to PICTURES images of that name that a run kept, (N, H, W, 3) uint8; None without them."""
    try:
        with np.load(Path(folder) / "samples.npz") as arrays:
            return arrays[name][:PICTURES]
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error):
        return None


# What is drawn, in reading order, and from which rows: all of one protocol, or only those of equal bits.
CHARTS: list[tuple[Callable[[Scope], Iterator[Drawing]], str]] = [
    (sweeps, "protocol"),
    (sweeps, "block"),
    (heatmaps, "protocol"),
    (heatmaps, "block"),
    (rate_distortion, "protocol"),
    (cost, "block"),
    (learning_curves, "protocol"),
    (reconstructions, "protocol"),
]
