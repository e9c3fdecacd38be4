"""ViT-VQGAN (Yu et al. 2022): a vision transformer on either side of the codes."""

from __future__ import annotations

from functools import partial

from timm.layers import Attention
from torch import Tensor, nn

from .layers import TokenDecoder, TokenEncoder, mlp, zero_init

HEAD_DIM = 32


class TransformerBlock(nn.Module):
    """Pre-norm attention over the tokens of each image, then SwiGLU, on (B, tokens, width).

    As many heads of 32 as ``width`` holds, rounded up, so that any width will do.
    """

    def __init__(self, width: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, num_heads=-(-width // HEAD_DIM), attn_head_dim=HEAD_DIM)
        zero_init(self.attention.proj)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = mlp(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


Encoder = partial(TokenEncoder, TransformerBlock)
Decoder = partial(TokenDecoder, TransformerBlock)
