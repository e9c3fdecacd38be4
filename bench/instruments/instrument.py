"""What every instrument has to say about itself, and what it is given."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bench.data import eval_batches
from bench.metrics import Codec, Metric, from_uint8, full_precision, to_uint8

BATCH = 32  # images at once, as many as runs are scored with


@dataclass(frozen=True)
class Subject:
    """A trained codec, and the images that it is looked at with."""

    codec: Codec
    lookup: Callable[[Tensor], Tensor] | None  # codes (B, h, w) int64 → (B, d, h, w) float32; None where unknown
    codebook_size: int
    images: np.ndarray  # those that it is scored on, (N, H, W, 3) uint8
    train: np.ndarray  # those that it was trained on, the same
    labels: tuple[np.ndarray, np.ndarray] | None  # of ``train`` and of ``images``, (N,) int64 from 0; None without any
    at: Callable[[int], np.ndarray]  # ``images`` at another size; UserError where they cannot be had
    device: str = "cpu"

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) uint8 → codes (N, h, w) int64, of a codec without codes (N, d, h, w) float; in float32."""
        parts = []
        for part in x.split(BATCH):
            part = from_uint8(part.to(self.device))
            with full_precision(part.device):
                parts.append(self.codec.encode(part))
        return torch.cat(parts)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """What ``encode`` gives → (N, 3, H, W) uint8, clamped and rounded; in float32."""
        with full_precision(codes.device):
            return torch.cat([to_uint8(self.codec.decode(part)) for part in codes.split(BATCH)])

    def few(self, count: int) -> Tensor:
        """At most ``count`` evenly spaced ones of ``images``, (n, 3, H, W) uint8."""
        return pixels(self.images[spread(len(self.images), count)]).to(self.device)

    def codeless(self) -> str:
        """Why there are no codes to look at, in one sentence; empty where there are some."""
        continuous = self.encode(self.few(1)).is_floating_point()
        return "what lies between encoder and decoder are numbers and no codes; choose another quantizer" * continuous

    def vectorless(self) -> str:
        """Why there are no codes with vectors to look at, alike."""
        return self.codeless() or "the vectors of its codes are not known; give it a lookup" * (self.lookup is None)


def spread(total: int, count: int) -> np.ndarray:
    """At most ``count`` evenly spaced rows of ``total``: (n,) int64, ascending."""
    return np.linspace(0, total - 1, min(count, total), dtype=np.int64)


def pixels(images: np.ndarray) -> Tensor:
    """(N, H, W, 3) uint8 → (N, 3, H, W) uint8, in the memory layout that scores are computed in."""
    return next(eval_batches(images, len(images)))


def arrays(x: Tensor) -> np.ndarray:
    """(N, 3, H, W) uint8 → (N, H, W, 3) uint8, for pictures."""
    return x.permute(0, 2, 3, 1).cpu().numpy()


class Reading(NamedTuple):
    """What an instrument found: its metrics by name, and what writes its picture as PNG where it has one."""

    metrics: dict[str, float]
    draw: Callable[[Path], None] | None = None


class Instrument(NamedTuple):
    """One way to look at a trained tokenizer besides its scores.

    ``version`` is raised when the same weights would give other numbers: older readings are taken again.
    """

    about: str  # what it asks, in one line
    version: int
    seconds: float  # of one CPU core that it takes after the default run: convnext, preset cpu, photos
    metrics: dict[str, Metric]
    shown: tuple[str, ...]  # those of them that tables have
    measure: Callable[[Subject], Reading]
    fails: Callable[[Subject], str] = lambda subject: ""  # why it cannot look at a subject, where it can at others
    labelled: bool = False  # whether it needs labels

    def unfit(self, subject: Subject) -> str:
        """Why it cannot look at ``subject``, in one sentence; empty where it can."""
        if self.labelled and subject.labels is None:
            return "the data have no labels; give images in a folder per class, or leave it out"
        return self.fails(subject)
