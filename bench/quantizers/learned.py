"""Quantizers whose codes are learned: by gradient, or as moving averages of the tokens that choose them."""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.core import group
from bench.core.errors import UserError

from .codebook import Quantized, Quantizer, digits, factors, first_codes, nearest, need, number


class Choice(NamedTuple):
    """Codes (N,) of tokens (N, d), their vectors (N, d), z_q: these with a gradient; and what choosing adds to the
    loss."""

    codes: Tensor
    chosen: Tensor
    z_q: Tensor
    cost: Tensor | float = 0.0


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

    def choose(self, tokens: Tensor, codebook: Tensor) -> Choice:
        """The code of each of tokens (N, d) in ``codebook`` (K, d)."""
        codes = nearest(tokens.detach(), codebook.detach())
        chosen = F.embedding(codes, codebook)
        return Choice(codes, chosen, self.pass_gradient(tokens, chosen))

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
        codes, chosen, z_q, cost = self.choose(tokens, codebook)
        distortion = F.mse_loss(tokens.detach(), chosen.detach())
        loss = self.beta * F.mse_loss(tokens, chosen.detach()) + self.learning_loss(tokens, chosen) + cost
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
        self.replace(dead, group.picked(tokens, self.codebook_size))
        self.idle.mul_(~dead)

    @torch.no_grad()
    def _learn(self, tokens: Tensor, codes: Tensor) -> None:
        hits = group.total(torch.bincount(codes, minlength=self.codebook_size))
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
        sums = group.total(torch.zeros_like(self.codebook).index_add_(0, codes, tokens))
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
    In eval mode k is the nearest code. There is no codebook loss; β weighs the commitment to the sampled code, and
    ``uniform_weight`` KL(p ‖ uniform) = ln K − H(p) in nats per token, which keeps choices open, as DALL-E has it. The
    temperature falls geometrically from ``temperature`` to ``temperature_end`` over the training, where that is given.
    Training holds several N×K matrices of float32.
    """

    settings = ("beta", "revive_after", "kmeans_init", "entropy_weight", "temperature")
    settings += ("temperature_end", "uniform_weight")

    def __init__(
        self,
        codebook_size: int,
        code_dim: int,
        *,
        temperature: float = 1.0,
        temperature_end: float | None = None,
        uniform_weight: float = 0.0,
        **shared: Any,
    ):
        super().__init__(codebook_size, code_dim, **shared)
        self.temperature, self.uniform_weight = temperature, uniform_weight
        self.temperatures = temperature, temperature if temperature_end is None else temperature_end
        self.codebook = nn.Parameter(torch.randn(codebook_size, code_dim))

    def anneal(self, done: float) -> None:
        first, last = self.temperatures
        self.temperature = first * (last / first) ** done

    def noise(self, logits: Tensor) -> Tensor:
        """What is added to ``logits`` (N, K) before a code is chosen: Gumbel noise."""
        draws = group.whole(lambda rows: torch.rand(rows, logits.shape[1], device=logits.device), len(logits))
        return -draws.log_().neg_().log_()  # exponential_() takes CPUs several times as long

    def choose(self, tokens: Tensor, codebook: Tensor) -> Choice:
        if not self.training:
            return super().choose(tokens, codebook)
        nearness = torch.addmm(codebook.square().sum(1), tokens, codebook.T, beta=-1, alpha=2)  # ‖x‖² − ‖x − e‖²
        with torch.no_grad():
            variance = group.mean((tokens.square().sum(1) - nearness.amax(1)).mean()) / self.code_dim
        logits = nearness / (2 * variance.clamp_min(1e-12))
        noisy = logits + self.noise(logits)
        codes = noisy.argmax(1)
        chosen = F.embedding(codes, codebook)
        soft = (noisy / self.temperature).softmax(1) @ codebook.detach()
        cost = self.uniform_weight * _from_uniform(logits) if self.uniform_weight else 0.0
        return Choice(codes, chosen, chosen + (soft - soft.detach()), cost)


def _from_uniform(logits: Tensor) -> Tensor:
    """KL(softmax(logits) ‖ uniform) in nats, mean over the rows of (N, K)."""
    log_p = logits.log_softmax(1)
    return (log_p.exp() * log_p).sum(1).mean() + math.log(logits.shape[1])


class IBQQuantizer(GumbelQuantizer):
    """Index backpropagation: the choice itself has a gradient, so that every code learns from every token.

    The decoder sees the nearest code; the gradient is that of Σ p_k e_k with p = softmax(−‖x − e‖² / 2σ²), gumbel's
    without the noise; losses are those of standard. Shi et al. 2024, "Scalable Image Tokenization with Index
    Backpropagation Quantization", section 3.2; there nearness is the inner product, by which, of codes that start at
    tokens, the long ones would take all. Training holds several N×K matrices of float32.
    """

    settings = ("beta", "revive_after", "kmeans_init", "entropy_weight")

    def noise(self, logits: Tensor) -> Tensor:
        return torch.zeros_like(logits[:, :1])

    def learning_loss(self, tokens: Tensor, chosen: Tensor) -> Tensor:
        return F.mse_loss(chosen, tokens.detach())


class ProductQuantizer(Quantizer):
    """Several codebooks, of sizes whose product is K: each quantizes its share of the d components by itself.

    A code is the number that their indices write. Each of the ``codebooks`` is a moving average, as in ema; losses are
    means over components. Jégou et al. 2011, "Product Quantization for Nearest Neighbor Search", section II.
    """

    settings = ("beta", "revive_after", "kmeans_init", "gradient", "ema_decay", "codebooks")

    def __init__(self, codebook_size: int, code_dim: int, *, codebooks: int = 2, **shared: Any):
        self.check(codebook_size, code_dim, codebooks=codebooks)
        super().__init__(codebook_size, code_dim)
        self.sizes = factors(codebook_size, codebooks)
        self.widths = [len(part) for part in torch.arange(code_dim).tensor_split(codebooks)]
        parts = zip(self.sizes, self.widths, strict=True)
        self.parts = nn.ModuleList(EMAQuantizer(size, width, **shared) for size, width in parts)

    @classmethod
    def check(cls, codebook_size: int, code_dim: int, *, codebooks: int = 2, **settings: Any) -> None:
        """Raises UserError unless K is a product of so many numbers above 1, and d has a component for each."""
        rule = f"a product of {codebooks} numbers above 1"
        need("product", rule, codebook_size, lambda size: min(factors(size, codebooks)) > 1)
        if code_dim < codebooks:
            raise UserError(f"code_dim is {code_dim}; quantizer 'product' needs {codebooks}, a component per codebook")

    def quantize(self, tokens: Tensor) -> Quantized:
        """Each share by its own part."""
        found = [part.quantize(share) for part, share in zip(self.parts, tokens.split(self.widths, 1), strict=True)]
        weights = [width / self.code_dim for width in self.widths]
        loss, distortion = (
            sum(weight * value for weight, value in zip(weights, values, strict=True))
            for values in ([one.loss for one in found], [one.distortion for one in found])
        )
        codes = number(torch.stack([one.codes for one in found], 1), self.sizes)
        return Quantized(torch.cat([one.z_q for one in found], 1), codes, loss, distortion)

    def vectors(self, codes: Tensor) -> Tensor:
        """The vectors that its digits stand for, side by side."""
        indices = digits(codes.flatten(), self.sizes).unbind(1)
        shares = [part.vectors(index) for part, index in zip(self.parts, indices, strict=True)]
        return torch.cat(shares, 1).view(*codes.shape, self.code_dim)

    def start(self, tokens: Tensor) -> None:
        """Each codebook at its share of the tokens."""
        for part, share in zip(self.parts, tokens.split(self.widths, 1), strict=True):
            part.start(share)
