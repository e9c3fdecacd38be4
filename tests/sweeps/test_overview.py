"""Pages on all backbones of a study: a trial per cell, worth its mean over seeds."""

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna_dashboard import get_note

from bench.core.store import Store
from bench.priors.config import PriorConfig
from bench.sweeps import index, overview
from bench.sweeps.address import default_url
from bench.sweeps.index import Index
from bench.tokenizers.config import make_config
from tests.fabricate import fabricate, fabricate_failed, fabricate_prior

HEADER = {"study": "s", "sweep": ["beta"], "metrics": ["psnr"], "kind": "ablation", "space": {}}


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path)


@pytest.fixture
def indexed(tmp_path) -> Index:
    return Index(default_url(tmp_path), tmp_path / "studies")


def listed(store, values, name="s", header=HEADER, status="finished"):
    """Runs with a PSNR each, by (backbone, β, seed), listed in a study's file."""
    rows = {}
    for (backbone, beta, seed), psnr in values.items():
        config = make_config(backbone, "smoke", beta=beta, seed=seed, device="cpu")
        run = fabricate(store, config, psnr=psnr) if status == "finished" else fabricate_failed(store, config, status)
        rows[run.folder.name] = {"backbone": backbone, "beta": beta, "seed": seed}
    store.extend_study(name, header, rows)
    return rows


def shown(tmp_path, name="s") -> optuna.Study:
    """As the dashboard reads it."""
    return optuna.load_study(study_name=name, storage=default_url(tmp_path))


def test_the_best_is_the_best_mean_over_seeds_of_all_backbones(store, indexed, tmp_path):
    """And not the luckiest seed; workers' studies have one trial per run beside it."""
    lucky = {("cnn", 0.25, 0): 30.0, ("cnn", 0.25, 1): 10.0}
    steady = {("vit", 0.25, 0): 22.0, ("vit", 0.25, 1): 24.0, ("vit", 0.5, 0): 21.0, ("vit", 0.5, 1): 21.0}
    runs = [*listed(store, {**lucky, **steady})]
    assert index.rebuild(indexed, store, "s") == 6
    (page,) = overview.write(indexed, store, "s")
    assert page.study.study_name == "s"
    assert overview.best(page, "psnr").params == {"backbone": "vit", "beta": 0.25}
    found = shown(tmp_path)
    assert found.metric_names == ["psnr"]
    assert [(trial.params, trial.value) for trial in found.trials] == [
        ({"backbone": "cnn", "beta": 0.25}, 20.0),
        ({"backbone": "vit", "beta": 0.25}, 23.0),
        ({"backbone": "vit", "beta": 0.5}, 21.0),
    ]
    about = found.best_trial.user_attrs
    assert found.best_params == {"backbone": "vit", "beta": 0.25}
    assert (about["n"], about["seeds"], about["psnr"], about["psnr_std"]) == (2, "0, 1", 23.0, pytest.approx(2**0.5))
    assert about["runs"].split() == runs[2:4]
    ranges = {"backbone": CategoricalDistribution(("cnn", "vit")), "beta": FloatDistribution(0.25, 0.5)}
    assert all(trial.distributions == ranges for trial in found.trials)
    assert shown(tmp_path, "s-cnn").best_value == 30.0


def test_a_cell_counts_when_all_of_its_seeds_have_ended_well(store, indexed, tmp_path):
    """The mean of those that are there would flatter it."""
    listed(store, {("cnn", 0.25, 0): 30.0, ("cnn", 0.5, 0): 30.0, ("cnn", 1.0, 0): 20.0})
    listed(store, {("cnn", 0.25, 1): 0.0}, status="diverged")
    rows = {"nobody": {"backbone": "cnn", "beta": 0.5, "seed": 1}}
    store.extend_study("s", HEADER, rows)
    overview.write(indexed, store, "s")
    failed, waiting, finished = shown(tmp_path).trials
    assert (failed.state.name, failed.user_attrs["status"], failed.user_attrs["n"]) == ("FAIL", "diverged", 1)
    assert (waiting.state.name, waiting.user_attrs["n"], waiting.user_attrs["psnr"]) == ("WAITING", 1, 30.0)
    assert (finished.state.name, shown(tmp_path).best_value) == ("COMPLETE", 20.0)
    assert "psnr_std" not in finished.user_attrs


def test_what_is_written_again_is_in_the_place_of_what_was_there(store, indexed, tmp_path):
    """More seeds and cells change it; other studies of the database keep their trials and notes."""
    listed(store, {("cnn", 0.25, 0): 20.0, ("cnn", 0.5, 0): 21.0})
    listed(store, {("vit", 0.25, 0): 25.0}, name="other")
    for name in ("s", "other"):
        index.rebuild(indexed, store, name)
        overview.write(indexed, store, name)
    listed(store, {("cnn", 0.25, 1): 30.0, ("vit", 2.5, 0): 15.0})
    for _ in range(2):
        ((study, _),) = overview.write(indexed, store, "s")
        found = shown(tmp_path)
        assert found._study_id == study._study_id
        assert [(trial.number, trial.value) for trial in found.trials] == [(0, 25.0), (1, 21.0), (2, 15.0)]
        assert {trial.distributions["beta"] for trial in found.trials} == {FloatDistribution(0.25, 2.5, log=True)}
        note = get_note(optuna.Trial(found, found.trials[0]._trial_id))
        assert [line.split("|")[1:3] for line in note.splitlines()[2:4]] == [[" 0 ", " 20 "], [" 1 ", " 30 "]]
        attributes = found._storage.get_study_system_attrs(found._study_id)
        assert sum(key.endswith("note_ver") for key in attributes) == 3
    assert [len(shown(tmp_path, name).trials) for name in ("s-cnn", "other", "other-vit")] == [2, 1, 1]
    other = shown(tmp_path, "other")
    assert "vit-ema" in get_note(optuna.Trial(other, other.trials[0]._trial_id))


def test_a_cell_shows_the_picture_of_its_first_seed(store, indexed, tmp_path):
    listed(store, {("cnn", 0.25, 0): 20.0, ("cnn", 0.25, 1): 21.0})
    index.rebuild(indexed, store, "s")
    overview.write(indexed, store, "s")
    (first, _), found = shown(tmp_path, "s-cnn").trials, shown(tmp_path)
    (meta,) = optuna.artifacts.get_all_artifact_meta(first, storage=found._storage)
    note = get_note(optuna.Trial(found, found.trials[0]._trial_id))
    folder = f"/artifacts/{shown(tmp_path, 's-cnn')._study_id}/{first._trial_id}"
    assert note.splitlines()[-1] == f"![reconstructions.png]({folder}/{meta.artifact_id})"


def test_priors_have_a_page_and_two_models_of_timm_are_two_cells(store, indexed, tmp_path):
    """Though the file calls both of these timm; bits per token are the fewer the better."""
    rows = listed(store, {("timm:resnet18", 0.25, 0): 20.0, ("timm:resnet34", 0.25, 0): 21.0})
    priors = {}
    for run_id, bits in zip(rows, (5.0, 4.0), strict=True):
        config = PriorConfig(run_id, "rnn", device="cpu")
        priors[fabricate_prior(store, config, bits, 100.0).folder.name] = {
            **{"prior": "rnn", "backbone": "timm", "beta": 0.25, "seed": 0}
        }
    store.extend_study("s", HEADER, priors, "priors")
    assert [page.study.study_name for page in overview.write(indexed, store, "s")] == ["s", "s-priors"]
    found = shown(tmp_path, "s-priors")
    assert found.best_value == 4.0
    assert [trial.params["backbone"] for trial in found.trials] == ["timm:resnet18", "timm:resnet34"]
    assert found.best_params == {"prior": "rnn", "backbone": "timm:resnet34", "beta": 0.25}


def test_a_search_has_what_it_drew_from_and_its_confirmation_a_page_of_its_own(store, indexed, tmp_path):
    """Scores on validation and on the test are not in one ranking."""
    space = {"beta": {"low": 0.1, "high": 4.0, "log": True}}
    header = {**HEADER, "kind": "search", "space": space}
    listed(store, {("cnn", 0.3, 0): 20.0, ("cnn", 0.3, 1): 22.0, ("vit", 2.0, 0): 19.0}, header=header)
    confirmed = {}
    for role, beta, psnr in (("winner", 0.3, 18.0), ("default", 0.25, 17.0)):
        for seed in (2, 3):
            run = fabricate(store, make_config("cnn", "smoke", beta=beta, seed=seed, device="cpu"), psnr=psnr + seed)
            confirmed[run.folder.name] = {"backbone": "cnn", "beta": beta, "seed": seed, "role": role}
    store.extend_study("s", header, confirmed, "confirmed")
    overview.write(indexed, store, "s")
    found = shown(tmp_path)
    assert [(trial.params["backbone"], trial.value) for trial in found.trials] == [("cnn", 21.0), ("vit", 19.0)]
    assert {trial.distributions["beta"] for trial in found.trials} == {FloatDistribution(0.1, 4.0, log=True)}
    roles = [(trial.params["role"], trial.value) for trial in shown(tmp_path, "s-confirm").trials]
    assert roles == [("winner", 20.5), ("default", 19.5)]


def test_whole_numbers_stay_whole(store, indexed, tmp_path):
    rows = {}
    for size in (64, 1024):
        run = fabricate(store, make_config("cnn", "smoke", codebook_size=size, device="cpu"))
        rows[run.folder.name] = {"backbone": "cnn", "codebook_size": size, "seed": 0}
    store.extend_study("s", {**HEADER, "sweep": ["codebook_size"]}, rows)
    overview.write(indexed, store, "s")
    assert {one.distributions["codebook_size"] for one in shown(tmp_path).trials} == {
        IntDistribution(64, 1024, log=True)
    }
