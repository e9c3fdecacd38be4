"""The one description of a prior's run: as Config is of a tokenizer's, a flat dataclass whose fields are the flags."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, fields, replace
from typing import ClassVar, Literal

import torch

from bench.core.environment import has_fast_bf16
from bench.core.errors import UserError

from .models import LEARNED, PRIORS

# How priors are trained and scored; raised when the same config gives other numbers (tests/golden.json notices).
# 2: seeds other than 0 have random draws of their own.
PRIOR_VERSION = 2
DEPTH = {"rnn": 3, "transformer": 4, "mamba": 4}  # layers, unless given; pixelcnn has as many as see the whole grid
SAMPLING = ("samples", "temperature", "top_k")  # fields that training knows nothing of


@dataclass(frozen=True)
class PriorConfig:
    """Everything that a prior's numbers depend on beside its tokenizer, the seed included."""

    SHELF: ClassVar[str] = "priors"

    tokenizer: str
    """run id of the tokenizer"""
    prior: str
    """pixelcnn, rnn, transformer, mamba, or independent, the floor: a histogram of the codes of each position"""
    depth: int | None = None
    """layers; unless given 4 for transformer and mamba, 3 for rnn, and for pixelcnn, which sees 2 rows and columns
    further with each, half the grid's side but at least 5"""
    parameters: int = 1_000_000
    """of the prior; its width is chosen so that it has so many, within 2 %"""
    dropout: float = 0.1
    """share of features that training leaves out"""
    conditional: bool = False
    """condition on the class of the image, where the data has classes (photos: which photograph)"""
    steps: int = 400
    """training steps"""
    batch_size: int = 64
    """grids of codes per step"""
    lr: float = 3e-3
    """peak learning rate of AdamW, reached after the warm-up, cosine to zero afterwards"""
    warmup: int = 50
    """steps of linear warm-up"""
    weight_decay: float = 0.05
    """AdamW weight decay; never on norms, biases, embeddings, positions, A_log, D or dt_bias"""
    grad_clip: float = 1.0
    """largest gradient norm; 0 does not clip"""
    weight_ema: float = 0.99
    """decay of the weight average that is scored; 0 scores the last weights"""
    samples: int = 512
    """images to generate and score"""
    temperature: float = 1.0
    """of sampling; below 1 likely codes become likelier"""
    top_k: int = 0
    """sample among so many likeliest codes only; 0 is all"""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """autocast in training; auto is bf16 where the hardware has it. Scoring is always fp32"""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N"""
    seed: int = 0
    """weights, batches, dropout and samples follow from it"""

    def resolved(self) -> PriorConfig:
        """The same config with every ``auto`` replaced by what this machine gives. What the independent prior makes no
        use of, which is all of training, is at its default."""
        device = self.device if self.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        precision = self.precision if self.precision != "auto" else "bf16" if has_fast_bf16(device) else "fp32"
        config = replace(self, device=device, precision=precision)
        if self.prior not in LEARNED:
            kept = ("tokenizer", "prior", *SAMPLING, "precision", "device", "seed")
            unused = {field.name: field.default for field in fields(self) if field.name not in kept}
            config = replace(config, **unused, precision="fp32")
        return config

    def run_id(self) -> str:
        """Identity of the run: readable head, then a hash of the canonical config and the version."""
        canonical = json.dumps([PRIOR_VERSION, asdict(self.resolved())], sort_keys=True)
        return f"{self.prior}-{self.tokenizer}-{hashlib.sha256(canonical.encode()).hexdigest()[:8]}"

    def trains_as(self, other: PriorConfig) -> bool:
        """Whether both come to the same weights: equal but for how they are sampled from."""
        usual = {field.name: field.default for field in fields(self) if field.name in SAMPLING}
        return replace(self.resolved(), **usual) == replace(other.resolved(), **usual)

    def check(self) -> None:
        """Raises UserError, one sentence with value and fix, on the first setting that cannot work."""
        if self.prior not in PRIORS:
            raise UserError(f"unknown prior {self.prior!r}; choose from {', '.join(PRIORS)}")
        if self.precision not in ("auto", "bf16", "fp32"):
            raise UserError(f"unknown precision {self.precision!r}; choose from auto, bf16, fp32")
        for name, value in asdict(self).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"{name} is {value}; it must be a finite number")
        for name, least in {"parameters": 1, "steps": 1, "batch_size": 1, "samples": 4}.items():
            if getattr(self, name) < least:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        if self.depth is not None and self.depth < 1 and self.prior in LEARNED:
            raise UserError(f"depth is {self.depth}; it must be at least 1")
        for name in ("warmup", "weight_decay", "grad_clip", "top_k", "seed"):
            if not getattr(self, name) >= 0:
                raise UserError(f"{name} is {getattr(self, name)}; it must be 0 or more")
        for name in ("lr", "temperature"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name} is {getattr(self, name):g}; it must be above 0")
        for name in ("dropout", "weight_ema"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name):g}; it must be at least 0 and below 1")
        if self.seed >= 2**31:
            raise UserError(f"seed is {self.seed}; it must be below 2**31")
        device = self.resolved().device
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"device {device!r} is not available here; use --device cpu") from error
