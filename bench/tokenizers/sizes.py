"""How large a model is, told by shapes alone: its parameters, and the width that gives it so many."""

import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from backbones import BACKBONES, OPTIONS, backbone
from bench.core.device import check_memory
from bench.core.files import cache_dir, cached, seal, sha256_file, sha256_json, unseal_numbers

if TYPE_CHECKING:
    from .config import Config

TOLERANCE = 0.02  # of a budget of parameters or FLOPs
WIDEST = 8192


def sides(config: "Config") -> list[Callable[[], nn.Module]]:
    """What builds the encoder of ``config``, and what builds its decoder."""
    *modules, encoder_options, decoder_options = backbone(config.backbone)
    shape = (config.image_size, config.grid_size, config.code_dim, config.width, config.depth)
    return [
        partial(module, *shape, **{name: getattr(config, name) for name in options})
        for module, options in zip(modules, (encoder_options, decoder_options), strict=True)
    ]


def remembered(config: "Config", what: str, count: Callable[[], dict[str, int]]) -> dict[str, int]:
    """``count()``, numbers that follow from the shapes of ``config`` alone and are called ``what``; or, where the same
    code has counted them before, what the cache has: who asks for sizes that are known builds no models."""
    if config.backbone not in BACKBONES or not _is_ours(backbone(config.backbone)):
        return count()
    shape = ("backbone", "image_size", "grid_size", "code_dim", "width", "depth", *OPTIONS)
    key = sha256_json([what, *(getattr(config, name) for name in shape), _code()])

    def write(path: Path) -> None:
        path.write_text(seal(count()))

    try:
        return cached(cache_dir() / "sizes" / f"{key[:16]}.json", write, unseal_numbers)
    except OSError:  # a cache that cannot be written is none
        return count()


def _is_ours(part: Any) -> bool:
    """Whether all that ``part`` of a backbone is made of is code that ``_code`` knows."""
    if isinstance(part, partial):
        return all(map(_is_ours, (part.func, *part.args, *part.keywords.values())))
    if isinstance(part, list | tuple):
        return all(map(_is_ours, part))
    return not callable(part) or part.__module__.partition(".")[0] in ("backbones", "torch")


@cache
def _code() -> list[str]:
    """Digests of the code that builds and counts models, and what it stands on."""
    folders = Path(sys.modules["backbones"].__file__).parent, Path(__file__).parent
    files = [sha256_file(path) for folder in folders for path in sorted(folder.glob("*.py"))]
    return [*files, torch.__version__]


def parameter_count(module: nn.Module) -> int:
    """Scalars that training would change in ``module``."""
    return sum(parameter.numel() for parameter in module.parameters())


@cache
def parameters(config: "Config") -> int:
    """Parameters of encoder and decoder; nothing is allocated, and no weights are fetched."""
    return remembered(config, "parameters", lambda: {"parameters": count_parameters(config)})["parameters"]


def count_parameters(config: "Config") -> int:
    """``parameters``, of which nothing is remembered."""
    with torch.device("meta"):
        return sum(parameter_count(build()) for build in sides(replace(config, pretrained=False)))


def check_size(config: "Config", device: str, copies: int = 1) -> None:
    """Raises UserError where so many ``copies`` of a tokenizer do not fit into the memory of ``device``."""
    own = replace(config, backbone="cnn") if config.backbone.startswith("timm:") else config  # and of timm a decoder
    check_memory(copies * (count_parameters(own) + config.codebook_size * config.code_dim), device)


@cache
def width_of(config: "Config", amount: int) -> int:
    """The width at which ``config``, whose own width does not matter, has ``amount`` parameters or nearly so."""
    return nearest_width(lambda width: parameters(replace(config, width=width)), amount)


def nearest_width(cost: Callable[[int], float], amount: float) -> int:
    """The width up to WIDEST whose ``cost(width)`` is nearest to ``amount``; cost must not fall as width grows. Looks a
    few times where cost grows about with the square of width, and at most a few dozen times where it does not."""
    low, high, width, step = 1, WIDEST, 64, 1  # cost(low) < amount <= cost(high), but for the ends
    while high - low > 1:
        found = cost(width)
        guess = round(width * (amount / found) ** 0.5)
        if found < amount:
            low, guess = width, max(guess, width + step)
        else:
            high, guess = width, min(guess, width - step)
        width = guess if low < guess < high else (low + high) // 2
        step *= 2
    return min((low, high), key=lambda width: abs(cost(width) - amount))


def nearest_size(cost: Callable[[int, int], float], amount: float, depths: Iterable[int]) -> tuple[int, int]:
    """Width and depth at which ``cost(width, depth)`` is within TOLERANCE of ``amount``, at the first of ``depths``
    where a width is; if there is none, the nearest of all. Depths below 1 are passed over."""

    def error(size: tuple[int, int]) -> float:
        return abs(cost(*size) / amount - 1)

    sizes = []
    for depth in depths:
        if depth >= 1:
            sizes.append((nearest_width(lambda width, depth=depth: cost(width, depth), amount), depth))
            if error(sizes[-1]) <= TOLERANCE:
                return sizes[-1]
    return min(sizes, key=error)
