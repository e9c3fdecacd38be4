"""Where the time of a training step goes, part by part."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, record_function

from bench.core.files import atomic_path
from bench.core.progress import Bar
from bench.training.loop import learning_rate, step_seed

from .config import Config
from .train import TokenizerLearner

WARM, STEPS = 3, 5  # steps before the clock runs, and steps that are looked at, without and with the profiler
# What a step consists of, in its order; the rest are losses, clipping and what lies between.
PARTS = ("batch", "encoder", "quantizer", "decoder", "perceptual", "alignment", "adversary", "optimizer", "rest")
BACKWARD = "autograd::engine::evaluate_function"  # how the profiler calls the backward pass of one operation
RANGE = "part "


def profile(config: Config, images: np.ndarray, trace: Path) -> dict[str, float]:
    """Milliseconds that a training step of ``config`` (resolved) on ``images`` (N, H, W, 3) uint8 takes: ``step``, and
    those PARTS that it has, forward and backward passes together, which add up to it. Writes a ``trace`` that Perfetto
    and Chrome show.

    The last steps of the run, so that the discriminator takes part where there is one. ``step`` is the mean without the
    profiler, which slows small operations; parts are the shares of it that they have under the profiler. On a GPU these
    are shares of the time of kernels, but for that of ``batch``, of which the host's is told.
    """
    learner = TokenizerLearner(config, images)
    learner.begin()
    cuda = torch.device(config.device).type == "cuda"
    first = max(0, config.steps - WARM - 2 * STEPS)
    steps = (min(first + i, config.steps - 1) for i in range(WARM + 2 * STEPS))

    def run(count: int) -> None:
        for _, step in zip(range(count), steps, strict=False):
            torch.manual_seed(step_seed(config.seed, step))
            with record_function(f"{RANGE}step"):
                learner.step(step, learning_rate(config, step))
            bar.advance(1)
        if cuda:
            torch.cuda.synchronize()

    with Bar(f"profile {config.backbone} {config.quantizer}", WARM + 2 * STEPS) as bar:
        run(WARM)
        began = time.monotonic()
        run(STEPS)
        whole = 1e3 * (time.monotonic() - began) / STEPS
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler tells stderr that it starts and stops
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
        with ranges(learner), torch.profiler.profile(activities=activities) as found:
            run(STEPS)
    trace.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(trace) as path:
        found.export_chrome_trace(str(path))
    shares = _shares(list(found.events()), cuda)
    return {"step": whole, **{name: share * whole for name, share in shares.items()}}


@contextmanager
def ranges(learner: TokenizerLearner) -> Iterator[None]:
    """Has the profiler know which part of a step a forward pass belongs to."""
    adversary = learner.adversary and learner.adversary.discriminator
    modules = {name: getattr(learner.model, name) for name in ("encoder", "quantizer", "decoder")}
    modules |= {"perceptual": learner.lpips, "alignment": learner.features, "adversary": adversary}
    hooks, open_ranges = [], []
    for name, module in modules.items():
        if module is None:
            continue

        def enter(*_: object, name: str = name) -> None:
            open_ranges.append(record_function(f"{RANGE}{name}"))
            open_ranges[-1].__enter__()

        def leave(*_: object) -> None:
            open_ranges.pop().__exit__(None, None, None)

        hooks += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _shares(events: list[FunctionEvent], cuda: bool) -> dict[str, float]:
    """The part of all steps' time that each of PARTS takes, those that there are; they add up to 1."""
    events = [event for event in events if event.device_type == DeviceType.CPU]  # kernels have ranges of the same names
    spent = dict.fromkeys(PARTS, 0.0)
    owners = _owners(events)
    steps = [event for event in events if event.name == f"{RANGE}step"]
    for event in events:
        name = None
        if event.name.startswith(BACKWARD):
            name = owners.get(event.sequence_nr)
        elif event.name.startswith(RANGE):
            name = event.name.removeprefix(RANGE)
        elif event.name.startswith("Optimizer.step"):
            name = "optimizer"
        if name in spent:
            spent[name] += _time(event, cuda)
    for step in steps:
        first = min(event.time_range.start for event in events if event.name == f"{RANGE}encoder" and _in(event, step))
        spent["batch"] += first - step.time_range.start
    # A GPU's backward passes are launched by a thread of their own, outside the range of their step.
    whole = [event for event in events if event.cpu_parent is None] if cuda else steps
    total = sum(_time(event, cuda) for event in whole) + cuda * spent["batch"]
    spent["rest"] = max(0.0, total - sum(spent.values()))
    return {name: value / sum(spent.values()) for name, value in spent.items() if value}


def _owners(events: list[FunctionEvent]) -> dict[int, str | None]:
    """Which part the operation belongs to that autograd has given a number to: the last that began with that number,
    as others before it saw the same one coming."""
    owners: dict[int, str | None] = {}
    for event in sorted(events, key=lambda event: event.time_range.start):
        line = [event]
        while line[-1].cpu_parent is not None:
            line.append(line[-1].cpu_parent)
        names = [one.name for one in line]
        if event.sequence_nr >= 0 and not any(name.startswith(BACKWARD) for name in names):
            parts = (name.removeprefix(RANGE) for name in names if name.startswith(RANGE))
            owners[event.sequence_nr] = next(parts, None)
    return owners


def _in(event: FunctionEvent, other: FunctionEvent) -> bool:
    return other.time_range.start <= event.time_range.start <= other.time_range.end


def _time(event: FunctionEvent, cuda: bool) -> float:
    """Microseconds."""
    return float(event.device_time_total if cuda else event.time_range.elapsed_us())
