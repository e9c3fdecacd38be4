"""Quantizers built on the optional package vector-quantize-pytorch, behind the interface of all others.

Its modules are given tokens (1, N, d) in float32. Where they differ from our quantizers they are corrected.
"""

import functools
import itertools
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from bench.core.errors import UserError

from .codebook import Quantized, Quantizer, first_codes, nearest, straight_through

LEVELS = range(3, 17)  # of one component of FSQ: the package rounds two levels in another way than three and more


def package() -> ModuleType:
    """vector-quantize-pytorch. Raises UserError where it is not installed."""
    try:
        import vector_quantize_pytorch
    except ImportError as error:
        raise UserError(
            "quantizers fsq, lfq, simvq and residual need a package; pip install 'vector-quantize-pytorch>=1.21'"
        ) from error
    return vector_quantize_pytorch


def require(quantizer: str, rule: str, codebook_size: int, possible: Callable[[int], bool]) -> None:
    """Raises UserError without the package; and, naming the nearest K that will do, if this one is not ``possible``."""
    package()
    if not possible(codebook_size):
        around = (size for step in itertools.count(1) for size in (codebook_size - step, codebook_size + step))
        fix = next(size for size in around if size > 0 and possible(size))
        raise UserError(f"codebook_size is {codebook_size}; quantizer {quantizer!r} needs {rule}, such as {fix}")


class ProjectedQuantizer(Quantizer):
    """d components → Linear → m scalars (``components``), rounded one by one → Linear → z_q: no codebook to learn."""

    spread: float  # standard deviation of the first scalars
    codec: nn.Module

    def __init__(self, codebook_size: int, code_dim: int, components: int, **shared: Any):
        super().__init__(codebook_size, code_dim, **shared)
        self.project_in = nn.Linear(code_dim, components)
        self.project_out = nn.Linear(components, code_dim)

    def round(self, scalars: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(N, m) → the rounded (N, m), with a gradient; codes (N,); and the loss."""
        raise NotImplementedError

    def quantize(self, tokens: Tensor) -> Quantized:
        """Projects, rounds and projects back. Distortion is measured between tokens, where no loss pulls it down."""
        rounded, codes, loss = self.round(self.project_in(tokens))
        z_q = self.project_out(rounded)
        return Quantized(z_q, codes, loss, F.mse_loss(tokens.detach(), z_q.detach()))

    def vectors(self, codes: Tensor) -> Tensor:
        """The package's inverse, projected back."""
        scalars = self.codec.indices_to_codes(codes.reshape(1, -1))
        return self.project_out(scalars).view(*codes.shape, self.code_dim)

    def start(self, tokens: Tensor) -> None:
        """Centres the scalars of the encoder's first outputs and has them deviate by ``spread``."""
        scalars = self.project_in(tokens)
        scale = self.spread / scalars.std(0, correction=0).clamp_min(1e-6)
        self.project_in.weight.mul_(scale[:, None])
        self.project_in.bias.sub_(scalars.mean(0)).mul_(scale)


class FSQQuantizer(ProjectedQuantizer):
    """Finite scalar quantization: every component has a few levels, K is their product; no loss, no codebook.

    Mentzer et al. 2024, "Finite Scalar Quantization: VQ-VAE Made Simple", section 3.
    """

    spread = 0.3  # the inner levels: encoders that start on all of them, at 0.9, come to use fewer and score lower

    def __init__(self, codebook_size: int, code_dim: int):
        levels = fsq_levels(codebook_size)
        super().__init__(codebook_size, code_dim, len(levels))
        self.codec = package().FSQ(list(levels))

    @classmethod
    def check(cls, codebook_size: int) -> None:
        """Raises UserError unless K is a product of numbers in LEVELS."""
        require("fsq", "a product of 3 to 16 levels a component", codebook_size, lambda size: bool(fsq_levels(size)))

    def round(self, scalars: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rounded, codes = self.codec(scalars[None])
        return rounded[0], codes[0].long(), scalars.new_zeros(())


@functools.cache
def fsq_levels(codebook_size: int) -> tuple[int, ...]:
    """Levels of each component, falling, whose product is K ≥ 2; empty where LEVELS offer none.

    Of all factorisations it is the one nearest to six levels each, by squared logarithm: at their K the five that the
    paper recommends (its table 1), and 8·8·8 at 512.
    """

    def factorisations(rest: int, largest: int) -> list[tuple[int, ...]]:
        if rest == 1:
            return [()]
        firsts = [level for level in LEVELS if level <= largest and rest % level == 0]
        return [(first, *others) for first in firsts for others in factorisations(rest // first, first)]

    options = factorisations(codebook_size, max(LEVELS)) if codebook_size > 1 else []
    return min(options, key=lambda levels: sum(math.log(level / 6) ** 2 for level in levels), default=())


class LFQQuantizer(ProjectedQuantizer):
    """Lookup-free quantization: the signs of m = log2 K components, each ±1.

    Loss: commitment β‖x − sign x‖² and, by ``entropy_weight``, the entropy penalty (Yu et al. 2024, "Language Model
    Beats Diffusion", section 3.1), with Gaussian soft choices of the components' own variance.
    """

    settings = ("beta", "entropy_weight")
    spread = 1.0

    def __init__(self, codebook_size: int, code_dim: int, **shared: Any):
        bits = codebook_size.bit_length() - 1
        super().__init__(codebook_size, code_dim, bits, **shared)
        self.codec = package().LFQ(dim=bits)

    @classmethod
    def check(cls, codebook_size: int) -> None:
        """Raises UserError unless K is a power of two, at least 2."""
        require("lfq", "a power of two", codebook_size, lambda size: size > 1 and size & (size - 1) == 0)

    def round(self, scalars: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self.codec.eval()  # in training it would hold all soft choices, N×K
        with torch.no_grad():
            signs, codes, _ = self.codec(scalars[None])
        distance = F.mse_loss(scalars, signs[0])
        loss = self.beta * distance + self.entropy_loss(scalars, self.codec.codebook, distance)
        return straight_through(scalars, signs[0]), codes[0].long(), loss


class SimVQQuantizer(Quantizer):
    """Frozen codes times one learned matrix, so that every code moves whenever one does; losses as in standard.

    Zhu et al. 2024, "Addressing Representation Collapse in Vector Quantized Models with One Linear Layer". Other than
    there, codes are encoder outputs, not Gaussian noise, the matrix starts as the identity, and entropy may be added.
    """

    settings = ("beta", "kmeans_init", "entropy_weight", "gradient")

    def __init__(self, codebook_size: int, code_dim: int, **shared: Any):
        super().__init__(codebook_size, code_dim, **shared)
        self.codec = package().SimVQ(
            code_dim, codebook_size, rotation_trick=False, input_to_quantize_commit_loss_weight=self.beta
        )
        self.codec.code_transform.weight._no_weight_decay = True  # decay would shrink the codes

    @classmethod
    def check(cls, codebook_size: int) -> None:
        """Raises UserError where the package is missing; any K will do."""
        package()

    def quantize(self, tokens: Tensor) -> Quantized:
        """Look-up and losses by the package, z_q by the same path as ``vectors``."""
        _, codes, loss = self.codec(tokens[None])
        chosen = self.vectors(codes[0]).detach()
        distortion = F.mse_loss(tokens.detach(), chosen)
        loss = loss + self.entropy_loss(tokens, self.codec.codebook, distortion)
        return Quantized(self.pass_gradient(tokens, chosen), codes[0], loss, distortion)

    def vectors(self, codes: Tensor) -> Tensor:
        """Rows of the transformed codebook."""
        return F.embedding(codes, self.codec.codebook)

    def start(self, tokens: Tensor) -> None:
        """Frozen codes at random tokens, or at centroids with ``kmeans_init``."""
        self.codec.frozen_codebook.copy_(first_codes(tokens, self.codebook_size, self.kmeans_init))
        nn.init.eye_(self.codec.code_transform.weight)


class ResidualQuantizer(Quantizer):
    """Two codebooks, of sizes whose product is K: the second quantizes what the first leaves over, z_q is their sum.

    A code is the pair's index, so an image costs as many bits as with any other quantizer. Either codebook is a moving
    average with decay ``ema_decay``, and pulls its input by a commitment loss of weight β. Lee et al. 2022,
    "Autoregressive Image Generation using Residual Quantization", section 3.1.
    """

    settings = ("beta", "kmeans_init", "gradient", "ema_decay")

    def __init__(self, codebook_size: int, code_dim: int, *, ema_decay: float = 0.99, **shared: Any):
        super().__init__(codebook_size, code_dim, **shared)
        self.sizes = residual_sizes(codebook_size)
        self.codec = package().ResidualVQ(
            dim=code_dim,
            codebook_size=self.sizes,
            decay=ema_decay,
            rotation_trick=False,
            sync_codebook=dist.is_initialized(),
        )

    @classmethod
    def check(cls, codebook_size: int) -> None:
        """Raises UserError unless K is a product of two numbers above 1."""
        require("residual", "a product of two numbers above 1", codebook_size, lambda size: residual_sizes(size)[1] > 1)

    def quantize(self, tokens: Tensor) -> Quantized:
        """By the package, but for z_q's gradient, which it would pass once per codebook: twice the gradient in all."""
        summed, pairs, losses = self.codec(tokens[None])
        chosen = summed[0].detach()
        codes = pairs[0, :, 0] * self.sizes[1] + pairs[0, :, 1]
        distortion = F.mse_loss(tokens.detach(), chosen)
        return Quantized(self.pass_gradient(tokens, chosen), codes, self.beta * losses.sum(), distortion)

    def vectors(self, codes: Tensor) -> Tensor:
        """Sum of the pair's two vectors."""
        pairs = torch.stack([codes // self.sizes[1], codes % self.sizes[1]], -1)
        return self.codec.get_output_from_indices(pairs.reshape(1, -1, 2)).view(*codes.shape, self.code_dim)

    def start(self, tokens: Tensor) -> None:
        """Either codebook at random inputs of its own, or at their centroids with ``kmeans_init``; and its averages."""
        for stage in self.codec.layers:
            part = stage._codebook
            vectors = first_codes(tokens, part.codebook_size, self.kmeans_init)
            part.embed.copy_(vectors[None])
            part.embed_avg.copy_(vectors[None])
            part.cluster_size.fill_(1.0)
            tokens = tokens - vectors[nearest(tokens, vectors)]


def residual_sizes(codebook_size: int) -> tuple[int, int]:
    """Two numbers whose product is K, as equal as they can be, the larger first."""
    second = next(size for size in range(math.isqrt(codebook_size), 0, -1) if codebook_size % size == 0)
    return codebook_size // second, second
