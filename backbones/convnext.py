"""ConvNeXt in the NeXtformer form: depthwise 7×7 convolutions and SwiGLU, both behind a norm.

The norm is ConvNeXt's own, LayerNorm over the channels (Liu et al. 2022): on CPUs it is one fused pass, three to eight
times faster than RMSNorm under bfloat16.
"""

from functools import partial

from torch import Tensor, nn

from .layers import PyramidDecoder, PyramidEncoder, mlp, timm_layer, zero_init


def norm(channels: int) -> nn.Module:
    """LayerNorm over the channels of (B, channels, H, W)."""
    return timm_layer("LayerNorm2d")(channels)


class NeXtformerBlock(nn.Module):
    """x = dwconv7×7(LN(x)) + x; x = SwiGLU(LN(x)) + x, on (B, channels, H, W)."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm1 = norm(channels)
        self.depthwise = zero_init(nn.Conv2d(channels, channels, 7, padding=3, groups=channels))
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = mlp(channels)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.depthwise(self.norm1(x))
        return x + self.mlp(self.norm2(x.movedim(1, -1))).movedim(-1, 1)


Encoder = partial(PyramidEncoder, NeXtformerBlock, norm)
Decoder = partial(PyramidDecoder, NeXtformerBlock, norm)
