"""How time grows with the size of a problem: measured at several sizes, and the exponent of the power law."""

import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

from backbones.layers import TransformerBlock
from backbones.ssd import Mamba2
from bench.core.progress import Bar
from bench.quantizers.codebook import nearest
from bench.tokenizers.config import make_config
from bench.tokenizers.train import TokenizerLearner
from bench.training.loop import learning_rate

from .contest import clocked

ROUNDS = 5


class Growth(NamedTuple):
    """``make(size, device)`` gives the work of one size of ``variable``; ``why``: the exponent that is expected."""

    variable: str
    sizes: tuple[int, ...]
    make: Callable[[int, str], Callable[[], object]]
    why: str


def _look_up(tokens: int, codes: int, device: str) -> Callable[[], object]:
    x, codebook = torch.randn(tokens, 32, device=device), torch.randn(codes, 32, device=device)
    return lambda: nearest(x, codebook)


def _layer(layer: torch.nn.Module, length: int, device: str) -> Callable[[], object]:
    layer, x = layer.to(device), torch.randn(4, length, 256, device=device).requires_grad_()
    return lambda: layer(x).sum().backward()


def _step(backbone: str, side: int, device: str) -> Callable[[], object]:
    config = make_config(backbone, image_size=side, grid_size=side // 8, batch_size=4, device=device).resolved()
    images = np.random.default_rng(0).integers(0, 256, (64, side, side, 3), dtype=np.uint8)
    learner = TokenizerLearner(config, images)
    learner.begin()
    return lambda: learner.step(1, learning_rate(config, 1))


LENGTHS = (256, 512, 1024, 2048, 4096)
SIDES = (32, 64, 128, 256)
GROWTH: dict[str, Growth] = {
    "look-up": Growth(
        "tokens",
        (4096, 8192, 16_384, 32_768, 65_536),
        lambda tokens, device: _look_up(tokens, 1024, device),
        "1: chunks of tokens of one size follow each other",
    ),
    "look-up, codes": Growth(
        "codes",
        (1024, 2048, 4096, 8192, 16_384),
        lambda codes, device: _look_up(8192, codes, device),
        "1: a token meets each code once",
    ),
    "Mamba-2 layer": Growth(
        "length",
        LENGTHS,
        lambda length, device: _layer(Mamba2(256), length, device),
        "1: attention inside chunks of 64, and a state between them",
    ),
    "attention layer": Growth(
        "length",
        LENGTHS,
        lambda length, device: _layer(TransformerBlock(256), length, device),
        "from 1, its linear layers, to 2, its products of all pairs",
    ),
    "step of cnn": Growth(
        "image side",
        SIDES,
        lambda side, device: _step("cnn", side, device),
        "2: the number of pixels, less what is the same at any size",
    ),
    "step of vit": Growth(
        "image side",
        SIDES,
        lambda side, device: _step("vit", side, device),
        "2, the number of tokens; attention adds to it at the largest",
    ),
    "step of mamba": Growth(
        "image side",
        SIDES,
        lambda side, device: _step("mamba", side, device),
        "2: the number of tokens, and no more",
    ),
}


def grow(name: str, growth: Growth, device: str) -> list[dict[str, Any]]:
    """A row for each size of ``growth``: the median of seconds, the exponent that all sizes together have, and that of
    the two largest alone, which says more of what grows without end."""
    rows = []
    with Bar(f"growth of {name}", len(growth.sizes)) as bar:
        for size in growth.sizes:
            torch.manual_seed(0)
            work = growth.make(size, device)
            work()
            seconds = statistics.median(clocked(work, device) for _ in range(ROUNDS))
            rows.append({"growth": name, "variable": growth.variable, "size": size, "seconds": seconds})
            bar.advance(1)
    sizes, seconds = (np.log([row[key] for row in rows]) for key in ("size", "seconds"))
    slopes = {"exponent": float(np.polyfit(sizes, seconds, 1)[0])}
    slopes["exponent_at_end"] = float(np.polyfit(sizes[-2:], seconds[-2:], 1)[0])
    return [{**row, **slopes, "expected": growth.why} for row in rows]
