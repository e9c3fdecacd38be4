"""Metrics of reconstructions and of codes: pure functions, and accumulators that take an evaluation set in batches.

Images are NCHW with 3 channels: uint8 in [0, 255] wherever a score is taken, since a picture that is stored and shown
has been clamped and rounded, or float in [-1, 1] inside networks. ``to_uint8`` and ``from_uint8`` are the only bridge.

========================  ==========================================================================================
lpips_alex, lpips_vgg     Zhang et al. 2018, "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric"
fid                       Heusel et al. 2017, "GANs Trained by a Two Time-Scale Update Rule", eq. 6; Inception alone
fid_vgg16, kid_vgg16      the same distance, and Bińkowski et al. 2018's, on mean-pooled VGG16 relu5_3 features (512-d)
psnr, ssim                decibels; Wang et al. 2004, "Image Quality Assessment: From Error Visibility to ...", eq. 13
grid_energy, grid_edges   how far a grid of patches shows in what was reconstructed wrongly; 0 dB is not at all
gfid …, gkid …            the same between generated and real images
precision, recall         Kynkäänniemi et al. 2019, "Improved Precision and Recall Metric", eq. 2; k = 3, on VGG16
sharpness                 how steep the reconstructions are beside the originals; 1 is as steep, less is blurred
perplexity, usage         exp(entropy) and support of the codes over the whole evaluation set
========================  ==========================================================================================
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric
from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric
from torchmetrics.functional.image import structural_similarity_index_measure

from . import weights

MINIMUM_SIZE = {"alex": 31, "vgg": 16}  # below it a pooling layer of the trunk has nothing left to pool
PSNR_CAP = 100.0  # dB, the score of identical images: a mean over a set has to stay finite
SSIM_WINDOW = 11  # pixels, of a Gaussian with σ = 1.5
ROUNDING_POWER, ROUNDING_STEP = 1 / 12, 1 / 3  # variance, and mean |difference|, of errors uniform in ±½ grey level
NEIGHBOURS = 4  # frequencies on either side of one of the grid's
KID_SUBSETS, KID_SUBSET_SIZE, KID_SEED = 100, 1000, 2020  # torch-fidelity's defaults


# --------------------------------------------------------------------------------------------------------------- images


def to_uint8(x: Tensor) -> Tensor:
    """[-1, 1] float → [0, 255] uint8 of the same shape: clamped, then rounded to nearest. ValueError for NaN."""
    if x.isnan().any():
        raise ValueError("the images contain NaN")
    return x.float().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)


def from_uint8(x: Tensor) -> Tensor:
    """[0, 255] uint8 → [-1, 1] float32 of the same shape; ``to_uint8`` undoes it exactly."""
    return x.float() / 127.5 - 1


def psnr(x_hat: Tensor, x: Tensor) -> Tensor:
    """Peak signal-to-noise ratio per image: two (B, 3, H, W) uint8 → (B,) float32 dB, at most ``PSNR_CAP``.

    10·log10(255² / mean squared error over the image's pixels and channels).
    """
    _check_pair(x_hat, x)
    error = (x_hat.float() - x.float()).square().mean((1, 2, 3)) / 255**2
    return -10 * error.clamp_min(10 ** (-PSNR_CAP / 10)).log10()


def ssim(x_hat: Tensor, x: Tensor) -> Tensor:
    """Structural similarity per image: two (B, 3, H, W) uint8 → (B,) float32 in [-1, 1].

    Wang et al. 2004, eq. 13: Gaussian window of 11×11 pixels with σ = 1.5, K1 = 0.01, K2 = 0.03, L = 255, averaged over
    the channels and the windows that lie inside the image. ValueError for images smaller than a window.
    """
    _check_pair(x_hat, x)
    if min(x.shape[2:]) < SSIM_WINDOW:
        raise ValueError(f"SSIM needs images of at least {SSIM_WINDOW} pixels a side, not {tuple(x.shape[2:])}")
    with full_precision(x.device):
        _, similarity = structural_similarity_index_measure(
            x_hat.float(), x.float(), data_range=255.0, sigma=1.5, reduction="none", return_full_image=True
        )
    border = SSIM_WINDOW // 2  # where the package pads the image to fill the window
    return similarity[..., border:-border, border:-border].mean((1, 2, 3))


def _check_pair(x_hat: Tensor, x: Tensor) -> None:
    for images in (x_hat, x):
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or images.shape != x.shape:
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


# ----------------------------------------------------------------------------------------------------------- perceptual


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
        return self._distance(features_hat, features), _pool(features_hat), _pool(features)

    def _distance(self, features_hat: list[Tensor], features: list[Tensor]) -> Tensor:
        layers = zip(features_hat, features, self.heads, strict=True)
        return sum(((_unit(a) - _unit(b)).square() * head).sum(1).mean((1, 2)) for a, b, head in layers)


def _check_range(*batches: Tensor) -> None:
    for x in batches:
        if x.abs().max() > 1 + 1e-3:
            raise ValueError(f"LPIPS takes images in [-1, 1], not [{x.min():.4g}, {x.max():.4g}]")


def _unit(features: Tensor) -> Tensor:
    """Unit length along the channels, in float32 whatever the autocast; a zero vector stays zero.

    ``F.normalize`` has a gradient where the sum of squares is zero; a plain square root has NaN. Features of images
    have norms above 0.1, so ``eps`` changes no value and only bounds the gradient.
    """
    return F.normalize(features.float(), dim=1, eps=1e-6)


def _pool(features: list[Tensor]) -> Tensor:
    return features[-1].mean((2, 3))


# ----------------------------------------------------------------------------------------------------------- image sets


class FrechetStatistics:
    """Mean and covariance of a set of feature vectors from float64 sums, so batches may come in any size and order.

    n, total (D,) and outer (D, D): count, Σf and Σffᵀ, on the CPU.
    """

    def __init__(self, dimension: int):
        self.n = 0
        self.total = torch.zeros(dimension, dtype=torch.float64)
        self.outer = torch.zeros(dimension, dimension, dtype=torch.float64)

    def update(self, features: Tensor) -> None:
        """Adds (B, D) vectors."""
        features = features.detach().cpu().double()
        self.n += len(features)
        self.total += features.sum(0)
        self.outer.addmm_(features.T, features)

    def merge(self, other: FrechetStatistics) -> None:
        """Adds what ``other`` has seen, for instance on another device's share of the set."""
        self.n += other.n
        self.total += other.total
        self.outer += other.outer

    def moments(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean (D,) and unbiased covariance (D, D), float64. ValueError for fewer than 2 samples."""
        _check_count(self.n)
        mean = self.total / self.n
        covariance = (self.outer - self.n * torch.outer(mean, mean)) / (self.n - 1)
        return mean.numpy(), covariance.numpy()

    def distance(self, other: FrechetStatistics) -> float:
        """Fréchet distance of the two Gaussians, ‖μ₁ − μ₂‖² + Tr(Σ₁ + Σ₂ − 2(Σ₁Σ₂)^½): Heusel et al. 2017, eq. 6.

        At least 0, up to rounding. ValueError for fewer than 2 samples.
        """
        first, second = ({"mu": mean, "sigma": covariance} for mean, covariance in (self.moments(), other.moments()))
        return fid_statistics_to_metric(first, second, verbose=False)[KEY_METRIC_FID]


class KernelDistance:
    """Kernel distance between two sets of feature vectors, KID: Bińkowski et al. 2018, "Demystifying MMD GANs", sec. 4.

    Unlike Fréchet's it needs the vectors themselves, kept as float32 on the CPU: 4·n·D bytes.
    """

    def __init__(self) -> None:
        self.features: list[Tensor] = []

    def update(self, features: Tensor) -> None:
        """Adds (B, D) vectors."""
        self.features.append(features.detach().cpu().float())

    def distance(self, other: KernelDistance) -> float:
        """Unbiased MMD² with the kernel (xᵀy/D + 1)³, so slightly negative for equal distributions.

        The mean over 100 random subsets of 1000, always the same ones, as torch-fidelity draws them; sets of at most
        1000 are taken whole, once, because all their subsets would be equal. ValueError for fewer than 2 samples.
        """
        counts = [sum(map(len, side.features)) for side in (self, other)]
        _check_count(min(counts))
        size = min(KID_SUBSET_SIZE, *counts)
        subsets = 1 if max(counts) == size else KID_SUBSETS
        options = {"kid_subsets": subsets, "kid_subset_size": size, "rng_seed": KID_SEED, "verbose": False}
        first, second = torch.cat(self.features), torch.cat(other.features)
        return kid_features_to_metric(first, second, **options)[KEY_METRIC_KID_MEAN]


PRECISION_NEIGHBOURS = 3  # Kynkäänniemi et al. 2019, section 3


class ImageSet:
    """Features of one set of images, to be compared with those of another set: what is generated with what is real.

    vgg: (N, 512) and inception: (N, 2048), or (0, 2048) where Inception's weights cannot be had; float32 on the CPU.
    """

    def __init__(self, vgg: Tensor, inception: Tensor):
        self.vgg, self.inception = vgg, inception

    @classmethod
    @torch.inference_mode()
    def of(
        cls, batches: Iterable[Tensor], device: torch.device | str = "cpu", inception_path: Path | None = None
    ) -> ImageSet:
        """The features of uint8 (B, 3, H, W) ``batches``, each network run once per image, in float32."""
        device = torch.device(device)
        network, inception = perceptual("vgg", device), weights.inception(inception_path)
        vgg, inceptions = [], [torch.zeros(0, 2048)]
        for x in batches:
            with full_precision(device):
                x = x.to(device)
                images = from_uint8(x)
                vgg.append(_pool(network.features(images)).cpu().float())
                if inception is not None:
                    inceptions.append(inception.to(device)(x)[0].cpu().float())  # which takes uint8
        return cls(torch.cat(vgg), torch.cat(inceptions))

    def distances(self, real: ImageSet) -> dict[str, float]:
        """How far this set, of generated images, is from a ``real`` one: ``gfid_vgg16``, ``gkid_vgg16``, ``gfid`` where
        both have Inception's features, ``precision_vgg16`` (share of these images that lie within the real ones'
        neighbourhoods) and ``recall_vgg16`` (the reverse). ValueError for sets of fewer than 4 images."""
        if min(len(self.vgg), len(real.vgg)) <= PRECISION_NEIGHBOURS:
            raise ValueError(f"sets of {len(self.vgg)} and {len(real.vgg)} images are too small to compare")
        options = {"prc_neighborhood": PRECISION_NEIGHBOURS, "save_cpu_ram": True, "verbose": False}
        found = prc_features_to_metric(self.vgg, real.vgg, **options)
        distances = {"gfid_vgg16": _statistics(self.vgg).distance(_statistics(real.vgg))}
        if len(self.inception) and len(real.inception):
            distances["gfid"] = _statistics(self.inception).distance(_statistics(real.inception))
        kernels = KernelDistance(), KernelDistance()
        for kernel, features in zip(kernels, (self.vgg, real.vgg), strict=True):
            kernel.update(features)
        return {
            **distances,
            "gkid_vgg16": kernels[0].distance(kernels[1]),
            "precision_vgg16": found[KEY_METRIC_PRECISION],
            "recall_vgg16": found[KEY_METRIC_RECALL],
        }


def _statistics(features: Tensor) -> FrechetStatistics:
    statistics = FrechetStatistics(features.shape[1])
    statistics.update(features)
    return statistics


def _check_count(n: int) -> None:
    if n < 2:
        raise ValueError(f"a distance between sets needs at least 2 samples of each, not {n}")


# ------------------------------------------------------------------------------------------------------ grids and blur


class Artefacts:
    """A grid of patches in the residuals r = x̂ − x of a set of square images, and the sharpness of x̂ beside x.

    Two views of a grid, either of them in decibels, 0 for none, averaged over rows and columns. They look at r alone,
    at where things are and not at how large: neither constant shifts nor flips of the images change them, and white
    noise scores 0. What has no size beyond the rounding of pixels to integers is no grid either.

    power: (size,) Σ|DFT(r)|² of rows and of columns, float64, and steepness: (size − 1,) Σ|∇r| between the neighbouring
    pixels k and k + 1, both over images, colours, and lines; lines: how many of the latter.
    """

    def __init__(self) -> None:
        self.power: Tensor | float = 0.0
        self.steepness: Tensor | float = 0.0
        self.lines = 0
        self.gradients = torch.zeros(2, dtype=torch.float64)  # Σ|∇x̂|, Σ|∇x|

    def update(self, x: Tensor, x_hat: Tensor) -> None:
        """Adds originals ``x`` and their reconstructions ``x_hat``: (B, 3, S, S) uint8 each, on one device."""
        _check_pair(x_hat, x)
        x, x_hat = x.float(), x_hat.float()
        for direction in (lambda images: images, lambda images: images.mT):  # along the rows, then the columns
            original, reconstruction = direction(x), direction(x_hat)
            residual = reconstruction - original
            self.power += _over_lines(torch.fft.fft(residual, norm="ortho").abs().square())
            self.steepness += _over_lines(residual.diff().abs())
            self.gradients += torch.stack([_over_lines(y.diff().abs()).sum() for y in (reconstruction, original)])
            self.lines += residual.shape[:-1].numel()

    def grid_energy(self, grid_size: int) -> float:
        """How far the frequency of the grid and its harmonics rise above the frequencies around them, in dB.

        The power spectrum at 1, 2, … cycles per patch against the geometric mean of the four frequencies on either side
        (fewer where the next harmonic is near), on average over those harmonics. So it is blind to a spectrum that
        falls smoothly, as those of images and of blur do, and to errors that are no pattern but differ from patch to
        patch, which have no energy there: see ``grid_edges``.
        """
        spectrum = 10 * (self.power / self.lines + ROUNDING_POWER).log10()
        harmonics = torch.arange(grid_size, len(spectrum), grid_size)
        away = torch.arange(1, min(grid_size // 2, NEIGHBOURS) + 1)
        if not len(harmonics) or not len(away):
            return 0.0  # a grid of pixels, or of one patch
        neighbours = spectrum[harmonics[:, None] + torch.cat([-away, away])]
        return (spectrum[harmonics] - neighbours.mean(1)).mean().item()

    def grid_edges(self, grid_size: int) -> float:
        """How much steeper the residual is across the borders of patches than inside of them, in dB.

        20·log10 of the ratio of mean |∇r|; below 0 where the insides are the steeper ones.
        """
        patch = (len(self.steepness) + 1) // grid_size
        border = torch.arange(1, len(self.steepness) + 1) % patch == 0
        if border.all() or not border.any():
            return 0.0  # a grid of pixels, or of one patch
        steepness = self.steepness / self.lines + ROUNDING_STEP
        return 20 * (steepness[border].mean() / steepness[~border].mean()).log10().item()

    def sharpness(self) -> float:
        """Σ|∇x̂| / Σ|∇x| over the set: 1 is as sharp as the originals. Sums below one grey level count as one."""
        reconstructions, originals = self.gradients.clamp_min(1).tolist()
        return reconstructions / originals

    def result(self, grid_size: int) -> dict[str, float]:
        """All of it, by name, for images of ``grid_size``² patches."""
        grid = {"grid_energy": self.grid_energy(grid_size), "grid_edges": self.grid_edges(grid_size)}
        return grid | {"sharpness": self.sharpness()}


def _over_lines(values: Tensor) -> Tensor:
    """(B, C, lines, n) → (n,) float64 sums, on the CPU."""
    return values.sum((0, 1, 2)).cpu().double()


# ---------------------------------------------------------------------------------------------------------------- codes


class CodeHistogram:
    """How often each of ``codebook_size`` codes occurs over a whole evaluation set; ``counts`` is (K,) int64.

    Perplexity is not linear in the batches: its mean over batches underestimates that of the set.
    """

    def __init__(self, codebook_size: int):
        self.counts = torch.zeros(codebook_size, dtype=torch.int64)

    def update(self, codes: Tensor) -> None:
        """Adds integer codes of any shape. ValueError for codes outside [0, K) or that are not integers."""
        codes = codes.detach().flatten().cpu()
        if codes.is_floating_point() or (codes.numel() and not 0 <= codes.min() <= codes.max() < len(self.counts)):
            raise ValueError(f"codes must be integers in [0, {len(self.counts)})")
        self.counts += torch.bincount(codes, minlength=len(self.counts))

    def perplexity(self) -> float:
        """exp(−Σ p log p) in [1, K]: how many equally frequent codes would carry as much; NaN before any code."""
        return torch.special.entr(self.counts.double() / self.counts.sum()).sum().exp().item()

    def usage(self) -> float:
        """Fraction of the codebook that occurs, in [0, 1]."""
        return 1 - self.dead_codes() / len(self.counts)

    def dead_codes(self) -> int:
        """How many codes never occurred."""
        return int((self.counts == 0).sum())


# ---------------------------------------------------------------------------------------------------------- all at once


class Scores:
    """Every image metric of a set of reconstructions, each network run once per image.

    ``result()`` has the means of ``lpips_alex``, ``lpips_vgg``, ``psnr`` and ``ssim``, the distances ``fid_vgg16`` and
    ``kid_vgg16``, and ``fid`` where Inception's weights are at hand; ``per_image`` has the scores behind the means.

    Networks run in float32 whatever the surrounding autocast, on clamped and rounded images.
    VGG16 bounds the time with 2.5 GFLOP per 64×64 image, four fifths of the whole; where Inception runs, its 11.4 GFLOP
    per image do. On a CPU, batches of 8 to 32 images are quickest: larger ones leave the caches.

    device: where the networks run. inception_path: as ``weights.inception`` takes it. UserError if the LPIPS weights
    cannot be had or a weight file is damaged.
    """

    def __init__(self, device: torch.device | str = "cpu", inception_path: Path | None = None):
        self.device = torch.device(device)
        self.alex, self.vgg = perceptual("alex", self.device), perceptual("vgg", self.device)
        self.inception = weights.inception(inception_path)
        self.vgg_statistics = FrechetStatistics(512), FrechetStatistics(512)  # reconstructions, originals
        self.vgg_kernel = KernelDistance(), KernelDistance()
        self.inception_statistics = FrechetStatistics(2048), FrechetStatistics(2048)
        self.batches: dict[str, list[Tensor]] = {"lpips_alex": [], "lpips_vgg": [], "psnr": [], "ssim": []}

    @torch.inference_mode()
    def update(self, x: Tensor, x_hat: Tensor) -> None:
        """Adds originals ``x`` and their reconstructions ``x_hat``: (B, 3, H, W) uint8 each, on any device."""
        x, x_hat = x.to(self.device), x_hat.to(self.device)
        scores = {"psnr": psnr(x_hat, x), "ssim": ssim(x_hat, x)}
        with full_precision(self.device):
            pair = from_uint8(x_hat), from_uint8(x)
            scores["lpips_alex"] = self.alex(*pair)
            scores["lpips_vgg"], *vgg_features = self.vgg.distance_and_features(*pair)
            for features, statistics, kernel in zip(vgg_features, self.vgg_statistics, self.vgg_kernel, strict=True):
                statistics.update(features)
                kernel.update(features)
            if self.inception is not None:
                for images, statistics in zip((x_hat, x), self.inception_statistics, strict=True):
                    statistics.update(self.inception.to(self.device)(images)[0])
        for name, values in scores.items():
            self.batches[name].append(values.cpu())

    @property
    def per_image(self) -> dict[str, np.ndarray]:
        """(N,) float32 of each per-image metric, in the order of the updates."""
        return {name: torch.cat(batches).numpy() for name, batches in self.batches.items()}

    def result(self) -> dict[str, float]:
        """All scores over everything seen. ValueError for fewer than 2 images."""
        reconstructions, originals = self.vgg_statistics
        scores = {"fid_vgg16": reconstructions.distance(originals)}
        scores["kid_vgg16"] = self.vgg_kernel[0].distance(self.vgg_kernel[1])
        if self.inception is not None:
            reconstructions, originals = self.inception_statistics
            scores["fid"] = reconstructions.distance(originals)
        return scores | {name: float(values.mean(dtype=np.float64)) for name, values in self.per_image.items()}


@functools.cache
def perceptual(net: str, device: torch.device) -> Perceptual:
    """The process's one ``Perceptual`` on ``device``, for the training loss and every evaluation."""
    with torch.inference_mode(False):  # else a first call during evaluation would spoil it for training
        return Perceptual(net).to(device)
