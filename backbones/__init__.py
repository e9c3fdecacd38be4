"""What is compared: encoder-decoder backbones with one signature, chosen by name.

Every Encoder and Decoder is built as ``(image_size, grid_size, code_dim, width, depth)`` and maps
(B, 3, image_size, image_size) in [-1, 1] to (B, code_dim, grid_size, grid_size) and back. At one grid all of them make
the same number of tokens, so all of them spend the same bits. To add one: write ``backbones/NAME.py`` and add a line to
``BACKBONES``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import nn

from . import torchvision_repair  # noqa: F401  isort: skip  (before timm, which imports torchvision)
from . import cnn, convnext, mamba, vit


class Backbone(NamedTuple):
    """An Encoder and its mirror. The Decoder's ``last_layer`` is the weight that makes pixels."""

    Encoder: Callable[..., nn.Module]
    Decoder: Callable[..., nn.Module]


BACKBONES: dict[str, Backbone] = {
    "cnn": Backbone(cnn.Encoder, cnn.Decoder),
    "convnext": Backbone(convnext.Encoder, convnext.Decoder),
    "vit": Backbone(vit.Encoder, vit.Decoder),
    "mamba": Backbone(mamba.Encoder, mamba.Decoder),
    "bimamba": Backbone(mamba.BidirectionalEncoder, mamba.BidirectionalDecoder),
}
