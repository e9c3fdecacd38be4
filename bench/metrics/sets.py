"""Sets of images, compared by the features of every extractor."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from backbones.torchvision_repair import repair

from .distances import FrechetStatistics, KernelDistance
from .extractors import EXTRACTORS
from .images import full_precision
from .registry import Batch, Evaluator, Metric, Setup

PRECISION_NEIGHBOURS = 3  # Kynkäänniemi et al. 2019, section 3


class InceptionScores(Evaluator):
    """FID (Heusel et al. 2017, eq. 6), where Inception's weights are at hand; nothing elsewhere.

    Its 11.4 GFLOP per image bound the time of scoring. UserError for a damaged file of weights.
    """

    METRICS: ClassVar[dict[str, Metric]] = {"fid": Metric("FID", ".1f", "lower")}

    def __init__(self, setup: Setup):
        super().__init__(setup)
        extractor = EXTRACTORS["inception"]
        self.features = extractor.load(setup.device, setup.fid_weights)
        self.statistics = [FrechetStatistics(extractor.dimension) for _ in ("reconstructions", "originals")]

    @torch.inference_mode()
    def update(self, batch: Batch) -> None:
        if self.features is None:
            return
        with full_precision(self.setup.device):
            for images, statistics in zip((batch.x_hat, batch.x), self.statistics, strict=True):
                statistics.update(self.features(images))

    def result(self) -> dict[str, float]:
        """``fid``, or nothing. ValueError for fewer than 2 images."""
        reconstructions, originals = self.statistics
        return {} if self.features is None else {"fid": reconstructions.distance(originals)}


class ImageSet:
    """Features of one set of images, to be compared with those of another set: what is generated with what is real.

    features: (N, dimension) float32 on the CPU of each of EXTRACTORS; N is 0 where its weights cannot be had.
    """

    def __init__(self, features: dict[str, Tensor]):
        self.features = features

    @classmethod
    @torch.inference_mode()
    def of(
        cls, batches: Iterable[Tensor], device: torch.device | str = "cpu", inception_path: Path | None = None
    ) -> ImageSet:
        """The features of uint8 (B, 3, H, W) ``batches``, each network run once per image, in float32."""
        device = torch.device(device)
        networks = {name: extractor.load(device, inception_path) for name, extractor in EXTRACTORS.items()}
        found = {name: [torch.zeros(0, extractor.dimension)] for name, extractor in EXTRACTORS.items()}
        for x in batches:
            x = x.to(device)
            with full_precision(device):
                for name, network in networks.items():
                    if network is not None:
                        found[name].append(network(x).cpu().float())
        return cls({name: torch.cat(parts) for name, parts in found.items()})

    def distances(self, real: ImageSet) -> dict[str, float]:
        """How far this set, of generated images, is from a ``real`` one: ``gfid`` with the suffix of each extractor of
        which both have features, and on VGG16 ``gkid_vgg16``, ``precision_vgg16`` (share of these images that lie
        within the real ones' neighbourhoods) and ``recall_vgg16`` (the reverse). ValueError for sets of fewer than 4
        images."""
        repair()
        from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

        own, others = self.features["vgg16"], real.features["vgg16"]
        if min(len(own), len(others)) <= PRECISION_NEIGHBOURS:
            raise ValueError(f"sets of {len(own)} and {len(others)} images are too small to compare")
        distances = {}
        for name, extractor in EXTRACTORS.items():
            pair = self.features[name], real.features[name]
            if all(map(len, pair)):
                made, found = (_accumulated(FrechetStatistics(features.shape[1]), features) for features in pair)
                distances[f"gfid{extractor.suffix}"] = made.distance(found)
        made, found = (_accumulated(KernelDistance(), features) for features in (own, others))
        options = {"prc_neighborhood": PRECISION_NEIGHBOURS, "save_cpu_ram": True, "verbose": False}
        covered = prc_features_to_metric(own, others, **options)
        return {
            **distances,
            "gkid_vgg16": made.distance(found),
            "precision_vgg16": covered[KEY_METRIC_PRECISION],
            "recall_vgg16": covered[KEY_METRIC_RECALL],
        }


def _accumulated(
    accumulator: FrechetStatistics | KernelDistance, features: Tensor
) -> FrechetStatistics | KernelDistance:
    accumulator.update(features)
    return accumulator
