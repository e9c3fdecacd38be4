"""PatchGAN, and the adversary that trains it beside a tokenizer."""

import itertools

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.parametrizations import spectral_norm

from bench.core import group
from bench.training.parts import in_parts

from .config import Config
from .losses import ADVERSARIAL, gradient_penalty, lecam

LECAM_DECAY = 0.99


class PatchGAN(nn.Module):
    """Real or reconstructed, patch by patch (Isola et al. 2017, 3.2): (B, 3, H, W) in [-1, 1] → logits (B, 1, h, w).

    width: channels of the first of ``layers`` 4×4 convolutions of stride 2; each further one doubles them, up to eight
    times. norm: "group" (GroupNorm after every convolution but the first and the last) or "spectral" (on every weight);
    not BatchNorm, which would couple real and reconstructed images.
    """

    def __init__(self, width: int = 64, layers: int = 3, norm: str = "group"):
        super().__init__()
        channels = [min(width * 2**level, width * 8) for level in range(layers + 1)]
        wrap = spectral_norm if norm == "spectral" else nn.Identity()
        stack = [wrap(nn.Conv2d(3, width, 4, stride=2, padding=1)), nn.LeakyReLU(0.2)]
        for level, (inputs, outputs) in enumerate(itertools.pairwise(channels), 1):
            stride = 2 if level < layers else 1
            stack.append(wrap(nn.Conv2d(inputs, outputs, 4, stride=stride, padding=1, bias=norm == "spectral")))
            if norm == "group":
                stack.append(nn.GroupNorm(min(32, outputs), outputs))
            stack.append(nn.LeakyReLU(0.2))
        self.layers = nn.Sequential(*stack, wrap(nn.Conv2d(channels[-1], 1, 4, padding=1)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Adversary(nn.Module):
    """A discriminator with what its training needs: schedule, running averages for LeCAM, both losses. It trains from
    ``gan_start − gan_warmup`` on; from ``gan_start`` the tokenizer sees it, with a weight that grows over ``gan_ramp``.
    The discriminator sees a batch in so many ``parts``, but with spectral norm, which moves with every pass, at once.
    """

    def __init__(self, config: Config, parts: int = 1):
        super().__init__()
        self.config, self.parts = config, 1 if config.gan_norm == "spectral" else parts
        self.discriminator = PatchGAN(config.gan_width, config.gan_layers, config.gan_norm)
        self.losses = ADVERSARIAL[config.gan_loss]
        self.register_buffer("average_real", torch.zeros(()))
        self.register_buffer("average_fake", torch.zeros(()))
        self.start = round(config.gan_start * config.steps)
        self.first = max(0, self.start - round(config.gan_warmup * config.steps))

    def weight(self, step: int) -> float:
        """Share of gan_weight that is in force at ``step``, in [0, 1]."""
        ramp = max(1, round(self.config.gan_ramp * self.config.steps))
        return min(1.0, max(0, step + 1 - self.start) / ramp)

    def learning_rate(self, step: int, generator_lr: float) -> float:
        """gan_lr times the tokenizer's, with a warm-up of its own from the discriminator's first step."""
        warm = min(1.0, (step + 1 - self.first) / max(1, self.config.warmup))
        return self.config.gan_lr * generator_lr * warm

    def generator_loss(self, x_hat: Tensor) -> Tensor:
        """What the tokenizer minimises on its reconstructions (B, 3, H, W); no gradient reaches the discriminator."""
        fixed = {name: parameter.detach() for name, parameter in self.discriminator.named_parameters()}
        logits = in_parts(lambda x: functional_call(self.discriminator, fixed, (x,)), self.parts, x_hat)
        return self.losses.generator(logits.float())

    def discriminator_losses(self, x: Tensor, x_hat: Tensor) -> dict[str, Tensor]:
        """The discriminator's terms, unweighted, on images ``x`` and reconstructions ``x_hat`` of the same batch; no
        gradient reaches the tokenizer. Moves LeCAM's averages."""
        penalised = self.config.r1_weight > 0
        real = x.detach().requires_grad_(penalised)
        logits_real = in_parts(self.discriminator, self.parts, real).float()
        logits_fake = in_parts(self.discriminator, self.parts, x_hat.detach()).float()
        terms = {"discriminator": self.losses.discriminator(logits_real, logits_fake)}
        if self.config.lecam_weight:
            terms["lecam"] = lecam(logits_real, logits_fake, self.average_real, self.average_fake)
            self.average_real.lerp_(group.mean(logits_real.mean()), 1 - LECAM_DECAY)
            self.average_fake.lerp_(group.mean(logits_fake.mean()), 1 - LECAM_DECAY)
        if penalised:
            terms["r1"] = gradient_penalty(real, logits_real)
        terms["logits_real"], terms["logits_fake"] = logits_real.detach().mean(), logits_fake.detach().mean()
        return terms

    def total(self, terms: dict[str, Tensor]) -> Tensor:
        """The discriminator's loss from its terms."""
        loss = terms["discriminator"]
        if "lecam" in terms:
            loss = loss + self.config.lecam_weight * terms["lecam"]
        return loss + self.config.r1_weight * terms["r1"] if "r1" in terms else loss
