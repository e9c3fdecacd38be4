"""What the curves of a training say: how soon it settles, and how smoothly its codebook is learned."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from bench.metrics import Metric

# Of a run, from its history; of one whose history lacks what they are made of, nothing.
METRICS: dict[str, Metric] = {
    "steps_to_perplexity": Metric("steps to 95 % of perplexity", ",.0f", ""),
    "steps_to_loss": Metric("steps to 105 % of loss", ",.0f", ""),
    "codebook_roughness": Metric("codebook roughness", ".3f", "lower"),
}
NEIGHBOURS = 2  # rows of the history on either side of one that its running median is over
PERPLEXITY_SHARE, LOSS_SHARE = 0.95, 1.05  # of the final value: from there on a curve has settled
STEEP = 0.15  # of the loss, by its second half; learning rates that fall take off about half of that by themselves


def curve_metrics(history: Sequence[dict[str, float]], warmup: int) -> dict[str, float]:
    """METRICS of a run's ``history``, rows with their ``step``, whose learning rate was warmed up for ``warmup`` steps.

    The loss is ``reconstruction`` plus ``quantizer``, that of van den Oord et al. 2017, eq. 3, whatever else was
    trained on. A low number of steps is no merit by itself: a codebook that collapses at once has settled at once.
    """
    steps = np.array([row["step"] for row in history], dtype=float)
    perplexity, reconstruction, codebook = (
        np.array([row.get(name, math.nan) for row in history], dtype=float)
        for name in ("perplexity", "reconstruction", "quantizer")
    )
    found = {
        "steps_to_perplexity": steps_to(steps, perplexity, PERPLEXITY_SHARE),
        "steps_to_loss": steps_to(steps, reconstruction + codebook, LOSS_SHARE),
        "codebook_roughness": roughness(codebook[steps > warmup]),
    }
    return {name: value for name, value in found.items() if value is not None}


def steps_to(steps: np.ndarray, values: np.ndarray, share: float) -> float | None:
    """The first of ``steps`` (N,) from which on ``values`` (N,) stay at or beyond ``share`` of where they end: above it
    if ``share`` is below 1, as of perplexity, and below it if it is above 1, as of a loss.

    Both are read off the running median over five rows (fewer at the start), so that two stray rows in a row do not
    count, while a curve that only rises or only falls is read exactly; the end is the median of the last five. A curve
    that is not there before has not settled: the last step. None without rows, where a value is missing, or where the
    curve does not end above 0.
    """
    if not len(values) or not np.isfinite(values).all():
        return None
    medians = _medians(values)
    if medians[-1] <= 0:
        return None
    bound = share * medians[-1]
    outside = np.flatnonzero(medians < bound if share < 1 else medians > bound)
    settled = outside[-1] + 1 if len(outside) else 0
    return float(steps[settled] if settled < len(medians) - 1 else steps[-1])


def _medians(values: np.ndarray) -> np.ndarray:
    """(N,) → the running median over 2·NEIGHBOURS + 1 values: over fewer, as many on either side, where a curve starts;
    the last is the median of the last values."""
    most = min(NEIGHBOURS, (len(values) - 1) // 2)
    reach = [min(place, most) for place in range(len(values) - most)]
    return np.array([np.median(values[place - r : place + r + 1]) for place, r in enumerate(reach)])


def roughness(losses: np.ndarray) -> float | None:
    """Mean |second difference| of log ``losses`` (N,), one per logged row: 0 for one that falls exponentially.

    How much the relative change from one row to the next differs from that before it: 0.05 is by five per cent of the
    loss. Neither the scale of a loss nor how fast it falls changes it; jumps, spikes and the noise of small batches do,
    so compare runs of equal batches that log equally often. None for fewer than 3 losses, or where one is not above 0.
    """
    if len(losses) < 3 or not (np.isfinite(losses) & (losses > 0)).all():
        return None
    return float(np.abs(np.diff(np.log(losses), n=2)).mean())


def undecided(metrics: Mapping[str, float], history: Sequence[Mapping[str, float]]) -> list[str]:
    """Why a run should be trained for longer, a phrase each; none where nothing says so: by the ``psnr`` and
    ``psnr_kmeans`` of its ``metrics`` it is worse than k-means at the same bits, or by its ``history`` its loss is
    ``still_falling`` by more than STEEP."""
    reasons = []
    below = metrics.get("psnr_kmeans", -math.inf) - metrics.get("psnr", math.inf)
    if below > 0:
        reasons.append(f"{below:.1f} dB below k-means at the same bits")
    if (fall := still_falling(history)) is not None and fall > STEEP:
        reasons.append(f"the second half of training still took {100 * fall:.0f} % off the reconstruction loss")
    return reasons


def still_falling(history: Sequence[Mapping[str, float]]) -> float | None:
    """The share of the reconstruction loss that the second half of training took off: from the median of the tenth of
    the rows before its middle to that of the last tenth.

    The end of a curve says nothing by itself: the learning rate falls to zero along a cosine, and every curve ends
    flat. Four fifths of all learning rates are spent in the first half; where the rest still gains much, so would more
    steps. None for fewer than 20 rows, or where a loss is missing or not above 0.
    """
    losses = np.array([row.get("reconstruction", math.nan) for row in history], dtype=float)
    if len(losses) < 20 or not (np.isfinite(losses) & (losses > 0)).all():
        return None
    tenth, middle = len(losses) // 10, len(losses) // 2
    return float(1 - np.median(losses[-tenth:]) / np.median(losses[middle - tenth : middle]))
