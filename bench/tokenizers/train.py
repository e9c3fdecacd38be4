"""Train one tokenizer: its step, to read from top to bottom; ``bench.training`` has the loop around it."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from bench.core import group
from bench.data import batch
from bench.metrics import CodeHistogram, perceptual
from bench.training.loop import Tell, adamw, autocast, descend, fit, unheard
from bench.training.parts import in_parts

from .alignment import features
from .config import Config
from .discriminator import Adversary
from .losses import RECONSTRUCTION, adaptive_weight, marginal_cosine, marginal_distances
from .tokenizer import Tokenizer, started, to_device


def train(
    config: Config,
    images: np.ndarray,
    folder: Path,
    resume: bool = True,
    checkpoint_seconds: float = 2.0,
    accumulate: int = 1,
    tell: Tell = unheard,
) -> tuple[Tokenizer, float]:
    """Trains on ``images`` (N, H, W, 3) uint8 as ``config`` (resolved) says and returns the tokenizer to score, with
    averaged weights and in eval mode, and the seconds that its steps took; files and errors are those of ``fit``, which
    ``tell`` is for. Networks see a batch in ``accumulate`` parts."""
    label = f"{config.backbone} {config.quantizer} seed {config.seed}"
    return fit(TokenizerLearner(config, images, accumulate), label, folder, resume, checkpoint_seconds, tell)


class TokenizerLearner:
    """A tokenizer with its losses, the discriminator that it may be trained against, and the linear map of its latent
    that may be aligned with features of a frozen model. Each network sees a batch in ``accumulate`` parts, which takes
    less memory and one more pass forward; losses and the quantizer see all of it at once."""

    unit = "images"

    def __init__(self, config: Config, images: np.ndarray, accumulate: int = 1):
        torch.manual_seed(config.seed)
        self.config, self.images, self.accumulate = config, images, accumulate
        self.model = to_device(started(Tokenizer(config)), config.device).train()
        self.features, self.trained, parts = None, self.model, {}
        if config.alignment_weight:
            with torch.random.fork_rng():  # the tokenizer's own draws are the same with and without it
                frozen = features(config.alignment_model, config.alignment_file, config.image_size, config.grid_size)
                linear = nn.Conv2d(config.code_dim, frozen.channels, 1, bias=False)
            self.features, self.linear = (to_device(module, config.device) for module in (frozen, linear))
            self.trained, parts = nn.ModuleList([self.model, self.linear]), {"alignment": self.linear}
        self.optimizer = adamw(self.trained, config.weight_decay)
        self.parts = {"tokenizer": self.model, "optimizer": self.optimizer} | parts
        self.autocast, self.lpips = autocast(config), None
        if config.lpips_weight:
            trunk = [torch.bfloat16] if config.precision == "bf16" else []  # else the one that scores
            self.lpips = perceptual(config.lpips_net, torch.device(config.device), *trunk)
        self.adversary = None
        if config.gan_weight:
            with torch.random.fork_rng():  # until gan_start a run is the same, bit for bit, with and without it
                self.adversary = to_device(Adversary(config, accumulate), config.device)
            parameters = self.adversary.parameters()
            self.discriminator_optimizer = torch.optim.AdamW(parameters, betas=(0.5, 0.9), weight_decay=0.0, fused=True)
            self.parts |= {"adversary": self.adversary, "discriminator_optimizer": self.discriminator_optimizer}
        self.hits: Tensor | int = 0  # of the codes, since the last row of the history

    def begin(self) -> None:
        """Starts the codebook, unless it came with the weights."""
        if not self.config.init_from:
            initialise_codebook(self.model, self.images, self.autocast)

    def step(self, step: int, rate: float) -> dict[str, Tensor]:
        """One update of the tokenizer and, on the same batch, one of the discriminator."""
        config, adversary = self.config, self.adversary
        self.model.quantizer.anneal(step / config.steps)
        own = group.share(config.batch_size)
        x = batch(self.images, config.seed, step, config.batch_size, config.augment, config.device, own)
        with self.autocast:
            x_hat, quantized = self.model(x, self.accumulate)
        x_hat = x_hat.float()
        losses = {"reconstruction": RECONSTRUCTION[config.reconstruction](x_hat, x), "quantizer": quantized.loss}
        loss = reconstruction_weight(config, step) * losses["reconstruction"] + losses["quantizer"]
        if self.lpips is not None:
            with self.autocast:
                losses["lpips"] = in_parts(self.lpips, self.accumulate, x_hat, x).mean()
            loss = loss + config.lpips_weight * losses["lpips"]
        if adversary is not None and step >= adversary.start:
            with self.autocast:
                losses["gan"] = adversary.generator_loss(x_hat)
            losses["gan_scale"] = x_hat.new_ones(())
            if config.gan_adaptive:
                fidelity = loss - losses["quantizer"]  # what the decoder alone answers for
                losses["gan_scale"] = adaptive_weight(fidelity, losses["gan"], self.model.decoder.last_layer)
            loss = loss + config.gan_weight * adversary.weight(step) * losses["gan_scale"] * losses["gan"]
        if self.features is not None:
            with self.autocast:
                f = self.features(x)
            z_q = quantized.z_q  # what the decoder and a prior get, as is what VA-VAE aligns: its latent, sampled
            losses["alignment"] = marginal_cosine(self.linear(z_q), f.float()) + marginal_distances(z_q, f.float())
            loss = loss + config.alignment_weight * losses["alignment"]
        losses["grad_norm"] = descend(self.optimizer, self.trained, loss, rate, config.grad_clip)

        if adversary is not None and step >= adversary.first:
            with self.autocast:
                terms = adversary.discriminator_losses(x, x_hat)
            its_rate, total = adversary.learning_rate(step, rate), adversary.total(terms)
            descend(self.discriminator_optimizer, adversary, total, its_rate, config.grad_clip)
            losses |= terms
        if quantized.rate is not None:
            losses["bits_per_image"] = quantized.rate.mean()
        if config.discrete:
            self.hits = self.hits + torch.bincount(quantized.codes.flatten(), minlength=config.codebook_size)
        return {**losses, "distortion": quantized.distortion}

    def row(self, means: dict[str, float]) -> dict[str, float]:
        """The means, and perplexity and codes in use over all codes together, where there are codes."""
        if not self.config.discrete:
            return means
        histogram = CodeHistogram(self.config.codebook_size)
        histogram.counts += group.total(self.hits).cpu()
        self.hits = 0
        used = self.config.codebook_size - histogram.dead_codes()
        return {**means, "perplexity": histogram.perplexity(), "codes_used": used}

    def figures(self, row: dict[str, float]) -> str:
        """Loss, LPIPS, and perplexity and codes in use, or the rate of a continuous latent."""
        words = [f"loss {row['reconstruction']:.4f}"]
        if "lpips" in row:
            words.append(f"lpips {row['lpips']:.3f}")
        if "perplexity" in row:
            words.append(f"perplexity {row['perplexity']:.0f}  codes {row['codes_used']}/{self.config.codebook_size}")
        if "bits_per_image" in row:
            words.append(f"bits per image {row['bits_per_image']:.0f}")
        return "  ".join(words)


def reconstruction_weight(config: Config, step: int) -> float:
    """Weight of the pixel loss in training step ``step``, from 0: linear between its first and its last."""
    first = config.reconstruction_weight
    last = first if config.reconstruction_end is None else config.reconstruction_end
    return first + (last - first) * step / max(1, config.steps - 1)


@torch.no_grad()
def initialise_codebook(tokenizer: Tokenizer, images: np.ndarray, autocast: torch.autocast) -> None:
    """Starts the codebook at random encoder outputs, of enough images to offer eight tokens per code."""
    config = tokenizer.config
    count = min(len(images), max(config.batch_size, -(-8 * config.codebook_size // config.tokens)))
    with autocast:
        grids = [
            tokenizer.encoder(batch(images, config.seed, step, config.batch_size, "none", config.device))
            for step in range(-(-count // config.batch_size))
        ]
    tokenizer.quantizer.initialise(torch.cat(grids))
