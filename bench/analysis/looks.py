"""What charts look like: figures, the colour and marker of each backbone, axes and legends."""

import itertools
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, NullLocator

from backbones import BACKBONES
from bench.core.plots import label_rows, tile
from bench.priors.models import PRIORS

from .labels import BITS, brief, label_of

WIDTH = 7.2  # inches: at this width a printed page keeps the text at its size
DPI = 120
TEXT = 8  # points, the smallest text

MANY = 200  # points that an SVG holds as an image
DOUBLED = (*BITS, "bits_per_pixel")  # their axes are logarithmic to base 2

# What each backbone looks like in every chart, whichever others stand beside it. The colours are far apart to all
# kinds of sight, differ in lightness, for prints in grey, and show on white and on black.
LOOKS: dict[str, tuple[str, str]] = {
    "cnn": ("#139c75", "o"),
    "convnext": ("#756200", "s"),
    "vit": ("#9c3aff", "D"),
    "mamba": ("#ff9c00", "^"),
    "bimamba": ("#891375", "v"),
    "hybrid": ("#9c9ceb", "P"),
}
FURTHER = (("#0173b2", "X"), ("#c0392b", "*"), ("#4fc3e8", "<"), ("#5a3d1e", ">"))  # of those that come later
SPAN = 0.05  # of its largest value that an axis spans at the least
EVERY = 0.17  # of an axes' diagonal between the markers of a curve
PRIOR_MARKERS = dict(zip(sorted(PRIORS), "Xosv^DP*", strict=False))

Entries = dict[str, dict[str, Any]]  # of a legend: how each label's line looks


class Drawing(NamedTuple):
    """A chart that is not saved yet."""

    name: str
    title: str
    caption: str
    figure: Figure


def looks_for(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """LOOKS, and of others of ``names`` the next of FURTHER, in their order; after the last of them the first again."""
    return LOOKS | dict(zip((name for name in names if name not in LOOKS), itertools.cycle(FURTHER), strict=False))


def new_figure(height: float) -> Figure:
    """An empty figure of so many inches."""
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
    figure.get_layout_engine().set(rect=(0.01, 0, 0.98, 1))  # room for fonts that run wider than the one measured
    FigureCanvasAgg(figure)
    return figure


def new_panels(count: int) -> tuple[Figure, list[Axes]]:
    """A figure with ``count`` axes, two a row."""
    rows, columns = math.ceil(count / 2), min(2, count)
    figure = new_figure(0.8 + 2.1 * rows)
    return figure, [figure.add_subplot(rows, columns, place) for place in range(1, count + 1)]


def look_of(backbone: str) -> dict[str, Any]:
    """Colour and marker; a backbone that is no longer registered is dark grey."""
    colour, marker = looks_for(BACKBONES).get(backbone, ("0.25", "p"))
    return {"color": colour, "marker": marker}


def add_legend(
    figure: Figure, backbones: list[str], lines: Entries, title: str | None = None, columns: int = 6
) -> None:
    """Markers of ``backbones`` and ``lines`` by their label, below the axes; at most so many ``columns``."""
    looks = {name: {"linestyle": "none", "markersize": 5, **look_of(name)} for name in sorted(backbones)}
    handles = [Line2D([], [], label=label, **look) for label, look in {**looks, **lines}.items()]
    style = {"fontsize": TEXT + 0.5, "title_fontsize": TEXT + 0.5}
    figure.legend(handles=handles, loc="outside lower center", ncols=min(columns, len(handles)), title=title, **style)


def places_of(values: pd.Series) -> pd.Series:
    """Where values stand on an axis: numbers at themselves, others at 0, 1, … in order."""
    if is_number(values):
        return values.astype(float)
    return values.map({level: float(i) for i, level in enumerate(levels_of(values))})


def levels_of(values: pd.Series, most: int | None = None) -> list[Any]:
    """The different values in order; at most ``most`` of them, evenly spaced, with both ends."""
    levels = sorted(values.dropna().unique(), key=None if is_number(values) else str)
    count = min(len(levels), most or len(levels))
    return [levels[round(i)] for i in np.linspace(0, len(levels) - 1, count)]


def is_number(values: pd.Series) -> bool:
    """Whether a column holds numbers, and not just True and False."""
    return pd.api.types.is_numeric_dtype(values) and not pd.api.types.is_bool_dtype(values)


def scale_x(axes: Axes, values: pd.Series, name: str) -> None:
    """An axis of ``values``, of ``name``: logarithmic from a ratio of 10 on, or if DOUBLED, else plain.

    Ticks stand at the values; where their labels would touch, numbers have round ticks and words are slanted.
    """
    ticks = pd.Series(values.to_numpy(), index=places_of(values)).dropna()
    ticks = ticks[~ticks.index.duplicated()].sort_index()
    low, high, number = ticks.index.min(), ticks.index.max(), is_number(values)
    logarithmic = number and low > 0 and (high >= 10 * low or name in DOUBLED)
    if logarithmic:
        axes.set_xscale("log", base=2 if name in DOUBLED else 10)
    if not number:
        axes.set_xlim(low - 0.5, high + 0.5)
    axes.set_xlabel(label_of(name))
    labels = [brief(value) for value in ticks]
    place = np.log(ticks.index) if logarithmic else np.asarray(ticks.index)
    closest = np.diff(place).min(initial=math.inf) / max(place[-1] - place[0], 1e-12)
    crowded = closest < 0.026 * max(map(len, labels))  # parts of the axis; a character is about 5 points wide
    if not (number and crowded):
        axes.set_xticks(list(ticks.index), labels, rotation=45 if crowded else 0)
    elif logarithmic and high >= 10 * low:
        plain_log(axes.xaxis, (1, 3))
    else:
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(NullLocator())


def least_span(axes: Axes) -> None:
    """Widens linear axes that span less than SPAN of their largest value about their middle: small differences shall
    look small."""
    for low, high, scale, widen in (
        (*axes.get_xlim(), axes.get_xscale(), axes.set_xlim),
        (*axes.get_ylim(), axes.get_yscale(), axes.set_ylim),
    ):
        lacking = SPAN * max(abs(low), abs(high)) - (high - low)
        if scale == "linear" and lacking > 0:
            widen(low - lacking / 2, high + lacking / 2)


def plain_log(axis: Axis, steps: tuple[int, ...] = (1, 2, 5)) -> None:
    """Ticks of a logarithmic axis at these multiples of powers of ten, as plain numbers."""
    axis.set_major_locator(LogLocator(subs=steps))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def picture_rows(rows: list[np.ndarray], labels: list[str]) -> Figure:
    """A figure of rows of images, each (N, H, W, 3) uint8 with a label."""
    picture = tile(rows, scale=max(1, 128 // rows[0].shape[1]))
    figure = new_figure(0.4 + min(0.83 * WIDTH * picture.height / picture.width, 1.2 * len(labels)))
    axes = figure.subplots()
    axes.imshow(picture)
    label_rows(axes, picture.height, labels, fontsize=TEXT)
    return figure
