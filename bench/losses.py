"""Reconstruction losses on images in [-1, 1]; pure functions of (x_hat, x), both (B, 3, H, W) float, to a scalar."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

RECONSTRUCTION: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "l1": F.l1_loss,  # E|x̂ − x|
    "l2": F.mse_loss,  # E(x̂ − x)²
}
