"""Optuna's side of a study: who works on what, sampling and pruning, and what the dashboard shows.

An index over the run store, never the truth: delete the database and ``python -m bench.study rebuild`` makes it again.
Each backbone has a study of its own, so that nobody is pruned by another backbone's curve.
"""

import logging
import math
import re
import threading
import warnings
import zlib
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
import sqlalchemy
from filelock import FileLock
from optuna.artifacts import FileSystemArtifactStore, get_all_artifact_meta, upload_artifact
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback, fail_stale_trials
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial
from optuna_dashboard import save_note

from bench.analysis.frames import settings
from bench.core.errors import UserError
from bench.core.store import FAILURES, Run, Store

from .definition import Space, distribution, read_space
from .kinds import KINDS, AnyConfig, Row, kind_of, rows_of

optuna.logging.set_verbosity(optuna.logging.ERROR)
warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)

HEARTBEAT_SECONDS, GRACE_SECONDS = 5, 30  # a worker that was silent for the grace period is taken for dead
MAX_RETRIES = 2  # of a trial whose worker died
MAX_REPORTS = 40  # intermediate values per trial
MAX_ROWS = 150  # runs of a backbone that importance is computed from
BETTER = {name: metric.better for kind in KINDS.values() for name, metric in kind.metrics.items()}
GONE = (UpdateFinishedTrialError, ValueError)  # what Optuna raises when a trial that has ended is to end again
Study = optuna.Study
Metrics = tuple[str, ...]


def default_url(results: Path) -> str:
    """The SQLite database below ``results``."""
    return f"sqlite:///{results / 'studies' / 'optuna.db'}"


def without_password(url: str) -> str:
    """``url`` as it may be printed."""
    return re.sub(r"(://[^:/@]+):[^@]*@", r"\1:***@", url)


class Index:
    """The Optuna storage at ``url`` with artifacts in ``folder``. Raises UserError when it cannot be opened."""

    def __init__(self, url: str, folder: Path):
        self.url, self.folder = url, folder
        (folder / "artifacts").mkdir(parents=True, exist_ok=True)
        local = url.startswith("sqlite")
        # SQLite has no row locks: two workers could both take the same trial.
        self.lock = FileLock(folder / ".claims.lock") if local else nullcontext()
        self.planning = FileLock(folder / ".planning.lock")  # one command at a time plans or reports
        self.artifacts = FileSystemArtifactStore(folder / "artifacts")
        options = {
            "engine_kwargs": {"connect_args": {"timeout": 60}} if local else {"pool_pre_ping": True},
            "heartbeat_interval": HEARTBEAT_SECONDS,
            "grace_period": GRACE_SECONDS,
            "heartbeat_stale_trial_callback": RetryHeartbeatStaleTrialCallback(max_retry=MAX_RETRIES),
        }
        with FileLock(folder / ".create.lock"):  # tables are created once
            try:
                self.storage = RDBStorage(url, **options)
            except ImportError as error:
                raise UserError(f"no driver for {without_password(url)}: pip install 'vqbench[postgres]'") from error
            except (sqlalchemy.exc.SQLAlchemyError, ValueError, RuntimeError) as error:
                reason = str(error.__cause__ or error).strip().partition("\n")[0]
                raise UserError(f"cannot open storage {without_password(url)}: {reason}; see --storage") from error

    def open(self, name: str, metrics: Metrics, steps: int = 0) -> Study:
        """Optuna study ``name``, created if need be: TPE and, for one metric, a median pruner that waits for a third of
        ``steps``. Raises UserError when it exists with other metrics."""
        study = optuna.create_study(
            study_name=name,
            storage=self.storage,
            directions=["minimize" if BETTER[metric] == "lower" else "maximize" for metric in metrics],
            pruner=optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=steps // 3),
            load_if_exists=True,
        )
        known = study.metric_names
        if known is None:
            study.set_metric_names(list(metrics))
        elif tuple(known) != metrics:
            raise UserError(f"study {name} is indexed by {', '.join(known)}; pass --metric {' '.join(known)}")
        return study

    def enqueue(self, study: Study, params: dict[str, Any], run_id: str | None = None) -> None:
        """Adds a trial for some worker to take. ``params`` empty: its values are sampled when it is taken."""
        study.add_trial(_waiting(params, {name: distribution(name) for name in params}, run_id))

    def claim(self, study: Study, run_ids: Collection[str] = ()) -> Trial | None:
        """Takes the first waiting trial of ``run_ids`` (of all runs, if empty), which no other worker then gets; None
        when there is none."""
        with self.lock:
            for waiting in self.trials(study, TrialState.WAITING, of=run_ids):
                with suppress(UpdateFinishedTrialError):
                    if self._start(waiting._trial_id):
                        # by its number: no two trials draw alike, whoever takes them
                        seed = zlib.crc32(f"{study.study_name}/{waiting.number}".encode())
                        study.sampler = optuna.samplers.TPESampler(seed=seed)
                        return Trial(study, waiting._trial_id)
        return None

    def _start(self, trial_id: int) -> bool:
        """Makes a waiting trial a running one, if nobody else did. Its first heartbeat goes before: Optuna takes a
        running trial without any for alive."""
        self.storage.record_heartbeat(trial_id)
        return self.storage.set_trial_state_values(trial_id, TrialState.RUNNING)

    def trials(self, study: Study, *states: TrialState, of: Collection[str] = ()) -> list[FrozenTrial]:
        """Trials in one of ``states`` (in any, if none is given) of the runs ``of`` (of all, if empty)."""
        trials = study.get_trials(deepcopy=False, states=states or None)
        return [trial for trial in trials if not of or trial.user_attrs.get("run_id") in of]

    def states(self, study: Study) -> dict[str, set[str]]:
        """run_id → names of the states that its trials are in."""
        found: dict[str, set[str]] = {}
        for trial in self.trials(study):
            found.setdefault(trial.user_attrs.get("run_id", ""), set()).add(trial.state.name)
        return found

    def ended(self, study: Study) -> int:
        """Trials that ran to an end of their own: neither interrupted nor lost with their worker."""
        trials = self.trials(study, TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
        return sum(trial.state != TrialState.FAIL or trial.user_attrs.get("status") in FAILURES for trial in trials)

    def seconds(self, study: Study) -> float:
        """Seconds of training and scoring that all trials took together, by the run folders."""
        return sum(trial.user_attrs.get("seconds", 0.0) for trial in self.trials(study))

    def recover(self, study: Study) -> None:
        """Gives trials whose worker died back to the queue."""
        with self.lock:
            fail_stale_trials(study)

    @contextmanager
    def heartbeat(self, trial: Trial) -> Iterator[None]:
        """Tells other workers that ``trial`` is being worked on."""
        done = threading.Event()

        def beat() -> None:
            while not done.wait(HEARTBEAT_SECONDS):
                try:
                    self.storage.record_heartbeat(trial._trial_id)
                except StorageInternalError as error:  # the next one may pass; results are in the store
                    logging.getLogger(__name__).warning("heartbeat of trial %d failed: %s", trial.number, error)

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def add(self, study: Study, params: dict[str, Any], runs: list[Run], metrics: Metrics, space: Space) -> None:
        """Records ``runs`` (the seeds of one trial) that ended without this database knowing. ``space`` is what a
        search sampled ``params`` from, {} for an ablation."""
        distributions = {name: distribution(name, space.get(name)) for name in params}
        template = _waiting(params, distributions, runs[0].folder.name)
        trial = Trial(study, self.storage.create_new_trial(study._study_id, template_trial=template))
        self._start(trial._trial_id)
        if len(metrics) == 1:
            report(trial, rows_of(runs[0]), runs[0].settings(kind_of(runs[0]).config), after=0)
        self.tell(study, trial, runs, metrics)

    def tell(self, study: Study, trial: Trial, runs: list[Run], metrics: Metrics) -> None:
        """Ends ``trial`` as its runs (one per seed) ended: their mean metrics, or why one of them failed. A trial that
        another worker took for dead and ended is left as it is."""
        failed = next((run for run in runs if not run.finished), None)
        try:
            self._describe(study, trial, runs)
            if failed is None:
                rows = [run.metrics() for run in runs]
                study.tell(trial, [sum(row[name] for row in rows) / len(rows) for name in metrics])
            else:
                trial.set_user_attr("status", failed.status)
                trial.set_user_attr("reason", failed.reason)
                study.tell(trial, state=TrialState.PRUNED if failed.status == "pruned" else TrialState.FAIL)
        except GONE:
            if not self.storage.get_trial(trial._trial_id).state.is_finished():
                raise

    def give_back(self, study: Study, trial: Trial) -> None:
        """Ends ``trial`` as interrupted and puts a copy of it into the queue."""
        try:
            trial.set_user_attr("status", "interrupted")
            study.tell(trial, state=TrialState.FAIL)
        except GONE:
            return  # another worker took it for dead, and has put its copy there
        ended = self.storage.get_trial(trial._trial_id)
        study.add_trial(_waiting(ended.params, ended.distributions, ended.user_attrs.get("run_id")))

    def _describe(self, study: Study, trial: Trial, runs: list[Run]) -> None:
        """Metrics as attributes; each run's picture as artifact and in the note."""
        trial.set_user_attr("run_id", runs[0].folder.name)
        trial.set_user_attr("seconds", sum(map(_seconds, runs)))
        kind, lines = kind_of(runs[0]), []
        for run in runs:
            lines.append(f"**{run.folder.name}**: {run.status}{f', {run.reason}' if run.reason else ''}\n")
            if run.finished:
                metrics = run.metrics()
                shown = {name: metric for name, metric in kind.metrics.items() if name in metrics}
                if run == runs[0]:
                    for name in shown:
                        trial.set_user_attr(name, metrics[name])
                lines += [self._picture(study, trial, run.folder / kind.picture), "\n| metric | |\n|---|---|"]
                lines += [f"| {one.label} {one.arrow} | {metrics[name]:{one.form}} |" for name, one in shown.items()]
        save_note(trial, "\n".join(lines))

    def _picture(self, study: Study, trial: Trial, path: Path) -> str:
        if not path.is_file():
            return ""
        artifact = upload_artifact(artifact_store=self.artifacts, file_path=str(path), study_or_trial=trial)
        return f"![{path.stem}](/artifacts/{study._study_id}/{trial._trial_id}/{artifact})\n"

    def attach(self, study: Study, text: str, pictures: Iterable[tuple[str, Path]]) -> None:
        """Shows ``text`` and ``pictures``, (caption, path) each, in the study's note; a picture replaces what was
        attached before under its file name."""
        known = {meta.filename: meta.artifact_id for meta in get_all_artifact_meta(study)}
        lines = [text]
        for caption, path in pictures:
            if artifact := known.get(path.name):
                with path.open("rb") as file:
                    self.artifacts.write(artifact, file)
            else:
                artifact = upload_artifact(artifact_store=self.artifacts, file_path=str(path), study_or_trial=study)
            lines += [f"### {caption}", f"![{path.stem}](/artifacts/{study._study_id}/{artifact})"]
        save_note(study, "\n\n".join(lines))


def rebuild(index: Index, store: Store, name: str) -> int:
    """Adds the trials of the study called ``name`` that ended without ``index`` knowing, and returns how many those
    were. Raises UserError on an unknown name."""
    record, added = store.study(name), 0
    searching = record["kind"] == "search"
    for shelf, kind in KINDS.items():
        metrics = kind.ranked or tuple(record["metrics"])
        trials: dict[tuple, tuple[dict[str, Any], list[Run]]] = {}
        for run_id, row in record.get(shelf, {}).items():
            aside = {kind.key, "seed"} if searching else {kind.key}  # the seeds of a search's trial are runs of it
            params = {name: value for name, value in row.items() if name not in aside}
            identity = (row[kind.key], *(params.items() if searching else [run_id]))
            trials.setdefault(identity, (params, []))[1].append(store.named(run_id, shelf))
        for (label, *_), (params, runs) in trials.items():
            with index.planning:
                study = index.open(kind.study(name, label), metrics)
                index.recover(study)
                ended = all(run.finished for run in runs) or any(run.status in FAILURES for run in runs)
                if ended and not index.states(study).get(runs[0].folder.name):
                    index.add(study, params, runs, metrics, read_space(record["space"]))
                    added += 1
    return added


def report(trial: Trial, rows: list[Row], config: AnyConfig, after: int) -> int:
    """Reports the training loss (see Kind) of ``rows`` beyond step ``after``; returns the last step reported.

    At most MAX_REPORTS, at the same steps in every trial of a study. Negative where the study maximises, so that the
    pruner's better is a smaller loss. Does nothing for a trial that another worker has taken for dead.
    """
    every = math.ceil(config.steps / MAX_REPORTS)
    sign = -1 if trial.study.direction == optuna.study.StudyDirection.MAXIMIZE else 1
    for row in rows:
        if row["step"] // every > after // every:
            after = int(row["step"])
            with suppress(UpdateFinishedTrialError):
                trial.report(sign * KINDS[config.SHELF].loss(config, row), after)
    return after


def importances(table: pd.DataFrame, metric: str) -> pd.DataFrame:
    """How much of the variance of ``metric`` each swept field, and the seed, explains within a backbone.

    fANOVA (Hutter et al. 2014) over the finished rows of ``table``, at most MAX_ROWS of a backbone. Columns backbone,
    parameter and importance, which sums to 1 in a backbone; none has fewer than 4 runs, nothing swept or no variance.
    """
    found = []
    for backbone, rows in table[table.status == "finished"].groupby("backbone"):
        rows = rows[rows[metric].notna()]
        rows = rows.sample(min(len(rows), MAX_ROWS), random_state=0)
        swept = settings(rows)
        if len(rows) < 4 or not swept or rows[metric].nunique() < 2:
            continue
        names = [*swept, "seed"] if rows.seed.nunique() > 1 else list(swept)
        rows = rows[[*names, metric]].astype(object)  # Python's own numbers, not NumPy's
        distributions = {name: _range_of(rows[name]) for name in names}
        study = optuna.create_study()
        study.add_trials(
            create_trial(params=dict(zip(names, values, strict=True)), distributions=distributions, value=value)
            for *values, value in rows.itertuples(index=False)
        )
        evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
        shares = optuna.importance.get_param_importances(study, evaluator=evaluator)
        found += [(backbone, name, share) for name, share in shares.items()]
    return pd.DataFrame(found, columns=["backbone", "parameter", "importance"])


def _range_of(values: pd.Series) -> BaseDistribution:
    """The distribution that just holds ``values``: a number's order and scale help the forest, and cost it less."""
    if all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values):
        low, high = float(values.min()), float(values.max())
        return FloatDistribution(low, high, log=low > 0 and high >= 10 * low)
    return CategoricalDistribution(tuple(values.unique()))


def _seconds(run: Run) -> float:
    """What a run has cost, finished or not."""
    if run.finished:
        metrics = run.metrics()
        return metrics["train_seconds"] + metrics.get("score_seconds", 0.0)
    rows = rows_of(run)
    return rows[-1]["seconds"] if rows else 0.0


def _waiting(params: dict[str, Any], distributions: dict[str, BaseDistribution], run_id: str | None) -> FrozenTrial:
    """A trial to be taken; what ``params`` leaves open is sampled then."""
    return create_trial(
        state=TrialState.WAITING,
        params=params,
        distributions=distributions,
        user_attrs={"run_id": run_id} if run_id else {},
        system_attrs={"fixed_params": params},
    )
