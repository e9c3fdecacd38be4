"""Attention over the tokens of an image, and the gated feed-forward layer beside it.

Parameters have the names, and results the bits, of timm's layers of the same names, so that weights travel both ways;
these need nothing but torch.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEAD_DIM = 32  # channels of a head
FEW = 256  # tokens up to which matrix products are the faster attention on CPUs in bfloat16, six times for 64
SLOWEST = 100.0  # how many times slower than the first pair of channels one behind the last would turn


class Attention(nn.Module):
    """Multi-head attention among the tokens of each image, on (B, tokens, width): as many heads of 32 as ``width``
    holds, rounded up, so that any width will do. With ``rotation``, sines and cosines of ``turns``, queries and keys
    are rotated by them."""

    def __init__(self, width: int):
        super().__init__()
        self.heads = -(-width // HEAD_DIM)
        self.qkv = nn.Linear(width, 3 * self.heads * HEAD_DIM, bias=False)
        self.proj = nn.Linear(self.heads * HEAD_DIM, width)

    def forward(self, x: Tensor, *rotation: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, HEAD_DIM)).permute(2, 0, 3, 1, 4)
        if rotation:
            q, k = turned(q, *rotation), turned(k, *rotation)
        return self.proj(mixed(q, k, v).transpose(1, 2).flatten(2))


def mixed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ / √d) v of each head: (B, heads, tokens, d) each, and so is what comes out."""
    if q.device.type == "cpu" and torch.is_autocast_enabled("cpu") and q.shape[2] <= FEW:
        return (q * q.shape[3] ** -0.5 @ k.mT).softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


def turned(x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
    """Each pair of channels of ``x`` (B, heads, tokens, d) turned by the angle whose ``sin`` and ``cos``, (tokens, d),
    both of its channels have."""
    quarter = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
    return (x * cos + quarter * sin).to(x.dtype)


class Turns(nn.Module):
    """Sines and cosines, (height · width, HEAD_DIM) each, of the angles that the pairs of channels of a head are turned
    by where a token lies: the first half by its row, the second by its column, each pair slower than the one before."""

    def __init__(self):
        super().__init__()
        pairs = HEAD_DIM // 4
        speeds = 1 / SLOWEST ** (torch.arange(pairs) / pairs)
        self.register_buffer("speeds", speeds, persistent=False)

    def forward(self, height: int, width: int) -> tuple[Tensor, Tensor]:
        sides = [torch.arange(side, device=self.speeds.device).to(self.speeds) for side in (height, width)]
        cells = torch.stack(torch.meshgrid(*sides, indexing="ij"), -1).flatten(0, 1)
        angles = (cells.unsqueeze(-1) * self.speeds).flatten(1)
        return tuple(values.repeat_interleave(2, 1) for values in (angles.sin(), angles.cos()))


class SwiGLU(nn.Module):
    """Feed-forward layer on (…, width) whose ``hidden`` channels each have a gate (Shazeer 2020)."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1_g = nn.Linear(width, hidden, bias=False)
        self.fc1_x = nn.Linear(width, hidden, bias=False)
        self.fc2 = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.fc1_g(x)
        return self.fc2(F.silu(gate) * self.fc1_x(x))
