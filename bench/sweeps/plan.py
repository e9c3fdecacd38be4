"""What a study consists of: its command line, its cells, what is missing of them and what that will cost.

A study file (see ``studies/``) is an Ablation or a Search, and ``main`` of ``bench.study``.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections import Counter
from dataclasses import MISSING, dataclass, field, fields, make_dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, NamedTuple, get_type_hints

import pandas as pd
import tyro
from rich import box
from rich.table import Table

from backbones import BACKBONES
from bench.analysis.frames import METRICS, frame
from bench.core.errors import UserError
from bench.core.store import FAILURES, Run, Store
from bench.metrics import weights
from bench.priors.config import PriorConfig
from bench.tokenizers.arguments import Arguments, parse
from bench.tokenizers.budgets import step_seconds
from bench.tokenizers.config import Config, preset_settings
from bench.tokenizers.presets import PRESETS

DEFAULTS = {one.name: None if one.default is MISSING else one.default for one in fields(Config)}
TYPES = get_type_hints(Config)


class Range(NamedTuple):
    """Values of a searched Config field between two ends, both included; ``log`` samples orders of magnitude evenly."""

    low: float
    high: float
    log: bool = False


Space = dict[str, "Range | tuple"]  # Config field → Range, or the tuple of its possible values


def read_space(stored: dict[str, Any]) -> Space:
    """A search's space as its study's file has it."""
    return {name: Range(**choice) if isinstance(choice, dict) else tuple(choice) for name, choice in stored.items()}


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


@dataclass(frozen=True)
class Search:
    """A search of ``space`` for each backbone by TPE, pruned on the training loss when it has one metric."""

    name: str
    space: Space
    settings: dict[str, Any] = field(default_factory=dict)
    backbones: tuple[str, ...] = tuple(BACKBONES)
    seeds: tuple[int, ...] = (0,)


@dataclass(frozen=True)
class StudyArguments(Arguments):
    """What every study takes beside the settings of its runs."""

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


def parse_study(study: Ablation | Search, description: str, arguments: list[str]) -> StudyArguments:
    """Command line → arguments. A swept field takes several values; a searched one is no flag. Raises UserError."""
    if isinstance(study, Ablation):
        base, values = PriorStudyArguments if study.priors else AblationArguments, study.sweep
        flags = {name: Annotated[tuple[TYPES[name], ...], tyro.conf.arg(help="values to sweep")] for name in values}
    else:
        base, values = SearchArguments, {}
        flags = {name: tyro.conf.Suppress[TYPES[name]] for name in study.space}
    extra = [(name, kind, field(default=values.get(name, DEFAULTS.get(name)))) for name, kind in flags.items()]
    kind = make_dataclass("Options", extra, bases=(base,), frozen=True)
    defaults = {**study.settings, **values, "backbone": study.backbones, "seeds": study.seeds}
    defaults |= {"prior": study.priors} if getattr(study, "priors", ()) else {}
    options = parse(kind, arguments, f"python -m studies.{study.name}", description, **defaults)
    missing = weights.inception_missing() if options.fid_weights is None else ""
    known = [name for name, shown in METRICS.items() if shown.better and name != "peak_memory_mb"]
    for metric in options.metric:
        if metric not in known:
            raise UserError(f"metric {metric!r} cannot be optimised; choose from {', '.join(known)}")
        if metric == "fid" and missing:
            raise UserError(f"metric 'fid' cannot be had: {missing}; --metric fid_vgg16 can")
    if not isinstance(study, Ablation) and (options.match or "").startswith("time:"):
        raise UserError(f"--match {options.match} would give each trial of a search other steps; match params or flops")
    for name in ("backbone", "seeds", "metric", *values, *(("prior",) if getattr(study, "priors", ()) else ())):
        if not getattr(options, name):
            raise UserError(f"--{name.replace('_', '-')} needs at least one value")
    for name in ("workers", "trials", "timeout", "trial_timeout"):
        value = getattr(options, name, None)
        if value is not None and value <= 0:
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must be above 0")
    return options


class Cell(NamedTuple):
    """One trial of an ablation: its Optuna parameters, the seed among them, and its run."""

    params: dict[str, Any]
    run: Run


class Plan:
    """A study with its arguments. Raises UserError when one of its configs cannot work."""

    def __init__(self, study: Ablation | Search, options: StudyArguments):
        self.study, self.options, self.store = study, options, Store(options.results)
        self.searching = isinstance(study, Search)
        self.swept = tuple(study.space if self.searching else study.sweep)
        self.backbones = tuple(dict.fromkeys(options.backbone))
        self.seeds = tuple(dict.fromkeys(options.seeds))
        self.cells = {backbone: self._cells(backbone) for backbone in self.backbones}
        self.priors()  # checks them before any tokenizer is trained

    def priors(self) -> list[PriorConfig]:
        """The priors over every tokenizer that is finished. Raises UserError when one of them cannot work."""
        found = []
        for cells in self.cells.values():
            for cell in cells:
                for prior in dict.fromkeys(getattr(self.options, "prior", ())):
                    config = PriorConfig(
                        tokenizer=cell.run.folder.name,
                        prior=prior,
                        parameters=self.options.prior_parameters,
                        steps=self.options.prior_steps,
                        samples=self.options.samples,
                        precision=self.options.precision,
                        device=self.options.device,
                        seed=cell.params["seed"],
                    )
                    config.check()
                    found += [config.resolved()] if cell.run.finished else []
        return found

    @cached_property
    def name(self) -> str:
        """The study's name, its preset, and every setting that differs from what these two say."""
        usual = DEFAULTS | {**preset_settings(self.options.preset), **self.study.settings}
        own = PRESETS[self.options.preset]["own"].values()
        uneven = {name for settings in own for name in settings} - {*self.study.settings}  # no value of them is usual
        machine = ("device", "precision", *self.swept)
        words = [self.study.name, self.options.preset]
        for name, value in self.options.settings().items():
            if name in machine or (value == usual[name] and name not in uneven):
                continue
            if name == "data" and value.startswith("folder:"):
                path = Path(value.removeprefix("folder:")).expanduser().resolve()
                value = f"{path.name}-{hashlib.sha256(str(path).encode()).hexdigest()[:6]}"
            value = f"{value:g}" if isinstance(value, float) else value
            words.append(f"{name}={value}" if name != "data" else value)
        if self.searching and self.seeds != self.study.seeds:  # a trial's value is the mean over them
            words.append("seeds=" + "+".join(map(str, self.seeds)))
        words += [f"match={self.options.match}"] if self.options.match else []
        for name in ("prior_parameters", "prior_steps", "samples"):
            usual_value = getattr(PriorConfig, name.removeprefix("prior_"))
            if getattr(self.options, name, usual_value) != usual_value:
                words.append(f"{name}={getattr(self.options, name)}")
        return re.sub(r"[^\w.=-]+", "_", "-".join(words))

    def header(self) -> dict[str, Any]:
        """What the study's file says beside its runs."""
        header = {"study": self.study.name, "sweep": self.swept, "metrics": self.options.metric}
        if not self.searching:
            return {**header, "kind": "ablation", "space": {}}
        space = {name: c._asdict() if isinstance(c, Range) else c for name, c in self.study.space.items()}
        return {**header, "kind": "search", "space": space}

    def configs(self, backbone: str, params: dict[str, Any]) -> list[Config]:
        """The runs of a trial with ``params``: one, or in a search one per seed."""
        settings = {name: value for name, value in params.items() if name != "seed"}
        seeds = (params["seed"],) if "seed" in params else self.seeds
        return [self.options.config(backbone, seed, **settings).resolved() for seed in seeds]

    def _cells(self, backbone: str) -> list[Cell]:
        """An ablation's trials, all cells of one seed before the next. A search makes its own as it goes."""
        if self.searching:
            first = {name: choice[0] for name, choice in self.study.space.items()}
            self.configs(backbone, first)[0].check()
            return []
        values = [dict.fromkeys(getattr(self.options, name)) for name in self.swept]
        cells = []
        for seed, *combination in itertools.product(self.seeds, *values):
            params = {**dict(zip(self.swept, combination, strict=True)), "seed": seed}
            config = self.configs(backbone, params)[0]
            config.check()
            cells.append(Cell(params, self.store.run(config)))
        return cells

    def missing(self, backbone: str) -> list[Cell]:
        """Cells to run: neither finished nor, unless failed ones are to be retried, failed. A run that a search pruned
        says nothing about the cell of an ablation."""
        done = {"finished"} if self.options.retry_failed else {"finished", *FAILURES} - {"pruned"}
        return [cell for cell in self.cells[backbone] if cell.run.status not in done]

    def table(self) -> Table:
        """Cells × seeds, what the store has of them, and what training the rest will cost on this machine."""
        known = frame(self.store.runs())
        table = Table(title=f"study {self.name}", title_justify="left", box=box.SIMPLE_HEAD)
        for heading in ("backbone", "cells × seeds", "finished", "failed", "to run", "training, about"):
            table.add_column(heading, justify="left" if heading == "backbone" else "right")
        total = 0.0
        for backbone, cells in self.cells.items():
            status = Counter(cell.run.status for cell in cells)
            failed = sum(count for name, count in status.items() if name in FAILURES)
            if self.searching:
                rows, shape = self._recorded(backbone), f"{self.options.trials} × {len(self.seeds)}"
                status = Counter(row.status for row in rows)
                failed = sum(count for name, count in status.items() if name in FAILURES)
                open_trials = max(0, self.options.trials * len(self.seeds) - status["finished"] - failed)
                first = {name: choice[0] for name, choice in self.study.space.items()}
                configs = self.configs(backbone, first)[:1] * open_trials
            else:
                shape = f"{len(cells) // len(self.seeds)} × {len(self.seeds)}"
                configs = [self.configs(backbone, cell.params)[0] for cell in self.missing(backbone)]
            seconds = sum(estimates(configs, known))
            total += seconds
            counts = [str(status["finished"]), str(failed), str(len(configs))]
            table.add_row(backbone, shape, *counts, f"{seconds / 60:.1f} min")
        table.caption = f"{total / 60:.0f} minutes of training in all; scoring comes on top"
        if names := getattr(self.options, "prior", ()):
            runs = [self.store.run(config) for config in self.priors()]
            planned = len(dict.fromkeys(names)) * sum(map(len, self.cells.values()))
            finished = sum(run.finished for run in runs)
            table.caption += f"; priors, not in these minutes: {finished} of {planned} finished"
        return table

    def _recorded(self, backbone: str) -> list[Run]:
        """Runs that the study's file lists for ``backbone``."""
        if self.name not in self.store.studies():
            return []
        runs = self.store.study(self.name)["runs"]
        return [self.store.named(run_id) for run_id, row in runs.items() if row["backbone"] == backbone]


def estimates(configs: list[Config], known: pd.DataFrame) -> list[float]:
    """Training seconds of ``configs`` on this machine: from finished runs of equal shape in ``known``, else from a few
    steps that are run now."""
    shape = ("backbone", "width", "depth", "image_size", "grid_size", "batch_size", "lpips_weight", "lpips_net")
    shape += ("quantizer", "codebook_size", "code_dim")
    finished = known[known.status == "finished"]
    per_step: dict[tuple, float] = {}
    for config in configs:
        key = tuple(getattr(config, name) for name in (*shape, "device", "precision"))
        if key not in per_step:
            same = finished
            for name, value in zip((*shape, "device", "precision"), key, strict=True):
                same = same[same[name] == value]
            rates = same.train_seconds / same.steps
            per_step[key] = float(rates.median()) if len(rates) else step_seconds(config)
    return [
        config.steps * per_step[tuple(getattr(config, name) for name in (*shape, "device", "precision"))]
        for config in configs
    ]
