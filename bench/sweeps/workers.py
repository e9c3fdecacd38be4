"""Run a study: take what is missing of a plan, each trial in a process of its own, and report."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from rich.markup import escape

from bench.analysis.frames import METRICS, PRIOR_METRICS
from bench.analysis.report import write_report
from bench.core.cli import guarded
from bench.core.errors import Interrupted, UserError
from bench.core.progress import Bar, say, stdout
from bench.core.store import FAILURES
from bench.priors.config import PriorConfig
from bench.tokenizers.config import Config
from bench.tokenizers.trial import prepare
from bench.training.loop import interruptible

from .child import Outcome, run_in_child
from .index import Index, Study, Trial, default_url, importances, report, suggest, without_password
from .plan import Ablation, Plan, Search, parse_study

RETRIES = {"crashed": 2, "out_of_memory": 1}  # further attempts on the spot; other failures would only repeat
IDLE_SECONDS = 1.0  # between looks at what other workers do
ROUNDS = 2


def main(study: Ablation | Search, description: str, arguments: list[str] | None = None) -> int:
    """The command line of a study. Returns the exit code: 0, 1 when a trial failed, 2 for what the user can mend, 130
    when stopped."""
    return guarded(lambda: work(study, description, sys.argv[1:] if arguments is None else arguments))


def work(study: Ablation | Search, description: str, arguments: list[str]) -> int:
    """Parses the command line, runs what is missing, and reports. Returns the exit code."""
    plan = Plan(study, parse_study(study, description, arguments))
    if plan.options.plan:
        stdout.print(plan.table())
        return 0
    for backbone in plan.backbones:
        prepare(example(plan, backbone), plan.store, plan.options.fid_weights)
    url = plan.options.storage or default_url(plan.store.root)
    index = Index(url, plan.store.root / "studies")
    idle = True
    for _ in range(ROUNDS):  # the second finds what was lost with workers that died, if anything
        missing = sum(queue(plan, backbone, index) for backbone in plan.backbones)
        if missing:
            idle = False
            say(f"study {plan.name}: {missing} trials to run, {plan.options.workers} at a time")
            Workers(plan, index, missing).run()
    idle &= not run_priors(plan)
    if idle:
        say(f"study {plan.name}: nothing to do, every planned trial is done")
    failed = conclude(plan, index)
    command = f"optuna-dashboard {without_password(url)} --artifact-dir {plan.store.root / 'studies' / 'artifacts'}"
    say(f"[bold]dashboard:[/] {escape(command)}")
    return int(failed)


def example(plan: Plan, backbone: str) -> Config:
    """One config of the study, to prepare data and weights with."""
    cells = plan.cells[backbone]
    params = cells[0].params if cells else {name: choice[0] for name, choice in plan.study.space.items()}
    return plan.configs(backbone, params)[0]


def open_study(plan: Plan, backbone: str, index: Index) -> Study:
    """The backbone's Optuna study."""
    return index.open(f"{plan.name}-{backbone}", plan.options.metric, plan.options.steps)


def queue(plan: Plan, backbone: str, index: Index) -> int:
    """Brings the index up to date with the store and enqueues what is missing.

    Returns the number of trials to be run, those that other workers have included.
    """
    with index.planning:
        study = open_study(plan, backbone, index)
        index.recover(study)
        rows = {cell.run.folder.name: {"backbone": backbone, **cell.params} for cell in plan.cells[backbone]}
        plan.store.extend_study(plan.name, plan.header(), rows)
        if plan.searching:
            for _ in range(plan.options.trials - index.counted(study)):
                index.enqueue(study, {})
            return max(0, plan.options.trials - index.ended(study))
        planned, missing, states = set(rows), plan.missing(backbone), index.states(study)
        for cell in plan.cells[backbone]:
            known = states.get(cell.run.folder.name, set())
            if known & {"WAITING", "RUNNING"}:
                continue  # whoever takes it, or has it, will look into the store
            if cell in missing:
                index.enqueue(study, cell.params, cell.run.folder.name)
            elif not known & ({"COMPLETE"} if cell.run.finished else {"FAIL", "PRUNED"}):
                index.add(study, cell.params, [cell.run], plan.options.metric, {})
        return index.waiting(study, planned) + index.running(study, planned)


def conclude(plan: Plan, index: Index) -> bool:
    """Counts the runs, writes the report, attaches its plots. Returns whether a planned run has no scores; in a search,
    whether one failed, which a pruned one has not."""
    runs = [plan.store.named(run_id) for run_id in plan.store.study(plan.name)["runs"]]
    status = Counter(run.status for run in runs)
    say(f"study {plan.name}: " + ", ".join(f"{count} {name}" for name, count in status.items()))
    with index.planning:  # workers that end together write the same files
        written = write_report([plan.name], plan.store.root, importances=importances)
        for backbone in plan.backbones:
            text = f"## {plan.name}, {backbone}\n\nReport: `{written.page}`"
            pictures = [(chart.title, chart.path) for chart in written.charts]
            index.attach(open_study(plan, backbone, index), text, pictures)
    if plan.searching:
        return any(status[name] for name in FAILURES if name != "pruned")
    finished = all(cell.run.finished for cells in plan.cells.values() for cell in cells)
    return not (finished and all(plan.store.run(config).finished for config in plan.priors()))


def run_priors(plan: Plan) -> int:
    """Trains what is missing of the study's priors, each in a process of its own, and returns how many that were.

    Several commands may do so at once. Raises Interrupted after SIGINT or SIGTERM.
    """
    final = set() if getattr(plan.options, "retry_failed", False) else {*FAILURES}
    missing = [config for config in plan.priors() if plan.store.run(config).status not in {"finished", *final}]
    if not missing:
        return 0
    options, lock, done = plan.options, threading.Lock(), 0
    say(f"study {plan.name}: {len(missing)} priors to train, {options.workers} at a time")
    threads = max(1, (os.cpu_count() or 1) // options.workers) if options.workers > 1 else None

    def watch(rows: list[dict[str, float]]) -> str | None:
        return "interrupted" if stop.is_set() else None

    def work(config: PriorConfig) -> None:
        try:
            attempt(config)
        except BaseException:
            stop.set()
            raise

    def attempt(config: PriorConfig) -> None:
        nonlocal done
        run, began, attempts = plan.store.run(config), time.monotonic(), 0
        while not stop.is_set():
            outcome = run_in_child(config, plan.store, options.fid_weights, threads, watch, options.trial_timeout)
            if outcome.status == "blocked":
                raise UserError(outcome.reason)
            if outcome.status == "busy":  # another command has it
                time.sleep(IDLE_SECONDS)
                continue
            attempts += 1
            if attempts > RETRIES.get(outcome.status, 0):
                break
            run.forgive()
        if stop.is_set():
            return
        with lock:
            done += 1
            bar.advance()
            text = f"{outcome.status}: {outcome.reason}"
            if run.finished:
                scores, names = run.metrics(), ("coded_bits_per_token", "gfid_vgg16")
                text = ", ".join(
                    f"{PRIOR_METRICS[name].label} {scores[name]:{PRIOR_METRICS[name].form}}" for name in names
                )
            label = f"{config.prior} over {config.tokenizer}"
            say(f"{done}/{len(missing)} {label}: {escape(text)} ({time.monotonic() - began:.0f} s)")

    with (
        interruptible() as stop,
        Bar(f"priors of {plan.name}", len(missing)) as bar,
        ThreadPoolExecutor(options.workers) as pool,
    ):
        for future in [pool.submit(work, config) for config in missing]:
            future.result()
        if stop.is_set():
            raise Interrupted(f"stopped after {done} of {len(missing)} priors; the same command continues")
    return len(missing)


class Workers:
    """Threads that each take a trial, run it in a child process, and tell the index after the store."""

    def __init__(self, plan: Plan, index: Index, missing: int):
        self.plan, self.options, self.index, self.missing = plan, plan.options, index, missing
        self.planned = {cell.run.folder.name for cells in plan.cells.values() for cell in cells}
        self.lock, self.done = threading.Lock(), 0
        self.figures: dict[str, str] = {}  # trials under way → how they stand

    def run(self) -> None:
        """Returns when nothing is left to run, here or elsewhere. Raises Interrupted after SIGINT or SIGTERM."""
        count = self.options.workers
        with (
            interruptible() as self.stop,
            Bar(f"study {self.plan.name}", self.missing * self.options.steps) as self.bar,
            ThreadPoolExecutor(count) as pool,
        ):
            for future in [pool.submit(self._work, worker) for worker in range(count)]:
                future.result()
            if self.stop.is_set():
                raise Interrupted(f"stopped after {self.done} of {self.missing} trials; the same command continues")

    def _work(self, worker: int) -> None:
        """One worker: takes trials from the backbone that has had fewest until none is left."""
        try:
            studies = {name: open_study(self.plan, name, self.index) for name in self.plan.backbones}
            while not self.stop.is_set():
                fewest_first = sorted(studies, key=lambda name: self.index.ended(studies[name]))
                if any(self._take(backbone, studies[backbone]) for backbone in fewest_first):
                    continue
                if not any(self.index.running(study, self.planned) for study in studies.values()):
                    return
                time.sleep(IDLE_SECONDS)  # another worker may die and its trial come back
                for study in studies.values():
                    self.index.recover(study)
        except BaseException:
            self.stop.set()
            raise

    def _take(self, backbone: str, study: Study) -> bool:
        """Runs one waiting trial of ``study``, if there is one and the budget allows it."""
        if self.plan.searching:
            begun = self.index.ended(study) + self.index.running(study, set())
            spent = self.options.timeout is not None and self.index.seconds(study) >= self.options.timeout
            if spent or begun >= self.options.trials:
                return False
        trial = self.index.claim(study, self.planned)
        if trial is None:
            return False
        params = suggest(trial, self.plan.study.space) if self.plan.searching else trial.params
        configs = self.plan.configs(backbone, params)
        if self.plan.searching:
            rows = {
                self.plan.store.run(c).folder.name: {"backbone": backbone, "seed": c.seed, **params} for c in configs
            }
            self.plan.store.extend_study(self.plan.name, self.plan.header(), rows)
        label = " ".join([backbone, *(f"{name}={_short(value)}" for name, value in params.items())])
        began = time.monotonic()
        with self.index.heartbeat(trial):
            for config in configs:
                outcome = self._attempt(config, trial, label, watched=config is configs[0])
                if outcome.status != "finished":
                    break
            if outcome.status == "interrupted":
                self.index.give_back(study, trial)
            else:
                self.index.tell(study, trial, [self.plan.store.run(config) for config in configs], self.options.metric)
                self._say(label, outcome, configs[0], time.monotonic() - began)
        return True

    def _attempt(self, config: Config, trial: Trial, label: str, watched: bool) -> Outcome:
        """Runs a config in a child process, again where that makes sense; or adopts how it ended before."""
        run, attempts, reported = self.plan.store.run(config), 0, 0
        final = {*FAILURES} if self.plan.searching else {*FAILURES} - {"pruned"}
        if run.finished or (run.status in final and not getattr(self.options, "retry_failed", False)):
            return Outcome(run.status, run.reason)

        def watch(rows: list[dict[str, float]]) -> str | None:
            nonlocal reported
            if rows:
                last = rows[-1]
                text = f"{label}: {last['step']}/{config.steps} loss {last['reconstruction']:.4f}"
                self._advance(label, f"{text} perplexity {last['perplexity']:.0f}")
            if self.stop.is_set():
                return "interrupted"
            if not rows or not watched or len(self.options.metric) > 1:
                return None
            reported = report(trial, rows, config, reported)
            return "pruned" if self.plan.searching and trial.should_prune() else None

        threads = max(1, (os.cpu_count() or 1) // self.options.workers) if self.options.workers > 1 else None
        options = (self.plan.store, self.options.fid_weights, threads, watch, self.options.trial_timeout)
        while not self.stop.is_set():
            outcome = run_in_child(config, *options)
            if outcome.status == "busy":  # its worker was taken for dead and is not
                time.sleep(IDLE_SECONDS)
                continue
            if outcome.status == "blocked":
                raise UserError(outcome.reason)  # ends the command; the trial goes stale and comes back
            attempts += 1
            if attempts > RETRIES.get(outcome.status, 0):
                return outcome
            run.forgive()  # should this command be stopped now, the next one tries again
            say(f"{label}: {outcome.status}, {escape(outcome.reason)}; attempt {attempts + 1} follows")
        return Outcome("interrupted")

    def _advance(self, label: str, figures: str = "") -> None:
        with self.lock:
            self.figures.pop(label, None)
            if figures:
                self.figures[label] = figures
            text = " | ".join([f"trial {min(self.done + 1, self.missing)}/{self.missing}", *self.figures.values()])
            self.bar.advance(self.done * self.options.steps - self.bar.done, text)

    def _say(self, label: str, outcome: Outcome, config: Config, seconds: float) -> None:
        """One line for a trial that ended."""
        with self.lock:
            self.done += 1
        self._advance(label)
        text = f"{outcome.status}: {outcome.reason}"
        if outcome.status == "finished":
            metrics = self.plan.store.run(config).metrics()
            names = dict.fromkeys((*self.options.metric, "psnr", "perplexity"))
            text = ", ".join(f"{METRICS[name].label} {metrics[name]:{METRICS[name].form}}" for name in names)
        say(f"{self.done}/{self.missing} {label}: {escape(text)} ({seconds:.0f} s)")


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
