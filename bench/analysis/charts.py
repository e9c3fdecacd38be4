"""Comparison pictures across runs, drawn from a frame.

Only rows that were measured the same way share a picture, and only rows of equal bits are ranked in one: each chart is
drawn per protocol or per block (see ``bench.analysis.frames``). A chart that the rows cannot fill is not made.
"""

import io
import math
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from bench.core.files import atomic_path
from bench.core.runs import HELD_OUT

from . import looks, references, vectors
from .frames import METRICS, PRIOR_METRICS, main_metric, protocols, settings
from .fronts import cost
from .galleries import codebook_loss, learning_curves, reconstructions, samples, untrained, wrong_codes
from .labels import BITS, brief, label_of, told
from .looks import Drawing, is_number, look_of
from .slices import Scope, block_scopes, controlled, counted, key_metrics, listed, protocol_scopes, usual, usual_words

STYLE = {  # files are the same bytes each time, SVG text stays text, and a $ in a folder's name is no formula
    "svg.hashsalt": "vqbench",
    "svg.fonttype": "none",
    "text.parse_math": False,
}
REFERENCE = {"color": "0.45", "linestyle": "--", "linewidth": 1.2, "marker": "_"}  # k-means on patches


class Chart(NamedTuple):
    """A chart on disk."""

    name: str  # file stem
    title: str
    caption: str  # what is shown, from how many runs, how they were measured, and what was left out
    path: Path  # the PNG; the SVG, without the title, lies beside it
    head: int = 0  # rows of the PNG's pixels that its title takes
    drawn: bool = False  # and no photographs


def draw(
    table: pd.DataFrame, folder: Path, importances: pd.DataFrame | None = None, priors: pd.DataFrame | None = None
) -> list[Chart]:
    """Draws what ``table`` (of ``frame``) can show into ``folder/NAME.png`` and ``NAME.svg``.

    ``priors`` is the frame of those over the codes of ``table``. ``importances`` has one row per ``backbone`` and
    ``parameter`` with its ``importance``, which sums to 1 within a backbone. Returns the charts in reading order; none
    for rows without scores. Equal rows give equal bytes. Raises OSError where ``folder`` cannot be written.
    """
    with matplotlib.rc_context(STYLE):
        return [_saved(drawing, folder) for drawing in _drawings(table.reset_index(drop=True), importances, priors)]


def _drawings(table: pd.DataFrame, importances: pd.DataFrame | None, priors: pd.DataFrame | None) -> Iterator[Drawing]:
    wide = protocol_scopes(table)
    scopes = {"protocol": wide, "block": [block for scope in wide for block in block_scopes(scope, len(wide))]}
    for chart, extent in CHARTS:
        for scope in scopes[extent]:
            for drawing in chart(scope):
                title = f"{drawing.title}, {scope.title}" if scope.title else drawing.title
                caption = f"{drawing.caption} {scope.note}"
                yield Drawing(f"{drawing.name}{scope.suffix}", title, caption, drawing.figure)
    for group in protocols(priors)[:1] if priors is not None else ():
        if "role" in table:  # of a search, whose trials agree in nothing
            yield from generation(group, len(group), apart=True)
        else:
            yield from generation(usual(group), len(group), usual_words(group))
        yield from samples(usual(group), usual_words(group))
    if importances is not None and len(importances):
        yield importance(importances)


def _saved(drawing: Drawing, folder: Path) -> Chart:
    """Writes PNG and SVG into ``folder``."""
    name, title, caption, figure = drawing
    head = figure.suptitle(textwrap.fill(title, 80), x=0.01, ha="left", fontsize=10)
    with atomic_path(folder / f"{name}.png") as temporary:
        figure.canvas.print_png(temporary, metadata={"Software": None})
    figure.set_layout_engine("none")  # once is enough
    height, top = figure.bbox.height, math.floor(head.get_window_extent().y0)
    head.set_visible(False)
    written = io.BytesIO()
    below = Bbox([[0, 0], [figure.get_figwidth(), top / figure.dpi]])
    figure.savefig(written, format="svg", metadata={"Date": None}, bbox_inches=below)
    with atomic_path(folder / f"{name}.svg") as temporary:
        temporary.write_text(vectors.with_words(written.getvalue()), encoding="utf-8")
    drawn = not any(axes.images for axes in figure.axes)
    return Chart(name, title, caption, folder / f"{name}.png", round(height) - top, drawn)


def _against(name: str, lines: list[pd.DataFrame], metrics: list[str], means: bool, more: looks.Entries) -> Figure:
    """One axes per metric: runs as points against column ``name``, with ``means`` also their mean per backbone and
    value, joined within each of ``lines``, and k-means on patches. ``more``: further entries of the legend."""
    rows = pd.concat(lines)
    x, dodge = looks.places_of(rows[name]), 0.0 if is_number(rows[name]) else 0.12
    figure, panels = looks.new_panels(len(metrics))
    entries = dict(more)
    for axes, metric in zip(panels, metrics, strict=True):
        for line in lines:
            _series(axes, line, x, metric, means, dodge)
            reference = f"{metric}_kmeans"
            if means and reference in line and line[reference].notna().any():
                mean = line[reference].groupby(x[line.index]).mean()
                look = REFERENCE if len(mean) > 1 else REFERENCE | {"linestyle": "none"}  # which joins nothing
                axes.plot(mean.index, mean, zorder=1, **look)
                entries = {"k-means on patches": look} | more
        looks.scale_x(axes, rows[name], name)
        looks.least_span(axes)
        axes.set_ylabel(label_of(metric))
    looks.add_legend(figure, list(rows.backbone.unique()), entries)
    return figure


def _series(axes: Axes, rows: pd.DataFrame, x: pd.Series, metric: str, means: bool, dodge: float) -> None:
    """Runs as points, and per backbone means over equal ``x`` ± standard deviation: joined, or side by side."""
    names = sorted(rows.backbone.unique())
    for index, name in enumerate(names):
        look = look_of(name)
        own = rows[rows.backbone == name]
        at = x[own.index] + dodge * (index - (len(names) - 1) / 2)
        style = {"s": 9 if means else 24, "alpha": 0.5, "linewidths": 0, "rasterized": len(own) > looks.MANY}
        known = own[own[metric].notna() & at.notna()]
        points = axes.scatter(at[known.index], known[metric], **style, **look)
        vectors.tell(points, [f"{run.run_id}, seed {run.seed}: {told(run, metric)}" for _, run in known.iterrows()])
        mean, std = own[metric].groupby(at).mean(), own[metric].groupby(at).std()
        if means and dodge:
            axes.errorbar(mean.index, mean, std, linestyle="none", markersize=5, capsize=2, **look)
        elif means:
            axes.plot(mean.index, mean, markersize=4, linewidth=1.4, **look)
            axes.fill_between(mean.index, mean - std, mean + std, color=look["color"], alpha=0.15, linewidth=0)


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
        figure = _against(field, [rows], key_metrics(rows), alone, {})
        if alone:
            shape = "Line and band" if is_number(rows[field]) else "Marker and bar"
            caption = f"{shape}: mean ± standard deviation over seeds. {counted(scope, rows, [field], fixed)}"
        else:
            others = listed([name for name in settings(rows) if name != field])
            caption = f"All {len(rows)} scored runs, whatever their {others}: this one's own effect does not show."
        if field in BITS:
            caption += " The bits of an image differ along the axis."
        yield Drawing(f"sweep_{field}", f"Effect of {label_of(field)}", caption, figure)


HEAT_VALUES = 12  # columns of a heat map


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
        figure = looks.new_figure(1.1 + 0.45 * len(mean))
        axes = figure.subplots()
        sns.heatmap(
            mean.set_axis([brief(value) for value in mean.columns], axis=1),
            annot=np.array(words),
            fmt="",
            annot_kws={"fontsize": looks.TEXT},
            cmap="viridis_r" if METRICS[metric].better == "lower" else "viridis",
            cbar_kws={"label": f"{label_of(metric)}\nyellow is best", "format": f"{{x:{form}}}"},
            linewidths=1,
            ax=axes,
        )
        for text in axes.texts:  # no greys, which a page turns round in the dark
            text.set_color("#fffffe" if text.get_color() == "w" else "#26262a")
        axes.set(xlabel=label_of(field), ylabel="", facecolor="0.9")
        axes.grid(False)
        axes.tick_params(axis="y", rotation=0)
        caption = f"Mean ± standard deviation over seeds. {counted(scope, rows, [field], fixed)}"
        caption += " The bits of an image differ between columns." if field in BITS else ""
        caption += " Grey: no run has a score." if mean.isna().any(axis=None) else ""
        title = f"{METRICS[metric].label} by backbone and {label_of(field)}"
        yield Drawing(f"heatmap_backbone_{field}", title, caption, figure)


def rate_distortion(scope: Scope) -> Iterator[Drawing]:
    """``rate_distortion``: metrics against bits per pixel, beside image formats and latents without codes; where K is
    swept, one line per grid size. Where runs of other bits differ in other settings too, as after a random search, all
    are shown as points, and the front of each backbone. Of a search, whose rows have a ``role``, always."""
    rows, fixed = controlled(scope.rows, list(BITS))
    alone = rows.bits_per_pixel.nunique() > 1 or scope.rows.bits_per_pixel.nunique() < 2
    alone = alone and "role" not in rows  # of a search, where all trials count
    rows, fixed = (rows, fixed) if alone else (scope.rows, {})
    coded = rows.dropna(subset="coded_bits_per_pixel") if "coded_bits_per_pixel" in rows else rows.iloc[:0]
    latents = scope.rows.iloc[:0] if scope.latents is None else scope.latents
    others = bool(references.formats_in(rows)) or len(references.beside(rows, latents)) > 0
    if rows.bits_per_pixel.nunique() < 2 and coded.empty and not others:
        return
    per_grid = alone and rows.groupby("grid_size").codebook_size.nunique().max() > 1
    lines = [line for _, line in rows.groupby("grid_size")] if per_grid else [rows]
    metrics = [metric for metric in key_metrics(rows) if metric != "perplexity"]
    hollow = {"marker": "o", "color": "0.4", "markerfacecolor": "white", "linestyle": ":", "linewidth": 0.8}
    more = {"entropy-coded": {**hollow, "markersize": 5}} if len(coded) else {}
    if others:
        more |= references.entries(rows, latents)
    figure = _against("bits_per_pixel", lines, metrics, alone, more)
    panels = dict(zip(metrics, figure.axes, strict=True))
    rates = [_entropy_coded(panels, coded)] if len(coded) else []
    if others:
        rates.append(references.draw(panels, rows, latents))
    _widen(panels, rows.bits_per_pixel, pd.concat([pd.Series(dtype=float), *rates]))
    if alone:
        joined = "Lines join equal grid sizes" if per_grid and len(lines) > 1 else "Lines join means over seeds"
        caption = f"{joined}; bands: ± standard deviation. {counted(scope, rows, list(BITS), fixed)}"
    else:
        _fronts(panels, rows)
        others = [name for name in settings(rows) if name not in BITS]
        varied = f", whatever their {listed(others)}" if others else ""
        caption = f"All {len(rows)} scored runs{varied}; steps: the best of each backbone so far."
    if len(coded):
        caption += " Hollow: the same at the rate of an entropy coder with the best prior trained over those codes."
    caption += references.caption(rows, latents)
    yield Drawing("rate_distortion", "Rate and distortion", caption, figure)


def _fronts(panels: dict[str, Axes], rows: pd.DataFrame) -> None:
    """Adds the best of each backbone's ``rows`` with so many bits or fewer, as steps."""
    for backbone, own in rows.sort_values("bits_per_pixel").groupby("backbone"):
        for metric, axes in panels.items():
            best = own[metric].cummax() if METRICS[metric].better == "higher" else own[metric].cummin()
            axes.plot(own.bits_per_pixel, best, drawstyle="steps-post", color=look_of(backbone)["color"], linewidth=1)


def _entropy_coded(panels: dict[str, Axes], coded: pd.DataFrame) -> pd.Series:
    """Adds to ``rate_distortion`` where each mean of ``coded`` moves when codes are sent at the rate of their best
    prior. Returns those rates."""
    names = ["coded_bits_per_pixel", *panels]
    means = coded.groupby(["backbone", "bits_per_pixel"])[names].mean().reset_index()
    means = means[means.coded_bits_per_pixel > 0]  # one code in all takes none, and the axis is logarithmic
    for metric, axes in panels.items():
        for _, row in means.iterrows():
            look = look_of(row.backbone)
            at = [row.coded_bits_per_pixel, row.bits_per_pixel], [row[metric], row[metric]]
            axes.plot(*at, color=look["color"], linewidth=0.8, linestyle=":", zorder=1)
            axes.plot(*(ends[:1] for ends in at), linestyle="none", markersize=5, markerfacecolor="white", **look)
    return means.coded_bits_per_pixel


def _widen(panels: dict[str, Axes], rates: pd.Series, further: pd.Series) -> None:
    """Makes room for ``further`` rates on the axes of ``rates``, and ticks at the ends of all."""
    if further.empty:
        return
    low, high = min(rates.min(), further.min()), max(rates.max(), further.max())
    ticks = pd.concat([rates, further.nsmallest(1), further.nlargest(1)], ignore_index=True)
    for axes in panels.values():
        looks.scale_x(axes, ticks, "bits_per_pixel")
        axes.set_xlim(low / (high / low) ** 0.1 / 1.05, high * (high / low) ** 0.1 * 1.05)


def generation(rows: pd.DataFrame, known: int, words: str = "", apart: bool = False) -> Iterator[Drawing]:
    """``generation``: how far samples are from real images against what the prior makes of the codes, per backbone and
    prior; where the grid is swept, its sizes are joined. ``rows``: of ``known`` priors those of equal settings, and in
    ``words`` which. ``apart``: each prior is a point, whatever its settings."""
    metrics = [name for name in ("gfid", "gfid_vgg16", "gkid_vgg16") if rows[name].notna().all()][:2]
    names = ["coded_bits_per_pixel", *metrics, *(f"{metric}_real" for metric in metrics)]
    by = ["backbone", "prior", "grid_size", "codebook_size", *(["run_id"] if apart else [])]
    means = rows.groupby(by)[names].mean().reset_index()
    figure, panels = looks.new_panels(len(metrics))
    rates = rows.coded_bits_per_pixel
    for axes, metric in zip(panels, metrics, strict=True):
        for (backbone, prior), line in means.groupby(["backbone", "prior"]):
            look = {"color": look_of(backbone)["color"], "marker": looks.PRIOR_MARKERS.get(prior, "p")}
            look["linestyle"] = "none" if apart else "-"
            axes.plot(line.coded_bits_per_pixel, line[metric], markersize=5, linewidth=0.9, alpha=0.9, **look)
        for backbone, height in means.groupby("backbone")[f"{metric}_real"].min().items():
            axes.axhline(height, color=look_of(backbone)["color"], linewidth=0.8, linestyle=":", zorder=0)
        if rates.max() > 4 * rates.min():
            axes.set_xscale("log")
            looks.plain_log(axes.xaxis)
        axes.set(xlabel="bits per pixel under the prior ↓", ylabel=f"{PRIOR_METRICS[metric].label} ↓")
    entries = {name: {"color": look_of(name)["color"], "linewidth": 3} for name in sorted(rows.backbone.unique())}
    grey = {"color": "0.35", "linestyle": "none", "markersize": 5}
    entries |= {name: {"marker": looks.PRIOR_MARKERS.get(name, "p"), **grey} for name in sorted(rows.prior.unique())}
    entries["real codes"] = {"color": "0.4", "linestyle": ":", "linewidth": 0.8}
    looks.add_legend(figure, [], entries)
    first = rows.iloc[0]
    count = (
        f"{len(rows)} priors"
        if len(rows) == known
        else f"{len(rows)} of {known} priors, those with equal settings{words}"
    )
    how, joined = ("each a point", "") if apart else ("means over seeds", " Lines join grid sizes.")
    caption = (
        f"{count}, {how}; {first.samples} samples each, at temperature {first.temperature:g}, against all "
        f"{first.protocol_count:.0f} {HELD_OUT[first.protocol_scored_on]} images of {brief(first.data)} at "
        f"{first.image_size}×{first.image_size}.{joined}"
        " Dotted: training codes, decoded, which a perfect prior would reach, at the grid where they are best."
    )
    yield Drawing("generation", "Rate and generation", caption, figure)


def importance(importances: pd.DataFrame) -> Drawing:
    """``importance``: how much each setting matters, per backbone, largest on top."""
    shares = importances.pivot(index="parameter", columns="backbone", values="importance")
    shares = shares.loc[shares.mean(axis=1).sort_values(ascending=False).index]
    figure = looks.new_figure(1.1 + 0.14 * len(shares) * (len(shares.columns) + 1))
    axes = figure.subplots()
    thick = 0.8 / len(shares.columns)
    for i, (backbone, own) in enumerate(shares.items()):
        axes.barh(np.arange(len(own)) + (i + 0.5) * thick - 0.4, own, 0.9 * thick, color=look_of(backbone)["color"])
    axes.set_yticks(range(len(shares)), map(label_of, shares.index))
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    axes.set_xlabel("importance (share within a backbone)")
    looks.add_legend(figure, list(shares), {})
    caption = "How much of the variation between runs each setting, or the seed, explains: shares within a backbone. "
    caption += f"The effect of each is averaged over what was run of the others: {listed(list(shares.index))}."
    return Drawing("importance", "Which settings matter", caption, figure)


# What is drawn, in reading order, and from which rows: all of one protocol, or only those of equal bits.
CHARTS: list[tuple[Callable[[Scope], Iterator[Drawing]], str]] = [
    (sweeps, "protocol"),
    (sweeps, "block"),
    (heatmaps, "protocol"),
    (heatmaps, "block"),
    (rate_distortion, "protocol"),
    (cost, "block"),
    (learning_curves, "protocol"),
    (codebook_loss, "protocol"),
    (untrained, "protocol"),
    (reconstructions, "protocol"),
    (wrong_codes, "block"),
]
