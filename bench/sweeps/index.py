"""Optuna's side of a study: who works on what, sampling and pruning, and what the dashboard shows.

An index over the run store, never the truth: delete the database and ``python -m bench.study rebuild`` makes it again.
Each backbone has a study of its own, so that nobody is pruned by another backbone's curve.
"""

import logging
import threading
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import partial, wraps
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import optuna
from filelock import FileLock
from optuna.artifacts import FileSystemArtifactStore, get_all_artifact_meta, upload_artifact
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import RetryHeartbeatStaleTrialCallback, fail_stale_trials
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy.engine import make_url

from bench.core.errors import Damaged, UserError
from bench.core.runs import FAILURES, Run
from bench.core.store import Store

from . import conversion
from .address import without_password
from .bulk import Unwritten
from .conversion import Metrics
from .definition import Space, holding, read_space
from .kinds import KINDS, PRIORS, TOKENIZERS, Kind, endings, kind_of
from .patience import PatientStorage, opening, telling

HEARTBEAT_SECONDS, GRACE_SECONDS = 5, 30  # a worker that was silent for the grace period is taken for dead
MAX_RETRIES = 2  # of a trial whose worker died
AT_ONCE = 500  # trials that are written in one transaction
BETTER = {name: metric.better for kind in KINDS.values() for name, metric in kind.metrics.items()}
GONE = (UpdateFinishedTrialError, ValueError)  # what Optuna raises when a trial that is not running is to end
Study = optuna.Study


def _reads(method: Callable[..., Any]) -> Callable[..., Any]:
    """As ``method``, which uses what the database holds and nothing that may be wrong besides."""

    @wraps(method)
    def call(self: "Index", *arguments: Any, **options: Any) -> Any:
        with self.storage.reading():
            return method(self, *arguments, **options)

    return call


class Artifacts(FileSystemArtifactStore):
    """As FileSystemArtifactStore; its folder may be removed while a study runs."""

    def write(self, artifact_id: str, content_body: BinaryIO) -> None:
        """Keeps a file."""
        self._base_path.mkdir(parents=True, exist_ok=True)
        super().write(artifact_id, content_body)


class Index:
    """The Optuna storage at ``url`` with artifacts in ``folder``. Raises UserError when it cannot be opened."""

    def __init__(self, url: str, folder: Path):
        self.url, self.folder = url, folder
        with telling(url):  # before anything is written
            make_url(url)
        (folder / "artifacts").mkdir(parents=True, exist_ok=True)
        local = url.startswith("sqlite")
        # SQLite has no row locks: two workers could both take the same trial.
        self.lock = FileLock(folder / ".claims.lock") if local else nullcontext()
        self.planning = FileLock(folder / ".planning.lock")  # one command at a time plans or reports
        self.artifacts = Artifacts(folder / "artifacts")
        options = {
            "engine_kwargs": {"connect_args": {"timeout": 60}} if local else {"pool_pre_ping": True},
            "heartbeat_interval": HEARTBEAT_SECONDS,
            "grace_period": GRACE_SECONDS,
            "heartbeat_stale_trial_callback": RetryHeartbeatStaleTrialCallback(max_retry=MAX_RETRIES),
        }
        with FileLock(folder / ".create.lock"), opening(url):  # tables are created once
            self.storage = PatientStorage(url, without_password(url), **options)

    @_reads
    def open(self, name: str, metrics: Metrics, steps: int = 0) -> Study:
        """Optuna study ``name``, created if need be: TPE and, for one metric, a median pruner that waits for a third of
        ``steps``. Raises UserError when it exists with other metrics."""
        if unknown := [metric for metric in metrics if metric not in BETTER]:
            raise UserError(f"study {name} is ranked by {unknown[0]!r}, which is no metric of this version")
        directions = [
            StudyDirection.MINIMIZE if BETTER[metric] == "lower" else StudyDirection.MAXIMIZE for metric in metrics
        ]
        study = optuna.create_study(
            study_name=name,
            storage=self.storage,
            directions=directions,
            pruner=optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=steps // 3),
            load_if_exists=True,
        )
        known = study.metric_names
        if known is not None and tuple(known) != metrics:
            raise UserError(f"study {name} is indexed by {', '.join(known)}; pass --metric {' '.join(known)}")
        if study.directions != directions:
            raise self.storage.damage(f"study {name} is optimised in another direction than its metrics are")
        if known is None:
            study.set_metric_names(list(metrics))
        return study

    def enqueue(
        self, study: Study, trials: Sequence[tuple[dict[str, Any], str | None]], space: Space | None = None
    ) -> None:
        """Adds trials, (params, run_id) each, for workers to take, of params from the ``space`` of a search; empty ones
        are sampled then."""
        waiting = [(conversion.drawn(params, space or {}, run_id), None) for params, run_id in trials]
        for start in range(0, len(waiting), AT_ONCE):
            self.storage.add_trials(study._study_id, waiting[start : start + AT_ONCE], lambda *_: {})

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
        self.storage.first_heartbeat(trial_id)
        return self.storage.set_trial_state_values(trial_id, TrialState.RUNNING)

    @_reads
    def trials(self, study: Study, *states: TrialState, of: Collection[str] = ()) -> list[FrozenTrial]:
        """Trials in one of ``states`` (in any, if none is given) of the runs ``of`` (of all, if empty)."""
        trials = study.get_trials(deepcopy=False, states=states or None)
        return [trial for trial in trials if not of or trial.user_attrs.get("run_id") in of]

    @_reads
    def states(self, study: Study) -> dict[str, set[str]]:
        """run_id → names of the states that its trials are in."""
        found: dict[str, set[str]] = {}
        for trial in self.trials(study):
            found.setdefault(trial.user_attrs.get("run_id", ""), set()).add(trial.state.name)
        return found

    @_reads
    def ended(self, study: Study) -> int:
        """Trials that ran to an end of their own: neither interrupted nor lost with their worker."""
        trials = self.trials(study, TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
        return sum(trial.state != TrialState.FAIL or trial.user_attrs.get("status") in FAILURES for trial in trials)

    @_reads
    def seconds(self, study: Study) -> float:
        """Seconds of training and scoring that all trials took together, by the run folders."""
        return sum(trial.user_attrs.get("seconds", 0.0) for trial in self.trials(study))

    @_reads
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
                except (StorageInternalError, UserError) as error:  # the next one may pass; results are in the store
                    logging.getLogger(__name__).warning("heartbeat of trial %d failed: %s", trial.number, error)

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def add(
        self, study: Study, ended: Sequence[tuple[dict[str, Any], list[Run]]], metrics: Metrics, space: Space
    ) -> None:
        """Records trials, (params, runs of all seeds) each, that ended without this database knowing. ``space`` is what
        a search sampled ``params`` from, {} for an ablation."""
        for start in range(0, len(ended), AT_ONCE):
            trials = []
            for params, runs in ended[start : start + AT_ONCE]:
                runs = [run.snapshot() for run in runs]
                trials.append((conversion.ended(study, params, runs, metrics, space), runs))
            self.storage.add_trials(study._study_id, trials, partial(self._note_attributes, study))

    def replace(self, study: Study, trials: Sequence[tuple[FrozenTrial, str]]) -> None:
        """Puts ``trials``, each with its note, in place of all that ``study`` has."""
        self.storage.add_trials(study._study_id, trials, self._note_rows, anew=True)

    def narrow(self, study: Study) -> None:
        """Gives every parameter of an ablation's trials the distribution that just holds the values of all of them, as
        charts and importances of the dashboard need it, and has a seed that older versions wrote as a parameter an
        attribute. Values that come later may be any."""
        self.storage.narrow(study._study_id, holding)

    def _note_attributes(self, study: Study, trial: FrozenTrial, runs: list[Run]) -> dict[str, Any]:
        return self._note_rows(trial, self._note(study, trial, runs))

    def _note_rows(self, trial: FrozenTrial, note: str) -> dict[str, Any]:
        """What ``save_note`` writes of a trial without a note, without reading those of all others."""
        from optuna_dashboard._note import note_ver_key, split_body  # and scikit-learn: not before it is needed

        return {note_ver_key(trial._trial_id): 1, **split_body(note, trial._trial_id)}

    def tell(self, study: Study, trial: Trial, runs: list[Run], metrics: Metrics) -> None:
        """Ends ``trial`` as its runs (one per seed) ended: their mean metrics, or why one of them failed. A trial that
        another worker took for dead, or that waits again, is left as it is."""
        try:
            for name, value in conversion.attributes(runs).items():
                trial.set_user_attr(name, value)
            self._save_note(trial, self._note(study, trial, runs))
            state, values = conversion.result(runs, metrics)
            study.tell(trial, values, state)
        except GONE:
            if self._runs(trial):
                raise

    def _save_note(self, of: Study | Trial, note: str) -> None:
        from optuna_dashboard import save_note  # and scikit-learn: not before it is needed

        with self.storage.reading():
            save_note(of, note)

    def give_back(self, study: Study, trial: Trial) -> None:
        """Ends ``trial`` as interrupted and puts a copy of it into the queue."""
        try:
            trial.set_user_attr("status", "interrupted")
            study.tell(trial, state=TrialState.FAIL)
        except GONE:
            if self._runs(trial):
                raise
            return  # another worker took it for dead, and has put its copy there
        ended = self.storage.get_trial(trial._trial_id)
        kept = {name: ended.user_attrs[name] for name in ("run_id", "seed") if name in ended.user_attrs}
        again = conversion.waiting(ended.params, ended.distributions, kept)
        self.storage.add_trials(study._study_id, [(again, None)], lambda *_: {})

    def _runs(self, trial: Trial) -> bool:
        """Whether nobody has ended ``trial`` or put it back into the queue."""
        return self.storage.get_trial(trial._trial_id).state == TrialState.RUNNING

    def _note(self, study: Study, trial: Trial | FrozenTrial, runs: list[Run]) -> str:
        """How each run ended, its picture, which becomes an artifact, and its scores."""
        lines = []
        for run in runs:
            kind = kind_of(run)
            status, reason = run.ending()
            lines.append(f"**{run.folder.name}**: {status}{f', {reason}' if reason else ''}\n")
            if status == "finished":
                lines += [self._picture(study, trial, run.folder / kind.picture), "\n| metric | |\n|---|---|"]
                scores = ((kind.metrics[name], value) for name, value in conversion.scores(run).items())
                lines += [f"| {one.label} {one.arrow} | {value:{one.form}} |" for one, value in scores]
        return "\n".join(lines)

    def _picture(self, study: Study, trial: Trial | FrozenTrial, path: Path) -> str:
        if not path.is_file():
            return ""
        storage = Unwritten(trial) if isinstance(trial, FrozenTrial) else self.storage
        options = {"artifact_store": self.artifacts, "storage": storage}
        artifact = upload_artifact(file_path=str(path), study_or_trial=trial, **options)
        return f"![{path.stem}](/artifacts/{study._study_id}/{trial._trial_id}/{artifact})\n"

    @_reads
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
        self._save_note(study, "\n\n".join(lines))


class Listed(NamedTuple):
    """A run that a study's file lists."""

    label: str  # the backbone, or the prior
    params: dict[str, Any]  # of its trial, the seed among them unless a trial has a run of each
    row: dict[str, Any]  # what the file says of it
    runs: list[Run]  # itself, and the prior that it is judged by


class Shelf(NamedTuple):
    """A part of a study's file."""

    key: str
    kind: Kind
    title: str  # what the names of its Optuna studies begin with
    metrics: Metrics
    space: Space | None  # that a search drew from; None where nothing was drawn
    listed: list[Listed]


def shelves(store: Store, name: str) -> list[Shelf]:
    """What the file of the study called ``name`` lists. Raises UserError on an unknown name, and Damaged."""
    record = store.study(name)
    search = record["kind"] == "search"
    parts = [("runs", TOKENIZERS, name, search), *([] if search else [("priors", PRIORS, name, False)])]
    judges = _judges(record, store) if search else {}
    found = []
    for shelf, kind, title, searching in (*parts, ("confirmed", TOKENIZERS, f"{name}-confirm", False)):
        listed = []
        try:
            space = read_space(record["space"]) if searching else {}
            for run_id, row in record.get(shelf, {}).items():
                # the seeds of a search's trial are runs of it
                aside = {kind.key, "role", *(("seed",) if searching else ())}
                params = {name: value for name, value in row.items() if name not in aside}
                own = [store.named(run_id, kind.config.SHELF), *judges.get(frozenset(row.items()), [])]
                listed.append(Listed(row[kind.key], params, row, own))
                conversion.drawn(params, space)
        except (KeyError, TypeError, ValueError, AttributeError, UserError) as error:  # its values are nobody's
            raise Damaged(store.root / "studies" / f"{name}.json", f"{type(error).__name__} {error}") from error
        metrics = kind.ranked or tuple(record["metrics"])
        found.append(Shelf(shelf, kind, title, metrics, space if searching else None, listed))
    return found


def rebuild(index: Index, store: Store, name: str) -> int:
    """Adds the trials of the study called ``name`` that ended without ``index`` knowing, and returns how many those
    were. Raises UserError on an unknown name, and Damaged where the study's file is."""
    added = 0
    for _, kind, title, metrics, space, listed in shelves(store, name):
        trials: dict[tuple, tuple[dict[str, Any], list[Run]]] = {}
        for label, params, _, own in listed:
            identity = (label, *(own[:1] if space is None else params.items()))
            trials.setdefault(identity, (params, []))[1].extend(own)
        with index.planning:
            labels = dict.fromkeys(label for label, *_ in trials)
            studies = {label: index.open(kind.study(title, label), metrics) for label in labels}
            for study in studies.values():
                index.recover(study)
            known = {label: index.states(study) for label, study in studies.items()}
            how = endings(run for _, runs in trials.values() for run in runs)
            ended: dict[str, list[tuple[dict[str, Any], list[Run]]]] = {label: [] for label in labels}
            for (label, *_), (params, runs) in trials.items():
                if runs[0].folder.name not in known[label] and has_ended({how[run] for run in runs}):
                    ended[label].append((params, runs))
            for label in labels:
                index.add(studies[label], ended[label], metrics, space or {})
                if space is None:
                    index.narrow(studies[label])
                added += len(ended[label])
    return added


def has_ended(found: set[str]) -> bool:
    """Whether a trial whose runs are ``found`` to be so has ended: all are finished, or one of them failed."""
    return found == {"finished"} or bool(found & {*FAILURES})


def _judges(record: dict[str, Any], store: Store) -> dict[frozenset, list[Run]]:
    """The prior over each tokenizer of a search, by the row of that: the last that is listed."""
    found = {}
    for run_id, row in record.get("priors", {}).items():
        below = frozenset(item for item in row.items() if item[0] != PRIORS.key)
        found[below] = [store.named(run_id, PRIORS.config.SHELF)]
    return found
