"""The pixels themselves as codes, in place of a tokenizer's: what a prior takes of them are bits per dimension, which
can be held against those that are published of image models.

An image of H×W pixels is a grid of H rows and C·W columns of its uint8 values, K = 256: in a row the pixels from left
to right, of each its channels red, green and blue (C = 3); or one (C = 1) where all images of a data set are grey.
"""

import hashlib
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
from torch import Tensor

from bench.core import settings
from bench.core.errors import UserError
from bench.core.files import cache_dir, located
from bench.core.runs import Run
from bench.core.settings import Count, Natural
from bench.data import Shards, from_uint8, load
from bench.metrics import MINIMUM_SIZE
from bench.tokenizers.config import LARGEST

from .codes import Codes

PIXELS = "pixels"  # in the place of a run, and of a backbone
BITS = (
    "Over pixels a token is one channel of one pixel: bits per token are bits per dimension, of 8-bit values, without "
    "dequantization noise."
)
LEVELS = 256
COMPARED = 1024  # images at a time


@dataclass(frozen=True)
class PixelConfig:
    """What stands in the place of a tokenizer's Config: what its fields of these names mean, and how many channels a
    pixel has."""

    data: str
    image_size: Annotated[int, settings.at_least(MINIMUM_SIZE["vgg"]), settings.at_most(LARGEST)]
    channels: Count = 3
    backbone: str = PIXELS
    split: str = "test"
    augment: str = "none"
    train_images: Natural = 0
    codebook_size: Count = LEVELS

    @property
    def bits_per_image(self) -> int:
        """Of its pixels as they are."""
        return 8 * self.channels * self.image_size**2


class Pixels:
    """Images as they are, as a tokenizer that loses nothing and has nothing to learn; of mirror images it knows none.

    Raises UserError on an image_size too small to be scored, and as ``load`` does.
    """

    def __init__(self, data: str = "photos", image_size: int = 32):
        config = PixelConfig(located(data), image_size)
        settings.check_fields(config)
        self.data = load(config.data, image_size)
        if isinstance(self.data.train, Shards):
            raise UserError(f"priors over pixels read decoded arrays, and {data} stays in shards; give a folder")
        grey = is_grey(self.data.train) and is_grey(self.data.images(config.split))
        self.config = replace(config, channels=1 if grey else 3)

    @property
    def name(self) -> str:
        """What a PriorConfig calls it: pixels-photos-32; of a folder with a digest of its path."""
        kind, _, path = self.config.data.partition(":")
        folder = [hashlib.sha256(os.fsencode(path)).hexdigest()[:8]] if path else []
        return "-".join([PIXELS, kind, *folder, str(self.config.image_size)])

    @property
    def digest(self) -> str:
        """Identity of what a prior is trained on: of the images."""
        return self.data.fingerprint[:16]

    @property
    def references(self) -> Path:
        """The folder of what priors over these pixels are read against."""
        return cache_dir() / "references" / f"{PIXELS}-{self.digest}"

    def codes(self) -> Codes:
        """Those of all images, which are the decoded arrays themselves, seen as grids: nothing is copied."""
        data, split = self.data, self.config.split
        grids = self.encode(data.train), self.encode(data.images(split))
        return Codes(*grids, LEVELS, self.digest, data.classes, data.labels_of("train"), data.labels_of(split))

    def encode(self, images: np.ndarray) -> np.ndarray:
        """(N, H, W, 3) uint8 → (N, H, C·W), a view."""
        return images[..., : self.config.channels].reshape(*images.shape[:2], -1)

    def decode(self, codes: Tensor) -> Tensor:
        """(B, H, C·W) whole numbers in [0, 256) → images (B, 3, H, W) in [-1, 1], as of any tokenizer."""
        return from_uint8(codes.unflatten(2, (-1, self.config.channels)).movedim(3, 1)).expand(-1, 3, -1, -1)


def over_pixels(run: Run) -> bool:
    """Whether a prior is over pixels and no tokenizer's codes. Raises Damaged as ``run.config`` does."""
    return str(run.config().get("tokenizer")).startswith(f"{PIXELS}-")


def is_grey(images: np.ndarray) -> bool:
    """Whether red, green and blue are equal in all pixels of ``images`` (N, H, W, 3)."""
    parts = (images[start : start + COMPARED] for start in range(0, len(images), COMPARED))
    return all((part == part[..., :1]).all() for part in parts)
