"""LPIPS, as a training loss and as a metric, and what its networks' features say of a whole set."""

import functools
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.data import from_uint8

from . import weights
from .distances import FrechetStatistics, kernel_distance
from .images import full_precision
from .registry import Batch, Evaluator, Metric, Setup

MINIMUM_SIZE = {"alex": 31, "vgg": 16}  # below it a pooling layer of the trunk has nothing left to pool


class Perceptual(nn.Module):
    """LPIPS v0.1 (Zhang et al. 2018, eq. 1) on ``alex`` or ``vgg``: frozen, a loss as well as a metric.

    Same weights and values as the ``lpips`` package; unlike there, a vanishing feature vector has a finite gradient,
    the reference needs no memory for gradients, and one pass of the trunk also yields pooled features.

    Inputs: (B, 3, H, W) float in [-1, 1], sides of at least ``MINIMUM_SIZE[net]``. ValueError for smaller images, for
    integers and, except where gradients are recorded, for values beyond [-1, 1] by more than 1e-3; training steps would
    have to wait for the GPU to pass that last check.
    """

    def __init__(self, net: str):
        super().__init__()
        network = weights.lpips_network(net)
        self.net = net
        self.scaling = network.scaling_layer
        self.trunk = network.net.to(memory_format=torch.channels_last)  # a third faster on CPUs than NCHW
        self.heads = nn.ParameterList(head.model[-1].weight for head in network.lins)  # (1, C, 1, 1) each

    def features(self, x: Tensor) -> list[Tensor]:
        """The five ReLU outputs that LPIPS compares, (B, C, h, w) each, from the image down."""
        if not x.is_floating_point():
            raise ValueError(f"LPIPS takes floats in [-1, 1], not {x.dtype}")
        if min(x.shape[2:]) < MINIMUM_SIZE[self.net]:
            raise ValueError(f"LPIPS-{self.net} needs {MINIMUM_SIZE[self.net]} pixels a side, not {tuple(x.shape[2:])}")
        return list(self.trunk(self.scaling(x.contiguous(memory_format=torch.channels_last))))

    def forward(self, x_hat: Tensor, x: Tensor) -> Tensor:
        """Distance of each pair, (B,) float32, at least 0. The gradient reaches ``x_hat`` only."""
        if not torch.is_grad_enabled():
            _check_range(x_hat, x)
        with torch.no_grad():
            features = self.features(x)
        return self._distance(self.features(x_hat), features)

    @torch.no_grad()
    def distance_and_features(self, x_hat: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Distance (B,), and the spatial mean of the last layer for ``x_hat`` and for ``x``, (B, 512 or 256) each."""
        _check_range(x_hat, x)
        features_hat, features = self.features(x_hat), self.features(x)
        return self._distance(features_hat, features), pool(features_hat), pool(features)

    def _distance(self, features_hat: list[Tensor], features: list[Tensor]) -> Tensor:
        layers = zip(features_hat, features, self.heads, strict=True)
        return sum(((_unit(a) - _unit(b)).square() * head).sum(1).mean((1, 2)) for a, b, head in layers)


def _check_range(*batches: Tensor) -> None:
    for x in batches:
        if x.abs().max() > 1 + 1e-3:
            raise ValueError(f"LPIPS takes images in [-1, 1], not [{x.min():.4g}, {x.max():.4g}]")


def _unit(features: Tensor) -> Tensor:
    """Unit length along the channels, in float32 whatever the autocast; a zero vector stays zero, and has a gradient.
    Features of images have norms above 0.1, so ``eps`` changes no value and only bounds that gradient."""
    return F.normalize(features.float(), dim=1, eps=1e-6)


def pool(features: list[Tensor]) -> Tensor:
    """The spatial mean of the last layer, (B, C)."""
    return features[-1].mean((2, 3))


@functools.cache
def perceptual(net: str, device: torch.device, trunk: torch.dtype = torch.float32) -> Perceptual:
    """The process's one ``Perceptual`` on ``device``, for the training loss and every evaluation; under an autocast to
    the dtype of its ``trunk`` the same to the bit, but for a copy of the weights in each pass."""
    with torch.inference_mode(False):  # else a first call during evaluation would spoil it for training
        network = Perceptual(net).to(device)
        network.trunk.to(trunk)
        return network


class LPIPSScores(Evaluator):
    """What the networks of LPIPS say, each run once per image: VGG16 for its LPIPS and for the distances between sets.

    In float32 whatever the surrounding autocast. VGG16 bounds the time of scoring: 2.5 GFLOP per 64×64 image. UserError
    if the weights cannot be had or are damaged.
    """

    METRICS: ClassVar[dict[str, Metric]] = {
        "fid_vgg16": Metric("FID vgg16", ".1f", "lower"),
        "kid_vgg16": Metric("KID vgg16", ".4f", "lower"),
        "lpips_alex": Metric("LPIPS alex", ".3f", "lower"),
        "lpips_vgg": Metric("LPIPS vgg", ".3f", "lower"),
    }

    def __init__(self, setup: Setup):
        super().__init__(setup)
        self.alex, self.vgg = perceptual("alex", setup.device), perceptual("vgg", setup.device)
        self.statistics = FrechetStatistics(512), FrechetStatistics(512)  # reconstructions, originals
        self.pooled: tuple[list[Tensor], list[Tensor]] = ([], [])  # of the same, 2 KB an image: KID needs the vectors

    def seen(self) -> dict[str, Any]:
        return {**super().seen(), "statistics": self.statistics, "pooled": self.pooled}

    def join(self, seen: dict[str, Any]) -> None:
        super().join(seen)
        for own, others in zip(self.statistics, seen["statistics"], strict=True):
            own.join(others)
        for own, others in zip(self.pooled, seen["pooled"], strict=True):
            own.extend(others)

    @torch.inference_mode()
    def update(self, batch: Batch) -> None:
        with full_precision(self.setup.device):
            pair = from_uint8(batch.x_hat), from_uint8(batch.x)
            lpips_alex = self.alex(*pair)
            lpips_vgg, *pooled = self.vgg.distance_and_features(*pair)
        self.keep(lpips_alex=lpips_alex, lpips_vgg=lpips_vgg)
        for features, statistics, kept in zip(pooled, self.statistics, self.pooled, strict=True):
            statistics.update(features)
            kept.append(features.cpu())

    def result(self) -> dict[str, float]:
        """The means, and both distances. ValueError for fewer than 2 images."""
        reconstructions, originals = self.statistics
        fid = reconstructions.distance(originals)
        return {"fid_vgg16": fid, "kid_vgg16": kernel_distance(*map(torch.cat, self.pooled)), **super().result()}
