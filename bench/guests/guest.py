"""What an adapter makes of the name of a guest: a codec between our images and its codes."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.core.errors import UserError
from bench.metrics import Codec


class Sides(NamedTuple):
    """Encoder, images → vectors, and decoder, vectors → images: what parameters and FLOPs are counted of."""

    encoder: nn.Module
    decoder: nn.Module


@dataclass(frozen=True)
class Guest:
    """A codec that was not trained here, in eval mode on ``device``, and what there is to know about it."""

    name: str  # as it was called
    codec: Codec
    codebook_size: int | None  # K; None where there are no codes
    digest: str  # of what its results depend on
    device: str
    about: dict[str, str] = field(default_factory=dict)  # what it is and where it is from, in words
    sides: Sides | None = None  # where they can be told apart
    lookup: Callable[[Tensor], Tensor] | None = None  # codes (B, h, w) → (B, d, h, w), where codes have vectors
    resize_to: int = 0  # side that images have for it; 0: that of the data
    pixels: bool = False  # its latents are images, with no grid of patches to look for
    made: np.ndarray | None = None  # what it makes of the whole split, (N, H, W, 3) uint8, where that is all there is
    folder: Path | None = None  # the run, of one of ours

    def resized(self, size: int, image_size: int) -> "Guest":
        """The same, of images that are resized to ``size`` before it and back to ``image_size`` after it. Raises
        UserError where it takes any size."""
        if self.pixels:
            raise UserError(f"{self.name} takes images of any size; leave out --resize-to, or score it by itself")
        return replace(self, codec=Adapted(self.codec, image_size, size), resize_to=size)

    @torch.no_grad()
    def latent(self, image_size: int) -> Tensor:
        """What it makes of one grey image of that size. Raises UserError where it cannot take such images, or where
        what it gives back is no such image."""
        x = torch.zeros(1, 3, image_size, image_size, device=self.device)
        try:
            codes = self.codec.encode(x)
            x_hat = self.codec.decode(codes)
        except (RuntimeError, ValueError, TypeError, AttributeError, IndexError) as error:
            said = str(error).strip().partition("\n")[0] or type(error).__name__
            raise UserError(f"{self.name} cannot take images of {image_size}×{image_size} ({said}); {FIX}") from error
        for what, value in (("encode", codes), ("decode", x_hat)):
            if not isinstance(value, Tensor):
                raise UserError(f"{self.name} gives a {type(value).__name__} from {what} where a tensor belongs")
        if x_hat.shape != x.shape:
            shapes = f"{tuple(x_hat.shape)} of images of shape {tuple(x.shape)}"
            raise UserError(f"{self.name} makes images of shape {shapes}; {FIX}")
        if self.codebook_size is not None and (codes.is_floating_point() or codes.ndim != 3):
            raise UserError(
                f"{self.name} has a codebook_size and encodes to {codes.dtype} {tuple(codes.shape)}; codes are whole "
                "numbers (B, h, w)"
            )
        return codes


FIX = "give another --image-size, or --resize-to a size that it takes"


class Adapted:
    """A codec that takes and gives images of another ``size``, resized bicubically and antialiased, 0 being theirs, and
    of values in [``low``, ``high``]; to whoever uses it they are of ``image_size`` and in [-1, 1]."""

    def __init__(self, codec: Codec, image_size: int = 0, size: int = 0, low: float = -1.0, high: float = 1.0):
        self.codec, self.image_size, self.size, self.low, self.span = codec, image_size, size, low, high - low
        if hasattr(codec, "encode_with_bits"):
            self.encode_with_bits = lambda x: codec.encode_with_bits(self._into(x))

    def encode(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] → what the codec makes of them, adapted."""
        return self.codec.encode(self._into(x))

    def decode(self, codes: Tensor) -> Tensor:
        """The reverse, clamped."""
        x = (self.codec.decode(codes) - self.low) * (2 / self.span) - 1
        return (_scaled(x, self.image_size) if self.size else x).clamp(-1, 1)

    def _into(self, x: Tensor) -> Tensor:
        x = _scaled(x, self.size).clamp(-1, 1) if self.size else x
        return self.low + (x + 1) * (self.span / 2)


def _scaled(x: Tensor, size: int) -> Tensor:
    return F.interpolate(x, size=(size, size), mode="bicubic", antialias=True, align_corners=False)
