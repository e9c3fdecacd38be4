"""Distances between two sets of feature vectors."""

import numpy as np
import torch
from torch import Tensor

from backbones.torchvision_repair import repair

KID_SUBSETS, KID_SUBSET_SIZE, KID_SEED = 100, 1000, 2020  # torch-fidelity's defaults


class FrechetStatistics:
    """Mean and covariance of a set of feature vectors from float64 sums, so batches may come in any size and order."""

    def __init__(self, dimension: int):
        self.n = 0
        self.total = torch.zeros(dimension, dtype=torch.float64)  # Σf
        self.outer = torch.zeros(dimension, dimension, dtype=torch.float64)  # Σffᵀ

    @classmethod
    def of(cls, features: Tensor) -> "FrechetStatistics":
        """Of (N, D) vectors."""
        statistics = cls(features.shape[1])
        statistics.update(features)
        return statistics

    def update(self, features: Tensor) -> None:
        """Adds (B, D) vectors."""
        features = features.detach().cpu().double()
        self.n += len(features)
        self.total += features.sum(0)
        self.outer.addmm_(features.T, features)

    def join(self, other: "FrechetStatistics") -> None:
        """Adds the vectors of ``other``."""
        self.n, self.total, self.outer = self.n + other.n, self.total + other.total, self.outer + other.outer

    def moments(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean (D,) and unbiased covariance (D, D), float64. ValueError for fewer than 2 samples."""
        _check_count(self.n)
        mean = self.total / self.n
        covariance = (self.outer - self.n * torch.outer(mean, mean)) / (self.n - 1)
        return mean.numpy(), covariance.numpy()

    def distance(self, other: "FrechetStatistics") -> float:
        """Fréchet distance of the two Gaussians, ‖μ₁ − μ₂‖² + Tr(Σ₁ + Σ₂ − 2(Σ₁Σ₂)^½): Heusel et al. 2017, eq. 6. At
        least 0, up to rounding. ValueError for fewer than 2 samples."""
        repair()
        from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

        first, second = ({"mu": mean, "sigma": covariance} for mean, covariance in (self.moments(), other.moments()))
        return fid_statistics_to_metric(first, second, verbose=False)[KEY_METRIC_FID]


def kernel_distance(first: Tensor, second: Tensor) -> float:
    """KID of (N, D) and (M, D) float32 vectors: Bińkowski et al. 2018, "Demystifying MMD GANs", section 4.

    Unbiased MMD² with the kernel (xᵀy/D + 1)³, so slightly negative for equal distributions. The mean over 100 random
    subsets of 1000, always the same ones, as torch-fidelity draws them; sets of at most 1000 are taken whole, once,
    because all their subsets would be equal. ValueError for fewer than 2 samples.
    """
    repair()
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric

    counts = len(first), len(second)
    _check_count(min(counts))
    size = min(KID_SUBSET_SIZE, *counts)
    subsets = 1 if max(counts) == size else KID_SUBSETS
    options = {"kid_subsets": subsets, "kid_subset_size": size, "rng_seed": KID_SEED, "verbose": False}
    return kid_features_to_metric(first, second, **options)[KEY_METRIC_KID_MEAN]


def _check_count(n: int) -> None:
    if n < 2:
        raise ValueError(f"a distance between sets needs at least 2 samples of each, not {n}")
