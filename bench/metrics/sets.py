"""Sets of images, compared by the features that networks see in them.

To add such a network: write a function like ``_vgg16`` and add a line to ``EXTRACTORS``.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from backbones.torchvision_repair import repair
from bench.data import from_uint8

from . import weights
from .distances import FrechetStatistics, kernel_distance
from .images import full_precision
from .lpips import perceptual, pool
from .registry import Batch, Evaluator, Metric, Setup

PRECISION_NEIGHBOURS = 3  # Kynkäänniemi et al. 2019, section 3

Features = Callable[[Tensor], Tensor]  # (B, 3, H, W) uint8 → (B, dimension) float32, both on one device


class Extractor(NamedTuple):
    """A network that turns images into feature vectors, with weights from a given file or of its own."""

    metric: str  # Fréchet distance on it; between generated and real images the same after a g
    weights: str  # their name in ``weights.DIGESTS`` and in files of features
    about: str  # what a protocol says of it besides their digest
    dimension: int
    load: Callable[[torch.device, Path | None], Features | None]  # None where its weights cannot be had
    digest: Callable[[Path | None], str | None]  # of the weights, likewise

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


def _dinov2(device: torch.device, path: Path | None) -> Features | None:
    network = weights.dinov2(path)
    return None if network is None else network.to(device)


EXTRACTORS: dict[str, Extractor] = {
    "vgg16": Extractor(
        metric="fid_vgg16",
        weights="vgg",
        about="LPIPS VGG16 relu5_3, mean-pooled, ",
        dimension=512,
        load=_vgg16,
        digest=lambda path: weights.weights_digest("vgg"),
    ),
    "inception": Extractor(
        metric="fid",  # Inception's alone, as is ``gfid``
        weights="inception",
        about="",
        dimension=2048,
        load=_inception,
        digest=lambda path: weights.inception_digest(path),
    ),
    "dinov2": Extractor(
        metric="fd_dinov2",
        weights="dinov2",
        about="DINOv2 ViT-L/14 class token, bilinear to 224, ",
        dimension=1024,
        load=_dinov2,
        digest=lambda path: weights.dinov2_digest(path),
    ),
}


def digests(path: Path | None) -> str:
    """Of the weights of all, for the names of files with what was computed by them."""
    return "-".join(extractor.digest(path) or "none" for extractor in EXTRACTORS.values())


class FrechetScores(Evaluator):
    """The Fréchet distance on one of EXTRACTORS where its weights are at hand, nothing elsewhere; UserError for a
    damaged file of them."""

    EXTRACTOR: ClassVar[str]

    def __init__(self, setup: Setup):
        super().__init__(setup)
        extractor = EXTRACTORS[self.EXTRACTOR]
        self.features = extractor.load(setup.device, setup.fid_weights)
        self.statistics = [FrechetStatistics(extractor.dimension) for _ in ("reconstructions", "originals")]

    def seen(self) -> dict[str, Any]:
        return {**super().seen(), "statistics": self.statistics}

    def join(self, seen: dict[str, Any]) -> None:
        super().join(seen)
        for own, others in zip(self.statistics, seen["statistics"], strict=True):
            own.join(others)

    @torch.inference_mode()
    def update(self, batch: Batch) -> None:
        if self.features is None:
            return
        with full_precision(self.setup.device):
            for images, statistics in zip((batch.x_hat, batch.x), self.statistics, strict=True):
                statistics.update(self.features(images))

    def result(self) -> dict[str, float]:
        """The distance, or nothing. ValueError for fewer than 2 images."""
        reconstructions, originals = self.statistics
        (name,) = self.METRICS
        return {} if self.features is None else {name: reconstructions.distance(originals)}


class InceptionScores(FrechetScores):
    """FID. Its 11.4 GFLOP per image bound the time of scoring."""

    EXTRACTOR, METRICS = "inception", {"fid": Metric("FID", ".1f", "lower")}


class DinoV2Scores(FrechetScores):
    """FD on DINOv2. Where its weights are, its 155 GFLOP per image bound the time of scoring: minutes on a CPU."""

    EXTRACTOR, METRICS = "dinov2", {"fd_dinov2": Metric("FD DINOv2", ".1f", "lower")}


class ImageSet(NamedTuple):
    """Features of one set of images, to be compared with those of another set: what is generated with what is real."""

    features: dict[str, Tensor]  # by EXTRACTORS, (N, dimension) float32 on the CPU; N is 0 where weights cannot be had

    @classmethod
    @torch.inference_mode()
    def of(
        cls, batches: Iterable[Tensor], device: torch.device | str = "cpu", fid_weights: Path | None = None
    ) -> "ImageSet":
        """The features of uint8 (B, 3, H, W) ``batches``, each network run once per image, in float32."""
        device = torch.device(device)
        networks = {name: extractor.load(device, fid_weights) for name, extractor in EXTRACTORS.items()}
        found = {name: [torch.zeros(0, extractor.dimension)] for name, extractor in EXTRACTORS.items()}
        for x in batches:
            x = x.to(device)
            with full_precision(device):
                for name, network in networks.items():
                    if network is not None:
                        found[name].append(network(x).cpu())
        return cls({name: torch.cat(parts) for name, parts in found.items()})

    def distances(self, real: "ImageSet") -> dict[str, float]:
        """How far this set, of generated images, is from a ``real`` one: ``gfid``, ``gfid_vgg16`` and ``gfd_dinov2``
        where both have such features, and on VGG16 ``gkid_vgg16``, ``precision_vgg16`` (share of these images that lie
        within the real ones' neighbourhoods) and ``recall_vgg16`` (the reverse). ValueError for sets of fewer than 4
        images."""
        repair()
        from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

        pair = self.features["vgg16"], real.features["vgg16"]
        if min(map(len, pair)) <= PRECISION_NEIGHBOURS:
            raise ValueError(f"sets of {len(pair[0])} and {len(pair[1])} images are too small to compare")
        distances = {}
        for name, extractor in EXTRACTORS.items():
            own, others = self.features[name], real.features[name]
            if len(own) and len(others):
                statistics = FrechetStatistics.of(own)
                distances[f"g{extractor.metric}"] = statistics.distance(FrechetStatistics.of(others))
        options = {"prc_neighborhood": PRECISION_NEIGHBOURS, "save_cpu_ram": True, "verbose": False}
        covered = prc_features_to_metric(*pair, **options)
        return {
            **distances,
            "gkid_vgg16": kernel_distance(*pair),
            "precision_vgg16": covered[KEY_METRIC_PRECISION],
            "recall_vgg16": covered[KEY_METRIC_RECALL],
        }
