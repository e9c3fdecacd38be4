"""Pictures of one run: what it reconstructs, and how it learned."""

from collections import Counter
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from .files import atomic_path

matplotlib.use("Agg")  # files only: never opens a window, needs no display
sns.set_theme(style="whitegrid", context="paper", palette="colorblind")

GAP = 2  # white pixels between tiles
PAIRS = 12  # samples beside their nearest training image


def tile(rows: list[np.ndarray], scale: int) -> Image.Image:
    """Rows of images, each (N, H, W, 3) uint8, as one picture with white gaps, enlarged ``scale`` times."""
    count, height, width, _ = rows[0].shape
    sheet = np.full((len(rows) * (height + GAP) - GAP, count * (width + GAP) - GAP, 3), 255, dtype=np.uint8)
    for r, row in enumerate(rows):
        for c, image in enumerate(row):
            sheet[r * (height + GAP) :, c * (width + GAP) :][:height, :width] = image
    picture = Image.fromarray(sheet)
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def label_rows(axes: Axes, height: int, words: list[str], **style: Any) -> None:
    """Writes ``words`` beside the rows of a picture of that height in pixels."""
    axes.set_yticks([(i + 0.5) * height / len(words) for i in range(len(words))], words, **style)
    axes.tick_params(length=0)
    axes.set_xticks([])
    axes.grid(False)
    sns.despine(ax=axes, left=True, bottom=True)


def reconstructions(path: Path, x: np.ndarray, x_hat: np.ndarray, title: str) -> None:
    """Saves originals, reconstructions and their absolute difference, a row each; x and x_hat (N, H, W, 3) uint8."""
    difference = np.abs(x.astype(np.int16) - x_hat.astype(np.int16)).astype(np.uint8)
    picture(path, [x, x_hat, difference], ["original", "reconstruction", "|difference|"], title, width=12)


def curves(path: Path, history: list[dict[str, float]], codebook_size: int | None, title: str) -> None:
    """Saves training losses (logarithmic) against steps, from a run's history, and beside them perplexity; of a latent
    that has no ``codebook_size`` its rate, if it has one."""
    history = whole_windows(history)
    steps = [row["step"] for row in history]
    beside = "perplexity" if codebook_size else "bits_per_image"
    count = 1 + all(beside in row for row in history)
    figure = Figure(figsize=(5 * count, 3.6), layout="constrained")
    left, *others = figure.subplots(1, count, squeeze=False)[0]
    for name in ("reconstruction", "quantizer", "lpips"):
        if all(row.get(name, 0) > 0 for row in history):
            sns.lineplot(x=steps, y=[row[name] for row in history], ax=left, label=name)
    left.set(ylabel="training loss, unweighted", yscale="log", title=title)
    for right in others:
        sns.lineplot(x=steps, y=[row[beside] for row in history], ax=right, label=beside.replace("_", " "))
        if codebook_size:
            sns.lineplot(x=steps, y=[row["codes_used"] for row in history], ax=right, label="codes in use")
            right.axhline(codebook_size, color="0.5", linestyle=":", label=f"K = {codebook_size}")
            right.set(ylabel="codes, over one logging window", ylim=(0, 1.05 * codebook_size))
    for axes in (left, *others):
        _against_steps(axes)
    save(figure, path)


def _against_steps(axes: Axes) -> None:
    """Makes the axis below one of whole steps, and puts the legend under it, where no curve is."""
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if axes.lines:
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=3, frameon=False)


def whole_windows(history: list[dict[str, float]]) -> list[dict[str, float]]:
    """``history`` without a last row that is over fewer steps than the others: it has more noise and fewer codes."""
    steps = [row["step"] for row in history]
    return history[:-1] if len(steps) > 2 and steps[-1] - steps[-2] < steps[1] - steps[0] else history


def samples(path: Path, images: np.ndarray, title: str, classes: list[str] | None = None) -> None:
    """Saves generated images (N, H, W, 3) uint8 as a square of tiles; where they are of ``classes``, with a row for
    each of the most frequent ones."""
    side = int(len(images) ** 0.5)
    if classes is None:
        picture(path, [images[i * side : (i + 1) * side] for i in range(side)], [], title, width=8)
        return
    names = sorted(name for name, _ in Counter(classes).most_common(side))
    rows = [images[[one == name for one in classes]][:side] for name in names]
    blank = np.full((side, *images.shape[1:]), 255, dtype=np.uint8)
    picture(path, [np.concatenate([row, blank])[:side] for row in rows], names, title, width=8)


def neighbours(path: Path, images: np.ndarray, nearest: np.ndarray, title: str) -> None:
    """Saves the first generated images and, below each, the training image nearest to it; (N, H, W, 3) uint8."""
    picture(path, [images[:PAIRS], nearest[:PAIRS]], ["sample", "nearest\ntraining image"], title, width=12)


def codebook(path: Path, images: np.ndarray, title: str) -> None:
    """Saves what each code of a one-code tokenizer decodes to, (K, H, W, 3) uint8, as a square of tiles."""
    columns = int(np.ceil(len(images) ** 0.5))
    blank = np.full((-len(images) % columns, *images.shape[1:]), 255, dtype=np.uint8)
    rows = np.split(np.concatenate([images, blank]), -(-len(images) // columns))
    picture(path, rows, [], title, width=10)


def prior_curve(path: Path, history: list[dict[str, float]], metrics: dict[str, float], title: str) -> None:
    """Saves a prior's bits per token against steps, with the held-out rate and the floor it has to beat."""
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes, history = figure.subplots(), whole_windows(history)
    steps = [row["step"] for row in history]
    sns.lineplot(x=steps, y=[row["bits_per_token"] for row in history], ax=axes, label="training, with dropout")
    floor, rate = metrics["coded_bits_per_token_independent"], metrics["coded_bits_per_token"]
    axes.axhline(floor, color="0.5", linestyle=":", label=f"independent, held out: {floor:.2f}")
    axes.axhline(rate, color="0.2", linestyle="--", label=f"held out: {rate:.2f}")
    axes.set(ylabel="bits per token", title=title)
    _against_steps(axes)
    save(figure, path)


def picture(path: Path, rows: list[np.ndarray], words: list[str], title: str, width: float) -> None:
    """Saves rows of images, each (N, H, W, 3) uint8, with ``words`` beside them; ``width`` in inches."""
    sheet = tile(rows, scale=max(1, 128 // rows[0].shape[1]))
    figure = Figure(figsize=(width, 0.95 * width * sheet.height / sheet.width + 0.4), layout="constrained")
    show(figure.subplots(), sheet, words, title)
    save(figure, path)


def show(axes: Axes, sheet: Image.Image, words: list[str], title: str) -> None:
    """Puts what ``tile`` made into ``axes``."""
    axes.imshow(sheet, interpolation="none")
    axes.set_title(title, loc="left")
    label_rows(axes, sheet.height, words)


def save(figure: Figure, path: Path) -> None:
    """Saves a figure as PNG, the same bytes each time."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110, metadata={"Software": None})
