"""Orders in which a grid of tokens is read, for layers and priors to which that makes a difference.

=======  =====================================================================================================
raster   row by row, each from left to right
columns  column by column, each from top to bottom
snake    row by row, every second one from right to left: neighbours in the sequence are neighbours in the grid
hilbert  along Hilbert's curve, which also keeps neighbours of the grid close (Hilbert 1891); sides of 2, 4, 8, …
=======  =====================================================================================================
"""

import functools
import itertools
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn


def _raster(height: int, width: int) -> Tensor:
    return torch.arange(height * width, device="cpu")


def _columns(height: int, width: int) -> Tensor:
    return _raster(height, width).view(height, width).T.flatten()


def _snake(height: int, width: int) -> Tensor:
    cells = _raster(height, width).view(height, width)
    return torch.stack([row.flip(0) if i % 2 else row for i, row in enumerate(cells)]).flatten()


def _hilbert(height: int, width: int) -> Tensor:
    if height != width or height & (height - 1):
        raise ValueError(f"a Hilbert order needs a square grid whose side is a power of two, not {height}×{width}")
    cells = torch.zeros(
        1, 1, dtype=torch.int64, device="cpu"
    )  # place along the curve of each cell; four copies make the next
    while len(cells) < height:
        quarter = cells.numel()
        left = torch.cat([cells.T, cells + quarter])  # in at the upper left corner, turned; down
        right = torch.cat([cells.flip(0, 1).T + 3 * quarter, cells + 2 * quarter])  # across, up, and out
        cells = torch.cat([left, right], 1)
    return cells.flatten().argsort()


ORDERS: dict[str, Callable[[int, int], Tensor]] = {
    "raster": _raster,
    "columns": _columns,
    "snake": _snake,
    "hilbert": _hilbert,
}
# What one block after the other reads by: VMamba's two directions (Liu et al. 2024, section 4.2) take turns.
TURNS: dict[str, tuple[str, ...]] = {**{name: (name,) for name in ORDERS}, "cross": ("raster", "columns")}


@functools.lru_cache(64)
def order(name: str, height: int, width: int) -> Tensor:
    """The cells of a grid, numbered in raster order, in the order ``name`` of ORDERS: (height · width,) int64. Raises
    ValueError where the grid has none of that name."""
    with torch.inference_mode(False):  # else a first call during evaluation would spoil it for training
        return ORDERS[name](height, width)


def read(blocks: Iterable[nn.Module], tokens: Tensor, turns: str, height: int, width: int) -> Tensor:
    """``tokens`` (B, height · width, channels) in raster order after all ``blocks``, of which those that are
    ``sequential`` each read them in the order that is their turn in TURNS, and those that are ``planar`` are told
    ``height`` and ``width``. Raises ValueError as ``order`` does."""
    names = itertools.cycle(TURNS[turns])
    for block in blocks:
        name = next(names) if getattr(block, "sequential", False) else "raster"
        if getattr(block, "planar", False):
            tokens = block(tokens, height, width)
        elif name == "raster":
            tokens = block(tokens)
        else:
            places = order(name, height, width).to(tokens.device)
            tokens = block(tokens[:, places])[:, places.argsort()]
    return tokens
