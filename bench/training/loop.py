"""The loop that trains tokenizers and priors alike; what differs between them is a ``Learner``.

A step is a pure function of (state, seed, step): batch and augmentation follow from (seed, step), as does the state of
the global random generator. So a resumed run ends bit-equal to one that was never stopped.
"""

import json
import math
import os
import pickle
import signal
import threading
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.markup import escape
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from bench.core import group
from bench.core.errors import Damaged, Diverged, Interrupted, UserError, terminations
from bench.core.files import UNREADABLE, atomic_path, naming, read_rows
from bench.core.progress import Bar, say

RENAMED = {"average": "ema", "rival": "discriminator_optimizer"}  # parts of checkpoints of older versions


class Schedule(Protocol):
    """The settings of any training, as Config and PriorConfig have them."""

    steps: int
    batch_size: int
    lr: float
    warmup: int
    weight_decay: float
    grad_clip: float
    weight_ema: float
    precision: str
    device: str
    seed: int


class Learner(Protocol):
    """What is trained, and one step of it."""

    config: Schedule
    model: nn.Module  # whose averaged weights are scored
    parts: dict[str, Any]  # every module and optimizer that a checkpoint holds, ``model`` included
    unit: str  # what a batch consists of, in the plural

    def begin(self) -> None:
        """Prepares a run that starts at its first step; a resumed one has its parts from the checkpoint."""

    def step(self, step: int, rate: float) -> dict[str, Tensor]:
        """Trains on batch number ``step`` at learning rate ``rate``; losses, unweighted, and other scalars to log."""

    def row(self, means: dict[str, float]) -> dict[str, float]:
        """What the history says of the steps since its last row, given the ``means`` of what they returned."""

    def figures(self, row: dict[str, float]) -> str:
        """The same in brief, for the progress bar."""


Tell = Callable[[dict[str, float]], None]  # what is done with a row of the history besides


def unheard(row: dict[str, float]) -> None:
    """Nothing."""


def fit(
    learner: Learner,
    label: str,
    folder: Path,
    resume: bool = True,
    checkpoint_seconds: float = 2.0,
    tell: Tell = unheard,
) -> tuple[nn.Module, float]:
    """Trains ``learner`` and returns its model with averaged weights and in eval mode, and the seconds that the steps
    took, resumed parts included.

    Of several processes (see ``bench.core.group``) the first reads and writes, and all stop where one is to.

    Writes ``history.jsonl`` (one line per logged step; ``tell`` gets each, those of before too) and ``checkpoint.pt``
    into ``folder``; with ``resume`` it goes on from a whole one found there, without it drops that. One is written
    every ``checkpoint_seconds``, or less often if writing takes more than 2 % of the time. Raises Diverged, or
    Interrupted after SIGINT or SIGTERM.
    """
    config, ema = learner.config, averaged(learner.model, learner.config.weight_ema)
    state = {**learner.parts, "ema": ema}
    writes = group.first()
    checkpoint = folder / "checkpoint.pt"
    history = folder / "history.jsonl" if writes else Path(os.devnull)
    found = group.by_first(lambda: resumed(checkpoint, state, config) if resume else (0, 0.0))
    first, seconds = group.of_first(found)
    log_every = logged(config.steps)[0]
    if not first and writes:
        checkpoint.unlink(missing_ok=True)  # else what is killed before its first one would go on from an older run's
        history.unlink(missing_ok=True)
    if not first:
        learner.begin()
    if first and writes:
        rewind(history, first)
        if lost := {*range(log_every, first + 1, log_every)} - {row["step"] for row in read_rows(history)}:
            say(f"[yellow]{escape(str(history))} is damaged: it has lost {len(lost)} rows; its curves have a gap[/]")
    for part in state.values():
        group.spread(part)
    for row in read_rows(history):
        tell(row)

    window, spent = Window(), seconds
    saved = seen = time.monotonic()
    with (
        naming(history),
        Bar(label, config.steps, first) as bar,
        history.open("a") as log,
        interruptible() as interrupted,
    ):
        for step in range(first, config.steps):
            torch.manual_seed(step_seed(config.seed, step))
            rate = learning_rate(config, step)
            window.add(learner.step(step, rate))
            ema.update_parameters(learner.model)
            done = step + 1
            if done % log_every and done < config.steps:
                continue  # nothing above waits for the device; everything below does

            now = time.monotonic()
            spent, seen = spent + max(0.0, now - seen), now  # it may have been put back
            row = {"step": done, "lr": rate, **learner.row(window.means()), "seconds": round(spent, 3)}
            if not all(math.isfinite(value) for value in row.values()):
                raise Diverged(f"loss or gradient not finite by step {done}; try --lr below {config.lr:g}")
            log.write(json.dumps(row) + "\n")
            log.flush()
            tell(row)
            speed = (done - first) * config.batch_size / max(spent - seconds, 1e-9)
            bar.advance(done - bar.done, f"{learner.figures(row)}  {speed:.0f} {learner.unit}/s")
            window = Window()
            stops = group.any_of(interrupted.is_set())
            if writes and (stops or not 0 <= now - saved <= checkpoint_seconds):
                save(checkpoint, state, done, spent)
                saved = time.monotonic()
                checkpoint_seconds = max(checkpoint_seconds, 50 * (saved - now))
            if stops:
                raise Interrupted(f"stopped at step {done} of {config.steps}; the same command continues from there")

    return ema.module.eval().requires_grad_(False), spent


class Window:
    """Means of scalars over the steps since the last log line, summed where the tensors are."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.steps: Counter[str] = Counter()

    def add(self, scalars: dict[str, Tensor]) -> None:
        """Adds one step."""
        for name, value in scalars.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach()
            self.steps[name] += 1

    def means(self) -> dict[str, float]:
        """Unweighted means over the steps that had the term, and over all processes."""
        return {name: float(group.mean(total)) / self.steps[name] for name, total in self.sums.items()}


def adamw(model: nn.Module, weight_decay: float) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019) with β = (0.9, 0.95) over those of ``parameter_groups`` that are not frozen;
    ``descend`` sets its rate."""
    groups = parameter_groups(model, weight_decay)
    for one in groups:
        one["params"] = [parameter for parameter in one["params"] if parameter.requires_grad]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)


def descend(optimizer: torch.optim.Optimizer, model: nn.Module, loss: Tensor, rate: float, grad_clip: float) -> Tensor:
    """One update of ``model`` down ``loss``, of several processes down its mean, at learning rate ``rate``; returns the
    gradient's norm before it was clipped to ``grad_clip`` (0: not clipped)."""
    for parameters in optimizer.param_groups:
        parameters["lr"] = rate
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    group.average_gradients(model.parameters())
    norm = nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
    optimizer.step()
    return norm


def autocast(config: Schedule) -> torch.autocast:
    """The context of forward passes in training: bfloat16 or, disabled, float32."""
    return torch.autocast(torch.device(config.device).type, torch.bfloat16, enabled=config.precision == "bf16")


def learning_rate(config: Schedule, step: int) -> float:
    """Linear warm-up over ``config.warmup`` steps, then a cosine that reaches zero after the last step."""
    warm = min(1.0, (step + 1) / max(1, config.warmup))
    return config.lr * warm * 0.5 * (1 + math.cos(math.pi * step / config.steps))


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """AdamW groups: decay on weight matrices and kernels only; none on vectors (norms, biases), on the codebook, on
    position embeddings, or on what a layer marks ``_no_weight_decay`` (Mamba's A_log, D, dt_bias)."""
    decayed, free = [], []
    for name, parameter in model.named_parameters():
        exempt = parameter.ndim < 2 or getattr(parameter, "_no_weight_decay", False)
        exempt = exempt or name.endswith(("codebook", "position"))
        (free if exempt else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]


def averaged(model: nn.Module, decay: float) -> AveragedModel:
    """A moving average of the weights that soon forgets the first: θ̄ ← γθ̄ + (1−γ)θ, γ = min(decay, (1+n)/(10+n))."""

    @torch.no_grad()
    def update(means: list[Tensor], current: list[Tensor], _: Tensor) -> None:
        n = float(average.n_averaged)  # on the CPU; the one that is passed has been sent to the device
        torch._foreach_lerp_(means, current, 1 - min(decay, (1 + n) / (10 + n)))

    average = AveragedModel(model, multi_avg_fn=update)
    return average


def step_seed(seed: int, step: int) -> int:
    """Seed of the global generator in one step; distinct for every (seed, step) that fits 31 and 32 bits. The CPU's
    generator takes the low 32 bits alone, so the seed is in those too, multiplied by 2³² over the golden ratio."""
    return (seed << 32) | (step ^ (seed * 0x9E3779B1 & 0xFFFFFFFF))


def save(path: Path, state: dict, step: int, seconds: float) -> None:
    """Writes a checkpoint atomically: the state of every module and optimiser in ``state``, at ``step``."""
    with atomic_path(path) as temporary:
        torch.save({**{name: part.state_dict() for name, part in state.items()}, "at": (step, seconds)}, temporary)


def resumed(path: Path, state: dict, config: Schedule) -> tuple[int, float]:
    """What ``restore`` gives; (0, 0.0) where there is no checkpoint, or a damaged one, of which a line tells."""
    try:
        return restore(path, state, config) if os.path.lexists(path) else (0, 0.0)
    except Damaged as error:
        say(f"[yellow]{escape(str(error).partition(';')[0])}; training starts again[/]")
        return 0, 0.0


def restore(path: Path, state: dict, config: Schedule) -> tuple[int, float]:
    """Loads what ``save`` wrote, executing nothing; (step, seconds). Raises Damaged where the file is not as it was
    written, and UserError where it is no checkpoint of these parts with at most so many steps."""
    refusal = UserError(f"{path} is no checkpoint of this run; delete it or pass --no-resume to start again")
    if path.is_dir():
        raise UserError(f"{path} is a folder and no checkpoint; move it away, and the same command starts again")
    if not path.is_file():
        raise Damaged(path, "it is not a file")  # reading a pipe would wait for ever
    try:
        with zipfile.ZipFile(path) as archive:
            if broken := archive.testzip():  # torch reads what has a wrong checksum
                raise Damaged(path, f"the checksum of {broken} is wrong")
    except (OSError, *UNREADABLE) as error:
        raise Damaged(path, str(error) or "it is cut off") from error
    try:
        stored = torch.load(path, map_location=config.device, weights_only=True)
        stored = {RENAMED.get(name, name): part for name, part in stored.items()}
        step, seconds = stored["at"]
        if not 0 < step <= config.steps:
            raise ValueError(f"step {step} of {config.steps}")
        for name, part in state.items():
            part.load_state_dict(stored[name])
        return step, float(seconds)
    except (RuntimeError, LookupError, ValueError, TypeError, AttributeError, pickle.UnpicklingError) as error:
        raise refusal from error


def logged(steps: int) -> list[int]:
    """The steps of a training of so many ``steps`` that its history has rows of, the last among them."""
    every = min(50, max(1, steps // 200))
    return sorted({*range(every, steps + 1, every), steps})


def rewind(history: Path, step: int) -> None:
    """Drops what the history logged after ``step``, which will be trained again."""
    rows = [row for row in read_rows(history) if row["step"] <= step]
    with atomic_path(history) as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))


@contextmanager
def interruptible() -> Iterator[threading.Event]:
    """Turns SIGINT and ``terminations`` into an event that the loop looks at; a second SIGINT stops at once. Of the
    others a second is no second thought: who ends a job tells every process of it, and parents tell their children."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event  # signals reach the main thread only
        return

    def stop(number: int, frame: object) -> None:
        if event.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        event.set()

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, *terminations())}
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
