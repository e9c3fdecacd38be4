"""A metric."""

from typing import ClassVar

from bench.metrics.registry import Batch, Evaluator, Metric


class BrightnessScores(Evaluator):
    """How far the mean brightness of a reconstruction is from that of its original, in grey levels."""

    METRICS: ClassVar[dict[str, Metric]] = {"brightness": Metric("brightness off", ".2f", "lower")}

    def update(self, batch: Batch) -> None:
        off = batch.x_hat.float().mean((1, 2, 3)) - batch.x.float().mean((1, 2, 3))
        self.keep(brightness=off.abs())
