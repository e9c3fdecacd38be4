"""Images larger than those that a tokenizer was trained on."""

import textwrap

import numpy as np
import torch

from bench.core.errors import UserError
from bench.core.progress import Bar
from bench.data import eval_batches
from bench.metrics import Metric, from_uint8, full_precision, perceptual, psnr, to_uint8

from .instrument import BATCH, Instrument, Reading, Subject, spread

IMAGES = 128
FACTORS = (1.0, 1.5, 2.0)  # of the image size


def scores(subject: Subject, images: np.ndarray) -> dict[str, float]:
    """``psnr`` and ``lpips`` (alex) of ``decode(encode(x))``: means over ``images`` (N, H, W, 3) uint8, as runs have
    them."""
    found: dict[str, list[torch.Tensor]] = {"psnr": [], "lpips": []}
    with Bar(f"scoring at {images.shape[1]}×{images.shape[2]}", len(images)) as bar:
        for x in eval_batches(images, BATCH):
            x = x.to(subject.device)
            x_hat = subject.decode(subject.encode(x))
            found["psnr"].append(psnr(x_hat, x).cpu())
            with torch.no_grad(), full_precision(x.device):
                found["lpips"].append(perceptual("alex", x.device)(from_uint8(x_hat), from_uint8(x)).cpu())
            bar.advance(len(x))
    return {name: float(torch.cat(values).numpy().mean(dtype=np.float64)) for name, values in found.items()}


def side(subject: Subject, factor: float) -> int:
    """Pixels a side of an image that is ``factor`` times as large as those of ``subject``."""
    return round(factor * subject.images.shape[1])


def fails(subject: Subject) -> str:
    """Why images of one of FACTORS cannot be had, or not be taken by the backbone; empty where all can."""
    for factor in FACTORS[1:]:
        size = side(subject, factor)
        blank = torch.zeros(1, 3, size, size, device=subject.device)
        try:
            with torch.no_grad():
                x_hat = to_uint8(subject.codec.decode(subject.codec.encode(blank)))
            if x_hat.shape != blank.shape:
                raise ValueError(f"it makes {x_hat.shape[2]}×{x_hat.shape[3]} of them")
        except (RuntimeError, ValueError, AssertionError, UserError) as error:
            reason = textwrap.shorten(str(error) or type(error).__name__, 160)
            return f"this backbone and grid take no images of {size}×{size} ({reason}); leave it out"
        try:
            subject.at(size)
        except UserError as error:
            return str(error)
    return ""


def measure(subject: Subject) -> Reading:
    """``scores`` of the same IMAGES images, or all where there are fewer, at each of FACTORS."""
    few, metrics = spread(len(subject.images), IMAGES), {}
    for factor in FACTORS:
        images = subject.images if factor == 1 else subject.at(side(subject, factor))
        metrics |= {f"{name}_size_{100 * factor:.0f}": value for name, value in scores(subject, images[few]).items()}
    return Reading(metrics)


SIZES = Instrument(
    about="the same weights on images of the data set that are 1.5 and 2 times as large",
    version=2,
    seconds=13,
    metrics={
        f"{score}_size_{100 * factor:.0f}": Metric(f"{label} at {factor:g}×", form, better)
        for score, label, form, better in (("psnr", "PSNR dB", ".2f", "higher"), ("lpips", "LPIPS", ".3f", "lower"))
        for factor in FACTORS
    },
    shown=tuple(f"{score}_size_{100 * factor:.0f}" for score in ("psnr", "lpips") for factor in FACTORS),
    measure=measure,
    fails=fails,
)
