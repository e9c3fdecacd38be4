"""Any timm model that gives feature maps, as an encoder: ``timm:resnet18``, ``timm:vit_tiny_patch16_224``, …

Its decoder is that of ``cnn``. Where a model has BatchNorm, the images of a training batch are normalised together, as
its authors trained it; in eval mode, in which tokenizers are scored and used, each image stands alone. ``Features`` are
those of a model that is not trained.
"""

import difflib
import math
import sys
import textwrap
from collections.abc import Mapping
from typing import Any

import timm
import torch
import torch.nn.functional as F
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
        scale, shift = normalisation(model)
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("shift", shift, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x * self.scale + self.shift)[0])


class Features(nn.Module):
    """Features of timm's model ``name``, frozen: (B, 3, image_size, image_size) in [-1, 1] → (B, ``channels``,
    grid_size, grid_size), of each image alone and without a gradient.

    The map is the one whose stride is nearest to image_size / grid_size, behind the model's final norm where it is
    meant to have one. Images are enlarged until that map has a position for every cell of the grid: to 224 pixels for
    patches of 14 and 16×16 cells. Where they have more positions as they are, a cell gets the mean of those in it.

    state: the model's weights, for any image size, as timm or its authors published them; without it timm's own, out of
    its cache or from the network. Raises ValueError, one sentence, if the model cannot be had, or not from ``state``.
    """

    def __init__(self, name: str, image_size: int, grid_size: int, state: Mapping[str, Tensor] | None = None):
        super().__init__()
        check_name(name)
        info = feature_maps(name, image_size)[0].feature_info
        strides = dict(zip(info.out_indices, info.reduction(), strict=True))
        self.level = nearest(strides, image_size / grid_size)
        self.image_size = strides[self.level] * max(grid_size, round(image_size / strides[self.level]))
        self.grid_size = grid_size
        try:
            self.model = timm.create_model(name, state is None, num_classes=0, **sized(name, self.image_size))
        except Exception as error:
            if state is not None:
                raise ValueError(f"timm's {name} cannot be made ({reason(error)}); choose another model") from error
            raise ValueError(f"{unloaded(name, error)}, or name a file with them: --alignment-file") from error
        if state is not None:
            load(self.model, state, name)
        scale, shift = normalisation(self.model)
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("shift", shift, persistent=False)
        self.requires_grad_(False).eval()
        self.channels = self(torch.zeros(1, 3, image_size, image_size)).shape[1]

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.image_size:
            x = F.interpolate(x, (self.image_size, self.image_size), mode="bicubic", antialias=True)
        options = {"norm": True, "stop_early": True, "intermediates_only": True}
        [found] = self.model.forward_intermediates(x * self.scale + self.shift, [self.level], **options)
        return F.adaptive_avg_pool2d(found, self.grid_size)


def load(model: nn.Module, state: Mapping[str, Tensor], name: str) -> None:
    """Puts weights of timm's ``name`` into ``model``, converted as timm converts those that it fetches: for the size of
    its images, and from their authors' names. What it has no use for, such as a classifier, is left out. Raises
    ValueError where one of its own is missing, or of another shape."""
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", lambda state, model: state)
    try:
        missing = model.load_state_dict(convert(dict(state), model), strict=False).missing_keys
        wrong = f"{missing[0]} is missing" if missing else ""
    except Exception as error:  # each family of models has a conversion of its own
        wrong = reason(error)
    if wrong:
        raise ValueError(f"these are no weights of timm's {name} ({wrong}); name a file with its own")


def normalisation(model: nn.Module) -> tuple[Tensor, Tensor]:
    """Scale and shift, (3, 1, 1), from pixels in [-1, 1] to the mean and deviation that ``model`` was trained with."""
    mean, std = (torch.tensor(model.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    return 0.5 / std, (0.5 - mean) / std


def check_name(name: str) -> None:
    """Raises ValueError, with the nearest names, unless timm has a model ``name``, with or without a tag of weights."""
    try:
        get_pretrained_cfg(name, allow_unregistered=False)
    except RuntimeError as error:
        near = difflib.get_close_matches(name, timm.list_models() + timm.list_pretrained())
        hint = f"did you mean {' or '.join(near)}?" if near else "timm.list_models() gives them all"
        raise ValueError(f"unknown timm model {name!r}; {hint}") from error


def nearest_level(name: str, image_size: int, stride: int) -> int:
    """timm's index of the feature map whose stride is ``nearest`` to ``stride``.

    Raises ValueError if the model has none whose cells are squares of 1, 2, 4, … pixels that cover the image.
    """
    net, maps = feature_maps(name, image_size)
    strides = {}
    for level, s, x in zip(net.feature_info.out_indices, net.feature_info.reduction(), maps, strict=True):
        if s.bit_count() == 1 and s * x.shape[2] == s * x.shape[3] == image_size:
            strides[level] = s
    if not strides:
        raise ValueError(f"timm's {name} divides {image_size}×{image_size} images into no such grid; choose another")
    return nearest(strides, stride)


def nearest(strides: Mapping[int, int], stride: float) -> int:
    """The key of ``strides`` whose stride is nearest to ``stride``: the finer, then the deeper of equals."""
    return min(strides, key=lambda level: (abs(math.log2(strides[level] / stride)), strides[level], -level))


def feature_maps(
    name: str, image_size: int, pretrained: bool = False, **options: Any
) -> tuple[nn.Module, list[Tensor]]:
    """timm's model ``name`` as a network that gives feature maps, and those of a blank image, (1, C, h, w) each.

    Raises ValueError if it cannot be made or loaded, or does not take images of that size.
    """
    try:
        options |= {"features_only": True, "feature_cls": "getter", **sized(name, image_size)}
        net = timm.create_model(name, pretrained=pretrained, **options)
        with torch.no_grad():
            maps = net.eval()(torch.zeros(1, 3, image_size, image_size))  # in eval mode it leaves no trace
    except Exception as error:  # a thousand models, and the clients of several hubs, raise what they like
        if pretrained:
            raise ValueError(f"{unloaded(name, error)}, or leave out --pretrained") from error
        size = f"{image_size}×{image_size}"
        raise ValueError(f"timm's {name} gives no features of {size} images ({reason(error)})") from error
    return net.train(), maps


def sized(name: str, image_size: int) -> dict[str, int]:
    """What timm's model ``name`` has to be told of the size of its images."""
    return {"img_size": image_size} if get_pretrained_cfg(name).fixed_input_size else {}


def unloaded(name: str, error: Exception) -> str:
    """That timm's weights are not to be had, and how they might be."""
    what = f"timm's weights of {name} could not be loaded ({reason(error)})"
    return f"{what}; fetch them once where there is a network"


def reason(error: Exception) -> str:
    """What timm said, in one line of bounded length."""
    return textwrap.shorten(str(error) or type(error).__name__, 160)
