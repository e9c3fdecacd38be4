"""Workers as jobs: as processes that submitit starts here, and of a real Slurm of one node, where that is installed."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench.core.store import Store
from bench.sweeps import launcher, workers
from bench.tokenizers.config import make_config
from studies.beta import STUDY
from tests.fabricate import fabricate
from tests.sweeps.test_workers import ROOT, TINY, check_exactly_once

DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scancel")
URL = "postgresql+psycopg://user:secret@nowhere/x"


# -- what is submitted, to a cluster that is none ----------------------------------------------------------------------


class Cluster:
    """In place of submitit: what it was told, and jobs with logs."""

    def __init__(self, log: str = "", error: str = ""):
        self.log, self.error = log, error
        self.parameters: dict = {}
        self.submitted: list = []
        self.cancelled: list = []

    def AutoExecutor(self, folder: Path, cluster: str) -> "Cluster":
        self.folder, self.cluster = folder, cluster
        return self

    def update_parameters(self, **parameters) -> None:
        self.parameters = parameters

    @contextlib.contextmanager
    def batch(self) -> Iterator[None]:
        yield
        if self.error:
            raise RuntimeError(self.error)

    def submit(self, run, words: list[str]) -> SimpleNamespace:
        job_id = f"7_{len(self.submitted)}"
        self.submitted.append((run, words))
        return SimpleNamespace(
            job_id=job_id, stderr=lambda: self.log, cancel=lambda check: self.cancelled.append((job_id, check))
        )


@pytest.fixture
def submit(monkeypatch, tmp_path, capsys):
    """Launches a study with a Cluster, whose jobs are in ``states`` in turn: the exit code, and what was said."""
    monkeypatch.setattr(launcher, "Index", lambda url, folder: None)
    monkeypatch.setattr(launcher, "POLL_SECONDS", 0)
    monkeypatch.setenv("VQBENCH_STORAGE", URL)

    def launch(cluster: Cluster, states: list, *words: str) -> tuple[int, str]:
        monkeypatch.setitem(sys.modules, "submitit", cluster)
        answers = iter(states)
        monkeypatch.setitem(launcher.LAUNCHERS, "slurm", lambda jobs: next(answers))
        line = ["--results", str(tmp_path), "--backbone", "cnn", "--seeds", "0", "--launcher", "slurm", *words]
        code = workers.main(STUDY, "", line)
        assert not [*answers]  # it has asked until all had ended
        return code, " ".join(capsys.readouterr().err.split())

    return launch


def test_jobs_run_the_command_of_one_worker_and_no_file_has_the_password(submit, tmp_path):
    cluster = Cluster()
    own = ("--workers=2", "--gpus-per-worker", "4", "--cpus-per-worker", "8", "--partition", "long", "--time", "90")
    code, said = submit(
        cluster, [["pending"] * 2, None, ["running"], []], *own, "--sbatch", "mem=32G", "account=me", "--storage", URL
    )
    run, words = cluster.submitted[0]
    assert (run.func, run.args) == (workers.main, (STUDY, ""))
    assert words == ["--results", str(tmp_path), "--backbone", "cnn", "--seeds", "0", "--workers", "1"]
    assert cluster.submitted == [(run, words)] * 2
    assert os.environ["VQBENCH_STORAGE"] == URL
    assert (cluster.cluster, cluster.folder) == ("slurm", tmp_path / "studies" / "jobs")
    assert cluster.parameters == {
        "name": "beta-cpu",
        "cpus_per_task": 8,
        "gpus_per_node": 4,
        "slurm_partition": "long",
        "slurm_time": 90,
        "slurm_srun_args": ["--cpus-per-task", "8"],
        "slurm_additional_parameters": {"signal": "TERM@120", "mem": "32G", "account": "me"},
    }
    assert "study beta-cpu: 2 jobs (7) on postgresql+psycopg://user:***@nowhere/x" in said
    assert "the jobs have ended; runs: none yet; the same command continues" in said
    assert "secret" not in said
    assert code == 1
    assert not cluster.cancelled


def test_a_job_takes_what_is_not_given_from_the_cluster(submit):
    cluster = Cluster()
    submit(cluster, [[]])
    assert cluster.parameters["slurm_partition"] is cluster.parameters["slurm_time"] is None
    assert cluster.parameters["cpus_per_task"] == 1
    assert "gpus_per_node" not in cluster.parameters


def test_a_device_of_the_jobs_need_not_be_here(submit):
    cluster = Cluster()
    assert submit(cluster, [[]], "--device", "cuda")[0] == 1
    assert cluster.submitted[0][1][6:] == ["--device", "cuda", "--workers", "1"]


def test_what_jobs_say_is_wrong_is_shown_once(submit):
    _, said = submit(Cluster("a\nerror: no images\nb error: c\n"), [[]], "--workers", "3")
    assert said.count("in a job: error: no images") == 1
    assert "error: c" not in said


def test_ctrl_c_cancels_the_jobs(submit, monkeypatch):
    class Stopped(list):
        def __iter__(self):
            os.kill(os.getpid(), signal.SIGINT)
            return super().__iter__()

    cluster = Cluster()
    code, said = submit(cluster, [["running"], Stopped(["running"])], "--workers", "2")
    assert code == 130
    assert "cancelled 2 jobs; their trials keep checkpoints; the same command continues" in said
    assert cluster.cancelled == [("7_0", False), ("7_1", False)]


def test_what_cannot_be_submitted_is_told_in_a_sentence(submit, monkeypatch):
    code, said = submit(Cluster(error="many\nwords\nsbatch: error: invalid partition\n"), [])
    assert code == 2
    assert said == (
        "error: no job could be submitted (sbatch: error: invalid partition); see --partition, --time and --sbatch"
    )

    def nowhere(folder, cluster):
        raise RuntimeError("no srun")

    code, said = submit(SimpleNamespace(AutoExecutor=nowhere), [])
    assert (code, said) == (
        2,
        "error: there is no slurm here (no srun); start this where jobs are submitted, or leave out --launcher",
    )
    code, said = submit(None, [])
    told = "error: --launcher slurm needs the package submitit; pip install 'vqbench[slurm]'"
    assert (code, said) == (2, told)


def test_a_job_has_a_gpu_for_each_process(submit):
    code, said = submit(Cluster(), [], "--processes", "2", "--gpus-per-worker", "1")
    assert (code, said) == (
        2,
        "error: --gpus-per-worker is 1, and each of 2 processes takes one; take --gpus-per-worker 2",
    )
    assert submit(Cluster(), [[]], "--processes", "2", "--gpus-per-worker", "2")[0] == 1
    assert submit(Cluster(), [[]], "--processes", "2")[0] == 1  # on CPUs


@pytest.mark.parametrize(
    ("script", "states"),
    [
        ("echo RUNNING; echo PENDING", ["running", "pending"]),
        ("true", []),
        ("echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1", []),
        ("echo 'Unable to contact slurm controller' >&2; exit 1", None),
    ],
)
def test_slurm_is_asked_once_for_all_jobs(monkeypatch, tmp_path, script, states):
    """An answer that does not come is none, and no end of theirs."""
    (tmp_path / "squeue").write_text(f"#!/bin/sh\necho $* > {tmp_path}/asked\n{script}\n")
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert launcher.queued([SimpleNamespace(job_id=f"7_{number}") for number in range(3)]) == states
    assert (tmp_path / "asked").read_text() == "--noheader --array --jobs 7 --format %T\n"


def test_a_study_stands_as_all_runs_that_it_lists(tmp_path):
    store = Store(tmp_path)
    assert launcher.standing(store, "a") == ("none yet", False)
    runs = [fabricate(store, make_config("cnn", "smoke", device="cpu", seed=seed)) for seed in range(2)]
    header = {"study": "a", "sweep": ["beta"], "metrics": ["psnr"], "kind": "ablation", "space": {}}
    store.extend_study("a", header, {run.folder.name: {"backbone": "cnn", "seed": 0} for run in runs})
    assert launcher.standing(store, "a") == ("2 finished", True)
    third = store.run(make_config("cnn", "smoke", device="cpu", seed=2))
    store.extend_study("a", header, {third.folder.name: {"backbone": "cnn", "seed": 2}}, "confirmed")
    assert launcher.standing(store, "a") == ("2 finished, 1 unfinished", False)
    fabricate(store, make_config("cnn", "smoke", device="cpu", seed=2))
    (third.folder / "metrics.json").unlink()
    third.fail("pruned", "worse")
    assert launcher.standing(store, "a") == ("2 finished, 1 pruned", True)


# -- jobs that train ---------------------------------------------------------------------------------------------------


def words_of(image_folder: Path, results: Path, *more: str) -> list[str]:
    return [*more, *TINY.split(), "--data", f"folder:{image_folder}", "--results", str(results)]


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


CONF = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthType=auth/munge
AuthInfo=socket={root}/munge/socket
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd.log
NodeName={host} NodeAddr=127.0.0.1 CPUs=4 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""  # all on loopback; no accounting, no control groups


@pytest.fixture
def slurm(tmp_path, monkeypatch) -> Iterator[None]:
    """A cluster of one node with four cores, whether it has them or not."""
    if os.getuid() or None in map(shutil.which, DAEMONS):
        pytest.skip("needs root, and slurmctld, slurmd, slurm-client and munge of Debian")
    root, host = tmp_path / "slurm", socket.gethostname().partition(".")[0]
    for name in ("state", "spool", "munge"):
        (root / name).mkdir(parents=True)
    (root / "munge").chmod(0o711)
    (root / "munge" / "key").touch(0o600)
    (root / "munge" / "key").write_bytes(os.urandom(1024))
    (root / "slurm.conf").write_text(CONF.format(root=root, host=host, ports=free_ports(2)))
    monkeypatch.setenv("SLURM_CONF", str(root / "slurm.conf"))
    places = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    munged = ["munged", "--force", "--foreground", *(f"--{flag}={root}/munge/{name}" for flag, name in places.items())]
    daemons = []
    try:
        for command in (munged, ["slurmctld", "-D"], ["slurmd", "-D"]):
            daemons.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        for _ in range(100):
            states = ["sinfo", "--noheader", "--format", "%T"]
            told = subprocess.run(states, capture_output=True, text=True, check=False)
            if told.stdout.strip() == "idle":
                break
            time.sleep(0.2)
        else:
            pytest.skip(f"Slurm does not start here: {told.stdout}{told.stderr}")
        yield
    finally:
        for one in reversed(daemons):
            one.terminate()
            one.wait()


def unfinished(results: Path) -> int:
    return sum(bool(run.history()) and not run.finished for run in Store(results).runs())


@pytest.mark.slow
def test_twelve_trials_on_four_jobs_of_slurm_of_which_one_is_cancelled_are_each_run_once(
    slurm, postgres, image_folder, tmp_path
):
    """The others go on with what it gave back; the command says how the jobs stand, and ends with them."""
    results = tmp_path / "results"
    cells = ("--backbone", "cnn", "--beta", "0.25", "0.5", "0.75", "1", "--seeds", "0", "1", "2")
    options = ("--launcher", "slurm", "--workers", "4", "--time", "30", "--sbatch", "comment=tests")
    command = [sys.executable, "-m", "studies.beta", *words_of(image_folder, results, *cells, *options)]
    environment = {**os.environ, "VQBENCH_STORAGE": postgres}
    command = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    while not unfinished(results):
        time.sleep(0.2)
        assert command.poll() is None, command.stderr.read()
    subprocess.run(["scancel", "1_0"], check=True)
    said = command.communicate(timeout=500)[1]
    assert command.returncode == 0, said
    assert "4 jobs (1)" in said
    assert "the jobs have ended; runs: 12 finished" in said
    check_exactly_once(results, postgres, 12)
    logs = {path.name: path.read_text() for path in (results / "studies" / "jobs").glob("*.err")}
    assert len(logs) == 4
    assert "the same command continues" in logs["1_0_0_log.err"]
    assert postgres not in "".join(path.read_text() for path in (results / "studies" / "jobs").glob("*.sh"))


@pytest.mark.slow
def test_without_slurm_jobs_are_processes_and_what_one_gives_back_another_takes(
    postgres, image_folder, tmp_path, monkeypatch, capsys
):
    pytest.importorskip("submitit")
    ended = lambda jobs: [job.state for job in jobs if not job.done()]  # noqa: E731
    monkeypatch.setitem(launcher.LAUNCHERS, "local", ended)
    monkeypatch.setenv("VQBENCH_STORAGE", postgres)
    monkeypatch.chdir(ROOT)
    results = tmp_path / "results"

    def preempt() -> None:
        while not unfinished(results):
            time.sleep(0.1)
        first = min((results / "studies" / "jobs").glob("*_submitted.pkl"))
        os.kill(int(first.name.partition("_")[0]), signal.SIGTERM)

    thread = threading.Thread(target=preempt, daemon=True)
    thread.start()
    cells = ("--backbone", "cnn", "--beta", "0.25", "0.5", "0.75", "--seeds", "0")
    words = words_of(image_folder, results, *cells, "--launcher", "local", "--workers", "2", "--time", "30")
    assert workers.main(STUDY, "", words) == 0, capsys.readouterr().err
    thread.join(1)
    assert not thread.is_alive()
    assert "the jobs have ended; runs: 3 finished; report: " in " ".join(capsys.readouterr().err.split())
    check_exactly_once(results, postgres, 3)
    logs = [path.read_text() for path in (results / "studies" / "jobs").glob("*.err")]
    assert sum("the same command continues" in log for log in logs) == 1
