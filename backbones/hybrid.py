"""Mamba first, attention last: the order of MambaVision (Hatamizadeh & Kautz 2024, arXiv 2407.08083), on tokens.

Of each side's blocks the first half mixes by a state space and the second by self-attention, which recovers the global
context that a scan loses (the paper's ablation of hybrid patterns). Of an odd depth the scan has the larger half.

How the first half mixes is an option. Unless told otherwise two Mamba-2 layers read the tokens in either direction;
with ``vision_mixer`` it is the paper's own mixer, in which a branch without a scan, beside the scan, lets a token know
what comes after it. Not taken from the paper: its convolutional stages and windows, since all backbones of tokens here
share patches and one grid.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import TokenDecoder, TokenEncoder, TransformerBlock, zero_init
from .mamba import HEAD_DIM, STATE_DIM, BidirectionalMambaBlock, MambaBlock
from .ssd import scan_parameters, ssd_scan


class VisionMixer(nn.Module):
    """Two branches over (B, tokens, width), each σ(Conv(Linear(x))) with half of the channels, one of them scanned;
    their concatenation goes through a linear layer (the paper's equations 6 and 7; σ is SiLU, Conv spans 3 tokens and
    looks both ways). Other than there the scan is Mamba-2's, with its initialisation, in heads of 32."""

    def __init__(self, width: int):
        super().__init__()
        self.heads = max(1, round(width / 2 / HEAD_DIM))
        self.inner = self.heads * HEAD_DIM
        self.in_proj = nn.Linear(width, 2 * self.inner, bias=False)
        self.conv = nn.Conv1d(2 * self.inner, 2 * self.inner, 3, padding=1, groups=2 * self.inner)
        self.scan_proj = nn.Linear(self.inner, 2 * STATE_DIM + self.heads, bias=False)
        self.dt_bias, self.A_log, self.D = scan_parameters(self.heads)
        self.out_proj = zero_init(nn.Linear(2 * self.inner, width, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        scanned, beside = F.silu(self.conv(self.in_proj(x).transpose(1, 2))).transpose(1, 2).chunk(2, -1)
        B, C, dt = self.scan_proj(scanned).float().split([STATE_DIM, STATE_DIM, self.heads], -1)
        dt = F.softplus(dt + self.dt_bias)
        heads = scanned.unflatten(-1, (self.heads, HEAD_DIM))
        y = ssd_scan(heads, dt, -self.A_log.exp(), B.unsqueeze(2), C.unsqueeze(2), self.D)
        return self.out_proj(torch.cat([y.flatten(2), beside], -1))


class VisionBlock(MambaBlock):
    """The same block around a VisionMixer."""

    def __init__(self, width: int):
        super().__init__(width, VisionMixer)


def hybrid(side: Callable[..., nn.Module], *shape: int, vision_mixer: bool = False, **options: Any) -> nn.Module:
    """TokenEncoder or TokenDecoder with blocks of both kinds."""
    return side([VisionBlock if vision_mixer else BidirectionalMambaBlock, TransformerBlock], *shape, **options)


Encoder = partial(hybrid, TokenEncoder)
Decoder = partial(hybrid, TokenDecoder)
