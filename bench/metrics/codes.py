"""How codes are used, and what they cost."""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from .registry import Batch, Evaluator, Metric, Setup


class CodeHistogram:
    """How often each of K codes occurs over a whole evaluation set, whose perplexity is not the mean over batches."""

    def __init__(self, codebook_size: int):
        self.counts = torch.zeros(codebook_size, dtype=torch.int64)

    def update(self, codes: Tensor) -> None:
        """Adds integer codes of any shape. ValueError for codes outside [0, K) or that are not integers."""
        codes = codes.detach().flatten().cpu()
        if codes.is_floating_point() or (codes.numel() and not 0 <= codes.min() <= codes.max() < len(self.counts)):
            raise ValueError(f"codes must be integers in [0, {len(self.counts)})")
        self.counts += torch.bincount(codes, minlength=len(self.counts))

    def perplexity(self) -> float:
        """exp(−Σ p log p) in [1, K]: how many equally frequent codes would carry as much; NaN before any code."""
        return torch.special.entr(self.counts.double() / self.counts.sum()).sum().exp().item()

    def usage(self) -> float:
        """Fraction of the codebook that occurs, in [0, 1]."""
        return 1 - self.dead_codes() / len(self.counts)

    def dead_codes(self) -> int:
        """How many codes never occurred."""
        return int((self.counts == 0).sum())


class CodeScores(Evaluator):
    """How the codes of a set are used, and how many bits an image has in them."""

    METRICS: ClassVar[dict[str, Metric]] = {
        "perplexity": Metric("perplexity", ".0f", "higher"),
        "usage": Metric("usage", ".2f", "higher"),
        "dead_codes": Metric("dead codes", ".0f", "lower"),
        "tokens": Metric("tokens", ".0f", ""),
        "bits_per_image": Metric("bits per image", ".0f", "lower"),
        "bits_per_pixel": Metric("bits per pixel", ".3f", "lower"),
    }

    def __init__(self, setup: Setup):
        super().__init__(setup)
        self.histogram = CodeHistogram(setup.codebook_size or 0)

    def seen(self) -> dict[str, Any]:
        return {**super().seen(), "counts": self.histogram.counts}

    def join(self, seen: dict[str, Any]) -> None:
        super().join(seen)
        self.histogram.counts += seen["counts"]

    def update(self, batch: Batch) -> None:
        self.pixels = batch.x[0, 0].numel()
        if batch.bits is not None:
            self.keep(bits_per_image=batch.bits)
        if self.setup.codebook_size is not None:
            self.histogram.update(batch.codes)
            self.tokens = batch.codes[0].numel()

    def result(self) -> dict[str, float]:
        """All of it; where there are no codes the measured bits alone, or nothing."""
        scores = super().result()
        if self.setup.codebook_size is not None:
            scores = {
                "perplexity": self.histogram.perplexity(),
                "usage": self.histogram.usage(),
                "dead_codes": self.histogram.dead_codes(),
                "tokens": self.tokens,
                "bits_per_image": self.tokens * math.log2(self.setup.codebook_size),
            }
        if "bits_per_image" in scores:
            scores["bits_per_pixel"] = scores["bits_per_image"] / self.pixels
        return scores
