"""Pieces that two or more backbones share."""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import Attention, SwiGLU, Turns
from .orders import read

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
    """Orthogonal weights and zero biases in every convolution of ``layer`` (Saxe et al. 2014): a chain of them keeps
    the signal's size, where torch's default shrinks it by √3 a layer."""
    for part in layer.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.orthogonal_(part.weight)
            nn.init.zeros_(part.bias)
    return layer


def mlp(width: int) -> nn.Module:
    """SwiGLU on (…, width). Hidden width 8/3 of it, in steps of 8: as many parameters as the usual two-layer network
    with a hidden width of 4."""
    layer = SwiGLU(width, round(width / 3) * 8)
    zero_init(layer.fc2)
    return layer


class TransformerBlock(nn.Module):
    """Pre-norm attention over the tokens of each image, then SwiGLU, on (B, tokens, width)."""

    def __init__(self, width: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width)
        zero_init(self.attention.proj)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = mlp(width)

    def forward(self, x: Tensor, *rotation: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x), *rotation)
        return x + self.mlp(self.norm2(x))


class RotaryBlock(TransformerBlock):
    """The same, but where a token lies is told by rotating queries and keys, half of their channels by its row and half
    by its column, so that attention knows distances alone and takes grids of any size (Heo et al. 2024, "Rotary
    Position Embedding for Vision Transformer", axial frequencies, section 3.2)."""

    planar = True  # needs to know the shape of the grid

    def __init__(self, width: int):
        super().__init__(width)
        self.attention = Attention(width)  # drawn once more, so that a seed's weights stay what they were
        zero_init(self.attention.proj)
        self.turns = Turns()

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        return super().forward(x, *self.turns(height, width))


def blocks(kinds: Sequence[Layer], width: int, depth: int, rotary: bool = False) -> list[nn.Module]:
    """``depth`` blocks of equal shares of each kind, in order; where they do not divide, earlier kinds get more. Those
    of attention are ``rotary`` or not."""
    kinds = [RotaryBlock if rotary and kind is TransformerBlock else kind for kind in kinds]
    return [kinds[i * len(kinds) // depth](width) for i in range(depth)]


def positions(learned: Tensor, height: int, width: int) -> Tensor:
    """Positions of a grid of height × width, from ``learned`` ones of a square grid, (side², channels): those
    themselves for a grid of as many cells, else bicubically interpolated (Dosovitskiy et al. 2021, section 3.2)."""
    if height * width == len(learned):
        return learned
    side = math.isqrt(len(learned))
    grid = learned.T.unflatten(1, (side, side))[None]
    return F.interpolate(grid, size=(height, width), mode="bicubic")[0].flatten(1).T


class GridTransformer(nn.Module):
    """``layers`` transformer blocks, with learned positions, over the pixels of (B, width, grid_size, grid_size), or of
    a grid of another size, for which ``positions`` are interpolated."""

    def __init__(self, width: int, grid_size: int, layers: int):
        super().__init__()
        self.position = nn.Parameter(0.02 * torch.randn(grid_size**2, width))
        self.blocks = nn.Sequential(*blocks([TransformerBlock], width, layers))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.blocks(x.flatten(2).transpose(1, 2) + positions(self.position, *x.shape[-2:]))
        return tokens.transpose(1, 2).unflatten(2, x.shape[-2:])


def grid_attention(width: int, grid_size: int, attention: int) -> list[nn.Module]:
    """What ``attention`` adds to a convolutional side next to the codes: one GridTransformer, or nothing for 0."""
    return [GridTransformer(width, grid_size, attention)] if attention else []


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
    grid. attention: transformer layers at the grid, after the blocks. No block runs at full resolution, where it would
    take longest, unless grid_size equals image_size or with full_resolution, which has blocks of a further level there.
    Raises ValueError as ``downsamplings`` does.
    """

    def __init__(
        self,
        block: Layer,
        norm: Layer,
        image_size: int,
        grid_size: int,
        code_dim: int,
        width: int,
        depth: int,
        attention: int = 0,
        full_resolution: bool = False,
    ):
        super().__init__()
        levels = downsamplings(image_size, grid_size)
        pixels = full_resolution or not levels  # whether the finest level is that of the image
        layers, inputs = [], 3
        for i, channels in enumerate(pyramid(width, levels + full_resolution)):
            step = nn.Conv2d(inputs, channels, 3, padding=1) if pixels and i == 0 else Downsample(inputs, channels)
            layers.append(orthogonal(step))
            layers.extend(block(channels) for _ in range(depth))
            inputs = channels
        layers += grid_attention(inputs, grid_size, attention)
        self.layers = nn.Sequential(*layers, norm(inputs), orthogonal(nn.Conv2d(inputs, code_dim, 1)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class PyramidDecoder(nn.Module):
    """Mirror of PyramidEncoder: (B, code_dim, grid_size, grid_size) → (B, 3, image_size, image_size), unbounded."""

    def __init__(
        self,
        block: Layer,
        norm: Layer,
        image_size: int,
        grid_size: int,
        code_dim: int,
        width: int,
        depth: int,
        attention: int = 0,
        full_resolution: bool = False,
    ):
        super().__init__()
        levels = downsamplings(image_size, grid_size)
        inputs, *finer = reversed(pyramid(width, levels + full_resolution))
        layers = [orthogonal(nn.Conv2d(code_dim, inputs, 1)), *grid_attention(inputs, grid_size, attention)]
        layers.extend(block(inputs) for _ in range(depth))
        for channels in finer:
            layers.append(orthogonal(Upsample(inputs, channels)))
            layers.extend(block(channels) for _ in range(depth))
            inputs = channels
        pixels = full_resolution or not levels
        last = nn.Sequential(nn.Conv2d(inputs, 3, 3, padding=1)) if pixels else Upsample(inputs, 3, kernel=3)
        self.layers = nn.Sequential(*layers, norm(inputs), last)

    @property
    def last_layer(self) -> nn.Parameter:
        """The weight that turns features into pixels; the adaptive GAN weight is measured on its gradient."""
        return self.layers[-1][0].weight

    def forward(self, z: Tensor) -> Tensor:
        return self.layers(z)


def patches(image_size: int, grid_size: int, overlap: bool) -> dict[str, int]:
    """Kernel size, stride and padding of the (transposed) convolution between images and tokens. A patch is a grid
    cell; with ``overlap`` it is twice as wide and reaches half a cell into each neighbour (for cells of one pixel:
    3×3). Raises ValueError as ``downsamplings`` does."""
    stride = 2 ** downsamplings(image_size, grid_size)
    kernel = max(2 * stride, 3) if overlap else stride
    return {"kernel_size": kernel, "stride": stride, "padding": (kernel - stride) // 2}


class TokenEncoder(nn.Module):
    """Patches → tokens → ``depth`` blocks → codes-to-be: the encoder of ViT-VQGAN (Yu et al. 2022, section 3.1).

    (B, 3, image_size, image_size) in [-1, 1] → (B, code_dim, grid_size, grid_size). Each of ``kinds(width)`` builds a
    residual block on (B, tokens, width); ``depth`` is shared between them. attention: transformer layers after the
    blocks. patch_overlap, errors: see ``patches``. token_order: in which blocks read the tokens, one of TURNS. rotary:
    RotaryBlock in place of TransformerBlock, and no learned positions. Images of other sizes, multiples of a patch, get
    interpolated ``positions`` where these are learned.
    """

    def __init__(
        self,
        kinds: Sequence[Layer],
        image_size: int,
        grid_size: int,
        code_dim: int,
        width: int,
        depth: int,
        attention: int = 0,
        patch_overlap: bool = False,
        token_order: str = "raster",
        rotary: bool = False,
    ):
        super().__init__()
        self.token_order = token_order
        self.patchify = nn.Conv2d(3, width, **patches(image_size, grid_size, patch_overlap))
        self.position = None if rotary else nn.Parameter(0.02 * torch.randn(grid_size**2, width))
        self.blocks = nn.Sequential(
            *blocks(kinds, width, depth, rotary), *blocks([TransformerBlock], width, attention, rotary)
        )
        self.head = token_head(width, code_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patchify(x)
        grid = x.shape[-2:]
        tokens = x.flatten(2).transpose(1, 2)
        if self.position is not None:
            tokens = tokens + positions(self.position, *grid)
        tokens = self.head(read(self.blocks, tokens, self.token_order, *grid))
        return tokens.transpose(1, 2).unflatten(2, grid)


class TokenDecoder(nn.Module):
    """Mirror of TokenEncoder: (B, code_dim, grid_size, grid_size) → (B, 3, image_size, image_size), unbounded.

    The transformer layers of ``attention`` come before the blocks, next to the codes. With patch_overlap, patches are
    summed where they overlap. final_conv: a 3×3 convolution of the assembled image.
    """

    def __init__(
        self,
        kinds: Sequence[Layer],
        image_size: int,
        grid_size: int,
        code_dim: int,
        width: int,
        depth: int,
        attention: int = 0,
        patch_overlap: bool = False,
        final_conv: bool = False,
        token_order: str = "raster",
        rotary: bool = False,
    ):
        super().__init__()
        self.token_order = token_order
        self.embed = nn.Linear(code_dim, width)
        self.position = None if rotary else nn.Parameter(0.02 * torch.randn(grid_size**2, width))
        self.blocks = nn.Sequential(
            *blocks([TransformerBlock], width, attention, rotary), *blocks(kinds, width, depth, rotary)
        )
        self.head = token_head(width, width)
        self.unpatchify = nn.ConvTranspose2d(width, 3, **patches(image_size, grid_size, patch_overlap))
        self.final_conv = nn.Conv2d(3, 3, 3, padding=1) if final_conv else nn.Identity()

    @property
    def last_layer(self) -> nn.Parameter:
        """The weight that turns features into pixels; the adaptive GAN weight is measured on its gradient."""
        return getattr(self.final_conv, "weight", self.unpatchify.weight)

    def forward(self, z: Tensor) -> Tensor:
        grid = z.shape[-2:]
        tokens = self.embed(z.flatten(2).transpose(1, 2))
        if self.position is not None:
            tokens = tokens + positions(self.position, *grid)
        tokens = self.head(read(self.blocks, tokens, self.token_order, *grid))
        return self.final_conv(self.unpatchify(tokens.transpose(1, 2).unflatten(2, grid)))


def token_head(width: int, out_features: int) -> nn.Sequential:
    """LayerNorm, then a two-layer tanh network that widens four times, as ViT-VQGAN has on both sides of the codes."""
    return nn.Sequential(
        nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Tanh(), nn.Linear(4 * width, out_features)
    )
