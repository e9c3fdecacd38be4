"""Searches that judge a tokenizer by what a prior makes of its codes: a trial is the tokenizers, and a prior each."""

import contextlib
import json
import math
import re
import shutil
import threading
from collections import Counter

import optuna
import pandas as pd
import pytest

from bench import study as study_command
from bench.analysis import searches
from bench.analysis.frames import LABELS, METRICS, PRIOR, PRIOR_METRICS, frame
from bench.core.errors import UserError
from bench.core.store import Store
from bench.priors.config import PriorConfig
from bench.sweeps import conversion, workers
from bench.sweeps.address import default_url
from bench.sweeps.child import Outcome
from bench.sweeps.definition import Ablation, Range, Search, parse_study
from bench.sweeps.kinds import KINDS, TOKENIZERS
from bench.sweeps.objectives import objectives
from bench.sweeps.search import make_plan
from bench.tokenizers.config import Config, make_config
from tests.fabricate import fabricate, fabricate_failed, fabricate_prior

SPACE = {"beta": Range(0.1, 4.0, log=True), "codebook_size": (64, 128, 256), "grid_size": (4, 8)}
SEARCH = Search("search", SPACE, backbones=("cnn",))
CONCLUDE = workers.conclude
SMOKE = ("--preset", "smoke", "--device", "cpu")  # whose rate is 16 codes of 7 bits
RATE = ("--bits-per-image", "112")
GFID = ("--metric", "gfid_vgg16", "--prior", "transformer")
CODED = ("--metric", "coded_bits_per_image", "--prior", "transformer")
NAME = "search-smoke-bits_per_image=112-metric=gfid_vgg16-prior=transformer"


def distance(config: Config) -> float:
    """gFID of a fabricated prior: best at β 0.8, whatever LPIPS says, and another one of each seed."""
    return 50.0 + 40 * abs(math.log(config.beta / 0.8)) + 3 * config.seed


def coded(config: Config) -> float:
    """Its bits per token: the fewer, the larger β."""
    return math.log2(config.codebook_size) / (1 + config.beta)


class Trained:
    """In place of training processes: LPIPS is the better the larger β. ``endings``: how others than the n-th call
    end; ``asked``: what a run was answered whose curve is hopeless."""

    def __init__(self):
        self.calls, self.asked, self.endings = [], [], {}

    def __call__(self, config, store, fid_weights, threads, watch, timeout, track=None, processes=1):
        self.calls.append(config)
        ending = self.endings.get(len(self.calls), "finished")
        hopeless = (
            {"bits_per_token": 99.0} if isinstance(config, PriorConfig) else {"reconstruction": 99.0 * self.place}
        )
        self.asked += [watch([{"step": step, **hopeless}]) for step in (config.steps // 2, config.steps)]
        if ending == "interrupted":
            return Outcome("interrupted")
        if ending != "finished":
            fabricate_failed(store, config, ending)
        elif isinstance(config, PriorConfig):
            below = store.named(config.tokenizer).settings(Config)
            fabricate_prior(store, config, coded(below), distance(below))
        else:
            fabricate(store, config, 0.02 * config.beta, 0.0005 * config.seed, scored_on=config.split)
        return Outcome(ending, f"it {ending}")

    @property
    def place(self) -> int:
        return len(self.calls)

    @property
    def tokenizers(self) -> list[Config]:
        return [config for config in self.calls if isinstance(config, Config)]

    @property
    def priors(self) -> list[PriorConfig]:
        return [config for config in self.calls if isinstance(config, PriorConfig)]


@pytest.fixture
def child(monkeypatch):
    fake = Trained()
    monkeypatch.setattr(workers, "run_in_child", fake)
    monkeypatch.setattr(workers, "prepare", lambda *arguments: None)
    monkeypatch.setattr(workers, "IDLE_SECONDS", 0.05)
    monkeypatch.setattr(workers, "conclude", lambda plan, index: None)
    return fake


@pytest.fixture
def reported(monkeypatch):
    """Searches end in a report, without its charts."""
    monkeypatch.setattr(workers, "conclude", CONCLUDE)
    monkeypatch.setattr("bench.analysis.charts.draw", lambda *arguments: [])


def start(tmp_path, *flags, study=SEARCH):
    return workers.main(study, "", [*SMOKE, "--results", str(tmp_path), *flags])


def indexed(tmp_path) -> dict[str, optuna.Study]:
    """By name those that trials are taken from."""
    url = default_url(tmp_path)
    found = [optuna.load_study(study_name=name, storage=url) for name in optuna.get_all_study_names(url)]
    return {one.study_name: one for one in found if "overview" not in one.user_attrs}


def table_of(text: str, title: str) -> list[dict[str, str]]:
    """Rows of the first Markdown table below ``title``."""
    lines = text.split(f"## {title}")[1].strip().splitlines()
    rows = [[word.strip(" *") for word in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    end = next((i for i, line in enumerate(lines) if i and not line.startswith("|")), len(lines))
    heads = [word.replace("\u00a0", " ").strip(" ↓↑") for word in rows[0]]
    return [dict(zip(heads, row, strict=True)) for row in rows[2:end]]


# -- what is optimised ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metrics", "priors", "rate", "found"),
    [
        ((), (), None, ("lpips_vgg", "bits_per_image")),
        ((), (), 576, ("lpips_vgg",)),
        (("psnr",), (), None, ("psnr",)),
        (("gfid_vgg16",), ("rnn",), 576, ("gfid_vgg16",)),
        (("gfid_vgg16",), ("rnn",), None, ("gfid_vgg16", "bits_per_image")),
        (
            ("recall_vgg16", "precision_vgg16"),
            ("rnn", "rnn"),
            None,
            ("recall_vgg16", "precision_vgg16", "bits_per_image"),
        ),
        (("bits_per_image", "gfid_vgg16"), ("rnn",), None, ("bits_per_image", "gfid_vgg16")),
        (("coded_bits_per_image",), ("independent",), None, ("lpips_vgg", "coded_bits_per_image")),
        (("coded_bits_per_image",), ("rnn",), 576, ("lpips_vgg", "coded_bits_per_image")),
        (("psnr", "coded_bits_per_image"), ("rnn",), None, ("psnr", "coded_bits_per_image")),
        (("gfid_vgg16", "coded_bits_per_image"), ("rnn",), None, ("gfid_vgg16", "coded_bits_per_image")),
    ],
)
def test_generation_is_judged_at_one_rate_or_beside_it_and_coded_bits_beside_a_distortion(metrics, priors, rate, found):
    assert objectives(metrics, priors, rate) == found


REFUSED = [
    (("--metric", "gfid_vgg16"), "metric 'gfid_vgg16' is of a prior over the codes; name one, such as --prior"),
    (("--metric", "psnr", "--prior", "rnn"), "--prior rnn would change no psnr; add --metric gfid_vgg16"),
    (("--prior", "rnn"), "--prior rnn would change no lpips_vgg or bits_per_image"),
    ((*GFID, "mamba"), "--prior is transformer, mamba, and a trial of a search is judged by one prior; name one"),
    (("--metric", "bits_per_image", *CODED[1:]), "--metric has two rates, bits_per_image and coded_bits_per_image"),
    (("--metric", "coded_bits_per_token", "--prior", "rnn"), "metric 'coded_bits_per_token' cannot be optimised"),
    (("--metric", "params_prior", "--prior", "rnn"), "metric 'params_prior' cannot be optimised"),
    (("--metric", "gfid_vgg16", "--prior", "gpt"), "unknown prior 'gpt'; choose from"),
    (("--prior-steps", "77"), "--prior-steps is 77, and no prior is trained; add --prior transformer and --metric"),
    ((*GFID, "--samples", "1"), "samples is 1"),
]


@pytest.mark.parametrize(("flags", "said"), REFUSED, ids=[" ".join(flags) for flags, _ in REFUSED])
def test_what_does_not_fit_together_is_one_sentence_and_trains_nothing(child, tmp_path, capsys, flags, said):
    assert start(tmp_path, *flags) == 2
    err = " ".join(capsys.readouterr().err.split())
    assert said in err
    assert err.count("error:") == 1
    assert not child.calls
    assert not Store(tmp_path).studies()


def test_what_could_not_be_confirmed_in_the_end_is_refused_at_the_start(child, tmp_path, capsys):
    """The trial of the preset's values sets the rate at which winners are confirmed: it has to be one."""
    assert start(tmp_path, *CODED, "--confirm", "2", "--preset", "vqgan64") == 2
    assert "are not in the space, and their trial would set the rate" in " ".join(capsys.readouterr().err.split())
    assert not child.calls


def test_an_ablation_is_ranked_by_scores_of_tokenizers_alone():
    study = Ablation("a", {"beta": (0.25,)}, backbones=("cnn",), seeds=(0,), priors=("rnn",))
    with pytest.raises(UserError, match=r"metric 'gfid_vgg16' cannot be optimised; choose from (?!.*gfid)"):
        parse_study(study, "", ["--metric", "gfid_vgg16"])


def test_gfid_is_refused_only_where_its_weights_cannot_be_had(monkeypatch):
    monkeypatch.setattr("bench.metrics.weights.inception_missing", lambda: "no file, no network")
    with pytest.raises(UserError, match="metric 'gfid' cannot be had: no file, no network; --metric gfid_vgg16 can"):
        parse_study(SEARCH, "", ["--metric", "gfid", "--prior", "rnn"])
    assert parse_study(SEARCH, "", [*GFID, *RATE]).metric == ("gfid_vgg16",)


def test_a_studys_name_tells_by_which_prior_it_judges(tmp_path):
    def name(*flags):
        return make_plan(SEARCH, parse_study(SEARCH, "", [*SMOKE, "--results", str(tmp_path), *flags])).name

    assert name() == "search-smoke"
    assert name(*GFID, *RATE) == NAME
    budget = ("--prior-steps", "77", "--samples", "64")
    assert name(*CODED, *budget) == (
        "search-smoke-metric=lpips_vgg_coded_bits_per_image-prior=transformer-prior_steps=77-samples=64"
    )


# -- a trial ----------------------------------------------------------------------------------------------------------


def test_a_trial_is_tokenizers_each_with_its_prior_and_worth_their_mean(child, tmp_path):
    budget = ("--prior-steps", "77", "--prior-parameters", "5000", "--samples", "64")
    assert start(tmp_path, *GFID, *RATE, *budget, "--trials", "5", "--seeds", "0", "1") == 0
    assert [isinstance(config, PriorConfig) for config in child.calls] == [False, True] * 10
    for below, over in zip(child.tokenizers, child.priors, strict=True):
        assert (over.tokenizer, over.seed, over.prior) == (below.run_id(), below.seed, "transformer")
        assert (over.steps, over.parameters, over.samples, over.device) == (77, 5000, 64, "cpu")
    (study,) = indexed(tmp_path).values()
    assert study.directions == [optuna.study.StudyDirection.MINIMIZE]
    pairs = zip(child.tokenizers[::2], child.tokenizers[1::2], strict=True)
    for trial, (one, other) in zip(study.trials, pairs, strict=True):
        assert trial.value == pytest.approx((distance(one) + distance(other)) / 2)
        assert trial.user_attrs["gfid_vgg16"] == pytest.approx(distance(one))
        assert trial.user_attrs["run_id"] == one.run_id()
        assert trial.user_attrs["psnr"] == Store(tmp_path).run(one).metrics()["psnr"]
        assert trial.user_attrs["seconds"] > 4 * 30
    betas = [config.beta for config in child.tokenizers]
    assert study.best_params["beta"] == min(betas, key=lambda beta: abs(math.log(beta / 0.8)))
    assert study.best_params["beta"] != max(betas)  # the best by LPIPS
    notes = json.dumps(study._storage.get_study_system_attrs(study._study_id))
    assert notes.count("gFID vgg16") == notes.count("PSNR dB") == 10  # a table for each run


def test_what_a_tokenizer_is_scored_with_too_is_the_tokenizers(tmp_path):
    """Also in the attributes of a trial."""
    store = Store(tmp_path)
    below = fabricate(store, make_config("cnn", "smoke"), train_seconds=7.0)
    over = fabricate_prior(store, PriorConfig(below.folder.name, "rnn"), 5.0, 80.0)
    assert {*METRICS} & {*PRIOR_METRICS} == {"peak_memory_mb", "train_seconds"}
    state, values = conversion.result([below, over], ("train_seconds", "gfid_vgg16"))
    assert (state.name, values) == ("COMPLETE", [7.0, 80.0])
    about = conversion.attributes([below, over])
    assert (about["train_seconds"], about["gfid_vgg16"], about["lpips_vgg"]) == (
        7.0,
        80.0,
        below.metrics()["lpips_vgg"],
    )
    assert conversion.result([below], ("gfid_vgg16",)) == (optuna.trial.TrialState.FAIL, None)


def test_no_curve_prunes_what_is_judged_by_generation(child, tmp_path):
    """However hopeless it is, which would prune it otherwise."""
    assert start(tmp_path, *GFID, *RATE, "--trials", "7") == 0
    assert {*child.asked} == {None}
    (study,) = indexed(tmp_path).values()
    assert all(trial.state.name == "COMPLETE" and not trial.intermediate_values for trial in study.trials)
    child.calls.clear()
    assert start(tmp_path, *RATE, "--trials", "7") == 0
    assert "pruned" in child.asked
    assert TOKENIZERS.has_curve(("psnr",))
    assert not TOKENIZERS.has_curve(("gfid_vgg16",))
    assert KINDS["priors"].has_curve(("coded_bits_per_token",))


def test_a_tokenizer_that_another_search_gave_up_is_trained_to_its_end(child, tmp_path):
    own = make_config("cnn", "smoke", device="cpu", split="val")
    fabricate_failed(Store(tmp_path), own, "pruned")
    assert start(tmp_path, *RATE, "--trials", "1") == 0
    assert not child.calls
    assert start(tmp_path, *GFID, *RATE, "--trials", "1") == 0
    assert [type(config) for config in child.calls] == [Config, PriorConfig]
    assert child.calls[0].run_id() == own.run_id()


def test_killed_between_tokenizer_and_prior_a_trial_goes_on_with_the_prior(child, tmp_path):
    class Stop(threading.Event):
        def is_set(self):
            return child.place > 3

    child.endings = {4: "interrupted"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workers, "interruptible", lambda: contextlib.nullcontext(Stop()))
        assert start(tmp_path, *GFID, *RATE, "--trials", "3") == 130
    assert [type(config) for config in child.calls] == [Config, PriorConfig] * 2
    assert len(Store(tmp_path).priors()) == 1
    assert start(tmp_path, *GFID, *RATE, "--trials", "3") == 0
    assert child.calls.pop(3) in child.calls  # the prior that was interrupted
    assert Counter(Counter(config.run_id() for config in child.calls).values()) == {1: 6}
    assert start(tmp_path, *GFID, *RATE, "--trials", "3") == 0
    assert len(child.calls) == 6


def test_what_the_store_has_finished_is_adopted(child, tmp_path):
    """Of tokenizers and priors alike."""
    store = Store(tmp_path)
    below = fabricate(store, make_config("cnn", "smoke", device="cpu", split="val"))
    assert start(tmp_path, *GFID, *RATE, "--trials", "1") == 0
    assert [config.tokenizer for config in child.calls] == [below.folder.name]
    (tmp_path / "studies" / "optuna.db").unlink()
    child.calls.clear()
    assert start(tmp_path, *GFID, *RATE, "--trials", "1") == 0
    assert not child.calls


def test_rebuild_brings_back_trials_with_their_priors(child, tmp_path):
    """With value, parameters, attributes and how they ended; where only tokenizers are finished, nothing has ended."""

    def contents():
        return {
            name: [(one.state.name, one.values, one.params, one.user_attrs) for one in study.trials]
            for name, study in indexed(tmp_path).items()
        }

    child.endings = {4: "diverged"}
    assert start(tmp_path, *GFID, *RATE, "--trials", "3", "--seeds", "0", "1", "--confirm", "1") == 1
    before, name = contents(), NAME.replace("bits", "seeds=0_1-bits", 1)
    assert [*before] == [f"{name}-cnn", f"{name}-confirm-cnn"]
    assert [state for state, *_ in before[f"{name}-cnn"]] == ["FAIL", "COMPLETE", "COMPLETE"]
    (tmp_path / "studies" / "optuna.db").unlink()
    assert study_command.rebuild(results=tmp_path) == 0
    assert contents() == before
    for prior in Store(tmp_path).priors():
        (prior.folder / "metrics.json").unlink(missing_ok=True)
        prior.forgive()
    (tmp_path / "studies" / "optuna.db").unlink()
    assert study_command.rebuild(results=tmp_path) == 0
    assert contents() == {one: [] for one in before}


def test_a_trial_is_listed_with_its_priors_or_not_at_all(tmp_path):
    """Priors are written first, each as its tokenizer is and by its name: half of it would be another trial."""
    flags = [*SMOKE, "--results", str(tmp_path), *GFID, "--seeds", "0", "1"]
    found = make_plan(SEARCH, parse_study(SEARCH, "", flags))
    (part,) = found.tokenizers()
    values = {"beta": 0.5, "codebook_size": 64, "grid_size": 4}
    cell = found.claimed(part, optuna.trial.FixedTrial(values))
    rows = part.rows([cell])
    assert [*rows] == ["priors", "runs"]
    assert [*rows["runs"].values()] == [{"backbone": "cnn", **values, "seed": seed} for seed in (0, 1)]
    assert [*rows["priors"].values()] == [{"prior": "transformer", **row} for row in rows["runs"].values()]
    record = Store(tmp_path).study(found.name)
    assert (record["runs"], record["priors"]) == (rows["runs"], rows["priors"])


def test_a_prior_that_is_missing_of_what_confirms_a_search_is_trained(child, tmp_path):
    flags = (*GFID, *RATE, "--trials", "2", "--confirm", "1")
    assert start(tmp_path, *flags) == 0
    over = Store(tmp_path).run(child.priors[-1])
    shutil.rmtree(over.folder)
    child.calls.clear()
    assert start(tmp_path, *flags) == 0
    assert [config.run_id() for config in child.calls] == [over.folder.name]


@pytest.mark.parametrize("ending", ["diverged", "damaged"])
def test_a_prior_that_fails_fails_its_trial_and_is_shown(child, reported, tmp_path, capsys, ending):
    if ending == "diverged":
        child.endings = {2: "diverged"}
    else:
        below = fabricate(Store(tmp_path), make_config("cnn", "smoke", device="cpu", split="val"))
        over = fabricate_prior(Store(tmp_path), PriorConfig(below.folder.name, "transformer", device="cpu"), 5.0, 80.0)
        (over.folder / "metrics.json").write_text("{")
    assert start(tmp_path, *GFID, *RATE, "--trials", "3") == 1
    (study,) = indexed(tmp_path).values()
    assert [trial.state.name for trial in study.trials] == ["FAIL", "COMPLETE", "COMPLETE"]
    assert study.trials[0].user_attrs["status"] == ending
    printed = " ".join(capsys.readouterr().err.split())
    assert f"1/3 cnn beta=0.25 grid_size=4: {ending}: " in printed
    assert f"3 finished; priors: 1 {ending}, 2 finished" in printed
    text = (tmp_path / "reports" / NAME / "tables.md").read_text()
    assert "trials: 2 of cnn" in text
    assert "Trials without a score, as a tokenizer or its prior failed: 1 of cnn" in text
    assert ending in text.split("Priors without scores")[1]


def test_the_plan_and_the_list_count_priors_too(child, tmp_path, monkeypatch, capsys):
    def told():
        assert start(tmp_path, *GFID, *RATE, "--trials", "3", "--plan") == 0
        return " ".join(capsys.readouterr().out.split())

    assert "priors, not in these minutes: 0 of 3 finished" in told()
    child.endings = {4: "diverged"}
    assert start(tmp_path, *GFID, *RATE, "--trials", "3", "--confirm", "1") == 1
    assert "priors, not in these minutes: 2 of 3 finished" in told()
    study_command.show(tmp_path)
    shown = "".join(re.findall(r"^ {0,2}(\S+)", capsys.readouterr().out, re.M))
    assert NAME in shown  # all of it, in pieces
    monkeypatch.setattr(study_command.stdout, "_width", 200)
    study_command.show(tmp_path)
    assert "3 finished; priors: 2 finished, 1 diverged" in capsys.readouterr().out


# -- the report -------------------------------------------------------------------------------------------------------


def test_the_report_ranks_by_gfid_and_confirms_on_the_test_with_priors(child, reported, tmp_path, capsys):
    assert start(tmp_path, *GFID, "--trials", "8", "--confirm", "3", "--prior-steps", "77") == 0
    trials, fresh = ([config for config in child.tokenizers if config.split == split] for split in ("val", "test"))
    assert (len(trials), {config.seed for config in fresh}) == (8, {1, 2, 3})
    assert len(child.priors) == len(child.tokenizers)
    alike = [config for config in trials if config.grid_size**2 * math.log2(config.codebook_size) == 112]
    best = min(alike, key=distance)
    assert {config.beta for config in fresh} == {best.beta, 0.25}
    name = "search-smoke-metric=gfid_vgg16_bits_per_image-prior=transformer-prior_steps=77"
    text = (tmp_path / "reports" / name / "tables.md").read_text()
    rows = table_of(text, "Best of the search at each rate")
    for row in rows:
        rivals = [
            one for one in trials if f"{one.grid_size**2 * math.log2(one.codebook_size):.0f}" == row["bits per image"]
        ]
        winner = min(rivals, key=distance)
        assert float(row["gFID vgg16"]) == pytest.approx(distance(winner), abs=0.05)
        assert row["beta"] == f"{winner.beta:.5g}"
    ordered = [float(row["gFID vgg16"]) for row in rows]
    assert [row["front"] for row in rows] == [
        "yes" if i == 0 or v < min(ordered[:i]) else "no" for i, v in enumerate(ordered)
    ]
    protocol = (
        "Prior over each tokenizer: transformer of 1,000,000 parameters, 77 steps of 64; 512 samples, temperature 1"
    )
    assert f"{protocol}, against validation images" in text
    confirmed = {row["role"]: row for row in table_of(text, "Confirmed on fresh seeds")}
    assert {*confirmed} == {"winner", "default"}
    means = {role: float(row["gFID vgg16"].split()[0]) for role, row in confirmed.items()}
    assert means["winner"] == pytest.approx(distance(best) + 6, abs=0.06)
    assert float(confirmed["winner"]["gFID vgg16, validation, in the search"]) == pytest.approx(
        distance(best), abs=0.05
    )
    said = " ".join(capsys.readouterr().out.split())
    assert re.search(r"gFID vgg16 [\d.]+ promised on validation, [\d.]+ on the test for the winner", said)
    assert re.search(r"winner \(cnn\) better than default \(cnn\) by [\d.]+ gFID vgg16", said)
    assert len(child.priors) == len({config.run_id() for config in child.priors})


def test_coded_bits_are_the_rate_and_their_winner_spends_no_more_than_the_default(child, reported, tmp_path):
    assert start(tmp_path, *CODED, "--trials", "8", "--confirm", "3") == 0
    (study, _) = indexed(tmp_path).values()
    assert study.metric_names == ["lpips_vgg", "coded_bits_per_image"]
    assert len(study.directions) == 2

    def spent(config):
        return config.grid_size**2 * coded(config)

    trials = [config for config in child.tokenizers if config.split == "val"]
    limit = spent(trials[0])
    assert trials[0].beta == 0.25  # the preset's
    best = max((config for config in trials if spent(config) <= limit), key=lambda config: config.beta)
    assert {config.beta for config in child.tokenizers if config.split == "test"} == {best.beta, 0.25}
    name = "search-smoke-metric=lpips_vgg_coded_bits_per_image-prior=transformer"
    text = (tmp_path / "reports" / name / "tables.md").read_text()
    rows = table_of(text, "Front of the search")
    front = [one for one in trials if not any(two.beta > one.beta and spent(two) <= spent(one) for two in trials)]
    assert [row["beta"] for row in rows] == [f"{one.beta:.5g}" for one in sorted(front, key=spent)]
    assert text.count("promised on validation") == 2  # LPIPS, and coded bits


def test_a_front_of_coded_bits_heeds_no_other_bits():
    points = {searches.RATE: [112, 64, 256, 64], searches.CODED: [50, 60, 40, 61], "lpips_vgg": [0.3, 0.2, 0.4, 0.2]}
    found = pd.DataFrame({"backbone": "cnn", **points})
    assert searches.front(found, "lpips_vgg", searches.CODED).tolist() == [True, True, True, False]
    assert searches.winners(found, "lpips_vgg", searches.CODED)[searches.CODED].tolist() == [40, 50, 60]
    assert searches.front(found, "lpips_vgg").tolist() == [False, True, False, False]


def test_a_coded_rate_without_a_trial_of_the_preset_confirms_nothing(child, tmp_path, capsys):
    """It is tried first, and may diverge."""
    child.endings = {1: "diverged"}
    assert start(tmp_path, *CODED, "--trials", "2", "--confirm", "1") == 2
    assert "no trial of cnn has the preset's values, whose rate is the limit" in " ".join(
        capsys.readouterr().err.split()
    )


def test_rows_are_joined_with_the_newest_prior_of_the_study_and_finished_when_both_are(tmp_path):
    store = Store(tmp_path)
    runs = [fabricate(store, make_config("cnn", "smoke", seed=seed)) for seed in range(4)]
    old = fabricate_prior(store, PriorConfig(runs[0].folder.name, "rnn", steps=5), 6.0, 90.0)
    new = fabricate_prior(store, PriorConfig(runs[0].folder.name, "rnn"), 5.0, 80.0)
    failed = PriorConfig(runs[1].folder.name, "rnn")
    fabricate_prior(store, failed, 5.0, 80.0)
    over = store.run(failed)
    (over.folder / "metrics.json").unlink()
    over.fail("diverged", "it diverged")
    fabricate_failed(store, make_config("cnn", "smoke", seed=9), "crashed")
    table = frame(store.runs()).assign(coded_bits_per_image=1.0)  # of the best prior of all studies
    joined = searches.with_priors(table, frame([old, new, over], PRIOR)).set_index("seed")
    assert joined.status.to_dict() == {0: "finished", 1: "diverged", 2: "unfinished", 3: "unfinished", 9: "crashed"}
    assert (joined.gfid_vgg16[0], joined.coded_bits_per_image[0]) == (80.0, 16 * 5.0)
    assert pd.isna(joined.coded_bits_per_image[2])
    assert joined.train_seconds[0] != 30.0  # the tokenizer's
    assert joined.protocol_prior_samples[0] == 512
    assert LABELS["gfid_vgg16"].better == "lower"


@pytest.mark.slow
def test_what_is_trained_is_worth_what_its_prior_scored_on_validation(image_folder, tmp_path, monkeypatch):
    def train(config, store, fid_weights, *_):
        KINDS[config.SHELF].train(config, store, fid_weights, None)
        return Outcome("finished")

    monkeypatch.setattr(workers, "run_in_child", train)
    monkeypatch.setattr(workers, "conclude", lambda plan, index: None)
    sizes = "--width 16 --depth 1 --codebook-size 16 --code-dim 4 --steps 12 --batch-size 8 --warmup 2 --lpips-weight 0"
    flags = [*sizes.split(), "--data", f"folder:{image_folder}", "--metric", "gfid_vgg16", "coded_bits_per_image"]
    small = Search("search", {"beta": (0.25,)}, backbones=("cnn",))
    assert start(tmp_path, *flags, "--prior", "independent", "--samples", "24", "--trials", "1", study=small) == 0
    (below,), (over,) = Store(tmp_path).runs(), Store(tmp_path).priors()
    assert below.config()["split"] == over.protocol()["scored_on"] == "val"
    (study,) = indexed(tmp_path).values()
    assert study.trials[0].values == [over.metrics()["gfid_vgg16"], over.metrics()["coded_bits_per_image"]]


def test_an_old_study_reads_on_as_it_was(child, tmp_path):
    """Its name, its file and its trials."""
    assert start(tmp_path, "--trials", "2") == 0
    record = json.loads((tmp_path / "studies" / "search-smoke.json").read_text())
    assert {*record} == {"name", "study", "sweep", "metrics", "kind", "space", "runs", "sha256"}
    assert record["metrics"] == ["lpips_vgg", "bits_per_image"]
    (tmp_path / "studies" / "optuna.db").unlink()
    assert study_command.rebuild(results=tmp_path) == 0
    assert [*indexed(tmp_path)] == ["search-smoke-cnn"]
