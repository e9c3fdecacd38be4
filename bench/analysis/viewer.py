"""What the page's viewer compares: the same images as every backbone reconstructs them."""

from typing import NamedTuple

import numpy as np
import pandas as pd

from . import galleries
from .frames import main_metric
from .labels import told
from .slices import protocol_scopes, representative

MOST = 12  # runs side by side


class Viewer(NamedTuple):
    """``originals`` and, by what is said of each run, their reconstructions: (N, H, W, 3) uint8 each; and a sentence on
    which runs these are."""

    originals: np.ndarray
    runs: dict[str, np.ndarray]
    note: str


def look(table: pd.DataFrame) -> Viewer | None:
    """The runs of a frame that ``galleries.reconstructions`` shows of the largest protocol; None where none has kept
    such pictures. Of each backbone it is the lowest seed; runs that kept other images than the first are left out."""
    scopes = protocol_scopes(table)
    if not scopes:
        return None
    rows, words = representative(scopes[0].rows)
    rows = rows.sort_values("seed", kind="stable").drop_duplicates("backbone").sort_values("backbone").head(MOST)
    kept = list(galleries.pictures_of(rows, [], "x", "x_hat"))
    if not kept:
        return None
    originals = kept[0][1][0]
    metrics = dict.fromkeys((main_metric(rows), "psnr"))
    runs = {
        f"{row.backbone}: {', '.join(told(row, metric) for metric in metrics)}": x_hat
        for row, (x, x_hat) in kept
        if np.array_equal(x, originals)
    }
    note = f"One run of each backbone, the lowest seed{words}; scores are means over all images."
    return Viewer(originals, runs, note)
