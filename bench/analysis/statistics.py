"""Which differences between runs are more than seed noise, said in words and with a bounded rate of false verdicts.

Rows of one block (see frames.blocks) are compared: backbones with each other, or the values of a swept setting with a
reference value. The unit of evidence is the seed: a paired t test over seeds, Holm's correction over all comparisons
of a call, and, as a second witness, a paired bootstrap over the held-out images.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from itertools import combinations, product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from bench.core.errors import Damaged
from bench.core.runs import Run

from .frames import DEFAULTS, LABELS, settings
from .verdict import FEWEST, LEVEL, Interval, Verdict

COMPARED = ("lpips_alex", "lpips_vgg", "psnr")
IMAGE_SEEDS = 3  # per-image scores are read of so many seeds of a comparison, to bound the files that are opened,
IMAGE_RUNS = 2000  # and where these are more runs of a block, of part of its settings
RESAMPLES = 2000
SAME_BUDGET = 1.1  # parameter counts up to this ratio apart are one budget; presets agree within 5 %
NOTHING = pd.DataFrame()
MARGIN = "margin over k-means"
LISTED = 6  # values of a setting that a sentence lists; of more it gives the range


class _Side:
    """One side of a pair: the ``part`` of ``cells`` that are its own, ``scored``, the metrics that one of them has, and
    whether it is ``below`` k-means on average."""

    def __init__(self, cells: pd.DataFrame, part: slice, scored: set[str], below: bool):
        self._cells, self._part, self.scored, self.below = cells, part, scored, below

    @cached_property
    def cells(self) -> pd.DataFrame:
        """Mean scores per (seed, setting)."""
        return self._cells.iloc[self._part].droplevel(0)

    @cached_property
    def folders(self) -> dict[tuple[int, int], list[str]]:
        """Run folders per (seed, setting)."""
        return self.cells["folders"].to_dict()

    @cached_property
    def places(self) -> set[tuple[int, int]]:
        """Which seeds and settings it has, numbered as those of the sides that it may be compared with."""
        return set(zip(*(codes[self._part].tolist() for codes in self._cells.index.codes[1:]), strict=True))


class _Pair(NamedTuple):
    """Two sides by name.

    ``within`` is the backbone in which they are compared, "" for two backbones; ``settings``, number → values, say the
    rest.
    """

    a: str
    b: str
    side_a: _Side
    side_b: _Side
    within: str
    settings: pd.DataFrame


class Images:
    """Scores per image of the runs of a block, each file read once. ``damaged``: a sentence on each file that does not
    hold those of its run; ``part``: the part of a comparison's settings whose runs are read, 1 unless the first
    IMAGE_SEEDS seeds of all settings are more than IMAGE_RUNS runs."""

    def __init__(self, block: pd.DataFrame):
        self._block = block
        self._read: dict[str, dict[str, np.ndarray]] = {}
        self.damaged: list[str] = []
        cells = block[["backbone", *settings(block)]].drop_duplicates()
        self.part = min(1.0, IMAGE_RUNS / max(1, len(cells) * IMAGE_SEEDS))

    def some(self, of: pd.Index) -> pd.Index:
        """Those of the settings ``of`` a comparison whose runs are read: a random ``part``, the same each time."""
        drawn = np.random.default_rng(0).permutation(len(of))[: math.ceil(self.part * len(of))]
        return of[np.sort(drawn)]

    @cached_property
    def _scored(self) -> dict[str, dict[str, float]]:
        """By folder, of how many images a run was scored on, and the means over them."""
        rows = self._block.drop_duplicates("folder").set_index("folder")
        return rows.reindex(columns=["protocol_count", *COMPARED]).to_dict("index")

    def __call__(self, folder: str) -> dict[str, np.ndarray]:
        """Those of the run in ``folder``; none where the file is missing or damaged."""
        if folder not in self._read:
            self._read[folder] = {}
            known = {name: value for name, value in self._scored[folder].items() if not math.isnan(value)}
            with suppress(FileNotFoundError):
                try:
                    self._read[folder] = Run(Path(folder)).scores_of_images(known.pop("protocol_count", None), known)
                except Damaged as error:
                    self.damaged.append(str(error))
        return self._read[folder]


def backbone_verdicts(
    block: pd.DataFrame, metrics: Sequence[str] = COMPARED, read: Images | None = None
) -> list[Verdict]:
    """Every pair of backbones in a block, per metric; ``metrics`` are keys of METRICS that have a direction, and
    ``read`` is what the block's other verdicts share.

    What is paired: runs with equal seed and equal swept settings (``frames.settings``). Width and depth do not mean the
    same in two backbones: where they were swept, models of equal budget are paired, parameters within 10 %. The scores
    of a seed are averaged over the settings that both backbones have *in every counted seed*. When runs are missing,
    what counts is the complete rectangle of seeds and settings with the most pairs of runs, of equally many the one
    with most seeds, and one with at least FEWEST seeds before any other. Runs that differ in precision or device alone
    are averaged into one: they are no further evidence. Missing scores are left out.

    The rule: ``a`` is better than ``b`` only if the Holm-adjusted p-value of the paired t test over seeds is below 0.05
    *and*, where there are scores per image, the bootstrap interval over images (Efron & Tibshirani 1993, ch. 13) lies
    on the same side of 0. A family is all comparisons of one call in one metric; Holm's procedure (1979) keeps the
    probability of any false verdict in it at most 5 %. The t test assumes that differences between seeds are normal,
    which no test can check on so few; counts such as dead codes are not. A difference that is the same in every seed
    has p = 0, the limit of the t test, or p = 1 when it is zero, as between identical runs.
    """
    by = [name for name in settings(block) if name not in ("width", "depth")]
    if len(by) < len(settings(block)):
        by.append("M parameters")
        block = block.assign(**{"M parameters": _budgets(block.params)})
    block, known = _coded(block, by)
    sides = _sides(block, "backbone", metrics)
    pairs = [_Pair(a, b, sides[a], sides[b], "", known) for a, b in combinations(sides, 2)]
    return _verdicts(pairs, metrics, read or Images(block))


def setting_verdicts(
    block: pd.DataFrame, metrics: Sequence[str] = COMPARED, read: Images | None = None
) -> list[Verdict]:
    """Within each backbone, every value of every swept setting against a reference value, per metric.

    The reference is the Config field's default where it was run, else the smallest value. Other swept settings are
    paired and averaged, seeds counted and verdicts reached as in ``backbone_verdicts``. As there, models of equal
    budget are paired where width or depth differ, as between options that are matched, but for these two themselves.
    """
    swept, pairs = settings(block), []
    sizes = [name for name in swept if name in ("width", "depth")]
    budgets = block.assign(**{"M parameters": _budgets(block.params)}) if sizes else block
    for name in swept:
        others = [other for other in swept if other != name]
        if sizes and name not in sizes:
            others = [other for other in others if other not in sizes] + ["M parameters"]
        coded, known = _coded(budgets, others)
        for backbone, rows in coded.groupby("backbone"):
            sides = _sides(rows, name, metrics)
            default = DEFAULTS[name] if DEFAULTS.get(name) in sides else min(sides)
            for value in sides:
                if value != default:
                    names = f"{name}={_text(value)}", f"{name}={_text(default)}"
                    pairs.append(_Pair(*names, sides[value], sides[default], backbone, known))
    pairs.sort(key=lambda pair: pair.within)  # stable: one backbone after the other
    return _verdicts(pairs, metrics, read or Images(block))


def sentences(verdicts: Sequence[Verdict]) -> list[str]:
    """Each verdict in words; those without a pair of runs, which are all of a family or none, in one sentence."""
    apart = [one for one in verdicts if one.n == 0]
    if len(apart) < 2:
        return [one.sentence() for one in verdicts]
    sides = list(dict.fromkeys(side for one in apart for side in (one.a, one.b)))
    more = f" and {len(sides) - LISTED} more" if len(sides) > LISTED else ""
    words = f"not compared, since no pair shares a seed and setting: {', '.join(sides[:LISTED])}{more}"
    return [*(one.sentence() for one in verdicts if one.n), words]


def role_verdicts(rows: pd.DataFrame, metrics: Sequence[str] = COMPARED) -> list[Verdict]:
    """Of the runs that confirm a search, whose ``role`` says whether their settings are what it found ("winner"), those
    of the preset ("default") or both ("winner, default"): the two against each other within each backbone, then the
    winners of the backbones against each other. Paired over seeds, as in ``backbone_verdicts``; a family each."""
    cells = rows.assign(setting=0)
    none = pd.DataFrame(index=[0])
    within = []
    for backbone, own in cells.groupby("backbone"):
        sides = _sides(own, "role", metrics)
        if len(sides) > 1:
            pair = f"winner ({backbone})", f"default ({backbone})"
            within.append(_Pair(*pair, sides["winner"], sides["default"], "", none))
    winners = _sides(cells[cells.role != "default"], "backbone", metrics)
    between = [
        _Pair(f"winner ({a})", f"winner ({b})", winners[a], winners[b], "", none) for a, b in combinations(winners, 2)
    ]
    read = Images(rows)
    return _verdicts(within, metrics, read) + _verdicts(between, metrics, read)


def kmeans_margin(rows: pd.DataFrame) -> pd.Series:
    """By how many dB of PSNR each of ``rows`` is better than k-means on patches at its bits; nan where either is not
    known."""
    none = pd.Series(math.nan, rows.index)
    return rows.get("psnr", none) - rows.get("psnr_kmeans", none)


def _budgets(parameters: pd.Series) -> pd.Series:
    """The typical parameter count, in millions, of the models that differ by no more than SAME_BUDGET from the next."""
    ordered = parameters.sort_values()
    group = (ordered.pct_change() > SAME_BUDGET - 1).cumsum()
    return ordered.groupby(group).transform("median").map(lambda count: float(f"{count / 1e6:.3g}"))


def _coded(block: pd.DataFrame, by: list[str]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """``block`` with a column ``setting`` that numbers the combinations of ``by``, and a table number → values."""
    coded = block.assign(setting=block.groupby(by, dropna=False).ngroup() if by else 0)
    return coded, coded.drop_duplicates("setting").set_index("setting")[by]


def _sides(rows: pd.DataFrame, column: str, metrics: Sequence[str]) -> dict[Any, _Side]:
    """Every value of ``column`` as a side, in its order."""
    rows = rows[rows[column].notna()]
    rows = rows.assign(**{MARGIN: kmeans_margin(rows)})
    groups = rows.groupby([column, "seed", "setting"])
    cells = groups[[*metrics, MARGIN]].mean()
    folders: list[list[str]] = [[] for _ in range(len(cells))]
    for cell, folder in zip(groups.ngroup(), rows.folder, strict=True):
        folders[cell].append(folder)
    cells["folders"] = folders
    known = cells[list(metrics)].notna().groupby(level=column).any()
    ends = cells.groupby(level=column).size().cumsum().tolist()
    parts = map(slice, [0, *ends], ends)  # cells are in order
    scored = ({name for name, has in zip(metrics, row, strict=True) if has} for row in known.to_numpy())
    below = (cells[MARGIN].groupby(level=column).mean() < 0).tolist()
    return {value: _Side(cells, *of) for value, *of in zip(known.index, parts, scored, below, strict=True)}


def _verdicts(pairs: list[_Pair], metrics: Sequence[str], read: Images) -> list[Verdict]:
    """One family of verdicts per metric."""
    return [verdict for metric in metrics for verdict in _family(pairs, metric, read)]


def _family(pairs: list[_Pair], metric: str, read: Images) -> Iterator[Verdict]:
    pairs = [pair for pair in pairs if metric in pair.side_a.scored & pair.side_b.scored]
    tables = [_shared(pair, metric) for pair in pairs]
    tests = {i: paired_t(table.mean(axis=1).to_numpy()) for i, table in enumerate(tables) if len(table) >= FEWEST}
    p_values = dict(zip(tests, holm([p for _, p in tests.values()]), strict=True))
    images = {i: _image_differences(pairs[i], tables[i], metric, read) for i in tests}
    image_intervals = _image_intervals({i: values for i, values in images.items() if values is not None})
    shared = any(map(len, tables))

    for i, (pair, table) in enumerate(zip(pairs, tables, strict=True)):
        if table.empty and shared:
            continue  # share no seed and setting: worth a word only if no pair does
        difference = float(table.mean(axis=1).mean()) if len(table) else math.nan
        interval, image_interval, p = tests.get(i, (None,))[0], image_intervals.get(i), p_values.get(i)
        witnessed = image_interval is None or all(difference * end > 0 for end in image_interval)
        better = None
        if p is not None and p < LEVEL and witnessed:
            better = pair.a if (difference < 0) == (LABELS[metric].better == "lower") else pair.b
        within = ", ".join(filter(None, [pair.within, _described(pair.settings, table.columns)]))
        numbers = len(table), difference, interval, image_interval, p
        below = pair.side_a.below and pair.side_b.below
        yield Verdict(metric, pair.a, pair.b, within, *numbers, better, below)


def _shared(pair: _Pair, metric: str) -> pd.DataFrame:
    """Differences a - b that count: seeds × settings, none missing; empty when nothing is shared."""
    if pair.side_a.places.isdisjoint(pair.side_b.places):  # the usual case in a search, whose trials agree in nothing
        return NOTHING
    a, b = pair.side_a.cells[metric], pair.side_b.cells[metric]
    if not a.index.equals(b.index):
        shared = a.index.intersection(b.index)
        a, b = a.loc[shared], b.loc[shared]
    table = (a - b).dropna().unstack("setting").sort_index()
    known = table.notna().to_numpy()
    if known.all():
        return table
    counts = known.sum(axis=0)  # seeds of each setting
    rectangles = [np.ix_(known[:, counts >= least].all(axis=1), counts >= least) for least in pd.unique(counts)]
    seeds, cells = max(rectangles, key=lambda found: (min(len(found[0]), FEWEST), known[found].size, len(found[0])))
    return table.iloc[seeds.ravel(), cells.ravel()]


def paired_t(differences: np.ndarray) -> tuple[Interval, float]:
    """95 % interval and two-sided p-value of a paired t test over ``differences`` (n,); see backbone_verdicts for
    differences without spread."""
    from scipy import stats  # half a second, which commands that compare nothing do not have

    mean, error = float(differences.mean()), float(stats.sem(differences))
    if error <= 1e-12 * abs(mean):  # equal up to rounding
        return (mean, mean), float(mean == 0)
    low, high = stats.t.interval(1 - LEVEL, len(differences) - 1, loc=mean, scale=error)
    return (float(low), float(high)), float(2 * stats.t.sf(abs(mean) / error, len(differences) - 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment. statsmodels has it too, but collects garbage at each call: 0.3 s beside torch."""
    p = np.asarray(p_values, dtype=float)
    order = np.argsort(p)
    adjusted = np.empty_like(p)
    adjusted[order] = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)).clip(max=1)
    return adjusted.tolist()


def _image_differences(pair: _Pair, table: pd.DataFrame, metric: str, read: Images) -> np.ndarray | None:
    """Differences a - b of every image (N,), averaged over settings and first seeds of ``table``; None when a run has
    no such scores."""
    cells = list(product(table.index[:IMAGE_SEEDS], read.some(table.columns)))
    sides, means = [], []
    for side in (pair.side_a, pair.side_b):
        sides.append([[read(folder).get(metric) for folder in side.folders[cell]] for cell in cells])
    if any(row is None for scores in sides for rows in scores for row in rows):
        return None
    for scores in sides:
        each = [rows[0] if len(rows) == 1 else np.mean(rows, axis=0, dtype=np.float64) for rows in scores]
        means.append(np.mean(each, axis=0, dtype=np.float64))
    return means[0] - means[1]


def _image_intervals(differences: dict[int, np.ndarray]) -> dict[int, Interval]:
    """95 % percentile bootstrap interval of the mean of each row (N,); all rows see the same resampled images."""
    if not differences:
        return {}
    rows = np.stack(list(differences.values()))
    batch = max(1, 2_000_000 // rows.size)  # resamples held in memory at a time
    options = {"n_resamples": RESAMPLES, "batch": batch, "confidence_level": 1 - LEVEL, "method": "percentile"}
    from scipy import stats

    found = stats.bootstrap((rows,), np.mean, axis=-1, **options, rng=np.random.default_rng(0)).confidence_interval
    ends = zip(found.low.tolist(), found.high.tolist(), strict=True)
    return dict(zip(differences, ends, strict=True))


def _described(known: pd.DataFrame, averaged: pd.Index) -> str:
    """Which of the ``known`` settings were averaged over: "over beta 0.25, 1; codebook_size 256"; nothing when none was
    swept."""
    parts, values = [], known.loc[averaged] if len(averaged) else ()
    for name in values:
        several = sorted(values[name].unique())
        listed = ", ".join(map(_text, several))
        if len(several) > LISTED:
            listed = f"{_text(several[0])} to {_text(several[-1])} ({len(several)} values)"
        parts.append(f"{name} {listed}")
    return f"over {'; '.join(parts)}" if parts else ""


def _text(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
