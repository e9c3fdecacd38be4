"""Residual CNN in the manner of VQ-VAE (van den Oord et al. 2017, section 4.1): ReLU and convolutions, no norm.

Residual branches start at zero, so that no norm is needed to train it; on CPUs GroupNorm and SiLU would cost as much as
the convolutions between them.
"""

from functools import partial

from torch import Tensor, nn

from .layers import PyramidDecoder, PyramidEncoder, zero_init


class ResidualBlock(nn.Module):
    """x + conv3×3(ReLU(conv3×3(ReLU(x)))) on (B, channels, H, W)."""

    def __init__(self, channels: int):
        super().__init__()
        self.branch = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(),
            zero_init(nn.Conv2d(channels, channels, 3, padding=1)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


def activation(channels: int) -> nn.Module:
    """What precedes the last convolution, whatever the number of channels."""
    return nn.ReLU()


Encoder = partial(PyramidEncoder, ResidualBlock, activation)
Decoder = partial(PyramidDecoder, ResidualBlock, activation)
