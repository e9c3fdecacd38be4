"""ViT-VQGAN with Mamba-2 in place of attention: the tokens are read in raster order, or in both orders."""

from functools import partial

from torch import Tensor, nn

from .layers import TokenDecoder, TokenEncoder, mlp, zero_init
from .ssd import Mamba2

STATE_DIM, HEAD_DIM = 32, 32  # small images need less memory than text: Mamba-2's own defaults are 128 and 64


def mixer(width: int) -> Mamba2:
    """A Mamba-2 layer that starts as zero, like every residual branch here."""
    layer = Mamba2(width, d_state=STATE_DIM, headdim=HEAD_DIM)
    zero_init(layer.out_proj)
    return layer


class MambaBlock(nn.Module):
    """Pre-norm Mamba-2 and SwiGLU on (B, tokens, width). A token sees those before it in raster order."""

    def __init__(self, width: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.mixer = mixer(width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = mlp(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class BidirectionalMambaBlock(nn.Module):
    """Two Mamba-2 layers that read the tokens in either direction, with one residual:
    x + forward(x) + flip(backward(flip(x))). Then SwiGLU, on (B, tokens, width)."""

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


Encoder = partial(TokenEncoder, [MambaBlock])
Decoder = partial(TokenDecoder, [MambaBlock])
BidirectionalEncoder = partial(TokenEncoder, [BidirectionalMambaBlock])
BidirectionalDecoder = partial(TokenDecoder, [BidirectionalMambaBlock])
