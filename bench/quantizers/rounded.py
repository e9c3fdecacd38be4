"""Codes that are no vectors to choose from but rounded components: nothing is looked up, no codebook is learned.

fsq and lfq stand on the optional package vector-quantize-pytorch, see ``packaged``.
"""

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.core import group

from .codebook import Quantized, Quantizer, need, straight_through
from .packaged import package, require

LEVELS = range(3, 17)  # of one component of FSQ: the package rounds two levels in another way than three and more


class ProjectedQuantizer(Quantizer):
    """d components → Linear → m scalars (``components``), rounded one by one → Linear → z_q: no codebook to learn."""

    spread = 1.0  # standard deviation of the first scalars

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

    def scalars(self, codes: Tensor) -> Tensor:
        """The rounded scalars (N, m) of codes (N,)."""
        raise NotImplementedError

    def vectors(self, codes: Tensor) -> Tensor:
        """The inverse of the rounding, projected back."""
        return self.project_out(self.scalars(codes.flatten())).view(*codes.shape, self.code_dim)

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
        self.check(codebook_size, code_dim)
        levels = fsq_levels(codebook_size)
        super().__init__(codebook_size, code_dim, len(levels))
        with torch.device("cpu"):  # it looks at its levels, which on the meta device are not there; it learns nothing
            self.codec = package().FSQ(list(levels))

    @classmethod
    def check(cls, codebook_size: int, code_dim: int, **settings: Any) -> None:
        """Raises UserError unless K is a product of numbers in LEVELS."""
        require("fsq", "a product of 3 to 16 levels a component", codebook_size, lambda size: bool(fsq_levels(size)))

    def round(self, scalars: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rounded, codes = self.codec(scalars[None])
        return rounded[0], codes[0].long(), scalars.new_zeros(())

    def scalars(self, codes: Tensor) -> Tensor:
        """The package's inverse."""
        return self.codec.indices_to_codes(codes[None])[0]


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

    def __init__(self, codebook_size: int, code_dim: int, **shared: Any):
        self.check(codebook_size, code_dim)
        bits = codebook_size.bit_length() - 1
        super().__init__(codebook_size, code_dim, bits, **shared)
        self.codec = package().LFQ(dim=bits)

    @classmethod
    def check(cls, codebook_size: int, code_dim: int, **settings: Any) -> None:
        """Raises UserError unless K is a power of two, at least 2."""
        require("lfq", "a power of two", codebook_size, lambda size: size > 1 and size & (size - 1) == 0)

    def round(self, scalars: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self.codec.eval()  # in training it would hold all soft choices, N×K
        with torch.no_grad():
            signs, codes, _ = self.codec(scalars[None])
        distance = F.mse_loss(scalars, signs[0])
        loss = self.beta * distance + self.entropy_loss(scalars, self.codec.codebook, distance)
        return straight_through(scalars, signs[0]), codes[0].long(), loss

    def scalars(self, codes: Tensor) -> Tensor:
        """The package's inverse."""
        return self.codec.indices_to_codes(codes[None])[0]


class BSQQuantizer(ProjectedQuantizer):
    """Binary spherical quantization: m = log2 K components on the unit sphere, of which the signs remain, each ±1/√m.

    Zhao et al. 2024, "Image and Video Tokenization with Binary Spherical Quantization", section 3. Loss: commitment
    β‖u − û‖² and, by ``entropy_weight``, E[H(p)] − H(E[p]) of its eq. 7 in nats, where bits count as independent, so
    that no choice among K is ever held: p(bit) = σ(2 u û / σ²), σ² the batch's own mean squared distance.
    """

    settings = ("beta", "entropy_weight")

    def __init__(self, codebook_size: int, code_dim: int, **shared: Any):
        self.check(codebook_size, code_dim)
        self.bits = codebook_size.bit_length() - 1
        super().__init__(codebook_size, code_dim, self.bits, **shared)

    @classmethod
    def check(cls, codebook_size: int, code_dim: int, **settings: Any) -> None:
        """Raises UserError unless K is a power of two, at least 2."""
        need("bsq", "a power of two", codebook_size, lambda size: size > 1 and size & (size - 1) == 0)

    def round(self, scalars: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        directions = F.normalize(scalars, dim=1)
        chosen = directions >= 0
        signs = self._signs(chosen)
        distance = F.mse_loss(directions, signs)
        loss = self.beta * distance
        if self.training and self.entropy_weight:
            loss = loss + self.entropy_weight * bit_entropy(directions, self.bits**-0.5, distance)
        codes = torch.bitwise_left_shift(chosen.long(), torch.arange(self.bits, device=scalars.device)).sum(1)
        return straight_through(directions, signs), codes, loss

    def scalars(self, codes: Tensor) -> Tensor:
        """The signs that the bits of ``codes`` stand for, the lowest first."""
        places = torch.arange(self.bits, device=codes.device)
        return self._signs(torch.bitwise_right_shift(codes[:, None], places) & 1)  # ONNX has no word for >>

    def _signs(self, bits: Tensor) -> Tensor:
        return (2 * bits.float() - 1) * self.bits**-0.5


def bit_entropy(scalars: Tensor, level: float, distortion: Tensor) -> Tensor:
    """Σ over components of E[h(p)] − h(E[p]) in nats, with h the entropy of a bit: −m ln 2 when every token (N, m) is
    sure of all its bits and both values of each are in equal use, at most 0.

    A component is ±``level`` up to Gaussian noise of the variance ``distortion``, which is held. E[p] is over the
    tokens of all processes.
    """
    logits = 2 * level / group.mean(distortion).clamp_min(1e-12) * scalars
    p = logits.sigmoid()
    unsure = F.binary_cross_entropy_with_logits(logits, p, reduction="none").mean(0)
    mean = p.mean(0)
    everywhere = group.total(p.detach().sum(0)) / group.total(p.new_tensor(len(p)))
    mean = (mean + (everywhere - mean.detach())).clamp(1e-7, 1 - 1e-7)
    return (unsure - torch.special.entr(mean) - torch.special.entr(1 - mean)).sum()
