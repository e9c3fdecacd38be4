"""Ours and others', timed in turn in one process on the same inputs, after their results were seen to agree."""

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy
import torch

from bench.core.environment import peak_memory
from bench.core.progress import Bar

WARM = 2  # rounds before the clock runs
ROUNDS = (3, 200)  # least and most of those that count

# How ours stands to another, from the seconds of both: a peer's and a bound's ratio; or, where what both have in common
# is left out, the seconds that ours takes beyond it. Of all of them the first wants much, the others little.
KINDS: dict[str, Callable[[float, float], float]] = {
    "peer": lambda ours, other: other / ours,
    "bound": lambda ours, other: ours / other,
    "beyond": lambda ours, other: ours - other,
}


class Disagreement(Exception):
    """Two that should do the same work do not; says how far they are apart."""


class Other(NamedTuple):
    """What ours is held against: ``work``, of a kind in KINDS, whose time counts ``times`` over. ``goal``: the least of
    a peer's number, the most of another's; None where it is shown alone."""

    work: Callable[[], object]
    kind: str
    goal: float | None = None
    times: float = 1


class Contest(NamedTuple):
    """One line of work: ours, ``others`` by name, what raises Disagreement where their results differ, and the most
    MiB that ours may take beyond what is there before, where that has a goal. rounds, warm: those that count, least and
    most, and those before them."""

    name: str
    ours: Callable[[], object]
    others: dict[str, Other]
    agree: Callable[[], object] = lambda: None
    extra_memory: float | None = None
    rounds: tuple[int, int] = ROUNDS
    warm: int = WARM


def compete(path: str, contest: Contest, device: str, seconds: float) -> list[dict[str, Any]]:
    """A row for each of the others: medians over rounds, in each of which all run once, for about ``seconds`` in all.
    Raises Disagreement before anything is timed."""
    contest.agree()
    works = {"ours": contest.ours, **{name: other.work for name, other in contest.others.items()}}
    spent: dict[str, list[float]] = {name: [] for name in works}
    least, most = contest.rounds
    began = time.monotonic()
    with Bar(f"{path} {contest.name}", 100) as bar:
        for _ in range(contest.warm):
            for work in works.values():
                work()
        while (count := len(spent["ours"])) < most and (count < least or time.monotonic() - began < seconds):
            for name, work in works.items():
                spent[name].append(clocked(work, device))
            bar.advance(min(99, int(100 * (time.monotonic() - began) / seconds)) - bar.done)
        bar.advance(100 - bar.done)
    about = {"path": path, "case": contest.name, "rounds": len(spent["ours"])}
    ours = statistics.median(spent["ours"])
    rows = []
    for name, other in contest.others.items():
        # Within a round the machine was in one mood: the median of the rounds' numbers, not the number of medians.
        numbers = [KINDS[other.kind](a, b * other.times) for a, b in zip(spent["ours"], spent[name], strict=True)]
        found = {"against": name, "kind": other.kind, "ours": ours}
        found |= {"other": statistics.median(spent[name]) * other.times, "number": statistics.median(numbers)}
        low, high = numpy.quantile(numbers, [0.05, 0.95])
        rows.append({**about, **found, "low": float(low), "high": float(high), "goal": other.goal})
    if contest.extra_memory is not None:
        found = {"against": "what was there", "kind": "memory", "number": _extra_memory(contest.ours, device)}
        rows.append({**about, **found, "goal": contest.extra_memory})
    return rows


def clocked(work: Callable[[], object], device: str) -> float:
    """Seconds that ``work`` takes, the device's included, but for what it was still at."""
    wait = partial(torch.cuda.synchronize, device) if device.startswith("cuda") else lambda: None
    wait()
    began = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - began


def _extra_memory(work: Callable[[], object], device: str) -> float | None:
    """MiB at the peak of ``work`` beyond those before it; None where nobody counts them."""
    with peak_memory(device) as peak:
        before = peak()
        work()
        after = peak()
    return None if after is None else after - before


def met(row: dict[str, Any]) -> bool | None:
    """Whether a row's number reaches its goal; None without one or the other."""
    if row["goal"] is None or row["number"] is None:
        return None
    return row["number"] >= row["goal"] if row["kind"] == "peer" else row["number"] <= row["goal"]


def same(what: str, ours: torch.Tensor, theirs: torch.Tensor, tolerance: float) -> None:
    """Raises Disagreement where two tensors differ by more than ``tolerance`` of the second's largest number."""
    ours, theirs = ours.detach(), theirs.detach()
    scale = theirs.abs().max().clamp_min(1e-12)
    if not (apart := float((ours - theirs).abs().max() / scale)) <= tolerance:  # NaN agrees with nothing
        raise Disagreement(f"{what}: {apart:.1e} of the largest number apart, more than {tolerance:.0e}")
