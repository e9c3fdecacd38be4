"""Any timm model that gives feature maps, as an encoder: ``timm:resnet18``, ``timm:vit_tiny_patch16_224``, …

Its decoder is that of ``cnn``. Where a model has BatchNorm, the images of a training batch are normalised together, as
its authors trained it; in eval mode, in which tokenizers are scored and used, each image stands alone.
"""

import difflib
import math
import textwrap
from typing import Any

import timm
import torch
from timm.layers import LayerNorm2d
from timm.models import get_pretrained_cfg
from torch import Tensor, nn

from .layers import Downsample, Upsample, downsamplings, grid_attention, orthogonal


class Encoder(nn.Module):
    """A feature map of timm's model ``name``, brought to the grid's size and projected by a 1×1 convolution.

    (B, 3, image_size, image_size) in [-1, 1] → (B, code_dim, grid_size, grid_size); the model gets images of its own
    mean and standard deviation. Its feature map is that of ``nearest_level``, and what lies behind it is dropped. Where
    its stride is not image_size / grid_size, Downsample or Upsample layers follow: a ViT with patches of 16 makes 4×4
    tokens of a 64×64 image, upsampled for an 8×8 grid. A LayerNorm evens out the scales of different models' features.

    width and depth are the decoder's: an encoder's size is in its name. attention: transformer layers at the grid,
    before the projection. pretrained: start from timm's weights, out of its cache or from the network. Raises
    ValueError, one sentence, if the model cannot be had, or not for this image_size and grid_size.
    """

    def __init__(
        self,
        name: str,
        image_size: int,
        grid_size: int,
        code_dim: int,
        width: int,
        depth: int,
        attention: int = 0,
        pretrained: bool = False,
    ):
        super().__init__()
        level = nearest_level(name, image_size, 2 ** downsamplings(image_size, grid_size))
        self.features, [blank] = feature_maps(name, image_size, out_indices=[level], pretrained=pretrained)
        channels, side = blank.shape[1:3]
        halvings = round(math.log2(side / grid_size))
        resize = [Downsample] * halvings + [Upsample] * -halvings
        self.head = nn.Sequential(
            *(orthogonal(step(channels, channels)) for step in resize),
            *grid_attention(channels, grid_size, attention),
            LayerNorm2d(channels),
            orthogonal(nn.Conv2d(channels, code_dim, 1)),
        )
        model = self.features.model
        spared = getattr(model, "no_weight_decay", set)()  # timm's word for position embeddings and the like
        for key, parameter in model.named_parameters():
            parameter._no_weight_decay = key in spared
        mean, std = (torch.tensor(model.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
        self.register_buffer("scale", 0.5 / std, persistent=False)
        self.register_buffer("shift", (0.5 - mean) / std, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x * self.scale + self.shift)[0])


def check_name(name: str) -> None:
    """Raises ValueError, with the nearest names, unless timm has a model ``name``, with or without a tag of weights."""
    try:
        get_pretrained_cfg(name, allow_unregistered=False)
    except RuntimeError as error:
        near = difflib.get_close_matches(name, timm.list_models() + timm.list_pretrained())
        hint = f"did you mean {' or '.join(near)}?" if near else "timm.list_models() gives them all"
        raise ValueError(f"unknown timm model {name!r}; {hint}") from error


def nearest_level(name: str, image_size: int, stride: int) -> int:
    """timm's index of the feature map whose stride is nearest to ``stride``: the finer, then the deeper of equals.

    Raises ValueError if the model has none whose cells are squares of 1, 2, 4, … pixels that cover the image.
    """
    net, maps = feature_maps(name, image_size)
    strides = {}
    for level, s, x in zip(net.feature_info.out_indices, net.feature_info.reduction(), maps, strict=True):
        if s.bit_count() == 1 and s * x.shape[2] == s * x.shape[3] == image_size:
            strides[level] = s
    if not strides:
        raise ValueError(f"timm's {name} divides {image_size}×{image_size} images into no such grid; choose another")
    return min(strides, key=lambda level: (abs(math.log2(strides[level] / stride)), strides[level], -level))


def feature_maps(
    name: str, image_size: int, pretrained: bool = False, **options: Any
) -> tuple[nn.Module, list[Tensor]]:
    """timm's model ``name`` as a network that gives feature maps, and those of a blank image, (1, C, h, w) each.

    Raises ValueError if it cannot be made or loaded, or does not take images of that size.
    """
    size = {"img_size": image_size} if get_pretrained_cfg(name).fixed_input_size else {}
    try:
        options |= {"features_only": True, "feature_cls": "getter", **size}
        net = timm.create_model(name, pretrained=pretrained, **options)
        with torch.no_grad():
            maps = net.eval()(torch.zeros(1, 3, image_size, image_size))  # in eval mode it leaves no trace
    except Exception as error:  # a thousand models, and the clients of several hubs, raise what they like
        reason = textwrap.shorten(str(error) or type(error).__name__, 160)
        if pretrained:
            fix = "fetch them once where there is a network, or leave out --pretrained"
            raise ValueError(f"timm's weights of {name} could not be loaded ({reason}); {fix}") from error
        raise ValueError(f"timm's {name} gives no features of {image_size}×{image_size} images ({reason})") from error
    return net.train(), maps
