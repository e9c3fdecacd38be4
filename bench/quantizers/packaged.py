"""Quantizers built on the optional package vector-quantize-pytorch, behind the interface of all others.

Its modules are given tokens (1, N, d) in float32. Where they differ from our quantizers they are corrected.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from bench.core.errors import UserError

from .codebook import Quantized, Quantizer, digits, factors, first_codes, nearest, need, number


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
    """Raises UserError without the package, and as ``need`` does."""
    package()
    need(quantizer, rule, codebook_size, possible)


class SimVQQuantizer(Quantizer):
    """Frozen codes times one learned matrix, so that every code moves whenever one does; losses as in standard.

    Zhu et al. 2024, "Addressing Representation Collapse in Vector Quantized Models with One Linear Layer". Other than
    there, codes are encoder outputs, not Gaussian noise, the matrix starts as the identity, and entropy may be added.
    """

    settings = ("beta", "kmeans_init", "entropy_weight", "gradient")

    def __init__(self, codebook_size: int, code_dim: int, **shared: Any):
        self.check(codebook_size, code_dim)
        super().__init__(codebook_size, code_dim, **shared)
        self.codec = package().SimVQ(
            code_dim, codebook_size, rotation_trick=False, input_to_quantize_commit_loss_weight=self.beta
        )
        self.codec.code_transform.weight._no_weight_decay = True  # decay would shrink the codes

    @classmethod
    def check(cls, codebook_size: int, code_dim: int, **settings: Any) -> None:
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
    """Several codebooks, of sizes whose product is K: each quantizes what those before it leave over, z_q is their sum.

    A code is the number that their indices write, so an image costs as many bits as with any other quantizer. Each of
    the ``codebooks`` is a moving average with decay ``ema_decay``, and pulls its input by a commitment loss of weight
    β. Lee et al. 2022, "Autoregressive Image Generation using Residual Quantization", section 3.1.
    """

    settings = ("beta", "kmeans_init", "gradient", "ema_decay", "codebooks")

    def __init__(
        self, codebook_size: int, code_dim: int, *, ema_decay: float = 0.99, codebooks: int = 2, **shared: Any
    ):
        self.check(codebook_size, code_dim, codebooks=codebooks)
        super().__init__(codebook_size, code_dim, **shared)
        self.sizes = factors(codebook_size, codebooks)
        self.codec = package().ResidualVQ(
            dim=code_dim,
            codebook_size=self.sizes,
            decay=ema_decay,
            rotation_trick=False,
            sync_codebook=dist.is_initialized(),
        )

    @classmethod
    def check(cls, codebook_size: int, code_dim: int, *, codebooks: int = 2, **settings: Any) -> None:
        """Raises UserError unless K is a product of so many numbers above 1."""
        rule = f"a product of {codebooks} numbers above 1"
        require("residual", rule, codebook_size, lambda size: min(factors(size, codebooks)) > 1)

    def quantize(self, tokens: Tensor) -> Quantized:
        """By the package, but for z_q's gradient, which it would pass once per codebook: twice the gradient in all."""
        summed, indices, losses = self.codec(tokens[None])
        if tokens.requires_grad and not self.training:  # frozen codes pull all the same, and the package gives no loss
            codes = self.codec.get_codes_from_indices(indices)[:, 0]
            losses = (tokens - codes.cumsum(0)).square().mean((1, 2))
        chosen, codes = summed[0].detach(), number(indices[0], self.sizes)
        distortion = F.mse_loss(tokens.detach(), chosen)
        return Quantized(self.pass_gradient(tokens, chosen), codes, self.beta * losses.sum(), distortion)

    def vectors(self, codes: Tensor) -> Tensor:
        """Sum of the vectors that its digits stand for."""
        indices = digits(codes.flatten(), self.sizes)
        return self.codec.get_output_from_indices(indices[None]).view(*codes.shape, self.code_dim)

    def start(self, tokens: Tensor) -> None:
        """Each codebook at random inputs of its own, or at their centroids with ``kmeans_init``; and its averages."""
        for stage in self.codec.layers:
            part = stage._codebook
            vectors = first_codes(tokens, part.codebook_size, self.kmeans_init)
            part.embed.copy_(vectors[None])
            part.embed_avg.copy_(vectors[None])
            part.cluster_size.fill_(1.0)
            tokens = tokens - vectors[nearest(tokens, vectors)]
