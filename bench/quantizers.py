"""Vector quantizers: siblings with one interface.

A quantizer maps the encoder's grid ``z`` (B, d, h, w) to the nearest of ``codebook_size`` code vectors and lets the
decoder's gradient through as if nothing had happened (straight-through). They differ in how the codebook learns:

========== ============================================================================================
standard   codebook loss ‖sg[z] − e‖² and commitment β‖z − sg[e]‖² (van den Oord et al. 2017, eq. 3)
ema        e follows an exponential moving average of its tokens; commitment only (same paper, appendix A.1)
l2         standard, with z and e on the unit sphere (Yu et al. 2022, ViT-VQGAN, section 3.2)
========== ============================================================================================

All arithmetic is float32 whatever the autocast: distances of nearby codes differ by less than bfloat16 resolves.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

CHUNK_BYTES = {"cpu": 4 << 20, "cuda": 256 << 20}  # distances held at once: about an L2 + L3 share, or a busy GPU


class Quantized(NamedTuple):
    """What every quantizer returns.

    z_q: (B, d, h, w) float32, the chosen codes; its gradient reaches ``z`` unchanged (straight-through).
    codes: (B, h, w) int64 in [0, K).
    loss: scalar, what the quantizer adds to the training loss (weights such as β applied).
    distortion: scalar, mean squared distance of tokens to their codes, for the log (no gradient).
    """

    z_q: Tensor
    codes: Tensor
    loss: Tensor
    distortion: Tensor


@torch.no_grad()
def nearest(tokens: Tensor, codebook: Tensor) -> Tensor:
    """Index of the nearest code of each token in Euclidean distance.

    tokens (N, d) and codebook (K, d) float32 → (N,) int64; ties go to one of the nearest.
    ``argmin_k ‖x − e_k‖² = argmin_k ‖e_k‖² − 2 x·e_k``: one GEMM and one argmin, in row chunks that stay in cache, so
    no N×K matrix exists. The GEMM and the argmin's pass over its result bound it.
    """
    half_norms = codebook.square().sum(1).mul_(0.5)
    rows = max(1, CHUNK_BYTES.get(tokens.device.type, 4 << 20) // (4 * len(codebook)))
    codes = torch.empty(len(tokens), dtype=torch.int64, device=tokens.device)
    for chunk, target in zip(tokens.split(rows), codes.split(rows), strict=True):
        torch.argmin(torch.addmm(half_norms, chunk, codebook.T, alpha=-1), dim=1, out=target)
    return codes


class Quantizer(nn.Module):
    """Look-up, straight-through estimator, initialisation from data and dead-code reset; siblings add the learning.

    codebook_size: K ≥ 1. code_dim: d ≥ 1. beta: commitment weight β ≥ 0.
    revive_after: a code that no token chose while ``revive_after``·K tokens passed, enough for ``revive_after`` of them
        under uniform use, becomes a random token of the current batch (0: never). Tokens, not steps: a step brings
        8,192 of them on a 16×16 grid, but 32 with one code per image.
    """

    codebook: Tensor

    def __init__(self, codebook_size: int, code_dim: int, beta: float = 0.25, revive_after: int = 0):
        super().__init__()
        self.codebook_size, self.code_dim, self.beta, self.revive_after = codebook_size, code_dim, beta, revive_after
        self.register_buffer("idle", torch.zeros(codebook_size, dtype=torch.int64))  # tokens since a code was chosen

    def normalise(self, vectors: Tensor) -> Tensor:
        """Where tokens and codes live: everywhere, unless a sibling says otherwise. (N, d) → (N, d)."""
        return vectors

    def learning_loss(self, tokens: Tensor, chosen: Tensor) -> Tensor:
        """The term that trains the codebook by gradient, if any. Both (N, d); β must not enter it."""
        raise NotImplementedError

    def learn(self, tokens: Tensor, codes: Tensor, hits: Tensor) -> None:
        """Updates that are no gradients. tokens (N, d), codes (N,), hits (K,) counts over all processes."""

    def replace(self, which: Tensor, vectors: Tensor) -> None:
        """Sets the codes where ``which`` (K,) bool to ``vectors`` (K, d), with whatever statistics belong to them."""
        with torch.no_grad():
            self.codebook.copy_(torch.where(which[:, None], vectors, self.codebook))

    def forward(self, z: Tensor) -> Quantized:
        """Quantizes ``z`` (B, d, h, w), any float dtype. In training mode the codebook's statistics move; in eval
        mode nothing does."""
        with torch.autocast(z.device.type, enabled=False):
            grid = z.float().movedim(1, -1)
            tokens = self.normalise(grid.reshape(-1, self.code_dim))
            if self.training and self.revive_after:
                self._revive(tokens.detach())  # before the look-up, so that a revived code is used at once
            codebook = self.normalise(self.codebook)
            codes = nearest(tokens.detach(), codebook.detach())
            chosen = F.embedding(codes, codebook)
            loss = self.beta * F.mse_loss(tokens, chosen.detach()) + self.learning_loss(tokens, chosen)
            distortion = F.mse_loss(tokens.detach(), chosen.detach())
            z_q = tokens + (chosen - tokens).detach()
            if self.training:
                self._learn(tokens.detach(), codes)
            return Quantized(z_q.view(grid.shape).movedim(-1, 1), codes.view(grid.shape[:-1]), loss, distortion)

    def lookup(self, codes: Tensor) -> Tensor:
        """Code vectors of indices alone: (B, h, w) int64 in [0, K) → (B, d, h, w) float32, equal to forward's z_q."""
        return F.embedding(codes, self.normalise(self.codebook)).movedim(-1, 1)

    @torch.no_grad()
    def initialise(self, z: Tensor) -> None:
        """Makes K random tokens of ``z`` (B, d, h, w) the codebook; fewer than K tokens repeat, with jitter."""
        tokens = self.normalise(z.float().movedim(1, -1).reshape(-1, self.code_dim))
        order = torch.randperm(len(tokens), device=tokens.device)
        vectors = tokens[order.repeat(-(-self.codebook_size // len(order)))[: self.codebook_size]].clone()
        vectors[len(order) :] += 0.01 * tokens.std() * torch.randn_like(vectors[len(order) :])
        self.replace(torch.ones_like(self.idle, dtype=torch.bool), self.normalise(vectors))
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


class StandardQuantizer(Quantizer):
    """Codes learned by gradient, anywhere in space."""

    def __init__(self, codebook_size: int, code_dim: int, beta: float = 0.25, revive_after: int = 0):
        super().__init__(codebook_size, code_dim, beta, revive_after)
        self.codebook = nn.Parameter(torch.randn(codebook_size, code_dim))

    def learning_loss(self, tokens: Tensor, chosen: Tensor) -> Tensor:
        return F.mse_loss(chosen, tokens.detach())


class L2Quantizer(StandardQuantizer):
    """Codes learned by gradient on the unit sphere: nearest in angle, so a code's norm cannot leave it unused."""

    def normalise(self, vectors: Tensor) -> Tensor:
        return F.normalize(vectors, dim=-1)


class EMAQuantizer(Quantizer):
    """Codes that are the moving average of the tokens that chose them.

    With decay γ and batch statistics n_k (tokens that chose k) and s_k (their sum):
    N_k ← γN_k + (1−γ)n_k, S_k ← γS_k + (1−γ)s_k, e_k = S_k / N_k, N_k Laplace-smoothed by ε = 1e-5.
    """

    def __init__(
        self, codebook_size: int, code_dim: int, beta: float = 0.25, revive_after: int = 0, decay: float = 0.99
    ):
        super().__init__(codebook_size, code_dim, beta, revive_after)
        self.decay = decay
        self.register_buffer("codebook", torch.randn(codebook_size, code_dim))
        self.register_buffer("cluster_size", torch.ones(codebook_size))
        self.register_buffer("cluster_sum", self.codebook.clone())

    def learning_loss(self, tokens: Tensor, chosen: Tensor) -> Tensor:
        return tokens.new_zeros(())

    def learn(self, tokens: Tensor, codes: Tensor, hits: Tensor) -> None:
        sums = all_reduce(torch.zeros_like(self.codebook).index_add_(0, codes, tokens))
        self.cluster_size.lerp_(hits, 1 - self.decay)
        self.cluster_sum.lerp_(sums, 1 - self.decay)
        total = self.cluster_size.sum()
        smoothed = (self.cluster_size + 1e-5) * (total / (total + self.codebook_size * 1e-5))
        self.codebook.copy_(self.cluster_sum / smoothed[:, None])

    def replace(self, which: Tensor, vectors: Tensor) -> None:
        """Also restarts the running sums, at one token: otherwise the next step's average undoes the reset."""
        super().replace(which, vectors)
        self.cluster_size.masked_fill_(which, 1.0)
        self.cluster_sum.copy_(torch.where(which[:, None], vectors, self.cluster_sum))


def all_reduce(x: Tensor) -> Tensor:
    """Sum of ``x`` over all processes, in place; ``x`` itself without torch.distributed."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


QUANTIZERS: dict[str, type[Quantizer]] = {
    "standard": StandardQuantizer,
    "ema": EMAQuantizer,
    "l2": L2Quantizer,
}
