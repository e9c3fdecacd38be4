"""Matched budgets: every backbone at the same parameters, FLOPs or time."""

import json
from contextlib import nullcontext, suppress
from dataclasses import replace

import numpy as np
import pytest
import timm

from backbones import BACKBONES
from bench import run
from bench.core.errors import UserError
from bench.sweeps.definition import Ablation, parse_study
from bench.sweeps.search import make_plan
from bench.tokenizers import budgets as module
from bench.tokenizers.arguments import parse
from bench.tokenizers.budgets import match, step_seconds
from bench.tokenizers.config import make_config
from bench.tokenizers.costs import static_costs
from bench.tokenizers.sizes import TOLERANCE, WIDEST, nearest_size, nearest_width
from bench.tokenizers.tokenizer import Tokenizer
from tests.tokenizers.test_config import OTHER

PUBLISHED = ("cnn", "convnext", "vit", "mamba", "bimamba", "hybrid")


def total(config, kind):
    """Both sides' parameters or FLOPs, counted on the model itself."""
    costs = static_costs(Tokenizer(config).eval())
    return [costs[f"{kind}_{side}"] for side in {"params": ("encoder", "decoder"), "flops": ("encode", "decode")}[kind]]


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("budget", ["params:1M", "params:4M", "flops:200M"])
def test_budgets_are_met_within_two_percent(backbone, budget):
    """FLOPs of a backbone of one's own only if its widths, which may come in steps, allow it; if not, that is told."""
    kind, amount = {"params:1M": ("params", 1e6), "params:4M": ("params", 4e6), "flops:200M": ("flops", 2e8)}[budget]
    with suppress(UserError) if kind == "flops" and backbone not in PUBLISHED else nullcontext():
        config = match(make_config(backbone), budget)
        assert sum(total(config, kind)) == pytest.approx(amount, rel=TOLERANCE)
        before = make_config(backbone)
        assert replace(config, width=before.width, depth=before.depth) == before  # nothing else changed


def test_no_pretrained_weights_are_fetched_to_count_with(monkeypatch):
    """A budget is met by shapes, which random weights have too."""
    create, asked = timm.create_model, []

    def note(name, pretrained=False, **options):
        asked.append(pretrained)
        return create(name, pretrained=False, **options)

    monkeypatch.setattr(timm, "create_model", note)
    config = make_config("timm:resnet18", "smoke", pretrained=True)
    costs = {kind: cost(config) for kind, cost in module.COSTS.items()}
    assert asked
    assert not any(asked)
    assert costs == {kind: sum(total(replace(config, pretrained=False), kind)) for kind in costs}


def test_parameters_of_either_side_are_its_own():
    tokenizer = Tokenizer(make_config("vit", quantizer="standard"))
    costs = static_costs(tokenizer)
    for side in ("encoder", "decoder"):
        assert costs[f"params_{side}"] == sum(p.numel() for p in getattr(tokenizer, side).parameters())


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


@pytest.fixture
def timed(monkeypatch, tmp_path):
    """Training whose steps take 10 s in the first quarter and 2 s afterwards; gives the configs that were timed."""
    monkeypatch.setenv("VQBENCH_CACHE", str(tmp_path / "cache"))
    configs = []

    def train(config, images, folder):
        assert images.shape[1:] == (config.image_size, config.image_size, 3)
        configs.append(config)
        steps = np.arange(config.steps)
        seconds = np.where(steps < config.steps // 4, 10.0, 2.0).cumsum()
        rows = [json.dumps({"step": int(step) + 1, "seconds": seconds[step]}) for step in steps]
        (folder / "history.jsonl").write_text("\n".join(rows))

    monkeypatch.setattr(module, "train", train)
    return configs


def test_a_step_is_timed_after_it_has_warmed_up(tiny, timed):
    assert step_seconds(tiny) == pytest.approx(2.0)
    assert match(tiny, "time:1min").steps == 30
    assert match(tiny, "time:60s").steps == 30
    assert match(tiny, "time:0.1s").steps == 1
    assert len(timed) == 1  # and remembered


@pytest.mark.parametrize("content", ["", '{"seconds": "x"}', "[2.0]"])
def test_a_time_that_is_damaged_is_measured_again(tiny, timed, tmp_path, capsys, content):
    step_seconds(tiny)
    (path,) = tmp_path.rglob("speeds/*.json")
    path.write_text(content)
    assert step_seconds(tiny) == pytest.approx(2.0)
    assert f"{path} is damaged: " in capsys.readouterr().err
    path.write_text('{"seconds": 3.0}')  # as older versions wrote it
    assert step_seconds(tiny) == 3.0


@pytest.mark.parametrize("name", OTHER)
def test_what_costs_time_is_timed_anew(tiny, timed, monkeypatch, name):
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "a GPU")
    base = replace(tiny, precision="fp32", backbone="convnext")
    step_seconds(base)
    step_seconds(replace(base, **{name: OTHER[name]}))
    free = {"data", "beta", "ema_decay", "lr", "warmup", "weight_decay", "grad_clip", "weight_ema", "seed", "steps"}
    free |= {"init_from"}
    assert len(timed) == (1 if name in free else 2)


def test_another_machine_times_anew(tiny, timed, monkeypatch):
    step_seconds(tiny)
    monkeypatch.setattr("torch.get_num_threads", lambda: 77)
    step_seconds(tiny)
    monkeypatch.setattr("platform.processor", lambda: "another")
    step_seconds(tiny)
    assert len(timed) == 3


def test_the_nearest_width_is_the_nearest():
    for amount in (1, 9, 10, 90.5, 2000, 10**9):
        found = nearest_width(lambda width: width**2, amount)
        widths = range(1, 2 * WIDEST)
        assert found == min(widths, key=lambda width: abs(width**2 - amount)) or found == WIDEST < amount**0.5


@pytest.mark.parametrize(
    "cost", [lambda w: w, lambda w: w**2, lambda w: w**3, lambda w: (-(-w // 32)) ** 2, lambda w: 7]
)
def test_the_nearest_width_is_found_in_few_looks(cost):
    """However cost grows: evenly, in steps, or not at all."""
    for amount in (1, 6.9, 7.1, 500, 65_000, 10**7):
        looks = []
        found = nearest_width(lambda width, looks=looks: looks.append(width) or cost(width), amount)
        best = min(abs(cost(width) - amount) for width in range(1, WIDEST + 1))
        assert abs(cost(found) - amount) == best
        assert len(looks) <= 40
        assert all(1 <= width <= WIDEST for width in looks)


def test_a_depth_near_the_presets_is_tried_where_no_width_will_do(monkeypatch):
    """Its own first, then one more, one fewer, two more."""
    tried = []

    def cost(config):
        tried.append(config.depth)
        return 1000 * config.depth  # whatever the width

    monkeypatch.setitem(module.COSTS, "params", cost)
    config = replace(make_config("vit"), depth=4)
    assert match(config, "params:3k").depth == 3
    assert list(dict.fromkeys(tried)) == [4, 5, 3]
    assert match(config, "params:6k").depth == 6
    with pytest.raises(UserError, match="the nearest is 6,000 at width"):
        match(config, "params:7k")
    assert match(config, "params:4.07k").depth == 4  # within 2 %
    with pytest.raises(UserError):
        match(config, "params:4.09k")


@pytest.mark.parametrize("kind", ["params", "flops"])
@pytest.mark.parametrize("amount", ["2G", "2000M", "2000000k", "2000000000", "2.0G"])
def test_units_are_powers_of_a_thousand(monkeypatch, kind, amount):
    """Of a model that costs 2 · 10⁹ whatever its size."""
    monkeypatch.setitem(module.COSTS, kind, lambda config: 2e9)
    config = make_config("vit")
    assert match(config, f"{kind}:{amount}").depth == config.depth


def test_a_size_is_the_first_within_two_percent_and_else_the_nearest():
    costs = {4: 1030, 5: 981, 3: 1000, 0: 1000, 7: 900}
    assert nearest_size(lambda width, depth: costs[depth], 1000, (4, 5, 3))[1] == 5
    assert nearest_size(lambda width, depth: costs[depth], 1000, (0, 4))[1] == 4, "no depth of 0"
    assert nearest_size(lambda width, depth: costs[depth], 900, (4, 5, 3))[1] == 5
    assert nearest_size(lambda width, depth: costs[depth], 1000, (7, 3))[1] == 3, "too few will not do either"
    assert nearest_size(lambda width, depth: width * depth, 40, (4, 5)) == (10, 4)


@pytest.mark.parametrize(
    "budget",
    ["", "params", "params:", "params:0", "params:4T", "time:60", "time:0s", "weight:3", "params:1.2.3M", "4M"],
)
def test_a_malformed_budget_is_one_sentence(budget):
    with pytest.raises(UserError, match="params:4M"):
        match(make_config("cnn"), budget)


@pytest.mark.parametrize(
    "budget", ["params:1M,flops:1G", "time:60s,params:1M", "time:60s,time:9s", "params:1M,params:1M", "params:1M,"]
)
def test_a_budget_is_one_size_and_then_one_time(budget):
    with pytest.raises(UserError, match="params:4M"):
        match(make_config("cnn"), budget)


def test_size_and_time_are_met_together(timed):
    """A time after a size is that of the solved width, and sets nothing else."""
    both = match(make_config("cnn"), "params:1M,time:60s")
    sized = match(make_config("cnn"), "params:1M")
    assert both == replace(sized, steps=30)
    assert match(sized, "time:60s") == both


def test_settings_are_checked_before_anything_is_matched():
    """What no model can be built of is told as without a budget."""
    config = parse(run.RunArguments, ["--match", "params:1M", "--grid-size", "5"], "run", "")
    with pytest.raises(UserError, match=r"grid_size 5 does not divide image_size 64 .*; choose from 64, 32, 16"):
        config.configs()


def test_an_impossible_budget_names_the_nearest():
    with pytest.raises(UserError, match=r"vit cannot meet params:10 .* width 1"):
        match(make_config("vit"), "params:10")


@pytest.mark.parametrize(
    ("budget", "name"),
    [
        *[("params:1M", "width"), ("params:1M", "depth"), ("flops:1G", "width"), ("time:9s", "steps")],
        *[("params:1M,time:9s", "depth"), ("params:1M,time:9s", "steps")],
    ],
)
def test_what_was_given_is_not_solved_for(capsys, budget, name):
    assert run.main(["--backbone", "vit", "--match", budget, f"--{name}", "3", "--list"]) == 2
    assert f"{name} is 3, and --match {budget} sets it; leave out one of them" in capsys.readouterr().err


def test_what_a_budget_does_not_set_may_be_given(timed):
    (config,) = parse(run.RunArguments, ["--match", "params:1M", "--steps", "3"], "run", "").configs()
    assert config.steps == 3
    (config,) = parse(run.RunArguments, ["--match", "time:60s", "--width", "24"], "run", "").configs()
    assert (config.width, config.steps) == (24, 30)


def test_a_budget_of_time_lists_the_steps_that_it_sets(timed, capsys):
    assert run.main(["--backbone", "cnn", "--match", "time:60s", "--list"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    (row,) = (line for line in lines if line[:1] == ["cnn"] and line[-1] == "8×8")
    assert row[3] == "30"


def test_a_budget_reaches_every_command(tmp_path, capsys):
    assert run.main(["--backbone", "cnn", "bimamba", "--match", "params:500k", "--list"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.rstrip().endswith("8×8")]
    assert [row[0] for row in rows] == ["cnn", "bimamba"]
    assert [float(row[4]) + float(row[5]) for row in rows] == pytest.approx([0.5, 0.5], abs=0.02)

    study = Ablation("beta", sweep={"grid_size": (4, 8)}, backbones=("cnn", "vit"), seeds=(0,))
    plan = make_plan(study, parse_study(study, "", ["--match", "params:1M", "--results", str(tmp_path)]))
    assert plan.name == "beta-cpu-match=params_1M"
    for backbone, cells in plan.cells.items():
        for cell in cells:
            (config,) = plan.configs(backbone, cell.params)
            assert sum(total(config, "params")) == pytest.approx(1e6, rel=TOLERANCE)
    assert run.main(["--match", "4M"]) == 2
