"""Train one prior on the codes of a tokenizer: its size and its step; ``bench.training`` has the loop around it."""

import math
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bench.core.device import check_memory
from bench.core.errors import UserError
from bench.data import batch_indices
from bench.tokenizers.config import check_order
from bench.tokenizers.sizes import TOLERANCE, nearest_size, parameter_count
from bench.training.loop import Tell, adamw, autocast, descend, fit, unheard

from .codes import Codes
from .config import DEPTH, PriorConfig
from .models import LEARNED, PRIORS, SEQUENCES, Prior


def train_prior(
    config: PriorConfig,
    codes: Codes,
    folder: Path,
    resume: bool = True,
    checkpoint_seconds: float = 2.0,
    tell: Tell = unheard,
) -> tuple[Prior, float]:
    """Trains on ``codes.train`` as ``config`` (resolved) says and returns the prior to score, with averaged weights and
    in eval mode, and the seconds that its steps took; files and errors are those of ``fit``, which ``tell`` is for."""
    learner = PriorLearner(config, codes)
    if config.prior not in LEARNED:
        began = time.monotonic()
        learner.model.fit(codes.train)
        return learner.model.eval(), max(0.0, time.monotonic() - began)
    return fit(learner, f"{config.prior} seed {config.seed}", folder, resume, checkpoint_seconds, tell)


class PriorLearner:
    """A prior and the codes that it learns to expect."""

    unit = "grids"

    def __init__(self, config: PriorConfig, codes: Codes):
        torch.manual_seed(config.seed)
        self.config, self.codes = config, codes
        classes = len(codes.classes) if config.conditional else 0
        self.model = build(config, codes.codebook_size, codes.grid, classes).to(config.device).train()
        self.optimizer = adamw(self.model, config.weight_decay)
        self.parts = {"prior": self.model, "optimizer": self.optimizer}
        self.autocast = autocast(config)

    def begin(self) -> None:
        """Nothing but the weights has to be there."""

    def step(self, step: int, rate: float) -> dict[str, Tensor]:
        """One update down the mean negative log-likelihood of a code, in nats."""
        with self.autocast:
            loss = self.model.nll(*batch(self.codes, self.config, step)).mean()
        return {"grad_norm": descend(self.optimizer, self.model, loss, rate, self.config.grad_clip), "nll": loss}

    def row(self, means: dict[str, float]) -> dict[str, float]:
        """The likelihood in bits."""
        return {"grad_norm": means["grad_norm"], "bits_per_token": means["nll"] / math.log(2)}

    def figures(self, row: dict[str, float]) -> str:
        """Bits per token."""
        return f"{row['bits_per_token']:.3f} bits per token"


def batch(codes: Codes, config: PriorConfig, step: int) -> tuple[Tensor, Tensor | None]:
    """Training batch number ``step``: grids (B, h, w) int64 and their labels (B,) int64, or None without classes."""
    rows = batch_indices(config.seed, step, config.batch_size, len(codes.train))
    grids = torch.from_numpy(codes.train[rows].astype(np.int64)).to(config.device)
    if not config.conditional:
        return grids, None
    labels = torch.from_numpy(codes.train_labels[rows]).to(config.device)
    if config.label_dropout:
        missing = torch.rand(len(labels), device=labels.device) < config.label_dropout
        labels = labels.masked_fill(missing, len(codes.classes))
    return grids, labels


def build(config: PriorConfig, codebook_size: int, grid: tuple[int, int], classes: int) -> Prior:
    """The untrained prior of ``config`` for such codes, at the width, and if need be a neighbouring depth, at which it
    has ``config.parameters`` within 2 %. Raises UserError where no width does."""
    if config.prior not in LEARNED:
        return PRIORS[config.prior](codebook_size, grid, classes)

    own = {"token_order": config.token_order} if config.prior in SEQUENCES else {}
    own["unlabelled"] = config.label_dropout > 0
    check_order(config.token_order, *grid)

    def make(width: int, depth: int) -> Prior:
        return LEARNED[config.prior](codebook_size, grid, width, depth, config.dropout, classes, **own)

    def count(width: int, depth: int) -> int:
        with torch.device("meta"):  # one layer is as large as any other, and a thousand take seconds to make
            one, two = (parameter_count(make(width, layers)) for layers in (1, 2))
        return one + (depth - 1) * (two - one)

    usual = config.depth or DEPTH.get(config.prior) or max(5, grid[0] // 2)
    size = nearest_size(count, config.parameters, (usual, usual + 1, usual + 2, usual - 1))
    if abs(count(*size) / config.parameters - 1) > TOLERANCE:
        raise UserError(
            f"{config.prior} for {codebook_size} codes cannot have {config.parameters:,} parameters within "
            f"{TOLERANCE:.0%}; the nearest is {count(*size):,}"
        )
    check_memory(count(*size), config.device)
    return make(*size)
