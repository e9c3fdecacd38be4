"""The data of a report as files: wide, a row per run, and long, a row per run and metric; and what columns mean."""

import ast
import inspect
import re
import textwrap
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pyarrow
from pyarrow import parquet

from bench.core.files import atomic_path
from bench.priors.config import PriorConfig
from bench.tokenizers.codecs import FORMATS
from bench.tokenizers.config import Config

from .frames import CONFIG, LABELS, METRICS, REFERENCES

WIDE, LONG, PRIORS, COLUMNS = "runs_wide.csv", "runs_long.parquet", "priors_wide.csv", "columns.csv"
ROWS = 2000  # runs that LONG is written of at a time
UNITS = ("dB", "images/s", "MB", "s", "steps")  # where they are words of a label, or begin a name
SUFFIXES = {
    "_kmeans": "of k-means on patches at the same bits",
    **{f"_{name}": f"of {each.label} files at the same bits" for name, each in FORMATS.items()},
    "_real": "of training codes, decoded: what a perfect prior would reach",
    "_shuffled": "of the same codes in random order within each grid",
}
OTHERS = {  # columns that are neither settings nor metrics
    "run_id": "the run, and the name of its folder",
    "status": "how it ended: finished, unfinished, or why it failed",
    "reason": "why it failed, in a sentence",
    "folder": "the path of its folder",
    "commit": "the commit of the code that made it; + where files differed from it",
    "processor": "the processor, or the GPU where there is one",
    "threads": "threads that it was given",
    "role": "of a search: whether the settings are those of its winner or the default",
    "tokenizer_digest": "digest of the tokenizer whose codes the prior is over",
    "metric": "in the long table: which metric, by its name in the wide one",
    "value": "in the long table: of that metric",
}


class Column(NamedTuple):
    """A row of the data dictionary."""

    column: str
    kind: str  # setting, metric, reference, protocol or run
    meaning: str
    unit: str = ""
    better: str = ""  # lower, higher or nothing


def write_data(table: pd.DataFrame, priors: pd.DataFrame, folder: Path) -> None:
    """WIDE is ``table`` as it is, LONG a row per run and metric that it has, with its Config, and PRIORS, where there
    are any, ``priors`` as they are; COLUMNS says what all of their columns mean."""
    wide = {WIDE: table} | ({PRIORS: priors} if len(priors) else {})
    for name, rows in wide.items():
        with atomic_path(folder / name) as temporary:
            rows.to_csv(temporary, index=False)
    _write_long(table, folder / LONG)
    names = dict.fromkeys([*(name for rows in wide.values() for name in rows), "metric", "value"])
    with atomic_path(folder / COLUMNS) as temporary:
        pd.DataFrame(map(described, names), columns=Column._fields).to_csv(temporary, index=False)


def _write_long(table: pd.DataFrame, path: Path) -> None:
    names = sorted(name for name in table if name in METRICS or name.endswith(REFERENCES))
    table = table.sort_values("run_id", ignore_index=True)
    keys, labels = table[["run_id", *CONFIG, "status"]], pyarrow.array(names, pyarrow.string())
    schema = pyarrow.Schema.from_pandas(keys.assign(metric="", value=0.0), preserve_index=False)
    with atomic_path(path) as temporary, parquet.ParquetWriter(temporary, schema) as writer:
        for start in range(0, len(table), ROWS):  # all at once would be forty times the table
            values = table[names][start : start + ROWS].to_numpy(float)
            row, column = np.nonzero(~np.isnan(values))
            part = pyarrow.Table.from_pandas(keys[start : start + ROWS], preserve_index=False).take(row)
            part = part.append_column("metric", labels.take(column)).append_column("value", [values[row, column]])
            writer.write_table(part.cast(schema))


def described(name: str) -> Column:
    """What the column ``name`` means. One that only other versions write is said to be a metric, and no more."""
    if name in LABELS:
        return Column(name, "metric", LABELS[name].label, _unit(name), LABELS[name].better)
    if name in OTHERS:
        return Column(name, "run", OTHERS[name])
    if name.startswith("protocol_"):
        return Column(name, "protocol", f"how it was scored: {name.removeprefix('protocol_').replace('_', ' ')}")
    for settings, of in ((Config, ""), (PriorConfig, ""), (Config, "tokenizer_")):
        if name.startswith(of) and (meaning := meanings(settings).get(name.removeprefix(of))):
            return Column(name, "setting", f"of the tokenizer: {meaning}" if of else meaning)
    suffix = next((suffix for suffix in SUFFIXES if name.endswith(suffix)), "")
    scored = name.removesuffix(suffix)
    if suffix and scored in LABELS:
        return Column(name, "reference", f"{LABELS[scored].label} {SUFFIXES[suffix]}", _unit(scored))
    return Column(name, "metric", name.replace("_", " "))


def _unit(name: str) -> str:
    """The unit of a metric; nothing where it has none."""
    if "bits_per" in name:
        return "bits"
    words = {*re.findall(r"[\w/]+", LABELS[name].label), name.split("_")[0]}
    return next((unit for unit in UNITS if unit in words), "")


def meanings(settings: type) -> dict[str, str]:
    """What the string below each field of a class says, by field."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(settings))).body
    found = {}
    for field, below in zip(definition.body, definition.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            found[field.target.id] = " ".join(str(below.value.value).split())
    return found
