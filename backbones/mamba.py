"""ViT-VQGAN with Mamba-2 in place of attention: the tokens are read in an order, or from both its ends."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from .layers import Layer, TokenDecoder, TokenEncoder, mlp, zero_init
from .ssd import Mamba2

STATE_DIM, HEAD_DIM = 32, 32  # small images need less memory than text: Mamba-2's own defaults are 128 and 64


def mixer(width: int) -> Mamba2:
    """A Mamba-2 layer that starts as zero, like every residual branch here."""
    layer = Mamba2(width, d_state=STATE_DIM, headdim=HEAD_DIM)
    zero_init(layer.out_proj)
    return layer


class MambaBlock(nn.Module):
    """Pre-norm ``mix(width)``, unless told otherwise Mamba-2, by which a token sees those before it, and SwiGLU, on
    (B, tokens, width)."""

    sequential = True

    def __init__(self, width: int, mix: Layer = mixer):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.mixer = mix(width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = mlp(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class BidirectionalMambaBlock(nn.Module):
    """Two Mamba-2 layers that read the tokens in either direction, with one residual:
    x + forward(x) + flip(backward(flip(x))). Then SwiGLU, on (B, tokens, width)."""

    sequential = True

    def __init__(self, width: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.forward_mixer = mixer(width)
        self.backward_mixer = mixer(width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = mlp(width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.forward_mixer(y) + self.backward_mixer(y.flip(1)).flip(1)
        return x + self.mlp(self.norm2(x))


class TwoStreamsBlock(nn.Module):
    """A residual stream for either direction, each with a Mamba-2 layer and a SwiGLU of its own, whose sum goes on: the
    bidirectional block of the blog post "Lessons in training VQGAN", after bidirectional LSTMs. On (B, tokens, width).
    So what a block does not change it doubles; LayerNorm stands where the post has RMSNorm, as in all backbones here.
    """

    sequential = True

    def __init__(self, width: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)  # of both streams
        self.mixers = nn.ModuleList(mixer(width) for _ in range(2))
        self.norms2 = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.mlps = nn.ModuleList(mlp(width) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        streams = []
        for mix, norm2, feed, stream in zip(self.mixers, self.norms2, self.mlps, (x, x.flip(1)), strict=True):
            stream = stream + mix(self.norm1(stream))
            streams.append(stream + feed(norm2(stream)))
        return streams[0] + streams[1].flip(1)


Encoder = partial(TokenEncoder, [MambaBlock])
Decoder = partial(TokenDecoder, [MambaBlock])


def bidirectional(side: Callable[..., nn.Module], *shape: int, two_streams: bool = False, **options: Any) -> nn.Module:
    """TokenEncoder or TokenDecoder with blocks that read in both directions."""
    return side([TwoStreamsBlock if two_streams else BidirectionalMambaBlock], *shape, **options)


BidirectionalEncoder = partial(bidirectional, TokenEncoder)
BidirectionalDecoder = partial(bidirectional, TokenDecoder)
