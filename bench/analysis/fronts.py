"""What a score costs: each setting as a point, and the Pareto front, but of clocks that cannot be trusted."""

import math
from collections.abc import Iterator

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, MaxNLocator

from . import looks, vectors
from .frames import CLOCKED, METRICS, best_first, machines, main_metric, settings, summary, unsteady
from .labels import brief, label_of, told
from .looks import Drawing, look_of
from .slices import Scope, counted, listed

NAMED = 12  # rings with words beside them: more would lie on one another, and take seconds to draw


def pareto(cost: pd.Series, score: pd.Series) -> pd.Series:
    """Which points no other point dominates: none is at most as high in both and lower in one.

    Lower is better in ``cost`` and ``score``, both (N,) without missing values; gives (N,) bool.
    """
    least = score.groupby(cost).min()
    bound = least.cummin().shift(fill_value=math.inf)  # the best score at any lower cost
    return (score == cost.map(least)) & (score < cost.map(bound))


def cost(scope: Scope) -> Iterator[Drawing]:
    """``cost``: the main metric against what a tokenizer costs; clocked costs only if one machine made all rows, and
    their front only where equal work took equally long."""
    metric, varied = main_metric(scope.rows), settings(scope.rows)
    table = summary(scope.rows)
    costs = ("params", "flops", "train_seconds", "images_per_second_decode")
    scored = [name for name in costs if name in table]
    names = [name for name in scored if machines(scope.rows) == 1 or name not in CLOCKED]
    if len(table) < 2 or not names:
        return
    figure, panels = looks.new_panels(len(names))
    longest, slower = 0, unsteady(scope.rows)
    for axes, name in zip(panels, names, strict=True):
        known = table.dropna(subset=[name, metric])
        _points(axes, known, name, metric)
        if name in slower:
            continue
        front = _front(axes, known, name, metric)
        longest = max(longest, len(front))
        if len(varied) == 1:  # words for several would not fit beside a ring
            _name_front(axes, front.head(NAMED), name, metric, varied[0])
    looks.add_legend(figure, list(table.backbone), {"Pareto front": {"color": "0.3", "linewidth": 1}})
    caption = "Mean ± standard deviation over seeds; ringed: no other point is both cheaper and better. "
    if len(varied) > 1:
        caption += f"Each combination of {listed(varied)} is a point of its own. "
    if len(varied) == 1:
        caption += f"Beside the {f'{NAMED} cheapest ' if longest > NAMED else ''}rings: {label_of(varied[0])}. "
    if len(names) < len(scored):
        caption += "Times are left out: the runs were made on different processors or numbers of threads. "
    for name, times in ((name, slower[name]) for name in names if name in slower):
        caption += f"No front in {METRICS[name].label}: the machine was busy with other things, as equal work differs "
        caption += f"by a factor of {times:.1f} from seed to seed. "
    caption += counted(scope, scope.rows, varied, {})
    yield Drawing("cost", f"{METRICS[metric].label} against cost", caption, figure)


def _points(axes: Axes, table: pd.DataFrame, name: str, metric: str) -> None:
    """Means with error bars."""
    style = {"linestyle": "none", "markersize": 5, "elinewidth": 0.8}
    for backbone, own in table.groupby("backbone"):
        look = {**style, **look_of(backbone), "rasterized": len(own) > looks.MANY}
        points = axes.errorbar(own[name], own[metric], yerr=own[f"{metric}_std"], **look)
        words = [f"{backbone}: {told(row, name)}, {told(row, metric)}, seeds {row.n}" for _, row in own.iterrows()]
        vectors.tell(points.lines[0], words)
    if table[name].min() > 0 and table[name].max() >= 3 * table[name].min():
        axes.set_xscale("log")
        looks.plain_log(axes.xaxis)
    else:  # so narrow that a logarithm looks the same and has no round ticks
        axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.margins(0.2)
    looks.least_span(axes)
    axes.set(xlabel=label_of(name), ylabel=label_of(metric))


def _front(axes: Axes, table: pd.DataFrame, name: str, metric: str) -> pd.DataFrame:
    """Adds the Pareto front as steps through ringed points. Returns the rows on it."""
    cost, score = (table[column] * {"lower": 1, "higher": -1}[METRICS[column].better] for column in (name, metric))
    front = best_first(table[pareto(cost, score)], name)
    axes.plot(front[name], front[metric], color="0.3", linewidth=1, drawstyle="steps-post", zorder=1)
    axes.scatter(front[name], front[metric], s=80, facecolors="none", edgecolors="0.3", linewidths=1, zorder=3)
    return front


def _name_front(axes: Axes, front: pd.DataFrame, name: str, metric: str, setting: str) -> None:
    """Writes the value of ``setting`` beside each ring, on its cheaper and better side, where no other point can be."""
    right, up = METRICS[name].better == "higher", METRICS[metric].better == "higher"
    offset = (5 if right else -5, 5 if up else -5)
    style = {"ha": "left" if right else "right", "va": "bottom" if up else "top", "fontsize": looks.TEXT}
    for _, row in front.iterrows():
        axes.annotate(brief(row[setting]), (row[name], row[metric]), offset, textcoords="offset points", **style)
