"""Searches: at one rate or over rate and distortion, on validation alone; and what confirms them on the test."""

import re

import numpy as np
import optuna
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.analysis import searches
from bench.analysis.frames import frame
from bench.analysis.statistics import role_verdicts
from bench.analysis.tables import text_of
from bench.core.errors import UserError
from bench.core.store import Store
from bench.sweeps import index, workers
from bench.sweeps.address import default_url
from bench.sweeps.child import Outcome
from bench.sweeps.definition import Range, Search, parse_study
from bench.sweeps.index import Index
from bench.sweeps.search import make_plan
from bench.tokenizers.config import make_config
from tests.fabricate import fabricate

SPACE = {"beta": Range(0.1, 4.0, log=True), "codebook_size": (64, 128, 256), "grid_size": (4, 8)}
SEARCH = Search("search", SPACE, backbones=("cnn",))
CONCLUDE = workers.conclude
SMOKE = ("--preset", "smoke")  # whose rate is 16 codes of 7 bits


def planned(tmp_path, *flags, study=SEARCH):
    words = [*SMOKE, "--results", str(tmp_path), *flags]
    return make_plan(study, parse_study(study, "", words))


class Overfitting:
    """In place of a training process: on validation a run is the better the larger its β, on the test the worse."""

    def __init__(self):
        self.configs = []

    def __call__(self, config, store, fid_weights, threads, watch, timeout, track=None, processes=1):
        self.configs.append(config)
        sign = 1 if config.split == "val" else -1
        fabricate(store, config, sign * 0.02 * config.beta, 0.0005 * config.seed, scored_on=config.split)
        return Outcome("finished", "")


@pytest.fixture
def child(monkeypatch):
    fake = Overfitting()
    monkeypatch.setattr(workers, "run_in_child", fake)
    monkeypatch.setattr(workers, "prepare", lambda *arguments: None)
    monkeypatch.setattr(workers, "IDLE_SECONDS", 0.05)
    monkeypatch.setattr(workers, "conclude", lambda plan, index: None)
    return fake


def start(tmp_path, *flags, study=SEARCH):
    return workers.main(study, "", [*SMOKE, "--results", str(tmp_path), *flags])


# -- one rate ---------------------------------------------------------------------------------------------------------


def test_at_one_rate_k_follows_from_the_grid(tmp_path):
    found = planned(tmp_path, "--bits-per-image", "256")
    assert found.space == {"beta": SPACE["beta"], "grid_size": (4, 8)}
    for side, codes in ((4, 2**16), (8, 16)):
        (config,) = found.configs("cnn", {"beta": 0.5, "grid_size": side})
        assert (config.codebook_size, config.tokens * np.log2(config.codebook_size)) == (codes, 256)
    assert planned(tmp_path, "--bits-per-image", "112").space["grid_size"] == (4,)  # 64 codes have no 1.75 bits
    fixed = Search("search", {"beta": SPACE["beta"]}, backbones=("cnn",))  # the preset's grid
    (config,) = planned(tmp_path, "--bits-per-image", "64", study=fixed).configs("cnn", {"beta": 0.5})
    assert (config.grid_size, config.codebook_size) == (4, 16)


@pytest.mark.parametrize("rate", [100, 15, 16 * 25, 64 * 25])
def test_a_rate_that_no_grid_has_is_refused(tmp_path, rate):
    with pytest.raises(UserError, match=rf"bits_per_image is {rate}, .* multiple of 16 or 64"):
        planned(tmp_path, "--bits-per-image", str(rate))


def test_every_trial_of_one_rate_has_it(child, tmp_path):
    assert start(tmp_path, "--bits-per-image", "256", "--trials", "8") == 0
    assert len(child.configs) == 8
    assert {config.tokens * np.log2(config.codebook_size) for config in child.configs} == {256}
    assert {config.grid_size for config in child.configs} == {4, 8}


# -- validation alone -------------------------------------------------------------------------------------------------


def test_a_search_sees_validation_alone(child, tmp_path, capsys):
    assert start(tmp_path, "--trials", "3") == 0
    assert {config.split for config in child.configs} == {"val"}
    with pytest.raises(SystemExit) as stopped:
        start(tmp_path, "--trials", "3", "--split", "test")
    assert stopped.value.code == 2
    assert "--split" in capsys.readouterr().err
    assert Search("s", {}, settings={"split": "test", "lr": 0.1}).settings == {"split": "val", "lr": 0.1}


def test_the_presets_own_values_are_tried_first(child, tmp_path):
    start(tmp_path, "--trials", "3")
    own = make_config("cnn", "smoke")
    first, *others = [(config.beta, config.codebook_size, config.grid_size) for config in child.configs]
    assert first == (own.beta, own.codebook_size, own.grid_size)
    assert first not in others
    start(tmp_path, "--trials", "5")  # goes on, and does not try them again
    assert [config.beta for config in child.configs].count(own.beta) == 1
    assert len(child.configs) == 5  # nor do they take the place of another trial


def test_where_the_space_does_not_hold_the_presets_values_all_are_drawn(child, tmp_path):
    study = Search("search", {**SPACE, "codebook_size": (64, 256)}, backbones=("cnn",))
    assert start(tmp_path, "--trials", "2", study=study) == 0
    assert {config.codebook_size for config in child.configs} <= {64, 256}


# -- the best of it ---------------------------------------------------------------------------------------------------


@given(
    st.lists(
        st.tuples(st.sampled_from("ab"), st.sampled_from([64, 128, 256]), st.integers(0, 5), st.integers(0, 5)),
        min_size=1,
        max_size=12,
    ),
    st.sampled_from(["lpips_vgg", "psnr"]),
)
def test_front_and_winners_are_those_of_brute_force(points, metric):
    found = pd.DataFrame(points, columns=["backbone", searches.RATE, metric, "psnr" if metric != "psnr" else "ssim"])
    sign = 1 if metric == "lpips_vgg" else -1
    on_front = searches.front(found, metric)
    for index_, one in found.iterrows():
        others = found[(found.backbone == one.backbone) & (found.index != index_)]
        less, as_few = others[searches.RATE] < one[searches.RATE], others[searches.RATE] <= one[searches.RATE]
        better, as_good = sign * others[metric] < sign * one[metric], sign * others[metric] <= sign * one[metric]
        beaten = (as_few & better) | (less & as_good)
        twins = (others[searches.RATE] == one[searches.RATE]) & (others[metric] == one[metric])
        if beaten.any():
            assert not on_front[index_]
        elif not twins.any():
            assert on_front[index_]
    best = searches.winners(found, metric)
    assert not best.duplicated(["backbone", searches.RATE]).any()
    for _, own in found.groupby(["backbone", searches.RATE]):
        (winner,) = best[(best.backbone == own.backbone.iloc[0]) & (best[searches.RATE] == own[searches.RATE].iloc[0])][
            metric
        ]
        assert winner == (own[metric].min() if sign == 1 else own[metric].max())


def test_a_trial_is_the_mean_of_its_seeds_and_one_without_all_of_them_is_none(tmp_path):
    store = Store(tmp_path)
    for beta, seeds in ((0.5, (0, 1)), (1.0, (0, 1)), (2.0, (0,))):
        for seed in seeds:
            fabricate(store, make_config("cnn", "smoke", beta=beta, seed=seed, split="val"), 0.01 * beta + 0.001 * seed)
    table = frame(store.runs())
    found = searches.trials(table, ["beta"])
    assert found.beta.tolist() == [0.5, 1.0]
    for row in found.itertuples():
        assert row.lpips_vgg == pytest.approx(table[table.beta == row.beta].lpips_vgg.mean())
    assert searches.trials(table.iloc[:0], ["beta"]).empty
    assert searches.goal(("bits_per_image", "psnr")) == "psnr"


# -- confirmed on the test --------------------------------------------------------------------------------------------


def test_a_search_that_overfits_validation_is_exposed_by_the_test(child, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(workers, "conclude", CONCLUDE)
    assert start(tmp_path, "--trials", "6", "--bits-per-image", "112", "--confirm", "4", "--seeds", "0", "1") == 0
    trials = [config for config in child.configs if config.split == "val"]
    fresh = [config for config in child.configs if config.split == "test"]
    assert (len(trials), len(fresh)) == (12, 8)
    assert {config.seed for config in fresh} == {2, 3, 4, 5}
    best = max(config.beta for config in trials)
    assert {config.beta for config in fresh} == {best, 0.25}
    unlike = {"beta", "seed", "split"}
    (alike,) = {tuple((k, v) for k, v in vars(one).items() if k not in unlike) for one in child.configs}
    assert ("steps", make_config("cnn", "smoke").steps) in alike
    printed = " ".join(capsys.readouterr().out.split())
    assert "default (cnn) better than winner (cnn) by" in printed
    text = (tmp_path / "reports" / "search-smoke-seeds=0_1-bits_per_image=112" / "tables.md").read_text()
    assert "Confirmed on fresh seeds" in text
    told = text.split("## ")[0]
    (found,) = re.findall(rf"cnn, beta {text_of(best)}, .*: LPIPS vgg (\S+) promised on validation, .*", told)
    assert f"LPIPS vgg {found} promised on validation, " in printed
    promise, winner, default = map(float, re.findall(r"\b0\.\d{3}\b(?= promised| on the test)", told))
    assert promise < default < winner
    assert "default (cnn) better than winner (cnn) by" in told
    assert "on 64 test images" in text
    row = next(line for line in text.splitlines() if line.startswith("| cnn | winner |"))
    seen, test = (float(part.split()[0].strip("*")) for part in (row.split("|")[6], row.split("|")[8]))
    assert seen < 0.45 < test  # lower is better


def test_what_confirms_a_search_is_run_once_and_comes_back_with_rebuild(child, tmp_path):
    flags = ("--trials", "3", "--bits-per-image", "112", "--confirm", "2")
    for _ in range(2):
        assert start(tmp_path, *flags) == 0
    assert len(child.configs) == 3 + 2 * 2
    name = "search-smoke-bits_per_image=112"
    record = Store(tmp_path).study(name)
    assert len(record["runs"]) == 3
    roles = [(row["role"], row["seed"]) for row in record["confirmed"].values()]
    assert sorted(roles) == [("default", 1), ("default", 2), ("winner", 1), ("winner", 2)]
    (tmp_path / "studies" / "optuna.db").unlink()
    built = Index(default_url(tmp_path), tmp_path / "studies")
    assert index.rebuild(built, Store(tmp_path), name) == 7
    assert optuna.study.get_all_study_names(built.storage) == [f"{name}-cnn", f"{name}-confirm-cnn"]
    assert start(tmp_path, *flags) == 0
    assert len(child.configs) == 7


def test_a_default_that_wins_is_confirmed_once(child, tmp_path):
    study = Search("search", {"beta": (0.1, 0.25)}, backbones=("cnn",))
    assert start(tmp_path, "--trials", "3", "--confirm", "2", study=study) == 0
    roles = [row["role"] for row in Store(tmp_path).study("search-smoke")["confirmed"].values()]
    assert roles == ["winner, default"] * 2


def test_without_a_trial_at_the_presets_rate_there_is_nothing_to_confirm(child, tmp_path, capsys):
    study = Search("search", {"codebook_size": (64, 256)}, backbones=("cnn",))
    assert start(tmp_path, "--trials", "2", "--confirm", "2", study=study) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "no trial of cnn has the preset's 112 bits per image" in said
    assert "--bits-per-image 112" in said


def test_roles_are_compared_within_a_backbone_and_winners_between_them(tmp_path):
    store = Store(tmp_path)
    roles = {}
    for backbone, winner in (("cnn", 0.02), ("vit", 0.06)):
        for role, beta, quality in (("winner", 1.0, winner), ("default", 0.25, 0.0)):
            for seed in range(4):
                config = make_config(backbone, "smoke", beta=beta, seed=seed)
                roles[fabricate(store, config, quality, 0.0005 * seed**2).folder.name] = role
    table = frame(store.runs())
    found = role_verdicts(table.assign(role=table.run_id.map(roles)), ("lpips_vgg",))
    assert [(one.a, one.b, one.n) for one in found] == [
        ("winner (cnn)", "default (cnn)", 4),
        ("winner (vit)", "default (vit)", 4),
        ("winner (cnn)", "winner (vit)", 4),
    ]
    assert [one.better for one in found] == ["winner (cnn)", "winner (vit)", "winner (vit)"]
    assert found[2].difference == pytest.approx(0.04, abs=0.008)  # without the defaults, which would halve it


@pytest.mark.parametrize("flags", [("--confirm", "-1"), ("--bits-per-image", "0"), ("--trials", "0")])
def test_numbers_of_no_use_are_refused(child, tmp_path, flags, capsys):
    assert start(tmp_path, *flags) == 2
    assert f"{flags[0]} is {flags[1]}" in " ".join(capsys.readouterr().err.split())
