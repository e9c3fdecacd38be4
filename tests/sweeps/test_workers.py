"""Several worker processes on one real database, one of them killed: every planned cell is finished exactly once."""

import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import optuna
import pytest

from bench.core.store import Store
from bench.sweeps.address import default_url

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("workers")]
ROOT = Path(__file__).parents[2]
CELLS = "--backbone cnn vit --beta 0.25 0.5 --seeds 0 1"
TINY = "--preset smoke --width 16 --depth 1 --codebook-size 16 --steps 60 --batch-size 8 --lpips-weight 0 --device cpu"


def worker(folder: Path, results: Path, *arguments: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "studies.beta", *CELLS.split(), *TINY.split()]
    command += ["--data", f"folder:{folder}", "--results", str(results), *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen) -> str:
    _, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    return err


def check_exactly_once(results: Path, url: str, count: int = 8) -> None:
    runs = Store(results).runs()
    assert len(runs) == count
    assert all(run.finished for run in runs)
    studies = [optuna.load_study(study_name=name, storage=url) for name in optuna.get_all_study_names(url)]
    trials = [trial for one in studies if "overview" not in one.user_attrs for trial in one.trials]
    complete = Counter(trial.user_attrs["run_id"] for trial in trials if trial.state.name == "COMPLETE")
    assert complete == {run.folder.name: 1 for run in runs}
    assert not [trial for trial in trials if trial.state.name in ("WAITING", "RUNNING")]
    for run in runs:  # trained once: a second start would have begun at its first step again
        steps = [row["step"] for row in run.history()]
        assert steps == sorted(set(steps))
        assert len(list((results / "reports").glob("*/report.html"))) == 1


def test_two_workers_on_sqlite_one_killed_and_started_again(image_folder, tmp_path):
    results = tmp_path / "results"
    first, second = worker(image_folder, results), worker(image_folder, results)
    while not any(run.status == "unfinished" for run in Store(results).runs()):
        time.sleep(0.1)
        assert second.poll() is None
    time.sleep(1)
    second.kill()
    second.wait()
    again = worker(image_folder, results)
    finish(first), finish(again)
    check_exactly_once(results, default_url(results))
    assert "nothing to do" in finish(worker(image_folder, results))


def test_four_workers_on_postgresql_one_killed_and_started_again(image_folder, tmp_path, postgres):
    results = tmp_path / "results"
    workers = [worker(image_folder, results, "--storage", postgres) for _ in range(4)]
    while not any(run.status == "unfinished" for run in Store(results).runs()):
        time.sleep(0.1)
        assert workers[0].poll() is None
    time.sleep(1)
    workers[0].kill()
    workers[0].wait()
    workers[0] = worker(image_folder, results, "--storage", postgres)
    for one in workers:
        finish(one)
    check_exactly_once(results, postgres)
    assert "nothing to do" in finish(worker(image_folder, results, "--storage", postgres))
