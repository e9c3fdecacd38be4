"""Priors that read the grid as a sequence: embed the code before, then layers that look back, then a softmax.

The layers are what differs: recurrent, attention or Mamba-2. Each is a residual block on (B, tokens, width) with a
state of its past: ``start(count)`` gives the empty one, and ``step(x, state)`` continues it by one token.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones.attention import HEAD_DIM
from backbones.layers import Layer, mlp, zero_init
from backbones.mamba import MambaBlock

from .prior import Prior

ROOM = 64  # keys and values that attention has room for at first


class SequencePrior(Prior):
    """Codes in ``token_order``, each predicted from an embedding of the one before and the layers' memory of the rest;
    the first from a learned start, or its label. ``dropout`` is of the embeddings and of what each layer adds."""

    def __init__(
        self,
        layer: Layer,
        codebook_size: int,
        grid: tuple[int, int],
        width: int,
        depth: int,
        dropout: float,
        classes: int = 0,
        token_order: str = "raster",
        unlabelled: bool = False,
    ):
        super().__init__(codebook_size, grid, classes, token_order, unlabelled)
        self.embedding = nn.Embedding(codebook_size, width)
        self.first = nn.Embedding(max(classes, 1) + unlabelled, width)  # one row per label
        self.position = nn.Parameter(0.02 * torch.randn(self.tokens, width))
        for table in (self.embedding, self.first):
            nn.init.normal_(table.weight, std=0.02)
            table.weight._no_weight_decay = True
        self.layers = nn.ModuleList(layer(width) for _ in range(depth))
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, codebook_size)
        zero_init(self.head)  # starts as the uniform distribution

    def logits(self, codes: Tensor, labels: Tensor | None = None) -> Tensor:
        x = torch.cat([self._first(labels, len(codes)), self.embedding(codes.flatten(1)[:, self.order[:-1]])], 1)
        x = self.dropout(x + self.position)
        for layer in self.layers:
            x = x + self.dropout(layer(x) - x)
        return self.head(self.norm(x[:, self.places])).unflatten(1, codes.shape[1:])  # not logits: they are K wide

    def start(self, labels: Tensor | None, count: int) -> Any:
        return self._first(labels, count), [layer.start(count) for layer in self.layers]

    def step(self, position: int, before: Tensor | None, state: Any) -> tuple[Tensor, Any]:
        first, states = state
        x = first if before is None else self.embedding(before)[:, None]
        x, after = x + self.position[position], []
        for layer, memory in zip(self.layers, states, strict=True):
            x, memory = layer.step(x, memory)
            after.append(memory)
        return self.head(self.norm(x))[:, 0], (first, after)

    def _first(self, labels: Tensor | None, count: int) -> Tensor:
        if labels is None:
            labels = torch.zeros(count, dtype=torch.int64, device=self.position.device)
        return self.first(labels)[:, None]


class RecurrentLayer(nn.Module):
    """Pre-norm LSTM (Hochreiter & Schmidhuber 1997) over the sequence of codes, then SwiGLU."""

    def __init__(self, width: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.lstm = nn.LSTM(width, width, batch_first=True)
        self.out = zero_init(nn.Linear(width, width))
        self.norm2 = nn.LayerNorm(width)
        self.mlp = mlp(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.step(x, None)[0]

    def start(self, count: int) -> None:
        """Zeros, which is what ``nn.LSTM`` starts from."""

    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        """x (B, tokens, width) and (h, c) → the same shape, and (h, c) after them."""
        hidden, state = self.lstm(self.norm1(x), state)
        x = x + self.out(hidden)
        return x + self.mlp(self.norm2(x)), state


class CausalTransformerLayer(nn.Module):
    """Pre-norm attention to the tokens up to one's own, then SwiGLU. Keys and values of the past are its state, in
    buffers with room for more, which double when they are full: no step copies all of the past."""

    def __init__(self, width: int):
        super().__init__()
        self.heads = max(1, width // HEAD_DIM)
        self.head_dim = math.ceil(width / self.heads)
        inner = self.heads * self.head_dim
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * inner, bias=False)
        self.out = zero_init(nn.Linear(inner, width))
        self.norm2 = nn.LayerNorm(width)
        self.mlp = mlp(width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self._qkv(x)
        return self._rest(x, F.scaled_dot_product_attention(q, k, v, is_causal=True))

    def start(self, count: int) -> tuple[Tensor, Tensor, int]:
        """Room for a few keys and values, and none of them."""
        room = self.qkv.weight.new_empty(count, self.heads, ROOM, self.head_dim)
        return room, torch.empty_like(room), 0

    def step(self, x: Tensor, state: tuple[Tensor, Tensor, int]) -> tuple[Tensor, tuple[Tensor, Tensor, int]]:
        """x (B, 1, width) and (keys, values, past), of which the first (B, heads, past, head_dim) count → the same
        shape, and those with x's. What was given must not be used again: its buffers are written to."""
        q, k, v = self._qkv(x)
        keys, values, past = state
        if past == keys.shape[2]:
            keys, values = (torch.cat([one, torch.empty_like(one)], 2) for one in (keys, values))
        keys[:, :, past], values[:, :, past] = k[:, :, 0], v[:, :, 0]
        past += 1
        attended = F.scaled_dot_product_attention(q, keys[:, :, :past], values[:, :, :past])
        return self._rest(x, attended), (keys, values, past)

    def _qkv(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, self.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)

    def _rest(self, x: Tensor, attended: Tensor) -> Tensor:
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class CausalMambaLayer(MambaBlock):
    """The backbone's Mamba-2 block, which is causal, with its recurrent state: a step costs the same wherever it is."""

    def start(self, count: int) -> Any:
        """An empty convolution window and a zero state."""
        return self.mixer.initial_cache(count)

    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        """x (B, 1, width) and a Cache → the same shape, and the Cache after it."""
        mixed, state = self.mixer.step(self.norm1(x), state)
        x = x + mixed
        return x + self.mlp(self.norm2(x)), state
