"""How two runs differ: what was set, on which machine, how they were measured, and which scores are better."""

from __future__ import annotations

from typing import Any, NamedTuple

from bench.core.store import Run

from .frames import CLOCKED, METRICS, Metric, differing, frame

Pairs = dict[str, tuple[Any, Any]]  # by name the value in run A and the one in run B, where they are not equal


class Change(NamedTuple):
    """A metric's values in A and B, and what B is: "better", "worse", "equal" as shown, or "" where the two are not
    ranked."""

    metric: Metric
    a: float
    b: float
    verdict: str


class Difference(NamedTuple):
    """How run B differs from run A. The rest is empty unless both are finished: why the two must not be ranked against
    each other, metrics that both have, and where known, by metric, on which share of ``images`` B is better."""

    config: Pairs
    environment: Pairs
    refusals: Pairs
    changes: list[Change]
    wins: dict[str, float]
    images: int


def compare(a: Run, b: Run) -> Difference:
    """How ``b`` differs from ``a``. Clocked metrics of two machines are not ranked."""
    config = _unequal(a.config(), b.config())
    environment = _unequal(_flat(a.environment()), _flat(b.environment()))
    if not (a.finished and b.finished):
        return Difference(config, environment, {}, [], {}, 0)
    table = frame([a, b])
    refusals = differing(table[:1], table[1:])
    ranked = set() if refusals else {name for name, metric in METRICS.items() if metric.better}
    if environment.keys() & {"processor", "threads"}:
        ranked -= set(CLOCKED)
    both = [name for name in METRICS if name in table and not table[name].isna().any()]
    changes = [_change(METRICS[name], *table[name], name in ranked) for name in both]
    scored = ranked and all((run.folder / "per_image.npz").is_file() for run in (a, b))
    return Difference(config, environment, refusals, changes, *(_wins(a, b) if scored else ({}, 0)))


def _change(metric: Metric, a: float, b: float, ranked: bool) -> Change:
    if not ranked:
        return Change(metric, a, b, "")
    if f"{a:{metric.form}}" == f"{b:{metric.form}}":
        return Change(metric, a, b, "equal")
    return Change(metric, a, b, "better" if (b < a) == (metric.better == "lower") else "worse")


def _wins(a: Run, b: Run) -> tuple[dict[str, float], int]:
    """By metric on which share of the validation images B has the better score, and how many images there are; both
    runs scored the same ones."""
    scores_a, scores_b = a.per_image(), b.per_image()
    gains = {name: scores_b[name] - scores_a[name] for name in METRICS if name in scores_a and name in scores_b}
    won = {name: gain < 0 if METRICS[name].better == "lower" else gain > 0 for name, gain in gains.items()}
    return {name: float(better.mean()) for name, better in won.items()}, max(map(len, won.values()), default=0)


def _unequal(a: dict[str, Any], b: dict[str, Any]) -> Pairs:
    pairs = {name: (a.get(name), b.get(name)) for name in {**a, **b}}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _flat(environment: dict[str, Any]) -> dict[str, Any]:
    versions = environment.get("versions", {})
    rest = {name: value for name, value in environment.items() if name != "versions"}
    return rest | {f"versions.{name}": version for name, version in versions.items()}
