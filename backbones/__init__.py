"""What is compared: encoder-decoder backbones with one signature, chosen by name.

Every Encoder and Decoder is built as ``(image_size, grid_size, code_dim, width, depth, **options)`` and maps
(B, 3, image_size, image_size) in [-1, 1] to (B, code_dim, grid_size, grid_size) and back. At one grid all of them make
the same number of tokens, so all of them spend the same bits. To add one: write ``backbones/NAME.py`` and add a line to
``BACKBONES``. Widths are solved for, so any from 1 on has to work, and a greater one may not have fewer parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from torch import nn

from . import torchvision_repair  # noqa: F401  isort: skip  (before timm, which imports torchvision)
from . import cnn, convnext, hybrid, mamba, timm_encoder, vit


class Backbone(NamedTuple):
    """An Encoder and its mirror, with the names of the options that either takes.

    The Decoder's ``last_layer`` is the weight that makes pixels.
    """

    Encoder: Callable[..., nn.Module]
    Decoder: Callable[..., nn.Module]
    encoder_options: tuple[str, ...] = ("attention",)
    decoder_options: tuple[str, ...] = ("attention",)

    @property
    def options(self) -> set[str]:
        """What either side takes."""
        return {*self.encoder_options, *self.decoder_options}


TOKENS = ("attention", "patch_overlap"), ("attention", "patch_overlap", "final_conv")

BACKBONES: dict[str, Backbone] = {
    "cnn": Backbone(cnn.Encoder, cnn.Decoder),
    "convnext": Backbone(convnext.Encoder, convnext.Decoder),
    "vit": Backbone(vit.Encoder, vit.Decoder, *TOKENS),
    "mamba": Backbone(mamba.Encoder, mamba.Decoder, *TOKENS),
    "bimamba": Backbone(mamba.BidirectionalEncoder, mamba.BidirectionalDecoder, *TOKENS),
    "hybrid": Backbone(hybrid.Encoder, hybrid.Decoder, *TOKENS),
}
TIMM = Backbone(
    timm_encoder.Encoder, cnn.Decoder, ("attention", "pretrained")
)  # its Encoder takes the model's name too


def backbone(name: str) -> Backbone:
    """The backbone called ``name``: a key of BACKBONES, or ``timm:MODEL`` for a model of timm and the decoder of cnn.

    Raises ValueError on any other name, saying which there are.
    """
    kind, _, model = name.partition(":")
    if kind == "timm":
        timm_encoder.check_name(model)
        return TIMM._replace(Encoder=partial(TIMM.Encoder, model))
    if name not in BACKBONES:
        raise ValueError(f"unknown backbone {name!r}; choose from {', '.join(BACKBONES)} or timm:MODEL")
    return BACKBONES[name]


def users(option: str) -> list[str]:
    """Names of the backbones that take ``option``."""
    return [name for name, chosen in {**BACKBONES, "timm:MODEL": TIMM}.items() if option in chosen.options]
