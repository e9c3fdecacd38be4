"""Whether codes and reconstructions move along when the image does: shifted, mirrored, or enlarged."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from bench.metrics import Metric

from .instrument import Instrument, Reading, Subject

IMAGES = 64
SMALLEST = 4  # cells a side: of fewer, a shift and its margins leave nothing
ROUNDING = 1 / 12  # squared grey levels, of errors uniform in ±½: no smaller error counts


class Move(NamedTuple):
    """A transformation of images (N, C, S, S) uint8, and where it shows what was in the image, away from its border:
    rows and columns alike."""

    apply: Callable[[Tensor], Tensor]
    window: slice = slice(None)


def shifted(x: Tensor, pixels: int) -> Tensor:
    """``x`` (N, 3, S, S) uint8, so many pixels further to the right and down; what comes in mirrors what is there."""
    return F.pad(x.float(), (pixels, 0, pixels, 0), mode="reflect")[..., : x.shape[-2], : x.shape[-1]].to(x.dtype)


def enlarged(x: Tensor) -> Tensor:
    """The middle quarter of ``x`` (N, 3, S, S) uint8, twice as large: bilinear, rounded."""
    edge = x.shape[-1] // 4
    middle = x[..., edge : x.shape[-1] - edge, edge : x.shape[-1] - edge].float()
    return F.interpolate(middle, size=x.shape[-2:], mode="bilinear").round().to(x.dtype)


def moves(image_size: int, grid_size: int) -> dict[str, Move]:
    """The transformations that a grid of so many cells allows, by name. Of shifts the window leaves out what comes in,
    and a cell on either side, whose neighbours are others than before."""
    cell = image_size // grid_size
    found = {"flip": Move(lambda x: x.flip(-1)), "zoom": Move(enlarged)}
    if grid_size >= SMALLEST:
        found["cell"] = Move(lambda x: shifted(x, cell), slice(2 * cell, image_size - cell))
        if cell % 2 == 0:
            found["half"] = Move(lambda x: shifted(x, cell // 2), slice(cell // 2 + cell, image_size - cell))
    return found


def excess(moved_first: Tensor, moved_last: Tensor, truth: Tensor) -> float:
    """10·log10(1 + Δ/ε) in dB, from 0: Δ is the mean squared difference between the reconstruction of moved images and
    the moved reconstruction, ε the sum of their own mean squared errors. 0 where the errors move along with the image,
    3 where the two have nothing to do with one another. All (N, 3, H, W) uint8."""
    first, last, x = (images.double() for images in (moved_first, moved_last, truth))
    errors = (first - x).square().mean() + (last - x).square().mean()
    return 10 * math.log10(1 + (first - last).square().mean().item() / (errors.item() + ROUNDING))


def measure(subject: Subject) -> Reading:
    """``excess`` of each of ``moves`` over IMAGES images, and, where there are codes, how many of them stay the same
    where their cell went to."""
    x = subject.few(IMAGES)
    codes = subject.encode(x)
    x_hat, grid_size, metrics = subject.decode(codes), codes.shape[-1], {}
    coded = {}
    for name, (move, window) in moves(x.shape[-1], grid_size).items():
        truth = move(x)
        coded[name] = subject.encode(truth)
        triple = (images[..., window, window] for images in (subject.decode(coded[name]), move(x_hat), truth))
        metrics[f"equivariance_{name}"] = excess(*triple)
    if not codes.is_floating_point():
        metrics["codes_kept_flip"] = _equal(coded["flip"], codes.flip(-1))
        if "cell" in coded:
            metrics["codes_kept_cell"] = _equal(coded["cell"][:, 2:-1, 2:-1], codes[:, 1:-2, 1:-2])
    return Reading(metrics)


def _equal(a: Tensor, b: Tensor) -> float:
    return (a == b).double().mean().item()


EQUIVARIANCE = Instrument(
    about="do errors move along with an image that is shifted by a cell or half of one, mirrored, enlarged: 0 dB, "
    "entirely; 3 dB, not at all; and the share of codes that stay",
    version=1,
    seconds=2,
    metrics={
        "equivariance_cell": Metric("shifted by a cell, dB", ".2f", "lower"),
        "equivariance_half": Metric("shifted by half a cell, dB", ".2f", "lower"),
        "equivariance_flip": Metric("mirrored, dB", ".2f", "lower"),
        "equivariance_zoom": Metric("enlarged, dB", ".2f", "lower"),
        "codes_kept_cell": Metric("codes kept when shifted", ".2f", "higher"),
        "codes_kept_flip": Metric("codes kept when mirrored", ".2f", ""),
    },
    shown=(
        *("equivariance_cell", "equivariance_half", "equivariance_flip", "equivariance_zoom"),
        *("codes_kept_cell", "codes_kept_flip"),
    ),
    measure=measure,
)
