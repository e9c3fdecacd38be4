"""The one description of a run: a flat, frozen Config, its presets, its checks and its identity.

A field's name is the command-line flag, the Optuna parameter and the DataFrame column.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch

from backbones import BACKBONES
from backbones.layers import downsamplings

from .data import AUGMENTATIONS
from .files import UserError
from .metrics import MINIMUM_SIZE
from .quantizers import QUANTIZERS

PROTOCOL_VERSION = 1  # how runs are trained and scored; raise it when the same config would give other numbers


@dataclass(frozen=True)
class Config:
    """Everything that a run's numbers depend on, the seed included."""

    backbone: str
    """encoder and decoder: cnn, convnext, vit, mamba or bimamba"""
    width: int
    """channels at the token grid; with depth it sets the parameter count"""
    depth: int
    """blocks per level (cnn, convnext) or per side (vit, mamba, bimamba)"""
    quantizer: str = "ema"
    """how the codebook learns: standard (codebook loss), ema (moving average) or l2 (unit sphere)"""
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
    """decay of the ema quantizer's running sums"""
    revive_after: int = 50
    """a code that missed this many times its equal share of tokens is reset to a random token; 0 never resets"""
    reconstruction: Literal["l1", "l2"] = "l2"
    """pixel loss on [-1, 1]: mean absolute or mean squared error"""
    lpips_weight: float = 0.05
    """weight of the perceptual loss; 0 leaves it out"""
    lpips_net: Literal["alex", "vgg"] = "alex"
    """network of the perceptual loss; vgg is slow without a GPU"""
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
        """The same config with every ``auto`` replaced by what this machine gives, and a data folder's real path."""
        device = self.device if self.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        precision = self.precision if self.precision != "auto" else "bf16" if has_fast_bf16(device) else "fp32"
        data = self.data
        if data.startswith("folder:"):
            data = f"folder:{Path(data.removeprefix('folder:')).expanduser().resolve()}"
        return replace(self, device=device, precision=precision, data=data)

    def run_id(self) -> str:
        """Identity of the run: readable head, then a hash of the canonical config and the protocol version."""
        canonical = json.dumps([PROTOCOL_VERSION, asdict(self.resolved())], sort_keys=True)
        return f"{self.backbone}-{self.quantizer}-{hashlib.sha256(canonical.encode()).hexdigest()[:12]}"

    @property
    def tokens(self) -> int:
        """Codes per image."""
        return self.grid_size**2

    def check(self) -> None:
        """Raises UserError, one sentence with value and fix, on the first setting that cannot work."""
        _check_choice("backbone", self.backbone, BACKBONES)
        _check_choice("quantizer", self.quantizer, QUANTIZERS)
        _check_choice("augment", self.augment, AUGMENTATIONS)
        _check_choice("reconstruction", self.reconstruction, ("l1", "l2"))
        _check_choice("lpips_net", self.lpips_net, ("alex", "vgg"))
        _check_choice("precision", self.precision, ("auto", "bf16", "fp32"))
        for name in ("image_size", "grid_size", "codebook_size", "code_dim", "width", "depth", "steps", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("beta", "lpips_weight", "warmup", "weight_decay", "grad_clip", "revive_after", "seed"):
            if not getattr(self, name) >= 0:
                raise UserError(f"{name} is {getattr(self, name)}; it must be 0 or more")
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
        if not self.lr > 0:
            raise UserError(f"lr is {self.lr}; it must be above 0")
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


def _check_choice(name: str, value: str, choices: Any) -> None:
    if value not in choices:
        raise UserError(f"unknown {name} {value!r}; choose from {', '.join(choices)}")


def has_fast_bf16(device: str) -> bool:
    """Whether bfloat16 matrix arithmetic runs in hardware on ``device``."""
    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() if hasattr(torch.cpu, "_is_avx512_bf16_supported") else False


# Width and depth of every backbone are chosen so that encoder + decoder parameters agree within 5 % in each preset.
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
        },
    },
}


def preset_settings(preset: str) -> dict[str, Any]:
    """Config fields that ``preset`` sets for every backbone. Raises UserError on an unknown name."""
    _check_choice("preset", preset, PRESETS)
    return {name: value for name, value in PRESETS[preset].items() if name != "size"}


def make_config(backbone: str, preset: str = "cpu", **overrides: Any) -> Config:
    """Config of ``backbone`` in ``preset``; ``overrides`` are Config fields, None meaning the preset's own value.

    Raises UserError on an unknown backbone, preset or field.
    """
    settings = preset_settings(preset)
    _check_choice("backbone", backbone, BACKBONES)
    for name in overrides:
        _check_choice("setting", name, [field.name for field in fields(Config)])
    width, depth = PRESETS[preset]["size"][backbone]
    given = {name: value for name, value in overrides.items() if value is not None}
    return Config(**{"backbone": backbone, "width": width, "depth": depth, **settings, **given})
