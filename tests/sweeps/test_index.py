"""Optuna's side of a study: which way it optimises, what a pruner sees, who takes which trial, how one ends."""

import contextlib
import json
import math
import os
import shutil
import threading
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import optuna
import pandas as pd
import pytest
from optuna.artifacts import get_all_artifact_meta
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState, create_trial
from optuna_dashboard import get_note

from backbones import BACKBONES
from bench.analysis.frames import METRICS, frame
from bench.core.errors import Damaged, UserError
from bench.core.runs import FAILURES, Run
from bench.core.store import Store
from bench.data import AUGMENTATIONS
from bench.instruments import METRICS as INSTRUMENT_METRICS
from bench.priors.config import PriorConfig
from bench.quantizers import QUANTIZERS
from bench.sweeps import address, conversion, importance, index
from bench.sweeps.address import EXAMPLES, storage_url, without_password
from bench.sweeps.conversion import MAX_REPORTS, report
from bench.sweeps.definition import Range, distribution, holding, suggest
from bench.sweeps.importance import importances
from bench.sweeps.index import Index
from bench.sweeps.kinds import KINDS
from bench.tokenizers.config import Config, make_config
from tests.fabricate import least

MAXIMISED = {"psnr", "ssim", "perplexity", "usage", "images_per_second_encode", "images_per_second_decode"}
SCORES = {"psnr": 20.0, "lpips_vgg": 0.4, "perplexity": 50.0, "bits_per_image": 112.0, "train_seconds": 30.0}


@pytest.fixture
def indexed(tmp_path) -> Index:
    """An index in memory."""
    return Index("sqlite:///:memory:", tmp_path / "studies")


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path)


def smoke(**changes) -> Config:
    return make_config("cnn", "smoke", device="cpu", precision="fp32", **changes)


def made(store: Store, status: str = "finished", rows=(), config: Config | None = None, **scores) -> Run:
    """A run of ``config`` that ended with ``status`` and, if that is finished, ``scores``."""
    config = config or smoke()
    run = store.run(config)
    run.folder.mkdir(parents=True, exist_ok=True)
    run.write("config.json", {"config": asdict(config), "environment": {}})
    (run.folder / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if status == "finished":
        run.write("metrics.json", least(config.SHELF, {"data": "photos"}, **{**SCORES, **scores}))
    elif status != "unfinished":
        run.fail(status, f"it {status}")
    return run


def taken(indexed: Index, study: optuna.Study, params=None, run_id: str | None = None) -> optuna.Trial:
    """A trial that a worker has."""
    indexed.enqueue(study, [(params or {"beta": 0.5, "seed": 0}, run_id)])
    return indexed.claim(study, {run_id} if run_id else set())


def waiting(indexed: Index, study: optuna.Study, of: set[str]) -> int:
    return len(indexed.trials(study, TrialState.WAITING, of=of))


def running(indexed: Index, study: optuna.Study, of: set[str]) -> int:
    return len(indexed.trials(study, TrialState.RUNNING, of=of))


# -- direction --------------------------------------------------------------------------------------------------------


def test_a_study_goes_the_way_in_which_its_metric_gets_better(indexed):
    """(bug 17) Each metric alone, and several in their order."""
    known = [name for name, metric in METRICS.items() if metric.better and name not in INSTRUMENT_METRICS]
    assert set(known) >= MAXIMISED
    for name in known:
        way = optuna.study.StudyDirection.MAXIMIZE if name in MAXIMISED else optuna.study.StudyDirection.MINIMIZE
        assert indexed.open(name, (name,)).direction == way, name
    several = indexed.open("several", ("lpips_vgg", "psnr", "bits_per_image"))
    assert [way.name for way in several.directions] == ["MINIMIZE", "MAXIMIZE", "MINIMIZE"]
    assert several.metric_names == ["lpips_vgg", "psnr", "bits_per_image"]


def test_the_best_trial_is_the_one_with_the_better_score(indexed, store):
    for metric, best in (("psnr", 25.0), ("lpips_vgg", 15.0)):
        study = indexed.open(metric, (metric,))
        for seed, value in enumerate((20.0, 25.0, 15.0)):
            run = made(store, config=smoke(seed=seed), **{metric: value})
            indexed.add(study, [({"beta": 0.5, "seed": seed}, [run])], (metric,), {})
        assert study.best_value == best


def test_a_study_keeps_its_metrics(indexed):
    indexed.open("one", ("psnr",))
    indexed.open("one", ("psnr",))
    with pytest.raises(UserError, match="--metric psnr"):
        indexed.open("one", ("ssim",))


# -- what a pruner sees -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("direction", "sign"), [("minimize", 1), ("maximize", -1)])
@pytest.mark.parametrize("weight", [0.0, 0.05, 2.0])
def test_reported_is_the_training_loss_with_its_perceptual_part(direction, sign, weight):
    """reconstruction + lpips_weight · lpips, negative where the study maximises: smaller is always the better."""
    trial = optuna.create_study(direction=direction).ask()
    rows = [{"step": step, "reconstruction": 1 / step, "lpips": 0.3 + step} for step in (1, 2, 3)]
    assert report(trial, rows, smoke(steps=3, lpips_weight=weight), after=0) == 3
    values = trial.study.trials[0].intermediate_values
    assert values == {s: pytest.approx(sign * (1 / s + weight * (0.3 + s))) for s in (1, 2, 3)}
    plain = optuna.create_study(direction=direction).ask()
    report(plain, [{"step": 1, "reconstruction": 0.5}], smoke(steps=3, lpips_weight=weight), after=0)
    assert plain.study.trials[0].intermediate_values == {1: sign * 0.5}  # a run without a perceptual loss


@pytest.mark.parametrize("steps", [1, 7, 40, 41, 79, 150, 700, 1199, 10_000])
def test_reports_are_few_and_at_the_same_steps_however_the_rows_come(steps):
    """At most MAX_REPORTS, whether the rows are read one by one or all at once; none twice."""
    every = min(50, max(1, steps // 200))  # as training logs
    rows = [{"step": s, "reconstruction": 1.0} for s in range(1, steps + 1) if s % every == 0 or s == steps]
    config, found = smoke(steps=steps), []
    for size in (len(rows), 1, 3):
        trial, after = optuna.create_study().ask(), 0
        for start in range(0, len(rows), size):
            after = report(trial, rows[start : start + size], config, after)
        found.append(list(trial.study.trials[0].intermediate_values))
        assert after == max(found[-1], default=0)
    assert found[0] == found[1] == found[2]
    assert min(len(rows), MAX_REPORTS) // 2 <= len(found[0]) <= MAX_REPORTS
    assert report(trial, rows, config, after=steps) == steps


@pytest.mark.parametrize(
    ("others", "step", "pruned"), [(5, 300, True), (4, 300, False), (5, 99, False), (5, 100, True)]
)
def test_a_trial_is_given_up_after_a_third_of_the_steps_and_five_others(indexed, others, step, pruned):
    study = indexed.open("one", ("lpips_vgg",), steps=300)
    for number in range(others):
        trial = taken(indexed, study, {"beta": 0.1 * number + 0.1})
        trial.report(1.0, step)
        study.tell(trial, 1.0)
    for loss in (0.5, 2.0):
        trial = taken(indexed, study, {"beta": loss})
        trial.report(loss, step)
        assert trial.should_prune() == (loss > 1 and pruned == 1)


def test_of_a_prior_the_pruner_sees_bits_per_token():
    trial = optuna.create_study().ask()
    rows = [{"step": step, "bits_per_token": 8.0 - step} for step in (1, 2, 3)]
    assert report(trial, rows, PriorConfig("a-tokenizer", "rnn", steps=3), after=1) == 3
    assert trial.study.trials[0].intermediate_values == {2: 6.0, 3: 5.0}


# -- who takes what ---------------------------------------------------------------------------------------------------


def test_waiting_trials_are_taken_once_in_their_order(indexed):
    study = indexed.open("one", ("psnr",))
    for number, run_id in enumerate("abca"):
        indexed.enqueue(study, [({"beta": 0.5, "seed": number}, run_id)])
    assert (waiting(indexed, study, set()), waiting(indexed, study, {"a"}), running(indexed, study, set())) == (4, 2, 0)
    assert indexed.claim(study, {"x"}) is None
    third = indexed.claim(study, {"c"})
    assert (third.params, third.user_attrs["seed"]) == ({"beta": 0.5}, 2)
    assert [indexed.claim(study, set()).user_attrs["seed"] for _ in range(3)] == [0, 1, 3]
    assert indexed.claim(study, set()) is None
    assert (running(indexed, study, set()), running(indexed, study, {"a"}), running(indexed, study, {"x"})) == (4, 2, 0)
    assert waiting(indexed, study, set()) == 0
    assert indexed.states(study) == {run_id: {"RUNNING"} for run_id in "abc"}


def test_one_worker_at_a_time_looks_for_a_trial_and_takes_it(tmp_path):
    """SQLite has no row locks: of two that look at once both could take the same."""
    inside, most, meet = set(), [], threading.Barrier(2)

    class Slow(Index):
        def trials(self, *arguments, **more):
            inside.add(self)
            with contextlib.suppress(threading.BrokenBarrierError):
                meet.wait(0.2)
            most.append(len(inside))
            return super().trials(*arguments, **more)

        def _start(self, trial_id):
            inside.discard(self)
            return super()._start(trial_id)

    url = address.default_url(tmp_path)
    folder = tmp_path / "studies"
    first = Index(url, folder)
    study = first.open("one", ("psnr",))
    for seed in (0, 1):
        first.enqueue(study, [({"seed": seed}, None)])
    found = []

    def work():
        one = Slow(url, folder)
        found.append(one.claim(one.open("one", ("psnr",)), set()).user_attrs["seed"])

    workers = [threading.Thread(target=work) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert sorted(found) == [0, 1]
    assert max(most) == 1


def test_what_a_trial_draws_follows_from_its_study_and_number(tmp_path):
    """Whoever takes it draws the same, and no two trials or studies draw alike."""
    space = {"beta": Range(0.1, 4.0, log=True), "code_dim": Range(4, 64)}

    def drawn(folder: str, name: str, count: int) -> list[dict]:
        one = Index("sqlite:///:memory:", tmp_path / folder)
        study = one.open(name, ("psnr",))
        for _ in range(count):
            one.enqueue(study, [({}, None)])
        return [suggest(one.claim(study, set()), space) for _ in range(count)]

    first, again, other = drawn("a", "one-cnn", 3), drawn("b", "one-cnn", 3), drawn("c", "one-vit", 3)
    assert first == again
    assert len({values["beta"] for values in first + other}) == 6


def test_only_trials_that_ran_to_an_end_of_their_own_use_up_the_budget(indexed, store):
    """Neither interrupted ones nor those lost with their worker; waiting and running ones are spoken for."""
    study, metrics = indexed.open("one", ("psnr",)), ("psnr",)
    for seed, status in enumerate(["finished", "pruned", *(name for name in FAILURES if name != "pruned")]):
        run = made(store, status, config=smoke(seed=seed))
        indexed.tell(study, taken(indexed, study, {"seed": seed}), [run], metrics)
    assert indexed.ended(study) == 1 + len(FAILURES)
    indexed.give_back(study, taken(indexed, study, {"seed": 90}))  # interrupted, and waiting again
    lost = indexed.claim(study, set())
    study.tell(lost, state=TrialState.FAIL)  # as Optuna does when heartbeats stop
    assert indexed.ended(study) == 1 + len(FAILURES)
    taken(indexed, study, {"seed": 91})
    indexed.enqueue(study, [({"seed": 92}, None)])
    assert indexed.ended(study) == 1 + len(FAILURES)


def test_a_trial_that_was_given_back_comes_again_as_it_was(indexed):
    study = indexed.open("one", ("psnr",))
    trial = taken(indexed, study, {"beta": 0.5, "seed": 3}, "a")
    trial.set_user_attr("psnr", 20.0)
    indexed.give_back(study, trial)
    old, new = study.trials
    assert (old.state, old.user_attrs["status"]) == (TrialState.FAIL, "interrupted")
    assert (new.state, new.params) == (TrialState.WAITING, {"beta": 0.5})
    assert new.user_attrs == {"run_id": "a", "seed": 3}
    assert indexed.states(study) == {"a": {"FAIL", "WAITING"}}
    assert suggest(indexed.claim(study, {"a"}), {"beta": Range(0.1, 4.0)}) == {"beta": 0.5}
    indexed.give_back(study, trial)  # another worker took it for dead meanwhile: no further copy
    assert len(study.trials) == 2


def test_a_lost_trial_comes_back_twice_at_most(indexed):
    """A trial that kills its worker each time does not go round for ever."""
    study = indexed.open("one", ("psnr",))
    trial = taken(indexed, study, {"seed": 0}, "a")
    callback = indexed.storage.get_heartbeat_stale_trial_callback()
    for copies in (1, 2, 2):
        frozen = indexed.storage.get_trial(trial._trial_id)
        study.tell(trial, state=TrialState.FAIL)
        callback(study, frozen)
        assert len(study.trials) == 1 + copies
        trial = indexed.claim(study, set())
    assert trial is None


# -- how a trial ends -------------------------------------------------------------------------------------------------


def test_a_trials_value_is_the_mean_over_its_seeds(indexed, store):
    """Its attributes are those of the first, and its time that of all: training and scoring."""
    metrics = ("lpips_vgg", "psnr")
    study = indexed.open("one", metrics)
    rows = [(0.4, 20.0), (0.1, 21.0), (0.4, 25.0)]
    runs = [
        made(store, config=smoke(seed=s), lpips_vgg=a, psnr=b, train_seconds=10.0 * s, score_seconds=1.0)
        for s, (a, b) in enumerate(rows)
    ]
    indexed.tell(study, taken(indexed, study), runs, metrics)
    (trial,) = study.trials
    assert trial.state == TrialState.COMPLETE
    assert trial.values == pytest.approx([0.3, 22.0])
    assert (trial.user_attrs["psnr"], trial.user_attrs["run_id"]) == (20.0, runs[0].folder.name)
    assert trial.user_attrs["seconds"] == indexed.seconds(study) == 33.0


@pytest.mark.parametrize("status", FAILURES)
def test_one_seed_without_scores_fails_the_trial(indexed, store, status):
    """Pruned only if that is what the run was; the failed run's time counts as far as it came."""
    study = indexed.open("one", ("psnr",))
    history = [{"step": 1, "reconstruction": 1.0, "seconds": 2.0}, {"step": 2, "reconstruction": 1.0, "seconds": 5.5}]
    runs = [made(store, config=smoke(seed=0)), made(store, status, history, smoke(seed=1))]
    indexed.tell(study, taken(indexed, study), runs, ("psnr",))
    (trial,) = study.trials
    assert trial.state == (TrialState.PRUNED if status == "pruned" else TrialState.FAIL)
    assert (trial.user_attrs["status"], trial.user_attrs["reason"]) == (status, f"it {status}")
    assert indexed.seconds(study) == 35.5


def test_a_run_that_ended_elsewhere_is_recorded_with_its_curve(indexed, store):
    study = indexed.open("one", ("psnr",))
    rows = [{"step": step, "reconstruction": 1 / step, "lpips": 0.0, "seconds": 1.0} for step in (50, 100, 150)]
    run = made(store, rows=rows, config=smoke(steps=150))
    indexed.add(study, [({"beta": 0.25, "seed": 0}, [run])], ("psnr",), {})
    (trial,) = study.trials
    assert (trial.state, trial.value, trial.params) == (TrialState.COMPLETE, 20.0, {"beta": 0.25})
    assert trial.user_attrs["seed"] == 0
    assert trial.intermediate_values == {step: pytest.approx(-1 / step) for step in (50, 100, 150)}
    assert indexed.states(study) == {run.folder.name: {"COMPLETE"}}


@pytest.fixture
def several(indexed) -> list[tuple]:
    """Trials of all kinds that have ended."""
    spaces = {"beta": distribution("beta"), "backbone": distribution("backbone"), "seed": distribution("seed")}
    ends = [("COMPLETE", [1.5, -2.0]), ("FAIL", None), ("PRUNED", None), ("COMPLETE", [0.0, float("inf")])]
    trials = []
    for seed, (state, values) in enumerate(ends):
        params = {"beta": 0.1 + seed, "backbone": ("cnn", "vit")[seed % 2], "seed": seed}
        template = optuna.trial.create_trial(
            state=TrialState[state],
            values=values,
            params=params,
            distributions=spaces,
            user_attrs={"run_id": f"run {seed}", "psnr": 20.5, "reason": None},
            system_attrs={"fixed_params": params},
        )
        trials.append((template, f"beside {seed}"))
    return trials


def test_trials_that_are_added_at_once_are_those_that_optuna_adds(indexed, several):
    """In a study that has trials of its own, beside another one."""
    found, ways = {}, ["minimize", "maximize"]
    for name in ("other", "ours", "optuna's"):
        study = optuna.create_study(study_name=name, storage=indexed.storage, directions=ways)
        study.add_trial(several[1][0])
        if name == "ours":
            indexed.storage.add_trials(study._study_id, several, lambda trial, beside: {f"note {trial.number}": beside})
            assert (
                indexed.storage.get_study_system_attrs(study._study_id).items()
                >= {f"note {n + 1}": f"beside {n}" for n in range(4)}.items()
            )
        else:
            study.add_trials([template for template, _ in several])
        study.add_trial(several[1][0])
        found[name] = study.get_trials()
        assert all(trial.datetime_complete for trial in found[name] if trial.user_attrs["run_id"] != "run 1")
    for here, there in zip(found["ours"], found["optuna's"], strict=True):
        for name in ("number", "state", "values", "params", "distributions", "user_attrs", "system_attrs"):
            assert getattr(here, name) == getattr(there, name), name


def test_trials_that_wait_are_those_that_optuna_adds(indexed, monkeypatch):
    """By the thousand, and taken in the order of their enqueueing."""
    monkeypatch.setattr(index, "AT_ONCE", 2)
    study = indexed.open("one", ("psnr",))
    indexed.enqueue(study, [({"beta": 0.5, "seed": seed}, f"run {seed}") for seed in range(3)])
    params, space = {"beta": 0.5}, {"beta": distribution("beta")}
    fixed = {"system_attrs": {"fixed_params": params}, "user_attrs": {"run_id": "run 3", "seed": 3}}
    study.add_trial(create_trial(state=TrialState.WAITING, params=params, distributions=space, **fixed))
    for seed, trial in enumerate(study.trials):
        assert (trial.number, trial.state.name, trial.datetime_start) == (seed, "WAITING", None)
        assert trial.params == trial.system_attrs["fixed_params"] == params
        assert (trial.user_attrs, trial.distributions) == ({"run_id": f"run {seed}", "seed": seed}, space)
    taken = indexed.claim(study)
    assert (taken.number, study.trials[0].datetime_complete) == (0, None)
    assert study.trials[0].datetime_start is not None


def test_all_trials_that_are_added_at_once_are_added_or_none(indexed, several):
    study = indexed.open("one", ("psnr",))

    def about(trial, beside):
        if trial.number == 2:
            raise OSError("the disk is full")
        return {}

    with pytest.raises(OSError, match="full"):
        indexed.storage.add_trials(study._study_id, several, about)
    assert study.get_trials() == []


def test_optuna_says_nothing_that_a_user_did_not_ask_for(indexed, capfd):
    """Such as that a study was made, or that what is used is experimental."""
    indexed.open("one", ("psnr",))
    assert capfd.readouterr() == ("", "")
    assert optuna.logging.get_verbosity() == optuna.logging.ERROR


def test_a_pruned_run_that_ended_elsewhere_is_worth_its_last_report(indexed, store):
    """As Optuna has it of one that was pruned here."""
    study = indexed.open("one", ("lpips_vgg",))
    rows = [{"step": step, "reconstruction": 1 / step, "lpips": 0.0, "seconds": 1.0} for step in (50, 100)]
    indexed.add(study, [({"seed": 0}, [made(store, "pruned", rows, smoke(steps=150))])], ("lpips_vgg",), {})
    (trial,) = study.trials
    assert (trial.state.name, trial.value) == ("PRUNED", pytest.approx(0.01))


def test_more_than_fits_a_transaction_is_added_in_several(indexed, store, monkeypatch):
    monkeypatch.setattr(index, "AT_ONCE", 2)
    study = indexed.open("one", ("psnr",))
    ended = [({"seed": seed}, [made(store, config=smoke(seed=seed), psnr=20.0 + seed)]) for seed in range(5)]
    indexed.add(study, ended, ("psnr",), {})
    assert [(trial.number, trial.value) for trial in study.trials] == [(seed, 20.0 + seed) for seed in range(5)]
    indexed.add(study, [], ("psnr",), {})
    assert len(study.trials) == 5


def test_a_picture_of_a_run_that_ended_elsewhere_is_an_artifact_of_its_trial(indexed, store):
    study, run = indexed.open("one", ("psnr",)), made(store)
    (run.folder / "reconstructions.png").write_bytes(b"a picture")
    indexed.add(study, [({"seed": 0}, [run])], ("psnr",), {})
    (trial,) = study.trials
    (meta,) = optuna.artifacts.get_all_artifact_meta(trial, storage=indexed.storage)
    assert (meta.filename, meta.mimetype) == ("reconstructions.png", "image/png")
    with indexed.artifacts.open_reader(meta.artifact_id) as file:
        assert file.read() == b"a picture"
    assert f"/artifacts/{study._study_id}/{trial._trial_id}/{meta.artifact_id}" in get_note(
        optuna.Trial(study, trial._trial_id)
    )


# -- values -----------------------------------------------------------------------------------------------------------


def test_a_range_is_drawn_from_as_it_says():
    assert distribution("code_dim", Range(4, 32)) == IntDistribution(4, 32)
    assert distribution("code_dim", Range(4, 32, log=True)) == IntDistribution(4, 32, log=True)
    assert distribution("beta", Range(0.05, 4.0, log=True)) == FloatDistribution(0.05, 4.0, log=True)
    assert distribution("beta", Range(0, 4.0)) == FloatDistribution(0.0, 4.0)
    assert distribution("grid_size", (4, 8)) == CategoricalDistribution((4, 8))
    space = {"beta": Range(0.05, 4.0, log=True), "code_dim": Range(4, 32), "grid_size": (4, 8)}
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    values = pd.DataFrame([suggest(study.ask(), space) for _ in range(60)])
    assert values.beta.between(0.05, 4).all()
    assert (values.beta < math.sqrt(0.05 * 4)).mean() == pytest.approx(0.5, abs=0.25)  # half below the geometric mean
    assert values.code_dim.between(4, 32).all()
    assert set(values.grid_size) == {4, 8}


def test_an_ablations_values_have_one_distribution_each_so_that_it_can_grow(indexed):
    """Optuna refuses a parameter whose distribution changes; whatever value a field is given later must be in it."""
    study = indexed.open("one", ("psnr",))
    wanted = {"beta": (0.0, 1e-5, 100.0), "codebook_size": (1, 2**20), "quantizer": ("ema", "l2")}
    wanted |= {"gradient": ("rotation", "straight_through"), "kmeans_init": (False, True), "augment": ("none", "blog")}
    for name, values in wanted.items():
        for value in values:
            indexed.enqueue(study, [({name: value}, None)])
            assert indexed.claim(study, set()).params == {name: value}
    with pytest.raises(UserError, match="data is text"):
        distribution("data")


def test_parameters_have_the_range_of_the_values_that_were_swept(tmp_path, store):
    """Of all trials, also of those from before a value came, and in a database whose seeds were parameters."""
    url = address.default_url(tmp_path)
    indexed = Index(url, tmp_path / "studies")
    study = indexed.open("one", ("psnr",))
    old = {name: distribution(name) for name in ("beta", "quantizer", "codebook_size", "seed")}
    params = {"beta": 0.5, "quantizer": "l2", "codebook_size": 64, "seed": 7}
    study.add_trial(create_trial(params=params, distributions=old, value=20.0, user_attrs={"run_id": "a"}))
    run = made(store, config=smoke(beta=1.0, seed=3))
    indexed.add(study, [({**params, "beta": 1.0, "quantizer": "ema", "seed": 3}, [run])], ("psnr",), {})
    other = indexed.open("other", ("psnr",))
    indexed.enqueue(other, [({"beta": 99.0}, "c")])
    for beta, low, high, log in ((4.0, 0.5, 4.0, False), (8.0, 0.5, 8.0, True), (0.25, 0.25, 8.0, True)):
        indexed.enqueue(study, [({**params, "beta": beta, "codebook_size": 128, "seed": 1}, f"run {beta}")])
        for _ in range(2):  # the second time changes nothing
            indexed.narrow(study)
        every = optuna.load_study(study_name="one", storage=url).trials  # as the dashboard reads it
        assert {trial.distributions["beta"] for trial in every} == {FloatDistribution(low, high, log=log)}
        assert {trial.distributions["codebook_size"] for trial in every} == {IntDistribution(64, 128)}
        assert {trial.distributions["quantizer"] for trial in every} == {CategoricalDistribution(("l2", "ema"))}
        assert every[-1].params == {"beta": beta, "quantizer": "l2", "codebook_size": 128}
    assert [trial.params["beta"] for trial in every] == [0.5, 1.0, 4.0, 8.0, 0.25]
    assert [trial.params["quantizer"] for trial in every] == ["l2", "ema", "l2", "l2", "l2"]
    assert [trial.user_attrs["seed"] for trial in every] == [7, 3, 1, 1, 1]
    assert [trial.user_attrs["run_id"] for trial in every][:2] == ["a", run.folder.name]
    assert other.trials[0].distributions == {"beta": distribution("beta")}
    taken = indexed.claim(study, {"run 4.0"})
    indexed.give_back(study, taken)
    assert indexed.claim(study, {"run 4.0"}).params == taken.params


def test_shares_of_importance_sum_to_one_in_each_backbone():
    """PSNR follows K (by orders of magnitude) in one backbone and the seed in the other."""
    rows = []
    for backbone in ("cnn", "vit"):
        for k in (64, 512, 4096):
            for seed in (0, 1, 2):
                psnr = math.log2(k) if backbone == "cnn" else 10.0 * seed
                config = make_config(backbone, "smoke", codebook_size=k, seed=seed)
                rows.append({**asdict(config), "status": "finished", "psnr": psnr + 0.01 * seed})
    table = pd.DataFrame(rows, columns=frame([]).columns)
    found = importances(table, "psnr")
    shares = found.set_index(["backbone", "parameter"]).importance
    assert found.groupby("backbone").importance.sum().tolist() == pytest.approx([1, 1])
    assert shares["cnn", "codebook_size"] > 0.9
    assert shares["vit", "seed"] > 0.9
    failed = table.assign(status=table.status.where(table.backbone == "cnn", "crashed"))
    assert set(importances(failed, "psnr").backbone) == {"cnn"}
    assert importances(table.assign(psnr=20.0), "psnr").empty
    assert importances(table.assign(codebook_size=64), "psnr").empty  # the seed alone is nothing swept


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql+psycopg://me:secret@host:5432/x", "postgresql+psycopg://me:***@host:5432/x"),
        ("postgresql+psycopg://me:s3-cr.t!%2F@host:5432/x", "postgresql+psycopg://me:***@host:5432/x"),
        ("postgresql://me@host/x", "postgresql://me@host/x"),
        ("postgresql://:secret@host/x", "postgresql://:***@host/x"),
        ("postgresql://host/x?user=me&password=secret", "postgresql://host/x?password=***&user=me"),
        ("postgresql://host/x?sslkey=a&PassWord=b&c=d", "postgresql://host/x?PassWord=***&c=***&sslkey=***"),
        ("postgresql://host/x?pasword=secret&port=5", "postgresql://host/x?pasword=***&port=5"),
        ("postgresql://me:a@secret@host/x", "a postgresql URL with an @ too many (write %40 in a password)"),
        ("postgresql:///me:secret@host/x", "a postgresql URL with an @ too many (write %40 in a password)"),
        ("postgresql://me:a/secret@host/x", "postgresql://me:***@host/x"),
        ("//me:secret@host", "the storage URL, which cannot be read"),
        ("postgresql:me:secret@host", "the storage URL, which cannot be read"),
        ("://:secret@host", "the storage URL, which cannot be read"),
        ("postgresql://me:secret@host:port/x", "the storage URL, which cannot be read"),
        ("", "the storage URL, which cannot be read"),
        ("sqlite:///results/a:b@c.db", "sqlite:///results/a:b@c.db"),
    ],
)
def test_a_printed_address_has_no_password(url, shown):
    assert without_password(url) == shown


def test_a_picture_attached_again_shows_what_is_in_the_file_now(indexed, tmp_path):
    one, path = indexed.open("study", ("psnr",)), tmp_path / "plot.png"
    for content in (b"the first runs", b"all runs"):
        path.write_bytes(content)
        indexed.attach(one, "", [("Plot", path)])
        (picture,) = get_all_artifact_meta(one)
        assert (indexed.folder / "artifacts" / picture.artifact_id).read_bytes() == content


# -- what the dashboard shows -----------------------------------------------------------------------------------------


def test_a_trials_note_has_each_runs_picture_and_scores_or_why_it_has_none(indexed, store):
    study = indexed.open("one", ("psnr",))
    runs = [made(store, config=smoke(seed=0), psnr=20.126, other=3.0), made(store, "crashed", config=smoke(seed=1))]
    (runs[0].folder / "reconstructions.png").write_bytes(b"a picture")
    trial = taken(indexed, study)
    indexed.tell(study, trial, runs, ("psnr",))
    (artifact,) = [meta.artifact_id for meta in get_all_artifact_meta(study.trials[0], storage=indexed.storage)]
    lines = get_note(trial).splitlines()
    assert lines[0] == f"**{runs[0].folder.name}**: finished"
    assert f"![reconstructions](/artifacts/{study._study_id}/{trial._trial_id}/{artifact})" in lines
    assert "| PSNR dB ↑ | 20.13 |" in lines
    assert "| bits per image ↓ | 112 |" in lines
    assert not any("other" in line for line in lines)
    assert f"**{runs[1].folder.name}**: crashed, it crashed" in lines


def test_a_studys_note_is_its_text_and_each_picture_below_its_caption(indexed, tmp_path):
    study, path = indexed.open("study", ("psnr",)), tmp_path / "plot.png"
    path.write_bytes(b"a plot")
    indexed.attach(study, "what was found", [("A plot", path)])
    (picture,) = get_all_artifact_meta(study)
    shown = f"![plot](/artifacts/{study._study_id}/{picture.artifact_id})"
    assert get_note(study) == f"what was found\n\n### A plot\n\n{shown}"


def test_the_database_lies_among_the_studies(tmp_path):
    assert address.default_url(tmp_path) == f"sqlite:///{tmp_path}/studies/optuna.db"


# -- what is drawn, recorded and weighed ------------------------------------------------------------------------------


def test_whole_numbers_are_drawn_by_orders_of_magnitude_where_asked():
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    drawn = [suggest(study.ask(), {"code_dim": Range(1, 1024, log=True)})["code_dim"] for _ in range(60)]
    assert sum(value < 32 for value in drawn) == pytest.approx(30, abs=12)
    assert set(map(type, drawn)) == {int}


def test_a_range_of_importance_is_logarithmic_from_a_ratio_of_ten_on():
    known = {(1, 10): True, (1, 9): False, (0, 100): False, (-1, 100): False}
    for values, log in known.items():
        assert holding(values) == IntDistribution(*values, log=log)
        assert holding(importance._numbers(pd.Series(values, dtype=object))) == FloatDistribution(*values, log=log)
    assert holding((4, 0.5, 2)) == FloatDistribution(0.5, 4.0)
    assert holding((1, 2.5)) == FloatDistribution(1.0, 2.5)
    for values in ((True, False), ("ema", "l2"), (1, "auto"), (0.5, None)):
        assert holding(values) == CategoricalDistribution(values)


def test_importance_is_of_scores_that_exist_and_of_a_fair_sample(monkeypatch):
    """Four runs are enough; of many some are drawn, not the first."""
    rows = [asdict(smoke(beta=1.0 + i, seed=i)) | {"status": "finished", "psnr": float(i)} for i in range(20)]
    table = pd.DataFrame(rows, columns=frame([]).columns)
    looked_at = []
    monkeypatch.setattr(
        importance, "create_trial", lambda value, **rest: looked_at.append(value) or create_trial(value=value, **rest)
    )
    assert not importances(table[:4], "psnr").empty
    assert importances(table[:3], "psnr").empty
    gappy = table[:5].assign(psnr=[math.nan, 1.0, 2.0, 3.0, 4.0])
    assert not importances(gappy, "psnr").empty
    assert not any(map(math.isnan, looked_at))
    monkeypatch.setattr(importance, "MAX_ROWS", 10)
    looked_at.clear()
    importances(table, "psnr")
    assert len(set(looked_at)) == 10
    assert max(looked_at) > 10


def test_a_run_that_made_no_step_has_cost_nothing(store):
    assert conversion.seconds(made(store, "crashed", config=smoke(seed=0))) == 0
    rows = [{"step": 1, "seconds": 2.0}, {"step": 2, "seconds": 5.0}]
    assert conversion.seconds(made(store, "crashed", rows, smoke(seed=1))) == 5
    assert conversion.seconds(made(store, config=smoke(seed=2), train_seconds=30.0, score_seconds=4.0)) == 34
    (made(store, "crashed", config=smoke(seed=3)).folder / "history.jsonl").unlink()
    assert conversion.seconds(store.run(smoke(seed=3))) == 0


def test_a_trial_of_several_metrics_has_no_curve(indexed, store):
    """Optuna has intermediate values for one objective only."""
    study, metrics = indexed.open("two", ("psnr", "lpips_vgg")), ("psnr", "lpips_vgg")
    rows = [{"step": 150, "reconstruction": 1.0, "seconds": 1.0}]
    indexed.add(study, [({"beta": 0.25}, [made(store, rows=rows, config=smoke(steps=150))])], metrics, {})
    assert [(trial.values, trial.intermediate_values) for trial in study.trials] == [([20.0, 0.4], {})]


def test_trials_of_a_worker_that_is_gone_wait_again(indexed, monkeypatch):
    study = indexed.open("one", ("psnr",))
    taken(indexed, study, {"beta": 0.5, "seed": 3}, "a")
    indexed.recover(study)
    assert (running(indexed, study, set()), waiting(indexed, study, set())) == (1, 0)  # its heartbeat is young
    monkeypatch.setattr(indexed.storage, "_get_stale_trial_ids", lambda study_id: [study.trials[0]._trial_id])
    indexed.recover(study)
    assert (running(indexed, study, set()), waiting(indexed, study, {"a"})) == (0, 1)
    again = indexed.claim(study, {"a"})
    assert (again.params, again.user_attrs["seed"]) == ({"beta": 0.5}, 3)


# -- workers that share a database ------------------------------------------------------------------------------------


def test_a_worker_is_taken_for_dead_only_after_it_missed_several_beats(indexed):
    storage = indexed.storage
    assert storage.get_heartbeat_interval() * 4 <= storage.grace_period <= 60


@pytest.mark.parametrize(
    ("url", "locks", "options"),
    [
        ("sqlite:///x.db", True, {"connect_args": {"timeout": 60}}),
        ("postgresql+psycopg://host/x", False, {"pool_pre_ping": True}),
    ],
)
def test_only_sqlite_needs_a_lock_and_waits_for_its_file(tmp_path, monkeypatch, url, locks, options):
    """A server's connections are looked at before they are used: it may have been started again."""
    opened = []
    note = lambda url, shown, **given: opened.append((url, given["engine_kwargs"]))  # noqa: E731
    monkeypatch.setattr(index, "PatientStorage", note)
    one = Index(url, tmp_path)
    assert opened == [(url, options)]
    assert isinstance(one.lock, index.FileLock) == locks


def test_a_worker_s_heart_beats_until_its_trial_has_ended(indexed, monkeypatch, caplog):
    """Though the database may not answer for a while."""
    trial, beats, enough = SimpleNamespace(_trial_id=17, number=3), [], threading.Event()

    def record(trial_id):
        beats.append(trial_id)
        if len(beats) == 3:
            enough.set()
        raise optuna.exceptions.StorageInternalError("locked")

    monkeypatch.setattr(index, "HEARTBEAT_SECONDS", 0.001)
    indexed.storage = SimpleNamespace(record_heartbeat=record)
    with indexed.heartbeat(trial):
        assert enough.wait(5)
    assert {*beats} == {17}
    assert "heartbeat of trial 3 failed: locked" in caplog.text
    assert not any(thread.name.endswith("(beat)") for thread in threading.enumerate())


def test_the_time_that_trials_took_is_that_of_those_that_have_any(indexed, store):
    study = indexed.open("one", ("psnr",))
    indexed.enqueue(study, [({"seed": 0}, None)])
    assert indexed.seconds(study) == 0
    for seed, seconds in ((1, 10.0), (2, 20.5)):
        run = made(store, config=smoke(seed=seed), train_seconds=seconds)
        indexed.add(study, [({"seed": seed}, [run])], ("psnr",), {})
    assert indexed.seconds(study) == 30.5


def test_what_optuna_refuses_of_a_trial_under_way_is_told(indexed, store):
    """Only a trial that has ended elsewhere is left as it is."""
    study = indexed.open("one", ("psnr",))
    trial, run = taken(indexed, study), made(store)
    trial.set_user_attr = refuse = Mock(side_effect=ValueError("not like this"))
    with pytest.raises(ValueError, match="not like this"):
        indexed.tell(study, trial, [run], ("psnr",))
    study.tell(trial, state=TrialState.FAIL)
    indexed.tell(study, trial, [run], ("psnr",))
    assert refuse.call_count == 2
    assert study.trials[0].state == TrialState.FAIL


def test_of_several_runs_that_failed_the_first_says_why(indexed, store):
    study = indexed.open("one", ("psnr",))
    statuses = ("finished", "diverged", "crashed")
    runs = [made(store, status, config=smoke(seed=seed)) for seed, status in enumerate(statuses)]
    indexed.tell(study, taken(indexed, study), runs, ("psnr",))
    assert study.trials[0].user_attrs["status"] == "diverged"
    assert study.trials[0].user_attrs["reason"] == "it diverged"
    assert study.trials[0].user_attrs["run_id"] == runs[0].folder.name


def test_pictures_of_different_names_are_kept_apart(indexed, tmp_path):
    study, paths = indexed.open("study", ("psnr",)), [tmp_path / "a.png", tmp_path / "b.png"]
    for round_ in (b"1", b"2"):
        for path in paths:
            path.write_bytes(path.name.encode() + round_)
        indexed.attach(study, "", [(path.stem, path) for path in paths])
    kept = {meta.filename: meta.artifact_id for meta in get_all_artifact_meta(study)}
    folder = indexed.folder / "artifacts"
    assert {name: (folder / artifact).read_bytes() for name, artifact in kept.items()} == {
        "a.png": b"a.png2",
        "b.png": b"b.png2",
    }
    assert get_note(study).index(kept["a.png"]) < get_note(study).index(kept["b.png"])


def test_a_search_trial_is_rebuilt_when_all_its_seeds_have_ended(indexed, store):
    """Or one of them failed; with the distributions that it was drawn from."""
    rows, spaces = {}, {"beta": {"low": 0.1, "high": 4.0, "log": True}}
    for beta, statuses in ((0.25, ("finished", "finished")), (0.5, ("finished", "unfinished")), (2.0, ("crashed",))):
        for seed, status in enumerate(statuses):
            run = made(store, status, config=smoke(beta=beta, seed=seed), psnr=10.0 * beta + seed)
            rows[run.folder.name] = {"backbone": "cnn", "beta": beta, "seed": seed}
    header = {"study": "s", "sweep": ["beta"], "metrics": ["psnr"], "kind": "search", "space": spaces}
    store.extend_study("s-smoke", header, rows)
    assert index.rebuild(indexed, store, "s-smoke") == 2
    trials = indexed.trials(indexed.open("s-smoke-cnn", ("psnr",)))
    assert [(trial.params, trial.value) for trial in trials] == [({"beta": 0.25}, 3.0), ({"beta": 2.0}, None)]
    assert {trial.distributions["beta"] for trial in trials} == {FloatDistribution(0.1, 4.0, log=True)}
    assert index.rebuild(indexed, store, "s-smoke") == 0


@pytest.mark.parametrize("url", ["://me:secret@h/x", "postgresql://me:sec@ret@h/x", "foo://me:secret@h/x"])
def test_the_variable_that_names_a_database_which_cannot_be_is_named(tmp_path, monkeypatch, url):
    """And its password is not."""
    monkeypatch.setenv("VQBENCH_STORAGE", url)
    with pytest.raises(UserError, match="name a database with VQBENCH_STORAGE, such as sqlite:///") as told:
        Index(storage_url(None, tmp_path), tmp_path)
    assert "sec" not in str(told.value)
    monkeypatch.delenv("VQBENCH_STORAGE")
    with pytest.raises(UserError, match="name a database with --storage, such as sqlite:///"):
        Index(url, tmp_path)


def test_a_storage_that_cannot_be_opened_is_told_in_one_line(tmp_path, monkeypatch):
    """And which package a server's driver comes with."""

    def refuse(error):
        def storage(*given, **more):
            raise error

        monkeypatch.setattr(index, "PatientStorage", storage)
        with pytest.raises(UserError) as told:
            Index("postgresql://me:secret@host/x", tmp_path)
        return str(told.value)

    where = "postgresql://me:***@host/x"
    fix = "pip install 'vqbench[postgres]', and let the URL begin with postgresql+psycopg://"
    assert refuse(ImportError(name="psycopg2")) == f"there is no driver for {where}; {fix}"
    fix = "name a database with --storage, such as sqlite:///studies.db or postgresql+psycopg://USER:PASSWORD@HOST/NAME"
    assert refuse(ValueError("\nrefused\n(details)")) == f"cannot open {where} (refused); {fix}"


def test_the_driver_of_another_server_is_asked_for_by_its_own_name(tmp_path):
    with pytest.raises(UserError) as error:
        Index("mysql+mysqldb://me:secret@host/x", tmp_path)
    driver = "there is no driver for mysql+mysqldb://me:***@host/x; install the Python package that has MySQLdb"
    assert str(error.value) == driver


@pytest.mark.parametrize("name", ["a?b", "p%41", "x{y}", "ü #1"])
def test_a_database_lies_in_the_results_however_they_are_called(tmp_path, name):
    folder = tmp_path / name / "studies"
    folder.mkdir(parents=True)
    Index(address.default_url(tmp_path / name), folder).storage.engine.dispose()
    assert (folder / "optuna.db").is_file()
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("part", ["-journal", "-wal", "-shm"])
def test_a_pipe_beside_a_database_is_not_waited_for(tmp_path, part):
    place = tmp_path / "optuna.db"
    Index(f"sqlite:///{place}", tmp_path).storage.engine.dispose()
    os.mkfifo(f"{place}{part}")
    with pytest.raises(UserError, match=f"optuna.db{part} is not a file, so no part of a database; move it away"):
        Index(f"sqlite:///{place}", tmp_path)


@pytest.mark.parametrize("what", ["pipe", "folder", "link"])
def test_what_is_in_the_place_of_a_database_is_named_with_the_fix(tmp_path, what):
    place = tmp_path / "optuna.db"
    makes = {"pipe": os.mkfifo, "folder": Path.mkdir, "link": lambda path: path.symlink_to(tmp_path / "no" / "x.db")}
    makes[what](place)
    with pytest.raises(UserError) as error:
        Index(f"sqlite:///{place}", tmp_path)
    told = f"{place} is not a file, so no part of a database; move it away"
    if what == "link":
        told = f"the database {place} cannot be made, as there is no folder {tmp_path / 'no'}; make that"
    assert str(error.value) == f"{told}, or name another database with --storage"


def test_a_link_to_a_database_that_is_not_there_yet_is_followed(tmp_path):
    (tmp_path / "optuna.db").symlink_to(tmp_path / "x.db")
    Index(f"sqlite:///{tmp_path / 'optuna.db'}", tmp_path).storage.engine.dispose()
    assert (tmp_path / "x.db").is_file()


def test_all_that_a_field_may_be_can_be_swept():
    """Texts with choices, switches and numbers; the backbone of a prior's tokenizer may be any, or a model of timm."""
    assert distribution("lpips_net") == CategoricalDistribution(("alex", "vgg"))
    assert distribution("quantizer").choices == tuple(QUANTIZERS)
    assert distribution("augment").choices == tuple(AUGMENTATIONS)
    assert distribution("backbone").choices == (*BACKBONES, "timm")
    assert distribution("gan_adaptive") == CategoricalDistribution((False, True))
    assert distribution("steps") == IntDistribution(0, 2**31 - 1)
    assert distribution("lr") == FloatDistribution(0.0, float(2**31 - 1))
    assert distribution("entropy_weight") == distribution("lr")  # though it may be left open


@pytest.mark.parametrize("name", ["config.json", "metrics.json"])
def test_a_damaged_run_is_a_trial_that_failed_with_its_reason(indexed, store, name):
    study, run = indexed.open("one", ("psnr",)), made(store)
    (run.folder / name).write_text("{")
    indexed.add(study, [({"beta": 0.25, "seed": 0}, [run])], ("psnr",), {})
    (trial,) = study.get_trials()
    assert (trial.state.name, trial.user_attrs["status"]) == ("FAIL", "damaged")
    assert trial.user_attrs["reason"].startswith(f"{run.folder / name} is damaged")


def test_a_run_without_the_metric_that_a_study_ranks_by_fails_its_trial(indexed, store):
    """Such as FID, of a run that was scored where Inception's weights were not to be had."""
    study, run = indexed.open("one", ("fid",)), made(store)
    indexed.add(study, [({"beta": 0.25, "seed": 0}, [run])], ("fid",), {})
    assert [trial.state.name for trial in study.get_trials()] == ["FAIL"]


def test_a_metric_that_this_version_does_not_know_is_told(indexed):
    with pytest.raises(UserError, match=r"^study one is ranked by 'beauty', which is no metric of this version$"):
        indexed.open("one", ("psnr", "beauty"))


# -- the address of the database, and what is written of runs that ended elsewhere ------------------------------------


def test_the_environment_may_name_the_database(tmp_path, monkeypatch):
    """It keeps a password off the command line; empty it says nothing."""
    monkeypatch.setenv("VQBENCH_STORAGE", "postgresql://me:secret@host/x")
    assert address.default_url(tmp_path) == "postgresql://me:secret@host/x"
    monkeypatch.setenv("VQBENCH_STORAGE", "")
    assert address.default_url(tmp_path) == f"sqlite:///{tmp_path}/studies/optuna.db"


def test_a_trial_whose_runs_lack_a_metric_of_the_study_has_failed(indexed, store):
    """Such as one that was not asked for when they were scored."""
    study = indexed.open("one", ("psnr", "ssim"))
    run = made(store, psnr=21.0)
    indexed.add(study, [({"seed": 0}, [run])], ("psnr", "ssim"), {})
    indexed.tell(study, taken(indexed, study), [run], ("psnr", "ssim"))
    assert [(trial.state, trial.values) for trial in study.trials] == 2 * [(TrialState.FAIL, None)]
    assert study.trials[0].user_attrs["psnr"] == 21.0


def test_a_run_that_ended_elsewhere_is_described_as_one_that_ended_here(indexed, store):
    """Value, attributes and note, for finished, failed and pruned ones."""
    study = indexed.open("one", ("psnr",))
    for seed, status in enumerate(("finished", "crashed", "pruned")):
        run = made(
            store, status, [{"step": 1, "reconstruction": 0.5, "quantizer": 0.5, "seconds": 2.5}], smoke(seed=seed)
        )
        trial = taken(indexed, study, {"seed": seed})
        indexed.tell(study, trial, [run], ("psnr",))
        indexed.add(study, [({"seed": seed}, [run])], ("psnr",), {})
        here, there = (study.trials[number] for number in (2 * seed, 2 * seed + 1))
        assert (here.state, here.values, here.user_attrs) == (there.state, there.values, there.user_attrs)
        notes = [get_note(optuna.Trial(study, one._trial_id)) for one in (here, there)]
        assert notes[0] == notes[1] != ""


def test_times_that_were_not_taken_count_nothing(store):
    assert conversion.seconds(made(store, config=smoke(seed=4), train_seconds=None, score_seconds=4.0)) == 4


def test_a_sqlite_database_does_not_wait_for_the_disk(tmp_path):
    """It has nothing that the runs have not."""
    opened = Index(f"sqlite:///{tmp_path}/x.db", tmp_path)
    for _ in range(2):
        with opened.storage.engine.connect() as connection:
            assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 0
        opened.storage.engine.dispose()


def test_the_reason_of_an_address_that_is_not_shown_is_not_shown_either(tmp_path):
    """A driver that takes a part of the password for the host says so."""
    with pytest.raises(UserError) as error:
        Index("postgresql+psycopg://bob:hun@ter2@127.0.0.1:1/db", tmp_path)
    assert "ter2" not in str(error.value)
    assert str(error.value).endswith(
        f"an @ too many (write %40 in a password); name a database with --storage, such as {EXAMPLES}"
    )


# -- what lacks something, or was taken away meanwhile -----------------------------------------------------------------


@pytest.mark.parametrize("config", [smoke(steps=3), PriorConfig("a-tokenizer", "rnn", steps=3)], ids=["runs", "priors"])
def test_a_row_of_a_history_that_lacks_its_loss_has_none(config):
    """It is no reason to fail: a later row may have one."""
    kind = KINDS[config.SHELF]
    assert math.isnan(kind.loss(config, {"step": 1}))
    assert "nan" in kind.figures({"step": 1})
    assert KINDS["runs"].figures({"step": 1, "reconstruction": 0.5}) == "loss 0.5000"  # a latent without codes


@pytest.mark.parametrize(("last", "value"), [({}, None), ({"reconstruction": 0.5}, -0.5)])
def test_a_pruned_trial_whose_last_loss_is_missing_is_worth_nothing(indexed, store, last, value):
    study = indexed.open("one", ("psnr",))
    run = made(store, "pruned", [{"step": 1, "reconstruction": 0.7}, {"step": 2, **last}], smoke(steps=2))
    indexed.add(study, [({"beta": 0.25}, [run])], ("psnr",), {})
    assert [(trial.state, trial.value) for trial in study.trials] == [(TrialState.PRUNED, value)]


@pytest.mark.parametrize("kind", ["search", "ablation"])
def test_a_value_outside_what_a_study_may_draw_is_damage_of_its_file(indexed, store, kind):
    run = made(store, config=smoke(beta=0.5))
    space = {"beta": {"low": 1.0, "high": 4.0}} if kind == "search" else {}
    header = {"study": "s", "sweep": ["beta"], "metrics": ["psnr"], "kind": kind, "space": space}
    beta = 0.5 if kind == "search" else 1e300
    store.extend_study("s-smoke", header, {run.folder.name: {"backbone": "cnn", "beta": beta, "seed": 0}})
    with pytest.raises(Damaged, match=r"s-smoke\.json is damaged: ValueError "):
        index.rebuild(indexed, store, "s-smoke")


def test_the_folder_of_pictures_is_made_again_when_it_was_removed(indexed, store, tmp_path):
    study, run = indexed.open("one", ("psnr",)), made(store)
    (run.folder / "reconstructions.png").write_bytes(b"a picture")
    for use in (
        lambda: indexed.tell(study, taken(indexed, study), [run], ("psnr",)),
        lambda: indexed.attach(study, "", [("Picture", run.folder / "reconstructions.png")]),
        lambda: indexed.attach(study, "again", [("Picture", run.folder / "reconstructions.png")]),
    ):
        shutil.rmtree(indexed.folder / "artifacts")
        use()
        assert [path.read_bytes() for path in (indexed.folder / "artifacts").iterdir()] == [b"a picture"]


def test_a_trial_that_waits_again_is_left_to_whoever_takes_it(indexed, store, monkeypatch):
    """Its result is in the store; given back, it is there once."""
    study = indexed.open("one", ("psnr",))
    trial = taken(indexed, study)
    monkeypatch.setattr(study, "tell", Mock(side_effect=ValueError("Cannot tell a WAITING trial.")))
    with pytest.raises(ValueError, match="WAITING"):
        indexed.give_back(study, trial)  # it is under way, so that something else is wrong
    indexed.storage.set_trial_state_values(trial._trial_id, TrialState.WAITING)
    indexed.tell(study, trial, [made(store)], ("psnr",))
    indexed.give_back(study, trial)
    assert study.tell.call_count == 3
    assert [one.state for one in study.trials] == [TrialState.WAITING]


@pytest.mark.parametrize(
    "url",
    [
        *("sqlite://", "sqlite:///", "sqlite:///:memory:", "sqlite+pysqlite://", "sqlite:///?timeout=5"),
        "sqlite:///file::memory:?cache=shared&uri=true",
    ],
)
def test_a_database_in_memory_is_refused(tmp_path, monkeypatch, url):
    """It would end with the command, whether named by --storage or by the environment."""
    told = f"the database {url} is kept nowhere; name a file, such as sqlite:///studies.db, or a server"
    for given in (url, None):
        with pytest.raises(UserError) as error:
            address.storage_url(given, tmp_path)
        assert str(error.value) == told
        monkeypatch.setenv("VQBENCH_STORAGE", url)
    for url in ("sqlite:///x.db", "sqlite:////tmp/memory/x.db", "postgresql://host/x"):
        assert address.storage_url(url, tmp_path) == url
