"""What others have claimed, answered by runs: yes, no, or not distinguishable."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import pandas as pd

from .frames import CONFIG, LABELS, METRICS, settings
from .statistics import holm, paired_t
from .tables import Cell, Sheet
from .verdict import FEWEST, LEVEL

YES, NO, OPEN = "yes", "no", "not distinguishable"


class Claim(NamedTuple):
    """That runs with the values ``more`` (column → value) have a larger number of ``metric`` than those with the values
    ``less``; or, with a ``margin`` > 0 in the metric's unit, that the two are alike to within it."""

    words: str  # as it was published
    metric: str
    more: dict[str, Any]
    less: dict[str, Any]
    margin: float = 0.0


class Answer(NamedTuple):
    """``answer`` is YES, NO or OPEN, and ``evidence`` the numbers for it in a sentence."""

    claim: Claim
    answer: str
    evidence: str


def read_claims(stored: Any) -> list[Claim]:
    """Claims as a study's file has them: a list of objects. Raises ValueError where it is no such list."""
    try:
        claims = [Claim(**one) for one in stored]
        for claim in claims:
            plain = (str, int, float, bool)
            values = [*claim.more.values(), *claim.less.values()]
            known = all(isinstance(value, plain) for value in values) and {*claim.more, *claim.less} <= {*CONFIG}
            number = isinstance(claim.margin, (int, float)) and claim.margin >= 0
            if not (known and number and claim.more and claim.less and claim.metric in METRICS):
                raise ValueError(f"{claim.words!r} is no claim on runs")
        return claims
    except (TypeError, AttributeError) as error:
        raise ValueError("its claims are no list of claims") from error


def answers(table: pd.DataFrame, claims: Sequence[Claim]) -> list[Answer]:
    """An answer to each of ``claims`` by the finished runs of ``table``, a frame.

    Paired are runs of equal seed and of equal other settings, over which a seed is averaged; a paired t test over
    seeds, two-sided, corrected by Holm over the claims on one metric. That two are alike is answered by the 95 %
    interval of their difference: yes where it lies within the margin, no where it lies beyond it. The bits of the two
    sides may differ, and are then told."""
    table = table[table.status == "finished"]
    differences = [_differences(table, claim) for claim in claims]
    tests = {at: paired_t(values.to_numpy()) for at, values in enumerate(differences) if len(values) >= FEWEST}
    adjusted: dict[int, float] = {}
    for metric in dict.fromkeys(claim.metric for claim in claims):
        family = [at for at in tests if claims[at].metric == metric]
        adjusted |= zip(family, holm([tests[at][1] for at in family]), strict=True)
    found = []
    for at, (claim, values) in enumerate(zip(claims, differences, strict=True)):
        interval, p = tests.get(at, (None,))[0], adjusted.get(at)
        evidence = _evidence(claim, values, interval, p) + _rates(table, claim)
        found.append(Answer(claim, _answer(claim, values, interval, p), evidence))
    return found


def sheet(found: Sequence[Answer]) -> Sheet:
    """``answers`` as a table."""
    rows = [[Cell(one.claim.words), Cell(one.answer), Cell(one.evidence)] for one in found]
    return Sheet(["claim", "answer", "evidence"], rows)


def _side(table: pd.DataFrame, values: dict[str, Any]) -> pd.DataFrame:
    return table[(table[list(values)] == pd.Series(values)).all(axis=1)]


def _differences(table: pd.DataFrame, claim: Claim) -> pd.Series:
    """more − less of each seed, averaged over the settings that both have in every counted seed."""
    sides = [_side(table, values) for values in (claim.more, claim.less)]
    both = pd.concat(sides)
    named = {*claim.more, *claim.less, "width", "depth"}  # which do not mean the same in two backbones
    others = [name for name in settings(both) if name not in named]
    more, less = (side.groupby(["seed", *others], dropna=False)[claim.metric].mean() for side in sides)
    shared = (more - less).dropna()
    return shared.unstack(others).dropna(axis=1).mean(axis=1) if others else shared


def _answer(claim: Claim, values: pd.Series, interval: tuple[float, float] | None, p: float | None) -> str:
    if interval is None:
        return OPEN
    if claim.margin:
        low, high = interval
        inside, beyond = -claim.margin < low and high < claim.margin, low > claim.margin or high < -claim.margin
        return YES if inside else NO if beyond else OPEN
    return OPEN if p >= LEVEL else YES if values.mean() > 0 else NO


def _evidence(claim: Claim, values: pd.Series, interval: tuple[float, float] | None, p: float | None) -> str:
    pair = f"{_named(claim.more)} against {_named(claim.less)}"
    if not len(values):
        return f"{pair}: no runs that share a seed"
    form = LABELS[claim.metric].form
    words = f"{pair}: {values.mean():+{form}} {LABELS[claim.metric].label}"
    if interval is None:
        return f"{words} on {len(values)} of the {FEWEST} seeds that an answer takes"
    low, high = interval
    sure = f"±{claim.margin:g} allowed" if claim.margin else f"p {p:.2g}"
    return f"{words} [{low:{form}}, {high:{form}}], {len(values)} paired seeds, {sure}"


def _rates(table: pd.DataFrame, claim: Claim) -> str:
    bits = [_side(table, values).bits_per_image.unique() for values in (claim.more, claim.less)]
    if any(len(one) != 1 for one in bits) or math.isclose(*(float(one[0]) for one in bits)):
        return ""
    return f"; at {bits[0][0]:g} bits an image against {bits[1][0]:g}"


def _named(values: dict[str, Any]) -> str:
    words = (str(value) if name == "backbone" else f"{name}={value}" for name, value in values.items())
    return ", ".join(words)
