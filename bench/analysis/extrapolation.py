"""Where learning curves lead, by a power law, and where those of two backbones would cross.

An extrapolation is a guess with a formula: it takes for granted that nothing changes but the number of steps, and that
the law which fits the steps seen holds beyond them.
"""

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from bench.core.runs import Run

from .verdict import FEWEST

EXPONENTS = np.geomspace(0.05, 3.0, 200)  # of the laws that are tried
WARM = 0.1  # share of the steps that is left out at the start: warm-up, and codes that settle
COOL = 0.6  # share of the steps where it ends: from there on the falling rate, not the number of steps, lowers the loss
ROWS = 8  # rows of a history that a law is fitted to
SPREAD = 2.0  # to which factor seeds have to agree on a crossing
HISTORIES = 20  # of a backbone that are read
WORTH = 0.005  # of a loss: what is less is shown as 0 %
REACH = 100  # how many times the steps seen a crossing may lie at


class Law(NamedTuple):
    """loss(steps) = floor + scale · steps^(−exponent), with ``error``, the root mean squared relative error over the
    rows that it was fitted to."""

    floor: float
    scale: float
    exponent: float
    error: float

    def __call__(self, steps: np.ndarray | float) -> np.ndarray | float:
        """The loss after so many ``steps`` > 0."""
        return self.floor + self.scale * np.power(steps, -self.exponent)


def law(steps: Sequence[float], losses: Sequence[float]) -> Law | None:
    """The power law of least squared relative error through ``losses`` > 0 at ``steps`` > 0, floor and scale not
    negative; of the rows from WARM to COOL of the last step. None for fewer than ROWS such rows, or losses that are
    not positive and finite.

    At a given exponent floor and scale are a linear problem, so that the best of EXPONENTS has no starting point to
    depend on."""
    from scipy.optimize import nnls

    t, y = np.asarray(steps, float), np.asarray(losses, float)
    kept = (t >= WARM * t[-1]) & (t <= COOL * t[-1]) if len(t) else np.zeros(0, bool)
    t, y = t[kept], y[kept]
    if len(t) < ROWS or not (np.isfinite(y) & (y > 0)).all():
        return None
    reference = t[-1]  # keeps powers near 1
    found = []
    for exponent in EXPONENTS:
        basis = np.stack([np.ones_like(t), (t / reference) ** -exponent], 1)
        (floor, scale), residual = nnls(basis / y[:, None], np.ones_like(y))
        found.append((residual, floor, scale, exponent))
    residual, floor, scale, exponent = min(found)
    return Law(floor, scale * reference**exponent, float(exponent), residual / len(t) ** 0.5)


def crossing(a: Law, b: Law, steps: float) -> float | None:
    """The first number of steps beyond ``steps`` at which the two laws give the same loss; None where there is none
    within REACH times as many, as where the lower one stays lower."""
    t = np.geomspace(steps, REACH * steps, 4001)
    sign = np.sign(a(t) - b(t))
    (change,) = np.nonzero(sign[1:] * sign[:-1] < 0)
    if not len(change):
        return None
    from scipy.optimize import brentq

    return float(brentq(lambda at: a(at) - b(at), t[change[0]], t[change[0] + 1]))


History = Sequence[dict[str, float]]
Curves = dict[str, list[tuple[int, History]]]  # of each backbone seeds and histories, by seed


def histories(block: pd.DataFrame) -> Curves:
    """Up to HISTORIES histories of each backbone of a block, and as many more as that takes one of each seed."""
    found: Curves = {}
    for backbone, own in block.sort_values("seed", kind="stable").groupby("backbone"):
        wanted = own.index[:HISTORIES].union(own.drop_duplicates("seed").index[:HISTORIES], sort=False)
        rows = own.loc[wanted].sort_values("seed", kind="stable")
        found[str(backbone)] = [
            (seed, Run(Path(folder)).history()) for seed, folder in zip(rows.seed, rows.folder, strict=True)
        ]
    return found


def outlook(curves: Curves, steps: float) -> list[str]:
    """Of the histories of backbones that were trained for so many ``steps``, as far as they have a law: what twice the
    steps would still take off each one's training loss, unless that is less than WORTH of any; and of three seeds and
    more, where beyond them the order of two would turn, if each seed has it turn, at places no further than a factor of
    SPREAD apart."""
    laws = {}
    for backbone, own in curves.items():
        found = [law(*_curve(history)) for history in dict(reversed(own)).values()]  # the first of each seed
        if all(found):
            laws[backbone] = found
    gains = {name: np.mean([1 - one(2 * steps) / one(steps) for one in found]) for name, found in laws.items()}
    if max(gains.values(), default=0.0) < WORTH:
        return []
    told = ", ".join(f"{name} {gain:.0%}" for name, gain in gains.items())
    sentences = [f"By power laws through the curves, twice the steps would take off the training loss: {told}."]
    if (seeds := min(map(len, laws.values()))) >= FEWEST and len(laws) > 1:
        pairs = list(combinations(laws, 2))
        turns = {pair: _turn(list(zip(*(laws[name] for name in pair), strict=False)), steps) for pair in pairs}
        found = [f"{a} and {b} at {low:,.0f} to {high:,.0f} steps" for (a, b), (low, high) in turns.items() if low]
        turn = f"these would change order: {'; '.join(found)}" if found else "no two backbones would change order"
        sentences.append(f"By the curves of {seeds} seeds, which agree on it, beyond {steps:,.0f} steps {turn}.")
    return sentences


def _curve(history: History) -> tuple[list[float], list[float]]:
    rows = [row for row in history if "reconstruction" in row]
    return [row["step"] for row in rows], [row["reconstruction"] for row in rows]


def _turn(pairs: list[tuple[Law, Law]], steps: float) -> tuple[float, float] | tuple[None, None]:
    """The first and the last place at which pairs of laws cross, one pair per seed; None where they disagree."""
    places = [crossing(a, b, steps) for a, b in pairs]
    lower = {bool(a(steps) < b(steps)) for a, b in pairs}
    if None in places or len(lower) > 1 or max(places) > SPREAD * min(places):
        return None, None
    return min(places), max(places)
