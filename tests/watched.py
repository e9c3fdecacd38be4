"""Training seen from within: every optimiser step, on a clock that only those steps move; and a toy to train."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from bench.quantizers import Quantized
from bench.tokenizers import train as module
from bench.tokenizers.config import Config
from bench.tokenizers.tokenizer import Tokenizer
from bench.training import loop


class Crash(BaseException):
    """What a step was told to die of."""


@dataclass
class Step:
    """One step of one optimiser: tensors are in the order of its parameter groups."""

    rates: list[float]  # of the groups
    decays: list[float]  # of the groups
    sizes: list[int]  # tensors in the groups
    gradients: list[Tensor]
    before: list[Tensor]
    after: list[Tensor]

    def norm(self) -> float:
        """Euclidean norm of all gradients together."""
        return float(torch.stack([gradient.norm() for gradient in self.gradients]).norm())


@dataclass
class Trained:
    """A run and what it left behind."""

    tokenizer: Tokenizer
    seconds: float
    folder: Path
    steps: list[Step]  # of the tokenizer's optimiser
    discriminator: list[Step]  # of the discriminator's
    optimisers: list[torch.optim.Optimizer]

    @property
    def rows(self) -> list[dict[str, float]]:
        return rows(self.folder)

    @property
    def weights(self) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in self.tokenizer.state_dict().items()}


class Watch:
    """``train`` with optimisers that tell, a second a step, and a checkpoint at every logged step.

    ``clock`` may be moved by a test; ``train(…, crash_at=5)`` dies in step 5, before its update.
    """

    def __init__(self, images: np.ndarray, folder: Path, monkeypatch):
        self.images, self.folder, self.clock = images, folder, 0.0
        self.optimisers: list[torch.optim.Optimizer] = []
        self.crash_at: int | None = None
        watch = self

        class AdamW(torch.optim.AdamW):
            def __init__(self, *arguments, **options):
                super().__init__(*arguments, **options)
                self.seen: list[Step] = []
                watch.optimisers.append(self)

            def step(self, closure=None):
                groups = self.param_groups
                tensors = [parameter for group in groups for parameter in group["params"]]
                if self is watch.optimisers[0]:
                    taken = max((int(state["step"]) for state in self.state.values()), default=0)
                    if taken == watch.crash_at:
                        raise Crash
                    watch.clock += 1.0
                gradients = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in tensors]
                before = [parameter.detach().clone() for parameter in tensors]
                super().step(closure)
                after = [parameter.detach().clone() for parameter in tensors]
                rates, decays = ([group[name] for group in groups] for name in ("lr", "weight_decay"))
                sizes = [len(group["params"]) for group in groups]
                self.seen.append(Step(rates, decays, sizes, gradients, before, after))

        monkeypatch.setattr(torch.optim, "AdamW", AdamW)
        monkeypatch.setattr(loop, "time", self)

    def monotonic(self) -> float:
        """Seconds on the clock of this watch."""
        return self.clock

    def train(self, config: Config, name: str = "run", crash_at: int | None = None, **options) -> Trained:
        """Trains in the folder ``name``, or goes on there."""
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        self.optimisers.clear()
        self.crash_at = crash_at
        tokenizer, seconds = module.train(
            config.resolved(), self.images, folder, **{"checkpoint_seconds": 0, **options}
        )
        seen = [optimiser.seen for optimiser in self.optimisers]
        return Trained(tokenizer, seconds, folder, seen[0], seen[1] if len(seen) > 1 else [], list(self.optimisers))


def rows(folder: Path) -> list[dict[str, float]]:
    """The history of the run in ``folder``."""
    return [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]


def checkpoint(folder: Path) -> dict:
    """The checkpoint of the run in ``folder``."""
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def tensors(tree: object, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor and number in nested dicts and lists, with the way to it."""
    if isinstance(tree, dict | list | tuple):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from tensors(value, f"{path}/{key}")
    elif isinstance(tree, Tensor | int | float | bool):
        yield path, torch.as_tensor(tree)


def same(a: object, b: object) -> bool:
    """Whether two nests of tensors are equal to the bit."""
    first, second = dict(tensors(a)), dict(tensors(b))
    return first.keys() == second.keys() and all(torch.equal(first[path], second[path]) for path in first)


class Toy(nn.Module):
    """Stands in for a tokenizer whose gradients one can write down: it paints every image in one colour.

    ``colour`` is the decoder's last layer, ``unused`` a matrix and ``offset`` a vector that have no gradient but 0;
    ``pull`` has gradient 1 from the quantizer's loss alone. Codes are random, by the global generator.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.encoder, self.quantizer, self.decoder = nn.Identity(), ToyQuantizer(config), nn.Module()
        self.decoder.last_layer = nn.Parameter(torch.tensor([-3.0, 0.0, 3.0]).view(1, 3, 1, 1))
        self.unused, self.offset = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))
        self.pull = nn.Parameter(torch.zeros(1, 1))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.seen: list[tuple[Tensor, Tensor, Quantized, int]] = []  # x, x_hat, quantized, the generator's seed

    def forward(self, x: Tensor, parts: int = 1) -> tuple[Tensor, Quantized]:
        self.calls += 1
        x_hat = self.decoder.last_layer.expand_as(x) + 0 * (self.unused.sum() + self.offset.sum())
        codes = torch.randint(self.config.codebook_size, (len(x), self.config.grid_size, self.config.grid_size))
        quantized = Quantized(x, codes, self.pull.sum() + 7.0, x.square().mean())
        self.seen.append((x, x_hat.detach().clone(), quantized, torch.initial_seed()))
        return x_hat, quantized


class ToyQuantizer(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.given: list[Tensor] = []
        self.annealed: list[float] = []

    def anneal(self, done: float) -> None:
        self.annealed.append(done)

    def initialise(self, z: Tensor) -> None:
        self.given.append(z)


def adamw(steps: list[Step], betas: tuple[float, float]) -> list[list[Tensor]]:
    """What AdamW (Loshchilov & Hutter 2019, algorithm 2) makes of the gradients of ``steps``, step by step, from the
    first step's weights; ε = 1e-8."""
    weights = [tensor.double() for tensor in steps[0].before]
    first, second = [[torch.zeros_like(weight) for weight in weights] for _ in range(2)]
    results = []
    for count, step in enumerate(steps, 1):
        groups = [group for group, size in enumerate(step.sizes) for _ in range(size)]
        for i, group in enumerate(groups):
            gradient, rate = step.gradients[i].double(), step.rates[group]
            first[i] = betas[0] * first[i] + (1 - betas[0]) * gradient
            second[i] = betas[1] * second[i] + (1 - betas[1]) * gradient**2
            mean, square = first[i] / (1 - betas[0] ** count), second[i] / (1 - betas[1] ** count)
            weights[i] = weights[i] * (1 - rate * step.decays[group]) - rate * mean / (square.sqrt() + 1e-8)
        results.append([weight.clone() for weight in weights])
    return results
