"""What a search found on validation, and what is left of that on the test.

A trial is all runs of a search with equal values of the searched settings, one per seed, and where it is judged by
what a prior generates, the prior over each. The best of many trials is partly good luck, so that its validation score
flatters it: what counts are fresh seeds, scored on the test.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import pandas as pd

from bench.core.runs import FAILURES, HELD_OUT
from bench.priors.models import LEARNED
from bench.priors.models.masked import BOUND

from .frames import GENERATION, LABELS, PRIOR, best_first, protocols
from .statistics import role_verdicts, sentences
from .tables import Sheet, best_of, cell, sampling, text_of

RATE, CODED = "bits_per_image", "coded_bits_per_image"  # of the codes as they are, and under a trial's prior
WINNER, DEFAULT, BOTH = "winner", "default", "winner, default"  # what a confirming run has the settings of
ROLES = {WINNER: "winner", DEFAULT: "default", BOTH: "winner, which is the default"}
SHOWN = ("psnr", "perplexity")


def report(
    study: dict[str, Any], table: pd.DataFrame, priors: pd.DataFrame
) -> tuple[list[tuple[str, Sheet]], list[str]]:
    """Titles and sheets on the trials of ``study``, where it is a search, and on the runs that confirm it, and what
    these say in sentences. ``table`` and ``priors``: frames with its runs."""
    sheets, answered, notes = [], [], []
    if study["kind"] != "search":
        return sheets, answered
    fields, metrics = study["sweep"], study["metrics"]
    generated = by_generation(metrics)
    if generated:
        places = {run_id: place for place, run_id in enumerate(study.get("priors", {}))}
        own = priors[priors.run_id.isin(places)].sort_values("run_id", key=lambda ids: ids.map(places))
        table = with_priors(table, own)
    runs = table[table.run_id.isin(study["runs"])]
    found = trials(runs, fields)
    if generated:
        notes = _generation_notes(runs, own[own.tokenizer.isin(runs.run_id)], fields)
    if len(found):
        title = "Front of the search" if rate(metrics) == CODED else "Best of the search at each rate"
        sheets.append((title, rate_sheet(found, fields, metrics, [*notes])))
    roles = {run_id: row.get("role") for run_id, row in study.get("confirmed", {}).items()}
    rows = table[(table.status == "finished") & table.run_id.isin(roles)]
    for group in protocols(rows.assign(role=rows.run_id.map(roles))):
        sheets.append(("Confirmed on fresh seeds", confirmed_sheet(group, found, fields, metrics)))
        answered += answers(group, found, fields, metrics)
    return sheets, answered


def goal(metrics: Sequence[str]) -> str:
    """Which of a search's metrics says what is best at one rate."""
    return next((name for name in metrics if name not in (RATE, CODED)), RATE)


def rate(metrics: Sequence[str]) -> str:
    """What a search of ``metrics`` counts as the rate of a trial."""
    return CODED if CODED in metrics else RATE


def by_generation(metrics: Sequence[str]) -> bool:
    """Whether a search of ``metrics`` judges a tokenizer by a prior over its codes."""
    return not {*metrics}.isdisjoint(GENERATION)


def with_priors(table: pd.DataFrame, priors: pd.DataFrame) -> pd.DataFrame:
    """``table`` with what the ``priors`` of a search, the newest last, were scored with and by which protocol. A
    tokenizer is finished when its prior is, and ended otherwise as that did; one without any is unfinished."""
    own = priors.drop_duplicates("tokenizer", keep="last").set_index("tokenizer")
    scores = [name for name in PRIOR.metrics if name in GENERATION]
    protocol = own.filter(like="protocol_").rename(columns=lambda name: name.replace("_", "_prior_", 1))
    table = table.drop(columns=scores, errors="ignore").join(own[scores].join(protocol), on="run_id")
    done = table.status == "finished"
    ended = table.run_id.map(own.status).fillna("unfinished")
    return table.assign(status=table.status.where(~done, ended))


def trials(table: pd.DataFrame, fields: Sequence[str]) -> pd.DataFrame:
    """One row per trial among the finished rows of ``table`` (a frame): backbone, ``fields``, bits, ``n`` (seeds) and
    the means of all metrics. Trials with fewer seeds than others of their backbone are left out."""
    by = ["backbone", *fields]
    done = table[table.status == "finished"]
    if done.empty:
        return done.assign(n=0)
    names = [name for name in LABELS if name in done and done[name].notna().any()]
    groups = done.groupby(by, dropna=False)
    found = groups[names].mean().assign(n=groups.size()).reset_index()
    return found[found.n == found.groupby("backbone").n.transform("max")]


def front(found: pd.DataFrame, metric: str, at: str = RATE) -> pd.Series:
    """Which of ``trials`` no other trial of its backbone beats: True where none has as low a rate ``at`` and a better
    ``metric``, or a lower one and as good a metric."""
    sign = 1 if LABELS[metric].better == "lower" else -1
    best = pd.Series(False, index=found.index)
    for _, own in found.groupby("backbone"):
        ordered = own.assign(loss=sign * own[metric]).dropna(subset=[at, "loss"])
        least = float("inf")
        for index, loss in ordered.sort_values([at, "loss"], kind="stable").loss.items():
            best[index] = loss < least
            least = min(least, loss)
    return best


def winners(found: pd.DataFrame, metric: str, at: str = RATE) -> pd.DataFrame:
    """The best of ``trials`` of each backbone at each rate, by ``metric``; of coded rates, of which hardly two are
    equal, those on the front."""
    if at == CODED:
        return found[front(found, metric, at)].sort_values([at, "backbone"], kind="stable")
    ordered = best_first(found.dropna(subset=metric), metric)
    return ordered.groupby(["backbone", at], sort=True).head(1).sort_values([at, "backbone"], kind="stable")


def _scores(metrics: Sequence[str], table: pd.DataFrame) -> list[str]:
    """Columns of scores that a search of ``metrics`` shows of ``table``, what it ranks by first."""
    more = (*metrics, CODED, "gfid_vgg16", RATE, "lpips_vgg") if by_generation(metrics) else ()
    names = dict.fromkeys((goal(metrics), *more, *SHOWN))
    return [name for name in names if name in table and (name != RATE or rate(metrics) == CODED)]


def rate_sheet(found: pd.DataFrame, fields: Sequence[str], metrics: Sequence[str], notes: Sequence[str] = ()) -> Sheet:
    """The best trial of each backbone at each rate, and which of these are on its front of rate and score; at coded
    rates the front. ``notes``: further ones."""
    metric, at = goal(metrics), rate(metrics)
    on_front, table = front(found, metric, at), winners(found, metric, at)
    names = [name for name in _scores(metrics, table) if name != at]
    keys = ["backbone", at, *(["front"] if at == RATE else []), *fields, "n", *names]
    rows = []
    for index, row in table.iterrows():
        best = {name: best_of(table[table[at] == row[at]][name], name) for name in names}
        marks = {"front": "yes" if on_front[index] else "no"}
        rows.append([cell(key, marks.get(key, row.get(key)), None, best.get(key)) for key in keys])
    counts = ", ".join(f"{count} of {name}" for name, count in found.groupby("backbone").size().items())
    shown = "Shown: the front, and no other trial. " if at == CODED else "Bold: the best at its rate. "
    note = (
        f"Scores are of validation images, means over the seeds of a trial; trials: {counts}. {shown}"
        f"Front: no other trial of the backbone has as few {'coded ' * (at == CODED)}bits and a better score. The best "
        "of many trials is flattered by chance: --confirm N trains it on fresh seeds and scores it on the test."
    )
    return Sheet(keys, rows, notes=[note, *notes], order=metric)


def _generation_notes(runs: pd.DataFrame, priors: pd.DataFrame, fields: Sequence[str]) -> Iterator[str]:
    """The protocol by which ``priors`` judge the ``runs`` of a search, and how many of its trials have no score."""
    for _, own in priors[priors.status == "finished"].groupby(["prior", "parameters", "steps", "samples"]):
        first = own.iloc[0]
        budget = f" of {first.parameters:,} parameters, {first.steps:,} steps of {first.batch_size}"
        yield (
            f"Prior over each tokenizer: {first.prior}{budget if first.prior in LEARNED else ''}; "
            f"{sampling(first)}, against {HELD_OUT[first.protocol_scored_on]} images, on whose codes bits are. "
            f"Extractor: {first.protocol_extractor_vgg16}."
        )
        if first.prior == "masked":
            yield BOUND
    failed = runs[runs.status.isin(FAILURES)].groupby(["backbone", *fields], dropna=False).size()
    counts = failed.groupby(level="backbone").size()
    if len(counts):
        told = ", ".join(f"{count} of {name}" for name, count in counts.items())
        yield f"Trials without a score, as a tokenizer or its prior failed: {told}; see the runs without scores."


def confirmed_sheet(rows: pd.DataFrame, found: pd.DataFrame, fields: Sequence[str], metrics: Sequence[str]) -> Sheet:
    """Winner and default of each backbone on fresh seeds: their test scores beside what the search saw.

    ``rows``: finished confirming runs, with their ``role``; ``found``: the trials of the search.
    """
    metric, names = goal(metrics), _scores(metrics, rows)
    groups = rows.groupby(["backbone", "role", *fields], dropna=False)
    table = pd.concat([groups[names].mean(), groups[names].std().add_suffix("_std")], axis=1)
    table = table.assign(n=groups.size()).reset_index().sort_values(["backbone", "role"], ascending=[True, False])
    seen = found[["backbone", *fields, metric]].rename(columns={metric: "searched"})
    table = table.merge(seen, how="left", on=["backbone", *fields])
    first = rows.iloc[0]
    heads = {"searched": f"{LABELS[metric].label}, validation, in the search"}
    keys = ["backbone", "role", *fields, "searched", "n", *names]
    best = {name: best_of(table[name], name) for name in names}
    texts = [
        [cell(metric if key == "searched" else key, row[key], row.get(f"{key}_std"), best.get(key)) for key in keys]
        for row in table.to_dict("records")
    ]
    where = HELD_OUT[first.protocol_scored_on]
    notes = [f"Mean ± standard deviation over fresh seeds, on {first.protocol_count:.0f} {where} images."]
    return Sheet([heads.get(key, key) for key in keys], texts, notes=notes, order=metric)


def answers(rows: pd.DataFrame, found: pd.DataFrame, fields: Sequence[str], metrics: Sequence[str]) -> list[str]:
    """Of each backbone what validation promised of the winner, and what the test says of it and of the default; then
    the verdicts on them. ``rows``, ``found``: as for ``confirmed_sheet``."""
    where = HELD_OUT[rows.iloc[0].protocol_scored_on]
    told = [goal(metrics), *([CODED] if rate(metrics) == CODED else [])]
    lines = []
    for backbone, own in rows.groupby("backbone"):
        chosen = own[own.role != DEFAULT]
        if chosen.empty:
            continue
        values = chosen.iloc[0][list(fields)]
        settings = ", ".join(f"{name} {text_of(value)}" for name, value in values.items())
        for metric in told:
            promise = found.set_index(["backbone", *fields])[metric].get((backbone, *values))
            scores = own.groupby("role")[metric].mean()
            parts = [f"{text_of(promise, metric)} promised on validation"] if promise is not None else []
            for role in scores.index[::-1]:
                parts.append(f"{text_of(scores[role], metric)} on the {where} for the {ROLES[role]}")
            lines.append(f"{backbone}, {settings}: {LABELS[metric].label} {', '.join(parts)}")
    return lines + sentences(role_verdicts(rows, told))
