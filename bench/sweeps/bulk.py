"""Trials that wait or have ended, added to an Optuna study by the thousand, and what only all of them can tell.

Optuna itself writes one attribute after the other with two statements each, and a trial has a hundred of them.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, TypeVar

from optuna.distributions import BaseDistribution, distribution_to_json, json_to_distribution
from optuna.storages import RDBStorage
from optuna.storages._rdb import models
from optuna.storages._rdb.storage import _create_scoped_session
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import Select, delete, func, insert, select, update
from sqlalchemy.orm import Session

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
    anew: bool = False,
) -> None:
    """Adds trials to a study, all or none of them, as ``Study.add_trials`` would; ``anew`` in place of those that it
    has. ``about`` is called with each, and what came with it, as soon as the trial has an id; it may still add
    attributes to that, and gives new ones of the study."""
    trials = [one for one, _ in added]
    trial, now = models.TrialModel, datetime.now()
    with _create_scoped_session(storage.scoped_session) as session:
        models.StudyModel.find_or_raise_by_id(study_id, session, for_update=True)
        if anew:
            _remove_trials(session, study_id)
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


def _remove_trials(session: Session, study_id: int) -> None:
    """Removes all trials of a study, and their notes, which the dashboard keeps among the attributes of the study."""
    ids = session.scalars(_of(study_id)).all()
    for model in (*_TABLES, models.TrialHeartbeatModel):
        session.execute(delete(model).where(model.trial_id.in_(_of(study_id))))
    session.execute(delete(models.TrialModel).where(models.TrialModel.study_id == study_id))
    kept, heads = models.StudySystemAttributeModel, tuple(f"dashboard:{trial_id}:note_" for trial_id in ids)
    known = session.execute(select(kept.study_system_attribute_id, kept.key).where(kept.study_id == study_id))
    notes = [number for number, key in known if key.startswith(heads)]
    for start in range(0, len(notes), 500):
        session.execute(delete(kept).where(kept.study_system_attribute_id.in_(notes[start : start + 500])))


def narrow(storage: RDBStorage, study_id: int, holding: Callable[[Iterable[Any]], BaseDistribution]) -> None:
    """Gives each parameter of a study's trials the distribution that ``holding`` makes of all of its values, in the
    order of trials; a parameter called seed becomes an attribute."""
    param, kept = models.TrialParamModel, models.TrialUserAttributeModel
    read = lru_cache(None)(json_to_distribution)  # trials share them
    with _create_scoped_session(storage.scoped_session) as session:
        models.StudyModel.find_or_raise_by_id(study_id, session, for_update=True)
        columns = (param.param_id, param.trial_id, param.param_name, param.param_value, param.distribution_json)
        found: dict[str, list[tuple[Any, Any]]] = {}  # name → row and value of each trial
        for row in session.execute(select(*columns).where(param.trial_id.in_(_of(study_id))).order_by(param.trial_id)):
            value = read(row.distribution_json).to_external_repr(row.param_value)
            found.setdefault(row.param_name, []).append((row, value))
        seeds, changed = found.pop("seed", []), []
        known = session.scalars(select(kept.trial_id).where(kept.trial_id.in_(_of(study_id)), kept.key == "seed"))
        told = set(known) if seeds else set()
        new = [(row.trial_id, value) for row, value in seeds if row.trial_id not in told]
        for pairs in found.values():
            held = holding(value for _, value in pairs)
            text = distribution_to_json(held)
            changed += [
                {"param_id": row.param_id, "param_value": held.to_internal_repr(value), "distribution_json": text}
                for row, value in pairs
                if row.distribution_json != text
            ]
        if new:
            rows = [{"trial_id": number, "key": "seed", "value_json": json.dumps(value)} for number, value in new]
            session.execute(insert(kept), rows)
        if seeds:
            session.execute(delete(param).where(param.trial_id.in_(_of(study_id)), param.param_name == "seed"))
        if changed:
            session.execute(update(param), changed)


def _of(study_id: int) -> Select:
    """Ids of the trials of a study."""
    return select(models.TrialModel.trial_id).where(models.TrialModel.study_id == study_id)


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
