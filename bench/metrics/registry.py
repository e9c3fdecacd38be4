"""What every metric has to say about itself, and what every evaluator has to do."""

from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor


class Metric(NamedTuple):
    """How a metric is shown: its label, number format, and which direction is better ("lower", "higher" or "")."""

    label: str
    form: str
    better: str

    @property
    def arrow(self) -> str:
        """↓ where lower is better, ↑ where higher is, else nothing."""
        return {"lower": "↓", "higher": "↑", "": ""}[self.better]


class Codec(Protocol):
    """Anything that turns images into codes, or another latent, and back. One whose rate does not follow from its codes
    has ``encode_with_bits`` as well, which gives the bits of each image, (B,), beside them."""

    def encode(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] → (B, h, w) int64."""

    def decode(self, codes: Tensor) -> Tensor:
        """(B, h, w) int64 → (B, 3, H, W) in [-1, 1]."""


class Setup(NamedTuple):
    """What is known before the first batch. codebook_size: K, or None where there are no codes. fid_weights: as
    ``weights.given`` takes it."""

    codebook_size: int | None
    device: torch.device
    fid_weights: Path | None = None


class Batch(NamedTuple):
    """Originals ``x`` and their reconstructions ``x_hat``, (B, 3, H, W) uint8 each, and the codes between them,
    (B, h, w) int64 in [0, codebook_size), or latents (B, d, h, w): all on the device of ``Setup``. ``bits``: of each
    image, (B,), where its rate is measured rather than log2 K per code."""

    x: Tensor
    x_hat: Tensor
    codes: Tensor
    bits: Tensor | None = None


class Evaluator:
    """Takes an evaluation set in batches and gives metrics of the whole of it.

    METRICS: those that it may give, by name. Of metrics that each image has on its own, ``keep`` remembers the values
    and ``result`` gives the means; siblings with metrics of the set as a whole add them, and what these are made of to
    ``seen`` and ``join``, by which several processes score together.
    """

    METRICS: ClassVar[dict[str, Metric]]

    def __init__(self, setup: Setup):
        self.setup = setup
        self.kept: dict[str, list[Tensor]] = {}

    def update(self, batch: Batch) -> None:
        """Adds a batch."""
        raise NotImplementedError

    def keep(self, **scores: Tensor) -> None:
        """Adds (B,) values of each of these metrics."""
        for name, values in scores.items():
            self.kept.setdefault(name, []).append(values.cpu())

    def seen(self) -> dict[str, Any]:
        """What was seen so far, to be sent to another process."""
        return {"kept": self.kept}

    def join(self, seen: dict[str, Any]) -> None:
        """Adds what another has ``seen``, of the images that follow."""
        for name, batches in seen["kept"].items():
            self.kept.setdefault(name, []).extend(batches)

    @property
    def per_image(self) -> dict[str, np.ndarray]:
        """(N,) float32 of each metric that was kept, in the order of the updates."""
        return {name: torch.cat(batches).numpy() for name, batches in self.kept.items()}

    def result(self) -> dict[str, float]:
        """Metrics by name, over everything seen. ValueError for fewer images than they need."""
        return {name: float(values.mean(dtype=np.float64)) for name, values in self.per_image.items()}
