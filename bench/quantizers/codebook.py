"""What quantizers are made of: their interface, the look-up, and tricks that suit several of them.

Pure functions on tokens (N, d) and codebooks (K, d), both float32.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bench.core import group
from bench.core.errors import UserError

CHUNK_BYTES = {"cpu": 4 << 20, "cuda": 256 << 20}  # distances held at once: about an L2 + L3 share, or a busy GPU
STRIP = 128  # columns of the distances of which the smallest is found at once
ZERO_NORM = 1e-6  # shorter vectors have no direction


class Quantized(NamedTuple):
    """What every quantizer returns."""

    z_q: Tensor  # (B, d, h, w) float32, the chosen codes; a gradient estimator leads from it back to ``z``
    codes: Tensor  # (B, h, w) int64 in [0, K); of continuous latents z_q, without a gradient
    loss: Tensor  # scalar, what the quantizer adds to the training loss (weights such as β applied)
    distortion: Tensor  # scalar, mean squared distance of tokens to their codes, for the log (no gradient)
    rate: Tensor | None = None  # (B,) bits of each image, where it is measured: not of codes, whose bits follow from K


class Quantizer(nn.Module):
    """The interface: float32 whatever the autocast, and a grid as the list of its tokens. Siblings quantize those.

    codebook_size: K ≥ 1. code_dim: d ≥ 1. Of the others, which are fields of Config, ``settings`` names those that a
    sibling heeds. beta: commitment weight β ≥ 0. kmeans_init: the first codes are centroids of k-means rather than
    random tokens. entropy_weight: weight ≥ 0 of ``entropy_penalty`` in training. gradient: a name in GRADIENTS.
    UserError as ``check`` raises it.
    """

    settings: tuple[str, ...] = ()
    discrete = True  # whether there are codes at all: siblings in ``continuous`` have none

    def __init__(
        self,
        codebook_size: int,
        code_dim: int,
        beta: float = 0.25,
        kmeans_init: bool = False,
        entropy_weight: float = 0.0,
        gradient: str = "straight_through",
    ):
        super().__init__()
        self.codebook_size, self.code_dim = codebook_size, code_dim
        self.beta, self.kmeans_init, self.entropy_weight = beta, kmeans_init, entropy_weight
        self.pass_gradient = GRADIENTS[gradient]

    @classmethod
    def check(cls, codebook_size: int, code_dim: int, **settings: Any) -> None:
        """Raises UserError where this quantizer, with such of its ``settings``, cannot have so many codes of such a
        length, or lacks a package."""

    def anneal(self, done: float) -> None:
        """Tells, before each training step, which share of the training is ``done``, in [0, 1): schedules follow it."""

    def quantize(self, tokens: Tensor) -> Quantized:
        """Quantizes (N, d): z_q (N, d) and codes (N,)."""
        raise NotImplementedError

    def vectors(self, codes: Tensor) -> Tensor:
        """What the decoder sees for ``codes``: (…) int64 in [0, K) → (…, d), equal to quantize's z_q."""
        raise NotImplementedError

    def start(self, tokens: Tensor) -> None:
        """Chooses the first codes by the encoder's first outputs (N, d)."""
        raise NotImplementedError

    def entropy_loss(self, tokens: Tensor, codebook: Tensor, distortion: Tensor) -> Tensor | float:
        """``entropy_penalty`` times its weight; 0 in eval mode, and without a weight, where it is not computed."""
        if not (self.training and self.entropy_weight):
            return 0.0
        return self.entropy_weight * entropy_penalty(tokens, codebook, distortion)

    def forward(self, z: Tensor) -> Quantized:
        """Quantizes ``z`` (B, d, h, w), any float dtype. The codebook's statistics move in training mode only."""
        with torch.autocast(z.device.type, enabled=False):
            grid = z.float().movedim(1, -1)
            z_q, codes, loss, distortion, _ = self.quantize(grid.reshape(-1, self.code_dim))
            return Quantized(z_q.reshape(grid.shape).movedim(-1, 1), codes.reshape(grid.shape[:-1]), loss, distortion)

    def lookup(self, codes: Tensor) -> Tensor:
        """Code vectors of indices alone: (B, h, w) int64 in [0, K) → (B, d, h, w) float32, equal to forward's z_q."""
        with torch.autocast(codes.device.type, enabled=False):
            return self.vectors(codes).movedim(-1, 1)

    @torch.no_grad()
    def initialise(self, z: Tensor) -> None:
        """Chooses the first codes by the encoder's first outputs ``z`` (B, d, h, w), any float dtype. Among several
        processes it belongs before they share their state: each would choose its own."""
        with torch.autocast(z.device.type, enabled=False):
            self.start(z.float().movedim(1, -1).reshape(-1, self.code_dim))


@torch.no_grad()
def nearest(tokens: Tensor, codebook: Tensor) -> Tensor:
    """Index of the nearest code of each token in Euclidean distance.

    tokens (N, d) and codebook (K, d) float32 → (N,) int64; of equally near codes the first. It is the argmin of
    ‖e‖² − 2 x·e: one GEMM and one argmin, in chunks of rows that stay in cache, so that no N×K matrix exists.
    """
    half_norms = codebook.square().sum(1).mul_(0.5)
    if torch.compiler.is_compiling():  # into a graph, which takes any number of tokens and is no place for chunks
        return torch.addmm(half_norms, tokens, codebook.T, alpha=-1).argmin(1)
    codes = torch.empty(len(tokens), dtype=torch.int64, device=tokens.device)
    rows = min(chunk_rows(codebook), max(1, len(tokens)))
    distances = torch.empty(rows, len(codebook), device=tokens.device)
    for chunk, target in zip(tokens.split(rows), codes.split(rows), strict=True):
        some = torch.addmm(half_norms, chunk, codebook.T, alpha=-1, out=distances[: len(chunk)])
        target.copy_(least(some))
    return codes


def least(distances: Tensor) -> Tensor:
    """Place of the smallest number of each row, (n, K) float32 → (n,) int64; of equal ones the first.

    On CPUs the strip of STRIP columns that has it, and then its place there: ``amin`` is vectorised and ``argmin`` is
    not, so that a look-up takes 1.0 to 1.6 times its GEMM instead of 1.8 to 3.3."""
    columns = distances.shape[1]
    if distances.device.type != "cpu" or columns % STRIP or columns == STRIP:
        return distances.argmin(1)
    strips = distances.unflatten(1, (-1, STRIP))
    best = strips.amin(2).argmin(1)
    return best * STRIP + strips[torch.arange(len(best)), best].argmin(1)


def chunk_rows(codebook: Tensor) -> int:
    """Tokens whose distances to all of ``codebook`` fill CHUNK_BYTES."""
    return max(1, CHUNK_BYTES.get(codebook.device.type, 4 << 20) // (4 * len(codebook)))


@torch.no_grad()
def kmeans(
    tokens: Tensor, centroids: Tensor, normalise: Callable[[Tensor], Tensor] = lambda vectors: vectors, rounds: int = 10
) -> Tensor:
    """Lloyd's algorithm: moves ``centroids`` (K, d) to the means of their tokens (N, d), ``rounds`` times, and those
    without tokens to a random one. With ``normalise`` onto the unit sphere: Dhillon & Modha 2001."""
    for _ in range(rounds):
        codes = nearest(tokens, centroids)
        hits = torch.bincount(codes, minlength=len(centroids))[:, None]
        sums = torch.zeros_like(centroids).index_add_(0, codes, tokens)
        restart = tokens[torch.randint(len(tokens), (len(centroids),), device=tokens.device)]
        centroids = normalise(torch.where(hits > 0, sums / hits.clamp(min=1), restart))
    return centroids


def first_codes(
    tokens: Tensor, codebook_size: int, by_kmeans: bool, normalise: Callable[[Tensor], Tensor] = lambda vectors: vectors
) -> Tensor:
    """K random tokens of (N, d), or k-means centroids that start from them → (K, d). Fewer than K repeat, with jitter;
    k-means would have nothing to do there."""
    order = torch.randperm(len(tokens), device=tokens.device)
    vectors = tokens[order.repeat(-(-codebook_size // len(order)))[:codebook_size]].clone()
    spread = tokens.std(correction=min(1, tokens.numel() - 1))  # of a single number 0, not NaN
    vectors[len(order) :] += 0.01 * spread * torch.randn_like(vectors[len(order) :])
    vectors = normalise(vectors)
    return kmeans(tokens, vectors, normalise) if by_kmeans and len(tokens) > codebook_size else vectors


def need(quantizer: str, rule: str, codebook_size: int, possible: Callable[[int], bool]) -> None:
    """Raises UserError, naming the nearest K that will do, unless this one is ``possible``."""
    if not possible(codebook_size):
        around = (size for step in itertools.count(1) for size in (codebook_size - step, codebook_size + step))
        fix = next(size for size in around if size > 0 and possible(size))
        raise UserError(f"codebook_size is {codebook_size}; quantizer {quantizer!r} needs {rule}, such as {fix}")


@functools.cache
def factors(codebook_size: int, count: int) -> tuple[int, ...]:
    """So many numbers whose product is K, as equal as they can be (by squared logarithm), falling; with 1 among them
    where K has fewer prime factors."""

    def factorisations(rest: int, least: int, count: int) -> list[tuple[int, ...]]:
        if count == 1:
            return [(rest,)]
        firsts = [size for size in range(least, round(rest ** (1 / count)) + 1) if rest % size == 0]
        return [(*more, first) for first in firsts for more in factorisations(rest // first, first, count - 1)]

    return min(factorisations(codebook_size, 1, count), key=lambda sizes: sum(math.log(size) ** 2 for size in sizes))


def digits(codes: Tensor, sizes: Sequence[int]) -> Tensor:
    """The indices (N, n) that ``codes`` (N,) stand for in n codebooks of ``sizes``: their digits, the highest first."""
    found = []
    for size in reversed(sizes):
        found.append(codes % size)
        codes = codes // size
    return torch.stack(found[::-1], -1)


def number(digits: Tensor, sizes: Sequence[int]) -> Tensor:
    """The inverse of ``digits``: (N, n) → (N,)."""
    codes = torch.zeros_like(digits[:, 0])
    for place, size in enumerate(sizes):
        codes = codes * size + digits[:, place]
    return codes


def straight_through(tokens: Tensor, chosen: Tensor) -> Tensor:
    """``chosen`` (N, d), its gradient copied to ``tokens`` (N, d) (Bengio et al. 2013)."""
    return tokens + (chosen - tokens).detach()


def rotate(tokens: Tensor, chosen: Tensor) -> Tensor:
    """``chosen`` (N, d), as a rotation and rescaling of ``tokens`` (N, d) that the gradient takes for constant.

    Rotation trick (Fifty et al. 2024, "Restructuring Vector Quantization with the Rotation Trick", section 4.2):
    q = ‖q‖/‖e‖ · R e with R = I − 2ww⊤ + 2q̂ê⊤ and w the unit vector between ê and q̂; so the gradient keeps its angle to
    the code on its way to the token. A token or code without direction is passed straight through.
    """
    e, q = tokens.detach(), chosen.detach()
    e_norm, q_norm = e.norm(dim=-1, keepdim=True), q.norm(dim=-1, keepdim=True)
    e_hat, q_hat = e / e_norm.clamp_min(ZERO_NORM), q / q_norm.clamp_min(ZERO_NORM)
    w = F.normalize(e_hat + q_hat, dim=-1)
    reflected = tokens - 2 * w * (w * tokens).sum(-1, keepdim=True)
    rotated = reflected + 2 * q_hat * (e_hat * tokens).sum(-1, keepdim=True)
    directed = torch.minimum(e_norm, q_norm) > ZERO_NORM
    carrier = torch.where(directed, rotated * (q_norm / e_norm.clamp_min(ZERO_NORM)), tokens)
    return straight_through(carrier, q)  # removes the rounding errors of the rotation


GRADIENTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"straight_through": straight_through, "rotation": rotate}


def entropy_penalty(tokens: Tensor, codebook: Tensor, distortion: Tensor) -> Tensor:
    """E[H(p(code | token))] − H(E[p(code | token)]), in nats: −ln K when every token is sure of its code and all codes
    are in equal use, at most 0 (Yu et al. 2024, "Language Model Beats Diffusion", eq. 5–6).

    tokens (N, d), codebook (K, d), ``distortion`` their mean squared distance per component. Codes compete as in a
    mixture of Gaussians of that variance σ²: p(code | token) = softmax(−‖x − e‖² / 2σ²), so the scale of space is
    indifferent. The gradient reaches tokens and codebook, σ² is held.

    No N×K matrix exists, only chunks of CHUNK_BYTES. A first pass sums p over all tokens, of all processes; with that
    mean p̄ held, the penalty is −E[KL(p ‖ p̄)], of equal value and gradient: a sum over tokens, whose chunks are computed
    anew in the backward pass. The ``distortion`` that counts is the mean over all processes.
    """
    precision = 1 / group.mean(distortion).clamp_min(1e-12)
    chunks = tokens.split(chunk_rows(codebook))

    def log_p(chunk: Tensor, codebook: Tensor) -> Tensor:
        half_norms = codebook.square().sum(1).mul(0.5)
        return torch.addmm(half_norms, chunk, codebook.T, beta=-1).mul(precision).log_softmax(1)

    def divergence(chunk: Tensor, codebook: Tensor) -> Tensor:
        logs = log_p(chunk, codebook)
        return (logs.exp() * (logs - log_mean)).sum()

    with torch.no_grad():
        hits = group.total(sum(log_p(chunk, codebook).exp().sum(0) for chunk in chunks))
        log_mean = (hits / hits.sum()).clamp_min(torch.finfo(hits.dtype).tiny).log()
    kept = {"use_reentrant": False, "preserve_rng_state": False}
    return -sum(checkpoint(divergence, chunk, codebook, **kept) for chunk in chunks) / len(tokens)
