"""Quantizers whose codes are learned: by gradient, or as moving averages of the tokens that choose them."""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from .codebook import Quantized, Quantizer, all_reduce, first_codes, nearest


class CodebookQuantizer(Quantizer):
    """Look-up, gradient estimator, initialisation from data and dead-code reset; siblings add the learning.

    revive_after: a code that no token chose while ``revive_after``·K tokens passed, enough for ``revive_after`` of them
        under uniform use, becomes a random token of the current batch (0: never). Tokens, not steps: a step brings
        8,192 of them on a 16×16 grid, but 32 with one code per image.
    """

    settings = ("beta", "revive_after", "kmeans_init", "entropy_weight", "gradient")
    codebook: Tensor

    def __init__(self, codebook_size: int, code_dim: int, *, revive_after: int = 0, **shared: Any):
        super().__init__(codebook_size, code_dim, **shared)
        self.revive_after = revive_after
        self.register_buffer("idle", torch.zeros(codebook_size, dtype=torch.int64))  # tokens since a code was chosen

    def normalise(self, vectors: Tensor) -> Tensor:
        """Where tokens and codes live: everywhere, unless a sibling says otherwise. (N, d) → (N, d)."""
        return vectors

    def choose(self, tokens: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Codes (N,) of tokens (N, d), their vectors (N, d) in ``codebook`` (K, d), and z_q: these with a gradient."""
        codes = nearest(tokens.detach(), codebook.detach())
        chosen = F.embedding(codes, codebook)
        return codes, chosen, self.pass_gradient(tokens, chosen)

    def learning_loss(self, tokens: Tensor, chosen: Tensor) -> Tensor:
        """The term that trains the codebook by gradient, if any. Both (N, d); β must not enter it."""
        return tokens.new_zeros(())

    def learn(self, tokens: Tensor, codes: Tensor, hits: Tensor) -> None:
        """Updates that are no gradients. tokens (N, d), codes (N,), hits (K,) counts over all processes."""

    def replace(self, which: Tensor, vectors: Tensor) -> None:
        """Sets the codes where ``which`` (K,) bool to ``vectors`` (K, d), with whatever statistics belong to them."""
        with torch.no_grad():
            self.codebook.copy_(torch.where(which[:, None], vectors, self.codebook))

    def quantize(self, tokens: Tensor) -> Quantized:
        """Look-up and losses; in training mode also the codebook's statistics."""
        tokens = self.normalise(tokens)
        if self.training and self.revive_after:
            self._revive(tokens.detach())  # before the look-up, so that a revived code is used at once
        codebook = self.normalise(self.codebook)
        codes, chosen, z_q = self.choose(tokens, codebook)
        distortion = F.mse_loss(tokens.detach(), chosen.detach())
        loss = self.beta * F.mse_loss(tokens, chosen.detach()) + self.learning_loss(tokens, chosen)
        kept = codebook.clone()  # a moving average moves before the backward pass
        loss = loss + self.entropy_loss(tokens, kept, distortion)
        if self.training:
            self._learn(tokens.detach(), codes)
        return Quantized(z_q, codes, loss, distortion)

    def vectors(self, codes: Tensor) -> Tensor:
        """Rows of the codebook."""
        return F.embedding(codes, self.normalise(self.codebook))

    def start(self, tokens: Tensor) -> None:
        """Makes K random tokens the codebook, or centroids with ``kmeans_init``; fewer than K repeat."""
        tokens = self.normalise(tokens)
        vectors = first_codes(tokens, self.codebook_size, self.kmeans_init, self.normalise)
        self.replace(torch.ones_like(self.idle, dtype=torch.bool), vectors)
        self.idle.zero_()

    @torch.no_grad()
    def _revive(self, tokens: Tensor) -> None:
        dead = self.idle >= self.revive_after * self.codebook_size
        vectors = tokens[torch.randint(len(tokens), (self.codebook_size,), device=tokens.device)]
        if dist.is_initialized():
            dist.broadcast(vectors, src=0)  # every process must revive the same code at the same place
        self.replace(dead, vectors)
        self.idle.mul_(~dead)

    @torch.no_grad()
    def _learn(self, tokens: Tensor, codes: Tensor) -> None:
        hits = all_reduce(torch.bincount(codes, minlength=self.codebook_size))
        self.idle.add_(hits.sum()).mul_(hits == 0)
        self.learn(tokens, codes, hits.float())


class StandardQuantizer(CodebookQuantizer):
    """Codes learned by gradient, anywhere in space."""

    def __init__(self, codebook_size: int, code_dim: int, **shared: Any):
        super().__init__(codebook_size, code_dim, **shared)
        self.codebook = nn.Parameter(torch.randn(codebook_size, code_dim))

    def learning_loss(self, tokens: Tensor, chosen: Tensor) -> Tensor:
        return F.mse_loss(chosen, tokens.detach())


class L2Quantizer(StandardQuantizer):
    """Codes learned by gradient on the unit sphere: nearest in angle, so a code's norm cannot leave it unused."""

    def normalise(self, vectors: Tensor) -> Tensor:
        return F.normalize(vectors, dim=-1)


class EMAQuantizer(CodebookQuantizer):
    """Codes that are the moving average of the tokens that chose them.

    With decay γ = ``ema_decay`` in [0, 1) and batch statistics n_k (tokens that chose k) and s_k (their sum):
    N_k ← γN_k + (1−γ)n_k, S_k ← γS_k + (1−γ)s_k, e_k = S_k / N_k, N_k Laplace-smoothed by ε = 1e-5.
    """

    settings = (*CodebookQuantizer.settings, "ema_decay")

    def __init__(self, codebook_size: int, code_dim: int, *, ema_decay: float = 0.99, **shared: Any):
        super().__init__(codebook_size, code_dim, **shared)
        self.ema_decay = ema_decay
        self.register_buffer("codebook", torch.randn(codebook_size, code_dim))
        self.register_buffer("cluster_size", torch.ones(codebook_size))
        self.register_buffer("cluster_sum", self.codebook.clone())

    def learn(self, tokens: Tensor, codes: Tensor, hits: Tensor) -> None:
        sums = all_reduce(torch.zeros_like(self.codebook).index_add_(0, codes, tokens))
        self.cluster_size.lerp_(hits, 1 - self.ema_decay)
        self.cluster_sum.lerp_(sums, 1 - self.ema_decay)
        total = self.cluster_size.sum()
        smoothed = (self.cluster_size + 1e-5) * (total / (total + self.codebook_size * 1e-5))
        self.codebook.copy_(self.cluster_sum / smoothed[:, None])

    def replace(self, which: Tensor, vectors: Tensor) -> None:
        """Also restarts the running sums, at one token: otherwise the next step's average undoes the reset."""
        super().replace(which, vectors)
        self.cluster_size.masked_fill_(which, 1.0)
        self.cluster_sum.copy_(torch.where(which[:, None], vectors, self.cluster_sum))


class EMAL2Quantizer(EMAQuantizer):
    """Codes that are moving averages of unit tokens, themselves brought back to the unit sphere."""

    normalise = L2Quantizer.normalise


class GumbelQuantizer(CodebookQuantizer):
    """Codes sampled in training, so that the decoder's gradient weighs the alternatives and reaches the codebook.

    p(code | token) = softmax(−‖x − e‖² / 2σ²), a mixture of Gaussians whose variance σ² is the batch's own mean squared
    distance, per component, to the nearest code, so the scale of space is indifferent. In training the decoder sees one
    code k = argmax(ln p + Gumbel noise), a sample of p, and the gradient is that of Σ y_k e_k with
    y = softmax((ln p + noise) / ``temperature``): the straight-through Gumbel-softmax (Jang et al. 2017, section 2.2).
    In eval mode k is the nearest code. There is no codebook loss, and no KL term to the uniform prior: β weighs the
    commitment to the sampled code, ``entropy_weight`` spreads codes. Training holds several N×K matrices of float32.
    """

    settings = ("beta", "revive_after", "kmeans_init", "entropy_weight", "temperature")

    def __init__(self, codebook_size: int, code_dim: int, *, temperature: float = 1.0, **shared: Any):
        super().__init__(codebook_size, code_dim, **shared)
        self.temperature = temperature
        self.codebook = nn.Parameter(torch.randn(codebook_size, code_dim))

    def choose(self, tokens: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if not self.training:
            return super().choose(tokens, codebook)
        nearness = torch.addmm(codebook.square().sum(1), tokens, codebook.T, beta=-1, alpha=2)  # ‖x‖² − ‖x − e‖²
        with torch.no_grad():
            variance = (tokens.square().sum(1) - nearness.amax(1)).mean() / self.code_dim
        logits = nearness / (2 * variance.clamp_min(1e-12))
        noisy = logits - torch.rand_like(logits).log_().neg_().log_()  # exponential_() takes CPUs several times as long
        codes = noisy.argmax(1)
        chosen = F.embedding(codes, codebook)
        soft = (noisy / self.temperature).softmax(1) @ codebook.detach()
        return codes, chosen, chosen + (soft - soft.detach())
