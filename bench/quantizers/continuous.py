"""Latents that have no codes: the bound that a codebook cannot beat, and one whose rate no codebook fixes."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.core import group

from .codebook import Quantized, Quantizer

LOG_VARIANCE = (-30.0, 20.0)  # beyond it an exponential is 0 or overflows (AutoencoderKL's own limits)


class ContinuousQuantizer(Quantizer):
    """What stands in ``Quantized.codes``, and what ``lookup`` takes and gives back, are the latents (B, d, h, w)."""

    discrete = False

    def lookup(self, codes: Tensor) -> Tensor:
        """The latents (B, d, h, w) themselves, float32."""
        return codes.float()

    def initialise(self, z: Tensor) -> None:
        """There is no codebook to start."""


class NoQuantizer(ContinuousQuantizer):
    """The identity, without a loss: what encoder and decoder reach alone at the same budget. It has no rate."""

    def forward(self, z: Tensor) -> Quantized:
        """Passes ``z`` (B, d, h, w), any float dtype, in float32."""
        z, nothing = z.float(), torch.zeros((), device=z.device)
        return Quantized(z, z.detach(), nothing, nothing)


class KLQuantizer(ContinuousQuantizer):
    """A Gaussian for each component, drawn in training, its mean when scored; trained towards the unit Gaussian.

    Kingma & Welling 2014, "Auto-Encoding Variational Bayes", eq. 10 and appendix B; Rombach et al. 2022,
    "High-Resolution Image Synthesis with Latent Diffusion Models", section 3.1 (AutoencoderKL). Mean and log-variance
    are a 1×1 linear map of z. Loss: ``kl_weight`` · KL(q(component | z) ‖ N(0, 1)) in nats, on average over components.
    Rate: the sum over all components of an image, in bits, what sending a draw would take (bits-back coding).
    """

    settings = ("kl_weight",)

    def __init__(self, codebook_size: int, code_dim: int, *, kl_weight: float = 1e-2, **shared: Any):
        super().__init__(codebook_size, code_dim, **shared)
        self.kl_weight = kl_weight
        self.posterior = nn.Linear(code_dim, 2 * code_dim)

    def forward(self, z: Tensor) -> Quantized:
        """Draws from the posterior of ``z`` (B, d, h, w), any float dtype; in eval mode takes its mean."""
        with torch.autocast(z.device.type, enabled=False):
            mean, log_variance = self.posterior(z.float().movedim(1, -1)).movedim(-1, 1).chunk(2, dim=1)
            log_variance = log_variance.clamp(*LOG_VARIANCE)
            divergence = (mean.square() + log_variance.exp() - 1 - log_variance) / 2
            z_q = mean + (log_variance / 2).exp() * self._noise(mean) if self.training else mean
            rate = divergence.detach().sum((1, 2, 3)) / math.log(2)
            distortion = F.mse_loss(z_q.detach(), mean.detach())
            return Quantized(z_q, z_q.detach(), self.kl_weight * divergence.mean(), distortion, rate)

    def _noise(self, mean: Tensor) -> Tensor:
        """Gaussian, as large as ``mean`` (B, d, h, w), in its layout, on which the order of the draws depends."""
        shape = mean.movedim(1, -1).shape[1:]
        return group.whole(lambda rows: mean.new_empty(rows, *shape).movedim(-1, 1).normal_(), len(mean))
