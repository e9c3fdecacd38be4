"""Budgets: the width, or the steps, at which every backbone costs the same."""

import hashlib
import json
import platform
import re
import tempfile
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch

from bench.core.errors import UserError
from bench.core.files import cache_dir, cached, seal, unseal_numbers

from .config import Config
from .costs import shape_costs
from .sizes import TOLERANCE, nearest_size, parameters
from .train import train

UNITS = {"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "s": 1, "min": 60}
TIMED_STEPS = 16  # trained to learn how long one takes
TIMELESS = ("data", "beta", "ema_decay", "lr", "warmup", "weight_decay", "grad_clip", "weight_ema", "seed", "init_from")


def match(config: Config, budget: str) -> Config:
    """``config`` at a budget, such as ``params:4M``, ``flops:2G``, ``time:60s``, or a size and then a time, as
    ``params:4M,time:60s``.

    params (encoder and decoder) and flops (encode and decode of one image) are met within 2 % by the width, and by a
    neighbouring depth where no width does. time is training time on this machine, met by the steps; how long a step
    takes is measured once and remembered. Raises UserError on a budget that is malformed or cannot be met.
    """
    parts = [(part, *_parse(part)) for part in budget.split(",")]
    if [kind == "time" for _, kind, _ in parts] not in ([False], [True], [False, True]):
        raise UserError(f"{budget!r} is no budget; write one size, then one time, for example params:4M,time:60s")
    for part, kind, amount in parts:
        config = _timed(config, amount) if kind == "time" else _sized(config, part, kind, amount)
    return config


def _timed(config: Config, seconds: float) -> Config:
    """``config`` with as many steps as take so many ``seconds``."""
    return replace(config, steps=max(1, round(seconds / step_seconds(config))))


def _sized(config: Config, budget: str, kind: str, amount: float) -> Config:
    """``config`` with the width and depth at which it costs ``amount`` of ``kind``, which is what ``budget`` says.
    Raises UserError where none does."""

    def cost(width: int, depth: int) -> float:
        return COSTS[kind](replace(config, width=width, depth=depth))

    usual = config.depth
    width, depth = nearest_size(cost, amount, (usual, usual + 1, usual - 1, usual + 2))
    if abs(cost(width, depth) / amount - 1) > TOLERANCE:
        raise UserError(
            f"{config.backbone} cannot meet {budget} within {TOLERANCE:.0%}: the nearest is {cost(width, depth):,.0f} "
            f"at width {width} and depth {depth}"
        )
    return replace(config, width=width, depth=depth)


def _parse(budget: str) -> tuple[str, float]:
    parts = re.fullmatch(r"(params|flops):(\d+(?:\.\d+)?)([kMG]?)|(time):(\d+(?:\.\d+)?)(s|min)", budget)
    kind, number, unit = (part for part in parts.groups() if part is not None) if parts else ("", "", "")
    if not parts or float(number) <= 0:
        raise UserError(f"{budget!r} is no budget; write for example params:4M, flops:2G or time:60s")
    return kind, float(number) * UNITS[unit]


@cache
def _flops(config: Config) -> float:
    costs = shape_costs(config)
    return costs["flops_encode"] + costs["flops_decode"]


COSTS: dict[str, Callable[[Config], float]] = {"params": parameters, "flops": _flops}


def step_flops(config: Config) -> float:
    """Operations of a training step's encoder and decoder: their backward passes take twice those forward."""
    return 3 * config.batch_size * _flops(config)


def step_seconds(config: Config, steps: int = TIMED_STEPS) -> float:
    """Mean seconds of a training step of ``config`` on this machine, by so many ``steps`` on random images: measured
    once, then remembered, because the number of steps is part of a run's identity: the same command must mean the same
    run. Settings that cost no time, such as the seed, share one measurement."""
    usual = {field.name: field.default for field in fields(Config) if field.name in TIMELESS}
    config = replace(config.resolved(), **usual, steps=steps)
    device = torch.cuda.get_device_name(config.device) if config.device.startswith("cuda") else platform.processor()
    machine = [device, torch.get_num_threads()]
    key = hashlib.sha256(json.dumps([asdict(config), machine], sort_keys=True).encode()).hexdigest()[:16]
    path = cache_dir() / "speeds" / f"{key}.json"

    def measure(written: Path) -> None:
        shape = (256, config.image_size, config.image_size, 3)
        images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        with tempfile.TemporaryDirectory() as folder:
            train(config, images, Path(folder))
            rows = (Path(folder) / "history.jsonl").read_text().splitlines()
        seconds = [json.loads(row)["seconds"] for row in rows]
        warm = len(seconds) // 4  # the first steps allocate and compile
        written.write_text(seal({"seconds": (seconds[-1] - seconds[warm - 1]) / (len(seconds) - warm)}))

    return cached(path, measure, lambda path: unseal_numbers(path, "seconds"))["seconds"]
