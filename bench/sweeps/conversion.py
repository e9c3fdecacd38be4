"""Runs as trials: how they ended, what they have cost, and their curves, as Optuna has it of a trial."""

import itertools
import math
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from optuna.distributions import BaseDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial

from bench.core.runs import Run

from .definition import Space, distribution
from .kinds import KINDS, AnyConfig, Row, by_kind, kind_of

MAX_REPORTS = 40  # intermediate values per trial
Metrics = tuple[str, ...]


def curve(rows: list[Row], config: AnyConfig, direction: StudyDirection, after: int = 0) -> Iterator[tuple[int, float]]:
    """Steps beyond ``after`` and the training loss (see Kind) there: at most MAX_REPORTS, at the same steps in every
    trial of a study. Negative where the study maximises, so that the pruner's better is a smaller loss."""
    every = math.ceil(config.steps / MAX_REPORTS)
    sign = -1 if direction == StudyDirection.MAXIMIZE else 1
    for row in rows:
        if row["step"] // every > after // every:
            after = int(row["step"])
            yield after, sign * KINDS[config.SHELF].loss(config, row)


def report(trial: Trial, rows: list[Row], config: AnyConfig, after: int) -> int:
    """Reports the ``curve`` of ``rows``; returns the last step reported. Does nothing for a trial that another worker
    has taken for dead."""
    for step, loss in curve(rows, config, trial.study.direction, after):
        after = step
        with suppress(UpdateFinishedTrialError):
            trial.report(loss, step)
    return after


def scores(run: Run) -> dict[str, float]:
    """Metrics that a finished run has, in the order of tables."""
    metrics = run.metrics()
    return {name: metrics[name] for name in kind_of(run).metrics if name in metrics}


def first_scores(runs: list[Run]) -> dict[str, float]:
    """Metrics of the first of a trial's finished ``runs``, and those that it lacks of the first prior over them."""
    found: dict[str, float] = {}
    for _, (first, *_) in by_kind(runs):
        found = {**found, **scores(first), **found}
    return found


def attributes(runs: list[Run]) -> dict[str, Any]:
    """What a trial of ``runs`` is known by and has cost, its first scores, and why one of them failed."""
    about = {"run_id": runs[0].folder.name, "seconds": sum(map(seconds, runs))}
    about |= first_scores(list(itertools.takewhile(lambda run: run.finished, runs)))
    failed = next((run for run in runs if not run.finished), None)
    return about if failed is None else {**about, "status": failed.status, "reason": failed.reason}


def result(runs: list[Run], metrics: Metrics) -> tuple[TrialState, list[float] | None]:
    """How a trial of ``runs`` ended: with the means of ``metrics``, or without. One that tokenizers and priors are both
    scored with is that of the tokenizers."""
    status = next((run.status for run in runs if not run.finished), None)
    if status is not None:
        return (TrialState.PRUNED if status == "pruned" else TrialState.FAIL), None
    rows = [(kind.metrics, [run.metrics() for run in own]) for kind, own in by_kind(runs)]
    scored = [next((own for known, own in rows if name in known), [{}]) for name in metrics]
    values = [[row.get(name) for row in own] for name, own in zip(metrics, scored, strict=True)]
    if any(None in column for column in values):  # such as a metric that was not asked for then
        return TrialState.FAIL, None
    return TrialState.COMPLETE, [sum(column) / len(column) for column in values]


def ended(study: Study, params: dict[str, Any], runs: list[Run], metrics: Metrics, space: Space) -> FrozenTrial:
    """A trial whose runs ended elsewhere, as ``tell`` would have left it."""
    trial = drawn(params, space)
    trial.user_attrs |= attributes(runs)
    trial.state, trial.values = result(runs, metrics)
    if kind_of(runs[0]).has_curve(metrics) and runs[0].status != "damaged":
        config = runs[0].settings(kind_of(runs[0]).config)
        trial.intermediate_values = dict(curve(runs[0].history(), config, study.direction))
        *_, last = math.nan, *trial.intermediate_values.values()
        if trial.state == TrialState.PRUNED and not math.isnan(last):
            trial.value = last  # as Optuna says what a pruned trial is worth
    return trial


def seconds(run: Run) -> float:
    """What a run has cost, finished or not."""
    if run.finished:
        metrics = run.metrics()
        return sum(metrics.get(name, 0.0) for name in ("train_seconds", "score_seconds"))
    rows = run.history()
    return rows[-1].get("seconds", 0.0) if rows else 0.0


def drawn(params: dict[str, Any], space: Space, run_id: str | None = None) -> FrozenTrial:
    """A trial to be taken, of ``params`` from ``space``; a seed among them is an attribute, since nothing is to be
    learned of which is best. Raises ValueError where the space has no such value."""
    kept = {"run_id": run_id} if run_id else {}
    if "seed" in params:
        kept["seed"] = params["seed"]
        if type(params["seed"]) is not int:
            raise ValueError(f"seed is {params['seed']!r}, which is no whole number")
    values = {name: value for name, value in params.items() if name != "seed"}
    return waiting(values, {name: distribution(name, space.get(name)) for name in values}, kept)


def waiting(params: dict[str, Any], distributions: dict[str, BaseDistribution], kept: dict[str, Any]) -> FrozenTrial:
    """A trial to be taken, with the attributes that it has ``kept``; what ``params`` leaves open is sampled then."""
    return create_trial(
        state=TrialState.WAITING,
        params=params,
        distributions=distributions,
        user_attrs=kept,
        system_attrs={"fixed_params": params},
    )
