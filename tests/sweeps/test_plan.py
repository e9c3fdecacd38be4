"""Plans: which cells a study consists of, what is missing of them, and what the rest will cost."""

import importlib
import inspect
import itertools
import json
import re
from dataclasses import asdict, replace
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from optuna.trial import FixedTrial, TrialState

from backbones import BACKBONES, OPTIONS
from backbones import backbone as backbone_called
from bench.analysis.frames import frame
from bench.core.errors import UserError
from bench.core.runs import FAILURES
from bench.priors.config import PriorConfig
from bench.priors.models import PRIORS
from bench.sweeps import plan
from bench.sweeps.definition import Ablation, Range, Search, parse_study, read_space
from bench.sweeps.index import Index
from bench.sweeps.plan import AblationPlan, Plan, estimates
from bench.sweeps.search import SearchPlan, make_plan
from bench.tokenizers import budgets
from bench.tokenizers.config import Config, make_config
from tests.fabricate import least

SWEEP = Ablation("beta", {"beta": (0.25, 1.0), "codebook_size": (64, 128)}, backbones=("cnn", "vit"), seeds=(0, 1))
SPACE = {"beta": Range(0.1, 4.0, log=True), "codebook_size": (64, 256), "code_dim": Range(4, 32)}


def planned(study, folder, *arguments: str) -> Plan:
    words = ["--preset", "smoke", "--device", "cpu", "--precision", "fp32", "--results", str(folder), *arguments]
    return make_plan(study, parse_study(study, "", words))


def priors_of(found: Plan) -> list[PriorConfig]:
    """Of all kinds, kind after kind."""
    return [config for part in found.followers() for cell in part.cells for config in cell.configs]


def ended(plan: Plan, config: Config | PriorConfig, status: str) -> None:
    """Leaves a run folder of ``config`` that ended with ``status``."""
    run = plan.store.run(config)
    run.folder.mkdir(parents=True, exist_ok=True)
    over = {"tokenizer": asdict(make_config("cnn", "smoke"))} if isinstance(config, PriorConfig) else {}
    run.write("config.json", {"config": asdict(config), "environment": {}, **over})
    if status == "finished":
        run.write("metrics.json", least(config.SHELF, {"data": "photos"}, train_seconds=60.0))
    elif status != "unfinished":
        run.fail(status, "")


# -- cells ------------------------------------------------------------------------------------------------------------


def test_cells_are_seeds_times_values_each_once_and_seed_after_seed(tmp_path):
    found = planned(SWEEP, tmp_path, "--beta", "0.5", "1.0", "0.5", "--seeds", "3", "1", "3")
    assert found.backbones == ("cnn", "vit")
    for backbone, cells in found.cells.items():
        expected = [
            {"beta": beta, "codebook_size": k, "seed": seed}
            for seed, beta, k in itertools.product((3, 1), (0.5, 1.0), (64, 128))
        ]
        assert [cell.params for cell in cells] == expected
        usual = {"device": "cpu", "precision": "fp32"}
        configs = [make_config(backbone, "smoke", **usual, **params) for params in expected]
        assert [cell.run.folder.name for cell in cells] == [config.run_id() for config in configs]
    names = [cell.run.folder.name for cells in found.cells.values() for cell in cells]
    assert len(names) == len(set(names)) == 16


def test_a_studys_settings_go_before_the_presets_and_flags_before_both(tmp_path):
    study = replace(SWEEP, settings={"steps": 77, "lr": 0.5})
    (config,) = planned(study, tmp_path, "--lr", "0.25").configs("cnn", {"beta": 0.5, "seed": 4})
    preset = make_config("cnn", "smoke")
    assert (config.steps, config.lr, config.beta, config.seed) == (77, 0.25, 0.5, 4)
    assert (config.grid_size, config.width) == (preset.grid_size, preset.width)


def test_a_search_trial_is_a_run_per_seed(tmp_path):
    found = planned(Search("search", SPACE, backbones=("cnn",), seeds=(0, 5)), tmp_path)
    params = {"beta": 0.3, "codebook_size": 64, "code_dim": 7}
    configs = found.configs("cnn", params)
    assert [config.seed for config in configs] == [0, 5]
    assert all((c.beta, c.codebook_size, c.code_dim) == (0.3, 64, 7) for c in configs)
    assert found.cells == {"cnn": []}


@pytest.mark.parametrize("retry", [False, True])
def test_missing_is_what_has_neither_scores_nor_failed_for_good(tmp_path, retry):
    """A run that a search pruned says nothing about a cell; a failed one is run again when that is asked for."""
    rates = tuple(0.001 * k for k in range(1, 4 + len(FAILURES)))
    study = Ablation("lr", {"lr": rates}, backbones=("cnn",), seeds=(0,))
    found = planned(study, tmp_path, *(["--retry-failed"] if retry else []))
    statuses = ["finished", "unfinished", *FAILURES]
    for cell, status in zip(found.cells["cnn"], statuses, strict=False):
        ended(found, found.configs("cnn", cell.params)[0], status)
    done = {"finished"} if retry else {"finished", *FAILURES} - {"pruned"}
    wanted = [status for status in (*statuses, "never started") if status not in done]
    missing = [cell.params["lr"] for cell in found.cells["cnn"] if found.wants(cell.run)]
    known = dict(zip(study.sweep["lr"], [*statuses, "never started"], strict=True))
    assert [known[lr] for lr in missing] == wanted


def test_no_config_of_a_plan_is_unchecked(tmp_path):
    """What cannot work in the last cell, or at a search's first values, is told before anything runs."""
    for study in (
        Ablation("grid", {"grid_size": (4, 3)}, backbones=("cnn",)),
        Search("search", {"grid_size": (3, 4)}, backbones=("cnn",)),
        Ablation("priors", {}, backbones=("cnn",), priors=("rnn", "magic")),
        Ablation("seeds", {"beta": (0.1, 0.2)}, backbones=("cnn",), seeds=(0, 1, -5)),
    ):
        with pytest.raises(UserError, match=r"3|magic|seed is -5"):
            planned(study, tmp_path)


def test_a_search_space_comes_back_from_the_studys_file(tmp_path):
    found = planned(Search("search", SPACE, backbones=("cnn",)), tmp_path, "--metric", "psnr", "lpips_vgg")
    header = json.loads(json.dumps(found.header()))
    assert read_space(header["space"]) == SPACE
    assert (header["kind"], header["study"], header["sweep"]) == ("search", "search", list(SPACE))
    assert header["metrics"] == ["psnr", "lpips_vgg"]
    ablation = planned(SWEEP, tmp_path).header()
    assert (ablation["kind"], ablation["space"], ablation["sweep"]) == ("ablation", {}, ("beta", "codebook_size"))


def test_optimised_is_only_what_has_a_better_and_is_measured_everywhere(tmp_path):
    for metric in ("sharpness", "tokens", "images_seen", "score_seconds", "peak_memory_mb", "grid_energy_init", "loss"):
        with pytest.raises(UserError, match=metric):
            planned(SWEEP, tmp_path, "--metric", "psnr", metric)
    assert planned(SWEEP, tmp_path, "--metric", "psnr", "params").options.metric == ("psnr", "params")


# -- priors -----------------------------------------------------------------------------------------------------------


def test_priors_are_planned_over_finished_tokenizers_with_their_seeds(tmp_path):
    study = Ablation("p", {"beta": (0.25, 1.0)}, backbones=("cnn",), seeds=(0, 3), priors=("rnn", "independent"))
    sizes = ("--prior-parameters", "5000", "--prior-steps", "77", "--samples", "64")
    found = planned(study, tmp_path, *sizes)
    assert priors_of(found) == []
    done = [cell for cell in found.cells["cnn"] if cell.params["beta"] == 1.0]
    for cell in done:
        ended(found, found.configs("cnn", cell.params)[0], "finished")
    other = found.cells["cnn"][0]
    ended(found, found.configs("cnn", other.params)[0], "diverged")
    names = {cell.run.folder.name: cell.params["seed"] for cell in done}
    priors = priors_of(found)
    assert [(one.prior, one.tokenizer) for one in priors] == list(itertools.product(("rnn", "independent"), names))
    assert all(one.seed == names[one.tokenizer] for one in priors)
    assert all((one.precision, one.device, one.samples) == ("fp32", "cpu", 64) for one in priors)
    assert {(one.parameters, one.steps) for one in priors if one.prior == "rnn"} == {(5000, 77)}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_priors_are_trained_in_the_precision_of_the_command_line(tmp_path, precision):
    """Whichever this machine would choose by itself."""
    study = Ablation("p", {"beta": (0.25,)}, backbones=("cnn",), seeds=(0,), priors=("rnn",))
    found = planned(study, tmp_path, "--precision", precision)
    ended(found, found.configs("cnn", found.cells["cnn"][0].params)[0], "finished")
    assert [one.precision for one in priors_of(found)] == [precision]


def test_priors_are_trained_on_the_device_of_the_command_line(tmp_path, monkeypatch):
    """Also on a machine that would choose its GPU."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    study = Ablation("p", {"beta": (0.25,)}, backbones=("cnn",), seeds=(0,), priors=("rnn",))
    found = planned(study, tmp_path)
    ended(found, found.configs("cnn", found.cells["cnn"][0].params)[0], "finished")
    assert [one.device for one in priors_of(found)] == ["cpu"]


def test_a_prior_that_is_named_twice_is_planned_once(tmp_path):
    study = Ablation("p", {"beta": (0.25, 1.0)}, backbones=("cnn",), seeds=(0,), priors=("rnn",))
    found = planned(study, tmp_path, "--prior", "rnn", "independent", "rnn")
    for cell in found.cells["cnn"]:
        ended(found, found.configs("cnn", cell.params)[0], "finished")
    for config in priors_of(found):
        ended(found, config, "finished")
    assert len(priors_of(found)) == 4
    assert found.table().caption.endswith("4 of 4 finished")


# -- one interface ----------------------------------------------------------------------------------------------------


def test_both_plans_have_the_same_methods():
    """Of equal signatures: who runs a study asks for no more, and does not ask which of the two it is."""

    def face(kind: type[Plan]) -> dict[str, str]:
        names = {name for name in dir(kind) if not name.startswith("_")}
        return {name: str(inspect.signature(made)) for name in names if callable(made := getattr(kind, name))}

    ablation, search = face(AblationPlan), face(SearchPlan)
    assert ablation == search
    asked = ("tokenizers", "followers", "fill", "wants", "allows", "prunes", "claimed", "failed", "example", "header")
    assert {*asked, "table"} <= {*ablation}
    assert (AblationPlan.kind, SearchPlan.kind) == ("ablation", "search")


def test_a_plan_is_chosen_by_what_the_study_is(tmp_path):
    search = Search("search", SPACE, backbones=("cnn",))
    assert type(planned(SWEEP, tmp_path)) is AblationPlan
    assert type(planned(search, tmp_path)) is SearchPlan
    assert planned(search, tmp_path).followers() == planned(SWEEP, tmp_path).followers() == []


def test_an_example_is_a_config_of_the_study(tmp_path):
    (first, *_) = planned(SWEEP, tmp_path).cells["vit"]
    assert planned(SWEEP, tmp_path).example("vit") == first.configs[0]
    found = planned(Search("search", SPACE, backbones=("cnn",), seeds=(3, 4)), tmp_path).example("cnn")
    assert (found.backbone, found.seed, found.beta, found.codebook_size, found.code_dim) == ("cnn", 3, 0.1, 64, 4)


def test_a_search_makes_no_trial_of_one_length_and_another_of_another(tmp_path):
    with pytest.raises(UserError, match="time:60s would give each trial of a search other steps"):
        planned(Search("search", SPACE, backbones=("cnn",)), tmp_path, "--match", "time:60s")


# -- costs ------------------------------------------------------------------------------------------------------------


def known(config: Config, seconds: float, status: str = "finished") -> dict:
    return {**asdict(config), "status": status, "train_seconds": seconds}


def table(*rows: dict) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=frame([]).columns)


SHAPE = {
    **{"backbone": "vit", "width": 48, "depth": 4, "image_size": 64, "grid_size": 8, "batch_size": 32},
    **{"lpips_weight": 0.5, "lpips_net": "vgg", "quantizer": "l2", "codebook_size": 64, "code_dim": 8},
    **{
        "device": "cuda",
        "precision": "bf16",
        "gan_weight": 0.5,
        "alignment_weight": 0.5,
        "alignment_model": "test_vit",
        "freeze": "encoder",
    },
    **{**dict.fromkeys(OPTIONS, True), "attention": 2, "token_order": "columns"},
}


@pytest.mark.parametrize("name", SHAPE)
def test_time_is_estimated_from_runs_of_equal_shape_alone(name):
    """Each of these fields alone makes a step take another time; what does not change a step does not matter."""
    config = make_config("cnn", "smoke", device="cpu", precision="fp32", steps=100)
    other = replace(config, **{name: SHAPE[name]})
    assert getattr(other, name) != getattr(config, name)
    assert {*plan.SHAPE} == {*SHAPE}
    assert estimates([config], table(known(other, 5.0)), 2) == [None]
    same = replace(config, seed=9, beta=3.0, lr=0.5, steps=300)
    assert estimates([config], table(known(other, 5.0), known(same, 30.0)), 2) == pytest.approx([10.0])


def test_an_estimate_is_the_median_second_per_step_of_finished_runs():
    config = make_config("cnn", "smoke", device="cpu", precision="fp32", steps=100)
    runs = [known(replace(config, seed=s), seconds) for s, seconds in enumerate((10.0, 20.0, 90.0))]
    longer = replace(config, steps=250)
    failed = [known(replace(config, seed=s), 1.0, "crashed") for s in range(5, 9)]
    assert estimates([config, longer], table(*runs, *failed), 2) == pytest.approx([20.0, 50.0])
    assert estimates([config, longer], table(*failed), 2) == [None, None]


def test_three_trials_take_two_workers_as_long_as_two():
    assert plan.makespan([60.0] * 3, 2) == 120
    assert plan.makespan([], 2) == 0
    assert plan.makespan([30.0, 30.0, 60.0], 2) == 60
    assert plan.makespan([10.0, 20.0, 30.0], 1) == 60


def test_a_shape_that_a_study_has_not_finished_is_priced_by_the_rest_of_the_store(tmp_path, monkeypatch):
    """And one that it has by a few of its own runs, without reading the rest."""
    monkeypatch.setattr(plan, "threads_each", lambda workers: 2)  # as finished ones had
    found = planned(SWEEP, tmp_path, "--steps", "60", "--backbone", "cnn")
    ended(found, replace(found.cells["cnn"][0].configs[0], beta=9.0), "finished")
    ended(found, replace(found.cells["cnn"][1].configs[0], beta=9.0), "finished")
    assert found.table().caption.startswith("8 min, ")
    for cell in found.cells["cnn"][:2]:
        ended(found, cell.configs[0], "finished")
    monkeypatch.setattr(found.store, "runs", lambda: pytest.fail("nothing else is needed"))
    assert found.table().caption.startswith("6 min, ")


def counts(found: Plan, monkeypatch) -> dict[str, list[str]]:
    """Backbone → cells × seeds, finished, failed, to run and minutes, of one each."""
    monkeypatch.setattr(plan, "estimates", lambda configs, *_: [60.0] * len(configs))
    columns = [list(column.cells) for column in found.table().columns]
    return {row[0]: list(row[1:]) for row in zip(*columns, strict=True)}


def test_a_plans_table_counts_cells_and_prices_what_is_missing(tmp_path, monkeypatch):
    found = planned(SWEEP, tmp_path, "--steps", "60")
    for cell, status in zip(found.cells["cnn"], ("finished", "crashed", "unfinished"), strict=False):
        ended(found, cell.configs[0], status)
    assert counts(found, monkeypatch) == {
        "cnn": ["4 × 2", "1", "1", "6", "6.0 min"],
        "vit": ["4 × 2", "0", "0", "8", "8.0 min"],
    }
    assert found.table().caption.startswith("14 min, ")

    def of_cnn(configs, *_):
        return [60.0 if one.backbone == "cnn" else None for one in configs]

    monkeypatch.setattr(plan, "estimates", of_cnn)
    assert [*found.table().columns[-1].cells] == ["6.0 min", "unknown"]
    assert found.table().caption.startswith("6 min, ")
    assert found.table().caption.endswith("; unknown of vit, until a run of the same size is finished")
    monkeypatch.setattr(plan, "estimates", lambda configs, *_: [None] * len(configs))
    assert found.table().caption == "unknown of cnn, vit, until a run of the same size is finished"


def test_what_never_ran_is_priced_by_a_few_steps_and_by_the_scoring_of_others(tmp_path, monkeypatch):
    """Each shape once; not where a step would take minutes, or cannot be trained."""
    made = [make_config("cnn", "smoke", device="cpu", precision="fp32", steps=100, seed=seed) for seed in (0, 1)]
    done = table(known(replace(made[0], backbone="vit", lr=0.1), 5.0) | {"score_seconds": 30.0})
    timed = []
    monkeypatch.setattr(plan, "step_seconds", lambda config, steps: timed.append((config, steps)) or 0.5)
    threads = torch.get_num_threads()
    others = ({"image_size": 64}, {"data": "cifar10"}, {"split": "val"})
    for finished, seconds in ((done, 80.0), *((done.assign(**other), 50.0) for other in others)):
        found, tried = plan.with_rehearsals(finished, made)
        assert estimates(made, found, threads) == pytest.approx([seconds] * 2)
        assert tried == {"cnn": seconds == 80}
    assert [(plan.shape_of(config), steps) for config, steps in timed] == [(plan.shape_of(made[0]), 4)] * 4
    found, tried = plan.with_rehearsals(table(known(made[0], 5.0)), made)
    assert (len(found), tried, len(timed)) == (1, {}, 4)
    monkeypatch.setattr(plan, "SHORT", 1e6)
    assert plan.with_rehearsals(done, made)[1] == {}
    assert len(timed) == 4


def test_a_plan_says_what_its_estimate_is_from_and_whether_scoring_is_in_it(tmp_path, monkeypatch):
    found = planned(SWEEP, tmp_path, "--steps", "60")
    told = {}
    for name, tried in (("runs", {}), ("both", {"cnn": True}), ("steps", {"cnn": True, "vit": False})):
        monkeypatch.setattr(plan, "with_rehearsals", lambda known, missing, tried=tried: (known, tried))
        monkeypatch.setattr(plan, "estimates", lambda configs, *_: [60.0] * len(configs))
        told[name] = found.table().caption.splitlines()
    long = "; too long where other work ran beside them"
    assert told["runs"] == ["16 min, 1 at a time, by finished runs", f"scoring is included{long}"]
    steps = "4 steps that were tried now"
    assert told["both"] == [f"16 min, 1 at a time, by finished runs and {steps} (cnn)", f"scoring is included{long}"]
    assert told["steps"] == [f"16 min, 1 at a time, by {steps} (cnn, vit)", f"scoring of vit comes on top{long}"]


@pytest.mark.slow
def test_a_plan_of_a_new_study_tells_minutes(tmp_path, monkeypatch):
    monkeypatch.setenv("VQBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(plan, "step_seconds", budgets.step_seconds)
    size = ("--width", "8", "--depth", "1", "--lpips-weight", "0", "--steps", "600")
    found = planned(SWEEP, tmp_path, "--backbone", "cnn", "--codebook-size", "64", *size)
    minutes = re.fullmatch(r"(.*) min", next(iter(found.table().columns[-1].cells)))
    assert 0.01 < float(minutes[1]) < 100
    assert "by 4 steps that were tried now (cnn)\nscoring of cnn comes on top" in found.table().caption


def test_a_searchs_table_counts_what_it_has_tried(tmp_path, monkeypatch):
    study = Search("search", {"beta": Range(0.1, 4.0)}, backbones=("cnn", "vit"), seeds=(0,))
    found = planned(study, tmp_path, "--trials", "5", "--steps", "60")
    for beta, status in ((0.5, "finished"), (0.6, "diverged"), (0.7, "pruned"), (0.8, "unfinished")):
        config = found.configs("cnn", {"beta": beta})[0]
        ended(found, config, status)
        found.store.extend_study(found.name, found.header(), {config.run_id(): {"backbone": "cnn", "beta": beta}})
    assert counts(found, monkeypatch) == {
        "cnn": ["5 × 1", "1", "2", "2", "2.0 min"],
        "vit": ["5 × 1", "0", "0", "5", "5.0 min"],
    }


def test_a_search_over_two_seeds_is_priced_at_two_runs_a_trial(tmp_path, monkeypatch):
    study = Search("search", {"beta": Range(0.1, 4.0)}, backbones=("cnn",), seeds=(0, 1))
    found = planned(study, tmp_path, "--trials", "3", "--steps", "60")
    assert counts(found, monkeypatch) == {"cnn": ["3 × 2", "0", "0", "6", "6.0 min"]}


# -- the studies ------------------------------------------------------------------------------------------------------

ALL = tuple(BACKBONES)
STUDIES = {
    "backbones": ({"quantizer": ("ema",)}, {}, ALL, (0, 1, 2)),
    "beta": ({"beta": (0.1, 0.25, 0.5, 1.0, 2.0)}, {}, ALL, (0, 1, 2)),
    "blog_claims": (
        {"patch_overlap": (False, True), "final_conv": (False, True)},
        {},
        ("convnext", "vit", "mamba", "bimamba"),
        (0, 1, 2),
    ),
    "celeba_sweep": (
        {"beta": (0.25, 0.75, 1.25, 1.75), "lr": (1e-3, 1e-4, 1e-5), "codebook_size": (128, 256, 512)},
        {
            **{"data": "celeba", "grid_size": 16, "code_dim": 64, "quantizer": "standard", "lpips_weight": 0.0},
            **{"steps": 10_000, "batch_size": 32},
        },
        ("cnn",),
        (0, 1, 2),
    ),
    "cures": (
        {"patch_overlap": (False, True), "final_conv": (False, True)},
        {},
        ("vit", "mamba", "bimamba", "hybrid"),
        (0, 1, 2),
    ),
    "codebooks": (
        {"quantizer": ("product", "residual"), "codebooks": (2, 4)},
        {"codebook_size": 256},
        ("cnn", "vit"),
        (0, 1, 2),
    ),
    "code_dim": ({"code_dim": (4, 8, 16, 32, 64), "quantizer": ("ema", "l2")}, {}, ("convnext", "vit"), (0, 1, 2)),
    "codebook_size": ({"codebook_size": (64, 256, 1024, 4096)}, {}, ALL, (0, 1, 2)),
    "filters": ({"width": (16, 32, 64, 128, 256)}, {}, ("cnn",), (0, 1, 2)),
    "gan_weight": ({"gan_weight": (0.0, 0.1, 0.3, 1.0)}, {}, ALL, (0, 1, 2)),
    "gumbel": (
        {"uniform_weight": (0.0, 0.0005, 0.005), "temperature_end": (1.0, 0.0625)},
        {"quantizer": "gumbel"},
        ("cnn",),
        (0, 1, 2),
    ),
    "grid_size": ({"grid_size": (1, 2, 4, 8, 16)}, {}, ALL, (0, 1, 2)),
    "learning_rate": ({"lr": (3e-4, 1e-3, 2e-3, 5e-3)}, {}, ALL, (0, 1, 2)),
    "prior_rate": (
        {"codebook_size": (128, 256, 512, 1024), "grid_size": (4, 8, 16)},
        {},
        ("convnext",),
        (0, 1, 2),
    ),
    "priors": ({"grid_size": (4, 8, 16)}, {}, ALL, (0, 1, 2)),
    "tricks": (
        {
            **{"kmeans_init": (False, True), "gradient": ("straight_through", "rotation")},
            **{"entropy_weight": (0.0, 0.01), "revive_after": (50, 0)},
            **{"reconstruction_weight": (1.0, 4.0), "reconstruction_end": (1.0, 4.0)},
        },
        {"quantizer": "standard"},
        ("cnn", "vit"),
        (0, 1, 2),
    ),
    "variants": (
        {"token_order": ("raster", "hilbert", "cross")}
        | dict.fromkeys(("two_streams", "vision_mixer", "rotary", "rms_norm", "full_resolution"), (False, True))
        | dict.fromkeys(("patch_overlap", "final_conv"), (False, True))
        | {"attention": (0, 1)},
        {},
        ALL,
        (0, 1, 2),
    ),
    "quantizers": (
        {"quantizer": ("standard", "ema", "l2", "ema_l2", "gumbel", "ibq", "product", "bsq", "none")},
        {},
        ("cnn", "convnext", "vit"),
        (0, 1, 2),
    ),
}
OVER_CODES = {
    "filters": ("independent", "transformer"),
    "prior_rate": ("pixelcnn", "transformer"),
    "priors": tuple(PRIORS),
}


@pytest.mark.parametrize("name", STUDIES)
def test_an_ablation_sweeps_what_its_docstring_says(name):
    study = importlib.import_module(f"studies.{name}").STUDY
    assert (study.sweep, study.settings, study.backbones, study.seeds) == STUDIES[name]
    assert study.alone == (name in ("blog_claims", "gumbel", "tricks", "variants"))
    assert study.priors == OVER_CODES.get(name, ())
    metric = ("grid_energy", "grid_edges") if name == "cures" else ("lpips_vgg",)
    assert parse_study(study, "", []).metric == metric
    assert parse_study(study, "", ["--metric", "psnr"]).metric == ("psnr",)


def test_alone_each_further_value_stands_with_the_first_of_all_others_where_a_backbone_takes_it():
    """Fields that are no options are everybody's; a value that is given twice is one."""
    space = {"token_order": ("raster", "cross", "cross"), "rotary": (False, True), "beta": (0.25, 1.0, 2.0)}
    study = Ablation("s", sweep=space, alone=True)
    first = {"token_order": "raster", "rotary": False, "beta": 0.25}
    betas = [{**first, "beta": 1.0}, {**first, "beta": 2.0}]
    assert study.combinations("cnn", space) == [first, *betas]
    assert study.combinations("vit", space) == [first, {**first, "rotary": True}, *betas]
    assert study.combinations("mamba", space) == [first, {**first, "token_order": "cross"}, *betas]
    assert len(replace(study, alone=False).combinations("cnn", space)) == 2 * 2 * 3
    turned = {**space, "token_order": ("cross", "raster"), "rotary": (True,)}
    assert study.combinations("cnn", turned) == [first, *betas]  # which has neither option
    assert study.combinations("vit", turned)[0] == {**first, "rotary": True}


def test_a_study_of_many_settings_has_a_name_that_a_file_can_have(tmp_path):
    """Another one for every other value."""
    flags = ("--ema-decay", "0.990001123456", "--grad-clip", "1.00000123456", "--weight-decay", "0.05000123456")
    flags += ("--weight-ema", "0.9900123456", "--revive-after", "51000001", "--warmup", "51", "--lr", "0.002000123")
    flags += ("--batch-size", "17", "--code-dim", "17", "--entropy-weight", "0.0123456789", "--reconstruction-end")
    names = [planned(SWEEP, tmp_path, *flags, value).name for value in ("0.5", "0.6")]
    assert all(len(name.encode()) <= 200 for name in names)
    assert names[0] != names[1]
    assert all(re.fullmatch(r"[\w.=-]+-[0-9a-f]{12}", name) for name in names)
    ends = [planned(SWEEP, tmp_path, "--lr", lr).name.rpartition("=")[2] for lr in ("0.00200012", "0.002000121")]
    assert ends == ["0.00200012", "0.002000121"]


def test_a_line_on_a_trial_of_options_alone_tells_what_is_not_as_usual(tmp_path):
    space = {"rotary": (False, True), "attention": (0, 1)}
    params = {"rotary": True, "attention": 0, "seed": 3}
    for alone, told in ((True, {"rotary": True, "seed": 3}), (False, params)):
        found = planned(Ablation("s", space, backbones=("vit",), seeds=(3,), alone=alone), tmp_path)
        assert found.told(found.tokenizers()[0], params) == told


def test_a_backbone_that_does_not_take_what_a_study_sweeps_is_to_be_left_out():
    """Rather than given a command without a flag that nobody wrote; a study of options alone has them all."""
    cures = importlib.import_module("studies.cures").STUDY
    with pytest.raises(UserError, match=r"--final-conv works with vit and not with cnn; leave out cnn$"):
        parse_study(cures, "", ["--backbone", "vit", "cnn"])
    variants = importlib.import_module("studies.variants").STUDY
    assert parse_study(variants, "", ["--backbone", "vit", "cnn"]).backbone == ("vit", "cnn")


@pytest.mark.parametrize("name", ALL)
def test_variants_have_every_option_of_every_backbone(name):
    """But for --pretrained; each can be trained."""
    sweep = importlib.import_module("studies.variants").STUDY.sweep
    assert {*sweep} == {*OPTIONS} - {"pretrained"}
    cells = Ablation("s", sweep, alone=True).combinations(name, sweep)
    changed = [{key for key in cell if cell[key] != cells[0][key]} for cell in cells]
    assert {*itertools.chain(*changed)} == backbone_called(name).options
    for cell in cells:
        make_config(name, "smoke", device="cpu", **cell).check()


def test_the_search_is_over_what_its_docstring_says():
    study = importlib.import_module("studies.search").STUDY
    assert study.space == {
        "beta": Range(0.05, 4.0, log=True),
        "codebook_size": (128, 256, 512, 1024, 2048),
        "grid_size": (4, 8, 16),
        "code_dim": (4, 8, 16, 32, 64),
        "lr": Range(2e-4, 1e-2, log=True),
    }
    assert (study.settings, study.backbones, study.seeds) == ({"split": "val"}, ALL, (0,))
    for field, choice in study.space.items():  # the preset's own value can be found
        own = getattr(make_config("cnn", "cpu"), field)
        assert choice.low <= own <= choice.high if isinstance(choice, Range) else own in choice


# -- command lines ----------------------------------------------------------------------------------------------------

SEARCH = Search("search", SPACE, backbones=("cnn",))
PRIORS_TOO = Ablation("p", {"beta": (0.25,)}, backbones=("cnn",), seeds=(0,), priors=("rnn",))


def test_what_a_study_takes_unless_told_otherwise():
    """A prior's sizes are those of bench.prior."""
    options = parse_study(SEARCH, "", [])
    front = ("lpips_vgg", "bits_per_image")
    assert (options.metric, options.workers, options.storage, options.plan) == (front, 1, None, False)
    assert parse_study(SEARCH, "", ["--bits-per-image", "576"]).metric == ("lpips_vgg",)
    assert parse_study(SEARCH, "", ["--metric", "psnr"]).metric == ("psnr",)
    assert (options.bits_per_image, options.confirm) == (None, 0)
    assert (options.trials, options.timeout, options.trial_timeout) == (30, None, None)
    options = parse_study(PRIORS_TOO, "", [])
    assert options.metric == ("lpips_vgg",)
    sizes = (options.prior_parameters, options.prior_steps, options.samples)
    assert sizes == (PriorConfig.parameters, PriorConfig.steps, PriorConfig.samples)
    assert (options.prior, options.retry_failed) == (("rnn",), False)


@pytest.mark.parametrize("flag", ["--trials", "--timeout", "--workers", "--trial-timeout"])
def test_a_number_that_leaves_nothing_to_do_is_refused(flag):
    with pytest.raises(UserError, match=f"{flag} is 0.*; it must be a number above 0"):
        parse_study(SEARCH, "", [flag, "0"])


@pytest.mark.parametrize("value", ["nan", "inf"])
@pytest.mark.parametrize("flag", ["--timeout", "--trial-timeout"])
def test_a_time_that_never_comes_is_refused(flag, value):
    with pytest.raises(UserError, match=f"{flag} is {value}; it must be a number above 0"):
        parse_study(SEARCH, "", [flag, value])


@pytest.mark.parametrize(("flag", "most"), [("--workers", 256), ("--trials", 100_000), ("--confirm", 1000)])
def test_more_than_any_machine_can_do_is_refused(flag, most):
    assert parse_study(SEARCH, "", [flag, str(most)])
    with pytest.raises(UserError, match=f"{flag} is {most + 1}; it must be at most {most}"):
        parse_study(SEARCH, "", [flag, str(most + 1)])


@pytest.mark.parametrize("words", [["--storge", "{}"], ["--storge={}"], ["{}"], ["--storage", "{}", "{}"]])
def test_a_url_that_no_flag_takes_is_shown_without_its_password(capsys, words):
    """Such as after a flag that was mistyped, which is told with what follows it."""
    url = "postgresql+psycopg://me:hunter2@server/studies"
    with pytest.raises(SystemExit):
        parse_study(SEARCH, "", [word.format(url) for word in words])
    shown = capsys.readouterr()
    assert "hunter2" not in shown.out + shown.err
    assert parse_study(SEARCH, "", ["--storage", url]).storage == url
    assert parse_study(SEARCH, "", [f"--storage={url}"]).storage == url


def test_a_searched_field_is_no_flag_and_a_swept_one_takes_several_values(capsys):
    with pytest.raises(SystemExit):
        parse_study(SEARCH, "", ["--beta", "0.5"])
    assert "python -m studies.search" in capsys.readouterr().err
    assert parse_study(SWEEP, "", ["--beta", "0.5", "2"]).beta == (0.5, 2.0)
    with pytest.raises(SystemExit):
        parse_study(SWEEP, "", ["--steps", "5", "6"])


def test_fid_is_refused_only_where_its_weights_cannot_be_had(monkeypatch, tmp_path):
    monkeypatch.setattr("bench.metrics.weights.inception_missing", lambda: "no file, no network")
    with pytest.raises(UserError, match="metric 'fid' cannot be had: no file, no network; --metric fid_vgg16 can"):
        parse_study(SEARCH, "", ["--metric", "psnr", "fid"])
    assert parse_study(SEARCH, "", ["--metric", "fid_vgg16"]).metric == ("fid_vgg16",)
    assert parse_study(SEARCH, "", ["--metric", "fid", "--fid-weights", str(tmp_path / "any")]).metric == ("fid",)
    monkeypatch.setattr("bench.metrics.weights.inception_missing", lambda: "")
    assert parse_study(SEARCH, "", ["--metric", "fid"]).metric == ("fid",)
    monkeypatch.setattr("bench.metrics.weights.dinov2_missing", lambda: "no file")
    with pytest.raises(UserError, match="metric 'fd_dinov2' cannot be had: no file; --metric fid_vgg16 can"):
        parse_study(SEARCH, "", ["--metric", "fd_dinov2"])
    (tmp_path / "dinov2_vitl14_pretrain.pth").touch()
    both = ["--metric", "fid", "fd_dinov2", "--fid-weights", str(tmp_path)]
    assert parse_study(SEARCH, "", both).metric == ("fid", "fd_dinov2")


@pytest.mark.parametrize("metric", ["peak_memory_mb", "steps_to_perplexity", "steps_to_loss", "codebook_roughness"])
def test_what_is_best_where_nothing_is_learned_is_not_searched_for(metric):
    with pytest.raises(UserError, match=f"metric '{metric}' cannot be optimised"):
        parse_study(SEARCH, "", ["--metric", metric])


# -- names ------------------------------------------------------------------------------------------------------------


def test_a_studys_name_says_what_is_unusual_about_it():
    """In few characters, and without what no number depends on."""

    def name(study, *arguments):
        return make_plan(study, parse_study(study, "", list(arguments))).name

    assert name(SWEEP, "--lpips-weight", "0", "--lr", "0.0010") == "beta-cpu-lpips_weight=0-lr=0.001"
    assert name(SWEEP, "--data", "cifar10") == "beta-cpu-cifar10"
    assert name(SWEEP, "--precision", "fp32", "--device", "cpu", "--workers", "3") == "beta-cpu"
    assert name(PRIORS_TOO, "--prior-steps", "77", "--samples", "64") == "p-cpu-prior_steps=77-samples=64"
    assert name(PRIORS_TOO, "--prior", "independent") == "p-cpu"
    assert name(PRIORS_TOO, "--match", "params:1M", "--samples", "64") == "p-cpu-match=params_1M-samples=64"
    assert name(SEARCH, "--seeds", "1", "2", "--match", "params:1M") == "search-cpu-seeds=1_2-match=params_1M"
    assert name(SEARCH, "--bits-per-image", "576") == "search-cpu-bits_per_image=576"
    assert name(replace(SWEEP, settings={"steps": 77})) == "beta-cpu"


# -- parts ------------------------------------------------------------------------------------------------------------


def test_a_part_is_what_one_study_of_the_dashboard_has(tmp_path):
    """Tokenizers have the steps and metrics of the command line, priors their own."""
    study = replace(PRIORS_TOO, backbones=("cnn", "vit"))
    found = planned(study, tmp_path, "--metric", "psnr", "ssim", "--prior-steps", "77", "--steps", "60")
    ended(found, found.configs("cnn", found.cells["cnn"][0].params)[0], "finished")
    parts = [(part.name, part.label, part.steps, part.metrics) for part in (*found.tokenizers(), *found.followers())]
    metrics = ("psnr", "ssim")
    name = "p-smoke-steps=60-prior_steps=77"
    assert parts == [
        (f"{name}-cnn", "cnn", 60, metrics),
        (f"{name}-vit", "vit", 60, metrics),
        (f"{name}-prior-rnn", "rnn", 77, ("coded_bits_per_token",)),
    ]


def test_a_search_trial_that_was_taken_is_in_the_studys_file_with_every_seed(tmp_path):
    found = planned(replace(SEARCH, seeds=(0, 5)), tmp_path)
    values = {"beta": 0.3, "codebook_size": 64, "code_dim": 7}
    cell = found.claimed(found.tokenizers()[0], FixedTrial(values))
    assert cell.params == values
    assert found.store.study(found.name)["runs"] == {
        run.folder.name: {"backbone": "cnn", **values, "seed": seed}
        for run, seed in zip(cell.runs, (0, 5), strict=True)
    }


BEGAN = '{"low": 0.1, "high": 4.0, "log": true}'
CHANGED = {
    "beta": (Range(0.1, 1.0, log=True), BEGAN, '{"low": 0.1, "high": 1.0, "log": true}'),
    "codebook_size": ((64, 512), "[64, 256]", "[64, 512]"),
    "code_dim": (Range(4, 32.0), '{"low": 4, "high": 32, "log": false}', '{"low": 4, "high": 32.0, "log": false}'),
    "lr": (Range(0.1, 0.2), "no value", '{"low": 0.1, "high": 0.2, "log": false}'),
}


@pytest.mark.parametrize("field", CHANGED)
def test_a_search_whose_space_was_edited_is_refused_before_anything_is_written(tmp_path, field):
    index = Index("sqlite:///:memory:", tmp_path / "studies")
    for _ in range(2):  # what has not changed continues
        found = planned(SEARCH, tmp_path, "--trials", "2")
        assert found.fill(found.tokenizers()[0], index) == 2
    path = tmp_path / "studies" / f"{found.name}.json"
    before = path.read_text()
    choice, old, new = CHANGED[field]
    edited = planned(replace(SEARCH, space={**SPACE, field: choice}), tmp_path, "--trials", "9")
    (part,) = edited.tokenizers()
    with pytest.raises(UserError) as told:
        edited.fill(part, index)
    assert str(told.value) == (
        f"study {found.name} began with {field} from {old} and now draws it from {new}; "
        "undo the change, or start again with another --results"
    )
    assert path.read_text() == before
    assert len(index.trials(part.open(index))) == 2


@pytest.mark.parametrize(
    ("seconds", "ended", "running", "allowed"),
    [(0, 0, 0, True), (24.9, 3, 1, True), (25, 0, 0, False), (0, 4, 1, False), (0, 5, 0, False), (0, 0, 5, False)],
)
def test_a_search_begins_no_trial_beyond_its_budget_or_its_time(tmp_path, seconds, ended, running, allowed):
    index = SimpleNamespace(
        seconds=lambda study: seconds,
        ended=lambda study: ended,
        trials=lambda study, *states, of=(): [None] * running * (states == (TrialState.RUNNING,)),
    )
    hurried = planned(SEARCH, tmp_path, "--trials", "5", "--timeout", "25")
    (part,) = hurried.tokenizers()
    assert hurried.allows(part, index, None) == allowed
    unhurried = planned(SEARCH, tmp_path, "--trials", "5")
    assert unhurried.allows(part, index, None) == (ended + running < 5)
    assert hurried.allows(part._replace(cells=["one that confirms"]), index, None)
    ablation = planned(SWEEP, tmp_path)
    assert all(ablation.allows(part, index, None) for part in ablation.tokenizers())


def test_an_ablation_begins_with_the_first_values_of_the_command_line(tmp_path):
    example = planned(SWEEP, tmp_path, "--beta", "2", "0.5", "--seeds", "7", "3").example("cnn")
    assert (example.beta, example.codebook_size, example.seed) == (2.0, 64, 7)


def test_a_study_has_failed_if_any_run_has_no_scores(tmp_path):
    """Of an ablation any that is planned; of a search any that failed, but pruned is not failed."""
    found = planned(PRIORS_TOO, tmp_path)
    config = found.cells["cnn"][0].configs[0]
    assert found.failed()
    ended(found, config, "finished")
    assert found.failed()  # its prior
    ended(found, priors_of(found)[0], "finished")
    assert not found.failed()
    search = planned(SEARCH, tmp_path)
    for beta, status, failed in ((0.5, "finished", False), (0.6, "pruned", False), (0.7, "timed_out", True)):
        cell = search.claimed(search.tokenizers()[0], FixedTrial({"beta": beta, "codebook_size": 64, "code_dim": 7}))
        ended(search, cell.configs[0], status)
        assert search.failed() == failed


def test_values_are_told_in_few_characters():
    assert [plan.shown(value) for value in (0.25, 1.0, 1e-5, 64, "ema", True)] == [
        *("0.25", "1", "1e-05"),
        *("64", "ema", "True"),
    ]
