"""What everyday image formats make of the same images at the same bits: WebP, AVIF and JPEG as Pillow writes them.

The whole file counts, headers included, as that is what would be stored. Each image takes the highest quality whose
file has at most as many bits as the run spends on an image, or its smallest file where none is as small: the bits that
were used, on average, are part of the scores.
"""

import io
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL
import torch
from PIL import Image, features
from torch import Tensor

from bench.core.files import cache_dir, cached, seal, unseal_numbers
from bench.data import Data
from bench.metrics import from_uint8, to_uint8

from .config import PROTOCOL_VERSION, Config
from .evaluate import REFERENCE_VERSION, protocol, score

AHEAD = 8  # qualities: files grow with them but for small steps back
KEPT = ("fid", "fid_vgg16", "lpips_alex", "lpips_vgg", "psnr", "ssim", "bits_per_image", "bits_per_pixel")


class Format(NamedTuple):
    """An image format: its name, its qualities in ascending order, among how many of the lowest ones its smallest file
    is, how it is written otherwise, and its library."""

    label: str
    qualities: Sequence[int]
    lowest: int
    options: dict[str, Any]
    library: str  # as PIL.features calls it


FORMATS: dict[str, Format] = {
    "webp": Format("WebP", range(101), 8, {}, "webp"),
    "avif": Format("AVIF", (0, *range(3, 101)), 2, {"max_threads": 1}, "avif"),  # 1 and 2 are written as 0 is
    "jpeg": Format("JPEG", range(1, 101), 8, {"optimize": True}, "libjpeg_turbo"),
}


def available() -> list[str]:
    """Those of FORMATS that the installed Pillow writes."""
    return [name for name in FORMATS if features.check("jpg" if name == "jpeg" else name)]


def write(pixels: np.ndarray, name: str, quality: int) -> bytes:
    """The file of an image (H, W, 3) uint8 in that format and quality."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, name, quality=quality, **FORMATS[name].options)
    return file.getvalue()


def compress(pixels: np.ndarray, name: str, bits: float) -> bytes:
    """The file of an image (H, W, 3) uint8 of the highest quality that has at most ``bits``; where none has, the
    smallest. By bisection, as files grow with quality, and a look at the next qualities and the lowest ones, as they do
    so almost but not quite."""
    _, qualities, lowest, *_ = FORMATS[name]

    @cache
    def file(place: int) -> bytes:
        return write(pixels, name, qualities[place])

    def fits(place: int) -> bool:
        return 8 * len(file(place)) <= bits

    low = next(filter(fits, range(lowest)), None)
    if low is None:
        return min(map(file, range(lowest)), key=len)
    high = len(qualities)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return file(max(filter(fits, range(low, min(low + AHEAD + 1, len(qualities))))))


class FormatCodec:
    """Images as files of a format, of up to ``bits`` where it can. The latent is what a file shows, decoded once."""

    def __init__(self, name: str, bits: float):
        self.name, self.bits = name, bits

    def encode_with_bits(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) in [-1, 1], of whole grey levels → what the files show, alike, and their bits (B,)."""
        images = to_uint8(x).permute(0, 2, 3, 1).cpu().numpy()
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            files = list(threads.map(lambda pixels: compress(pixels, self.name, self.bits), images))
        shown = np.stack([np.asarray(Image.open(io.BytesIO(file)).convert("RGB")) for file in files])
        pixels = torch.from_numpy(shown).permute(0, 3, 1, 2).to(x.device)
        return from_uint8(pixels), torch.tensor([8.0 * len(file) for file in files])

    def encode(self, x: Tensor) -> Tensor:
        """The first of both."""
        return self.encode_with_bits(x)[0]

    def decode(self, codes: Tensor) -> Tensor:
        """What ``encode`` gives is decoded already."""
        return codes


def format_references(config: Config, data: Data, bits: float, fid_weights: Path | None) -> dict[str, float]:
    """Scores of every available format on the images of ``data`` that ``config`` is scored on, at up to ``bits`` per
    image, as METRIC_FORMAT. Computed once for these images and this Pillow, then cached."""
    split, device = config.split, config.device
    conditions = protocol(data, split, device, fid_weights)
    fid = conditions["extractor_inception"] or "none"
    found = {}
    for name in available():
        version = f"v{PROTOCOL_VERSION}.{REFERENCE_VERSION}-pillow{PIL.__version__}"
        library = f"{name}{features.version(FORMATS[name].library)}"
        key = (
            f"{data.fingerprint[:16]}-{split}-{bits // 8:.0f}bytes-{version}-{library}-fid-{fid}-{conditions['device']}"
        )

        def make(path: Path, name: str = name) -> None:
            label = f"scoring {FORMATS[name].label}"
            metrics, _ = score(FormatCodec(name, bits), None, data.images(split), device, fid_weights, label)
            path.write_text(seal({metric: metrics[metric] for metric in KEPT if metric in metrics}))

        stored = cached(cache_dir() / "references" / f"{key}.json", make, lambda path: unseal_numbers(path, *KEPT[4:]))
        found |= {f"{metric}_{name}": value for metric, value in stored.items()}
    return found
