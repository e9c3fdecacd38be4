"""Matched budgets: every backbone at the same parameters, FLOPs or time."""

from dataclasses import replace

import pytest

from backbones import BACKBONES
from bench import match as module
from bench import run
from bench.config import make_config
from bench.costs import static_costs
from bench.files import UserError
from bench.match import TOLERANCE, match, step_seconds
from bench.plan import Ablation, Plan, parse_study
from bench.tokenizer import Tokenizer


def total(config, kind):
    """Both sides' parameters or FLOPs, counted on the model itself."""
    costs = static_costs(Tokenizer(config).eval())
    return [costs[f"{kind}_{side}"] for side in {"params": ("encoder", "decoder"), "flops": ("encode", "decode")}[kind]]


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("budget", ["params:1M", "params:4M", "flops:200M"])
def test_budgets_are_met_within_two_percent(backbone, budget):
    kind, amount = {"params:1M": ("params", 1e6), "params:4M": ("params", 4e6), "flops:200M": ("flops", 2e8)}[budget]
    config = match(make_config(backbone), budget)
    assert sum(total(config, kind)) == pytest.approx(amount, rel=TOLERANCE)
    before = make_config(backbone)
    assert replace(config, width=before.width, depth=before.depth) == before  # nothing else changed


def test_matching_is_repeatable_and_grows_with_the_budget():
    config = make_config("vit")
    assert match(config, "params:2M") == match(config, "params:2M")
    assert match(config, "params:500k").width < match(config, "params:2M").width
    assert match(match(config, "params:2M"), "params:2M") == match(config, "params:2M")


def test_time_sets_the_steps(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("VQBENCH_CACHE", str(tmp_path))
    seconds = step_seconds(tiny)
    assert seconds > 0
    monkeypatch.setattr(module, "train", None)  # the second time nothing is trained
    assert step_seconds(replace(tiny, seed=9, steps=99)) == seconds
    config = match(tiny, "time:2min")
    assert config.steps == round(120 / seconds)
    assert replace(config, steps=tiny.steps) == tiny


@pytest.mark.parametrize(
    "budget",
    ["", "params", "params:", "params:0", "params:4T", "time:60", "time:0s", "weight:3", "params:1.2.3M", "4M"],
)
def test_a_malformed_budget_is_one_sentence(budget):
    with pytest.raises(UserError, match="params:4M"):
        match(make_config("cnn"), budget)


def test_an_impossible_budget_names_the_nearest():
    with pytest.raises(UserError, match=r"vit cannot meet params:10 .* width 1"):
        match(make_config("vit"), "params:10")


def test_a_budget_reaches_every_command(tmp_path, capsys):
    assert run.main(["--backbone", "cnn", "bimamba", "--match", "params:500k", "--list"]) == 0
    rows = [line.split("│") for line in capsys.readouterr().out.splitlines() if "│ cnn" in line or "│ bimamba" in line]
    assert [float(row[4]) + float(row[5]) for row in rows] == pytest.approx([0.5, 0.5], abs=0.02)

    study = Ablation("beta", sweep={"grid_size": (4, 8)}, backbones=("cnn", "vit"), seeds=(0,))
    plan = Plan(study, parse_study(study, "", ["--match", "params:1M", "--results", str(tmp_path)]))
    assert plan.name == "beta-cpu-match=params_1M"
    for backbone, cells in plan.cells.items():
        for cell in cells:
            (config,) = plan.configs(backbone, cell.params)
            assert sum(total(config, "params")) == pytest.approx(1e6, rel=TOLERANCE)
    assert run.main(["--match", "4M"]) == 2
