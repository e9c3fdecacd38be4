"""Workers of a study as jobs of a cluster, by submitit: each runs the command of one worker, all on one database.

What submitit keeps of jobs, their logs among it, lies below ``studies/jobs``. A job that is pre-empted, cancelled or at
its time limit gets SIGTERM first, as any worker may, and gives its trial back with its checkpoint.
"""

import os
import subprocess
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from rich.markup import escape

from bench.core.errors import Interrupted, UserError
from bench.core.progress import Bar, say
from bench.core.settings import check_choice
from bench.core.store import Store
from bench.tokenizers.arguments import without
from bench.training.loop import interruptible

from .address import without_password
from .definition import JOBS, StudyArguments
from .index import Index
from .kinds import endings

if TYPE_CHECKING:
    from submitit import Executor, Job

POLL_SECONDS = 5.0
GRACE_SECONDS = 120  # from SIGTERM until a job is killed at its time limit


def queued(jobs: Sequence["Job"]) -> list[str] | None:
    """States of those of ``jobs`` that Slurm has not seen the end of; None while it does not answer."""
    ids = {job.job_id.partition("_")[0] for job in jobs}
    words = ["squeue", "--noheader", "--array", "--jobs", ",".join(ids), "--format", "%T"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        return [] if "Invalid job id" in done.stderr else None  # of jobs that ended a while ago
    return done.stdout.lower().split()


LAUNCHERS = {"slurm": queued}  # submitit's name of a cluster → states of jobs that have not ended


def check(options: StudyArguments, url: str) -> None:
    """Raises UserError where jobs could not work together on the database at ``url``, or not on their own."""
    check_choice("launcher", options.launcher, LAUNCHERS)
    if url.startswith("sqlite"):
        told = f"--launcher {options.launcher} needs a PostgreSQL server that all jobs reach, and {url} is a file"
        raise UserError(f"{told}; name one with --storage or VQBENCH_STORAGE, as docs/cluster.md shows")
    if 0 < options.gpus_per_worker < options.processes:
        told = f"--gpus-per-worker is {options.gpus_per_worker}, and each of {options.processes} processes takes one"
        raise UserError(f"{told}; take --gpus-per-worker {options.processes}")


def executor_of(options: StudyArguments, store: Store, study: str) -> "Executor":
    """What submits jobs of the study called ``study`` as ``options`` have it. Raises UserError where it cannot."""
    try:
        import submitit  # an extra
    except ImportError as error:
        told = f"--launcher {options.launcher} needs the package submitit"
        raise UserError(f"{told}; pip install 'vqbench[slurm]'") from error
    try:
        executor = submitit.AutoExecutor(store.root / "studies" / "jobs", cluster=options.launcher)
    except RuntimeError as error:
        told = f"there is no {options.launcher} here ({error})"
        raise UserError(f"{told}; start this where jobs are submitted, or leave out --launcher") from error
    further = dict(word.split("=", 1) for word in options.sbatch)
    gpus = {"gpus_per_node": options.gpus_per_worker} if options.gpus_per_worker else {}
    executor.update_parameters(
        name=study,
        cpus_per_task=options.cpus_per_worker,
        **gpus,
        slurm_partition=options.partition,
        slurm_time=options.time,
        slurm_srun_args=["--cpus-per-task", str(options.cpus_per_worker)],  # which it does not take from the job
        slurm_additional_parameters={"signal": f"TERM@{GRACE_SECONDS}", **further},
    )
    return executor


def launch(
    run: Callable[[list[str]], int], words: list[str], options: StudyArguments, store: Store, study: str, url: str
) -> int:
    """Has jobs ``run`` the command line ``words`` of the study called ``study``, each as one worker, and shows how they
    get on until the last has ended. Returns the exit code: 0, or 1 where a run of the study is not finished. Raises
    UserError where no job can be submitted, and Interrupted after SIGINT or SIGTERM, when the jobs are cancelled."""
    check(options, url)
    executor = executor_of(options, store, study)
    Index(url, store.root / "studies")  # is there, and has its tables
    os.environ["VQBENCH_STORAGE"] = url  # which jobs inherit, and no file has: there may be a password in it
    own = {f"--{name}" for flag in (*JOBS, "workers", "storage") for name in (flag, flag.replace("_", "-"))}
    words = [*without(words, own), "--workers", "1"]
    with interruptible() as stop:
        try:
            with executor.batch():
                jobs = [executor.submit(run, words) for _ in range(options.workers)]
        except RuntimeError as error:  # with all that the shell said
            reason = str(error).strip().splitlines()[-1]
            raise UserError(f"no job could be submitted ({reason}); see --partition, --time and --sbatch") from error
        ids = ", ".join(dict.fromkeys(job.job_id.partition("_")[0] for job in jobs))
        say(f"study {study}: {len(jobs)} jobs ({ids}) on {escape(without_password(url))}; logs: {executor.folder}")
        with Bar(f"jobs of {study}", len(jobs), eta=lambda: None) as bar:
            left = jobs
            while left and not stop.wait(POLL_SECONDS):
                left = LAUNCHERS[options.launcher](jobs)
                left = jobs if left is None else left
                states = ", ".join(f"{count} {state}" for state, count in Counter(map(str, left)).items())
                bar.advance(len(jobs) - len(left) - bar.done, f"{states}; runs: {standing(store, study)[0]}")
        if stop.is_set():
            for job in jobs:
                job.cancel(check=False)
            raise Interrupted(f"cancelled {len(jobs)} jobs; their trials keep checkpoints; the same command continues")
    lines = (line for job in jobs for line in (job.stderr() or "").splitlines())
    for line in dict.fromkeys(line for line in lines if line.startswith("error: ")):
        say(f"[bold red]in a job:[/] {escape(line)}")
    told, whole = standing(store, study)
    further = f"report: {store.root / 'reports' / study}" if whole else "the same command continues"
    say(f"study {study}: the jobs have ended; runs: {told}; {escape(further)}")
    return int(not whole)


def standing(store: Store, study: str) -> tuple[str, bool]:
    """How the runs that the file of the study called ``study`` lists have ended, in words, and whether all of them are
    finished."""
    if study not in store.studies():
        return "none yet", False
    record = store.study(study)
    shelves = {"runs": ("runs", "confirmed"), "priors": ("priors",)}
    named = [(name, shelf) for shelf, parts in shelves.items() for part in parts for name in record.get(part, ())]
    how = Counter(endings(store.named(*one) for one in named).values())
    return ", ".join(f"{count} {status}" for status, count in how.items()), not how.keys() - {"finished", "pruned"}
