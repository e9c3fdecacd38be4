"""Loss functions, each pure: tensors in, scalar out."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.core import group

RECONSTRUCTION = {"l1": F.l1_loss, "l2": F.mse_loss}
ADAPTIVE_CAP = 1e4


class Adversarial(NamedTuple):
    """Losses of the two sides, from logits of any shape, high for real: ``discriminator(real, fake)`` and
    ``generator(fake)``, which falls as ``fake`` rises."""

    discriminator: Callable[[Tensor, Tensor], Tensor]
    generator: Callable[[Tensor], Tensor]


def _hinge(real: Tensor, fake: Tensor) -> Tensor:
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def _logistic(real: Tensor, fake: Tensor) -> Tensor:
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


ADVERSARIAL: dict[str, Adversarial] = {
    "hinge": Adversarial(_hinge, lambda fake: -fake.mean()),  # Lim and Ye 2017, as in VQGAN
    "nonsaturating": Adversarial(_logistic, lambda fake: F.softplus(-fake).mean()),  # Goodfellow et al. 2014
}


def adaptive_weight(reconstruction: Tensor, gan: Tensor, last_layer: nn.Parameter) -> Tensor:
    """λ = ‖∇ reconstruction‖ / (‖∇ gan‖ + 1e-4), gradients at the decoder's last layer, in [0, 1e4], without gradient.

    Esser et al. 2021 (VQGAN), equation 7: both losses pull on the last layer equally hard. Norms are float32; a norm
    that is not finite gives 0. Keeps the graphs of both losses. Of several processes the gradients' means count.
    """

    def norm(loss: Tensor) -> Tensor:
        return group.mean(torch.autograd.grad(loss, last_layer, retain_graph=True)[0].float()).norm()

    return (norm(reconstruction) / (norm(gan) + 1e-4)).nan_to_num(0.0, 0.0, 0.0).clamp(0, ADAPTIVE_CAP).detach()


def lecam(real: Tensor, fake: Tensor, average_real: Tensor, average_fake: Tensor) -> Tensor:
    """LeCAM regulariser (Tseng et al. 2021, equation 6): logits of either side stay near the running average of the
    other's. Only the excess counts, as in the authors' code: real above fake's average and fake below real's."""
    return F.relu(real - average_fake).square().mean() + F.relu(average_real - fake).square().mean()


def marginal_cosine(z: Tensor, f: Tensor, margin: float = 0.5) -> Tensor:
    """How far vectors ``z`` point away from features ``f``, both (B, C, h, w): the mean over all positions of
    ReLU(1 − m − cos(z, f)), in [0, 2 − m]. Yao and Wang 2025 (VA-VAE), equations 3 and 4, where z is a linear map of
    the latent; within the margin, which is theirs, nothing pulls."""
    return F.relu(1 - margin - F.cosine_similarity(z, f, dim=1)).mean()


def marginal_distances(z: Tensor, f: Tensor, margin: float = 0.25) -> Tensor:
    """How far latents ``z`` (B, d, h, w) differ from features ``f`` (B, C, h, w) in which positions of an image are
    alike: the mean over all pairs of them, an image at a time, of ReLU(|cos(zᵢ, zⱼ) − cos(fᵢ, fⱼ)| − m), in [0, 2 − m].
    Yao and Wang 2025 (VA-VAE), equation 5."""
    a, b = (F.normalize(grid.flatten(2), dim=1) for grid in (z, f))
    return F.relu((a.mT @ a - b.mT @ b).abs() - margin).mean()


def gradient_penalty(x: Tensor, logits: Tensor) -> Tensor:
    """R1 (Mescheder et al. 2018, equation 9): half the squared norm of the logits' gradient, mean over images.

    ``logits``, summed over an image's patches, were computed from real ``x`` (B, 3, H, W), which requires a gradient.
    """
    (gradient,) = torch.autograd.grad(logits.float().sum(), x, create_graph=True)
    return 0.5 * gradient.float().square().sum((1, 2, 3)).mean()
