"""What a study consists of: its trials, what is missing of them and what that will cost.

An ablation's plan and a search's are siblings with the same methods; ``make_plan`` chooses by what the study file says.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Collection
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from rich import box
from rich.table import Table

from bench.analysis.frames import frame
from bench.core.errors import UserError
from bench.core.store import FAILURES, Run, Store
from bench.priors.config import PriorConfig
from bench.tokenizers.budgets import step_seconds
from bench.tokenizers.config import Config, preset_settings
from bench.tokenizers.presets import PRESETS

from .definition import DEFAULTS, Ablation, Search, StudyArguments
from .index import Index, Study, Trial
from .kinds import KINDS, AnyConfig, Kind
from .space import suggest

PRIOR_SETTINGS = {"prior_parameters": "parameters", "prior_steps": "steps", "samples": "samples"}  # flag → field


class Cell(NamedTuple):
    """One trial: its Optuna parameters and its runs, which are one or, in a search, one per seed."""

    params: dict[str, Any]
    configs: list[AnyConfig]
    runs: list[Run]

    @property
    def run(self) -> Run:
        """The first run, by whose id the index knows the trial."""
        return self.runs[0]


class Part(NamedTuple):
    """What of a study has an Optuna study of its own: the tokenizers of a backbone, or the priors of one kind."""

    name: str  # of the Optuna study
    kind: Kind
    label: str  # the backbone, or the prior
    steps: int  # of training, per run
    metrics: tuple[str, ...]
    cells: list[Cell]  # an ablation's; a search makes its own as it goes

    def rows(self, cells: list[Cell]) -> dict[str, dict[str, Any]]:
        """Runs of ``cells`` as the study's file has them."""
        about = {self.kind.key: self.label}
        return {
            run.folder.name: {**about, **cell.params, "seed": config.seed}
            for cell in cells
            for config, run in zip(cell.configs, cell.runs, strict=True)
        }


class Plan:
    """What both plans share. Raises UserError when one of its configs cannot work."""

    kind: str
    swept: tuple[str, ...]
    final: Collection[str]  # how a run has ended that is not run again

    def __init__(self, study: Ablation | Search, options: StudyArguments):
        self.study, self.options, self.store = study, options, Store(options.results)
        self.backbones = tuple(dict.fromkeys(options.backbone))
        self.seeds = tuple(dict.fromkeys(options.seeds))
        self.cells = {backbone: self._cells(backbone) for backbone in self.backbones}

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
        match = [f"match={self.options.match}"] if self.options.match else []
        return re.sub(r"[^\w.=-]+", "_", "-".join(self._named(words, match)))

    def header(self) -> dict[str, Any]:
        """What the study's file says besides its runs."""
        header = {"study": self.study.name, "sweep": self.swept, "metrics": self.options.metric}
        return {**header, "kind": self.kind, "space": self._space()}

    def configs(self, backbone: str, params: dict[str, Any]) -> list[Config]:
        """The runs of a trial with ``params``: one, or in a search one per seed."""
        settings = {name: value for name, value in params.items() if name != "seed"}
        seeds = (params["seed"],) if "seed" in params else self.seeds
        return [self.options.config(backbone, seed, **settings).resolved() for seed in seeds]

    def wants(self, run: Run) -> bool:
        """Whether ``run`` is still to be run: neither finished nor, unless failed ones are to be retried, failed."""
        return run.status not in self.final

    def tokenizers(self) -> list[Part]:
        """A part per backbone."""
        kind, options = KINDS[Config.SHELF], self.options
        return [
            Part(kind.study(self.name, name), kind, name, options.steps, options.metric, cells)
            for name, cells in self.cells.items()
        ]

    def _cell(self, params: dict[str, Any], configs: list[AnyConfig]) -> Cell:
        return Cell(params, configs, [self.store.run(config) for config in configs])

    def table(self) -> Table:
        """Cells × seeds, what the store has of them, and what training the rest will cost on this machine."""
        known = frame(self.store.runs())
        table = Table(title=f"study {self.name}", title_justify="left", box=box.SIMPLE_HEAD)
        for heading in ("backbone", "cells × seeds", "finished", "failed", "to run", "training, about"):
            table.add_column(heading, justify="left" if heading == "backbone" else "right")
        total = 0.0
        for backbone in self.backbones:
            cells, status, configs = self._row(backbone)
            failed = sum(count for name, count in status.items() if name in FAILURES)
            seconds = sum(estimates(configs, known))
            total += seconds
            counts = [str(status["finished"]), str(failed), str(len(configs))]
            table.add_row(backbone, f"{cells} × {len(self.seeds)}", *counts, f"{seconds / 60:.1f} min")
        table.caption = f"{total / 60:.0f} minutes of training in all; scoring comes on top" + self._further()
        return table


class AblationPlan(Plan):
    """The plan of an Ablation: cells × seeds, and priors over those that are finished."""

    kind = "ablation"

    def __init__(self, study: Ablation, options: StudyArguments):
        self.swept = tuple(study.sweep)
        # what a search pruned says nothing about a cell
        self.final = {"finished"} if options.retry_failed else {"finished", *FAILURES} - {"pruned"}
        self._enqueued: set[str] = set()  # by this plan, which tries what failed before once more
        self._prior_names = tuple(dict.fromkeys(options.prior)) if study.priors else ()
        super().__init__(study, options)
        for cell in itertools.chain(*self.cells.values()):
            for prior in self._prior_names:
                self._prior(prior, cell).check()  # before any tokenizer is trained

    def _cells(self, backbone: str) -> list[Cell]:
        """All cells of one seed before those of the next."""
        values = [dict.fromkeys(vars(self.options)[name]) for name in self.swept]
        cells = []
        for seed, *combination in itertools.product(self.seeds, *values):
            params = {**dict(zip(self.swept, combination, strict=True)), "seed": seed}
            (config,) = self.configs(backbone, params)
            config.check()
            cells.append(self._cell(params, [config]))
        return cells

    def example(self, backbone: str) -> Config:
        """One config, to prepare data and weights with."""
        return self.cells[backbone][0].configs[0]

    def priors(self) -> list[Part]:
        """A part per prior, with a cell for every tokenizer that is finished."""
        finished = [(name, one) for name, cells in self.cells.items() for one in cells if one.run.finished]
        kind, parts = KINDS[PriorConfig.SHELF], []
        for prior in self._prior_names if finished else ():
            cells = [
                # timm's models go by one name: Optuna has to know all values beforehand
                self._cell({"backbone": name.partition(":")[0], **one.params}, [self._prior(prior, one).resolved()])
                for name, one in finished
            ]
            study = kind.study(self.name, prior)
            parts.append(Part(study, kind, prior, self.options.prior_steps, kind.ranked, cells))
        return parts

    def _prior(self, prior: str, cell: Cell) -> PriorConfig:
        (config,), options = cell.configs, self.options
        return PriorConfig(
            tokenizer=cell.run.folder.name,
            prior=prior,
            **{field: vars(options)[flag] for flag, field in PRIOR_SETTINGS.items()},
            precision=options.precision,
            device=options.device,
            seed=config.seed,
        )

    def fill(self, part: Part, index: Index, study: Study) -> int:
        """Enqueues what is missing and records what ended elsewhere. Returns the number of trials to be run, those that
        other workers have included."""
        rows = part.rows(part.cells)
        self.store.extend_study(self.name, self.header(), rows, part.kind.shelf)
        states = index.states(study)
        for cell in part.cells:
            run_id = cell.run.folder.name
            known, failed_again = states.get(run_id, set()), run_id in self._enqueued and cell.run.status in FAILURES
            if known & {"WAITING", "RUNNING"}:
                continue  # whoever takes it, or has it, will look into the store
            if self.wants(cell.run) and not failed_again:
                self._enqueued.add(run_id)
                index.enqueue(study, cell.params, run_id)
            elif not known & ({"COMPLETE"} if cell.run.finished else {"FAIL", "PRUNED"}):
                index.add(study, cell.params, cell.runs, part.metrics, {})
        return index.waiting(study, {*rows}) + index.running(study, {*rows})

    def allows(self, index: Index, study: Study) -> bool:
        """Whether another trial may begin."""
        return True

    def prunes(self, trial: Trial) -> bool:
        """Whether a trial is to be given up for its curve."""
        return False

    def claimed(self, part: Part, trial: Trial) -> Cell:
        """The runs of a trial that was taken."""
        return next(cell for cell in part.cells if cell.run.folder.name == trial.user_attrs["run_id"])

    def failed(self) -> bool:
        """Whether a planned run has no scores."""
        parts = (*self.tokenizers(), *self.priors())
        return not all(cell.run.finished for part in parts for cell in part.cells)

    def _named(self, words: list[str], match: list[str]) -> list[str]:
        if not self._prior_names:
            return words + match
        given = {flag: vars(self.options)[flag] for flag in PRIOR_SETTINGS}
        usual = {flag: getattr(PriorConfig, field) for flag, field in PRIOR_SETTINGS.items()}
        return words + match + [f"{flag}={value}" for flag, value in given.items() if value != usual[flag]]

    def _space(self) -> dict[str, Any]:
        return {}

    def _row(self, backbone: str) -> tuple[int, Counter[str], list[Config]]:
        """Cells per seed, how runs ended, and the configs to run."""
        cells = self.cells[backbone]
        configs = [cell.configs[0] for cell in cells if self.wants(cell.run)]
        return len(cells) // len(self.seeds), Counter(cell.run.status for cell in cells), configs

    def _further(self) -> str:
        if not self._prior_names:
            return ""
        planned = len(self._prior_names) * sum(map(len, self.cells.values()))
        finished = sum(cell.run.finished for part in self.priors() for cell in part.cells)
        return f"; priors, not in these minutes: {finished} of {planned} finished"


class SearchPlan(Plan):
    """The plan of a Search: so many trials, whose values are drawn when they are taken."""

    kind = "search"
    final = frozenset({"finished", *FAILURES})

    def __init__(self, study: Search, options: StudyArguments):
        self.swept = tuple(study.space)
        if (options.match or "").startswith("time:"):
            raise UserError(
                f"--match {options.match} would give each trial of a search other steps; match params or flops"
            )
        super().__init__(study, options)

    def _cells(self, backbone: str) -> list[Cell]:
        self.example(backbone).check()
        return []

    def example(self, backbone: str) -> Config:
        """One config, to prepare data and weights with."""
        return self.configs(backbone, self.study.first())[0]

    def priors(self) -> list[Part]:
        """None: a search is of tokenizers."""
        return []

    def fill(self, part: Part, index: Index, study: Study) -> int:
        """Enqueues what is missing of the budget. Returns the number of trials to be run, those that other workers have
        included."""
        self.store.extend_study(self.name, self.header(), {})
        for _ in range(self.options.trials - index.counted(study)):
            index.enqueue(study, {})
        return max(0, self.options.trials - index.ended(study))

    def allows(self, index: Index, study: Study) -> bool:
        """Whether another trial may begin: neither are all begun nor is the time over."""
        if self.options.timeout is not None and index.seconds(study) >= self.options.timeout:
            return False
        return index.ended(study) + index.running(study, set()) < self.options.trials

    def prunes(self, trial: Trial) -> bool:
        """Whether a trial is to be given up for its curve."""
        return trial.should_prune()

    def claimed(self, part: Part, trial: Trial) -> Cell:
        """Draws the values of a trial that was taken, and records its runs."""
        params = suggest(trial, self.study.space)
        cell = self._cell(params, self.configs(part.label, params))
        self.store.extend_study(self.name, self.header(), part.rows([cell]))
        return cell

    def failed(self) -> bool:
        """Whether a run failed, which a pruned one has not."""
        runs = self.store.study(self.name)["runs"]
        return any(self.store.named(run_id).status in {*FAILURES} - {"pruned"} for run_id in runs)

    def _named(self, words: list[str], match: list[str]) -> list[str]:
        if self.seeds != self.study.seeds:  # a trial's value is the mean over them
            words = [*words, "seeds=" + "+".join(map(str, self.seeds))]
        return words + match

    def _space(self) -> dict[str, Any]:
        return self.study.stored()

    def _row(self, backbone: str) -> tuple[int, Counter[str], list[Config]]:
        """Trials, how runs ended, and a config for each that is left of the budget."""
        studies = self.store.studies()
        runs = self.store.study(self.name)["runs"] if self.name in studies else {}
        rows = [self.store.named(run_id) for run_id, row in runs.items() if row["backbone"] == backbone]
        status = Counter(run.status for run in rows)
        ended = sum(status[name] for name in ("finished", *FAILURES))
        left = max(0, self.options.trials * len(self.seeds) - ended)
        return self.options.trials, status, [self.example(backbone)] * left

    def _further(self) -> str:
        return ""


PLANS = {Ablation: AblationPlan, Search: SearchPlan}


def make_plan(study: Ablation | Search, options: StudyArguments) -> AblationPlan | SearchPlan:
    """The plan of ``study``. Raises UserError when one of its configs cannot work."""
    return PLANS[type(study)](study, options)


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
