"""Which rows of a frame share a chart, and which of them stand for the others."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from bench.core.runs import HELD_OUT

from .frames import DEFAULTS, METRICS, PRIOR, best_first, blocks, coded, continuous, main_metric, protocols, settings
from .labels import BITS, at_words, brief, label_of
from .searches import BOTH, WINNER

PROTOCOLS, BLOCKS = 3, 6  # drawn at most, the largest first
KNOWN = ("protocol_data", "protocol_scored_on", "protocol_image_size")  # parts of a protocol that a reader knows


class Scope(NamedTuple):
    """Rows that may share a chart: those of one protocol, or of one block within it."""

    rows: pd.DataFrame  # finished
    unscored: pd.DataFrame  # not finished, on the same images and, in a block, of the same bits
    fields: list[str]  # swept settings that may be an axis here: bits change between blocks, the others within one
    suffix: str  # appended to names where there are several scopes
    title: str  # what sets this scope apart from the others
    note: str  # protocol in brief, and which scopes are not drawn
    latents: pd.DataFrame | None = None  # finished ones that are no codes; None in a block


def protocol_scopes(table: pd.DataFrame) -> list[Scope]:
    """One scope per protocol of finished and scored rows, the largest PROTOCOLS of them."""
    latents, table = continuous(table), coded(table)
    scored = [rows.dropna(subset=main_metric(rows)) for rows in protocols(table)]
    groups = [rows for rows in scored if len(rows)]
    shown = groups[:PROTOCOLS]
    telling = _telling(shown)
    unscored = table[table.status != "finished"]
    scopes = []
    for index, rows in enumerate(shown):
        first = rows.iloc[0]
        size = f"{first.image_size}×{first.image_size}"
        note = f"{brief(first.data)}, {first.protocol_count:.0f} {HELD_OUT[first.protocol_scored_on]} images of {size}."
        if len(groups) > len(shown):
            note += f" {len(groups) - len(shown)} smaller groups with another protocol are not drawn."
        suffix = f"_protocol{index + 1}" if len(groups) > 1 else ""
        title = ", ".join(f"{name.removeprefix('protocol_')} {brief(first[name])}" for name in telling)
        swept = [name for name in BITS if name in settings(rows)]
        alike = unscored.merge(rows[["data", "split", "image_size"]].drop_duplicates())
        scopes.append(Scope(rows, alike, swept, suffix, title, note, latents))
    return scopes


def _telling(groups: list[pd.DataFrame]) -> list[str]:
    """Protocol columns that tell the groups apart: those that a reader knows, else the first that does."""
    heads = pd.concat([group.head(1) for group in groups]).astype(str) if groups else pd.DataFrame()
    names = [name for name in heads if name.startswith("protocol_") and heads[name].nunique() > 1]
    return [name for name in names if name in KNOWN] or names[:1]


def block_scopes(scope: Scope, protocols_drawn: int) -> list[Scope]:
    """Those of equal bits within a scope, the largest in ascending order of bits; of several protocols fewer each."""
    found = list(blocks(scope.rows))
    shown = sorted(found, key=len, reverse=True)[: max(1, BLOCKS // protocols_drawn)]
    scopes = []
    for rows in sorted(shown, key=lambda rows: rows.bits_per_image.iloc[0]):
        bits = f"{rows.bits_per_image.iloc[0]:g}"
        title, suffix, note = scope.title, scope.suffix, scope.note
        if len(found) > 1:
            title = ", ".join(filter(None, [title, f"{bits} bits per image"]))
            suffix += f"_{bits}bits"
        if len(found) > len(shown):
            note += f" {len(found) - len(shown)} smaller blocks of other bits per image are not drawn."
        swept = [name for name in settings(rows) if name not in BITS]
        alike = scope.unscored.merge(rows[["bits_per_pixel"]].drop_duplicates())
        scopes.append(Scope(rows, alike, swept, suffix, title, note))
    return scopes


def key_metrics(rows: pd.DataFrame) -> list[str]:
    """Up to four metrics that were scored, the main one first."""
    fid = "fid" if rows.fid.notna().any() else "fid_vgg16"
    names = dict.fromkeys([main_metric(rows), fid, "psnr", "perplexity"])  # without an LPIPS the main one is psnr
    return [name for name in names if rows[name].notna().any()]


def controlled(rows: pd.DataFrame, free: list[str]) -> tuple[pd.DataFrame, dict[str, Any]]:
    """The slice of ``rows`` in which nothing but the backbone, the seed and the settings ``free`` varies.

    The other swept settings stand at their most common combination, between equally common ones at the one with most
    Config defaults. Returns the slice and what was fixed at which value.
    """
    others = [name for name in settings(rows) if name not in free]
    if not others:
        return rows, {}
    cell = rows.groupby(others, dropna=False).ngroup()
    size = cell.map(cell.value_counts())
    usual = sum((rows[name] == DEFAULTS.get(name)).astype(int) for name in others)
    best = np.lexsort((-cell, usual, size))[-1]
    return rows[cell == cell.iloc[best]], {name: rows[name].iloc[best] for name in others}


def first_sweep(rows: pd.DataFrame) -> tuple[str | None, pd.DataFrame, str]:
    """The first swept setting with a controlled slice of several values, that slice, and what was fixed in words.

    Where there is none, as in a search, None and the representative runs.
    """
    for field in settings(rows) if "role" not in rows else ():
        part, fixed = controlled(rows, [field])
        if part[field].nunique() > 1:
            return field, part, at_words(fixed)
    return None, *representative(rows)


def representative(rows: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """The runs of the most common setting if every backbone has it, else of equal bits each backbone's best, and which
    of the two in words. Of a search the winners, or among its trials each backbone's best."""
    if "role" in rows and len(won := rows[rows.role.isin((WINNER, BOTH))]):
        return won, ", the winner of each backbone's search"
    part, fixed = controlled(rows, [])
    if part.backbone.nunique() == rows.backbone.nunique() and "role" not in rows:
        return part, at_words(fixed)
    block = max(blocks(rows), key=len)
    metric = main_metric(block)
    best = best_first(block, metric).groupby("backbone").head(1)
    differing = f" ({listed(settings(block))} differ)" if settings(block) else ""
    return best, f", each backbone's best by {METRICS[metric].label}{differing}"


def listed(names: list[str]) -> str:
    """Settings by name, as axes call them: "β, K and d"."""
    *first, last = map(label_of, names)
    return f"{', '.join(first)} and {last}" if first else last


def usual(priors: pd.DataFrame) -> pd.DataFrame:
    """Of each kind of prior those with its most common settings, grid and K apart."""
    names = [name for name in settings(priors, PRIOR) if name not in BITS]
    if not names:
        return priors
    settings_of = priors[names].astype(str).agg(" ".join, axis=1)
    return priors[settings_of == settings_of.groupby(priors.prior).transform(lambda own: own.mode().iloc[0])]


def usual_words(priors: pd.DataFrame) -> str:
    """At which values ``usual`` leaves the settings that it fixes, after a comma."""
    names, shown = [name for name in settings(priors, PRIOR) if name not in BITS], usual(priors)
    fixed = {name: shown[name].iloc[0] for name in names if shown[name].nunique(dropna=False) == 1}
    others = [name for name in names if name not in fixed]
    return at_words(fixed) + (f", each prior at its most common {listed(others)}" if others else "")


def counted(scope: Scope, rows: pd.DataFrame, by: list[str], fixed: dict[str, Any]) -> str:
    """How many runs and seeds are shown, at which fixed settings, and how many are not."""
    missing = len(scope.unscored)
    left_out = f" {missing} failed or unfinished run{'s are' if missing > 1 else ' is'} left out." if missing else ""
    count = f"{seeds_of(rows, by)} a point{at_words(fixed)}"
    return f"{len(rows)} of {len(scope.rows)} scored runs, {count}.{left_out}"


def seeds_of(rows: pd.DataFrame, by: Sequence[str] = ()) -> str:
    """How many seeds ``rows`` have of each backbone and setting of ``by``."""
    seeds = rows.groupby(["backbone", *by], dropna=False).size()
    few, many = int(seeds.min()), int(seeds.max())
    return f"{many} seed{'s' * (many > 1)}" if few == many else f"{few} to {many} seeds"
