"""Run a study: take what is missing of a plan, each trial in a process of its own, and report."""

import math
import shlex
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from shutil import which

from filelock import Timeout
from rich.markup import escape

from bench.analysis.frames import LABELS
from bench.analysis.tables import put
from bench.core import group
from bench.core.cli import command
from bench.core.errors import Interrupted, UserError
from bench.core.progress import Bar, program, say
from bench.core.runs import Run
from bench.data import check_name
from bench.instruments import choose
from bench.quantizers import QUANTIZERS
from bench.tokenizers.arguments import without
from bench.tokenizers.measure import check_instruments, seen
from bench.tokenizers.trial import check_processes, prepare
from bench.training.loop import interruptible
from bench.training.track import check_sink

from . import overview
from .address import storage_url, without_password
from .child import Outcome, look_in_child, run_in_child
from .conversion import first_scores, report
from .definition import Ablation, Search, parse_study
from .importance import importances
from .index import GRACE_SECONDS, Index, Study, Trial, TrialState
from .kinds import KINDS, TOKENIZERS, AnyConfig, Row, endings
from .launcher import launch
from .plan import Cell, Part, Plan, shown, threads_each
from .search import make_plan

RETRIES = {"crashed": 2, "out_of_memory": 1}  # further attempts on the spot; other failures would only repeat
IDLE_SECONDS = 1.0  # between looks at what other workers do
LOOKED_AT = 50  # runs of a study that may say that they should be trained for longer
PAGE_SECONDS, PAGE_SHARE = 60.0, 0.05  # between two versions of a study's overviews, and of the time that they may take


def main(study: Ablation | Search, description: str, arguments: list[str] | None = None) -> int:
    """The command line of a study. Returns the exit code: 0, 1 when a trial failed, 2 for what the user can fix, 130
    when stopped."""
    return command(partial(work, study, description), arguments, addresses=True)


def work(study: Ablation | Search, description: str, arguments: list[str]) -> int:
    """Parses the command line, runs what is missing, and reports. Returns the exit code."""
    group.alone("a study")
    options = parse_study(study, description, arguments)
    check_name(options.data)
    check_sink(options.track)
    elsewhere = {"device": "cpu"} if options.launcher else {}  # where jobs run, there may be another
    plan = make_plan(study, replace(options, **elsewhere))
    for backbone in plan.backbones:
        check_processes(plan.example(backbone), options.processes)
    if options.plan:
        put(plan.table(), "a wider terminal")
        return 0
    url = storage_url(options.storage, plan.store.root)
    if options.launcher:
        return launch(partial(main, study, description), arguments, options, plan.store, plan.name, url)
    for backbone in plan.backbones:
        example = plan.example(backbone)
        if options.processes > 1:
            group.check_gpus(example.device, options.processes)
        data = prepare(example, plan.store, plan.options.fid_weights)
        check_instruments(example, data, plan.options.instruments)
    index = Index(url, plan.store.root / "studies")
    idle = True
    for parts in (plan.tokenizers, plan.followers):  # which wait for tokenizers
        for _ in range(2):  # the second finds what was lost with workers that died, if anything
            idle &= not run_missing(plan, parts(), index)
    if idle:
        say(f"study {plan.name}: nothing to do, every planned trial is done")
    look(plan)
    pages = conclude(plan, index)
    if told := recommendation(plan, pages):
        say(escape(told))
    for line in next_commands(plan, pages, arguments):
        say(f"[bold]next:[/] {escape(line)}")
    name = "optuna-dashboard"
    shell = program(name, which(name) or str(Path(sys.executable).with_name(name)))
    words = (shell, without_password(url), "--artifact-dir", str(plan.store.root / "studies" / "artifacts"))
    say(f"[bold]dashboard:[/] {escape(shlex.join(words))}")
    return int(plan.failed())


def run_missing(plan: Plan, parts: list[Part], index: Index) -> int:
    """Runs what is missing of ``parts``, which are of one kind, and returns how many trials that were."""
    missing = sum(plan.fill(part, index) for part in parts)
    if missing:
        say(f"study {plan.name}: {missing} {parts[0].kind.noun} to run, {plan.options.workers} at a time")
        Workers(plan, index, parts, missing).run()
    return missing


def look(plan: Plan) -> None:
    """Has the instruments that were asked for look at the finished tokenizers that they have not seen, of a search at
    those that confirm it, each in a child process. Says why one cannot be looked at. Raises Interrupted after SIGINT
    or SIGTERM."""
    words = plan.options.instruments
    if not choose(words):
        return
    parts = (*plan.tokenizers(), *plan.followers())
    cells = [cell for part in parts if part.kind is TOKENIZERS for cell in part.cells]
    unseen = [cell for cell in cells if cell.run.finished and not seen(cell.run, words)]
    options = (plan.store, words, plan.options.fid_weights, threads_each(plan.options.workers))
    with (
        interruptible() as stop,
        Bar("instruments", len(unseen)) as bar,
        ThreadPoolExecutor(plan.options.workers) as pool,
    ):
        work = partial(_look, options=options, stop=stop)
        for number, future in enumerate(as_completed([pool.submit(work, cell) for cell in unseen]), 1):
            if future.exception():
                stop.set()  # the others do not begin
            name, outcome, seconds = future.result()
            text = f"[yellow]not looked at:[/] {escape(outcome.reason)}"
            if outcome.status == "finished":
                text = ", ".join(plan.store.named(name).instruments())
            if outcome.status != "interrupted":
                bar.advance()
                say(f"{number}/{len(unseen)} {name}: {text} ({seconds:.0f} s)")
        if stop.is_set():
            counts = f"{bar.done} of {len(unseen)} runs"
            raise Interrupted(f"stopped after instruments looked at {counts}; the same command continues")


def _look(cell: Cell, options: tuple, stop: threading.Event) -> tuple[str, Outcome, float]:
    """Has a child look at a run, again where that makes sense: name, how it ended, and seconds."""
    name, began, outcome, attempts = cell.run.folder.name, time.monotonic(), Outcome("interrupted"), 0
    while not stop.is_set():
        outcome = look_in_child(cell.configs[0], *options, lambda: "interrupted" if stop.is_set() else None)
        attempts += 1
        if attempts > RETRIES.get(outcome.status, 0):
            break
        say(f"{name}: {outcome.status}, {escape(outcome.reason)}; attempt {attempts + 1} follows")
    return name, outcome, time.monotonic() - began


def conclude(plan: Plan, index: Index) -> list[overview.Page]:
    """Counts how runs ended, writes the report and the pages on all backbones, which it returns, attaches plots."""
    from bench.analysis.report import write_report  # and what draws charts: not before it is needed

    record = plan.store.study(plan.name)
    runs = [plan.store.named(run_id) for run_id in {**record["runs"], **record.get("confirmed", {})}]
    priors = [plan.store.named(run_id, "priors") for run_id in record.get("priors", {})]
    told = [f"study {plan.name}: {_counts(runs)}", *([f"priors: {_counts(priors)}"] if priors else [])]
    say("; ".join(told))
    with index.planning:  # workers that end together write the same files
        written = write_report([plan.name], plan.store.root, importances=importances)
        pictures = [(chart.title, chart.path) for chart in written.charts]
        pages = overview.write(index, plan.store, plan.name)
        for study, _ in pages:
            text = f"## {study.study_name}, all backbones\n\nReport: `{written.page}`\n\n{overview.TOLD}"
            index.attach(study, text, pictures)
        for part in (*plan.tokenizers(), *plan.followers()):
            text = f"## {plan.name}, {part.label}\n\nReport: `{written.page}`\n\n"
            text += f"{overview.ELSEWHERE} {plan.name}{overview.ENDINGS[part.shelf]}."
            index.attach(part.open(index), text, pictures)
    return pages


def recommendation(plan: Plan, pages: list[overview.Page]) -> str | None:
    """Which cell has the best mean over seeds, in a sentence; None where a study has several metrics, too few cells, or
    cells of unequal rates."""
    metric, *more = plan.options.metric
    if more or not pages or (trial := overview.best(pages[0], metric)) is None:
        return None
    shown_as, about = LABELS[metric], trial.user_attrs
    settings = " ".join(f"{name}={shown(value)}" for name, value in trial.params.items())
    spread = f" ± {about[f'{metric}_std']:{shown_as.form}}" if f"{metric}_std" in about else ""
    seeds = f"the mean of {about['n']} seeds" if about["n"] > 1 else "one seed, an observation and no verdict"
    others = sum(one.state == TrialState.COMPLETE for one in pages[0].trials) - 1
    return f"best of {others + 1}: {settings}, {shown_as.label} {trial.value:{shown_as.form}}{spread}, {seeds}"


def next_commands(plan: Plan, pages: list[overview.Page], given: list[str]) -> list[str]:
    """The commands that are most useful after this one, whose words were ``given``: what failed again, or an ablation
    for twice as long where a run says that it should be trained for longer, and else with more seeds, or a search at
    one rate confirmed; and images from the best tokenizer, if it has codes."""
    found, url, more = [], plan.options.storage, ["--seeds", *map(str, range(max(plan.seeds) + 2))]
    if isinstance(plan.study, Search):
        more = ["--confirm", "3"] if plan.options.bits_per_image and not plan.options.confirm else []
    elif plan.failed():
        more = ["--retry-failed"]
    elif "steps" not in plan.space:
        more = plan.options.longer([cell.run for own in plan.cells.values() for cell in own][:LOOKED_AT]) or more
    if more and (url is None or without_password(url) == url):  # which is not printed, and must not be another
        words = [*without(given, {more[0]}), *more]
        found.append(shlex.join(["python", "-m", f"studies.{plan.study.name}", *words]))
    if pages and (trial := overview.best(pages[0], plan.options.metric[0])) and not vars(plan.options).get("prior"):
        run = plan.store.named(trial.user_attrs["runs"].split()[0])
        if QUANTIZERS[run.config()["quantizer"]].discrete:
            found.append(shlex.join(["python", "-m", "bench.prior", str(run.folder)]))
    return found


def _counts(runs: list[Run]) -> str:
    status = Counter(endings(runs).values())
    return ", ".join(f"{count} {name}" for name, count in status.items())


class Workers:
    """Threads that each take a trial, run it in a child process, and tell the index after the store."""

    def __init__(self, plan: Plan, index: Index, parts: list[Part], missing: int):
        self.plan, self.options, self.index, self.missing = plan, plan.options, index, missing
        self.parts, self.kind = {part.name: part for part in parts}, parts[0].kind
        self.planned = {cell.run.folder.name for part in parts for cell in part.cells}
        self.lock, self.done = threading.Lock(), 0
        self.shown_after = -math.inf  # when the overviews may be written again
        self.taken: set[int] = set()  # ids of trials of this command
        self.waits = False  # for others, and has said so
        self.figures: dict[str, str] = {}  # trials under way → how they stand
        self.begun: dict[str, float] = {}  # the same → when they began
        self.seconds: list[float] = []  # that trials took which ended
        self.took: dict[str, int] = {}  # parts → whole seconds that their last trial took

    def run(self) -> None:
        """Returns when nothing is left to run, here or elsewhere. Raises Interrupted after SIGINT or SIGTERM."""
        count, noun = self.options.workers, self.kind.noun
        with (
            interruptible() as self.stop,
            Bar(f"study {self.plan.name}", self.missing, eta=self._left) as self.bar,
            ThreadPoolExecutor(count) as pool,
        ):
            for future in [pool.submit(self._work) for _ in range(count)]:
                future.result()
            if self.stop.is_set():
                raise Interrupted(f"stopped after {self.done} of {self.missing} {noun}; the same command continues")

    def _work(self) -> None:
        """One worker: takes trials from the part that has had fewest until none is left; of equals from the slowest, so
        that no long one is alone in the end."""
        try:
            studies = {name: part.open(self.index) for name, part in self.parts.items()}
            since = time.monotonic()
            while not self.stop.is_set():
                fewest_first = sorted(studies, key=self._order(studies))
                if any(self._take(self.parts[name], studies[name]) for name in fewest_first):
                    self._show()
                    since = time.monotonic()
                    continue
                running = [self.index.trials(study, TrialState.RUNNING, of=self.planned) for study in studies.values()]
                if not any(running):
                    return
                if time.monotonic() - since > GRACE_SECONDS:
                    self._say_waiting({trial._trial_id for trials in running for trial in trials} - self.taken)
                time.sleep(IDLE_SECONDS)  # another worker may die and its trial come back
                for study in studies.values():
                    self.index.recover(study)
        except BaseException:
            self.stop.set()
            raise

    def _show(self) -> None:
        """Brings the overviews up to date, now and then, unless some command plans or reports just now."""
        with self.lock:
            began = time.monotonic()
            if began < self.shown_after:
                return
            self.shown_after = math.inf  # for other threads
        with suppress(Timeout), self.index.planning.acquire(timeout=0):
            overview.write(self.index, self.plan.store, self.plan.name)
        now = time.monotonic()
        self.shown_after = now + max(PAGE_SECONDS, (now - began) / PAGE_SHARE)

    def _order(self, studies: dict[str, Study]) -> Callable[[str], tuple[int, int]]:
        return lambda name: (self.index.ended(studies[name]), -self.took.get(name, 0))

    def _say_waiting(self, others: set[int]) -> None:
        """Says once that this command waits for trials that other workers have: they may be gone, and their last
        heartbeat ahead of a clock that was set back."""
        with self.lock:
            if not others or self.waits:
                return
            self.waits = True
        fix = "if nobody runs them, stop this, delete the database, and python -m bench.study rebuild makes it again"
        say(f"study {self.plan.name}: waiting for {len(others)} {self.kind.noun} of other workers; {fix}")

    def _take(self, part: Part, study: Study) -> bool:
        """Runs one waiting trial of ``part``, if there is one and the budget allows it."""
        if not self.plan.allows(part, self.index, study) or (trial := self.index.claim(study, self.planned)) is None:
            return False
        self.taken.add(trial._trial_id)
        cell = self.plan.claimed(part, trial)
        told = self.plan.told(part, cell.params)
        label = " ".join([part.label, *(f"{name}={shown(value)}" for name, value in told.items())])
        with self.lock:  # which whoever tells what is left holds
            began = self.begun[label] = time.monotonic()
        with self.index.heartbeat(trial):
            for config in cell.configs:
                watched = trial if config is cell.configs[0] and part.kind.has_curve(part.metrics) else None
                outcome = self._attempt(config, label, part, watched)
                if outcome.status != "finished":
                    break
            if outcome.status == "interrupted":
                self.index.give_back(study, trial)
            else:
                try:
                    self.index.tell(study, trial, cell.runs, part.metrics)
                    self._say(label, outcome, part, cell, time.monotonic() - began)
                except FileNotFoundError as error:
                    gone = f"{error.filename} was removed while its trial ended"
                    raise UserError(f"{gone}; the same command runs it again") from error
        return True

    def _attempt(self, config: AnyConfig, label: str, part: Part, watched: Trial | None) -> Outcome:
        """Runs a config in a child process, again where that makes sense, or adopts how it ended before; its curve goes
        to ``watched``."""
        run, attempts, reported = self.plan.store.run(config), 0, 0
        if not self.plan.wants(run):
            if watched is not None:
                report(watched, run.history(), config, 0)
            return Outcome(run.status, run.reason)

        def watch(rows: list[Row]) -> str | None:
            nonlocal reported
            told = self.figures.get(label, f"{label}: begins")
            if rows:
                step, figures = rows[-1]["step"], KINDS[config.SHELF].figures(rows[-1])
                figures += ", trained and being scored" if step == config.steps else ""
                told = f"{label}: {step}/{config.steps} {figures}"
            self._advance(label, told)  # also where nothing is new, so that a log is told that work goes on
            if self.stop.is_set():
                return "interrupted"
            if not rows or watched is None:
                return None
            reported = report(watched, rows, config, reported)
            return "pruned" if self.plan.prunes(part, watched) else None

        given, several = self.options, self.options.processes
        threads = threads_each(given.workers * several)
        options = (self.plan.store, given.fid_weights, threads, watch, given.trial_timeout, given.track, several)
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

    def _left(self) -> float | None:
        """Seconds that are left, where each trial takes as long as those that ended; None before the first has."""
        if not self.seconds:
            return None
        each, now = sum(self.seconds) / len(self.seconds), time.monotonic()
        left = (self.missing - self.done) * each - sum(min(now - began, each) for began in self.begun.values())
        return max(0.0, left) / self.options.workers

    def _advance(self, label: str, figures: str = "") -> None:
        with self.lock:
            self.figures.pop(label, None)
            if figures:
                self.figures[label] = figures
            text = " | ".join(self.figures.values())
            self.bar.advance(self.done - self.bar.done, text)

    def _say(self, label: str, outcome: Outcome, part: Part, cell: Cell, seconds: float) -> None:
        """One line for a trial that ended."""
        with self.lock:
            self.done += 1
            self.seconds.append(seconds)
            self.took[part.name] = round(seconds)
            self.begun.pop(label, None)
        self._advance(label)
        text = f"{outcome.status}: {outcome.reason}"
        if outcome.status == "finished":
            metrics = first_scores(cell.runs)
            names = [name for name in dict.fromkeys((*part.metrics, *self.kind.told)) if name in metrics]
            text = ", ".join(f"{LABELS[name].label} {metrics[name]:{LABELS[name].form}}" for name in names)
        say(f"{self.done}/{self.missing} {label}: {escape(text)} ({seconds:.0f} s)")
