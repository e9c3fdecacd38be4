"""What to take from a block: which backbone, how sure that is, what would settle it, and what to mend before."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from bench.tokenizers.curves import STEEP, still_falling

from .extrapolation import Curves, histories, outlook
from .frames import LABELS, main_metric
from .statistics import FEWEST, LEVEL, Verdict, kmeans_margin
from .tables import text_of

POWER = 0.8  # with which the seeds that are asked for find a difference like the one so far
WITNESSES = ("fid", "fid_vgg16", "lpips_alex", "psnr", "grid_edges")  # beside the main metric
MOST = 1000  # seeds: who needs more will not run them


class Advice(NamedTuple):
    """The recommendation, sentences on what makes the numbers under it less than final, and what to add to the command
    that trained these runs for those that are missing: more steps, more seeds."""

    line: str
    warnings: list[str]
    flags: tuple[str, ...] = ()


def advice(block: pd.DataFrame, verdicts: Sequence[Verdict]) -> Advice:
    """Of a block, given ``verdicts`` that hold those between its backbones in the main metric. Reads histories."""
    curves, low = histories(block), _below(block)
    rising = _falling(curves)
    family = [one for one in verdicts if one.metric == main_metric(block) and one.n]
    warnings = []
    if len(low):
        each = ", ".join(f"{backbone} by {-margin:.2f} dB" for backbone, margin in low.items())
        warnings.append(f"Below k-means on patches at the same bits, in PSNR: {each}. Train longer before comparing.")
    if rising:
        each = ", ".join(f"{backbone} by {share:.0%}" for backbone, share in rising.items())
        warnings.append(
            f"Training ended early: its second half still lowered the reconstruction loss of {each}. More steps would "
            "change these numbers, and perhaps their order."
        )
    flags = []
    if block.steps.nunique() == 1:
        warnings.extend(outlook(curves, float(block.steps.iloc[0])))
        flags += ["--steps", f"{2 * block.steps.iloc[0]:.0f}"] if len(low) or rising else []
    backbones = sorted(block.backbone.unique())
    first, second, pair = _first_two(backbones, family)
    if pair and (against := _against(block, first, second)):
        warnings.insert(0, f"Other metrics see it otherwise: {second} is ahead of {first} in {against}.")
    if pair and pair.interval is None:
        known = sorted({*block.seed})
        flags += ["--seeds", *map(str, [*known, *range(known[-1] + 1, known[-1] + 1 + FEWEST - len(known))])]
    return Advice(_line(first, second, pair, family, {*low.index}, bool(rising)), warnings, tuple(flags))


def _first_two(backbones: list[str], family: list[Verdict]) -> tuple[str, str, Verdict | None]:
    """Who is ahead most often, who comes second, and the verdict on the two; no second where one is alone."""
    if len(backbones) < 2:
        return backbones[0], "", None
    wins = Counter(dict.fromkeys(backbones, 0))
    wins.update(one.leader for one in family)
    (first, _), (second, _) = wins.most_common(2)
    pair = next((one for one in family if {one.a, one.b} == {first, second}), None)
    return (pair.leader, pair.b if pair.leader == pair.a else pair.a, pair) if pair else (first, second, None)


def _against(block: pd.DataFrame, first: str, second: str) -> str:
    """The metrics in which ``second`` is ahead of ``first``, by more than their smallest shown digit, in words."""
    found = []
    for name in (name for name in WITNESSES if name in block and name != main_metric(block)):
        ours, theirs = (block[block.backbone == one][name].mean() for one in (first, second))
        texts = [text_of(value, name) for value in (theirs, ours)]
        if (theirs < ours) == (LABELS[name].better == "lower") and theirs != ours and texts[0] != texts[1]:
            found.append(f"{LABELS[name].label} ({texts[0]} against {texts[1]})")
    return ", ".join(found)


def _line(first: str, second: str, pair: Verdict | None, family: list[Verdict], low: set[str], rising: bool) -> str:
    if not second:
        return f"No recommendation: {first} is alone."
    if pair is None:
        return f"No recommendation: {first} and {second} share no seed and setting."
    where = f", {pair.within}" if pair.within else ""
    if pair.better and first in low:
        ahead = f"{first} is ahead of {second} by {pair.lead()}{where}"
        return f"No recommendation: {ahead}, but below k-means on patches."
    if pair.better:
        return f"Take {first}: better than {second}, the second, by {pair.lead()}{where}."
    more = settles(pair, sum(one.p is not None and one.better is None for one in family))
    more += ", or more steps for all, whose curves still fall" if rising else ""
    return f"Not distinguishable: {first} leads {second} by {pair.lead()}{where}. What would settle it: {more}."


def settles(pair: Verdict, undecided: int) -> str:
    """What would tell the sides of ``pair`` apart; so many pairs of its family are ``undecided``, among which Holm's
    correction divides the level."""
    if pair.interval is None:
        count = FEWEST - pair.n
        return f"{count} more seed{'s' * (count > 1)} of both at the least, {FEWEST} being the fewest for a verdict"
    if pair.p < LEVEL:
        return "more images to score, over which the interval holds 0"
    needed = seeds_needed(pair.difference, pair.spread, LEVEL / undecided)
    if needed is None:
        return f"more than {MOST} seeds, so nothing of use: take the cheaper one"
    count = max(1, needed - pair.n)
    test = f"paired t test, power {POWER:.0%}, α {LEVEL} / {undecided}"
    return f"about {count} more seed{'s' * (count > 1)} of both ({test}, at the difference and spread so far)"


def seeds_needed(difference: float, spread: float, level: float) -> int | None:
    """The fewest paired seeds, FEWEST at least, with which a two-sided paired t test at ``level`` finds a mean
    ``difference`` of that standard deviation ``spread`` over seeds with POWER; None if MOST are too few."""
    from scipy import stats

    if not spread or not difference:
        return FEWEST if difference else None
    shares = (np.arange(2000) + 0.5) / 2000

    def power(count: int) -> float:
        """The mean over the spreads that may be drawn; scipy's noncentral t is no number where effects are large."""
        drawn = np.sqrt(stats.chi2.ppf(shares, count - 1) / (count - 1))
        bound, centre = stats.t.isf(level / 2, count - 1) * drawn, abs(difference) / spread * np.sqrt(count)
        return float(np.mean(stats.norm.sf(bound - centre) + stats.norm.cdf(-bound - centre)))

    found = FEWEST + bisect_left(range(FEWEST, MOST + 1), POWER, key=power)
    return found if found <= MOST else None


def _below(block: pd.DataFrame) -> pd.Series:
    """The mean margin over k-means in PSNR, dB, of each backbone that is below it."""
    margins = kmeans_margin(block).groupby(block.backbone).mean()
    return margins[margins < 0]


def _falling(curves: Curves) -> dict[str, float]:
    """How far the loss of each backbone fell in the second half of training, on average, where that is steep."""
    found = {}
    for backbone, own in curves.items():
        known = [fall for _, history in own if (fall := still_falling(history)) is not None]
        if known and np.mean(known) > STEEP:
            found[backbone] = float(np.mean(known))
    return found
