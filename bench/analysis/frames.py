"""Runs as a pandas DataFrame, and the rules of what may be compared with what.

One row per run; a column has the name of its Config field or metric. Rows are ranked within a *block*: equal protocol
and equal bits per image.
"""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import MISSING, fields
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from bench.core import catalogue
from bench.core.errors import Damaged
from bench.core.runs import Run
from bench.core.store import Store
from bench.guests.config import GuestConfig
from bench.instruments import METRICS as INSTRUMENT_METRICS
from bench.instruments import readings
from bench.metrics import EVALUATORS, Metric
from bench.priors import generate
from bench.priors.config import PriorConfig
from bench.priors.pixels import PixelConfig, over_pixels
from bench.quantizers import QUANTIZERS
from bench.tokenizers import costs, curves
from bench.tokenizers.codecs import FORMATS
from bench.tokenizers.config import Config

# In the order of tables. Described where they are computed: scores of reconstructions, of learning curves, costs, and
# what instruments find
PARTS = (*EVALUATORS, curves, costs)
METRICS: dict[str, Metric] = {name: metric for part in PARTS for name, metric in part.METRICS.items()}
METRICS |= INSTRUMENT_METRICS
PRIOR_METRICS: dict[str, Metric] = generate.METRICS  # of priors, in frames of their own
LABELS: dict[str, Metric] = METRICS | PRIOR_METRICS
GENERATION = tuple(name for name in PRIOR_METRICS if name not in METRICS)  # what priors alone are scored with
# True of one machine only.
CLOCKED = (*(name for name in LABELS if "per_second" in name), "sampling_speedup", "train_seconds")
REFERENCES = (
    "_kmeans",
    *(f"_{name}" for name in FORMATS),
    "_real",
    "_shuffled",
)  # suffixes of scores that something else has, for comparison
BUDGETS = {"params": 0.02, "flops": 0.02, "train_seconds": 0.05}  # what may be matched, and how closely
UNMATCHED = "†"
ELSEWHERE = "‡"
STEADY = 1.15  # times as long as another seed of equal work may take
CONTINUOUS = tuple(name for name, quantizer in QUANTIZERS.items() if not quantizer.discrete)  # never ranked

CONFIG = tuple(field.name for field in fields(Config))
PRIOR_CONFIG = tuple(field.name for field in fields(PriorConfig))
DEFAULTS = {field.name: field.default for field in fields(Config) if field.default is not MISSING}
# Fields that say who ran, not what was set: never a setting whose values a table lists.
IDENTITY = ("backbone", "prior", "tokenizer", "seed", "device", "precision", "data", "split", "image_size")


class Kind(NamedTuple):
    """What frames of tokenizers and of priors do not have in common."""

    row: Callable[[Run], dict[str, Any]]  # what was set in a run, by column
    fields: tuple[str, ...]  # those columns
    settings: tuple[str, ...]  # those of them that a table lists where several values were run, in its order
    models: tuple[str, ...]  # columns that name what was trained
    metrics: dict[str, Metric]
    protocol: tuple[str, ...]  # what reports tell of it
    environment: tuple[str, ...]


def _tokenizer_row(run: Run) -> dict[str, Any]:
    if run.elsewhere:
        known = vars(run.settings(GuestConfig))
        unknown = [name for name in ("codebook_size", "grid_size") if not known[name]]
        return {name: None if name in unknown else known.get(name) for name in CONFIG}
    config = {**run.config(), **vars(run.settings(Config))}
    config = {name: config[name] for name in config if name not in METRICS}  # a later version may have set one
    if config["quantizer"] in CONTINUOUS:
        return config
    tokens = config["grid_size"] ** 2
    bits = tokens * math.log2(config["codebook_size"])
    return {**config, "tokens": tokens, "bits_per_image": bits, "bits_per_pixel": bits / config["image_size"] ** 2}


def _prior_row(run: Run) -> dict[str, Any]:
    tokenizer = run.tokenizer()
    if over_pixels(run):
        pixels = run.settings(PixelConfig, "tokenizer")
        tokenizer = {**vars(pixels), "bits_per_image": pixels.bits_per_image}
    elif tokenizer or run.finished:
        tokenizer = {**tokenizer, **vars(run.settings(Config, "tokenizer"))}
    return {**{_renamed(name): value for name, value in tokenizer.items()}, **vars(run.settings(PriorConfig))}


def _renamed(name: str) -> str:
    """What a Config field is called in a prior's row: another name where PriorConfig has that field too."""
    return f"tokenizer_{name}" if name in PRIOR_CONFIG else name


def _settings(fields: Iterable[str]) -> tuple[str, ...]:
    return tuple(name for name in fields if name.removeprefix("tokenizer_") not in IDENTITY)


TOKENIZER = Kind(
    row=_tokenizer_row,
    fields=CONFIG,
    settings=_settings(CONFIG),
    models=("backbone",),
    metrics=METRICS,
    protocol=("data", "scored_on", "count"),
    environment=("commit", "processor", "threads"),
)
_RENAMED = tuple(map(_renamed, CONFIG))
PRIOR = Kind(
    row=_prior_row,
    fields=(*PRIOR_CONFIG, *_RENAMED),
    settings=_settings(sorted((*_RENAMED, *PRIOR_CONFIG), key=lambda name: name.startswith("tokenizer_"))),
    models=("backbone", "prior"),
    metrics=PRIOR_METRICS,
    protocol=("scored_on", "count"),
    environment=("processor", "threads"),
)


def load_runs(results: str | Path = "results") -> pd.DataFrame:
    """All runs of tokenizers below ``results``, one row each. Warns of those that cannot be read.

    Columns, in this order, but that the last two groups are sorted as one; ``table.filter(like="protocol_")`` picks all
    that are called so:

    ``run_id``, ``status``, ``reason``
        Texts: the name of the run's folder; finished, unfinished, or how it failed, and why.
    settings, such as ``backbone``, ``beta`` and ``seed``
        One per field of Config, under its name and with its type; one that may be left open has None there.
    scores and costs, such as ``psnr``, ``bits_per_image``, ``params`` and ``train_seconds``
        Float64, missing where a run is not finished or was not scored so. Shares are of 1, seconds and MB are in the
        name, ``flops`` and ``images_per_second`` are of one image.
    what instruments found, such as ``loss_near`` and ``probe_chance``
        The same, missing where none has looked.
    ``commit``, ``processor``, ``threads``, ``folder``
        The code and the machine that trained it, and the path of the run.
    scores of something else at the same bits: ``*_kmeans``, ``*_webp``, ``*_avif``, ``*_jpeg``
        Float64, of the score that they are named after.
    ``protocol_*``
        How it was measured. Hold rows against each other only where all of these and ``bits_per_image`` are equal.
    """
    table, damaged = read(Store(Path(results)).runs())
    for sentence in damaged:
        warnings.warn(sentence, stacklevel=2)
    return table


def frame(runs: Iterable[Run], kind: Kind = TOKENIZER) -> pd.DataFrame:
    """One row per run: ``run_id``, ``status``, ``reason``, what was set, every metric, ``protocol_*``, the machine and
    the path of its ``folder``.

    Of a tokenizer every Config field. Of a prior every PriorConfig field, those Config fields of its tokenizer that
    PriorConfig does not have, the others as ``tokenizer_FIELD``, and ``tokenizer_digest``; over pixels what a
    PixelConfig has, and ``bits_per_image``. A run that was not finished has missing metrics, but its bits, which follow
    from the Config. Columns exist also when there are no rows. Left out is a run of which not even the settings can be
    read.
    """
    return read(runs, kind)[0]


def read(runs: Iterable[Run], kind: Kind = TOKENIZER) -> tuple[pd.DataFrame, list[str]]:
    """The ``frame`` of ``runs``, and a sentence on each whose settings, or what instruments found, cannot be read."""
    columns: dict[str, list[Any]] = {}
    texts: dict[str, str] = {}  # one object for equal ones: a large table has few
    count, damaged = 0, []
    for told in catalogue.entries(runs, partial(entry, kind=kind)):
        if "left_out" in told:
            damaged.append(told["left_out"])
            continue
        damaged.extend(told.get("lacking", ()))
        row = told["row"]
        if row.keys() != columns.keys():
            for name in row.keys() - columns.keys():
                columns[name] = [math.nan] * count
            row = {**dict.fromkeys(columns, math.nan), **row}
        for name, value in row.items():
            columns[name].append(texts.setdefault(value, value) if isinstance(value, str) else value)
        count += 1
    order = ["run_id", "status", "reason", *kind.fields, *kind.metrics, *kind.environment, "folder"]
    order += sorted(columns.keys() - set(order))
    table = pd.DataFrame(columns, index=range(count), columns=order)
    numeric = [name for name in table if name in kind.metrics or name.endswith(REFERENCES)]
    return table.astype(dict.fromkeys(numeric, float)).copy(), damaged  # in one piece, which has room for more columns


def statuses(parent: Path, names: Iterable[str], kind: Kind = TOKENIZER) -> list[str]:
    """How each of the runs that go by ``names`` in the folder ``parent`` ended, see ``Run.status``; damaged also where
    its settings cannot be read."""
    return list(catalogue.statuses(parent, names, partial(entry, kind=kind)))


def entry(run: Run, kind: Kind) -> catalogue.Entry:
    """How ``run`` ended, with its row or with why it is left out: what a catalogue remembers of it."""
    try:
        run = run.snapshot()
        row, found, lacking = _row(run, kind), {}, []
        if row["status"] == "finished":
            try:
                found = readings(run)
            except Damaged as error:  # of which the run is the same as before
                lacking = [str(error)]
        return {"status": row["status"], "row": {**found, **row}, **({"lacking": lacking} if lacking else {})}
    except Damaged as error:
        return {"status": "damaged", "left_out": str(error)}
    except OSError as error:
        status, reason = run.ending()
        return {"status": status, "left_out": reason or str(error)}
    except UnicodeEncodeError:
        words = f"{str(run.folder)!a} has a name that is no text; rename that folder"
        return {"status": "damaged", "left_out": words}


def _plain(value: Any) -> Any:
    """``value``, or where a file has a list or an object in place of a word or number its text."""
    return str(value) if isinstance(value, (list, dict)) else value


def _row(run: Run, kind: Kind) -> dict[str, Any]:
    environment, (status, reason) = run.environment(), run.ending()
    row = {**kind.row(run), "run_id": run.folder.name, "status": status, "reason": reason}
    row |= {name: _plain(environment.get(name)) for name in kind.environment}
    row["folder"] = str(run.folder).encode().decode()  # raises where a name is no text
    if status == "finished":
        protocol = run.protocol()
        missing = [name for name in kind.protocol if name not in protocol]
        if missing:
            error = Damaged(run.folder / "metrics.json", f"its protocol has no {missing[0]}")
            return {**row, "status": "damaged", "reason": str(error)}
        if "tokenizer" in protocol:
            row["tokenizer_digest"] = protocol["tokenizer"]  # whose codes, not how they were measured
        measured = {f"protocol_{name}": protocol[name] for name in protocol if name != "tokenizer"}
        row = {**run.metrics(), **measured, **row}
    return row


def with_rates(table: pd.DataFrame, priors: pd.DataFrame) -> pd.DataFrame:
    """``table`` with what its codes cost under the best of ``priors`` over them: ``coded_bits_per_image`` and
    ``coded_bits_per_pixel``, missing where there is none."""
    least = priors.groupby("tokenizer")[["coded_bits_per_image", "coded_bits_per_pixel"]].min().astype(float)
    return table.join(least, on="run_id")


def elsewhere(table: pd.DataFrame) -> pd.Series:
    """Which rows were trained elsewhere, (N,) bool: nobody here knows for how many steps."""
    return table.steps.isna()


def ours(table: pd.DataFrame) -> pd.DataFrame:
    """The rows that were trained here."""
    return table[~elsewhere(table)]


def coded(table: pd.DataFrame) -> pd.DataFrame:
    """The rows whose latents are codes."""
    return table[~table.quantizer.isin(CONTINUOUS)]


def continuous(table: pd.DataFrame) -> pd.DataFrame:
    """The finished rows whose latents are none."""
    return table[table.quantizer.isin(CONTINUOUS) & (table.status == "finished")]


def protocols(table: pd.DataFrame) -> list[pd.DataFrame]:
    """Finished rows of ``table``, split into groups that were measured the same way, largest group first."""
    finished = table[table.status == "finished"]
    if finished.empty:
        return []
    groups = finished.groupby(list(finished.filter(like="protocol_")), dropna=False, sort=False)
    return sorted((group for _, group in groups), key=len, reverse=True)


def blocks(table: pd.DataFrame) -> Iterator[pd.DataFrame]:
    """Groups of finished rows with equal protocol *and* equal bits per image, ascending in bits: the only rows that
    may be ranked against each other. Continuous latents are in none: they are references."""
    for group in protocols(coded(table)):
        for _, block in group.groupby("bits_per_image", sort=True):
            yield block


def differing(a: pd.DataFrame, b: pd.DataFrame) -> dict[str, tuple[Any, Any]]:
    """Why two blocks are not ranked against each other: field → (value in ``a``, value in ``b``)."""
    found = {}
    for name in [*a.filter(like="protocol_"), "bits_per_image"]:
        pair = a[name].iloc[0], b[name].iloc[0]
        if pair[0] != pair[1] and not all(map(pd.isna, pair)):
            found[name.removeprefix("protocol_")] = pair
    return found


def settings(table: pd.DataFrame, kind: Kind = TOKENIZER) -> list[str]:
    """Fields that take several values within one model: what an ablation swept. The seed is not one."""
    if table.empty:
        return []
    varied = [name for name in kind.settings if table[name].nunique(dropna=False) > 1]
    counts = table.groupby(list(kind.models))[varied].nunique(dropna=False).max()
    return list(counts.index[counts > 1])


def uneven(table: pd.DataFrame) -> list[str]:
    """Config fields that are fixed within each backbone but differ from one backbone to another, such as width."""
    table = ours(table)
    swept = settings(table)
    return [name for name in TOKENIZER.settings if name not in swept and table[name].nunique(dropna=False) > 1]


def summary(block: pd.DataFrame, unscored: pd.DataFrame | None = None, kind: Kind = TOKENIZER) -> pd.DataFrame:
    """Mean and spread over seeds: one row per model and setting of a block.

    Columns: ``backbone``, the settings, of priors ``prior``, ``n`` (scored seeds), ``failed`` (rows of ``unscored``
    with the block's data, split, image size and bits, of settings without a score, too), and per metric ``METRIC``
    (mean) and ``METRIC_std`` (sample standard deviation; missing when n is 1).
    """
    failed = block.iloc[:0]
    if unscored is not None and len(unscored):
        failed = unscored.merge(block[["data", "split", "image_size", "bits_per_image"]].drop_duplicates())
    first, *others = kind.models
    by = [first, *settings(pd.concat([block, failed]), kind), *others]
    names = [name for name in kind.metrics if name in block and block[name].notna().any()]
    groups = block.groupby(by, dropna=False)
    table = pd.concat([groups[names].mean(), groups[names].std().add_suffix("_std")], axis=1)
    table = table[[column for name in names for column in (name, f"{name}_std")]].copy()  # as one piece again
    sizes = [groups.size(), failed.groupby(by, dropna=False).size()]
    counts = pd.concat(sizes, axis=1, keys=["n", "failed"], sort=False)  # values may be of several types
    return counts.fillna(0).astype(int).join(table).reset_index()


def main_metric(table: pd.DataFrame) -> str:
    """The column that ranks the finished rows of ``table``: an LPIPS that no run was trained on, where there is one.

    A perceptual loss flatters its own metric: runs trained on lpips_alex are ranked by lpips_vgg, others by lpips_alex.
    Falls back to the LPIPS that was scored, then to psnr.
    """
    scored = table[table.status == "finished"]
    trained_on = (scored.lpips_weight > 0) & (scored.lpips_net == "alex")
    names = ("lpips_vgg", "lpips_alex") if trained_on.any() else ("lpips_alex", "lpips_vgg")
    return next((name for name in names if scored[name].notna().any()), "psnr")


def best_first(rows: pd.DataFrame, metric: str) -> pd.DataFrame:
    """``rows`` in order of ``metric``."""
    return rows.sort_values(metric, ascending=LABELS[metric].better == "lower", kind="stable")


def machines(table: pd.DataFrame) -> int:
    """On how many kinds of machine rows were made: clocked metrics of several are not compared."""
    return len(table[["processor", "threads"]].drop_duplicates())


def unsteady(table: pd.DataFrame) -> dict[str, float]:
    """Clocks that measured what else the machine did: of each clocked metric that differs between seeds of one model
    and setting, which are equal work, by more than a factor of STEADY, the largest such factor."""
    names = [name for name in CLOCKED if name in table]
    groups = table.groupby(["backbone", *settings(table)], dropna=False)[names]
    worst = (groups.max() / groups.min()).max()
    return worst[worst > STEADY].to_dict()


def unmatched(table: pd.DataFrame) -> pd.Series:
    """Which rows (of a frame or a summary) cost more or less than the others in every respect: True for those off the
    backbones' median in parameters *and* FLOPs by more than 2 % *and* in training time by more than 5 %.

    All False for a single backbone. ``python -m bench.run --match`` gives matched ones.
    """
    costs = table.reindex(columns=list(BUDGETS))
    timed = costs.train_seconds.notna()  # those that were trained elsewhere have no such budget
    median = costs[timed].groupby(table.backbone[timed]).mean().median()
    off = (costs / median - 1).abs() > pd.Series(BUDGETS)
    return off.all(axis=1) & (table.backbone[timed].nunique() > 1)
