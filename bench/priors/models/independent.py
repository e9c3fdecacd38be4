"""The floor: every position on its own."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .prior import Prior

COUNTED = 4096  # grids to count at a time
PSEUDOCOUNT = 0.5  # Jeffreys' prior: a code that was never seen at a position is unlikely, not impossible


class Independent(Prior):
    """A histogram of the codes of each position: what remains when codes are sampled "without global coherence".

    p(code k at i) = (n_ik + ½) / (n + K/2), from counts instead of gradients; see ``fit``. Given labels are ignored.
    """

    def __init__(self, codebook_size: int, grid: tuple[int, int], classes: int = 0):
        super().__init__(codebook_size, grid, classes)
        self.register_buffer("counts", torch.zeros(math.prod(grid), codebook_size, dtype=torch.int64))

    def fit(self, codes: np.ndarray) -> None:
        """Counts the codes (N, h, w), whole numbers, of each position, in place of those it had."""
        self.counts.zero_()
        rows = self.codebook_size * torch.arange(len(self.counts), device=self.counts.device)
        for start in range(0, len(codes), COUNTED):
            part = torch.from_numpy(np.asarray(codes[start : start + COUNTED], np.int64)).to(rows.device)
            found = torch.bincount((part.flatten(1) + rows).flatten(), minlength=self.counts.numel())
            self.counts += found.view_as(self.counts)

    def logits(self, codes: Tensor, labels: Tensor | None = None) -> Tensor:
        return self._log_p().view(1, *self.grid, -1).expand(len(codes), -1, -1, -1)

    def start(self, labels: Tensor | None, count: int) -> Any:
        return self._log_p()[:, None].expand(-1, count, -1)

    def step(self, position: int, before: Tensor | None, state: Any) -> tuple[Tensor, Any]:
        return state[position], state

    def _log_p(self) -> Tensor:
        weights = self.counts + PSEUDOCOUNT
        return (weights / weights.sum(1, keepdim=True)).log().float()
