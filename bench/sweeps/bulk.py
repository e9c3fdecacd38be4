"""Trials that wait or have ended, added to an Optuna study by the thousand.

Optuna itself writes one attribute after the other with two statements each, and a trial has a hundred of them.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime
from typing import Any, TypeVar

from optuna.distributions import distribution_to_json
from optuna.storages import RDBStorage
from optuna.storages._rdb import models
from optuna.storages._rdb.storage import _create_scoped_session
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import func, insert, select

T = TypeVar("T")
Row = dict[str, Any]


class Unwritten:
    """In place of a storage: adds what Optuna writes about ``trial`` to the trial itself, which no database has yet."""

    def __init__(self, trial: FrozenTrial):
        self.trial = trial

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        """As that of a storage."""
        self.trial.system_attrs[key] = value


def add_trials(
    storage: RDBStorage,
    study_id: int,
    added: Sequence[tuple[FrozenTrial, T]],
    about: Callable[[FrozenTrial, T], dict[str, Any]],
) -> None:
    """Adds trials to a study, all or none of them, as ``Study.add_trials`` would. ``about`` is called with each, and
    what came with it, as soon as the trial has an id; it may still add attributes to that, and gives new ones of the
    study."""
    trials = [one for one, _ in added]
    trial, now = models.TrialModel, datetime.now()
    with _create_scoped_session(storage.scoped_session) as session:
        models.StudyModel.find_or_raise_by_id(study_id, session, for_update=True)
        rows = [trial(study_id=study_id, state=one.state) for one in trials]
        for row in rows:
            if row.state != TrialState.WAITING:
                row.datetime_start = row.datetime_complete = now
        session.add_all(rows)
        session.flush()  # from here on nobody else adds any
        earlier = select(func.count()).where(trial.study_id == study_id, trial.trial_id < rows[0].trial_id)
        for number, row in enumerate(rows, session.scalar(earlier)):
            row.number = number
        session.flush()
        attributes: Row = {}
        for (one, beside), row in zip(added, rows, strict=True):
            one._trial_id, one.number = row.trial_id, row.number
            attributes |= about(one, beside)
        new = [{"study_id": study_id, "key": key, "value_json": json.dumps(attributes[key])} for key in attributes]
        for model, found in (*_TABLES.items(), (models.StudySystemAttributeModel, lambda _: new)):
            if found := list(found(trials)):
                session.execute(insert(model), found)


def _params(trials: Iterable[FrozenTrial]) -> Iterator[Row]:
    texts: dict[Any, str] = {}  # trials share their distributions
    for trial in trials:
        for name, value in trial.params.items():
            one = trial.distributions[name]
            if one not in texts:
                texts[one] = distribution_to_json(one)
            stored = {"param_value": one.to_internal_repr(value), "distribution_json": texts[one]}
            yield {"trial_id": trial._trial_id, "param_name": name, **stored}


def _attributes(name: str) -> Callable[[Iterable[FrozenTrial]], Iterator[Row]]:
    def rows(trials: Iterable[FrozenTrial]) -> Iterator[Row]:
        for trial in trials:
            for key, value in getattr(trial, name).items():
                yield {"trial_id": trial._trial_id, "key": key, "value_json": json.dumps(value)}

    return rows


def _values(trials: Iterable[FrozenTrial]) -> Iterator[Row]:
    for trial in trials:
        for objective, value in enumerate(trial.values or ()):
            stored, kind = models.TrialValueModel.value_to_stored_repr(value)
            yield {"trial_id": trial._trial_id, "objective": objective, "value": stored, "value_type": kind}


def _curves(trials: Iterable[FrozenTrial]) -> Iterator[Row]:
    for trial in trials:
        for step, value in trial.intermediate_values.items():
            stored, kind = models.TrialIntermediateValueModel.intermediate_value_to_stored_repr(value)
            row = {"trial_id": trial._trial_id, "step": step}
            yield {**row, "intermediate_value": stored, "intermediate_value_type": kind}


# Optuna's table → what of trials goes into it.
_TABLES = {
    models.TrialValueModel: _values,
    models.TrialParamModel: _params,
    models.TrialUserAttributeModel: _attributes("user_attrs"),
    models.TrialSystemAttributeModel: _attributes("system_attrs"),
    models.TrialIntermediateValueModel: _curves,
}
