"""Train one tokenizer: a loop to read from top to bottom.

A step is a pure function of (state, seed, step): batch and augmentation follow from (seed, step), and the global random
generator is seeded anew in every step. So a checkpoint needs no generator state, and a resumed run ends bit-equal to
one that was never stopped.
"""

from __future__ import annotations

import json
import math
import pickle
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from bench.core.errors import Diverged, Interrupted, UserError
from bench.core.files import atomic_path
from bench.core.progress import Bar
from bench.data import batch
from bench.metrics import CodeHistogram, perceptual
from bench.quantizers import Quantized

from .config import Config
from .discriminator import Adversary
from .losses import RECONSTRUCTION, adaptive_weight
from .tokenizer import Tokenizer, to_device


def train(
    config: Config, images: np.ndarray, folder: Path, resume: bool = True, checkpoint_seconds: float = 2.0
) -> tuple[Tokenizer, float]:
    """Trains on ``images`` (N, H, W, 3) uint8 as ``config`` (resolved) says and returns the tokenizer to score, with
    averaged weights and in eval mode, and the seconds that its steps took, resumed parts included.

    Writes ``history.jsonl`` (one line per logged step) and ``checkpoint.pt`` into ``folder``. With ``resume`` a
    checkpoint found there is continued. One is written every ``checkpoint_seconds``, or less often if writing takes
    more than 2 % of the time. Raises Diverged, or Interrupted after SIGINT or SIGTERM.
    """
    torch.manual_seed(config.seed)
    tokenizer = to_device(Tokenizer(config), config.device).train()
    optimizer = torch.optim.AdamW(parameter_groups(tokenizer, config.weight_decay), betas=(0.9, 0.95), fused=True)
    average = averaged(tokenizer, config.weight_ema)
    lpips = perceptual(config.lpips_net, torch.device(config.device)) if config.lpips_weight else None
    autocast = torch.autocast(torch.device(config.device).type, torch.bfloat16, enabled=config.precision == "bf16")

    state = {"tokenizer": tokenizer, "optimizer": optimizer, "average": average}
    adversary = None
    if config.gan_weight:
        with torch.random.fork_rng():  # until gan_start a run is the same, bit for bit, with and without it
            adversary = to_device(Adversary(config), config.device)
        rival = torch.optim.AdamW(adversary.parameters(), betas=(0.5, 0.9), weight_decay=0.0, fused=True)
        state |= {"adversary": adversary, "rival": rival}
    checkpoint, history = folder / "checkpoint.pt", folder / "history.jsonl"
    if resume and checkpoint.exists():
        first, seconds = restore(checkpoint, state, config.device)
        rewind(history, first)
    else:
        first, seconds = 0, 0.0
        history.unlink(missing_ok=True)
        initialise_codebook(tokenizer, images, autocast)

    window = Window(config.codebook_size)
    log_every = min(50, max(1, config.steps // 200))
    saved = began = time.monotonic()
    with (
        Bar(f"{config.backbone} {config.quantizer} seed {config.seed}", config.steps, first) as bar,
        history.open("a") as log,
        interruptible() as interrupted,
    ):
        for step in range(first, config.steps):
            torch.manual_seed(step_seed(config.seed, step))
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, step)

            x = batch(images, config.seed, step, config.batch_size, config.augment, config.device)
            with autocast:
                x_hat, quantized = tokenizer(x)
            x_hat = x_hat.float()
            losses = {"reconstruction": RECONSTRUCTION[config.reconstruction](x_hat, x), "quantizer": quantized.loss}
            loss = losses["reconstruction"] + losses["quantizer"]
            if lpips is not None:
                with autocast:
                    losses["lpips"] = lpips(x_hat, x).mean()
                loss = loss + config.lpips_weight * losses["lpips"]
            if adversary is not None and step >= adversary.start:
                with autocast:
                    losses["gan"] = adversary.generator_loss(x_hat)
                losses["gan_scale"] = x_hat.new_ones(())
                if config.gan_adaptive:
                    fidelity = loss - losses["quantizer"]  # what the decoder alone answers for
                    losses["gan_scale"] = adaptive_weight(fidelity, losses["gan"], tokenizer.decoder.last_layer)
                loss = loss + config.gan_weight * adversary.weight(step) * losses["gan_scale"] * losses["gan"]

            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            losses["grad_norm"] = nn.utils.clip_grad_norm_(tokenizer.parameters(), config.grad_clip or math.inf)
            optimizer.step()
            average.update_parameters(tokenizer)

            if adversary is not None and step >= adversary.first:  # on the same batch
                for group in rival.param_groups:
                    group["lr"] = adversary.learning_rate(step, learning_rate(config, step))
                with autocast:
                    terms = adversary.discriminator_losses(x, x_hat)
                rival.zero_grad(set_to_none=True)
                adversary.total(terms).backward()
                nn.utils.clip_grad_norm_(adversary.parameters(), config.grad_clip or math.inf)
                rival.step()
                losses |= terms

            window.add(quantized, losses)
            done = step + 1
            if done % log_every and done < config.steps:
                continue  # nothing above waits for the device; everything below does

            now = time.monotonic()
            spent = seconds + now - began
            row = {"step": done, "lr": learning_rate(config, step), **window.means(), "seconds": round(spent, 3)}
            if not all(math.isfinite(value) for value in row.values()):
                raise Diverged(f"loss or gradient not finite by step {done}; try --lr below {config.lr:g}")
            log.write(json.dumps(row) + "\n")
            log.flush()
            rate = (done - first) * config.batch_size / (now - began)
            bar.advance(done - bar.done, describe(row, config.codebook_size, rate))
            window = Window(config.codebook_size)
            if interrupted.is_set() or now - saved > checkpoint_seconds:
                save(checkpoint, state, done, spent)
                saved = time.monotonic()
                checkpoint_seconds = max(checkpoint_seconds, 50 * (saved - now))
            if interrupted.is_set():
                raise Interrupted(f"stopped at step {done} of {config.steps}; the same command continues from there")

    return average.module.eval().requires_grad_(False), spent if first < config.steps else seconds


class Window:
    """Means of the logged scalars and the histogram of codes since the last log line, summed where the tensors are."""

    def __init__(self, codebook_size: int):
        self.codebook_size = codebook_size
        self.hits: Tensor | int = 0
        self.sums: dict[str, Tensor] = {}
        self.steps: Counter[str] = Counter()

    def add(self, quantized: Quantized, scalars: dict[str, Tensor]) -> None:
        """Adds one step."""
        self.hits = self.hits + torch.bincount(quantized.codes.flatten(), minlength=self.codebook_size)
        for name, value in {**scalars, "distortion": quantized.distortion}.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach()
            self.steps[name] += 1

    def means(self) -> dict[str, float]:
        """Unweighted means over the steps that had the term; perplexity and codes in use over all codes together."""
        means = {name: float(total) / self.steps[name] for name, total in self.sums.items()}
        histogram = CodeHistogram(self.codebook_size)
        histogram.counts += self.hits.cpu()
        return {
            **means,
            "perplexity": histogram.perplexity(),
            "codes_used": self.codebook_size - histogram.dead_codes(),
        }


def describe(row: dict[str, float], codebook_size: int, rate: float) -> str:
    """The progress bar's figures for one line of the history."""
    perceptual = f"  lpips {row['lpips']:.3f}" if "lpips" in row else ""
    codes = f"perplexity {row['perplexity']:.0f}  codes {row['codes_used']}/{codebook_size}"
    return f"loss {row['reconstruction']:.4f}{perceptual}  {codes}  {rate:.0f} images/s"


def learning_rate(config: Config, step: int) -> float:
    """Linear warm-up over ``config.warmup`` steps, then a cosine that reaches zero after the last step."""
    warm = min(1.0, (step + 1) / max(1, config.warmup))
    return config.lr * warm * 0.5 * (1 + math.cos(math.pi * step / config.steps))


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """AdamW groups: decay on weight matrices and kernels only; none on vectors (norms, biases), on the codebook, on
    position embeddings, or on what a layer marks ``_no_weight_decay`` (Mamba's A_log, D, dt_bias)."""
    decayed, free = [], []
    for name, parameter in model.named_parameters():
        exempt = parameter.ndim < 2 or getattr(parameter, "_no_weight_decay", False)
        exempt = exempt or name.endswith(("codebook", "position"))
        (free if exempt else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]


def averaged(model: nn.Module, decay: float) -> AveragedModel:
    """A moving average of the weights: θ̄ ← γθ̄ + (1−γ)θ with γ = min(decay, (1+n)/(10+n)), so that the random first
    weights are soon forgotten."""

    @torch.no_grad()
    def update(means: list[Tensor], current: list[Tensor], _: Tensor) -> None:
        n = float(average.n_averaged)  # on the CPU; the one that is passed has been sent to the device
        torch._foreach_lerp_(means, current, 1 - min(decay, (1 + n) / (10 + n)))

    average = AveragedModel(model, multi_avg_fn=update)
    return average


def step_seed(seed: int, step: int) -> int:
    """Seed of the global generator in one step; distinct for every (seed, step) that fits 31 and 32 bits.

    The CPU's generator takes the low 32 bits alone, so the seed is in those too, multiplied by 2³² over the golden
    ratio: steps of one seed do not meet those of another.
    """
    return (seed << 32) | (step ^ (seed * 0x9E3779B1 & 0xFFFFFFFF))


@torch.no_grad()
def initialise_codebook(tokenizer: Tokenizer, images: np.ndarray, autocast: torch.autocast) -> None:
    """Starts the codebook at random encoder outputs, of enough images to offer eight tokens per code."""
    config = tokenizer.config
    count = min(len(images), max(config.batch_size, -(-8 * config.codebook_size // config.tokens)))
    steps = range(-(-count // config.batch_size))
    with autocast:
        grids = [
            tokenizer.encoder(batch(images, config.seed, step, config.batch_size, "none", config.device))
            for step in steps
        ]
    tokenizer.quantizer.initialise(torch.cat(grids))


def save(path: Path, state: dict, step: int, seconds: float) -> None:
    """Writes a checkpoint atomically: the state of every module and optimiser in ``state``, at ``step``."""
    with atomic_path(path) as temporary:
        torch.save({**{name: part.state_dict() for name, part in state.items()}, "at": (step, seconds)}, temporary)


def restore(path: Path, state: dict, device: str) -> tuple[int, float]:
    """Loads what save wrote and returns (step, seconds). Tensors only: nothing in the file is executed.

    Raises UserError on a file that is no checkpoint of this model.
    """
    try:
        stored = torch.load(path, map_location=device, weights_only=True)
        for name, part in state.items():
            part.load_state_dict(stored[name])
        return stored["at"]
    except (RuntimeError, KeyError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"{path} is no checkpoint of this run; delete it or pass --no-resume to start again") from error


def rewind(history: Path, step: int) -> None:
    """Drops what the history logged after ``step``, which will be trained again."""
    lines = history.read_text().splitlines() if history.exists() else []
    rows = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
    with atomic_path(history) as temporary:
        temporary.write_text("".join(f"{row}\n" for row in rows))


@contextmanager
def interruptible() -> Iterator[threading.Event]:
    """Turns SIGINT and SIGTERM into an event that the loop looks at; a second SIGINT stops at once."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event  # signals reach the main thread only
        return

    def stop(number: int, frame: object) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
