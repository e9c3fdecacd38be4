"""Pages of the dashboard on all of a study: a trial per cell of every backbone, worth its mean over seeds.

In the studies that workers take trials from, each seed of an ablation is one, and the best is the luckiest. These
are made of the study's file and its runs, each time anew; nobody takes a trial from them.
"""

import statistics
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from optuna.artifacts import get_all_artifact_meta
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from bench.core.errors import Damaged
from bench.core.runs import Run
from bench.core.store import Store

from . import conversion
from .conversion import Metrics
from .definition import distribution, holding
from .index import BETTER, Index, Listed, Shelf, Study, has_ended, shelves
from .kinds import PRIORS, endings

Values = dict[str, Any]


class Page(NamedTuple):
    """An overview, and what is on it."""

    study: Study
    trials: list[FrozenTrial]


ENDINGS = {"runs": "", "priors": "-priors", "confirmed": "-confirm"}  # of their names, by part of the study's file
# What notes say of trials here, and of those in the studies that workers take trials from.
TOLD = (
    "A trial is a cell: one setting of one backbone, worth the mean over its seeds; it waits until all have ended. "
    "Hold those against each other whose bits_per_image are equal."
)
ELSEWHERE = "A trial is what one worker does; means over seeds, of all backbones, are in"


def write(index: Index, store: Store, name: str) -> list[Page]:
    """Makes the overviews of the study called ``name``, of its tokenizers, of the priors over them and of what confirms
    a search, and returns them. Raises UserError on an unknown name, and Damaged where the study's file is."""
    pages = []
    with index.planning:
        for shelf in shelves(store, name):
            if not shelf.listed:
                continue
            once = [one._replace(runs=[run.snapshot() for run in one.runs]) for one in shelf.listed]
            shelf = shelf._replace(listed=once)
            study = index.open(name + ENDINGS[shelf.key], shelf.metrics)
            study.set_user_attr("overview", True)
            pictures = _pictures(index, shelf)
            cells = [
                (_trial(values, distributions, listed, shelf.metrics), _note(listed, shelf.metrics, pictures))
                for values, distributions, listed in _cells(store, name, shelf)
            ]
            index.replace(study, cells)
            pages.append(Page(study, [trial for trial, _ in cells]))
    return pages


def best(page: Page, metric: str) -> FrozenTrial | None:
    """The cell of a page that has the best mean of ``metric``, which it is ranked by alone; None where fewer than two
    have one, or where they spend unequal numbers of bits, of which the larger would win."""
    scored = [trial for trial in page.trials if trial.state == TrialState.COMPLETE]
    rates = {trial.user_attrs.get("bits_per_image") for trial in scored}
    if len(scored) < 2 or len(scored[0].values) > 1 or len(rates) > 1:
        return None
    pick = min if BETTER[metric] == "lower" else max
    return pick(scored, key=lambda trial: trial.value)


def _cells(store: Store, name: str, shelf: Shelf) -> list[tuple[Values, dict[str, BaseDistribution], list[Listed]]]:
    """By cell the values that it has of each parameter, the distributions of these, and what is listed of it."""
    cells: dict[tuple, list[Listed]] = {}
    rows = store.study(name)["runs"] if shelf.kind is PRIORS else {}
    for one in shelf.listed:
        values = {shelf.kind.key: one.label, **one.params}
        if shelf.kind is PRIORS:
            values["backbone"] = _tokenizer(one.runs[0], rows).get("backbone", values.get("backbone"))
        if "role" in one.row:
            values["role"] = one.row["role"]
        values.pop("seed", None)
        cells.setdefault(tuple(values.items()), []).append(one)
    every = [dict(values) for values in cells]
    drawn = shelf.space or {}
    names = dict.fromkeys(name for values in every for name in values)
    found = {
        name: distribution(name, drawn[name])
        if name in drawn
        else holding(values[name] for values in every if name in values)
        for name in names
    }
    return [(dict(key), {name: found[name] for name, _ in key}, listed) for key, listed in cells.items()]


def _tokenizer(run: Run, rows: dict[str, Values]) -> Values:
    """What a study's file says of the tokenizer below a prior; nothing where the prior has not begun."""
    with suppress(OSError, Damaged):
        return rows.get(str(run.config().get("tokenizer")), {})
    return {}


def _trial(
    values: Values, distributions: dict[str, BaseDistribution], listed: Sequence[Listed], metrics: Metrics
) -> FrozenTrial:
    """A cell as a trial: waiting until all of its seeds have ended, so that no mean of some is the best."""
    runs = [run for one in listed for run in one.runs]
    scored = _scores(listed)
    about: Values = {"n": len(scored), "seeds": ", ".join(map(str, scored))}
    about["runs"] = " ".join(one.runs[0].folder.name for one in listed)
    for name in dict.fromkeys(name for scores in scored.values() for name in scores):
        found = [scores[name] for scores in scored.values() if name in scores]
        about[name] = statistics.fmean(found)
        if name in metrics and len(found) > 1:
            about[f"{name}_std"] = statistics.stdev(found)
    state, worth = TrialState.WAITING, None
    if has_ended({*endings(runs).values()}):
        state, worth = conversion.result(runs, metrics)
        if failed := next((run for run in runs if not run.finished), None):
            about |= {"status": failed.status, "reason": failed.reason}
    return create_trial(state=state, values=worth, params=values, distributions=distributions, user_attrs=about)


def _scores(listed: Sequence[Listed]) -> dict[Any, dict[str, float]]:
    """By seed the scores of what is finished, tokenizer and prior alike."""
    found = {}
    for one in listed:
        if all(run.finished for run in one.runs):
            found[one.row.get("seed")] = conversion.first_scores(one.runs)
    return found


def _note(listed: Sequence[Listed], metrics: Metrics, pictures: dict[str, str]) -> str:
    """A row for each seed of a cell, and the picture of the first that has one."""
    lines = [f"| seed | {' | '.join(metrics)} | run |", "|---" * (2 + len(metrics)) + "|"]
    scored = _scores(listed)
    for one in listed:
        seed, run = one.row.get("seed"), one.runs[0]
        failed = next((each for each in one.runs if not each.finished), None)
        scores = scored.get(seed, {}) if failed is None else {}
        told = [f"{scores[name]:.4g}" if name in scores else "–" for name in metrics]
        ending = "" if failed is None else f", {failed.status}"
        lines.append(f"| {seed} | {' | '.join(told)} | {run.folder.name}{ending} |")
    shown = (pictures[one.runs[0].folder.name] for one in listed if one.runs[0].folder.name in pictures)
    return "\n".join([*lines, "", next(shown, "")])


def _pictures(index: Index, shelf: Shelf) -> dict[str, str]:
    """Run → Markdown of the picture that its trial shows in the study that it was taken from."""
    found = {}
    for label in dict.fromkeys(one.label for one in shelf.listed):
        study = index.open(shelf.kind.study(shelf.title, label), shelf.metrics)
        for trial in index.trials(study):
            for meta in get_all_artifact_meta(trial, storage=index.storage)[:1]:
                path = f"/artifacts/{study._study_id}/{trial._trial_id}/{meta.artifact_id}"
                found[trial.user_attrs.get("run_id", "")] = f"![{meta.filename}]({path})"
    return found
