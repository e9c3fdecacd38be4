"""What a study file says, and its command line: an Ablation or a Search, and the flags that each of them takes."""

from dataclasses import dataclass, field, make_dataclass
from typing import Annotated, Any, ClassVar

import tyro

from backbones import BACKBONES
from bench.analysis.frames import DEFAULTS, METRICS
from bench.core.errors import UserError
from bench.metrics import weights
from bench.priors.config import PriorConfig
from bench.tokenizers.arguments import Arguments, parse

from .space import TYPES, Space

POSITIVE = ("workers", "trials", "timeout", "trial_timeout")


@dataclass(frozen=True)
class StudyArguments(Arguments):
    """What every study takes besides the settings of its runs."""

    metric: tuple[str, ...] = ("lpips_vgg",)
    """what the dashboard ranks by and a search optimises; several make a search multi-objective, without pruning"""
    workers: int = 1
    """trials at a time on this machine; start the same command elsewhere for more"""
    storage: str | None = None
    """Optuna storage URL, postgresql+psycopg://... for many machines; the default is SQLite below --results"""
    plan: bool = False
    """show the cells, what is already finished and the estimated cost, and stop"""
    trial_timeout: float | None = None
    """seconds after which a trial is given up and recorded as timed out"""


@dataclass(frozen=True)
class AblationArguments(StudyArguments):
    """What an ablation takes."""

    retry_failed: bool = False
    """run trials again that failed in an earlier command"""


@dataclass(frozen=True)
class PriorStudyArguments(AblationArguments):
    """What an ablation with priors takes."""

    prior: tuple[str, ...] = ()
    """priors to train over every tokenizer's codes"""
    prior_parameters: int = PriorConfig.parameters
    """parameters of each prior, by its width"""
    prior_steps: int = PriorConfig.steps
    """training steps of each prior"""
    samples: int = PriorConfig.samples
    """images to generate and score from each prior"""


@dataclass(frozen=True)
class SearchArguments(StudyArguments):
    """What a search takes."""

    trials: int = 30
    """trials per backbone, those of earlier commands included"""
    timeout: float | None = None
    """seconds of trials per backbone after which no further one starts"""


@dataclass(frozen=True)
class Ablation:
    """Every backbone at every combination of the values in ``sweep``, once per seed.

    ``settings`` are Config fields that all of it shares; they replace the preset's. ``priors``: what is then trained
    over the codes of each of these tokenizers, with the tokenizer's seed.
    """

    name: str
    sweep: dict[str, tuple]
    settings: dict[str, Any] = field(default_factory=dict)
    backbones: tuple[str, ...] = tuple(BACKBONES)
    seeds: tuple[int, ...] = (0, 1, 2)
    priors: tuple[str, ...] = ()

    @property
    def arguments(self) -> type[StudyArguments]:
        """What its command line takes besides ``flags``."""
        return PriorStudyArguments if self.priors else AblationArguments

    def flags(self) -> dict[str, Any]:
        """Config field → its type as a flag: a swept field takes several values."""
        told = tyro.conf.arg(help="values to sweep")
        return {name: Annotated[tuple[TYPES[name], ...], told] for name in self.sweep}

    def values(self) -> dict[str, Any]:
        """Flag → what the study gives it."""
        return {**self.settings, **self.sweep, **({"prior": self.priors} if self.priors else {})}


@dataclass(frozen=True)
class Search:
    """A search of ``space`` for each backbone by TPE, pruned on the training loss when it has one metric."""

    arguments: ClassVar = SearchArguments

    name: str
    space: Space
    settings: dict[str, Any] = field(default_factory=dict)
    backbones: tuple[str, ...] = tuple(BACKBONES)
    seeds: tuple[int, ...] = (0,)

    def flags(self) -> dict[str, Any]:
        """Config field → its type as a flag: a searched field is none."""
        return {name: tyro.conf.Suppress[TYPES[name]] for name in self.space}

    def values(self) -> dict[str, Any]:
        """Flag → what the study gives it."""
        return self.settings


def parse_study(study: Ablation | Search, description: str, arguments: list[str]) -> StudyArguments:
    """Command line → arguments. A swept field takes several values; a searched one is no flag. Raises UserError."""
    values = study.values()
    extra = [(name, kind, field(default=values.get(name, DEFAULTS.get(name)))) for name, kind in study.flags().items()]
    kind = make_dataclass("Options", extra, bases=(study.arguments,), frozen=True)
    defaults = {**values, "backbone": study.backbones, "seeds": study.seeds}
    options = parse(kind, arguments, f"python -m studies.{study.name}", description, **defaults)
    known = [name for name, shown in METRICS.items() if shown.better and name != "peak_memory_mb"]
    for metric in options.metric:
        if metric not in known:
            raise UserError(f"metric {metric!r} cannot be optimised; choose from {', '.join(known)}")
    if "fid" in options.metric and options.fid_weights is None and (missing := weights.inception_missing()):
        raise UserError(f"metric 'fid' cannot be had: {missing}; --metric fid_vgg16 can")
    for name, value in vars(options).items():
        flag = f"--{name.replace('_', '-')}"
        if value == ():
            raise UserError(f"{flag} needs at least one value")
        if name in POSITIVE and value is not None and value <= 0:
            raise UserError(f"{flag} is {value}; it must be above 0")
    return options
