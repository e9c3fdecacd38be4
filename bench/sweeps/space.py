"""Values that a field may take: what a search draws from, Optuna's view of it, and how much each field mattered."""

from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import optuna
import pandas as pd
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import Trial, create_trial

from backbones import BACKBONES
from bench.analysis.frames import settings
from bench.core.errors import UserError
from bench.core.settings import OneOf
from bench.tokenizers.config import Config

MAX_ROWS = 150  # runs of a backbone that importance is computed from
LARGEST = 2**31 - 1
TYPES = get_type_hints(Config)


class Range(NamedTuple):
    """Values of a searched Config field between two ends, both included; ``log`` samples orders of magnitude evenly."""

    low: float
    high: float
    log: bool = False

    @property
    def whole(self) -> bool:
        """Whether only whole numbers are meant: both ends are."""
        return isinstance(self.low, int) and isinstance(self.high, int)


Space = dict[str, Range | tuple]  # Config field → Range, or the tuple of its possible values


def read_space(stored: dict[str, Any]) -> Space:
    """A search's space as its study's file has it."""
    return {name: Range(**choice) if isinstance(choice, dict) else tuple(choice) for name, choice in stored.items()}


def distribution(name: str, choice: Range | tuple | None = None) -> BaseDistribution:
    """Optuna's distribution of a Config field: of a search's ``choice``, or the widest, the same for all values that an
    ablation may give it. Raises UserError for a field that has none."""
    if choice is None:
        choice = _widest(name)
    if isinstance(choice, Range):
        return (IntDistribution if choice.whole else FloatDistribution)(choice.low, choice.high, log=choice.log)
    return CategoricalDistribution(choice)


def _widest(name: str) -> Range | tuple:
    kind = TYPES[name]
    if name == "backbone":
        return (*BACKBONES, "timm")
    if kind is bool:
        return (False, True)
    if kind in (int, float):
        return Range(kind(0), kind(LARGEST))
    if get_origin(kind) is Literal:
        return get_args(kind)
    for rule in get_args(get_type_hints(Config, include_extras=True)[name]):
        if isinstance(rule, OneOf):
            return tuple(rule.choices)
    raise UserError(f"{name} is text without a list of choices and cannot be swept")


def suggest(trial: Trial, space: Space) -> dict[str, Any]:
    """Values of the searched fields for ``trial``; Optuna keeps those that it already has."""
    values = {}
    for name, choice in space.items():
        if isinstance(choice, Range):
            draw = trial.suggest_int if choice.whole else trial.suggest_float
            values[name] = draw(name, choice.low, choice.high, log=choice.log)
        else:
            values[name] = trial.suggest_categorical(name, choice)
    return values


def importances(table: pd.DataFrame, metric: str) -> pd.DataFrame:
    """How much of the variance of ``metric`` each swept field, and the seed, explains within a backbone.

    fANOVA (Hutter et al. 2014) over the finished rows of ``table``, at most MAX_ROWS of a backbone. Columns
    ``backbone``, ``parameter`` and ``importance``, which sums to 1 within a backbone. Left out are backbones with fewer
    than 4 runs, with nothing swept or with no variance.
    """
    found = []
    for backbone, rows in table[table.status == "finished"].groupby("backbone"):
        rows = rows[rows[metric].notna()]
        rows = rows.sample(min(len(rows), MAX_ROWS), random_state=0)
        swept = settings(rows)
        if len(rows) < 4 or not swept or rows[metric].nunique() < 2:
            continue
        names = [*swept, "seed"] if rows.seed.nunique() > 1 else list(swept)
        rows = rows[[*names, metric]].astype(object)  # Python's own numbers, not NumPy's
        distributions = {name: _range_of(rows[name]) for name in names}
        study = optuna.create_study()
        study.add_trials(
            create_trial(params=dict(zip(names, values, strict=True)), distributions=distributions, value=value)
            for *values, value in rows.itertuples(index=False)
        )
        evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
        shares = optuna.importance.get_param_importances(study, evaluator=evaluator)
        found += [(backbone, name, share) for name, share in shares.items()]
    return pd.DataFrame(found, columns=["backbone", "parameter", "importance"])


def _range_of(values: pd.Series) -> BaseDistribution:
    """The distribution that just holds ``values``: a number's order and scale help the forest, and cost it less."""
    if all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values):
        low, high = float(values.min()), float(values.max())
        return FloatDistribution(low, high, log=low > 0 and high >= 10 * low)
    return CategoricalDistribution(tuple(values.unique()))
