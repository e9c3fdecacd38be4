"""Runs as a pandas DataFrame, and the rules of what may be compared with what.

One row per run; a column has the name of its Config field or metric. Rows are ranked within a *block*: equal protocol
and equal bits per image.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pandas as pd

from bench.core.store import Run, Store
from bench.metrics import EVALUATORS, Metric
from bench.priors import generate
from bench.priors.config import PriorConfig
from bench.tokenizers import costs
from bench.tokenizers.config import Config

# In the order of tables. Described where they are computed: scores of reconstructions, and costs
METRICS: dict[str, Metric] = {
    **{name: metric for evaluator in EVALUATORS for name, metric in evaluator.METRICS.items()},
    **costs.METRICS,
}
PRIOR_METRICS: dict[str, Metric] = generate.METRICS  # of priors, in frames of their own (``prior_frame``)
PRIOR_CLOCKED = ("images_per_second_sample", "sampling_speedup", "train_seconds")
CLOCKED = ("images_per_second_encode", "images_per_second_decode", "train_seconds")  # true of one machine only
BUDGETS = {"params": 0.02, "flops": 0.02, "train_seconds": 0.05}  # what may be matched, and how closely
UNMATCHED = "†"

CONFIG = tuple(field.name for field in fields(Config))
PRIOR_CONFIG = tuple(field.name for field in fields(PriorConfig))
DEFAULTS = {field.name: field.default for field in fields(Config) if field.default is not MISSING}
# Config fields that say who ran, not what was set: never a setting whose values a table lists.
IDENTITY = ("backbone", "seed", "device", "precision", "data", "image_size")


def load_runs(results: str | Path = "results") -> pd.DataFrame:
    """All runs of tokenizers below ``results``, one row each: see ``frame``."""
    return frame(Store(Path(results)).runs())


def frame(runs: Iterable[Run]) -> pd.DataFrame:
    """One row per run: ``run_id``, ``status``, ``reason``, every Config field, every metric, ``params`` and ``flops``
    (encoder + decoder), ``protocol_*``, ``commit``, ``processor``, ``threads``.

    A run that was not finished has its Config, its bits (from the Config) and missing metrics. Its folder's path is in
    ``folder``. Columns exist also when there are no rows.
    """
    rows = [_row(run) for run in runs]
    columns = ["run_id", "status", "reason", *CONFIG, *METRICS, "commit", "processor", "threads", "folder"]
    table = pd.DataFrame(rows, columns=[*columns, *sorted({name for row in rows for name in row} - set(columns))])
    numeric = [name for name in table if name in METRICS or name.endswith("_kmeans")]
    table[numeric] = table[numeric].astype(float)
    return table


def _row(run: Run) -> dict[str, Any]:
    config, environment = run.config(), run.environment()
    row = {"run_id": run.folder.name, "status": run.status, "reason": run.reason, **DEFAULTS, **config}
    row |= {name: environment.get(name) for name in ("commit", "processor", "threads")}
    row["folder"] = str(run.folder)
    bits = config["grid_size"] ** 2 * math.log2(config["codebook_size"])
    row |= {"tokens": config["grid_size"] ** 2, "bits_per_image": bits}
    row["bits_per_pixel"] = bits / config["image_size"] ** 2
    if run.finished:
        row |= run.metrics()
        row |= {f"protocol_{name}": value for name, value in run.protocol().items()}
    return row


def prior_frame(runs: Iterable[Run]) -> pd.DataFrame:
    """One row per prior: ``run_id``, ``status``, ``reason``, every PriorConfig field, those Config fields of its
    tokenizer that PriorConfig does not have, the others as ``tokenizer_FIELD``, every metric, ``tokenizer_digest``,
    ``protocol_*``, ``processor``, ``threads`` and ``folder``.

    A prior that was not finished has missing metrics. Columns exist also when there are no rows.
    """
    rows = []
    for run in runs:
        over = {f"tokenizer_{name}" if name in PRIOR_CONFIG else name: own for name, own in run.tokenizer().items()}
        row = {"run_id": run.folder.name, "status": run.status, "reason": run.reason, **over, **run.config()}
        row |= {name: run.environment().get(name) for name in ("processor", "threads")}
        if run.finished:
            protocol = run.protocol()
            row["tokenizer_digest"] = protocol.pop("tokenizer")  # whose codes, not how they were measured
            row |= run.metrics() | {f"protocol_{name}": value for name, value in protocol.items()}
        rows.append({**row, "folder": str(run.folder)})
    fields_of_both = [f"tokenizer_{name}" if name in PRIOR_CONFIG else name for name in CONFIG]
    columns = ["run_id", "status", "reason", *PRIOR_CONFIG, *fields_of_both, *PRIOR_METRICS, "processor", "threads"]
    columns += ["folder"]
    table = pd.DataFrame(rows, columns=[*columns, *sorted({name for row in rows for name in row} - set(columns))])
    numeric = [name for name in table if name in PRIOR_METRICS or name.endswith(("_real", "_shuffled"))]
    table[numeric] = table[numeric].astype(float)
    return table


def prior_settings(priors: pd.DataFrame) -> list[str]:
    """What was set differently among ``priors`` of one kind over tokenizers of one backbone, the seed apart."""
    names = [name for name in CONFIG if name not in PRIOR_CONFIG]
    names += [*PRIOR_CONFIG, *(f"tokenizer_{name}" for name in CONFIG if name in PRIOR_CONFIG)]
    apart = {"tokenizer", "prior", *IDENTITY, *(f"tokenizer_{name}" for name in IDENTITY)}
    names = [name for name in names if name not in apart]
    if priors.empty:
        return []
    counts = priors.groupby(["backbone", "prior"])[names].nunique(dropna=False).max()
    return list(counts.index[counts > 1])


def with_rates(table: pd.DataFrame, priors: pd.DataFrame) -> pd.DataFrame:
    """``table`` with what its codes cost under the best of ``priors`` over them: ``coded_bits_per_image`` and
    ``coded_bits_per_pixel``, missing where there is none."""
    names = ["coded_bits_per_image", "coded_bits_per_pixel"]
    least = priors.groupby("tokenizer")[names].min().astype(float)
    return table.join(least, on="run_id")


def protocols(table: pd.DataFrame) -> list[pd.DataFrame]:
    """Finished rows of ``table``, split into groups that were measured the same way, largest group first."""
    finished = table[table.status == "finished"]
    names = [name for name in finished if name.startswith("protocol_")]
    if finished.empty:
        return []
    groups = [group for _, group in finished.groupby(names, dropna=False, sort=False)]
    return sorted(groups, key=len, reverse=True)


def blocks(table: pd.DataFrame) -> Iterator[pd.DataFrame]:
    """Groups of finished rows with equal protocol *and* equal bits per image, ascending in bits: the only rows that
    may be ranked against each other."""
    for group in protocols(table):
        for _, block in group.groupby("bits_per_image", sort=True):
            yield block


def differing(a: pd.DataFrame, b: pd.DataFrame) -> dict[str, tuple[Any, Any]]:
    """Why two blocks are not ranked against each other: field → (value in ``a``, value in ``b``)."""
    names = [name for name in a if name.startswith("protocol_")] + ["bits_per_image"]
    pairs = {name: (a[name].iloc[0], b[name].iloc[0]) for name in names}
    return {
        name.removeprefix("protocol_"): pair
        for name, pair in pairs.items()
        if pair[0] != pair[1] and not all(pd.isna(value) for value in pair)
    }


def settings(table: pd.DataFrame) -> list[str]:
    """Config fields that take several values within one backbone: what an ablation swept. The seed is not one."""
    names = [name for name in CONFIG if name not in IDENTITY]
    counts = table.groupby("backbone")[names].nunique(dropna=False) if len(table) else pd.DataFrame()
    return [name for name in names if len(counts) and counts[name].max() > 1]


def uneven(table: pd.DataFrame) -> list[str]:
    """Config fields that are fixed within each backbone but differ from one backbone to another, such as width."""
    names = [name for name in CONFIG if name not in IDENTITY and name not in settings(table)]
    return [name for name in names if table[name].nunique(dropna=False) > 1]


def summary(block: pd.DataFrame, unscored: pd.DataFrame | None = None) -> pd.DataFrame:
    """Mean and spread over seeds: one row per backbone and setting of a block.

    Columns: ``backbone``, the settings, ``n`` (scored seeds), ``failed`` (rows of
    ``unscored`` with the block's data, image size and bits, whether the same setting was ever scored or not), and per
    metric ``METRIC`` (mean) and ``METRIC_std`` (sample standard deviation; missing when n is 1).
    """
    failed = block.iloc[:0]
    if unscored is not None and len(unscored):
        failed = unscored.merge(block[["data", "image_size", "bits_per_image"]].drop_duplicates())
    by = ["backbone", *settings(pd.concat([block, failed]))]
    names = [name for name in METRICS if name in block and block[name].notna().any()]
    groups = block.groupby(by, dropna=False)
    table = pd.concat([groups[names].mean(), groups[names].std().add_suffix("_std")], axis=1)
    table = table[[column for name in names for column in (name, f"{name}_std")]]
    sizes = [groups.size(), failed.groupby(by, dropna=False).size()]
    counts = pd.concat(sizes, axis=1, keys=["n", "failed"], sort=False)  # values may be of several types
    return counts.fillna(0).astype(int).join(table).reset_index()


def unmatched(table: pd.DataFrame) -> pd.Series:
    """Which rows (of a frame or a summary) cost more or less than the others in every respect: True for those off the
    backbones' median in parameters *and* FLOPs by more than 2 % *and* in training time by more than 5 %.

    All False for a single backbone. ``python -m bench.run --match`` gives matched ones.
    """
    costs = table[list(BUDGETS)]
    median = costs.groupby(table.backbone).mean().median()
    off = (costs / median - 1).abs() > pd.Series(BUDGETS)
    return off.all(axis=1) & (table.backbone.nunique() > 1)
