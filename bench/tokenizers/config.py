"""The one description of a run: a flat, frozen Config, its presets, its checks and its identity.

A field's name is the command-line flag, the Optuna parameter and the DataFrame column.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch

from backbones import Backbone, backbone, users
from backbones.layers import downsamplings
from bench.core.environment import has_fast_bf16
from bench.core.errors import UserError
from bench.data import AUGMENTATIONS
from bench.metrics import MINIMUM_SIZE
from bench.quantizers import ENTROPY_WEIGHT, QUANTIZERS
from bench.quantizers.codebook import GRADIENTS

from .losses import ADVERSARIAL

# How runs are trained and scored; raised when the same config gives other numbers (tests/golden.json notices).
# 2: FLOPs count attention and the Mamba-2 scan, on every device; seeds other than 0 have random draws of their own.
PROTOCOL_VERSION = 2


@dataclass(frozen=True)
class Config:
    """Everything that a run's numbers depend on, the seed included."""

    SHELF: ClassVar[str] = "runs"

    backbone: str
    """cnn, convnext, vit, mamba, bimamba, hybrid, or timm:MODEL, whose encoder is a model of timm, its decoder cnn's"""
    width: int
    """channels at the token grid; with depth it sets the parameter count (timm:MODEL: of the decoder)"""
    depth: int
    """blocks per level (cnn, convnext, the decoder of timm:MODEL) or per side (vit, mamba, bimamba, hybrid)"""
    patch_overlap: bool = False
    """vit, mamba, bimamba, hybrid: patches twice as wide as their stride, a cure for grid artefacts"""
    final_conv: bool = False
    """vit, mamba, bimamba, hybrid: a 3×3 convolution over the pixels at the end, the other cure"""
    attention: int = 0
    """transformer layers on either side of the quantizer, whatever the backbone"""
    pretrained: bool = False
    """timm:MODEL: start the encoder from timm's weights"""
    quantizer: str = "ema"
    """how the codebook learns: standard (codebook loss), ema (moving average), l2 or ema_l2 (unit sphere), gumbel
    (sampled codes); or fsq, lfq, simvq, residual, of an optional package"""
    data: str = "photos"
    """photos (embedded, no download), folder:PATH, cifar10, fashion_mnist, stl10, celeba or flowers102"""
    image_size: int = 64
    """side of the square images, in pixels"""
    grid_size: int = 8
    """side of the grid of codes; must divide image_size as a power of two; 1 is one code per image"""
    codebook_size: int = 512
    """K, the number of codes"""
    code_dim: int = 16
    """d, the length of a code vector"""
    beta: float = 0.25
    """β, weight of the commitment loss"""
    ema_decay: float = 0.99
    """ema, ema_l2, residual: decay of the running sums"""
    kmeans_init: bool = False
    """start the codebook at k-means centroids of encoder outputs rather than at random ones"""
    entropy_weight: float | None = None
    """weight of the entropy penalty: sure about each token, all codes in use; unless given, 0.1 for lfq,
    which needs it, 0.02 for simvq, which gains by it, and 0 for all others"""
    gradient: Literal["straight_through", "rotation"] = "straight_through"
    """how the decoder's gradient passes the quantizer: copied, or rotated along with the code"""
    temperature: float = 1.0
    """gumbel: temperature of the soft choice of a code in training"""
    revive_after: int = 50
    """a code that missed this many times its equal share of tokens is reset to a random token; 0 never resets"""
    reconstruction: Literal["l1", "l2"] = "l2"
    """pixel loss on [-1, 1]: mean absolute or mean squared error"""
    lpips_weight: float = 0.05
    """weight of the perceptual loss; 0 leaves it out"""
    lpips_net: Literal["alex", "vgg"] = "alex"
    """network of the perceptual loss; vgg is slow without a GPU"""
    gan_weight: float = 0.0
    """weight of the adversarial loss; 0 trains no discriminator"""
    gan_start: float = 0.5
    """share of the steps after which the tokenizer sees the discriminator"""
    gan_ramp: float = 0.1
    """share of the steps over which gan_weight then grows from 0 to its full value"""
    gan_warmup: float = 0.1
    """share of the steps, before gan_start, in which the discriminator trains alone"""
    gan_loss: Literal["hinge", "nonsaturating"] = "hinge"
    """adversarial loss of both sides"""
    gan_adaptive: bool = True
    """scale gan_weight by the ratio of gradients at the decoder's last layer (VQGAN)"""
    gan_lr: float = 0.2
    """the discriminator's learning rate as a share of lr"""
    gan_width: int = 64
    """channels of PatchGAN's first layer"""
    gan_layers: int = 3
    """PatchGAN's downsampling layers; each doubles the channels, up to eight times gan_width"""
    gan_norm: Literal["group", "spectral"] = "group"
    """PatchGAN's normalisation"""
    lecam_weight: float = 0.0
    """weight of the LeCAM regulariser of the discriminator; for little data"""
    r1_weight: float = 0.0
    """weight of the R1 gradient penalty of the discriminator on real images"""
    steps: int = 700
    """training steps"""
    batch_size: int = 16
    """images per step"""
    lr: float = 2e-3
    """peak learning rate of AdamW, reached after the warm-up, cosine to zero afterwards"""
    warmup: int = 50
    """steps of linear warm-up"""
    weight_decay: float = 0.05
    """AdamW weight decay; never on norms, biases, codes, positions, A_log, D or dt_bias"""
    grad_clip: float = 1.0
    """largest gradient norm; 0 does not clip"""
    weight_ema: float = 0.99
    """decay of the weight average that is scored; 0 scores the last weights"""
    augment: str = "flip"
    """none, flip, or blog (crop 0.8-1, flip, sharpness, autocontrast)"""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """autocast in training; auto is bf16 where the hardware has it. Scoring is always fp32"""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N"""
    seed: int = 0
    """weights, batches and augmentation follow from it"""

    def resolved(self) -> Config:
        """The same config with every ``auto`` replaced by what this machine gives, an open ``entropy_weight`` by the
        quantizer's own, and a data folder's real path."""
        device = self.device if self.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        precision = self.precision if self.precision != "auto" else "bf16" if has_fast_bf16(device) else "fp32"
        data = self.data
        if data.startswith("folder:"):
            data = f"folder:{Path(data.removeprefix('folder:')).expanduser().resolve()}"
        entropy_weight = ENTROPY_WEIGHT.get(self.quantizer, 0.0) if self.entropy_weight is None else self.entropy_weight
        return replace(self, device=device, precision=precision, data=data, entropy_weight=entropy_weight)

    def run_id(self) -> str:
        """Identity of the run: readable head, then a hash of the canonical config and the protocol version."""
        canonical = json.dumps([PROTOCOL_VERSION, asdict(self.resolved())], sort_keys=True)
        head = f"{self.backbone.replace(':', '-')}-{self.quantizer}"
        return f"{head}-{hashlib.sha256(canonical.encode()).hexdigest()[:12]}"

    @property
    def tokens(self) -> int:
        """Codes per image."""
        return self.grid_size**2

    def check(self) -> None:
        """Raises UserError, one sentence with value and fix, on the first setting that cannot work."""
        self._check_backbone()
        _check_choice("quantizer", self.quantizer, QUANTIZERS)
        _check_choice("augment", self.augment, AUGMENTATIONS)
        _check_choice("reconstruction", self.reconstruction, ("l1", "l2"))
        _check_choice("lpips_net", self.lpips_net, ("alex", "vgg"))
        _check_choice("gradient", self.gradient, GRADIENTS)
        _check_choice("gan_loss", self.gan_loss, ADVERSARIAL)
        _check_choice("gan_norm", self.gan_norm, ("group", "spectral"))
        _check_choice("precision", self.precision, ("auto", "bf16", "fp32"))
        sizes = ("image_size", "grid_size", "codebook_size", "code_dim", "width", "depth", "steps", "batch_size")
        for name in (*sizes, "gan_width", "gan_layers"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1")
        weights = ("beta", "lpips_weight", "gan_weight", "gan_lr", "lecam_weight", "r1_weight", "weight_decay")
        for name in ("attention", *weights, "warmup", "grad_clip", "revive_after", "seed"):
            if not getattr(self, name) >= 0:
                raise UserError(f"{name} is {getattr(self, name)}; it must be 0 or more")
        for name in ("gan_start", "gan_ramp", "gan_warmup"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} is {getattr(self, name)}; it is a share of the steps, from 0 to 1")
        for name, value in asdict(self).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"{name} is {value}; it must be a finite number")
        if self.seed >= 2**31:
            raise UserError(f"seed is {self.seed}; it must be below 2**31")
        for name in ("ema_decay", "weight_ema"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 0 and below 1")
        smallest = max(MINIMUM_SIZE.values())
        if self.image_size < smallest:
            raise UserError(f"image_size is {self.image_size}; LPIPS needs at least {smallest} pixels a side")
        for name in ("lr", "temperature"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name} is {getattr(self, name)}; it must be above 0")
        self._check_quantizer()
        try:
            downsamplings(self.image_size, self.grid_size)
        except ValueError as error:
            sizes = [self.image_size >> k for k in range(20) if (self.image_size >> k) << k == self.image_size]
            raise UserError(f"{error}; choose from {', '.join(map(str, filter(None, sizes)))}") from error
        device = self.resolved().device
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"device {device!r} is not available here; use --device cpu") from error

    def _check_backbone(self) -> None:
        taken = _backbone(self.backbone).options
        for name in ("patch_overlap", "final_conv", "pretrained"):
            if getattr(self, name) and name not in taken:
                raise UserError(
                    f"{name} is {getattr(self, name)}, of which backbone {self.backbone!r} makes no use; "
                    f"leave it out or choose from {', '.join(users(name))}"
                )

    def _check_quantizer(self) -> None:
        given = self.resolved()
        if not given.entropy_weight >= 0:
            raise UserError(f"entropy_weight is {given.entropy_weight}; it must be 0 or more")
        for field in fields(self):
            choices = [name for name, quantizer in QUANTIZERS.items() if field.name in quantizer.settings]
            value, default = getattr(given, field.name), field.default or 0.0  # an open entropy_weight is none
            if choices and self.quantizer not in choices and value != default:
                raise UserError(
                    f"{field.name} is {value}, of which quantizer {self.quantizer!r} makes no use; "
                    f"leave it out or choose from {', '.join(choices)}"
                )
        QUANTIZERS[self.quantizer].check(self.codebook_size)


def _backbone(name: str) -> Backbone:
    try:
        return backbone(name)
    except ValueError as error:
        raise UserError(str(error)) from error


def _check_choice(name: str, value: str, choices: Any) -> None:
    if value not in choices:
        raise UserError(f"unknown {name} {value!r}; choose from {', '.join(choices)}")


_VITVQGAN: dict[str, Any] = {
    "image_size": 256,
    "grid_size": 32,
    "codebook_size": 8192,
    "code_dim": 32,
    "quantizer": "l2",
    "lpips_weight": 0.1,
    "lpips_net": "vgg",
    "steps": 30_000,
    "batch_size": 32,
    "lr": 3e-4,
    "warmup": 1000,
    "weight_ema": 0.999,
}
_SMALL = {
    "cnn": (738, 2),
    "convnext": (1073, 2),
    "vit": (512, 8),
    "mamba": (472, 8),
    "bimamba": (454, 6),
    "hybrid": (443, 8),
}

# Width and depth of every backbone ("size") are chosen so that encoder + decoder parameters agree within 5 % in each
# preset but blog256; "own" is what one backbone has to itself. The decoder of timm:MODEL is that of cnn.
PRESETS: dict[str, dict[str, Any]] = {
    # proves that everything works, in seconds
    "smoke": {
        "image_size": 32,
        "grid_size": 4,
        "codebook_size": 128,
        "steps": 150,
        "size": {
            "cnn": (40, 3),
            "convnext": (56, 3),
            "vit": (64, 2),
            "mamba": (56, 2),
            "bimamba": (48, 2),
            "hybrid": (52, 2),
        },
    },
    # a real comparison on two CPU cores, about two minutes a backbone; the default
    "cpu": {
        "size": {
            "cnn": (128, 1),
            "convnext": (128, 2),
            "vit": (112, 2),
            "mamba": (104, 2),
            "bimamba": (88, 2),
            "hybrid": (80, 3),
        },
    },
    # VQGAN (Esser et al. 2021) at the size of course work: 64×64 to 8×8 codes, adversary and LPIPS; 10 M parameters
    "vqgan64": {
        "grid_size": 8,
        "codebook_size": 1024,
        "code_dim": 32,
        "reconstruction": "l1",
        "lpips_weight": 1.0,
        "gan_weight": 0.8,
        "gan_start": 0.3,
        "steps": 50_000,
        "batch_size": 32,
        "lr": 3e-4,
        "warmup": 1000,
        "weight_ema": 0.999,
        "size": {
            "cnn": (315, 2),
            "convnext": (452, 2),
            "vit": (250, 6),
            "mamba": (229, 6),
            "bimamba": (233, 4),
            "hybrid": (215, 6),
        },
    },
    # a first VQ-VAE: 32×32 to 4×4 codes of 64 numbers, K = 256; 1 M parameters
    "vqvae32": {
        "image_size": 32,
        "grid_size": 4,
        "codebook_size": 256,
        "code_dim": 64,
        "quantizer": "standard",
        "lpips_weight": 0.0,
        "steps": 20_000,
        "batch_size": 64,
        "lr": 1e-3,
        "weight_ema": 0.999,
        "size": {
            "cnn": (96, 2),
            "convnext": (134, 2),
            "vit": (99, 3),
            "mamba": (93, 3),
            "bimamba": (95, 2),
            "hybrid": (82, 3),
        },
    },
    # the published CelebA sweep (see studies/celeba_sweep.py) at the best of its cells: 64×64 to 16×16 codes, residual
    # layers of 128 channels, mean squared error alone; the other backbones with the parameters of this CNN
    "celeba64": {
        "data": "celeba",
        "grid_size": 16,
        "codebook_size": 512,
        "code_dim": 64,
        "quantizer": "standard",
        "beta": 1.25,
        "lpips_weight": 0.0,
        "steps": 10_000,
        "batch_size": 32,
        "lr": 1e-3,
        "size": {
            "cnn": (128, 2),
            "convnext": (180, 2),
            "vit": (128, 3),
            "mamba": (119, 3),
            "bimamba": (120, 2),
            "hybrid": (108, 3),
        },
    },
    # ViT-VQGAN Small (Yu et al. 2022, section 3): 256×256 to 32×32 codes of 32 numbers on the sphere, K = 8192; 8
    # blocks of width 512 a side, and the other backbones with as many parameters
    "vitvqgan-s": {
        **_VITVQGAN,
        "gan_weight": 0.1,
        "size": _SMALL,
    },
    # the comparison of the blog post "Lessons in training VQGAN", as its code had it: the CNN with 64×64 codes beside
    # 32×32 of the others, and a tenth of their parameters. Reports will not rank these rows
    "blog256": {
        **_VITVQGAN,
        "augment": "blog",
        "own": {"convnext": {"grid_size": 64, "attention": 1}},
        "size": {
            "cnn": (384, 2),
            "convnext": (384, 2),
            "vit": (768, 12),
            "mamba": (768, 12),
            "bimamba": (768, 12),
            "hybrid": (768, 12),
        },
    },
    # the same question on equal footing: 32×32 codes and as many parameters for all
    "blog256-fair": {
        **_VITVQGAN,
        "augment": "blog",
        "size": _SMALL,
    },
}


def preset_settings(preset: str) -> dict[str, Any]:
    """Config fields that ``preset`` sets for every backbone. Raises UserError on an unknown name."""
    _check_choice("preset", preset, PRESETS)
    return {name: value for name, value in PRESETS[preset].items() if name not in ("size", "own")}


def make_config(backbone: str, preset: str = "cpu", **overrides: Any) -> Config:
    """Config of ``backbone`` in ``preset``. ``overrides`` are Config fields; whatever is given wins over the preset,
    and None means the preset's own value.

    Raises UserError on an unknown backbone, preset or field.
    """
    settings = preset_settings(preset)
    _backbone(backbone)
    for name in overrides:
        _check_choice("setting", name, [field.name for field in fields(Config)])
    width, depth = PRESETS[preset]["size"]["cnn" if backbone.startswith("timm:") else backbone]
    given = {name: value for name, value in overrides.items() if value is not None}
    own = PRESETS[preset].get("own", {}).get(backbone, {})
    return Config(**{"backbone": backbone, "width": width, "depth": depth, **settings, **own, **given})
