"""What is compared: encoder-decoder backbones with one signature, chosen by name.

Every Encoder and Decoder is built as ``(image_size, grid_size, code_dim, width, depth, **options)`` and maps
(B, 3, image_size, image_size) in [-1, 1] to (B, code_dim, grid_size, grid_size) and back. At one grid all of them make
the same number of tokens, so all of them spend the same bits. docs/extending.md says how to add one.
"""

import difflib
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from torch import nn

from . import cnn, convnext, hybrid, mamba, vit
from .plugins import plugged
from .torchvision_repair import repair


class Backbone(NamedTuple):
    """An Encoder and its mirror, whose ``last_layer`` is the weight that makes pixels; and the options of either."""

    Encoder: Callable[..., nn.Module]
    Decoder: Callable[..., nn.Module]
    encoder_options: tuple[str, ...] = ("attention",)
    decoder_options: tuple[str, ...] = ("attention",)

    @property
    def options(self) -> set[str]:
        """What either side takes."""
        return {*self.encoder_options, *self.decoder_options}


TOKENS = ("attention", "patch_overlap"), ("attention", "patch_overlap", "final_conv")
PYRAMID = ("attention", "full_resolution"), ("attention", "full_resolution")


def _with(*names: str, both: Sequence[tuple[str, ...]] = TOKENS) -> list[tuple[str, ...]]:
    """The options of ``both`` sides and further ones."""
    return [(*options, *names) for options in both]


BACKBONES: dict[str, Backbone] = {
    "cnn": Backbone(cnn.Encoder, cnn.Decoder, *PYRAMID),
    "convnext": Backbone(convnext.Encoder, convnext.Decoder, *_with("rms_norm", both=PYRAMID)),
    "vit": Backbone(vit.Encoder, vit.Decoder, *_with("rotary")),
    "mamba": Backbone(mamba.Encoder, mamba.Decoder, *_with("token_order")),
    "bimamba": Backbone(mamba.BidirectionalEncoder, mamba.BidirectionalDecoder, *_with("token_order", "two_streams")),
    "hybrid": Backbone(hybrid.Encoder, hybrid.Decoder, *_with("token_order", "vision_mixer", "rotary")),
}
BACKBONES |= plugged("backbones", BACKBONES)
# What each is, in a line; one that has none here is listed without.
ABOUT = {
    "cnn": "residual CNN, as in VQ-VAE: ReLU and convolutions",
    "convnext": "ConvNeXt blocks at every resolution: wide depthwise convolutions",
    "vit": "ViT-VQGAN: attention among patches on either side",
    "mamba": "Mamba-2 in place of attention, reading patches in one order",
    "bimamba": "Mamba-2 that reads patches from both ends",
    "hybrid": "Mamba-2 first, attention last, as in MambaVision",
    "timm:MODEL": "the encoder is that model of timm, the decoder cnn's",
}
TIMM_OPTIONS = ("attention", "pretrained")  # of the Encoder of timm:MODEL
OPTIONS = sorted({*TIMM_OPTIONS, *(name for chosen in BACKBONES.values() for name in chosen.options)})  # of any of them


def backbone(name: str) -> Backbone:
    """The backbone called ``name``: a key of BACKBONES, or ``timm:MODEL`` for a model of timm and the decoder of cnn.

    Raises ValueError on any other name, saying which there are.
    """
    kind, _, model = name.partition(":")
    if kind == "timm":
        repair()
        from . import timm_encoder  # and timm, which takes longer than all else here

        timm_encoder.check_name(model)
        return Backbone(partial(timm_encoder.Encoder, model), cnn.Decoder, TIMM_OPTIONS)
    if name not in BACKBONES:
        near = difflib.get_close_matches(name, BACKBONES, 1)
        perhaps = f"; perhaps {near[0]}" if near else ""
        perhaps = "; separate several by spaces" if "," in name else perhaps
        raise ValueError(f"unknown backbone {name!r}; choose from {', '.join(BACKBONES)} or timm:MODEL{perhaps}")
    return BACKBONES[name]


def users(option: str) -> list[str]:
    """Names of the backbones that take ``option``."""
    taken = {name: chosen.options for name, chosen in BACKBONES.items()} | {"timm:MODEL": TIMM_OPTIONS}
    return [name for name, options in taken.items() if option in options]
