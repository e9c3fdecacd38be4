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

EXPONENTS = np.geomspace(0.05, 3.0, 200)  # of the laws that are tried
WARM = 0.1  # share of the steps that is left out at the start: warm-up, and codes that settle
COOL = 0.6  # share of the steps where it ends: from there on the falling rate, not the number of steps, lowers the loss
FEWEST = 8  # rows of a history that a law is fitted to
HISTORIES = 20  # of a backbone that are read
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
    negative; of the rows from WARM to COOL of the last step. None for fewer than FEWEST such rows, or losses that are
    not positive and finite.

    At a given exponent floor and scale are a linear problem, so that the best of EXPONENTS has no starting point to
    depend on."""
    from scipy.optimize import nnls

    t, y = np.asarray(steps, float), np.asarray(losses, float)
    kept = (t >= WARM * t[-1]) & (t <= COOL * t[-1]) if len(t) else np.zeros(0, bool)
    t, y = t[kept], y[kept]
    if len(t) < FEWEST or not (np.isfinite(y) & (y > 0)).all():
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


def outlook(block: pd.DataFrame) -> list[str]:
    """Of a block whose backbones were trained for equally many steps, and whose curves have a law: what twice the steps
    would still take off each backbone's training loss, and where, beyond them, the order of two would turn. Reads up to
    HISTORIES histories of each, whose mean is taken."""
    laws: dict[str, Law] = {}
    if block.steps.nunique() > 1:
        return []
    steps = float(block.steps.iloc[0])
    for backbone, own in block.sort_values("seed", kind="stable").groupby("backbone"):
        rows = [pd.DataFrame(Run(Path(folder)).history()) for folder in own.folder.head(HISTORIES)]
        if any("reconstruction" not in history for history in rows):
            continue
        mean = pd.concat(rows).groupby("step").reconstruction.mean()
        if found := law(mean.index.to_numpy(), mean.to_numpy()):
            laws[str(backbone)] = found
    if not laws:
        return []
    gains = ", ".join(f"{name} {1 - one(2 * steps) / one(steps):.0%}" for name, one in laws.items())
    sentences = [f"By power laws through the curves, twice the steps would take off the training loss: {gains}."]
    turns = {pair: crossing(laws[pair[0]], laws[pair[1]], steps) for pair in combinations(laws, 2)}
    found = [f"{a} and {b} at about {at:,.0f} steps" for (a, b), at in turns.items() if at]
    if len(laws) > 1:
        told = f"these curves would cross: {', '.join(found)}" if found else "no two of these curves would cross"
        sentences.append(f"By the same laws, beyond the {steps:,.0f} steps seen {told} (up to {REACH} times as many).")
    return sentences
