"""From the command line to a Config: a flag that was given wins, whatever its value; all else is the preset's."""

from dataclasses import asdict, fields

import pytest

from backbones import BACKBONES
from bench.cli import parse
from bench.config import PRESETS, Config, make_config, preset_settings
from bench.files import UserError
from bench.plan import Ablation, Plan, parse_study
from bench.run import RunArguments

DEFAULTS = {field.name: field.default for field in fields(Config)}
# What a preset sets for all backbones or for one, and width and depth, which it sets for each.
SET = [
    (preset, name)
    for preset, chosen in PRESETS.items()
    for name in sorted({*preset_settings(preset), *(n for own in chosen.get("own", {}).values() for n in own)})
]


def flags(name: str, value: object) -> list[str]:
    return [f"--{name.replace('_', '-')}", str(value)]


def command_line(*arguments: str) -> list[Config]:
    return parse(RunArguments, list(arguments), "run", "").configs()


@pytest.mark.parametrize(("preset", "name"), SET)
def test_a_flag_that_was_given_wins_over_the_preset(preset, name):
    """Also where it says what is the default elsewhere: of the field, of the preset, of another backbone."""
    own = [settings[name] for settings in PRESETS[preset].get("own", {}).values() if name in settings]
    for value in {DEFAULTS[name], preset_settings(preset).get(name, DEFAULTS[name]), *own}:
        given = command_line("--preset", preset, "--backbone", *BACKBONES, *flags(name, value), "--device", "cpu")
        usual = [make_config(backbone, preset, device="cpu") for backbone in BACKBONES]
        assert [getattr(config, name) for config in given] == [value] * len(BACKBONES)
        assert [{**asdict(config), name: None} for config in given] == [{**asdict(one), name: None} for one in usual]
        for backbone, config in zip(BACKBONES, given, strict=True):
            assert make_config(backbone, preset, device="cpu", **{name: value}) == config


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(("name", "value"), [("width", 24), ("depth", 3)])
def test_sizes_that_were_given_win_over_those_of_the_preset(preset, name, value):
    configs = command_line("--preset", preset, "--backbone", *BACKBONES, *flags(name, value))
    assert {getattr(config, name) for config in configs} == {value}


@pytest.mark.parametrize("preset", PRESETS)
def test_without_flags_a_command_line_is_the_preset(preset):
    configs = command_line("--preset", preset, "--backbone", *BACKBONES)
    assert configs == [make_config(name, preset) for name in BACKBONES]
    for config in configs:
        own = PRESETS[preset].get("own", {}).get(config.backbone, {})
        settings = {**DEFAULTS, **preset_settings(preset), **own}
        width, depth = PRESETS[preset]["size"][config.backbone]
        assert asdict(config) == {**settings, "backbone": config.backbone, "width": width, "depth": depth}


@pytest.mark.parametrize("words", [["--no-final-conv"], ["--no_final_conv"], ["--final-conv"]])
def test_switches_count_as_given_under_either_name(words, monkeypatch):
    monkeypatch.setitem(PRESETS["smoke"], "final_conv", True)
    (config,) = command_line("--preset", "smoke", "--backbone", "vit", *words)
    assert config.final_conv == (words == ["--final-conv"])
    (config,) = command_line("--preset", "smoke", "--backbone", "vit")
    assert config.final_conv


@pytest.mark.parametrize("word", ["--grid-size=32", "--grid_size=32"])
def test_flags_are_known_with_an_equals_sign_and_with_underscores(word):
    (config,) = command_line("--preset", "blog256", "--backbone", "convnext", word)
    assert config.grid_size == 32


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_sweep_over_what_a_preset_sets_trains_every_value(tmp_path, backbone):
    study = Ablation("both", sweep={"attention": (0, 1)}, backbones=(backbone,), seeds=(0,))
    plan = Plan(study, parse_study(study, "", ["--preset", "blog256", "--results", str(tmp_path)]))
    configs = [plan.configs(backbone, cell.params)[0] for cell in plan.cells[backbone]]
    assert [config.attention for config in configs] == [0, 1]
    assert len({cell.run.folder for cell in plan.cells[backbone]}) == 2


def test_a_study_is_named_by_what_was_given_and_is_not_usual(tmp_path):
    def name(*arguments, settings=None, preset="blog256"):
        study = Ablation("one", sweep={"beta": (0.25,)}, settings=settings or {}, backbones=("cnn",), seeds=(0,))
        return Plan(study, parse_study(study, "", ["--preset", preset, "--results", str(tmp_path), *arguments])).name

    assert name() == "one-blog256"
    assert name("--steps", "30000", "--device", "cpu", "--beta", "0.5") == "one-blog256"  # usual, machine, swept
    assert name("--steps", "7") == "one-blog256-steps=7"
    assert name("--grid-size", "32") == "one-blog256-grid_size=32"  # which convnext would not have without it
    assert name("--grid-size", "32", preset="blog256-fair") == "one-blog256-fair"
    assert name(settings={"grid_size": 32}) == "one-blog256"  # for all backbones, by the study itself
    assert name(settings={"steps": 7}) == "one-blog256"
    assert name("--steps", "30000", settings={"steps": 7}) == "one-blog256-steps=30000"


def test_the_settings_of_a_study_win_over_the_preset_and_flags_over_both(tmp_path):
    study = Ablation("one", sweep={"beta": (0.25,)}, settings={"steps": 700}, backbones=("cnn",), seeds=(0,))

    def steps(*arguments):
        plan = Plan(study, parse_study(study, "", ["--preset", "smoke", "--results", str(tmp_path), *arguments]))
        return plan.configs("cnn", {"beta": 0.25, "seed": 0})[0].steps

    assert steps() == 700  # the field's default, and not smoke's
    assert steps("--steps", "150") == 150


def test_none_means_the_presets_own():
    assert make_config("vit", "smoke", steps=None, width=None) == make_config("vit", "smoke")


def test_unknown_names_are_one_sentence():
    with pytest.raises(UserError, match="unknown setting 'stepz'"):
        make_config("vit", "smoke", stepz=7)
    with pytest.raises(UserError, match="unknown preset 'smok'"):
        make_config("vit", "smok")
    with pytest.raises(UserError, match="unknown backbone 'vitt'"):
        make_config("vitt")
