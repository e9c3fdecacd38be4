"""Whether a grid of patches shows in reconstructions, and how sharp they are."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from .images import check_pair
from .registry import Batch, Evaluator, Metric, Setup

ROUNDING_POWER, ROUNDING_STEP = 1 / 12, 1 / 3  # variance, and mean |difference|, of errors uniform in ±½ grey level
NEIGHBOURS = 4  # frequencies on either side of one of the grid's


class Artefacts:
    """A grid of patches in the residuals r = x̂ − x of a set of square images, and the sharpness of x̂ beside x.

    Two views of a grid, either of them in decibels, 0 for none, averaged over rows and columns. They look at r alone,
    at where things are and not at how large: neither constant shifts nor flips of the images change them, and white
    noise scores 0. What has no size beyond the rounding of pixels to integers is no grid either.
    """

    def __init__(self) -> None:
        self.power: Tensor | float = 0.0  # (size,) Σ|DFT(r)|² over images, colours, rows and columns, float64
        self.steepness: Tensor | float = 0.0  # (size − 1,) Σ|∇r| between pixels k and k + 1 of the same lines
        self.lines = 0
        self.gradients = torch.zeros(2, dtype=torch.float64)  # Σ|∇x̂|, Σ|∇x|

    def update(self, x: Tensor, x_hat: Tensor) -> None:
        """Adds originals ``x`` and their reconstructions ``x_hat``: (B, 3, S, S) uint8 each, on one device."""
        check_pair(x_hat, x)
        x, x_hat = x.float(), x_hat.float()
        for original, reconstruction in ((x, x_hat), (x.mT, x_hat.mT)):  # along the rows, then the columns
            residual = reconstruction - original
            self.power += _over_lines(torch.fft.fft(residual, norm="ortho").abs().square())
            self.steepness += _over_lines(residual.diff().abs())
            self.gradients += torch.stack([_over_lines(y.diff().abs()).sum() for y in (reconstruction, original)])
            self.lines += residual.shape[:-1].numel()

    def join(self, other: "Artefacts") -> None:
        """Adds what ``other`` has seen."""
        self.power, self.steepness = self.power + other.power, self.steepness + other.steepness
        self.lines, self.gradients = self.lines + other.lines, self.gradients + other.gradients

    def grid_energy(self, grid_size: int) -> float:
        """How far the power at 1, 2, … cycles per patch rises above that of the frequencies around them, in dB.

        Against the geometric mean of four on either side (fewer where the next harmonic is near), on average over the
        harmonics. So it is blind to a spectrum that falls smoothly, as those of images and of blur do, and to errors
        that are no pattern but differ from patch to patch: see ``grid_edges``.
        """
        spectrum = 10 * (self.power / self.lines + ROUNDING_POWER).log10()
        harmonics = torch.arange(grid_size, len(spectrum), grid_size)
        away = torch.arange(1, min(grid_size // 2, NEIGHBOURS) + 1)
        if not len(harmonics) or not len(away):
            return 0.0  # a grid of pixels, or of one patch
        neighbours = spectrum[harmonics[:, None] + torch.cat([-away, away])]
        return (spectrum[harmonics] - neighbours.mean(1)).mean().item()

    def grid_edges(self, grid_size: int) -> float:
        """How much steeper the residual is across the borders of patches than inside of them: 20·log10 of the ratio of
        mean |∇r|, in dB; below 0 where the insides are the steeper ones."""
        patch = (len(self.steepness) + 1) // grid_size
        border = torch.arange(1, len(self.steepness) + 1) % patch == 0
        if border.all() or not border.any():
            return 0.0  # a grid of pixels, or of one patch
        steepness = self.steepness / self.lines + ROUNDING_STEP
        return 20 * (steepness[border].mean() / steepness[~border].mean()).log10().item()

    def sharpness(self) -> float:
        """Σ|∇x̂| / Σ|∇x| over the set: 1 is as sharp as the originals. Sums below one grey level count as one."""
        reconstructions, originals = self.gradients.clamp_min(1).tolist()
        return reconstructions / originals

    def result(self, grid_size: int) -> dict[str, float]:
        """All of it, by name, for images of ``grid_size``² patches."""
        grid = {"grid_energy": self.grid_energy(grid_size), "grid_edges": self.grid_edges(grid_size)}
        return grid | {"sharpness": self.sharpness()}


def _over_lines(values: Tensor) -> Tensor:
    """(B, C, lines, n) → (n,) float64 sums, on the CPU."""
    return values.sum((0, 1, 2)).cpu().double()


class ArtefactScores(Evaluator):
    """``Artefacts`` of patches as large as the cells of the codes' grid."""

    METRICS: ClassVar[dict[str, Metric]] = {
        "sharpness": Metric("sharpness", ".2f", ""),
        "grid_energy": Metric("grid energy dB", ".1f", "lower"),
        "grid_edges": Metric("grid edges dB", ".1f", "lower"),
        # of the weights that training starts from, measured apart: see ``score_untrained``
        "grid_energy_init": Metric("grid energy dB, untrained", ".1f", ""),
        "grid_edges_init": Metric("grid edges dB, untrained", ".1f", ""),
    }

    def __init__(self, setup: Setup):
        super().__init__(setup)
        self.artefacts = Artefacts()

    def seen(self) -> dict[str, Any]:
        return {**super().seen(), "artefacts": self.artefacts}

    def join(self, seen: dict[str, Any]) -> None:
        super().join(seen)
        self.artefacts.join(seen["artefacts"])

    def update(self, batch: Batch) -> None:
        self.artefacts.update(batch.x, batch.x_hat)
        self.grid_size = batch.codes.shape[-1]

    def result(self) -> dict[str, float]:
        return self.artefacts.result(self.grid_size)
