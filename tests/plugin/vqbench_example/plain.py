"""A backbone."""

from functools import partial

from torch import Tensor, nn

from backbones import PYRAMID, Backbone
from backbones.layers import PyramidDecoder, PyramidEncoder, zero_init


class Plain(nn.Module):
    """x + conv3×3(ReLU(x)) on (B, channels, H, W)."""

    def __init__(self, channels: int):
        super().__init__()
        self.branch = nn.Sequential(nn.ReLU(), zero_init(nn.Conv2d(channels, channels, 3, padding=1)))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


def norm(channels: int) -> nn.Module:
    return nn.Identity()


PLAIN = Backbone(partial(PyramidEncoder, Plain, norm), partial(PyramidDecoder, Plain, norm), *PYRAMID)
