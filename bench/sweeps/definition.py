"""What a study file says, and its command line: an Ablation or a Search, the values of a field, and the flags."""

import itertools
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, make_dataclass, replace
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import tyro
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import Trial

from backbones import BACKBONES, OPTIONS
from backbones import backbone as backbone_called
from bench import instruments
from bench.analysis.claims import Claim
from bench.analysis.frames import DEFAULTS, LABELS, METRICS
from bench.core.errors import UserError
from bench.core.settings import OneOf
from bench.metrics import EXTRACTORS, weights
from bench.priors.config import PriorConfig
from bench.tokenizers import curves
from bench.tokenizers.arguments import LOOKS, Arguments, parse
from bench.tokenizers.config import Config

from .address import hide_misplaced
from .objectives import UNSOUGHT, objectives

TYPES = get_type_hints(Config)
POSITIVE = ("workers", "processes", "trials", "timeout", "trial_timeout", "bits_per_image", "time", "cpus_per_worker")
# Beyond all use: each worker is a thread with a process of its own.
MOST = {"workers": 256, "processes": 256, "trials": 10**5, "confirm": 1000}
JOBS = ("launcher", "gpus_per_worker", "cpus_per_worker", "partition", "time", "sbatch")  # of who submits them alone


class Range(NamedTuple):
    """Values of a searched Config field between two ends, both included; ``log`` samples orders of magnitude evenly."""

    low: float
    high: float
    log: bool = False

    @property
    def whole(self) -> bool:
        """Whether only whole numbers are meant: both ends are."""
        return isinstance(self.low, int) and isinstance(self.high, int)


Space = dict[str, Range | tuple]  # Config field → Range, or the tuple of its possible values


def read_space(stored: dict[str, Any]) -> Space:
    """A search's space as its study's file has it."""
    return {name: Range(**choice) if isinstance(choice, dict) else tuple(choice) for name, choice in stored.items()}


def distribution(name: str, choice: Range | tuple | None = None) -> BaseDistribution:
    """Optuna's distribution of a Config field: of a search's ``choice``, or the widest, the same for all values that an
    ablation may give it. Raises UserError for a field that has none."""
    if choice is None:
        choice = _widest(name)
    if isinstance(choice, Range):
        return (IntDistribution if choice.whole else FloatDistribution)(choice.low, choice.high, log=choice.log)
    return CategoricalDistribution(choice)


def _widest(name: str) -> Range | tuple:
    kind = float if TYPES[name] == float | None else TYPES[name]
    if name == "backbone":
        return (*BACKBONES, "timm")
    if kind is bool:
        return (False, True)
    if kind in (int, float):
        return Range(kind(0), kind(2**31 - 1))
    if get_origin(kind) is Literal:
        return get_args(kind)
    for rule in get_args(get_type_hints(Config, include_extras=True)[name]):
        if isinstance(rule, OneOf):
            return tuple(rule.choices)
    raise UserError(f"{name} is text without a list of choices and cannot be swept")


def holding(values: Iterable[Any]) -> BaseDistribution:
    """The distribution that just holds ``values``: of numbers their range, by orders of magnitude from a ratio of ten
    on, of anything else each of them."""
    found = tuple(dict.fromkeys(values))
    if not all(type(value) in (int, float) for value in found):
        return CategoricalDistribution(found)
    low, high = min(found), max(found)
    kind = int if all(type(value) is int for value in found) else float
    return distribution("", Range(kind(low), kind(high), log=low > 0 and high >= 10 * low))


def suggest(trial: Trial, space: Space) -> dict[str, Any]:
    """Values of the searched fields for ``trial``; Optuna keeps those that it already has."""
    values = {}
    for name, choice in space.items():
        if isinstance(choice, Range):
            draw = trial.suggest_int if choice.whole else trial.suggest_float
            values[name] = draw(name, choice.low, choice.high, log=choice.log)
        else:
            values[name] = trial.suggest_categorical(name, choice)
    return values


@dataclass(frozen=True)
class StudyArguments(Arguments):
    """What every study takes besides the settings of its runs."""

    metric: tuple[str, ...] = ("lpips_vgg",)
    """what the dashboard ranks by and a search optimises; several make a search multi-objective, without pruning"""
    workers: int = 1
    """trials at a time on this machine, from 1; start the same command elsewhere for more. With --launcher, jobs that
    have one at a time"""
    processes: int = 1
    """processes that train each trial together, on this machine: the same run up to rounding. On GPUs each takes one"""
    storage: str | None = None
    """Optuna storage URL, postgresql+psycopg://... for many machines; the default is $VQBENCH_STORAGE, which keeps a
    password off the command line, or else SQLite below --results"""
    launcher: str | None = None
    """slurm: have workers be jobs of the cluster, wait for these, and cancel them on Ctrl-C"""
    gpus_per_worker: int = 0
    """GPUs of each job"""
    cpus_per_worker: int = 1
    """CPU cores of each job, from 1"""
    partition: str | None = None
    """where jobs are submitted to; the default is the cluster's own"""
    time: int | None = None
    """minutes that a job may take; two before their end it gives its trial back. The default is the partition's"""
    sbatch: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME=VALUE [NAME=VALUE ...]")] = ()
    """further options of sbatch for each job, by their long names without the dashes, such as mem=32G account=me"""
    plan: bool = False
    """show the cells, what is already finished and the estimated cost, and stop"""
    trial_timeout: float | None = None
    """seconds after which a trial is given up and recorded as timed out"""
    instruments: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME [NAME ...]", help=LOOKS)] = ("none",)


@dataclass(frozen=True)
class AblationArguments(StudyArguments):
    """What an ablation takes."""

    retry_failed: bool = False
    """run trials again that failed in an earlier command"""


@dataclass(frozen=True)
class WithPriors(StudyArguments):
    """What a study takes that trains priors."""

    prior: tuple[str, ...] = ()
    """priors to train over every tokenizer's codes"""
    prior_parameters: int = PriorConfig.parameters
    """parameters of each prior, by its width; from 1"""
    prior_steps: int = PriorConfig.steps
    """training steps of each prior; from 1"""
    samples: int = PriorConfig.samples
    """images to generate and score from each prior; from 4"""


@dataclass(frozen=True)
class PriorStudyArguments(AblationArguments, WithPriors):
    """What an ablation with priors takes."""


@dataclass(frozen=True)
class SearchArguments(WithPriors):
    """What a search takes."""

    metric: tuple[str, ...] = ()
    """what is optimised: by default lpips_vgg at one rate, or lpips_vgg and bits_per_image, whose trials are not pruned
    and end in a front. With --prior it may be what a prior makes of the codes: gfid_vgg16 and the like, beside
    bits_per_image unless all have one rate; or coded_bits_per_image as the rate, beside lpips_vgg or what else is
    named: alone, it would be best of a tokenizer that keeps nothing. No such trial is pruned, since how a tokenizer
    trains does not tell what will be generated"""
    prior: tuple[str, ...] = ()
    """the prior that is trained over the codes of each tokenizer, for a metric of generation"""
    bits_per_image: int | None = None
    """search at this rate alone, in bits: K follows from the grid"""
    confirm: int = 0
    """then train the best trial of each backbone at the preset's rate (at coded rates: that needs no more than the
    preset's own trial), and the preset itself, on so many fresh seeds and score them on the test"""
    trials: int = 30
    """trials per backbone, from 1, those of earlier commands included"""
    timeout: float | None = None
    """seconds of trials per backbone after which no further one starts"""


@dataclass(frozen=True)
class Ablation:
    """Every backbone at every combination of the values in ``sweep``, once per seed.

    ``settings`` are Config fields that all of it shares; they replace the preset's. ``priors``: what is then trained
    over the codes of each of these tokenizers, with the tokenizer's seed. ``alone``: not every combination, but the
    first values of all, and each further value with the first of all others; a backbone has options that it does not
    take at their defaults. ``metric``: what the dashboard ranks by. ``claims``: what its report answers.
    """

    name: str
    sweep: dict[str, tuple]
    settings: dict[str, Any] = field(default_factory=dict)
    backbones: tuple[str, ...] = tuple(BACKBONES)
    seeds: tuple[int, ...] = (0, 1, 2)
    priors: tuple[str, ...] = ()
    alone: bool = False
    metric: tuple[str, ...] = StudyArguments.metric
    claims: tuple[Claim, ...] = ()

    def combinations(self, backbone: str, space: dict[str, tuple]) -> list[dict[str, Any]]:
        """The values of ``space``, the swept fields as the command line has them, that ``backbone`` is trained with."""
        values = {name: tuple(dict.fromkeys(choices)) for name, choices in space.items()}
        if not self.alone:
            return [dict(zip(values, cell, strict=True)) for cell in itertools.product(*values.values())]
        taken = backbone_called(backbone).options
        own = [name for name in values if name in taken or name not in OPTIONS]
        first = {name: choices[0] if name in own else DEFAULTS[name] for name, choices in values.items()}
        return [first, *({**first, name: value} for name in own for value in values[name][1:])]


@dataclass(frozen=True)
class Search:
    """A search of ``space`` for each backbone by TPE, pruned on the training loss when it has one metric, and that of
    tokenizers. Its trials are scored on validation, whatever ``settings`` say: the test is for what was chosen."""

    name: str
    space: Space
    settings: dict[str, Any] = field(default_factory=dict)
    backbones: tuple[str, ...] = tuple(BACKBONES)
    seeds: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        object.__setattr__(self, "settings", {**self.settings, "split": "val"})


def parse_study(study: Ablation | Search, description: str, arguments: list[str]) -> StudyArguments:
    """Command line → arguments. A swept field takes several values; a searched one is no flag. Raises UserError."""
    values = {**study.settings, "backbone": study.backbones, "seeds": study.seeds}
    if isinstance(study, Search):
        some, base, flags = (
            (),
            SearchArguments,
            {name: tyro.conf.Suppress[TYPES[name]] for name in (*study.space, "split")},
        )
    else:
        base = PriorStudyArguments if study.priors else AblationArguments
        some = study.sweep if study.alone else ()
        flags = {name: tuple[TYPES[name], ...] for name in study.sweep}
        values |= study.sweep | {"metric": study.metric} | ({"prior": study.priors} if study.priors else {})
    extra = [(name, kind, field(default=values.get(name, DEFAULTS.get(name)))) for name, kind in flags.items()]
    options_type = make_dataclass("Options", extra, bases=(base,), frozen=True)
    words, prog = hide_misplaced(arguments), f"python -m studies.{study.name}"
    swept = study.sweep if isinstance(study, Ablation) else ()
    options = parse(options_type, words, prog, description, swept, some, **values)
    instruments.choose(options.instruments)  # raises UserError on an unknown one
    # not on every machine; of a codebook that collapses the best; not measured by trials
    unsought = {"peak_memory_mb", *curves.METRICS, *instruments.METRICS, *UNSOUGHT}
    measured = METRICS if isinstance(study, Ablation) else LABELS
    known = [name for name, shown in measured.items() if shown.better and name not in unsought]
    for metric in options.metric:
        if metric not in known:
            raise UserError(f"metric {metric!r} cannot be optimised; choose from {', '.join(known)}")
    if isinstance(study, Search):
        options = replace(options, metric=objectives(options.metric, options.prior, options.bits_per_image))
    for extractor, missing in (("inception", weights.inception_missing), ("dinov2", weights.dinov2_missing)):
        for of in ("", "g"):  # of reconstructions, and of what is generated
            name = f"{of}{EXTRACTORS[extractor].metric}"
            if name in options.metric and EXTRACTORS[extractor].digest(options.fid_weights) is None:
                raise UserError(f"metric {name!r} cannot be had: {missing()}; --metric {of}fid_vgg16 can")
    _check_jobs(options, words)
    optional = ("--prior", "--sbatch") if isinstance(study, Search) else ("--sbatch",)
    for name, value in vars(options).items():
        flag = f"--{name.replace('_', '-')}"
        if value == () and flag not in optional:
            raise UserError(f"{flag} needs at least one value")
        if name == "confirm" and value < 0:
            raise UserError(f"{flag} is {value}; it must be 0 or more")
        if name in POSITIVE and value is not None and not 0 < value < math.inf:
            raise UserError(f"{flag} is {value}; it must be a number above 0")
        if name in MOST and value > MOST[name]:
            raise UserError(f"{flag} is {value}; it must be at most {MOST[name]}")
    return options


def _check_jobs(options: StudyArguments, words: list[str]) -> None:
    """Raises UserError where trials are not to be trained as ``options`` have it, by the command line ``words``: by
    several processes, or in jobs."""
    if options.gpus_per_worker < 0:
        raise UserError(f"--gpus-per-worker is {options.gpus_per_worker}; it must be 0 or more")
    if wrong := [word for word in options.sbatch if not re.fullmatch(r"[\w-]+=.+", word)]:
        raise UserError(f"--sbatch has {wrong[0]!r}; it takes NAME=VALUE, such as mem=32G")
    given = {word.partition("=")[0].replace("_", "-") for word in words}
    for name in JOBS:
        flag = f"--{name.replace('_', '-')}"
        if getattr(options, name) != getattr(StudyArguments, name) and not {flag, "--launcher"} <= given:
            fix = "add --launcher slurm" if flag in given else "give it and --launcher on the command line"
            raise UserError(f"{flag} is of jobs that a command submits; {fix}, or leave it out")
    several = f"--processes is {options.processes}" if options.processes > 1 else ""
    if options.timed and (several or options.launcher):
        told = several or f"--launcher is {options.launcher}"
        raise UserError(f"{told}, and --match {options.match} measures steps in one process here; give --steps instead")
    if several and (prior := vars(options).get("prior")):
        raise UserError(f"{several}, and the prior {prior[0]} is trained by one; leave out one of them")
