"""Networks that turn images into feature vectors: distances between sets of images are distances between these.

To add one: write a function like ``_vgg16`` and add a line to ``EXTRACTORS``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from . import weights
from .images import from_uint8
from .lpips import perceptual, pool

Features = Callable[[Tensor], Tensor]  # (B, 3, H, W) uint8 → (B, dimension) float32, both on one device


class Extractor(NamedTuple):
    """One such network.

    suffix: of the metrics on it. weights: their name in ``weights.DIGESTS`` and in files of features. about: what a
    protocol says of it besides their digest. load: the network on a device, with the file of weights that was given, if
    any; None where its weights cannot be had. digest: of those weights, or None.
    """

    suffix: str
    weights: str
    about: str
    dimension: int
    load: Callable[[torch.device, Path | None], Features | None]
    digest: Callable[[Path | None], str | None]

    def identity(self, path: Path | None) -> str | None:
        """What has to be equal for two scores on it to be comparable; None where its weights cannot be had."""
        digest = self.digest(path)
        return f"{self.about}{digest}" if digest else None


def _vgg16(device: torch.device, path: Path | None) -> Features:
    network = perceptual("vgg", device)
    return lambda x: pool(network.features(from_uint8(x)))


def _inception(device: torch.device, path: Path | None) -> Features | None:
    network = weights.inception(path)
    return None if network is None else lambda x: network.to(device)(x)[0]  # which takes uint8


EXTRACTORS: dict[str, Extractor] = {
    "vgg16": Extractor(
        suffix="_vgg16",
        weights="vgg",
        about="LPIPS VGG16 relu5_3, mean-pooled, ",
        dimension=512,
        load=_vgg16,
        digest=lambda path: weights.weights_digest("vgg"),
    ),
    "inception": Extractor(
        suffix="",
        weights="inception",
        about="",
        dimension=2048,
        load=_inception,
        digest=lambda path: weights.inception_digest(path),
    ),
}
"""By name. ``fid`` and ``gfid`` without a suffix are Inception's alone."""


def digests(path: Path | None) -> str:
    """Of the weights of all, for the names of files with what was computed by them."""
    return "-".join(extractor.digest(path) or "none" for extractor in EXTRACTORS.values())
