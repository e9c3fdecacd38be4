"""What priors are: a distribution over grids of codes, read one code after the other."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones.orders import order
from bench.core.device import check_memory
from bench.core.errors import UserError
from bench.core.runs import Run, check_whole
from bench.training.weights import read_weights


class Prior(nn.Module):
    """p(codes) = Π p(code_i | codes before i in its order, label): the interface, and what all of them share.

    codebook_size: K ≥ 1. grid: its rows and columns (h, w). classes: how many labels there are; 0 is unconditional.
    token_order: one of ORDERS. unlabelled: whether a label may be missing, for which number ``classes`` stands then.
    Siblings define ``logits`` for whole grids, and ``start`` and ``step`` for one position at a time.
    """

    def __init__(
        self,
        codebook_size: int,
        grid: tuple[int, int],
        classes: int = 0,
        token_order: str = "raster",
        unlabelled: bool = False,
    ):
        super().__init__()
        self.codebook_size, self.grid, self.classes = codebook_size, grid, classes
        self.tokens, self.unlabelled = math.prod(grid), unlabelled
        self.register_buffer("order", order(token_order, *grid), persistent=False)
        self.register_buffer("places", self.order.argsort(), persistent=False)  # of each cell in that order

    @classmethod
    def from_run(cls, folder: str | Path, device: str = "cpu") -> "Prior":
        """The scored prior of a finished run folder, in eval mode on ``device``; its ``config`` is the PriorConfig.
        Raises UserError when the folder holds no finished prior."""
        from bench.priors.train import PriorConfig, build  # chooses among the siblings of this class

        run = Run(Path(folder))
        check_whole(run)
        if not run.finished or not (run.folder / "prior.safetensors").is_file():
            raise UserError(f"{folder} holds no finished prior; train one with python -m bench.prior")
        config, codes = run.settings(PriorConfig), run.codes()
        replace(config, device=device).check()
        check_memory(config.parameters + codes["codebook_size"] * math.prod(codes["grid"]), device)
        classes = len(codes["classes"]) if config.conditional else 0
        prior = build(config, codes["codebook_size"], codes["grid"], classes)
        prior.config = config
        read_weights(run, "prior.safetensors", prior)
        return prior.to(device).eval().requires_grad_(False)

    def logits(self, codes: Tensor, labels: Tensor | None = None) -> Tensor:
        """Unnormalised log p of every code at every position, given those before it.

        codes (B, h, w) int64 in [0, K), labels (B,) int64 in [0, classes) → (B, h, w, K).
        """
        raise NotImplementedError

    def forward(self, codes: Tensor, labels: Tensor | None = None) -> Tensor:
        """``logits``."""
        return self.logits(codes, labels)

    def start(self, labels: Tensor | None, count: int) -> Any:
        """What ``step`` knows before the first code of ``count`` grids."""
        raise NotImplementedError

    def step(self, position: int, before: Tensor | None, state: Any) -> tuple[Tensor, Any]:
        """Logits (B, K) at ``position`` (of its order, from 0) given the code at the one before, (B,) int64 (None at
        0), and the state that the call for it returned. Equal to ``logits`` there."""
        raise NotImplementedError

    def nll(self, codes: Tensor, labels: Tensor | None = None) -> Tensor:
        """−ln p of every code given those before it, in nats: (B, h, w) int64 → (B, h, w) float32. Raises UserError on
        codes of another grid or codebook, and on labels that do not fit."""
        self._check(codes, labels)
        logits = self.logits(codes, labels).float()
        return F.cross_entropy(logits.flatten(0, 2), codes.flatten(), reduction="none").view(codes.shape)

    @torch.no_grad()
    def sample(
        self,
        n: int,
        generator: torch.Generator,
        temperature: float = 1.0,
        top_k: int = 0,
        labels: Tensor | None = None,
        guidance: float = 1.0,
        progress: Callable[[int], object] | None = None,
    ) -> Tensor:
        """Draws ``n`` grids: (n, h, w) int64. A function of the weights and of ``generator``, on the prior's device.

        temperature: logits are divided by it; below 1 likely codes become likelier. top_k: so many likeliest codes can
        be drawn, 0 is all. labels: (n,) int64. guidance: g, by which logits are ℓ(none) + g · (ℓ(label) − ℓ(none)), of
        a prior that may go without labels; 1 is none (Ho & Salimans 2022, "Classifier-Free Diffusion Guidance", eq. 6).
        progress: called with how many codes were drawn since it was called before.
        Raises UserError on labels, temperature, top_k or guidance that cannot be.
        """
        self._check_sampling(n, temperature, top_k, labels, guidance)
        guided = guidance != 1
        if guided:  # both at once, side by side
            labels = torch.cat([labels, torch.full_like(labels, self.classes)])
        state, before, drawn = self.start(labels, n * (1 + guided)), None, []
        for position in range(self.tokens):
            logits, state = self.step(position, before.repeat(1 + guided) if drawn else None, state)
            chances = self._chances(logits, temperature, top_k, guidance)
            before = torch.multinomial(chances, 1, generator=generator)[:, 0]
            drawn.append(before)
            if progress:
                progress(n)
        return torch.stack(drawn, 1)[:, self.places].view(n, *self.grid)

    def _chances(self, logits: Tensor, temperature: float, top_k: int, guidance: float) -> Tensor:
        """What codes are drawn with, (n, K), from logits (n, K); of guidance (2n, K), with labels and then without."""
        logits = logits.float()
        if guidance != 1:
            labelled, free = logits.chunk(2)
            logits = free + guidance * (labelled - free)
        logits = logits / temperature
        if 0 < top_k < self.codebook_size:
            likeliest = logits.topk(top_k)  # not a threshold: of equally likely codes some have to go
            logits = torch.full_like(logits, -torch.inf).scatter(1, likeliest.indices, likeliest.values)
        return logits.softmax(1)

    def _check_sampling(self, n: int, temperature: float, top_k: int, labels: Tensor | None, guidance: float) -> None:
        if not temperature > 0:
            raise UserError(f"temperature is {temperature:g}; it must be above 0 (small ones pick the likeliest code)")
        if top_k < 0:
            raise UserError(f"top_k is {top_k}; it must be 0 (all codes) or more")
        if guidance != 1 and not self.unlabelled:
            raise UserError(
                f"guidance is {guidance:g}, and this prior knows nothing without a label; train one that does"
            )
        self._check_labels(labels, n)

    def _check(self, codes: Tensor, labels: Tensor | None) -> None:
        if codes.shape[1:] != self.grid:
            theirs, own = ("×".join(map(str, shape)) for shape in (codes.shape[1:], self.grid))
            raise UserError(f"the codes are grids of {theirs} and this prior is for {own}; train one for them")
        # not in training: there a GPU would have to be waited for
        if not self.training and codes.numel() and not 0 <= codes.min() <= codes.max() < self.codebook_size:
            reach = f"the codes reach {int(codes.max())} and this prior knows {self.codebook_size}"
            raise UserError(f"{reach}; they are of another tokenizer")
        self._check_labels(labels, len(codes))

    def _check_labels(self, labels: Tensor | None, count: int) -> None:
        if (labels is None) == bool(self.classes):
            raise UserError(f"this prior has {self.classes} classes; labels were {'not ' * (labels is None)}given")
        if labels is None or self.training:
            return
        if len(labels) != count or not 0 <= labels.min() <= labels.max() < self.classes:
            raise UserError(f"there must be {count} labels from 0 to {self.classes - 1}, one for each grid")
