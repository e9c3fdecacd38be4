"""What the runs say about two backbones, or two values of a setting, and the words for it."""

import math
from dataclasses import dataclass

from .frames import LABELS

LEVEL = 0.05  # of the false verdicts in a family, and one minus the coverage of the intervals
FEWEST = 3  # paired seeds for an interval and a test
BELOW = "; both below k-means in PSNR"

Interval = tuple[float, float]


@dataclass(frozen=True)
class Verdict:
    """What the runs say about ``a`` against ``b``: two backbones, or two values of a setting such as ``beta=0.25``.

    ``within`` says where: the backbone whose setting is compared, and the other swept settings that both sides share
    ("over beta 0.25, 1"), which are averaged. ``n`` counts paired seeds, ``difference`` is the mean over them of a - b
    in the metric's unit (nan without a pair), ``interval`` its 95 % t interval, ``image_interval`` its 95 % percentile
    interval over resampled images of the first IMAGE_SEEDS seeds (None without scores per image; of part of the
    settings in a very large block, see ``Images``), ``p`` the Holm-adjusted p-value; these three are None below FEWEST
    seeds. The intervals are not adjusted.

    ``better`` is ``a``, ``b`` or None, not distinguishable: see ``backbone_verdicts`` for the rule. ``below``: both are
    worse than k-means on patches at the same bits, in PSNR, so that neither has learned much yet.
    """

    metric: str
    a: str
    b: str
    within: str
    n: int
    difference: float
    interval: Interval | None
    image_interval: Interval | None
    p: float | None
    better: str | None
    below: bool = False

    @property
    def leader(self) -> str:
        """Who is ahead, surely or not; ``a`` of two that are equal."""
        return self.a if (self.difference < 0) == (LABELS[self.metric].better == "lower") else self.b

    @property
    def spread(self) -> float:
        """Standard deviation of the difference over seeds; nan below FEWEST of them."""
        from scipy import stats

        low, high = self.interval or (math.nan, math.nan)
        return (high - low) / 2 * math.sqrt(self.n) / float(stats.t.isf(LEVEL / 2, self.n - 1))

    def lead(self) -> str:
        """By how much the leader is ahead, and how sure that is, in words."""
        number, sign = self._number(abs(self.difference)), int(math.copysign(1, self.difference))
        words = f"{number} {LABELS[self.metric].label}"
        if self.interval is None:
            return f"{words} on {self._seeds}"
        return f"{words} {self._range(self.interval, sign)}, {self._seeds}, p {self.p:.2g} after Holm's correction"

    @property
    def _seeds(self) -> str:
        return f"{self.n} paired seed{'s' if self.n > 1 else ''}"

    def sentence(self) -> str:
        """The verdict in words, the better one first; numbers to two digits of the interval's width."""
        place, label = f"{self.within}: " if self.within else "", LABELS[self.metric].label
        if self.n == 0:
            return f"{place}{self.a} and {self.b} share no seed and setting"
        low = BELOW if self.below else ""
        if self.interval is None:
            few = f"{self._seeds}: too few for an interval ({FEWEST} needed){low}"
            if self.difference == 0:
                return f"{place}{self.a} and {self.b} equal in {label} on {few}"
            lower = "lower" if self.difference < 0 else "higher"
            return f"{place}{self.a} {self._number(abs(self.difference))} {label} {lower} than {self.b} on {few}"
        if self.better:
            other, sign = self.b if self.better == self.a else self.a, -1 if self.difference < 0 else 1
            claim = f"{self.better} better than {other} by {self._number(abs(self.difference))} {label}"
        else:
            sign, number = 1, self._number(self.difference)
            claim = f"{self.a} and {self.b} not distinguishable in {label}: difference {number}"
        words = f"{place}{claim} {self._range(self.interval, sign)}, {self._seeds}"
        if self.better is None and not self.interval[0] <= 0 <= self.interval[1]:
            words += f", but p {self.p:.2g} after correction for all pairs (the interval is of this one alone)"
        words += f"; over images {self._range(self.image_interval, sign)}" if self.image_interval else ""
        return words + low

    def _range(self, interval: Interval, sign: int) -> str:
        low, high = sorted(sign * end for end in interval)
        return f"[{self._number(low)}, {self._number(high)}]"

    def _number(self, value: float) -> str:
        low, high = self.interval or (0, self.difference)
        width = abs(high - low) or abs(self.difference)
        digits = int(LABELS[self.metric].form[1:-1])
        if width:
            digits = max(digits, 1 - math.floor(math.log10(width)))
        return f"{round(value, digits) + 0.0:.{digits}f}"  # + 0.0: no minus sign before a zero
