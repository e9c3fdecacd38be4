"""What stands in grey beside what is ranked: k-means and image formats at the same bits, and latents without codes.

A tokenizer without codes (``none``, ``kl``) shows what its network makes of the same training, so that what the codes
lose can be told from what the backbone does. It is shown beside those that were scored alike and trained at the same
budget: everything but the quantizer, its settings, the seed and the device is equal.
"""

import math
from typing import TYPE_CHECKING, Any

import pandas as pd

from bench.quantizers import QUANTIZERS
from bench.tokenizers.codecs import FORMATS

from . import frames
from .frames import CONFIG, METRICS
from .tables import Cell, cell

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from .looks import Entries

FREE = {"quantizer", "codebook_size", "seed", "device"}.union(*(kind.settings for kind in QUANTIZERS.values()))
BUDGET = [name for name in CONFIG if name not in FREE]
KMEANS = "k-means on patches"
WORDS = {"none": "no codes", "kl": "KL latent"}  # what a row of such a quantizer is called, after its backbone
FORMAT_MARKERS = dict(zip(FORMATS, "+x1", strict=True))
KL = {"markerfacecolor": "none", "markersize": 7, "linestyle": "none"}
NO_CODES = {"linestyle": (0, (6, 2)), "linewidth": 0.8, "zorder": 0}


def beside(rows: pd.DataFrame, others: pd.DataFrame) -> pd.DataFrame:
    """Those of ``others`` that were scored as one of ``rows`` was and trained at the budget of one of them, or
    elsewhere."""
    keys = [*rows.filter(like="protocol_"), *BUDGET]
    if others.empty or not {*keys} <= {*others}:
        return others.iloc[:0]
    foreign = frames.elsewhere(others)  # at no budget of ours
    alike = [*rows.filter(like="protocol_")]
    return pd.concat(
        [
            others[~foreign].merge(rows[keys].drop_duplicates()),
            others[foreign].merge(rows[alike].drop_duplicates()),
        ]
    )


def reference_cells(block: pd.DataFrame, latents: pd.DataFrame, keys: list[str]) -> list[list[Cell]]:
    """Rows under the ranking of ``block``, of columns ``keys``; ``latents`` are continuous ones, of which those count
    that are ``beside`` it."""
    rows = []
    for _, group in block.groupby(["grid_size", "codebook_size"]):
        first = group.iloc[0]
        known = {"backbone": KMEANS, **first[["grid_size", "codebook_size", "bits_per_image"]]}
        rows.append([cell(key, known.get(key, first.get(f"{key}_kmeans"))) for key in keys])
    for name in formats_in(block):
        first = block.dropna(subset=f"psnr_{name}").iloc[0]
        known = {"backbone": with_bits(FORMATS[name].label, first[f"bits_per_image_{name}"])}
        rows.append([cell(key, known.get(key, first.get(f"{key}_{name}"))) for key in keys])
    return rows + latent_cells(beside(block, latents), keys)


def latent_cells(own: pd.DataFrame, keys: list[str]) -> list[list[Cell]]:
    """Rows of columns ``keys`` of latents that are continuous, means over seeds."""
    rows = []
    by = ["backbone", "quantizer", *(key for key in keys if key in BUDGET and key != "backbone")]
    for values, group in own.groupby(by, dropna=False):
        known = dict(zip(by, values, strict=True))
        label = f"{known['backbone']}, {WORDS[known['quantizer']]}"
        known |= {"backbone": with_bits(label, group.bits_per_image.mean()), "n": len(group)}
        rows.append([_mean(group, key) if key in METRICS else cell(key, known.get(key)) for key in keys])
    return rows


def with_bits(label: str, bits: float) -> str:
    """The label of a row of other bits than those that are ranked; as it is where it has no rate."""
    return label if math.isnan(bits) else f"{label}, {bits:.0f} bits"


def _mean(group: pd.DataFrame, key: str) -> Cell:
    return cell(key, group[key].mean(), group[key].std())


def formats_in(table: pd.DataFrame) -> list[str]:
    """The image formats that some row of ``table`` has scores of."""
    return [name for name in FORMATS if f"psnr_{name}" in table and table[f"psnr_{name}"].notna().any()]


def notes(block: pd.DataFrame, latents: pd.DataFrame) -> list[str]:
    """What the codes lose, and which image formats could not be written."""
    own = beside(block, latents)
    own = own[own.quantizer == "none"]
    lines = []
    if len(own):
        best = [frames.summary(rows).groupby("backbone").psnr.max() for rows in (own, beside(own, block))]
        lost = (best[0] - best[1]).dropna()
        each = ", ".join(f"{name} {_signed(value)} dB" for name, value in lost.items())
        lines.append(f"What codes cost in PSNR, from the same network without them to its best row with them: {each}.")
    there = formats_in(block)
    if there and (missing := [FORMATS[name].label for name in FORMATS if name not in there]):
        lines.append(f"Left out: {', '.join(missing)}, which the installed Pillow could not write.")
    return lines


def _signed(value: float) -> str:
    return f"{value:.2f}".replace("-", "−")


def entries(rows: pd.DataFrame, latents: pd.DataFrame) -> "Entries":
    """What a legend says of what ``draw`` adds."""
    grey, own = {"color": "0.35"}, beside(rows, latents)
    found = {FORMATS[name].label: grey | _format_look(name) for name in formats_in(rows)}
    kinds = {"kl": grey | {"marker": "o", **KL}, "none": grey | NO_CODES}
    return found | {WORDS[name]: look for name, look in kinds.items() if name in set(own.quantizer)}


def draw(panels: "dict[str, Axes]", rows: pd.DataFrame, latents: pd.DataFrame) -> pd.Series:
    """Adds to axes of metrics against bits per pixel, by metric, what stands beside ``rows``: image formats and KL
    latents as points at the rate that they used, no codes as a line across. Returns the rates that were added."""
    from . import looks  # and seaborn, which tables have no use for

    own, rates = beside(rows, latents), []
    for name in formats_in(rows):
        at = f"bits_per_pixel_{name}"
        names = [metric for metric in panels if f"{metric}_{name}" in rows]
        points = rows.groupby("bits_per_pixel")[[at, *(f"{metric}_{name}" for metric in names)]].mean()
        for metric in names:
            panels[metric].plot(points[at], points[f"{metric}_{name}"], color="0.35", zorder=1, **_format_look(name))
        rates.append(points[at].dropna())
    for backbone, group in own[own.quantizer == "kl"].groupby("backbone"):
        points = group.groupby("kl_weight")[["bits_per_pixel", *panels]].mean()
        for metric, axes in panels.items():
            axes.plot(points.bits_per_pixel, points[metric], **looks.look_of(backbone), **KL)
        rates.append(points.bits_per_pixel)
    for backbone, group in own[own.quantizer == "none"].groupby("backbone"):
        for metric, axes in panels.items():
            axes.axhline(group[metric].mean(), color=looks.look_of(backbone)["color"], **NO_CODES)
    return pd.concat([pd.Series(dtype=float), *rates])


def caption(rows: pd.DataFrame, latents: pd.DataFrame) -> str:
    """A sentence on each kind of thing that ``draw`` adds."""
    there, words = set(beside(rows, latents).quantizer), ""
    if names := formats_in(rows):
        labels = ", ".join(FORMATS[name].label for name in names)
        words = f" {labels}: files of at most the bits of an image, or the smallest, at the mean bits they take."
    if "kl" in there:
        words += f" {WORDS['kl']}: a continuous latent at its divergence from the unit Gaussian."
    return words + (" Dashed across: the same network without codes." if "none" in there else "")


def _format_look(name: str) -> dict[str, Any]:
    return {"marker": FORMAT_MARKERS[name], "linestyle": "none", "markersize": 6}
