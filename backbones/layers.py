"""Pieces that two or more backbones share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from timm.layers import SwiGLU
from torch import Tensor, nn

Layer = Callable[[int], nn.Module]  # builds a layer of so many channels


def downsamplings(image_size: int, grid_size: int) -> int:
    """How often an image's side is halved to reach the grid: log2(image_size / grid_size).

    Raises ValueError unless grid_size divides image_size as a power of two (1, 2, 4, …).
    """
    factor = image_size // max(grid_size, 1)
    if grid_size < 1 or factor * grid_size != image_size or factor & (factor - 1):
        raise ValueError(f"grid_size {grid_size} does not divide image_size {image_size} as a power of two")
    return factor.bit_length() - 1


def pyramid(width: int, levels: int) -> list[int]:
    """Channels of each level of a pyramid, finest first: ``width`` at the grid, half of it one level above, a quarter
    further up, rounded up to multiples of 8. So no level costs more compute than the grid's own."""
    shares = [min(4, 2**above) for above in reversed(range(max(levels, 1)))]
    return [width if share == 1 else -(-width // (8 * share)) * 8 for share in shares]


def zero_init(layer: nn.Module) -> nn.Module:
    """Zeroes a residual branch's last layer: the network starts as its linear skeleton, whatever its depth."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def orthogonal(layer: nn.Module) -> nn.Module:
    """Orthogonal weights and zero biases in every convolution of ``layer`` (Saxe et al. 2014).

    A chain of them keeps the signal's size, where torch's default shrinks it by √3 a layer.
    """
    for part in layer.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.orthogonal_(part.weight)
            nn.init.zeros_(part.bias)
    return layer


def mlp(width: int) -> SwiGLU:
    """SwiGLU feed-forward layer on (…, width). Hidden width 8/3 of it, in steps of 8: as many parameters as the usual
    two-layer network with a hidden width of 4 (Shazeer 2020)."""
    layer = SwiGLU(width, hidden_features=round(width / 3) * 8, bias=False)
    zero_init(layer.fc2)
    return layer


class Downsample(nn.Conv2d):
    """Halves the side: a strided 2×2 convolution, one linear map of each 2×2 cell. (B, C, H, W) → (B, C', H/2, W/2)."""

    def __init__(self, channels: int, out_channels: int):
        super().__init__(channels, out_channels, 2, stride=2)


class Upsample(nn.Sequential):
    """Mirror of Downsample: a convolution makes each pixel a 2×2 cell. (B, C, H, W) → (B, C', 2H, 2W)."""

    def __init__(self, channels: int, out_channels: int, kernel: int = 1):
        super().__init__(nn.Conv2d(channels, 4 * out_channels, kernel, padding=kernel // 2), nn.PixelShuffle(2))


class PyramidEncoder(nn.Module):
    """Level by level: halve the side, then ``depth`` blocks at that resolution (van den Oord et al. 2017).

    (B, 3, image_size, image_size) in [-1, 1] → (B, code_dim, grid_size, grid_size). ``block(channels)`` builds one
    residual block on (B, channels, H, W), ``norm(channels)`` what precedes the last convolution. width: channels at the
    grid. No block runs at full resolution, where such networks would spend most of their time, unless grid_size equals
    image_size. Raises ValueError on a grid that does not divide the image as a power of two.
    """

    def __init__(
        self, block: Layer, norm: Layer, image_size: int, grid_size: int, code_dim: int, width: int, depth: int
    ):
        super().__init__()
        levels = downsamplings(image_size, grid_size)
        layers: list[nn.Module] = []
        inputs = 3
        for channels in pyramid(width, levels):
            step = Downsample(inputs, channels) if levels else nn.Conv2d(inputs, channels, 3, padding=1)
            layers.append(orthogonal(step))
            layers.extend(block(channels) for _ in range(depth))
            inputs = channels
        self.layers = nn.Sequential(*layers, norm(inputs), orthogonal(nn.Conv2d(inputs, code_dim, 1)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class PyramidDecoder(nn.Module):
    """Mirror of PyramidEncoder: (B, code_dim, grid_size, grid_size) → (B, 3, image_size, image_size), unbounded."""

    def __init__(
        self, block: Layer, norm: Layer, image_size: int, grid_size: int, code_dim: int, width: int, depth: int
    ):
        super().__init__()
        levels = downsamplings(image_size, grid_size)
        inputs, *finer = reversed(pyramid(width, levels))
        layers: list[nn.Module] = [orthogonal(nn.Conv2d(code_dim, inputs, 1)), *(block(inputs) for _ in range(depth))]
        for channels in finer:
            layers.append(orthogonal(Upsample(inputs, channels)))
            layers.extend(block(channels) for _ in range(depth))
            inputs = channels
        last = Upsample(inputs, 3, kernel=3) if levels else nn.Sequential(nn.Conv2d(inputs, 3, 3, padding=1))
        self.layers = nn.Sequential(*layers, norm(inputs), last)

    @property
    def last_layer(self) -> nn.Parameter:
        """The weight that turns features into pixels; the adaptive GAN weight is measured on its gradient."""
        return self.layers[-1][0].weight

    def forward(self, z: Tensor) -> Tensor:
        return self.layers(z)


class TokenEncoder(nn.Module):
    """Patches → tokens → ``depth`` blocks → codes-to-be: the encoder of ViT-VQGAN (Yu et al. 2022, section 3.1).

    (B, 3, image_size, image_size) in [-1, 1] → (B, code_dim, grid_size, grid_size). ``block(width)`` builds one
    residual block on (B, tokens, width). Raises ValueError on a grid that does not divide the image as a power of two.
    """

    def __init__(self, block: Layer, image_size: int, grid_size: int, code_dim: int, width: int, depth: int):
        super().__init__()
        patch = 2 ** downsamplings(image_size, grid_size)
        self.patchify = nn.Conv2d(3, width, patch, stride=patch)
        self.position = nn.Parameter(0.02 * torch.randn(grid_size**2, width))
        self.blocks = nn.Sequential(*(block(width) for _ in range(depth)))
        self.head = token_head(width, code_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patchify(x)
        grid = x.shape[-2:]
        x = self.blocks(x.flatten(2).transpose(1, 2) + self.position)
        return self.head(x).transpose(1, 2).unflatten(2, grid)


class TokenDecoder(nn.Module):
    """Mirror of TokenEncoder: (B, code_dim, grid_size, grid_size) → (B, 3, image_size, image_size), unbounded."""

    def __init__(self, block: Layer, image_size: int, grid_size: int, code_dim: int, width: int, depth: int):
        super().__init__()
        patch = 2 ** downsamplings(image_size, grid_size)
        self.embed = nn.Linear(code_dim, width)
        self.position = nn.Parameter(0.02 * torch.randn(grid_size**2, width))
        self.blocks = nn.Sequential(*(block(width) for _ in range(depth)))
        self.head = token_head(width, width)
        self.unpatchify = nn.ConvTranspose2d(width, 3, patch, stride=patch)

    @property
    def last_layer(self) -> nn.Parameter:
        """The weight that turns features into pixels; the adaptive GAN weight is measured on its gradient."""
        return self.unpatchify.weight

    def forward(self, z: Tensor) -> Tensor:
        grid = z.shape[-2:]
        x = self.head(self.blocks(self.embed(z.flatten(2).transpose(1, 2)) + self.position))
        return self.unpatchify(x.transpose(1, 2).unflatten(2, grid))


def token_head(width: int, out_features: int) -> nn.Sequential:
    """LayerNorm, then a two-layer tanh network that widens four times, as ViT-VQGAN has on both sides of the codes."""
    return nn.Sequential(
        nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Tanh(), nn.Linear(4 * width, out_features)
    )
