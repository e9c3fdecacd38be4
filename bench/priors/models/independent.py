"""The floor: every position on its own."""

from typing import Any

import torch
from torch import Tensor

from .prior import Prior

PSEUDOCOUNT = 0.5  # Jeffreys' prior: a code that was never seen at a position is unlikely, not impossible


class Independent(Prior):
    """A histogram of the codes of each position: what remains when codes are sampled "without global coherence".

    p(code k at i) = (n_ik + ½) / (n + K/2), from counts instead of gradients; see ``fit``. Given labels are ignored.
    """

    def __init__(self, codebook_size: int, grid_size: int, classes: int = 0):
        super().__init__(codebook_size, grid_size, classes)
        self.register_buffer("counts", torch.zeros(grid_size**2, codebook_size, dtype=torch.int64))

    def fit(self, codes: Tensor) -> None:
        """Counts the codes (N, h, w) int64 of each position, in place of those it had."""
        flat = codes.flatten(1) + self.codebook_size * torch.arange(self.grid_size**2, device=codes.device)
        self.counts = torch.bincount(flat.flatten(), minlength=self.counts.numel()).view_as(self.counts)

    def logits(self, codes: Tensor, labels: Tensor | None = None) -> Tensor:
        return self._log_p().view(1, self.grid_size, self.grid_size, -1).expand(len(codes), -1, -1, -1)

    def start(self, labels: Tensor | None, count: int) -> Any:
        return self._log_p()[:, None].expand(-1, count, -1)

    def step(self, position: int, before: Tensor | None, state: Any) -> tuple[Tensor, Any]:
        return state[position], state

    def _log_p(self) -> Tensor:
        weights = self.counts + PSEUDOCOUNT
        return (weights / weights.sum(1, keepdim=True)).log().float()
