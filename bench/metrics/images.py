"""Images as numbers, and how near one is to another pixel by pixel."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

import torch
from torch import Tensor

from backbones.torchvision_repair import repair

from .registry import Batch, Evaluator, Metric

PSNR_CAP = 100.0  # dB, the score of identical images: a mean over a set has to stay finite
SSIM_WINDOW = 11  # pixels, of a Gaussian with σ = 1.5


def to_uint8(x: Tensor) -> Tensor:
    """[-1, 1] float → [0, 255] uint8 of the same shape, clamped and rounded to nearest. ValueError for NaN."""
    if x.isnan().any():
        raise ValueError("the images contain NaN")
    return x.float().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)


def psnr(x_hat: Tensor, x: Tensor) -> Tensor:
    """10·log10(255² / mean squared error) per image: two (B, 3, H, W) uint8 → (B,) float32 dB, at most PSNR_CAP."""
    check_pair(x_hat, x)
    error = (x_hat.float() - x.float()).square().mean((1, 2, 3)) / 255**2
    return -10 * error.clamp_min(10 ** (-PSNR_CAP / 10)).log10()


def ssim(x_hat: Tensor, x: Tensor) -> Tensor:
    """Structural similarity per image: two (B, 3, H, W) uint8 → (B,) float32 in [-1, 1].

    Wang et al. 2004, eq. 13: Gaussian window of 11×11 pixels with σ = 1.5, K1 = 0.01, K2 = 0.03, L = 255, averaged over
    the channels and the windows that lie inside the image. ValueError for images smaller than a window.
    """
    check_pair(x_hat, x)
    if min(x.shape[2:]) < SSIM_WINDOW:
        raise ValueError(f"SSIM needs images of at least {SSIM_WINDOW} pixels a side, not {tuple(x.shape[2:])}")
    repair()
    from torchmetrics.functional.image import structural_similarity_index_measure

    with full_precision(x.device):
        _, similarity = structural_similarity_index_measure(
            x_hat.float(), x.float(), data_range=255.0, sigma=1.5, reduction="none", return_full_image=True
        )
    border = SSIM_WINDOW // 2  # where the package pads the image to fill the window
    return similarity[..., border:-border, border:-border].mean((1, 2, 3))


def check_pair(x_hat: Tensor, x: Tensor) -> None:
    """Raises ValueError unless both are uint8 (B, 3, H, W) of one shape."""
    if {x_hat.dtype, x.dtype} != {torch.uint8} or x_hat.shape != x.shape or x.ndim != 4 or x.shape[1] != 3:
        raise ValueError(
            "images to compare must be uint8 of equal shape (B, 3, H, W), not "
            f"{x_hat.dtype} {tuple(x_hat.shape)} and {x.dtype} {tuple(x.shape)}"
        )


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Float32 convolutions as written: no autocast, no TensorFloat-32, the same algorithm every time."""
    cudnn = torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)
    with torch.autocast(device.type, enabled=False), cudnn:
        yield


class PixelScores(Evaluator):
    """PSNR and SSIM, the means over images."""

    METRICS: ClassVar[dict[str, Metric]] = {
        "psnr": Metric("PSNR dB", ".2f", "higher"),
        "ssim": Metric("SSIM", ".3f", "higher"),
    }

    def update(self, batch: Batch) -> None:
        self.keep(psnr=psnr(batch.x_hat, batch.x), ssim=ssim(batch.x_hat, batch.x))
