"""What differs between the runs of tokenizers and of priors to a study; all else in this room is the same for both."""

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench.analysis import frames
from bench.analysis.frames import Metric
from bench.core.runs import Run
from bench.core.store import Store
from bench.priors.config import PriorConfig
from bench.priors.trial import run_prior
from bench.tokenizers.config import Config
from bench.tokenizers.trial import run_trial

AnyConfig = Config | PriorConfig
Row = dict[str, float]


class Kind(NamedTuple):
    """One kind of run."""

    noun: str  # what several of them are called
    key: str  # what each Optuna study has one value of; its name ends in that,
    prefix: str  # with this before it
    train: Callable[[Any, Store, Path | None, str | None], Run]  # config, store, Inception's weights, where to watch it
    config: type  # whose SHELF is also the key of its runs in a study's file
    frame: frames.Kind  # of which its rows in frames are
    ranked: tuple[str, ...]  # metrics that trials are ranked by; () for those of the study's command line
    told: tuple[str, ...]  # further metrics in the line of a trial that ended
    picture: str  # the file in a run's folder that its trial shows
    loss: Callable[[Any, Row], float]  # config and row of a history → the training loss that a pruner sees, or NaN
    figures: Callable[[Row], str]  # row of a history → how training stands

    @property
    def metrics(self) -> dict[str, Metric]:
        """What its runs are scored with, in the order of tables."""
        return self.frame.metrics

    def has_curve(self, metrics: Sequence[str]) -> bool:
        """Whether trials that are ranked by ``metrics`` have a curve, by which a search gives them up: by one alone,
        and one of their own. A tokenizer's curve does not tell what a prior will make of its codes."""
        return len(metrics) == 1 and metrics[0] in self.metrics

    def study(self, name: str, label: str) -> str:
        """Name of the Optuna study that belongs to ``name`` and has ``label``, a value of ``key``."""
        return f"{name}-{self.prefix}{label}"


TOKENIZERS = Kind(
    noun="trials",
    key="backbone",
    prefix="",
    train=lambda config, store, fid_weights, track: run_trial(config, store, fid_weights, track=track),
    config=Config,
    frame=frames.TOKENIZER,
    ranked=(),
    told=("psnr", "perplexity"),
    picture="reconstructions.png",
    loss=lambda config, row: row.get("reconstruction", math.nan) + config.lpips_weight * row.get("lpips", 0.0),
    figures=lambda row: (
        f"loss {row.get('reconstruction', math.nan):.4f}"
        + (f" perplexity {row['perplexity']:.0f}" if "perplexity" in row else "")
    ),
)
PRIORS = Kind(
    noun="priors",
    key="prior",
    prefix="prior-",
    train=lambda config, store, fid_weights, track: run_prior(
        config, store.named(config.tokenizer), store, fid_weights, track=track
    ),
    config=PriorConfig,
    frame=frames.PRIOR,
    ranked=("coded_bits_per_token",),
    told=("gfid_vgg16",),
    picture="samples.png",
    loss=lambda config, row: row.get("bits_per_token", math.nan),
    figures=lambda row: f"{row.get('bits_per_token', math.nan):.3f} bits per token",
)
KINDS = {kind.config.SHELF: kind for kind in (TOKENIZERS, PRIORS)}


def kind_of(run: Run) -> Kind:
    """The kind of ``run``, by the folder it lies in."""
    return KINDS[run.folder.parent.name]


def by_kind(runs: Iterable[Run]) -> list[tuple[Kind, list[Run]]]:
    """Those of ``runs`` that are of a kind, for each that any is of, tokenizers first."""
    every = [*runs]
    found = [(kind, [run for run in every if kind_of(run) is kind]) for kind in KINDS.values()]
    return [(kind, own) for kind, own in found if own]


def endings(runs: Iterable[Run]) -> dict[Run, str]:
    """How each of ``runs``, which are of one store, ended; see ``frames.statuses``."""
    found: dict[Run, str] = {}
    for kind, own in by_kind(runs):
        names = (run.folder.name for run in own)
        found |= zip(own, frames.statuses(own[0].folder.parent, names, kind.frame), strict=True)
    return found
