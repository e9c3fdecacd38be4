"""What a search found on validation, and what is left of that on the test.

A trial is all runs of a search with equal values of the searched settings, one per seed. The best of many trials is
partly good luck, so that its validation score flatters it: what counts are fresh seeds, scored on the test.
"""

from collections.abc import Sequence

import pandas as pd

from bench.core.runs import HELD_OUT

from .frames import METRICS, best_first
from .statistics import role_verdicts, sentences
from .tables import Sheet, best_of, cell, text_of

RATE = "bits_per_image"
WINNER, DEFAULT, BOTH = "winner", "default", "winner, default"  # what a confirming run has the settings of
ROLES = {WINNER: "winner", DEFAULT: "default", BOTH: "winner, which is the default"}
SHOWN = ("psnr", "perplexity")


def goal(metrics: Sequence[str]) -> str:
    """Which of a search's metrics says what is best at one rate."""
    return next((name for name in metrics if name != RATE), RATE)


def trials(table: pd.DataFrame, fields: Sequence[str]) -> pd.DataFrame:
    """One row per trial among the finished rows of ``table`` (a frame): backbone, ``fields``, bits, ``n`` (seeds) and
    the means of all metrics. Trials with fewer seeds than others of their backbone are left out."""
    by = ["backbone", *fields]
    done = table[table.status == "finished"]
    if done.empty:
        return done.assign(n=0)
    names = [name for name in METRICS if name in done and done[name].notna().any()]
    groups = done.groupby(by, dropna=False)
    found = groups[names].mean().assign(n=groups.size()).reset_index()
    return found[found.n == found.groupby("backbone").n.transform("max")]


def front(found: pd.DataFrame, metric: str) -> pd.Series:
    """Which of ``trials`` no other trial of its backbone beats: True where none has as few bits and a better
    ``metric``, or fewer bits and as good a one."""
    sign = 1 if METRICS[metric].better == "lower" else -1
    best = pd.Series(False, index=found.index)
    for _, own in found.groupby("backbone"):
        ordered = own.assign(loss=sign * own[metric]).dropna(subset="loss").sort_values([RATE, "loss"], kind="stable")
        least = float("inf")
        for index, loss in ordered.loss.items():
            best[index] = loss < least
            least = min(least, loss)
    return best


def winners(found: pd.DataFrame, metric: str) -> pd.DataFrame:
    """The best of ``trials`` of each backbone at each rate, by ``metric``."""
    ordered = best_first(found.dropna(subset=metric), metric)
    return ordered.groupby(["backbone", RATE], sort=True).head(1).sort_values([RATE, "backbone"], kind="stable")


def rate_sheet(found: pd.DataFrame, fields: Sequence[str], metric: str) -> Sheet:
    """The best trial of each backbone at each rate, and which of these are on its front of rate and distortion."""
    on_front, table = front(found, metric), winners(found, metric)
    names = [name for name in dict.fromkeys((metric, *SHOWN)) if name in table]
    keys = ["backbone", RATE, "front", *fields, "n", *names]
    rows = []
    for index, row in table.iterrows():
        best = {name: best_of(table[table[RATE] == row[RATE]][name], name) for name in names}
        marks = {"front": "yes" if on_front[index] else "no"}
        rows.append([cell(key, marks.get(key, row.get(key)), None, best.get(key)) for key in keys])
    counts = ", ".join(f"{count} of {name}" for name, count in found.groupby("backbone").size().items())
    note = (
        f"Scores are of validation images, means over the seeds of a trial; trials: {counts}. Bold: the best at its "
        "rate. Front: no other trial of the backbone has as few bits and a better score. The best of many trials is "
        "flattered by chance: --confirm N trains it on fresh seeds and scores it on the test."
    )
    return Sheet(keys, rows, notes=[note], order=metric)


def confirmed_sheet(rows: pd.DataFrame, found: pd.DataFrame, fields: Sequence[str], metric: str) -> Sheet:
    """Winner and default of each backbone on fresh seeds: their test scores beside what the search saw.

    ``rows``: finished confirming runs, with their ``role``; ``found``: the trials of the search.
    """
    names = [name for name in dict.fromkeys((metric, *SHOWN)) if name in rows]
    groups = rows.groupby(["backbone", "role", *fields], dropna=False)
    table = pd.concat([groups[names].mean(), groups[names].std().add_suffix("_std")], axis=1)
    table = table.assign(n=groups.size()).reset_index().sort_values(["backbone", "role"], ascending=[True, False])
    seen = found[["backbone", *fields, metric]].rename(columns={metric: "searched"})
    table = table.merge(seen, how="left", on=["backbone", *fields])
    first = rows.iloc[0]
    heads = {"searched": f"{METRICS[metric].label}, validation, in the search"}
    keys = ["backbone", "role", *fields, "searched", "n", *names]
    best = {name: best_of(table[name], name) for name in names}
    texts = [
        [cell(metric if key == "searched" else key, row[key], row.get(f"{key}_std"), best.get(key)) for key in keys]
        for row in table.to_dict("records")
    ]
    where = HELD_OUT[first.protocol_scored_on]
    notes = [f"Mean ± standard deviation over fresh seeds, on {first.protocol_count:.0f} {where} images."]
    return Sheet([heads.get(key, key) for key in keys], texts, notes=notes, order=metric)


def answers(rows: pd.DataFrame, found: pd.DataFrame, fields: Sequence[str], metric: str) -> list[str]:
    """Of each backbone what validation promised of the winner, and what the test says of it and of the default; then
    the verdicts on them. ``rows``, ``found``: as for ``confirmed_sheet``."""
    label, where = METRICS[metric].label, HELD_OUT[rows.iloc[0].protocol_scored_on]
    promised = found.set_index(["backbone", *fields])[metric]
    lines = []
    for backbone, own in rows.groupby("backbone"):
        chosen = own[own.role != DEFAULT]
        scores = own.groupby("role")[metric].mean()
        if chosen.empty:
            continue
        values = chosen.iloc[0][list(fields)]
        promise = promised.get((backbone, *values))
        settings = ", ".join(f"{name} {text_of(value)}" for name, value in values.items())
        told = [f"{text_of(promise, metric)} promised on validation"] if promise is not None else []
        told += [f"{text_of(scores[role], metric)} on the {where} for the {ROLES[role]}" for role in scores.index[::-1]]
        lines.append(f"{backbone}, {settings}: {label} {', '.join(told)}")
    return lines + sentences(role_verdicts(rows, (metric,)))
