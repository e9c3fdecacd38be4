"""Train one prior on the codes of a tokenizer: a loop to read from top to bottom, with the other loop's habits.

A step is a pure function of (state, seed, step), as in ``train``: a resumed run ends bit-equal to an unbroken one.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from bench.core.errors import Diverged, Interrupted, UserError
from bench.core.progress import Bar
from bench.data import batch_indices
from bench.tokenizers.sizes import TOLERANCE, nearest_width, parameter_count
from bench.tokenizers.train import (
    averaged,
    interruptible,
    learning_rate,
    parameter_groups,
    restore,
    rewind,
    save,
    step_seed,
)

from .codes import Codes
from .config import DEPTH, PriorConfig
from .models import LEARNED, PRIORS, Prior


def build(config: PriorConfig, codebook_size: int, grid_size: int, classes: int) -> Prior:
    """The untrained prior of ``config`` for such codes, at the width, and if need be a neighbouring depth, at which it
    has ``config.parameters`` within 2 %. Raises UserError where no width does."""
    if config.prior not in LEARNED:
        return PRIORS[config.prior](codebook_size, grid_size, classes)

    def make(width: int, depth: int) -> Prior:
        return LEARNED[config.prior](codebook_size, grid_size, width, depth, config.dropout, classes)

    def count(width: int, depth: int) -> int:
        with torch.device("meta"):
            return parameter_count(make(width, depth))

    nearest, usual = {}, config.depth or DEPTH.get(config.prior) or max(5, grid_size // 2)
    for depth in (usual, usual + 1, usual + 2, usual - 1):
        if depth < 1:
            continue
        width = nearest_width(lambda width, depth=depth: count(width, depth), config.parameters)
        if abs(count(width, depth) / config.parameters - 1) <= TOLERANCE:
            return make(width, depth)
        nearest[abs(count(width, depth) - config.parameters)] = count(width, depth)
    raise UserError(
        f"{config.prior} for {codebook_size} codes cannot have {config.parameters:,} parameters within "
        f"{TOLERANCE:.0%}; the nearest is {nearest[min(nearest)]:,}"
    )


def train_prior(
    config: PriorConfig, codes: Codes, folder: Path, resume: bool = True, checkpoint_seconds: float = 2.0
) -> tuple[Prior, float]:
    """Trains on ``codes.train`` as ``config`` (resolved) says and returns the prior to score, with averaged weights and
    in eval mode, and the seconds that its steps took, resumed parts included.

    Writes ``history.jsonl`` and ``checkpoint.pt`` into ``folder`` as ``train`` does. Raises Diverged, or Interrupted
    after SIGINT or SIGTERM.
    """
    torch.manual_seed(config.seed)
    classes = len(codes.classes) if config.conditional else 0
    prior = build(config, codes.codebook_size, codes.grid_size, classes).to(config.device).train()
    if config.prior not in LEARNED:
        began = time.monotonic()
        prior.fit(torch.from_numpy(codes.train.astype(np.int64)).to(config.device))
        return prior.eval(), time.monotonic() - began

    optimizer = torch.optim.AdamW(parameter_groups(prior, config.weight_decay), betas=(0.9, 0.95), fused=True)
    average = averaged(prior, config.weight_ema)
    autocast = torch.autocast(torch.device(config.device).type, torch.bfloat16, enabled=config.precision == "bf16")
    state = {"prior": prior, "optimizer": optimizer, "average": average}
    checkpoint, history = folder / "checkpoint.pt", folder / "history.jsonl"
    if resume and checkpoint.exists():
        first, seconds = restore(checkpoint, state, config.device)
        rewind(history, first)
    else:
        first, seconds = 0, 0.0
        history.unlink(missing_ok=True)

    log_every = min(50, max(1, config.steps // 200))
    total: Tensor | float = 0.0
    counted = 0
    saved = began = time.monotonic()
    with (
        Bar(f"{config.prior} seed {config.seed}", config.steps, first) as bar,
        history.open("a") as log,
        interruptible() as interrupted,
    ):
        for step in range(first, config.steps):
            torch.manual_seed(step_seed(config.seed, step))
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, step)

            with autocast:
                loss = prior.nll(*batch(codes, config, step)).mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            grad_norm = nn.utils.clip_grad_norm_(prior.parameters(), config.grad_clip or math.inf)
            optimizer.step()
            average.update_parameters(prior)

            total, counted, done = total + loss.detach(), counted + 1, step + 1
            if done % log_every and done < config.steps:
                continue  # nothing above waits for the device; everything below does

            now = time.monotonic()
            spent = seconds + now - began
            row = {"step": done, "lr": learning_rate(config, step), "grad_norm": float(grad_norm)}
            row |= {"bits_per_token": float(total) / counted / math.log(2), "seconds": round(spent, 3)}
            total, counted = 0.0, 0
            if not all(math.isfinite(value) for value in row.values()):
                raise Diverged(f"loss or gradient not finite by step {done}; try --lr below {config.lr:g}")
            log.write(json.dumps(row) + "\n")
            log.flush()
            rate = (done - first) * config.batch_size / (now - began)
            bar.advance(done - bar.done, f"{row['bits_per_token']:.3f} bits per token  {rate:.0f} grids/s")
            if interrupted.is_set() or now - saved > checkpoint_seconds:
                save(checkpoint, state, done, spent)
                saved = time.monotonic()
                checkpoint_seconds = max(checkpoint_seconds, 50 * (saved - now))
            if interrupted.is_set():
                raise Interrupted(f"stopped at step {done} of {config.steps}; the same command continues from there")

    return average.module.eval().requires_grad_(False), spent if first < config.steps else seconds


def batch(codes: Codes, config: PriorConfig, step: int) -> tuple[Tensor, Tensor | None]:
    """Training batch number ``step``: grids (B, h, w) int64 and their labels (B,) int64, or None without classes."""
    rows = batch_indices(config.seed, step, config.batch_size, len(codes.train))
    grids = torch.from_numpy(codes.train[rows].astype(np.int64)).to(config.device)
    return grids, torch.from_numpy(codes.train_labels[rows]).to(config.device) if config.conditional else None
