"""What a study consists of: its trials, what is missing of them and what that will cost."""

import hashlib
import heapq
import itertools
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from rich import box
from rich.table import Table

from backbones import OPTIONS
from bench.analysis.frames import DEFAULTS, frame, statuses
from bench.core.errors import UserError
from bench.core.files import FILES, located
from bench.core.runs import FAILURES, Run
from bench.core.store import Store
from bench.priors.config import PriorConfig
from bench.tokenizers.budgets import step_flops, step_seconds
from bench.tokenizers.config import Config, preset_settings
from bench.tokenizers.presets import PRESETS
from bench.tokenizers.source import weights_in

from .definition import Ablation, Search, Space, StudyArguments
from .index import Index, Study, Trial, TrialState
from .kinds import PRIORS, TOKENIZERS, AnyConfig, Kind, endings

PRIOR_SETTINGS = {"prior_parameters": "parameters", "prior_steps": "steps", "samples": "samples"}  # flag → field
SHAPE = ("backbone", "width", "depth", "image_size", "grid_size", "batch_size", "lpips_weight", "lpips_net")
SHAPE += ("quantizer", "codebook_size", "code_dim", "device", "precision", "gan_weight", *OPTIONS)
SHAPE += ("alignment_weight", "alignment_model", "freeze")  # what the time of a step depends on
SCORED = ("data", "split", "image_size")  # which images are scored, on which the time of that depends most
LONGEST_NAME = 200  # bytes of a study's name: files are called by it, and by a few letters more
PACED = 20  # runs of a shape that its time is estimated by
START_SECONDS = 5.0  # until a command that has imported everything begins its first trials
REHEARSED = 4  # steps that are trained to learn what one takes
SHORT = 2e12  # operations of a step that a CPU has done in seconds
SERIAL = 0.3  # of the time of a run on one thread: what more threads do not shorten, a guess between all and nothing


class Cell(NamedTuple):
    """One trial: its Optuna parameters and its runs, which are one or, in a search, one per seed, each followed by the
    prior over its codes if trials are judged by one."""

    params: dict[str, Any]
    configs: list[AnyConfig]
    runs: list[Run]
    role: str = ""  # of one that confirms a search: whose settings it has

    @property
    def run(self) -> Run:
        """The first run, by whose id the index knows the trial."""
        return self.runs[0]

    @property
    def told(self) -> dict[str, str]:
        """What its rows in the study's file say besides its parameters."""
        return {"role": self.role} if self.role else {}


class Part(NamedTuple):
    """What of a study has an Optuna study of its own: the tokenizers of a backbone, or the priors of one kind."""

    name: str  # of the Optuna study
    kind: Kind
    label: str  # the backbone, or the prior
    steps: int  # of training, per run
    metrics: tuple[str, ...]
    shelf: str  # the part of the study's file that its runs are in
    cells: list[Cell]  # known beforehand; a search makes its own as it goes

    def open(self, index: Index) -> Study:
        """Its Optuna study, made if need be."""
        return index.open(self.name, self.metrics, self.steps)

    def rows(self, cells: list[Cell]) -> dict[str, dict[str, dict[str, Any]]]:
        """Runs of ``cells`` as each part of the study's file has them: a prior in a tokenizer's trial as its tokenizer,
        and what it is called. Priors come first: a trial that is listed is listed with them."""
        found: dict[str, dict[str, dict[str, Any]]] = {PRIORS.config.SHELF: {}, self.shelf: {}}
        for cell in cells:
            for config, run in zip(cell.configs, cell.runs, strict=True):
                row = {self.kind.key: self.label, **cell.params, "seed": config.seed} | cell.told
                own = isinstance(config, self.kind.config)
                shelf, row = (self.shelf, row) if own else (config.SHELF, {PRIORS.key: config.prior, **row})
                found[shelf][run.folder.name] = row
        return {shelf: rows for shelf, rows in found.items() if rows or shelf == self.shelf}


class Row(NamedTuple):
    """A line of a plan's table: cells per seed or trials, how runs ended, a config for each that is missing, and what
    of an ablation is finished."""

    cells: int
    status: Counter[str]
    missing: list[Config]
    done: Sequence[Cell] = ()


class Plan:
    """What the plans of an ablation and of a search share: all methods are the same. Raises UserError when one of its
    configs cannot work."""

    kind: str
    final = frozenset({"finished", *FAILURES})  # how a run has ended that is not run again

    def __init__(self, study: Ablation | Search, options: StudyArguments, space: Space):
        self.study, self.options, self.space, self.store = study, options, space, Store(options.results)
        self.backbones = tuple(dict.fromkeys(options.backbone))
        self.seeds = tuple(dict.fromkeys(options.seeds))
        self._prior_names = tuple(dict.fromkeys(vars(options).get("prior", ())))
        self._enqueued: set[str] = set()  # by this plan, which tries what failed before once more
        self.cells = {backbone: self._cells(backbone) for backbone in self.backbones}

    @cached_property
    def name(self) -> str:
        """The study's name, its preset, and every setting that differs from what these two say."""
        usual = {**DEFAULTS, **preset_settings(self.options.preset), **self.study.settings}
        own = PRESETS[self.options.preset]["own"].values()
        uneven = {name for settings in own for name in settings} - {*self.study.settings}  # no value of them is usual
        unnamed = ("device", "precision", *self.space)
        words = [self.study.name, self.options.preset]
        for name, value in self.options.settings().items():
            if name in unnamed or (value == usual.get(name) and name not in uneven):
                continue
            if name == "data" and value.partition(":")[0] in FILES:
                path = located(value).partition(":")[2]
                value = f"{os.path.basename(path)}-{hashlib.sha256(os.fsencode(path)).hexdigest()[:6]}"
            value = weights_in(value) if name == "init_from" else value
            exact = str(value) if isinstance(value, float) and float(shown(value)) != value else shown(value)
            words.append(value if name == "data" else f"{name}={exact}")
        name = re.sub(r"[^\w.=-]+", "_", "-".join(words + self._words()))
        if len(name.encode()) <= LONGEST_NAME:
            return name
        digest = hashlib.sha256(name.encode()).hexdigest()[:12]
        return f"{name[: LONGEST_NAME // 5]}-{digest}"  # a letter has four bytes at most

    def header(self) -> dict[str, Any]:
        """What the study's file says besides its runs."""
        header = {"study": self.study.name, "sweep": tuple(self.space), "metrics": self.options.metric}
        claims = [claim._asdict() for claim in vars(self.study).get("claims", ())]
        return {**header, "kind": self.kind, "space": {}, **({"claims": claims} if claims else {})}

    def example(self, backbone: str) -> Config:
        """A config to prepare data and weights with: the first values, at the first seed."""
        return self.configs(backbone, {name: choice[0] for name, choice in self.space.items()})[0]

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
        return [self._part(TOKENIZERS, name, self.options.steps, cells) for name, cells in self.cells.items()]

    def followers(self) -> list[Part]:
        """What waits for the tokenizers: a part per prior, with a cell for every tokenizer that is finished, or what
        confirms a search."""
        raise NotImplementedError

    def fill(self, part: Part, index: Index) -> int:
        """Enqueues what is missing of ``part`` and records what ended elsewhere. Returns how many trials are to be run,
        those that other workers have included."""
        with index.planning:
            study = part.open(index)
            index.recover(study)
            return self._fill(part, index, study)

    def _fill(self, part: Part, index: Index, study: Study) -> int:
        self._list(part, part.cells)
        states = index.states(study)
        missing: list[tuple[dict[str, Any], str]] = []
        ended: list[tuple[dict[str, Any], list[Run]]] = []
        status = ending([part])  # after the states: what ends in between is known to one of them
        for cell in part.cells:
            run_id, how = cell.run.folder.name, status[cell.run]
            known, failed_again = states.get(run_id, set()), run_id in self._enqueued and how in FAILURES
            if known & {"WAITING", "RUNNING"}:
                continue  # whoever takes it, or has it, will look into the store
            if how not in self.final and not failed_again:
                self._enqueued.add(run_id)
                missing.append((cell.params, run_id))
            elif not known & ({"COMPLETE"} if how == "finished" else {"FAIL", "PRUNED"}):
                ended.append((cell.params, cell.runs))
        index.enqueue(study, missing)
        index.add(study, ended, part.metrics, {})
        index.narrow(study)
        ours = {cell.run.folder.name for cell in part.cells}
        return len(index.trials(study, TrialState.WAITING, TrialState.RUNNING, of=ours))

    def _list(self, part: Part, cells: list[Cell]) -> None:
        """Records the runs of ``cells`` in the study's file."""
        for shelf, rows in part.rows(cells).items():
            self.store.extend_study(self.name, self.header(), rows, shelf)

    def claimed(self, part: Part, trial: Trial) -> Cell:
        """The runs of a trial that was taken."""
        return next(cell for cell in part.cells if cell.run.folder.name == trial.user_attrs["run_id"])

    def failed(self) -> bool:
        """Whether a planned run has no scores."""
        return {*ending([*self.tokenizers(), *self.followers()]).values()} != {"finished"}

    def told(self, part: Part, params: dict[str, Any]) -> dict[str, Any]:
        """What a line on a trial of ``params`` says of them: of options that are swept alone, what is not as usual."""
        usual = {}
        if isinstance(self.study, Ablation) and self.study.alone and part.label in self.cells:
            usual = self.study.combinations(part.label, self.space)[0]
        return {name: value for name, value in params.items() if name not in usual or usual[name] != value}

    def allows(self, part: Part, index: Index, study: Study) -> bool:
        """Whether another trial may begin: in a search, neither are all begun nor is the time over."""
        return True

    def prunes(self, part: Part, trial: Trial) -> bool:
        """Whether a trial of a search is to be given up for its curve."""
        return False

    def table(self) -> Table:
        """Cells × seeds, what the store has of them, and what the rest will cost here, as far as finished runs tell."""
        rows = {backbone: self._row(backbone) for backbone in self.backbones}
        known, tried = with_rehearsals(
            self._known(rows.values()), [one for row in rows.values() for one in row.missing]
        )
        table = Table(title=f"study {self.name}", title_justify="left", box=box.SIMPLE_HEAD)
        for heading in ("backbone", "cells × seeds", "finished", "failed", "to run", "about"):
            table.add_column(heading, justify="left" if heading == "backbone" else "right", no_wrap=True)
        every: list[float] = []
        unknown, workers = [], self.options.workers
        for backbone, (cells, status, missing, _) in rows.items():
            counts = status["finished"], sum(status[name] for name in FAILURES), len(missing)
            found = estimates(missing, known, threads_each(workers) or torch.get_num_threads())
            seconds = None if None in found else sum(found) / workers
            unknown += [backbone] if seconds is None else []
            every += [one for one in found if one is not None]
            about = "unknown" if seconds is None else f"{seconds / 60:.1f} min"
            table.add_row(backbone, f"{cells} × {len(self.seeds)}", *map(str, counts), about)
        total = makespan(every, workers) + START_SECONDS * bool(every)
        sources = ["finished runs"] * any(row.missing and name not in tried for name, row in rows.items())
        sources += [f"{REHEARSED} steps that were tried now ({', '.join(tried)})"] * bool(tried)
        lacking = ", ".join(name for name, scored in tried.items() if not scored)
        table.caption = f"{total / 60:.0f} min, {workers} at a time, by {' and '.join(sources) or 'finished runs'}\n"
        table.caption += f"scoring of {lacking} comes on top" if lacking else "scoring is included"
        table.caption += "; too long where other work ran beside them"
        if unknown:
            others = "" if len(unknown) == len(rows) else f"{table.caption}; "
            table.caption = f"{others}unknown of {', '.join(unknown)}, until a run of the same size is finished"
        if self._prior_names:
            planned, finished = self._priors_done()
            table.caption += f"; priors, not in these minutes: {finished} of {planned} finished"
        return table

    def _priors_done(self) -> tuple[int, int]:
        """How many priors are planned, and how many of them are finished."""
        raise NotImplementedError

    def _known(self, rows: Iterable[Row]) -> pd.DataFrame:
        """Runs by which the time of those that are missing can be told: a few of this study of each shape, or all that
        the store has where a shape is none of theirs."""
        wanted = {shape_of(config) for row in rows for config in row.missing}
        alike: dict[tuple, list[Run]] = {}
        for cell in (cell for row in rows for cell in row.done):
            alike.setdefault(shape_of(cell.configs[0]), []).append(cell.run)
        if wanted <= alike.keys():
            return frame(run for shape in wanted for run in alike[shape][:PACED])
        return frame(self.store.runs())

    def _part(self, kind: Kind, label: str, steps: int, cells: list[Cell], suffix: str = "", shelf: str = "") -> Part:
        name, metrics = kind.study(self.name + suffix, label), kind.ranked or self.options.metric
        return Part(name, kind, label, steps, metrics, shelf or kind.config.SHELF, cells)

    def _cell(self, params: dict[str, Any], configs: list[AnyConfig], role: str = "") -> Cell:
        return Cell(params, configs, [self.store.run(config) for config in configs], role)

    def _prior(self, prior: str, tokenizer: str, seed: int) -> PriorConfig:
        """Config of a prior over the codes of the tokenizer of that run id, as the command line has it."""
        given = {field: vars(self.options)[flag] for flag, field in PRIOR_SETTINGS.items()}
        given |= {"precision": self.options.precision, "device": self.options.device, "seed": seed}
        return PriorConfig(tokenizer=tokenizer, prior=prior, **given)

    def _words(self) -> list[str]:
        """What the name says besides settings."""
        given = {flag: vars(self.options)[flag] for flag in PRIOR_SETTINGS if self._prior_names}
        usual = {flag: getattr(PriorConfig, field) for flag, field in PRIOR_SETTINGS.items()}
        match = [f"match={self.options.match}"] if self.options.match else []
        return match + [f"{flag}={value}" for flag, value in given.items() if value != usual[flag]]


class AblationPlan(Plan):
    """The plan of an Ablation: cells × seeds, and priors over those that are finished."""

    kind = "ablation"

    def __init__(self, study: Ablation, options: StudyArguments):
        self.final = {"finished"} if options.retry_failed else self.final - {"pruned"}  # which says nothing of a cell
        super().__init__(study, options, {name: vars(options)[name] for name in study.sweep})

    def _cells(self, backbone: str) -> list[Cell]:
        """All cells of one seed before those of the next."""
        cells = []
        for seed, values in itertools.product(self.seeds, self.study.combinations(backbone, self.space)):
            params = {**values, "seed": seed}
            (config,) = self.configs(backbone, params)
            new = seed == self.seeds[0] or seed != cells[-1].params["seed"]  # all values once, and all seeds
            if new:
                config.check()
            cells.append(self._cell(params, [config]))
            for prior in self._prior_names if new else ():
                self._over(prior, cells[-1]).check()  # before any tokenizer is trained
        return cells

    def followers(self) -> list[Part]:
        status = ending(self.tokenizers())
        done = [(name, one) for name, cells in self.cells.items() for one in cells if status[one.run] == "finished"]
        parts = []
        for prior in self._prior_names if done else ():
            cells = [
                # timm's models go by one name: Optuna has to know all values beforehand
                self._cell({"backbone": name.partition(":")[0], **one.params}, [self._over(prior, one).resolved()])
                for name, one in done
            ]
            parts.append(self._part(PRIORS, prior, self.options.prior_steps, cells))
        return parts

    def _over(self, prior: str, cell: Cell) -> PriorConfig:
        return self._prior(prior, cell.run.folder.name, cell.params["seed"])

    def _row(self, backbone: str) -> Row:
        cells = self.cells[backbone]
        status = statuses(self.store.root / Config.SHELF, (cell.run.folder.name for cell in cells))
        ended = list(zip(cells, status, strict=True))
        missing = [cell.configs[0] for cell, how in ended if how not in self.final]
        done = [cell for cell, how in ended if how == "finished"]
        return Row(len(cells) // len(self.seeds), Counter(status), missing, done)

    def _priors_done(self) -> tuple[int, int]:
        planned = len(self._prior_names) * sum(map(len, self.cells.values()))
        return planned, Counter(ending(self.followers()).values())["finished"]


def ending(parts: list[Part]) -> dict[Run, str]:
    """How all cells of ``parts`` ended, by their first runs: finished, or as the first of its runs that is not."""
    cells = [cell for part in parts for cell in part.cells]
    how = endings(run for cell in cells for run in cell.runs)
    return {cell.run: next((how[run] for run in cell.runs if how[run] != "finished"), "finished") for cell in cells}


def shown(value: Any) -> str:
    """``value`` of a setting, in few characters."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def shape_of(config: Config) -> tuple:
    """What the time of a step of ``config`` depends on."""
    return tuple(getattr(config, name) for name in SHAPE)


def threads_each(workers: int) -> int | None:
    """Threads of each child where so many ``workers`` have one; None for as many as torch takes."""
    return max(1, (os.cpu_count() or 1) // workers) if workers > 1 else None


def estimates(configs: list[Config], known: pd.DataFrame, threads: int) -> list[float | None]:
    """Seconds that ``configs`` take from start to end on so many ``threads`` of a CPU, or on a GPU: as finished runs of
    equal shape in ``known`` took, their training in proportion to its steps; None where there are none. Runs on as many
    threads count alone where there are any, and of others a SERIAL part takes as long on any number."""
    finished = known[known.status == "finished"]
    there = finished.threads.astype(float)
    share = (_seconds_on(threads) / _seconds_on(there)).where(finished.device == "cpu").fillna(1.0)
    costs = {"step": share * finished.train_seconds / finished.steps, "score": share * finished.score_seconds.fillna(0)}
    by = [finished[name] for name in SHAPE]
    alike = (there == threads) | (finished.device != "cpu")
    chosen = alike | ~alike.groupby(by).transform("any")
    median = pd.DataFrame(costs)[chosen].groupby([column[chosen] for column in by]).median().to_dict("index")
    found = [median.get(shape_of(config)) for config in configs]
    return [cost and config.steps * cost["step"] + cost["score"] for config, cost in zip(configs, found, strict=True)]


def with_rehearsals(known: pd.DataFrame, missing: list[Config]) -> tuple[pd.DataFrame, dict[str, bool]]:
    """``known`` with a row for each shape of ``missing`` that it has none of, by a few steps that are trained now, or
    were once; and the backbones of these, with whether scoring counts: as the median of finished runs on the same
    images. Shapes whose step may take a CPU minutes are left out, as is what cannot be trained here."""
    shapes = {shape_of(config): config for config in missing}
    found = estimates([*shapes.values()], known, torch.get_num_threads())
    rows = []
    for config in (
        config.resolved() for config, seconds in zip(shapes.values(), found, strict=True) if seconds is None
    ):
        same = (known[name] == getattr(config, name) for name in SCORED)
        alike = known[np.logical_and.reduce([known.status == "finished", *same])]
        with suppress(UserError):
            if step_flops(config) <= SHORT or config.device != "cpu":
                seconds = config.steps * step_seconds(config, REHEARSED)
                took = {"train_seconds": seconds, "score_seconds": alike.score_seconds.median()}
                rows.append({**asdict(config), "status": "finished", "threads": torch.get_num_threads(), **took})
    tried = {row["backbone"]: not pd.isna(row["score_seconds"]) for row in rows}
    return pd.concat([known, pd.DataFrame(rows, columns=known.columns)]) if rows else known, tried


def _seconds_on(threads: Any) -> Any:
    return SERIAL + (1 - SERIAL) / threads


def makespan(seconds: Iterable[float], workers: int) -> float:
    """How long so many ``workers`` take for trials of so many ``seconds``, each in its turn to who is free first, the
    longest first."""
    busy = [0.0] * workers
    for one in sorted(seconds, reverse=True):
        heapq.heapreplace(busy, busy[0] + one)
    return max(busy)
