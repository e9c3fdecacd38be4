"""Studies: every planned cell exactly once, whatever happens; files are the truth, Optuna an index of them."""

import contextlib
import importlib
import json
import os
import re
import shlex
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import optuna
import pandas as pd
import pytest
from optuna.artifacts import get_all_artifact_meta
from optuna_dashboard import get_note

from backbones import BACKBONES
from bench import study as study_command
from bench.analysis.frames import CONFIG, METRICS, frame
from bench.core.errors import UserError
from bench.core.store import Store
from bench.instruments import INSTRUMENTS
from bench.priors.config import PriorConfig
from bench.sweeps import definition, importance, index, plan
from bench.sweeps import workers as study
from bench.sweeps.address import default_url
from bench.sweeps.child import Outcome
from bench.sweeps.definition import Ablation, Range, Search, parse_study
from bench.sweeps.index import Index
from bench.sweeps.kinds import KINDS
from bench.sweeps.plan import Plan
from bench.sweeps.search import make_plan
from bench.tokenizers import arguments
from bench.tokenizers.config import make_config
from tests.fabricate import fabricate, fabricate_failed, fabricate_prior

STUDIES = sorted(path.stem for path in (Path(__file__).parents[2] / "studies").glob("[a-z]*.py"))
BETA = Ablation("beta", sweep={"beta": (0.25, 1.0)}, backbones=("cnn", "vit"), seeds=(0,))
SPACE = {"beta": Range(0.1, 4.0, log=True), "codebook_size": (64, 256), "code_dim": Range(4, 32)}
SEARCH = Search("search", SPACE, backbones=("cnn", "vit"))


class FakeChild:
    """In place of a training process: fabricates the run, or ends as ``plan`` says for the n-th call."""

    def __init__(self, endings=()):
        self.calls, self.endings, self.lock = [], list(endings), threading.Lock()

    def __call__(self, config, store, fid_weights, threads, watch, timeout, track=None, processes=1):
        with self.lock:
            self.calls.append(config)
            ending = self.endings.pop(0) if self.endings else "finished"
        prior = isinstance(config, PriorConfig)
        losses = {"bits_per_token": 7.0} if prior else {"reconstruction": config.beta, "perplexity": 9.0}
        if watch([{"step": config.steps // 2, **losses}]) == "interrupted":
            return Outcome("interrupted")
        if ending == "finished" and prior:
            fabricate_prior(store, config, 5.0, 100.0)
        elif ending == "finished":
            fabricate(store, config, quality=0.01 * config.beta)
        elif ending not in ("interrupted", "blocked"):
            fabricate_failed(store, config, ending)
        return Outcome(ending, f"it {ending}" if ending != "finished" else "")


class Written:
    """In place of a report."""

    def __init__(self, folder):
        picture = folder / "plot.png"
        picture.write_bytes(b"png")
        self.page, self.charts = folder / "report.html", [type("Chart", (), {"title": "plot", "path": picture})]


@pytest.fixture
def child(monkeypatch, tmp_path):
    fake = FakeChild()
    monkeypatch.setattr(study, "run_in_child", fake)
    monkeypatch.setattr(study, "prepare", lambda *arguments: None)
    monkeypatch.setattr("bench.analysis.report.write_report", lambda names, root, *, importances: Written(tmp_path))
    monkeypatch.setattr(study, "IDLE_SECONDS", 0.05)
    return fake


def start(what, tmp_path, *arguments) -> int:
    return study.main(what, "", ["--preset", "smoke", "--device", "cpu", "--results", str(tmp_path), *arguments])


def planned(tmp_path, *arguments) -> Plan:
    """BETA's plan, as ``start`` makes it."""
    common = ["--preset", "smoke", "--device", "cpu", "--results", str(tmp_path)]
    return make_plan(BETA, parse_study(BETA, "", [*common, *arguments]))


def optuna_studies(tmp_path, overview: bool = False) -> dict[str, optuna.Study]:
    """By name those that trials are taken from, or those that show all backbones."""
    url = default_url(tmp_path)
    found = [optuna.load_study(study_name=name, storage=url) for name in optuna.get_all_study_names(url)]
    return {one.study_name: one for one in found if one.user_attrs.get("overview", False) == overview}


def states(tmp_path) -> Counter:
    return Counter(trial.state.name for one in optuna_studies(tmp_path).values() for trial in one.trials)


def test_every_cell_is_run_once_and_a_finished_study_does_nothing(child, tmp_path, capsys):
    assert start(BETA, tmp_path) == 0
    assert Counter((config.backbone, config.beta, config.seed) for config in child.calls) == Counter(
        (name, beta, 0) for name in ("cnn", "vit") for beta in (0.25, 1.0)
    )
    assert states(tmp_path) == {"COMPLETE": 4}
    assert "4 trials to run" in capsys.readouterr().err
    child.calls.clear()
    assert start(BETA, tmp_path) == 0
    assert not child.calls
    assert "nothing to do" in capsys.readouterr().err
    assert states(tmp_path) == {"COMPLETE": 4}


def test_one_more_seed_runs_only_that_seed(child, tmp_path):
    start(BETA, tmp_path)
    child.calls.clear()
    start(BETA, tmp_path, "--seeds", "0", "1")
    assert {config.seed for config in child.calls} == {1}
    assert len(child.calls) == 4


def test_a_subset_leaves_the_rest_of_the_queue_alone(child, tmp_path):
    what = planned(tmp_path, "--seeds", "0", "1")
    for part in what.tokenizers():  # a command that was stopped before it ran anything
        what.fill(part, Index(default_url(tmp_path), tmp_path / "studies"))
    start(BETA, tmp_path, "--seeds", "1", "--backbone", "vit")
    assert {(config.backbone, config.seed) for config in child.calls} == {("vit", 1)}
    assert states(tmp_path) == {"COMPLETE": 2, "WAITING": 6}


def test_a_command_waits_for_its_own_runs_and_not_for_those_of_others(tmp_path, monkeypatch):
    """A trial that another command has is waited for if it is of this plan, which may have to run it after all."""
    mine, theirs = planned(tmp_path, "--seeds", "0"), planned(tmp_path, "--seeds", "1")
    waited = []

    class Busy:
        """An index in which one trial of ``run_id`` is running until somebody waits for it."""

        def __init__(self, run_id):
            self.run_id = run_id

        def trials(self, opened, *states, of=()):
            return [self.run_id] if not waited and (not of or self.run_id in of) else []

        def ended(self, opened):
            return 0

        def claim(self, opened, run_ids):
            return None

        def recover(self, opened):
            waited.append(opened)

    monkeypatch.setattr(plan.Part, "open", lambda part, index: part.name)
    monkeypatch.setattr(study, "time", SimpleNamespace(sleep=lambda seconds: None, monotonic=lambda: 0.0))
    for what, waits in ((theirs, False), (mine, True)):
        run_id = what.tokenizers()[0].cells[0].run.folder.name
        workers_of(mine, Busy(run_id))._work()
        assert bool(waited) == waits


def test_the_line_of_a_trial_that_ended_leaves_the_bar(tmp_path):
    workers = workers_of(planned(tmp_path, "--steps", "50"))
    part = workers.plan.tokenizers()[0]
    workers._advance("a", "a: 20/50")
    workers._advance("b", "b: 10/50")
    workers._say("a", Outcome("diverged", "it diverged"), part, part.cells[0], 1.0)
    assert workers.told[-1] == "b: 10/50"


def test_the_line_of_a_trial_whose_run_lacks_a_metric_of_the_study_tells_the_others(tmp_path, capsys):
    """Such as one that it was scored without."""
    workers = workers_of(planned(tmp_path, "--metric", "ssim", "psnr"))
    part = workers.plan.tokenizers()[0]
    (config,) = part.cells[0].configs[:1]
    fabricate(workers.plan.store, config, ssim=None)
    workers._say("a", Outcome("finished"), part, part.cells[0], 1.0)
    assert re.search(r"1/2 a: PSNR dB [\d.]+, perplexity \d+ \(1 s\)", capsys.readouterr().err)


def test_workers_share_the_cells_without_running_any_twice(child, tmp_path):
    """Two commands at once, three workers each, on one SQLite file."""
    arguments = ("--seeds", *map(str, range(5)), "--workers", "3")
    commands = [threading.Thread(target=start, args=(BETA, tmp_path, *arguments)) for _ in range(2)]
    for command in commands:
        command.start()
    for command in commands:
        command.join()
    assert max(Counter(config.run_id() for config in child.calls).values()) == 1
    assert len(child.calls) == 20
    assert states(tmp_path) == {"COMPLETE": 20}


def test_failures_are_told_apart_retried_with_a_bound_and_never_stop_the_study(child, tmp_path, capsys):
    one = Ablation("beta", sweep={"beta": (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)}, backbones=("cnn",), seeds=(0,))
    child.endings = [
        *("crashed", "crashed", "finished"),  # retried twice: passes
        *("crashed", "crashed", "crashed"),  # given up
        *("out_of_memory", "out_of_memory"),  # retried once
        "diverged",
        "timed_out",
        "finished",
    ]
    assert start(one, tmp_path) == 1
    assert Counter(config.beta for config in child.calls) == {0.1: 3, 0.2: 3, 0.3: 2, 0.4: 1, 0.5: 1, 0.6: 1}
    table = frame(Store(tmp_path).runs()).set_index("beta").status
    assert list(table.sort_index()) == ["finished", "crashed", "out_of_memory", "diverged", "timed_out", "finished"]
    (indexed,) = optuna_studies(tmp_path).values()
    assert states(tmp_path) == {"COMPLETE": 2, "FAIL": 4}
    failed = {t.params["beta"]: t.user_attrs["status"] for t in indexed.trials if t.state.name == "FAIL"}
    assert failed == {0.2: "crashed", 0.3: "out_of_memory", 0.4: "diverged", 0.5: "timed_out"}

    child.calls.clear()
    assert start(one, tmp_path) == 1  # failures are not run again by themselves
    assert not child.calls
    assert "4" in capsys.readouterr().err
    assert start(one, tmp_path, "--retry-failed") == 0
    assert sorted(config.beta for config in child.calls) == [0.2, 0.3, 0.4, 0.5]


def test_an_interrupted_study_goes_on_where_it_stopped(child, tmp_path, monkeypatch):
    class Stopping(FakeChild):
        def __call__(self, config, store, fid_weights, threads, watch, timeout, track=None, processes=1):
            if len(self.calls) == 2:
                self.stop()
            return super().__call__(config, store, fid_weights, threads, watch, timeout)

    stopping = Stopping()
    workers = {}
    original = study.Workers.run

    def run(self):
        workers["now"] = self
        original(self)

    stopping.stop = lambda: workers["now"].stop.set()
    with monkeypatch.context() as patch:
        patch.setattr(study, "run_in_child", stopping)
        patch.setattr(study.Workers, "run", run)
        assert start(BETA, tmp_path) == 130
    assert sum(run.finished for run in Store(tmp_path).runs()) == 2
    assert not states(tmp_path)["RUNNING"]
    assert start(BETA, tmp_path) == 0
    assert len(child.calls) == 2  # what was missing, the interrupted one included
    assert states(tmp_path)["COMPLETE"] == 4
    assert not states(tmp_path)["WAITING"]


def test_what_the_store_has_finished_is_adopted(child, tmp_path):
    """Also what runs outside of any study finished, such as bench.run."""
    fabricate(Store(tmp_path), make_config("cnn", "smoke", beta=0.25, device="cpu"))
    start(BETA, tmp_path)
    assert len(child.calls) == 3
    assert states(tmp_path) == {"COMPLETE": 4}


def test_an_adopted_run_has_the_curve_that_it_had(child, tmp_path):
    """In a new database, whose pruner compares by it."""
    start(BETA, tmp_path)
    what = planned(tmp_path)
    watched = Mock(study=Mock(direction=optuna.study.StudyDirection.MINIMIZE))
    config = what.example("cnn")
    history = what.store.run(config).folder / "history.jsonl"
    history.write_text("".join(json.dumps({"step": n, "reconstruction": 1 / n}) + "\n" for n in (50, 100)))
    assert workers_of(what)._attempt(config, "a", what.tokenizers()[0], watched).status == "finished"
    assert [call.args for call in watched.report.call_args_list] == [(1 / 50, 50), (1 / 100, 100)]


def test_a_run_that_is_removed_as_its_trial_ends_is_told_in_one_sentence(child, tmp_path, monkeypatch, capsys):
    attempt = study.Workers._attempt

    def removing(self, config, *rest):
        outcome = attempt(self, config, *rest)
        shutil.rmtree(self.plan.store.run(config).folder)
        return outcome

    with monkeypatch.context() as patch:
        patch.setattr(study.Workers, "_attempt", removing)
        assert start(BETA, tmp_path) == 2
    assert "was removed while its trial ended; the same command runs it again" in capsys.readouterr().err
    assert start(BETA, tmp_path) == 0
    assert sum(run.finished for run in Store(tmp_path).runs()) == 4


def test_files_are_the_truth(child, tmp_path):
    """A run folder that vanished is run again, whatever the database says."""
    start(BETA, tmp_path)
    lost = Store(tmp_path).run(child.calls[0])
    (lost.folder / "metrics.json").unlink()
    config = child.calls[0]
    child.calls.clear()
    start(BETA, tmp_path)
    assert child.calls == [config]
    assert lost.finished


def test_a_failed_cell_that_was_finished_elsewhere_is_recorded_as_finished(child, tmp_path):
    one = Ablation("beta", sweep={"beta": (0.25,)}, backbones=("cnn",), seeds=(0,))
    child.endings = ["diverged"]
    assert start(one, tmp_path) == 1
    fabricate(Store(tmp_path), child.calls[0])
    for _ in range(2):  # once
        assert start(one, tmp_path) == 0
        assert states(tmp_path) == {"FAIL": 1, "COMPLETE": 1}
    assert len(child.calls) == 1


def test_a_dead_workers_trial_comes_back_once(child, tmp_path, monkeypatch):
    monkeypatch.setattr(index, "HEARTBEAT_SECONDS", 1)
    monkeypatch.setattr(index, "GRACE_SECONDS", 1)
    what = planned(tmp_path)
    dead = Index(default_url(tmp_path), tmp_path / "studies")
    part = what.tokenizers()[0]
    assert what.fill(part, dead) == 2
    one = part.open(dead)
    taken = dead.claim(one, set())
    dead.storage.record_heartbeat(taken._trial_id)  # its last
    assert start(BETA, tmp_path) == 0
    assert len(child.calls) == 4
    assert states(tmp_path) == {"COMPLETE": 4, "FAIL": 1}
    assert not any(count > 1 for count in Counter(config.run_id() for config in child.calls).values())
    dead.tell(one, taken, [Store(tmp_path).named(taken.user_attrs["run_id"])], ("lpips_vgg",))  # it was not dead at all
    assert states(tmp_path) == {"COMPLETE": 4, "FAIL": 1}


def test_deleting_the_database_and_rebuilding_gives_the_same_index(child, tmp_path, capsys):
    child.endings = ["finished", "diverged"]
    start(BETA, tmp_path)
    start(SEARCH, tmp_path, "--trials", "3")

    def contents():
        return {
            name: sorted((t.state.name, sorted(t.params.items()), t.values, t.user_attrs["run_id"]) for t in one.trials)
            for name, one in optuna_studies(tmp_path).items()
        }

    before = contents()
    (tmp_path / "studies" / "optuna.db").unlink()
    assert study_command.rebuild(results=tmp_path) == 0
    assert contents() == before
    assert study_command.rebuild(results=tmp_path) == 0  # and again adds nothing
    assert contents() == before
    child.calls.clear()
    start(SEARCH, tmp_path, "--trials", "3")
    assert not child.calls
    with pytest.raises(UserError, match="no study 'nothing'"):
        study_command.rebuild(("nothing",), results=tmp_path)
    capsys.readouterr()
    study_command.show(tmp_path)
    told = capsys.readouterr().out
    assert "beta-smoke" in told
    name = Store(tmp_path).studies()[-1]
    assert told.splitlines()[-1].endswith(f"python -m bench.report {name} --results {tmp_path}")


def test_a_search_gives_every_backbone_the_same_budget(child, tmp_path):
    assert start(SEARCH, tmp_path, "--trials", "6", "--workers", "2") == 0
    assert Counter(config.backbone for config in child.calls) == {"cnn": 6, "vit": 6}
    for config in child.calls:
        assert 0.1 <= config.beta <= 4
        assert config.codebook_size in (64, 256)
        assert 4 <= config.code_dim <= 32
    assert len({config.beta for config in child.calls}) == 12  # no two workers or backbones draw alike
    child.calls.clear()
    assert start(SEARCH, tmp_path, "--trials", "6") == 0
    assert not child.calls
    assert start(SEARCH, tmp_path, "--trials", "7") == 0
    assert Counter(config.backbone for config in child.calls) == {"cnn": 1, "vit": 1}


def test_a_hopeless_search_trial_is_pruned_and_stays_pruned(child, tmp_path):
    class Pruning(FakeChild):
        def __call__(self, config, store, fid_weights, threads, watch, timeout, track=None, processes=1):
            self.calls.append(config)
            loss = 1.0 if len(self.calls) <= 6 else 100.0
            row = {"step": config.steps - 10, "reconstruction": loss, "perplexity": 9.0}
            if watch([row]) == "pruned":
                fabricate_failed(store, config, "pruned")
                return Outcome("pruned", "hopeless")
            fabricate(store, config)
            return Outcome("finished")

    pruning = Pruning()
    study.run_in_child = pruning  # the fixture puts the real one back
    alone = Search("search", SPACE, backbones=("cnn",))
    assert start(alone, tmp_path, "--trials", "8", "--metric", "lpips_vgg") == 0  # pruned is not failed
    assert states(tmp_path) == {"COMPLETE": 6, "PRUNED": 2}
    assert Counter(run.status for run in Store(tmp_path).runs()) == {"finished": 6, "pruned": 2}


def test_an_ablation_gives_up_no_cell_for_its_curve(child, tmp_path):
    """However much worse than the others it is: its scores are what an ablation is for."""
    said = []

    class Curves(FakeChild):
        def __call__(self, config, store, fid_weights, threads, watch, timeout, track=None, processes=1):
            loss = 1.0 if len(self.calls) < 6 else 100.0
            said.append(watch([{"step": config.steps - 10, "reconstruction": loss, "perplexity": 9.0}]))
            return super().__call__(config, store, fid_weights, threads, lambda rows: None, timeout)

    study.run_in_child = Curves()  # the fixture puts the real one back
    one = Ablation("beta", sweep={"beta": tuple(0.1 * k for k in range(1, 9))}, backbones=("cnn",), seeds=(0,))
    assert start(one, tmp_path) == 0
    assert said == [None] * 8


def test_several_metrics_make_a_search_multi_objective(child, tmp_path):
    alone = Search("search", SPACE, backbones=("cnn",))
    assert start(alone, tmp_path, "--trials", "3", "--metric", "lpips_vgg", "bits_per_image") == 0
    (one,) = optuna_studies(tmp_path).values()
    assert one.metric_names == ["lpips_vgg", "bits_per_image"]
    assert all(len(trial.values) == 2 for trial in one.trials)
    assert start(alone, tmp_path, "--trials", "3", "--metric", "lpips_vgg") == 2  # the same study with another metric


def test_a_search_over_several_seeds_takes_their_mean(child, tmp_path):
    alone = Search("search", SPACE, backbones=("cnn",))
    start(alone, tmp_path, "--trials", "2", "--seeds", "0", "1", "--metric", "lpips_vgg")
    assert Counter(config.seed for config in child.calls) == {0: 2, 1: 2}
    (one,) = optuna_studies(tmp_path).values()
    table = frame(Store(tmp_path).runs())
    means = sorted(table.groupby("beta").lpips_vgg.mean())
    assert sorted(trial.value for trial in one.trials) == pytest.approx(means)


def test_a_searchs_time_is_bounded_per_backbone(child, tmp_path, monkeypatch):
    monkeypatch.setattr(Index, "seconds", lambda self, one: 10.0 * self.ended(one))
    start(SEARCH, tmp_path, "--trials", "9", "--timeout", "25")
    assert Counter(config.backbone for config in child.calls) == {"cnn": 3, "vit": 3}


def test_the_dashboard_has_pictures_metrics_and_names(child, tmp_path):
    start(BETA, tmp_path)
    for one in optuna_studies(tmp_path).values():
        assert one.metric_names == ["lpips_vgg"]
        for trial in one.trials:
            (picture,) = get_all_artifact_meta(trial, storage=one._storage)
            assert (tmp_path / "studies" / "artifacts" / picture.artifact_id).is_file()
            note = one._storage.get_study_system_attrs(one._study_id)
            assert f"/artifacts/{one._study_id}/{trial._trial_id}/{picture.artifact_id}" in json.dumps(note)
            assert trial.user_attrs["psnr"] > 0
            assert trial.value == trial.user_attrs["lpips_vgg"]
            assert trial.intermediate_values
        assert "![plot](/artifacts/" in get_note(one)
        assert [meta.filename for meta in get_all_artifact_meta(one)] == ["plot.png"]
    start(BETA, tmp_path)  # attaches again: replaces
    for one in optuna_studies(tmp_path).values():
        assert len(get_all_artifact_meta(one)) == 1


def test_the_dashboard_has_a_page_on_all_backbones_and_one_on_all_priors(child, tmp_path):
    """With the report's plots, and named by the studies that trials are taken from."""
    assert start(GRIDS, tmp_path, "--backbone", "cnn", "vit", "--seeds", "0", "1") == 0
    found = optuna_studies(tmp_path, overview=True)
    assert {name: len(one.trials) for name, one in found.items()} == {"priors-smoke": 4, "priors-smoke-priors": 8}
    for name, one in found.items():
        assert {trial.user_attrs["n"] for trial in one.trials} == {2}
        assert {trial.params["backbone"] for trial in one.trials} == {"cnn", "vit"}
        assert "![plot](/artifacts/" in get_note(one)
        assert get_note(one).startswith(f"## {name}, all backbones\n")
    for name, one in optuna_studies(tmp_path).items():
        shown = "priors-smoke-priors" if "-prior-" in name else "priors-smoke"
        assert get_note(one).splitlines()[4].endswith(f" are in {shown}.")
        assert all("seed" not in trial.params and trial.user_attrs["seed"] in (0, 1) for trial in one.trials)


@pytest.mark.parametrize("name", STUDIES)
def test_fields_flags_parameters_and_columns_have_the_same_names(name, tmp_path, capsys):
    module = importlib.import_module(f"studies.{name}")
    assert module.STUDY.name == name
    searching = isinstance(module.STUDY, Search)
    swept = module.STUDY.space if searching else module.STUDY.sweep
    assert set(swept) <= set(CONFIG)
    with pytest.raises(SystemExit):
        parse_study(module.STUDY, module.__doc__, ["--help-all"])
    flags = capsys.readouterr().out
    for field in set(CONFIG) - {"seed"} - ({*swept, "split"} if searching else set()):
        assert re.search(rf"--{field.replace('_', '-')}[ ,]", flags), field
    for flag in (
        "--seeds",
        "--workers",
        "--storage",
        "--plan",
        *(("--trials", "--timeout") if searching else ()),
    ):
        assert f"{flag} " in flags
    for field in swept:
        definition.distribution(field)
    assert set(CONFIG) <= set(frame([]).columns)
    assert not set(CONFIG) & set(METRICS)


def test_a_plan_says_what_is_there_and_what_it_costs(child, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(plan, "threads_each", lambda workers: 2)  # as fabricated runs had
    start(BETA, tmp_path, "--backbone", "cnn")
    child.calls.clear()
    capsys.readouterr()
    assert start(BETA, tmp_path, "--seeds", "0", "1", "--plan", "--steps", "150") == 0
    out = capsys.readouterr().out
    rows = {line.split()[0]: line.split() for line in out.splitlines() if line.strip().startswith(("cnn", "vit"))}
    assert rows["cnn"][1:7] == ["2", "×", "2", "2", "0", "2"]
    assert rows["vit"][1:7] == ["2", "×", "2", "0", "0", "4"]
    assert not child.calls
    assert float(rows["cnn"][7]) == pytest.approx(2 * 39 / 60, abs=0.06)  # fabricated runs take 39 s
    assert rows["vit"][7] == "unknown"


def test_the_name_tells_runs_apart_that_may_not_be_mixed(tmp_path):
    def name(*arguments):
        return make_plan(BETA, parse_study(BETA, "", ["--results", str(tmp_path), *arguments])).name

    assert name() == "beta-cpu"
    assert name("--preset", "smoke", "--beta", "0.5", "--seeds", "7", "--device", "cpu") == "beta-smoke"
    assert name("--steps", "300") == name("--steps", "300", "--backbone", "cnn") == "beta-cpu-steps=300"
    folders = {name("--data", f"folder:{tmp_path}/{letter}/images") for letter in "ab"}
    assert len(folders) == 2
    assert all(re.fullmatch("beta-cpu-images-[0-9a-f]{6}", folder) for folder in folders)
    assert name("--match", "params:1M") == "beta-cpu-match=params_1M"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--metric", "beauty"), ["beauty", "lpips_vgg"]),
        (("--workers", "0"), ["workers", "0"]),
        (("--trial-timeout", "-1"), ["trial-timeout", "-1"]),
        (("--beta",), ["--beta", "one value"]),
        (("--grid-size", "3"), ["3"]),
        (("--backbone", "resnet"), ["resnet", "convnext"]),
        (("--data", "/", "--plan"), ["unknown data '/'", "/ is there: write folder:/"]),
        (("--storage", "nonsense"), ["cannot be read", "--storage"]),
        (("--storage", "postgresql+psycopg://me:secret@127.0.0.1:1/x"), ["127.0.0.1", "--storage"]),
        (("--storage", "oracle://me:secret@127.0.0.1:1/x"), ["oracle"]),
    ],
)
def test_mistakes_are_one_sentence_and_cost_nothing(child, tmp_path, capsys, arguments, words):
    assert start(BETA, tmp_path, *arguments) == 2
    err = capsys.readouterr().err
    assert all(word in err for word in words)
    assert "Traceback" not in err
    assert "secret" not in err
    assert not child.calls


def test_importance_finds_what_matters(tmp_path):
    """LPIPS made to follow β alone: β gets nearly all, the seed nearly nothing."""
    store = Store(tmp_path)
    for beta in (0.25, 0.5, 1.0, 2.0):
        for seed in range(3):
            fabricate(store, make_config("cnn", "smoke", beta=beta, seed=seed), quality=0.05 * beta)
    found = importance.importances(frame(store.runs()), "lpips_vgg").set_index("parameter").importance
    assert found.sum() == pytest.approx(1)
    assert found["beta"] > 0.9
    assert importance.importances(frame([]), "lpips_vgg").empty
    assert importance.importances(frame(store.runs()[:3]), "lpips_vgg").empty


def test_all_backbones_by_default():
    assert Ablation("x", {}).backbones == Search("x", {}).backbones == tuple(BACKBONES)


def test_estimates_scale_with_steps(tmp_path):
    store = Store(tmp_path)
    config = make_config("cnn", "smoke", device="cpu", precision="fp32")
    fabricate(store, config)
    known = frame(store.runs())
    seconds = 30 + config.width / 10
    longer = make_config("cnn", "smoke", device="cpu", precision="fp32", steps=300, beta=3.0, seed=9)
    scoring = 5  # which takes as long however long was trained
    assert plan.estimates([config, longer], known, 2) == pytest.approx([seconds + scoring, 2 * seconds + scoring])
    alone = (seconds + scoring) / (plan.SERIAL + (1 - plan.SERIAL) / 2)  # on half as many threads
    assert plan.estimates([config], known, 1) == pytest.approx([alone])
    assert 1.3 < alone / (seconds + scoring) < 2
    single = known.assign(threads=1, train_seconds=60.0, score_seconds=7.0)
    assert plan.estimates([config], pd.concat([known, single]), 1) == pytest.approx([67.0])  # as those on one took
    other = make_config("vit", "smoke", device="cpu", precision="fp32", width=16, depth=1, lpips_weight=0.0)
    assert plan.estimates([other], known, 2) == [None]


def test_a_rebuilt_search_goes_on(child, tmp_path):
    """The rebuilt trials must have the distributions that the search samples from."""
    start(SEARCH, tmp_path, "--trials", "3")
    (tmp_path / "studies" / "optuna.db").unlink()
    study_command.rebuild(results=tmp_path)
    child.calls.clear()
    assert start(SEARCH, tmp_path, "--trials", "5") == 0
    assert Counter(config.backbone for config in child.calls) == {"cnn": 2, "vit": 2}
    assert states(tmp_path) == {"COMPLETE": 10}


def test_no_two_trials_of_a_search_draw_alike_whenever_they_are_started(child, tmp_path, monkeypatch):
    monkeypatch.setattr(Index, "seconds", lambda self, one: 10.0 * self.ended(one))
    for timeout in ("25", "55", "999"):  # stopped twice, by time
        start(SEARCH, tmp_path, "--trials", "8", "--timeout", timeout)
    assert len(child.calls) == len({config.run_id() for config in child.calls}) == 16


@pytest.mark.parametrize("metric", ["lpips_vgg", "psnr"])
def test_pruning_hits_the_worse_loss_whichever_way_the_metric_goes(child, tmp_path, monkeypatch, metric):
    losses = [1.0] * 6 + [0.01, 100.0]

    class Pruning(FakeChild):
        def __call__(self, config, store, fid_weights, threads, watch, timeout, track=None, processes=1):
            loss = losses[len(self.calls)]
            self.calls.append(config)
            row = {"step": config.steps - 10, "reconstruction": loss, "perplexity": 9.0}
            if watch([row]) == "pruned":
                self.endings.append(loss)
                fabricate_failed(store, config, "pruned")
                return Outcome("pruned", "hopeless")
            fabricate(store, config)
            return Outcome("finished")

    pruning = Pruning()
    monkeypatch.setattr(study, "run_in_child", pruning)
    start(Search("search", SPACE, backbones=("cnn",)), tmp_path, "--trials", "8", "--metric", metric)
    assert pruning.endings == [100.0]


def test_a_run_that_a_search_pruned_is_no_cell_of_an_ablation(child, tmp_path):
    fabricate_failed(Store(tmp_path), make_config("cnn", "smoke", beta=0.25, device="cpu"), "pruned")
    assert start(BETA, tmp_path) == 0
    assert len(child.calls) == 4


def test_a_worker_that_dies_before_its_first_heartbeat_is_noticed(child, tmp_path, monkeypatch):
    monkeypatch.setattr(index, "HEARTBEAT_SECONDS", 1)
    monkeypatch.setattr(index, "GRACE_SECONDS", 1)
    what = planned(tmp_path)
    dead = Index(default_url(tmp_path), tmp_path / "studies")
    part = what.tokenizers()[0]
    what.fill(part, dead)
    assert dead.claim(part.open(dead), set()) is not None  # and not a beat more
    assert start(BETA, tmp_path) == 0
    assert states(tmp_path) == {"COMPLETE": 4, "FAIL": 1}


def test_a_crash_whose_retry_was_interrupted_is_tried_again(child, tmp_path, monkeypatch):
    one = Ablation("beta", sweep={"beta": (0.25,)}, backbones=("cnn",), seeds=(0,))
    seen = []
    original = study.Workers.run

    def run(self):
        seen.append(self)
        original(self)

    class Stopping(FakeChild):
        def __call__(self, *arguments):
            outcome = super().__call__(*arguments)
            seen[-1].stop.set()
            return outcome

    with monkeypatch.context() as patch:
        patch.setattr(study.Workers, "run", run)
        patch.setattr(study, "run_in_child", Stopping(["crashed"]))
        assert start(one, tmp_path) == 130
    assert start(one, tmp_path) == 0
    assert len(child.calls) == 1


def test_what_lies_about_in_the_results_folder_disturbs_nothing(child, tmp_path, capsys):
    start(BETA, tmp_path)
    (tmp_path / "studies" / ".beta-smoke-x1.json").write_text("")  # left by a kill in the middle of a write
    for name, text in (("alien", "{}"), ("torn", ""), ("other", "[1]")):
        (tmp_path / "runs" / name).mkdir()
        (tmp_path / "runs" / name / "config.json").write_text(text)
    assert study_command.show(tmp_path) == 0
    assert study_command.rebuild(results=tmp_path) == 0
    assert len(frame(Store(tmp_path).runs())) == 4
    assert start(BETA, tmp_path, "--plan") == 0
    run = Store(tmp_path).runs()[0]
    (run.folder / "per_image.npz").write_bytes(b"PK torn")
    assert run.per_image() == {}
    with pytest.raises(UserError, match="no studies in"):
        study_command.rebuild(results=tmp_path / "typo")


def test_a_full_disk_ends_the_command_and_is_nobodys_failure(child, tmp_path, capsys):
    child.endings = ["finished", "blocked"]
    assert start(BETA, tmp_path) == 2
    assert "it blocked" in capsys.readouterr().err
    assert Counter(run.status for run in Store(tmp_path).runs())["blocked"] == 0


def test_seeds_and_metrics_that_would_be_mixed_are_not(child, tmp_path):
    alone = Search("search", SPACE, backbones=("cnn",))
    start(alone, tmp_path, "--trials", "1")
    start(alone, tmp_path, "--trials", "1", "--seeds", "0", "1")
    assert len(optuna_studies(tmp_path)) == 2
    assert start(alone, tmp_path, "--match", "time:60s") == 2
    assert start(BETA, tmp_path, "--metric", "params") == 0
    assert start(BETA, tmp_path, "--metric", "peak_memory_mb") == 2


def test_fields_without_a_default_may_be_searched(child, tmp_path):
    wide = Search("wide", {"width": Range(8, 16), "augment": ("none", "flip")}, backbones=("cnn",))
    assert start(wide, tmp_path, "--trials", "2") == 0
    assert all(8 <= config.width <= 16 for config in child.calls)


def test_a_worker_takes_from_the_backbone_that_has_had_fewest(child, tmp_path):
    """However far a study comes, its backbones come equally far."""
    assert start(BETA, tmp_path, "--beta", "0.25", "--seeds", "0", "1") == 0
    assert [(config.backbone, config.seed) for config in child.calls] == [
        ("cnn", 0),
        ("vit", 0),
        ("cnn", 1),
        ("vit", 1),
    ]


def test_of_backbones_that_have_had_as_many_the_slowest_is_next(tmp_path, monkeypatch):
    """So that in the end no worker is left with a long trial while others have none."""
    now = [0.0]
    monkeypatch.setattr(study.time, "monotonic", lambda: now[0])

    class Slow(FakeChild):
        def __call__(self, config, *rest):
            now[0] += {"cnn": 10, "vit": 30}[config.backbone]
            return super().__call__(config, *rest)

    monkeypatch.setattr(study, "run_in_child", slow := Slow())
    assert start(BETA, tmp_path, "--beta", "0.25", "--seeds", "0", "1", "2") == 0
    assert [config.backbone for config in slow.calls] == ["cnn", "vit", "vit", "cnn", "vit", "cnn"]


@pytest.mark.parametrize(("workers", "threads"), [(1, None), (3, 2)])
def test_workers_share_the_cores(child, tmp_path, monkeypatch, workers, threads):
    found = []

    class Counting(FakeChild):
        def __call__(self, config, store, fid_weights, threads, watch, timeout, track=None, processes=1):
            found.append((threads, timeout))
            return super().__call__(config, store, fid_weights, threads, watch, timeout)

    monkeypatch.setattr(study, "run_in_child", Counting())
    monkeypatch.setattr(plan.os, "cpu_count", lambda: 8)
    one = Ablation("one", sweep={"beta": (0.25,)}, backbones=("cnn",), seeds=(0,), priors=("independent",))
    assert start(one, tmp_path, "--workers", str(workers), "--trial-timeout", "77") == 0
    assert found == [(threads, 77.0)] * 2  # a tokenizer and a prior


def test_several_processes_of_a_trial_share_its_threads(child, tmp_path, monkeypatch):
    found = []

    class Counting(FakeChild):
        def __call__(self, config, store, fid_weights, threads, watch, timeout, track=None, processes=1):
            found.append((threads, processes))
            return super().__call__(config, store, fid_weights, threads, watch, timeout)

    monkeypatch.setattr(study, "run_in_child", Counting())
    monkeypatch.setattr(plan.os, "cpu_count", lambda: 8)
    one = Ablation("one", sweep={"beta": (0.25,)}, backbones=("cnn",), seeds=(0,))
    assert start(one, tmp_path, "--workers", "2", "--processes", "2") == 0
    assert found == [(2, 2)]


def test_no_further_seed_is_run_of_a_search_trial_that_failed(child, tmp_path, monkeypatch):
    """And the pruner sees the curve of the first seed alone."""

    class Curves(FakeChild):
        def __call__(self, config, store, fid_weights, threads, watch, timeout, track=None, processes=1):
            watch([{"step": config.steps - 10 * (1 + config.seed), "reconstruction": 5.0, "perplexity": 9.0}])
            return super().__call__(config, store, fid_weights, threads, watch, timeout)

    curves = Curves(["diverged", "finished", "finished"])
    monkeypatch.setattr(study, "run_in_child", curves)
    alone = Search("search", SPACE, backbones=("cnn",))
    assert start(alone, tmp_path, "--trials", "2", "--seeds", "0", "1", "--metric", "lpips_vgg") == 1
    assert [config.seed for config in curves.calls] == [0, 0, 1]
    (one,) = optuna_studies(tmp_path).values()
    assert [trial.state.name for trial in one.trials] == ["FAIL", "COMPLETE"]
    assert [trial.intermediate_values for trial in one.trials] == [{curves.calls[0].steps - 10: 5.0}] * 2


def test_trials_of_a_search_that_wait_are_not_enqueued_again(child, tmp_path):
    """However often it is planned: waiting ones are part of its budget."""
    words = ["--preset", "smoke", "--device", "cpu", "--results", str(tmp_path), "--trials", "3"]
    what, one = make_plan(SEARCH, parse_study(SEARCH, "", words)), Index(default_url(tmp_path), tmp_path / "studies")
    assert [what.fill(what.tokenizers()[0], one) for _ in range(2)] == [3, 3]
    assert states(tmp_path) == {"WAITING": 3}


def test_a_search_trial_that_another_worker_runs_is_part_of_the_budget(child, tmp_path):
    """Where more trials wait than are now asked for, none is begun beyond those."""
    words = ["--preset", "smoke", "--device", "cpu", "--results", str(tmp_path), "--trials"]
    more, fewer = (make_plan(SEARCH, parse_study(SEARCH, "", [*words, count])) for count in ("3", "1"))
    one, part = Index(default_url(tmp_path), tmp_path / "studies"), fewer.tokenizers()[0]
    more.fill(part, one)
    opened = part.open(one)
    assert one.claim(opened, set()) is not None
    assert not study.Workers(fewer, one, [part], 1)._take(part, opened)
    assert states(tmp_path) == {"RUNNING": 1, "WAITING": 2}


def test_a_busy_run_is_waited_for_and_then_adopted(child, tmp_path):
    """Its worker was taken for dead and was not: no attempt is counted, and what it finished is taken over."""
    one = Ablation("beta", sweep={"beta": (0.25,)}, backbones=("cnn",), seeds=(0,))

    class Busy(FakeChild):
        def __call__(self, config, store, fid_weights, threads, watch, timeout, track=None, processes=1):
            self.calls.append(config)
            if len(self.calls) < 5:
                return Outcome("busy")
            fabricate(store, config)
            return Outcome("finished")

    busy = Busy()
    study.run_in_child = busy  # the fixture puts the real one back
    assert start(one, tmp_path) == 0
    assert len(busy.calls) == 5
    assert states(tmp_path) == {"COMPLETE": 1}


def test_a_study_ends_with_1_as_long_as_a_planned_run_has_no_scores(child, tmp_path):
    child.endings = ["finished", "diverged"]
    assert start(BETA, tmp_path) == 1
    assert start(BETA, tmp_path, "--plan") == 0
    child.endings = []
    assert start(BETA, tmp_path, "--retry-failed") == 0


def test_a_study_that_is_extended_keeps_what_it_lists(child, tmp_path):
    """Its file lists every run with its backbone and values, those of earlier commands included."""
    start(BETA, tmp_path, "--beta", "0.25")
    start(BETA, tmp_path, "--backbone", "vit", "--beta", "4.0", "--seeds", "1")
    record = Store(tmp_path).study("beta-smoke")
    rows = sorted((row["backbone"], row["beta"], row["seed"]) for row in record["runs"].values())
    assert rows == [("cnn", 0.25, 0), ("vit", 0.25, 0), ("vit", 4.0, 1)]
    for run_id, row in record["runs"].items():
        config = Store(tmp_path).named(run_id).config()
        assert {name: config[name] for name in row} == row
    assert (record["kind"], record["sweep"], record["metrics"]) == ("ablation", ["beta"], ["lpips_vgg"])


def test_a_trials_line_tells_its_values_and_its_scores(child, tmp_path, capsys):
    """The metrics that were asked for before PSNR and perplexity, or why there are none."""
    child.endings = ["finished", "diverged"]
    one = Ablation("beta", sweep={"beta": (0.25, 1.0)}, backbones=("cnn",), seeds=(0,))
    assert start(one, tmp_path, "--metric", "ssim", "fid_vgg16") == 1
    shown = " ".join(capsys.readouterr().err.split())
    (run,) = [run for run in Store(tmp_path).runs() if run.finished]
    scores = [
        f"{METRICS[m].label} {run.metrics()[m]:{METRICS[m].form}}" for m in ("ssim", "fid_vgg16", "psnr", "perplexity")
    ]
    assert f"1/2 cnn beta=0.25 seed=0: {', '.join(scores)} (" in shown
    assert "2/2 cnn beta=1 seed=0: diverged: it diverged" in shown


def test_the_bar_of_a_study_counts_the_trials_that_ended(child, tmp_path, monkeypatch):
    totals, bars = [], []

    class Bar(study.Bar):
        def __init__(self, label, total, *rest, **options):
            super().__init__(label, total, *rest, **options)
            totals.append(total)
            bars.append(self)

    monkeypatch.setattr(study, "Bar", Bar)
    assert start(BETA, tmp_path, "--steps", "50") == 0
    assert totals == [4]
    assert [bar.done for bar in bars] == [4]


def test_what_is_left_of_a_study_is_told_by_the_trials_that_ended(tmp_path, monkeypatch):
    """Not by steps, which scoring has none of; and not before one has ended."""
    made = planned(tmp_path, "--workers", "2")
    crew = study.Workers(made, None, made.tokenizers(), 10)
    monkeypatch.setattr(study, "time", SimpleNamespace(monotonic=lambda: 100.0))
    assert crew._left() is None
    crew.done, crew.seconds, crew.begun = 2, [30.0, 50.0], {"a": 90.0, "b": 20.0}
    assert crew._left() == pytest.approx((8 * 40 - 10 - 40) / 2)
    crew.done, crew.begun = 10, {}
    assert crew._left() == 0


def test_rebuild_takes_what_is_named_and_writes_where_it_is_told(child, tmp_path, capsys):
    """The other studies of the folder stay out of the database; without names all are rebuilt."""
    other = Ablation("other", sweep={"beta": (0.5,)}, backbones=("cnn",), seeds=(0,))
    child.endings = ["finished", "diverged"]
    start(BETA, tmp_path)
    start(other, tmp_path)
    elsewhere = f"sqlite:///{tmp_path / 'elsewhere.db'}"
    assert study_command.rebuild(("beta-smoke",), tmp_path, elsewhere) == 0
    assert sorted(optuna.get_all_study_names(elsewhere)) == ["beta-smoke", "beta-smoke-cnn", "beta-smoke-vit"]
    ended = [trial.state.name for trial in optuna.load_study(study_name="beta-smoke-vit", storage=elsewhere).trials]
    assert sorted(ended) == ["COMPLETE", "FAIL"]  # failures are on file, too
    assert study_command.rebuild(results=tmp_path, storage=elsewhere) == 0
    assert "other-smoke-cnn" in optuna.get_all_study_names(elsewhere)
    err = " ".join(capsys.readouterr().err.split())
    assert "study beta-smoke: 4 trials added" in err
    assert "study beta-smoke: 0 trials added" in err


def test_the_list_counts_the_runs_of_each_study_by_how_they_ended(child, tmp_path, capsys):
    other = Ablation("other", sweep={"beta": (0.5,)}, backbones=("vit",), seeds=(0,))
    child.endings = ["finished", "diverged"]
    start(BETA, tmp_path)
    start(other, tmp_path)
    capsys.readouterr()
    study_command.show(tmp_path)
    lines = {line.split()[0]: " ".join(line.split()) for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert lines["beta-smoke"] == "beta-smoke ablation beta cnn, vit 3 finished, 1 diverged"
    assert lines["other-smoke"] == "other-smoke ablation beta vit 1 finished"
    Store(tmp_path).extend_study(longest := "a-study-" * 20, {"kind": "ablation", "sweep": [], "metrics": ["psnr"]}, {})
    study_command.show(tmp_path)
    assert longest in capsys.readouterr().out.split()  # in one piece, where a program reads it


def test_an_unknown_command_is_told_with_those_that_there_are(capsys):
    assert study_command.run(["lst"]) == 2
    assert capsys.readouterr().err == "error: unknown command 'lst'; choose from list, rebuild\n"


# -- priors -----------------------------------------------------------------------------------------------------------

GRIDS = Ablation("priors", sweep={"grid_size": (4, 8)}, backbones=("cnn",), seeds=(0,), priors=("rnn", "independent"))


def test_priors_follow_their_tokenizers_once_each(child, tmp_path, capsys):
    assert start(GRIDS, tmp_path, "--workers", "2", "--prior-steps", "77") == 0
    kinds = [type(config).__name__ for config in child.calls]
    assert kinds == ["Config"] * 2 + ["PriorConfig"] * 4
    made = Counter((config.tokenizer, config.prior) for config in child.calls[2:])
    tokenizers = [run.folder.name for run in Store(tmp_path).runs()]
    assert made == {(name, prior): 1 for name in tokenizers for prior in GRIDS.priors}
    assert {config.steps for config in child.calls if getattr(config, "prior", "") == "rnn"} == {77}
    assert "nothing to do" not in capsys.readouterr().err
    assert start(GRIDS, tmp_path, "--prior-steps", "77") == 0
    assert len(child.calls) == 6
    assert "nothing to do" in capsys.readouterr().err
    assert start(GRIDS, tmp_path, "--prior-steps", "77", "--plan") == 0
    assert "priors, not in these minutes: 4 of 4 finished" in " ".join(capsys.readouterr().out.split())
    assert start(GRIDS, tmp_path, "--prior-steps", "77", "--prior", "mamba") == 0
    assert len(child.calls) == 8
    assert "nothing to do" not in capsys.readouterr().err  # though every tokenizer was there


def test_a_failed_prior_is_told_and_stops_nothing(child, tmp_path, capsys):
    child.endings = ["finished", "finished", "diverged"]
    assert start(GRIDS, tmp_path) == 1
    assert Counter(run.status for run in Store(tmp_path).priors()) == {"finished": 3, "diverged": 1}
    assert "diverged: it diverged" in " ".join(capsys.readouterr().err.split())
    assert start(GRIDS, tmp_path) == 1
    assert len(child.calls) == 6
    assert start(GRIDS, tmp_path, "--retry-failed") == 0
    assert len(child.calls) == 7


def test_what_fails_again_is_retried_once_by_a_command(child, tmp_path):
    """A tokenizer and a prior alike."""
    one = Ablation("one", sweep={"beta": (0.25, 1.0)}, backbones=("cnn",), seeds=(0,), priors=("rnn",))
    child.endings = ["diverged", "finished", "diverged"]
    assert start(one, tmp_path) == 1
    child.calls.clear()
    child.endings = ["diverged", "diverged"]
    assert start(one, tmp_path, "--retry-failed") == 1
    assert [type(config).__name__ for config in child.calls] == ["Config", "PriorConfig"]


def test_interrupted_priors_go_on(child, tmp_path, capsys):
    """And only those count as done that ended."""
    child.endings = ["finished", "finished", "finished", "interrupted"]

    class Stop(threading.Event):
        def is_set(self):
            return len(child.calls) > 3

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "interruptible", lambda: contextlib.nullcontext(Stop()))
        assert start(GRIDS, tmp_path) == 130
    assert "stopped after 1 of 4 priors" in " ".join(capsys.readouterr().err.split())
    assert start(GRIDS, tmp_path) == 0
    assert all(run.finished for run in Store(tmp_path).priors())


def test_a_prior_that_another_command_has_is_waited_for(child, tmp_path):
    """However long that takes: no attempt is counted."""
    child.endings = ["finished", "finished", *["busy"] * 5]

    class Busy(FakeChild):
        def __call__(self, config, *rest):
            outcome = super().__call__(config, *rest)
            if outcome.status == "busy":
                Store(tmp_path).run(config).forgive()  # a busy run is not recorded as failed
            return outcome

    study.run_in_child = Busy(child.endings)  # the fixture puts the real one back
    assert start(GRIDS, tmp_path) == 0
    assert all(run.finished for run in Store(tmp_path).priors())
    assert len(study.run_in_child.calls) == 2 + 4 + 5


def test_a_prior_whose_folder_cannot_be_written_ends_the_command(child, tmp_path, capsys):
    """With the reason, and nothing is recorded against the prior."""
    child.endings = ["finished", "finished", "blocked"]
    assert start(GRIDS, tmp_path) == 2
    assert "error: it blocked" in " ".join(capsys.readouterr().err.split())
    assert not any(run.reason for run in Store(tmp_path).priors())


def prior_trials(tmp_path) -> dict[str, list[optuna.trial.FrozenTrial]]:
    """Prior → trials of its Optuna study."""
    found = optuna_studies(tmp_path)
    return {prior: found[f"priors-smoke-prior-{prior}"].trials for prior in GRIDS.priors}


def test_priors_are_trials_in_the_dashboard(child, tmp_path):
    """With their tokenizer's settings as parameters, their score, curve and metrics, and how they ended."""
    child.endings = ["finished", "finished", "diverged"]
    assert start(GRIDS, tmp_path) == 1
    assert start(GRIDS, tmp_path, "--retry-failed") == 0  # in a dashboard that is there already
    store, found = Store(tmp_path), prior_trials(tmp_path)
    assert sorted(trial.state.name for trials in found.values() for trial in trials) == ["COMPLETE"] * 4 + ["FAIL"]
    (failed,) = [trial for trials in found.values() for trial in trials if trial.state.name == "FAIL"]
    assert (failed.user_attrs["status"], failed.user_attrs["reason"]) == ("diverged", "it diverged")
    for prior, trials in found.items():
        one = optuna_studies(tmp_path)[f"priors-smoke-prior-{prior}"]
        assert one.metric_names == ["coded_bits_per_token"]
        assert one.direction == optuna.study.StudyDirection.MINIMIZE
        assert "![plot](/artifacts/" in get_note(one)
        for trial in trials:
            run = store.named(trial.user_attrs["run_id"], "priors")
            assert run.config()["prior"] == prior
            if trial.state.name == "COMPLETE":
                grid = run.tokenizer()["grid_size"]
                assert (trial.params, trial.user_attrs["seed"]) == ({"backbone": "cnn", "grid_size": grid}, 0)
                assert trial.value == run.metrics()["coded_bits_per_token"] == 5.0
                assert trial.user_attrs["gfid_vgg16"] == 100.0
                assert list(trial.intermediate_values.values()) == [7.0]
                assert "gFID vgg16" in json.dumps(one._storage.get_study_system_attrs(one._study_id))


def test_a_priors_trial_shows_its_samples(child, tmp_path):
    class Pictures(FakeChild):
        def __call__(self, config, store, *rest):
            outcome = super().__call__(config, store, *rest)
            (store.run(config).folder / "samples.png").write_bytes(b"a picture")
            return outcome

    study.run_in_child = Pictures()  # the fixture puts the real one back
    assert start(GRIDS, tmp_path, "--grid-size", "4") == 0
    for prior, trials in prior_trials(tmp_path).items():
        one = optuna_studies(tmp_path)[f"priors-smoke-prior-{prior}"]
        pictures = [meta.filename for trial in trials for meta in get_all_artifact_meta(trial, storage=one._storage)]
        assert pictures == ["samples.png"]


def test_rebuild_brings_priors_back(child, tmp_path):
    """As trials of the same parameters, values and states; a study from before they were listed is read as it is."""
    child.endings = ["finished", "finished", "finished", "diverged"]
    start(GRIDS, tmp_path)

    def contents():
        return {
            prior: sorted((t.state.name, sorted(t.params.items()), t.values, t.user_attrs["run_id"]) for t in trials)
            for prior, trials in prior_trials(tmp_path).items()
        }

    before, path = contents(), tmp_path / "studies" / "priors-smoke.json"
    (tmp_path / "studies" / "optuna.db").unlink()
    for _ in range(2):  # the second time adds nothing
        assert study_command.rebuild(results=tmp_path) == 0
        assert contents() == before
    record = json.loads(path.read_text())
    rows = sorted((row["prior"], row["backbone"], row["grid_size"], row["seed"]) for row in record["priors"].values())
    assert rows == [(prior, "cnn", grid, 0) for prior in sorted(GRIDS.priors) for grid in (4, 8)]
    del record["priors"], record["sha256"]
    path.write_text(json.dumps(record))
    (tmp_path / "studies" / "optuna.db").unlink()
    assert study_command.rebuild(results=tmp_path) == 0
    assert set(optuna_studies(tmp_path)) == {"priors-smoke-cnn"}
    calls = len(child.calls)
    assert start(GRIDS, tmp_path) == 1  # which finds its priors again
    assert len(child.calls) == calls
    assert contents() == before


def test_priors_that_the_store_has_finished_are_adopted(child, tmp_path):
    """As what bench.prior trained is."""
    assert start(GRIDS, tmp_path, "--prior", "rnn") == 0
    (tmp_path / "studies" / "optuna.db").unlink()
    child.calls.clear()
    assert start(GRIDS, tmp_path) == 0
    assert {config.prior for config in child.calls} == {"independent"}
    assert {prior: len(trials) for prior, trials in prior_trials(tmp_path).items()} == {"rnn": 2, "independent": 2}
    assert states(tmp_path) == {"COMPLETE": 6}


def test_commands_share_the_priors_without_training_any_twice(child, tmp_path):
    arguments = ("--seeds", "0", "1", "--workers", "2")
    commands = [threading.Thread(target=start, args=(GRIDS, tmp_path, *arguments)) for _ in range(2)]
    for command in commands:
        command.start()
    for command in commands:
        command.join()
    assert max(Counter(config.run_id() for config in child.calls).values()) == 1
    assert states(tmp_path) == {"COMPLETE": 4 + 8}


def test_a_dead_workers_prior_comes_back(child, tmp_path, monkeypatch):
    monkeypatch.setattr(index, "HEARTBEAT_SECONDS", 1)
    monkeypatch.setattr(index, "GRACE_SECONDS", 1)
    assert start(GRIDS, tmp_path, "--prior", "rnn") == 0
    words = ["--preset", "smoke", "--device", "cpu", "--results", str(tmp_path)]
    what, dead = make_plan(GRIDS, parse_study(GRIDS, "", words)), Index(default_url(tmp_path), tmp_path / "studies")
    (part,) = [part for part in what.followers() if part.label == "independent"]
    assert what.fill(part, dead) == 2
    assert dead.claim(part.open(dead), set()) is not None
    assert start(GRIDS, tmp_path) == 0
    assert all(run.finished for run in Store(tmp_path).priors())
    assert Counter(trial.state.name for trial in prior_trials(tmp_path)["independent"]) == {"COMPLETE": 2, "FAIL": 1}


def test_a_prior_is_tried_again_as_often_as_a_tokenizer_and_told_alike(child, tmp_path, capsys):
    child.endings = ["finished", "finished", "crashed", "crashed", "finished", "out_of_memory", "out_of_memory"]
    assert start(GRIDS, tmp_path) == 1
    assert len(child.calls) == 2 + 3 + 2 + 2
    shown = " ".join(capsys.readouterr().err.split())
    assert "4 priors to run" in shown
    assert "rnn backbone=cnn grid_size=4 seed=0: crashed, it crashed; attempt 2 follows" in shown
    assert "1/4 rnn backbone=cnn grid_size=4 seed=0: bits per token 5.000, gFID vgg16 100.0 (" in shown


def test_a_prior_over_a_model_of_timm_is_a_trial_of_its_own(child, tmp_path):
    """Though its parameters in the dashboard are those of another model's."""
    names = ("timm:resnet18", "timm:resnet34")
    one = Ablation("priors", sweep={"grid_size": (4,)}, backbones=names, seeds=(0,), priors=("rnn",))
    assert start(one, tmp_path) == 0
    (tmp_path / "studies" / "optuna.db").unlink()
    assert study_command.rebuild(results=tmp_path) == 0
    trials = optuna_studies(tmp_path)["priors-smoke-prior-rnn"].trials
    assert [trial.params["backbone"] for trial in trials] == ["timm", "timm"]
    assert len({trial.user_attrs["run_id"] for trial in trials}) == 2


def test_the_line_of_the_bar_names_the_trials_under_way_and_no_others(tmp_path):
    """The latest figures last, and which trial of how many it is."""
    plan = planned(tmp_path)
    told = []
    workers = study.Workers(plan, None, plan.tokenizers(), 2)
    workers.bar = SimpleNamespace(done=0, advance=lambda count, text: told.append(text))
    workers._advance("a", "a: 1/50")
    workers._advance("b", "b: 1/50")
    workers._advance("a", "a: 2/50")
    workers.done = 1
    workers._advance("a")
    workers.done = 2
    workers._advance("b")
    assert told == [
        "a: 1/50",
        "a: 1/50 | b: 1/50",
        "b: 1/50 | a: 2/50",
        "b: 1/50",
        "",
    ]


def test_a_study_s_report_is_of_it_alone_and_says_what_mattered(child, tmp_path, monkeypatch):
    asked = []
    write = lambda *given, **more: asked.append((given, more)) or Written(tmp_path)  # noqa: E731
    monkeypatch.setattr("bench.analysis.report.write_report", write)
    assert start(BETA, tmp_path, "--backbone", "cnn") == 0
    (name,) = Store(tmp_path).studies()
    assert asked == [(([name], tmp_path), {"importances": study.importances})]


# -- one command ------------------------------------------------------------------------------------------------------


def workers_of(what: Plan, index=None) -> study.Workers:
    """Those of the plan's tokenizers, with a bar that keeps its lines in ``told``."""
    workers = study.Workers(what, index, what.tokenizers(), 2)
    workers.told, workers.stop = [], threading.Event()
    workers.bar = SimpleNamespace(done=0, advance=lambda count, text: workers.told.append(text))
    return workers


def test_data_and_weights_are_prepared_for_every_backbone_before_anything_runs(child, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(study, "prepare", lambda *given: asked.append(given))
    monkeypatch.setattr(study, "Index", Mock(side_effect=UserError("so far, and no further")))
    assert start(BETA, tmp_path, "--fid-weights", str(tmp_path / "inception.pth")) == 2
    assert [(config.backbone, store.root, weights) for config, store, weights in asked] == [
        (name, tmp_path, tmp_path / "inception.pth") for name in ("cnn", "vit")
    ]


def test_a_study_says_what_it_does_where_it_is_indexed_and_how_its_own_runs_ended(child, tmp_path, capsys, monkeypatch):
    """Runs of other studies that lie beside them are not its; its report is named in the dashboard."""
    monkeypatch.setattr(study, "which", lambda name: None)
    url = f"sqlite:///{tmp_path / 'else where.db'}"
    fabricate(Store(tmp_path), make_config("cnn", "smoke", beta=7.0, device="cpu"))
    child.endings = ["diverged"]
    assert start(BETA, tmp_path, "--beta", "0.25", "--storage", url, "--workers", "3") == 1
    shown = " ".join(capsys.readouterr().err.split())
    assert "study beta-smoke: 2 trials to run, 3 at a time" in shown
    assert "study beta-smoke: 1 diverged, 1 finished" in shown or "study beta-smoke: 1 finished, 1 diverged" in shown
    program, *words = shlex.split(shown.partition("dashboard: ")[2])
    assert Path(program).absolute() == Path(sys.executable).with_name("optuna-dashboard")
    assert words == [url, "--artifact-dir", f"{tmp_path}/studies/artifacts"]
    assert not (tmp_path / "studies" / "optuna.db").exists()
    for backbone in ("cnn", "vit"):
        note = get_note(optuna.load_study(study_name=f"beta-smoke-{backbone}", storage=url)).splitlines()
        assert note[:3] == [f"## beta-smoke, {backbone}", "", f"Report: `{tmp_path}/report.html`"]


def test_the_page_on_all_backbones_is_there_while_a_study_runs(child, tmp_path, monkeypatch):
    """Written now and then, and not after every trial; nor where another command plans, which nobody waits for."""
    written, seen = [], []
    write = study.overview.write
    monkeypatch.setattr(study.overview, "write", lambda *all: written.append(1) or write(*all))

    class Looking(FakeChild):
        def __call__(self, *arguments):
            found = optuna_studies(tmp_path, overview=True)
            seen.append(Counter(trial.state.name for one in found.values() for trial in one.trials))
            return super().__call__(*arguments)

    study.run_in_child = Looking()  # the fixture puts the real one back
    assert start(BETA, tmp_path) == 0
    assert seen == [{}, *[{"COMPLETE": 1, "WAITING": 3}] * 3]
    assert len(written) == 2  # after the first trial, and in the end
    index, other = (Index(default_url(tmp_path), tmp_path / "studies") for _ in range(2))
    crew = workers_of(planned(tmp_path), index)
    planner = threading.Thread(target=other.planning.acquire)
    planner.start(), planner.join()
    crew._show()
    other.planning.release(force=True)
    assert len(written) == 2
    crew.shown_after = 0.0
    crew._show()
    assert len(written) == 3


def nexts(err: str) -> list[list[str]]:
    return [shlex.split(line.removeprefix("next: ")) for line in err.splitlines() if line.startswith("next: ")]


def test_a_study_ends_with_the_best_mean_and_commands_that_go_on(child, tmp_path, monkeypatch, capsys):
    """FakeChild's runs are the better the larger β is; a second command has one more seed, and nothing else."""
    monkeypatch.setattr(arguments, "undecided", lambda metrics, history: [])
    assert start(BETA, tmp_path, "--seeds", "0", "1") == 0
    err = capsys.readouterr().err
    (best,) = [line for line in err.splitlines() if line.startswith("best of ")]
    assert re.fullmatch(r"best of 4: backbone=(cnn|vit) beta=1, LPIPS vgg 0\.\d+ ± 0\.\d+, the mean of 2 seeds", best)
    more, prior = nexts(err)
    assert more[1:3] == ["-m", "studies.beta"]
    assert more[-4:] == ["--seeds", "0", "1", "2"]
    child.calls.clear()
    assert study.main(BETA, "", more[3:]) == 0
    assert {config.seed for config in child.calls} == {2}
    assert prior[1:3] == ["-m", "bench.prior"]
    assert Store(tmp_path).find(prior[3]).config()["beta"] == 1.0


def test_what_should_be_trained_for_longer_is_trained_for_longer_next(child, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(arguments, "undecided", lambda metrics, history: ["12.0 dB below k-means at the same bits"])
    assert start(BETA, tmp_path) == 0
    longer = nexts(capsys.readouterr().err)[0]
    assert longer[-2:] == ["--steps", str(2 * make_config("cnn", "smoke").steps)]
    plan = planned(tmp_path, "--match", "time:60s")
    assert plan.options.timed
    assert "--steps" not in study.next_commands(plan, [], [])[0]


def test_what_failed_is_to_be_tried_again_first(child, tmp_path, capsys):
    child.endings = ["diverged"]
    assert start(BETA, tmp_path) == 1
    again = nexts(capsys.readouterr().err)[0]
    assert again[-1] == "--retry-failed"
    assert study.main(BETA, "", again[3:]) == 0
    assert "one seed, an observation and no verdict" in capsys.readouterr().err


def test_a_search_at_one_rate_is_to_be_confirmed_and_other_rates_have_no_best(child, tmp_path, capsys):
    words = ("--trials", "2", "--bits-per-image", "112")
    assert start(SEARCH, tmp_path, *words) == 0
    confirm = nexts(capsys.readouterr().err)[0]
    assert confirm[-2:] == ["--confirm", "3"]
    assert study.main(SEARCH, "", confirm[3:]) == 0
    assert not any("--confirm" in words for words in nexts(capsys.readouterr().err))
    assert start(SEARCH, tmp_path, "--trials", "2") == 0  # the front of rate and distortion
    err = capsys.readouterr().err
    assert "best of" not in err
    assert nexts(err) == []


def test_a_password_on_the_command_line_is_not_in_the_next_one(child, tmp_path):
    url = "postgresql+psycopg://me:secret@host/x"
    what = planned(tmp_path, "--storage", url)
    assert study.next_commands(what, [], ["--storage", url]) == []
    assert study.next_commands(planned(tmp_path), [], ["--preset", "smoke"]) != []


def test_a_command_takes_its_arguments_from_the_shell(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["studies/beta.py", "--metric", "beauty"])
    assert study.main(BETA, "") == 2
    assert "metric 'beauty' cannot be optimised" in " ".join(capsys.readouterr().err.split())


def test_the_bar_tells_how_far_a_trial_has_come(tmp_path, monkeypatch):
    """By its latest row; a tokenizer's loss and perplexity, a prior's bits."""
    what = planned(tmp_path, "--steps", "50")
    workers = workers_of(what)
    rows = [{"step": step, "reconstruction": 10 / step, "perplexity": 9.4} for step in (10, 20)]
    monkeypatch.setattr(study, "run_in_child", lambda config, *given: [Outcome("finished"), given[3](rows)][0])
    assert workers._attempt(what.example("cnn"), "a", what.tokenizers()[0], None).status == "finished"
    assert workers.told == ["a: 20/50 loss 0.5000 perplexity 9"]
    rows.append({"step": 50, "reconstruction": 0.2})  # what follows may take minutes, and has no rows
    assert workers._attempt(what.example("cnn"), "a", what.tokenizers()[0], None).status == "finished"
    assert workers.told[-1] == "a: 50/50 loss 0.2000, trained and being scored"


def test_the_bar_is_told_of_a_trial_that_has_nothing_new_to_tell(tmp_path, monkeypatch):
    """Before the first row, and while it is scored, which may take minutes each: a log has lines all the same."""
    what = planned(tmp_path, "--steps", "50")
    workers = workers_of(what)
    polls = ([], [{"step": 50, "reconstruction": 0.2}], [], [])
    monkeypatch.setattr(study, "run_in_child", lambda config, *given: [Outcome("finished"), *map(given[3], polls)][0])
    workers._attempt(what.example("cnn"), "a", what.tokenizers()[0], None)
    assert workers.told == ["a: begins"] + ["a: 50/50 loss 0.2000, trained and being scored"] * 3
    assert KINDS["priors"].figures({"bits_per_token": 7.12345}) == "7.123 bits per token"


def test_a_child_is_started_with_what_the_command_line_says(tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(study, "run_in_child", lambda *all: given.append(all) or Outcome("finished"))
    what = planned(tmp_path, "--fid-weights", str(tmp_path), "--trial-timeout", "7")
    workers_of(what)._attempt(what.example("vit"), "a", what.tokenizers()[0], None)
    ((config, store, weights, threads, _, timeout, track, processes),) = given
    assert (config, store, weights, threads, timeout) == (what.example("vit"), what.store, tmp_path, None, 7.0)
    assert (track, processes) == (None, 1)


def test_a_run_that_has_ended_is_adopted_with_its_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "run_in_child", None)
    what = planned(tmp_path)
    fabricate_failed(what.store, what.example("cnn"), "diverged")
    assert workers_of(what)._attempt(what.example("cnn"), "a", what.tokenizers()[0], None) == (
        "diverged",
        "it diverged",
    )


def test_a_worker_that_fails_stops_the_others(tmp_path):
    """What went wrong is told when they have given their trials back."""

    class Broken:
        def open(self, *given):
            raise UserError("the database is gone")

    workers = workers_of(planned(tmp_path), Broken())
    with pytest.raises(UserError, match="database is gone"):
        workers._work()
    assert workers.stop.is_set()


def test_a_worker_that_waits_long_for_others_says_so_once(tmp_path, monkeypatch):
    """Not for a while, for trials of this command, or twice."""
    now, rows = [0.0], [SimpleNamespace(_trial_id=number) for number in (1, 2, 3)]
    index = Mock(claim=lambda *given: None, ended=lambda *given: 0)
    index.trials = lambda *given, of: rows if now[0] < 100 else []
    clock = SimpleNamespace(monotonic=lambda: now[0], sleep=lambda seconds: now.insert(0, now[0] + 1))
    monkeypatch.setattr(study, "time", clock)
    said = []
    monkeypatch.setattr(study, "say", lambda line: said.append((now[0], line)))
    for own in ({1}, {1, 2, 3}):
        workers = workers_of(planned(tmp_path), index)
        workers.taken |= own
        now[:] = [0.0]
        workers._work()
    fix = "if nobody runs them, stop this, delete the database, and python -m bench.study rebuild makes it again"
    assert said == [(31.0, f"study beta-smoke: waiting for 2 trials of other workers; {fix}")]


def test_a_stopped_worker_starts_no_child(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "run_in_child", None)
    what = planned(tmp_path)
    workers = workers_of(what)
    workers.stop.set()
    assert workers._attempt(what.example("cnn"), "a", what.tokenizers()[0], None).status == "interrupted"


def test_a_trial_that_is_asked_about_answers_stop_before_prune(tmp_path, monkeypatch):
    """A stopped study's trials go on later; given up is only what a search compared."""
    asked = []
    what = make_plan(SEARCH, parse_study(SEARCH, "", ["--preset", "smoke", "--results", str(tmp_path)]))
    workers, rows = workers_of(what), [{"step": 20, "reconstruction": 1.0, "perplexity": 9.0}]
    monkeypatch.setattr(study, "report", lambda trial, rows, config, after: asked.append(after) or rows[-1]["step"])
    watched = SimpleNamespace(should_prune=lambda: True)
    answers = []

    def run(config, store, fid_weights, threads, watch, timeout, track=None, processes=1):
        answers.extend([watch([]), watch(rows), watch(rows)])
        workers.stop.set()
        answers.append(watch(rows))
        return Outcome("interrupted")

    monkeypatch.setattr(study, "run_in_child", run)
    workers._attempt(what.example("cnn"), "a", what.tokenizers()[0], watched)
    assert answers == [None, "pruned", "pruned", "interrupted"]
    assert asked == [0, 20]  # what was reported is not reported again


def test_an_empty_folder_has_no_studies_to_list(tmp_path, capsys):
    assert study_command.show(tmp_path) == 0
    assert "python -m studies.beta" in " ".join(capsys.readouterr().out.split())


class Looks(list):
    """In place of a child that looks at a run: notes which, and ends at one backbone as it is told."""

    def __init__(self, *endings):
        self.endings = list(endings)

    def __call__(self, config, store, instruments, fid_weights, threads, ask):
        run = store.run(config)
        assert run.finished
        self.append((config.backbone, config.seed, run.folder.parent.name, instruments))
        self.threads = threads
        if config.backbone == "vit" and self.endings:
            return Outcome(self.endings.pop(0), "its weights are damaged")
        run.seal("instruments.json", {"instruments": {"equivariance": EQUIVARIANT}})
        return Outcome("finished")


EQUIVARIANT = {"version": INSTRUMENTS["equivariance"].version, "seconds": 1.0, "weights": "w", "metrics": {}}


def test_instruments_look_once_at_every_finished_run_and_none_by_default(child, tmp_path, monkeypatch, capsys):
    looks, checked = Looks("refused", "refused", "refused"), Mock()
    monkeypatch.setattr(study, "look_in_child", looks)
    monkeypatch.setattr(study, "check_instruments", checked)
    child.endings = ["diverged", "finished", "finished", "finished"]
    assert start(BETA, tmp_path) == 1
    assert looks == []
    checked.reset_mock()
    assert start(BETA, tmp_path, "--instruments", "equivariance") == 1
    assert [call.args[2] for call in checked.call_args_list] == [("equivariance",)] * 2
    assert sorted(looks) == [(name, 0, "runs", ("equivariance",)) for name in ("cnn", "vit", "vit")]
    assert looks.threads is None
    said = capsys.readouterr().err
    assert said.count("not looked at: its weights are damaged") == 2
    assert re.search(r"/3 cnn-ema-\w+: equivariance \(", said)
    looks.clear()
    start(BETA, tmp_path, "--instruments", "equivariance")
    assert [name for name, *_ in looks] == ["vit", "vit"]  # the other has been


@pytest.mark.parametrize(("ending", "looked"), [("crashed", 3), ("out_of_memory", 2), ("refused", 1), ("busy", 1)])
def test_a_look_that_fails_is_tried_as_often_as_a_trial_and_stops_nothing(
    child, tmp_path, monkeypatch, capsys, ending, looked
):
    looks = Looks(*[ending] * 3)
    monkeypatch.setattr(study, "look_in_child", looks)
    monkeypatch.setattr(study, "check_instruments", Mock())
    assert start(BETA, tmp_path, "--beta", "0.25", "--instruments", "equivariance", "--workers", "2") == 0
    assert sorted(name for name, *_ in looks) == ["cnn"] + ["vit"] * looked
    assert looks.threads == study.threads_each(2) >= 1
    assert "not looked at: its weights are damaged" in capsys.readouterr().err


def test_instruments_look_at_as_many_runs_at_a_time_as_there_are_workers(child, tmp_path, monkeypatch):
    together = threading.Barrier(2, timeout=20)

    def look(*given):
        together.wait()
        return Outcome("finished")

    monkeypatch.setattr(study, "look_in_child", look)
    monkeypatch.setattr(study, "check_instruments", Mock())
    assert start(BETA, tmp_path, "--beta", "0.25", "--instruments", "equivariance", "--workers", "2") == 0


def test_a_signal_stops_looks_and_no_further_one_begins(child, tmp_path, monkeypatch, capsys):
    looked = []

    def look(config, store, instruments, fid_weights, threads, ask):
        looked.append(config)
        os.kill(os.getpid(), signal.SIGTERM)
        while ask() is None:
            time.sleep(0.01)
        return Outcome(ask())

    monkeypatch.setattr(study, "look_in_child", look)
    monkeypatch.setattr(study, "check_instruments", Mock())
    assert start(BETA, tmp_path, "--instruments", "equivariance") == 130
    assert len(looked) == 1
    assert "stopped after instruments looked at 0 of 4 runs; the same command continues" in capsys.readouterr().err


def test_after_a_look_that_cannot_go_on_no_further_one_begins(child, tmp_path, monkeypatch):
    """Such as of a store that was removed; the error is told at once."""
    looked = []

    def look(config, *_):
        looked.append(config)
        raise UserError("gone")

    monkeypatch.setattr(study, "look_in_child", look)
    monkeypatch.setattr(study, "check_instruments", Mock())
    monkeypatch.setattr(study, "_look", slowed(study._look))
    assert start(BETA, tmp_path, "--instruments", "equivariance") == 2
    assert len(looked) < 4


def slowed(look):
    """As ``look``, but that whoever waits for the one before has time to hear of it."""

    def later(*arguments, **options):
        time.sleep(0.2)
        return look(*arguments, **options)

    return later


def test_of_a_search_instruments_look_at_what_confirms_it(child, tmp_path, monkeypatch, capsys):
    looks = Looks()
    monkeypatch.setattr(study, "look_in_child", looks)
    monkeypatch.setattr(study, "check_instruments", Mock())
    words = ["--trials", "2", "--instruments", "equivariance", "--backbone", "cnn"]
    assert start(SEARCH, tmp_path, *words) == 2
    assert "--instruments looks at what confirms a search; add --confirm N" in capsys.readouterr().err
    assert child.calls == []
    searched = {**SPACE, "codebook_size": (128, 256)}
    assert start(Search("search", searched, backbones=("cnn",)), tmp_path, *words, "--confirm", "2") == 0
    assert {seed for _, seed, *_ in looks} == {1, 2}


def test_an_instrument_that_cannot_look_is_told_before_anything_is_trained(child, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(study, "check_instruments", Mock(side_effect=UserError("instrument probes: no labels")))
    assert start(BETA, tmp_path, "--instruments", "probes") == 2
    assert "instrument probes: no labels" in capsys.readouterr().err
    assert child.calls == []


@pytest.mark.parametrize(
    ("words", "said"),
    [("microscope", "unknown instrument 'microscope'"), ("", "--instruments needs at least one value")],
)
def test_an_instrument_that_is_none_costs_nothing(child, tmp_path, capsys, words, said):
    assert start(BETA, tmp_path, "--instruments", *words.split()) == 2
    assert said in capsys.readouterr().err
    assert child.calls == []
