"""How much each swept setting mattered."""

from typing import Any

import optuna
import pandas as pd
from optuna.trial import create_trial

from bench.analysis.frames import settings

from .definition import holding

MAX_ROWS = 150  # runs of a backbone that importance is computed from


def importances(table: pd.DataFrame, metric: str) -> pd.DataFrame:
    """How much of the variance of ``metric`` each swept field, and the seed, explains within a backbone.

    fANOVA (Hutter et al. 2014) over the finished rows of ``table``, at most MAX_ROWS of a backbone. Columns backbone,
    parameter and importance, which sums to 1 in a backbone; none has fewer than 4 runs, nothing swept or no variance.
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
        distributions = {name: holding(_numbers(rows[name])) for name in names}
        study = optuna.create_study()
        study.add_trials(
            create_trial(params=dict(zip(names, values, strict=True)), distributions=distributions, value=value)
            for *values, value in rows.itertuples(index=False)
        )
        evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
        shares = optuna.importance.get_param_importances(study, evaluator=evaluator)
        found += [(backbone, name, share) for name, share in shares.items()]
    return pd.DataFrame(found, columns=["backbone", "parameter", "importance"])


def _numbers(values: pd.Series) -> list[Any]:
    """``values``, whole numbers as others: a number's order and scale help the forest, and cost it less."""
    return [float(value) if type(value) is int else value for value in values]
