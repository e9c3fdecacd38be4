"""From the command line to a Config: a flag that was given wins, whatever its value; all else is the preset's."""

import errno
import math
import re
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch
from torch import nn

from backbones import BACKBONES, OPTIONS, Backbone
from bench.core.cli import guarded
from bench.core.environment import has_fast_bf16
from bench.core.errors import Interrupted, UserError
from bench.core.progress import runnable
from bench.data import AUGMENTATIONS, DATASETS
from bench.metrics import MINIMUM_SIZE
from bench.priors.models import PRIORS
from bench.quantizers import QUANTIZERS
from bench.quantizers.codebook import GRADIENTS
from bench.run import RunArguments, main
from bench.sweeps.definition import Ablation, parse_study
from bench.sweeps.search import make_plan
from bench.tokenizers.arguments import parse
from bench.tokenizers.config import PROTOCOL_VERSION, Config, make_config, preset_settings
from bench.tokenizers.losses import ADVERSARIAL, RECONSTRUCTION
from bench.tokenizers.presets import PRESETS
from bench.tokenizers.sizes import parameters, width_of

ROOT = Path(__file__).parents[2] / "bench"
TYPES = get_type_hints(Config)
DEFAULTS = {field.name: field.default for field in fields(Config)}
# What a preset sets for all backbones or for one, but for the sizes of models.
SET = [
    (preset, name)
    for preset, chosen in PRESETS.items()
    for name in sorted({*preset_settings(preset), *(n for own in chosen["own"].values() for n in own)})
    if name not in ("width", "depth")
]
# Width and depth, which are part of the identity of every run that was ever made: no change of a preset, of a backbone
# or of how widths are solved may move them.
SMALL = {"cnn": (738, 2), "convnext": (1073, 2), "vit": (512, 8)}
SMALL |= {"mamba": (472, 8), "bimamba": (454, 6), "hybrid": (443, 8)}
SIZES = {
    "smoke": {
        **{"cnn": (40, 3), "convnext": (56, 3), "vit": (64, 2)},
        **{"mamba": (56, 2), "bimamba": (48, 2), "hybrid": (52, 2)},
    },
    "cpu": {
        **{"cnn": (128, 1), "convnext": (128, 2), "vit": (112, 2)},
        **{"mamba": (104, 2), "bimamba": (88, 2), "hybrid": (80, 3)},
    },
    "vqgan64": {
        **{"cnn": (315, 2), "convnext": (452, 2), "vit": (250, 6)},
        **{"mamba": (229, 6), "bimamba": (233, 4), "hybrid": (215, 6)},
    },
    "vqvae32": {
        **{"cnn": (96, 2), "convnext": (134, 2), "vit": (99, 3)},
        **{"mamba": (93, 3), "bimamba": (95, 2), "hybrid": (82, 3)},
    },
    "celeba64": {
        **{"cnn": (128, 2), "convnext": (180, 2), "vit": (128, 3)},
        **{"mamba": (119, 3), "bimamba": (120, 2), "hybrid": (108, 3)},
    },
    "vitvqgan-s": SMALL,
    "blog256": {
        **{"cnn": (384, 2), "convnext": (384, 2), "vit": (768, 12)},
        **{"mamba": (768, 12), "bimamba": (768, 12), "hybrid": (768, 12)},
    },
    "blog256-fair": {
        **{"cnn": (693, 2), "convnext": (908, 2), "vit": (512, 8)},
        **{"mamba": (476, 8), "bimamba": (460, 6), "hybrid": (448, 8)},
    },
    "blog64": {
        **{"cnn": (153, 2), "convnext": (48, 2), "vit": (192, 2)},
        **{"mamba": (178, 2), "bimamba": (152, 2), "hybrid": (169, 2)},
    },
    "blog64-fair": {
        **{"cnn": (87, 2), "convnext": (112, 2), "vit": (101, 2)},
        **{"mamba": (97, 2), "bimamba": (84, 2), "hybrid": (95, 2)},
    },
}


def flags(name: str, value: object) -> list[str]:
    if isinstance(value, bool):
        return [f"--{'' if value else 'no-'}{name.replace('_', '-')}"]
    return [f"--{name.replace('_', '-')}", str(value)]


def command_line(*arguments: str) -> list[Config]:
    return parse(RunArguments, list(arguments), "run", "").configs()


@pytest.mark.parametrize(("preset", "name"), SET)
def test_a_flag_that_was_given_wins_over_the_preset(preset, name):
    """Also where it says what is the default elsewhere: of the field, of the preset, of another backbone."""
    own = [settings[name] for settings in PRESETS[preset]["own"].values() if name in settings]
    them = [one for one in BACKBONES if name not in OPTIONS or name in BACKBONES[one].options]
    for value in {DEFAULTS[name], preset_settings(preset).get(name, DEFAULTS[name]), *own}:
        given = command_line("--preset", preset, "--backbone", *them, *flags(name, value), "--device", "cpu")
        usual = [make_config(backbone, preset, device="cpu") for backbone in them]
        assert [getattr(config, name) for config in given] == [value] * len(them)
        assert [{**asdict(config), name: None} for config in given] == [{**asdict(one), name: None} for one in usual]
        for backbone, config in zip(them, given, strict=True):
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
        own = PRESETS[preset]["own"].get(config.backbone, {})
        expected = {**DEFAULTS, **preset_settings(preset), **own, "backbone": config.backbone}
        assert {**asdict(config), "width": 0, "depth": 0} == {**expected, "width": 0, "depth": 0}  # see SIZES


def test_every_backbone_and_seed_is_one_config():
    configs = command_line("--preset", "smoke", "--backbone", "cnn", "vit", "--seeds", "3", "5")
    assert [(config.backbone, config.seed) for config in configs] == [("cnn", 3), ("cnn", 5), ("vit", 3), ("vit", 5)]


def test_an_image_has_grid_size_squared_tokens():
    assert [make_config("cnn", grid_size=side).tokens for side in (1, 4, 16)] == [1, 16, 256]


def test_help_shows_the_values_of_the_preset(capsys):
    with pytest.raises(SystemExit):
        command_line("--preset", "blog256", "--help")
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "(default: 8192)" in said  # of codebook_size
    assert said.count("(default: the preset's)") == 2  # of width and depth, which differ between backbones
    assert f"{', '.join(BACKBONES)} or timm:MODEL" in said


def test_help_says_whose_it_is(capsys):
    with pytest.raises(SystemExit):
        parse(RunArguments, ["--help"], "python -m bench.anything", "Does anything at all.")
    said = " ".join(capsys.readouterr().out.split())
    assert said.startswith(runnable("usage: python -m bench.anything "))
    assert "Does anything at all." in said


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
    plan = make_plan(study, parse_study(study, "", ["--preset", "blog256", "--results", str(tmp_path)]))
    configs = [plan.configs(backbone, cell.params)[0] for cell in plan.cells[backbone]]
    assert [config.attention for config in configs] == [0, 1]
    assert len({cell.run.folder for cell in plan.cells[backbone]}) == 2


def test_a_study_is_named_by_what_was_given_and_is_not_usual(tmp_path):
    def name(*arguments, settings=None, preset="blog256"):
        study = Ablation("one", sweep={"beta": (0.25,)}, settings=settings or {}, backbones=("cnn",), seeds=(0,))
        return make_plan(
            study, parse_study(study, "", ["--preset", preset, "--results", str(tmp_path), *arguments])
        ).name

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
        plan = make_plan(study, parse_study(study, "", ["--preset", "smoke", "--results", str(tmp_path), *arguments]))
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


# ------------------------------------------------------------------------------------------------------------- identity

OTHER = {  # another valid value of every field, of a convnext with ema codes
    **{"backbone": "cnn", "width": 24, "depth": 4, "attention": 1, "quantizer": "l2", "data": "cifar10"},
    **{"image_size": 128, "grid_size": 8, "codebook_size": 64, "code_dim": 3, "beta": 1.0, "ema_decay": 0.9},
    **{"kmeans_init": True, "entropy_weight": 0.5, "gradient": "rotation", "temperature": 0.5, "revive_after": 9},
    **{"token_order": "snake", "two_streams": True, "vision_mixer": True, "rotary": True},
    **{"rms_norm": True, "full_resolution": True},
    **{"kl_weight": 0.5, "temperature_end": 0.5, "uniform_weight": 0.5, "codebooks": 3},
    **{"reconstruction_weight": 0.5, "reconstruction_end": 0.5},
    **{"alignment_weight": 0.5, "alignment_model": "test_vit", "alignment_file": "sha256:0123456789abcdef"},
    **{"init_from": "sha256:0123456789abcdef", "freeze": "encoder"},
    **{"reconstruction": "l1", "lpips_weight": 0.5, "lpips_net": "vgg", "gan_weight": 0.5, "gan_start": 0.25},
    **{"gan_ramp": 0.25, "gan_warmup": 0.25, "gan_loss": "nonsaturating", "gan_adaptive": False, "gan_lr": 0.5},
    **{"gan_width": 8, "gan_layers": 2, "gan_norm": "spectral", "lecam_weight": 0.5, "r1_weight": 0.5, "steps": 7},
    **{"batch_size": 7, "lr": 0.5, "warmup": 7, "weight_decay": 0.5, "grad_clip": 0.5, "weight_ema": 0.5},
    **{"augment": "none", "precision": "bf16", "device": "cuda", "seed": 1, "patch_overlap": True},
    **{"final_conv": True, "pretrained": True, "split": "val", "train_images": 7},
}


@pytest.fixture
def config() -> Config:
    return make_config("convnext", "smoke", precision="fp32", device="cpu")


def test_every_field_is_part_of_the_identity(config):
    assert OTHER.keys() == DEFAULTS.keys(), "another value of every setting belongs into OTHER"
    ids = {config.run_id(), *(replace(config, **{name: value}).run_id() for name, value in OTHER.items())}
    assert len(ids) == 1 + len(OTHER)


def test_the_protocol_version_is_part_of_the_identity(config, monkeypatch):
    before = config.run_id()
    monkeypatch.setattr("bench.tokenizers.config.PROTOCOL_VERSION", PROTOCOL_VERSION + 1)
    assert config.run_id() != before


def test_several_quantizers_are_run_in_turn():
    """Each with every backbone and seed; a preset's own is one; none is a mistake."""
    words = ("--backbone", "cnn", "vit", "--quantizer", "ema", "none", "--seeds", "0", "1", "--preset", "smoke")
    found = [(config.backbone, config.quantizer, config.seed) for config in command_line(*words)]
    assert found == [(a, b, c) for a in ("cnn", "vit") for b in ("ema", "none") for c in (0, 1)]
    assert [config.quantizer for config in command_line("--backbone", "cnn")] == ["ema"]
    assert [config.quantizer for config in command_line("--backbone", "cnn", "--preset", "vqgan64")] == [
        PRESETS["vqgan64"].get("quantizer", "ema")
    ]
    with pytest.raises(UserError, match="--quantizer needs at least one value"):
        command_line("--quantizer", "--preset", "smoke")


def test_an_id_is_a_folder_name_that_says_what_ran(config):
    assert config.run_id().startswith("convnext-ema-")
    assert replace(config, backbone="timm:resnet18").run_id().startswith("timm-resnet18-ema-")
    assert config.run_id() == replace(config).run_id()


@pytest.mark.parametrize(("cuda", "device"), [(True, "cuda"), (False, "cpu")])
def test_auto_is_what_the_machine_has_and_as_good_as_saying_so(config, monkeypatch, cuda, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    auto = replace(config, device="auto", precision="auto")
    for fast in ({device}, set()):  # devices that have bf16
        monkeypatch.setattr("bench.core.device.has_fast_bf16", fast.__contains__)
        found = auto.resolved()
        assert (found.device, found.precision) == (device, "bf16" if fast else "fp32")
        assert auto.run_id() == replace(config, device=device, precision=found.precision).run_id()
        assert config.resolved().precision == "fp32"


@pytest.mark.parametrize("has", [True, False])
def test_bf16_is_chosen_only_where_hardware_has_it(monkeypatch, has):
    asked: dict[str, bool] = {}
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has, raising=False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **options: asked.update(options) or has)
    assert has_fast_bf16("cpu") is has
    assert has_fast_bf16("cuda:1") is has
    assert asked == {"including_emulation": False}


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_a_quantizer_is_allowed_with_all_else_as_it_is(quantizer):
    """Settings that it makes no use of are refused where they were given, and not at their defaults."""
    make_config("cnn", "smoke", quantizer=quantizer, codebook_size=64, device="cpu").check()


@pytest.mark.parametrize("word", ["--preset ", "--preset="])
def test_of_two_presets_the_last_one_counts(word, capsys):
    """In what runs, and in what help says."""
    words = f"{word}blog256 {word}smoke".split()
    assert command_line(*words) == command_line("--preset", "smoke")
    with pytest.raises(SystemExit):
        command_line(*words, "--help")
    said = capsys.readouterr().out
    assert "(default: 128)" in said  # of codebook_size
    assert "(default: 8192)" not in said


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_an_open_entropy_weight_is_the_quantizers_own(config, quantizer):
    usual = {"bsq": 0.1, "lfq": 0.1, "simvq": 0.02}.get(quantizer, 0.0)
    opened = replace(config, quantizer=quantizer)
    assert opened.resolved().entropy_weight == usual
    assert replace(opened, entropy_weight=0.7).resolved().entropy_weight == 0.7
    assert replace(opened, entropy_weight=0.0).resolved().entropy_weight == 0.0
    assert opened.run_id() == replace(opened, entropy_weight=usual).run_id()


def test_a_folder_is_known_by_its_real_path(config, tmp_path, monkeypatch):
    (tmp_path / "images").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "images")
    real = f"folder:{(tmp_path / 'images').resolve()}"
    assert replace(config, data=f"folder:{tmp_path / 'link'}").resolved().data == real
    monkeypatch.chdir(tmp_path)
    assert replace(config, data="folder:images/../link").resolved().data == real
    monkeypatch.setenv("HOME", str(tmp_path))
    assert replace(config, data="folder:~/images").resolved().data == real
    assert config.resolved().data == "photos"
    assert replace(config, data="folder:").resolved().data == "folder:"  # no path is not the present folder


# --------------------------------------------------------------------------------------------------------------- checks

LEAST = {  # the smallest value that is allowed, and one that is not
    **dict.fromkeys(("width", "depth", "code_dim", "steps", "batch_size", "gan_width", "gan_layers"), (1, 0)),
    **{"codebook_size": (2, 1), "grid_size": (1, 0)},
    **dict.fromkeys(("attention", "warmup", "revive_after", "seed"), (0, -1)),
    **dict.fromkeys(("beta", "lpips_weight", "gan_weight", "gan_lr", "lecam_weight", "r1_weight"), (0.0, -1e-9)),
    **dict.fromkeys(("weight_decay", "grad_clip", "entropy_weight"), (0.0, -1e-9)),
    **dict.fromkeys(("gan_start", "gan_ramp", "gan_warmup", "ema_decay", "weight_ema"), (0.0, -1e-9)),
    "lr": (1e-9, 0.0),
}
MOST = {
    **dict.fromkeys(("gan_start", "gan_ramp", "gan_warmup"), (1.0, 1.0 + 1e-9)),
    **dict.fromkeys(("ema_decay", "weight_ema"), (1 - 1e-9, 1.0)),
    "seed": (2**31 - 1, 2**31),
    **dict.fromkeys(("width", "code_dim", "gan_width"), (16384, 16385)),
    **dict.fromkeys(("depth", "attention"), (1000, 1001)),
    "steps": (2**31 - 1, 2**31),
    "batch_size": (2**16, 2**16 + 1),
    **{"codebook_size": (2**24, 2**24 + 1), "gan_layers": (10, 11)},
}


@pytest.mark.parametrize(("name", "allowed", "refused"), [(k, *v) for k, v in [*LEAST.items(), *MOST.items()]])
def test_ranges_end_where_they_say(config, name, allowed, refused):
    replace(config, **{name: allowed}).check()
    with pytest.raises(UserError, match=rf"^{name} (is )?{refused}"):
        replace(config, **{name: refused}).check()


@pytest.mark.parametrize("name", [name for name, kind in TYPES.items() if kind in (float, float | None)])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_no_setting_may_be_infinite_or_no_number(config, name, value):
    with pytest.raises(UserError, match=rf"^{name} is {value}"):
        replace(config, **{name: value}).check()


def test_a_temperature_is_above_zero(config):
    gumbel = replace(config, quantizer="gumbel")
    replace(gumbel, temperature=1e-9).check()
    with pytest.raises(UserError, match="temperature is 0"):
        replace(gumbel, temperature=0.0).check()


@pytest.mark.parametrize("net", MINIMUM_SIZE)
def test_images_are_large_enough_for_both_networks_that_score_them(config, net):
    """31 pixels for AlexNet, whichever network the loss uses."""
    replace(config, lpips_net=net, image_size=32, grid_size=4).check()
    with pytest.raises(UserError, match="image_size is 30; LPIPS needs at least 31"):
        replace(config, lpips_net=net, image_size=30, grid_size=15).check()


@pytest.mark.parametrize(
    "name",
    ["quantizer", "augment", "reconstruction", "lpips_net", "gradient", "gan_loss", "gan_norm", "precision"],
)
def test_choices_are_named_when_none_was_met(config, name):
    with pytest.raises(UserError, match=f"unknown {name} 'nonsense'; choose from .*{getattr(config, name)}"):
        replace(config, **{name: "nonsense"}).check()


@pytest.mark.parametrize(
    ("name", "variants"),
    [("gradient", GRADIENTS), ("gan_loss", ADVERSARIAL), ("reconstruction", RECONSTRUCTION)],
)
def test_the_choices_of_a_type_are_those_that_there_are(name, variants):
    assert set(get_args(TYPES[name])) == set(variants)


@pytest.mark.parametrize(
    ("settings", "fix"),
    [
        ({"patch_overlap": True}, "vit, mamba, bimamba, hybrid"),
        ({"final_conv": True}, "vit, mamba, bimamba, hybrid"),
        ({"pretrained": True}, "timm:MODEL"),
        ({"temperature": 0.5}, "gumbel"),
        ({"ema_decay": 0.5, "quantizer": "l2"}, "ema, ema_l2, product, residual"),
        ({"entropy_weight": 0.5, "quantizer": "fsq"}, "standard, "),
        ({"beta": 0.5, "quantizer": "fsq"}, "standard, "),
        ({"revive_after": 9, "quantizer": "lfq"}, "standard, "),
    ],
)
def test_a_setting_that_would_do_nothing_is_refused(config, settings, fix):
    """And says who makes use of it (bug 16)."""
    with pytest.raises(UserError, match=rf"of which .* makes no use; leave it out or choose from .*{fix}"):
        replace(config, **settings).check()


@pytest.mark.parametrize(("grid_size", "works"), [(1, True), (32, True), (12, False), (64, False), (3, False)])
def test_a_grid_divides_the_image_as_a_power_of_two(config, grid_size, works):
    if works:
        replace(config, grid_size=grid_size).check()
    else:
        with pytest.raises(UserError, match="choose from 32, 16, 8, 4, 2, 1"):
            replace(config, grid_size=grid_size).check()


# -------------------------------------------------------------------------------------------------------------- presets


@pytest.mark.parametrize("preset", [name for name in PRESETS if name not in ("blog256", "blog64")])
def test_a_preset_gives_all_backbones_as_many_parameters(preset):
    """Within 5 % of their median, at one grid and one number of codes."""
    configs = [make_config(name, preset) for name in BACKBONES]
    counts = [parameters(config) for config in configs]
    median = sorted(counts)[len(counts) // 2]
    assert all(abs(count / median - 1) < 0.05 for count in counts), dict(zip(BACKBONES, counts, strict=True))
    assert len({(config.grid_size, config.codebook_size, config.image_size) for config in configs}) == 1


@pytest.mark.parametrize("preset", PRESETS)
def test_the_sizes_of_a_preset_stay_what_they_were(preset):
    """Those of timm:MODEL are those of the CNN, whose decoder it has."""
    configs = {name: make_config(name, preset) for name in (*SIZES[preset], "timm:resnet18")}
    expected = {**SIZES[preset], "timm:resnet18": SIZES[preset]["cnn"]}
    assert {name: (config.width, config.depth) for name, config in configs.items()} == expected


@pytest.mark.parametrize("given", [{"depth": 3}, {"grid_size": 16}, {"code_dim": 5}, {"image_size": 128}])
def test_the_width_of_a_preset_depends_on_nothing_that_was_given(given):
    assert make_config("vit", "cpu", **given).width == SIZES["cpu"]["vit"][0]


def test_making_a_config_draws_no_random_numbers():
    width_of.cache_clear()
    parameters.cache_clear()
    before = torch.get_rng_state()
    make_config("hybrid", "smoke")
    assert torch.get_rng_state().equal(before)


@pytest.fixture
def toy(monkeypatch) -> str:
    """A backbone that nobody but BACKBONES knows of: patches through ``depth`` convolutions of 1×1."""

    def blocks(width, depth):
        return (nn.Conv2d(width, width, 1) for _ in range(depth))

    def encoder(image_size, grid_size, code_dim, width, depth, attention):
        patch = image_size // grid_size
        first, last = nn.Conv2d(3 * patch**2, width, 1), nn.Conv2d(width, code_dim, 1)
        return nn.Sequential(nn.PixelUnshuffle(patch), first, *blocks(width, depth), last)

    def decoder(image_size, grid_size, code_dim, width, depth, attention):
        patch = image_size // grid_size
        first, last = nn.Conv2d(code_dim, width, 1), nn.Conv2d(width, 3 * patch**2, 1)
        return nn.Sequential(first, *blocks(width, depth), last, nn.PixelShuffle(patch))

    monkeypatch.setitem(BACKBONES, "toy", Backbone(encoder, decoder))
    return "toy"


@pytest.mark.parametrize("preset", PRESETS)
def test_a_new_backbone_has_a_size_in_every_preset(toy, preset):
    config = make_config(toy, preset, device="cpu")
    config.check()
    assert config.depth == PRESETS[preset]["depth"]
    assert parameters(config) == pytest.approx(PRESETS[preset]["params"], rel=0.02)
    others = [parameters(make_config(name, preset)) for name in SIZES[preset]]
    assert 0.95 * min(others) < parameters(config) < 1.05 * max(others)
    assert make_config(toy, preset, width=7, depth=3, device="cpu") == replace(config, width=7, depth=3)


def test_a_new_backbone_is_listed_matched_and_studied(toy, tmp_path, capsys):
    arguments = ["--backbone", "cnn", toy, "--list", "--device", "cpu"]
    assert main(arguments) == main([*arguments, "--match", "params:300k"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if re.match(" toy ", line)]
    assert len(lines) == 2
    assert all(width.isdigit() for _, width, *_ in lines)
    study = Ablation("beta", sweep={"beta": (0.25,)}, backbones=(toy,), seeds=(0,))
    plan = make_plan(study, parse_study(study, "", ["--results", str(tmp_path), "--device", "cpu"]))
    assert [cell.run.folder.name.startswith("toy-ema-") for cell in plan.cells[toy]] == [True]


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_can_work(preset):
    for name in BACKBONES:
        make_config(name, preset, device="cpu").check()


# --------------------------------------------------------------------------------------------------- mistakes and stops


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (UserError("beta is -1; it must be 0 or more"), 2, "beta is -1; it must be 0 or more"),
        (OSError(errno.ENOSPC, "No space left on device", "x.pt"), 2, "No space left on device while writing x.pt"),
        (OSError(errno.EROFS, "Read-only file system", "results/runs/x.pt"), 2, "choose another --results"),
        (Interrupted("stopped at step 3 of 9; the same command continues from there"), 130, "stopped at step 3 of 9"),
        (KeyboardInterrupt(), 130, "stopped"),
    ],
)
def test_what_the_user_can_mend_is_one_sentence_and_an_exit_code(capsys, raised, code, said):
    def work() -> int:
        raise raised

    assert guarded(work) == code
    assert said in " ".join(capsys.readouterr().err.split())


def test_other_errors_are_not_hidden_and_exit_codes_pass():
    with pytest.raises(FileNotFoundError):
        guarded(lambda: open("/no/such/file").close() or 0)
    with pytest.raises(ZeroDivisionError):
        guarded(lambda: 1 // 0)
    assert guarded(lambda: 1) == 1


def test_the_help_of_a_field_names_all_that_it_may_be():
    """A new variant belongs into the docstring of the field that chooses it."""
    texts = {path: (ROOT / path).read_text(encoding="utf-8") for path in ("tokenizers/config.py", "priors/config.py")}
    for path, field, names in (
        ("tokenizers/config.py", "quantizer", QUANTIZERS),
        ("tokenizers/config.py", "data", DATASETS),
        ("tokenizers/config.py", "augment", AUGMENTATIONS),
        ("priors/config.py", "prior", PRIORS),
    ):
        (words,) = re.findall(rf'^    {field}: [^\n]*\n    """(.*?)"""', texts[path], re.M | re.S)
        assert [name for name in names if not re.search(rf"\b{name}\b", words)] == [], f"{field} in bench/{path}"


def test_attention_is_refused_where_a_backbone_makes_no_use_of_it(monkeypatch):
    monkeypatch.setitem(BACKBONES, "plain", BACKBONES["cnn"]._replace(encoder_options=(), decoder_options=()))
    with pytest.raises(UserError, match="attention is 1, of which backbone 'plain' makes no use"):
        make_config("plain", "smoke", attention=1, device="cpu").check()


@pytest.mark.parametrize("change", [{"backbone": 3}, {"backbone": None}, {"data": 1}, {"image_size": "64"}])
def test_a_setting_of_another_kind_is_one_sentence_whichever_it_is(config, change):
    """And no traceback of what looks at it first."""
    (name,) = change
    with pytest.raises(UserError, match=rf"^{name} is .*; it must be "):
        replace(config, **change).check()


@pytest.mark.parametrize("flag", ["--backbone", "--seeds"])
def test_a_command_for_nothing_is_told(flag):
    with pytest.raises(UserError, match=f"^{flag} needs at least one value$"):
        parse(RunArguments, [flag, "--preset", "smoke"], "x", "").configs()


def test_runs_of_before_later_fields_existed_keep_their_ids(config):
    """The id that this config had before there were any."""
    assert config.run_id() == "convnext-ema-774245e58bfb"


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_every_preset_takes_every_quantizer(preset, quantizer):
    """What a preset says of its own, such as β, is left out where another has no use for it; what is given is not."""
    sizes = {"width": 8, "device": "cpu"} | ({"codebook_size": 512} if quantizer != "fsq" else {"codebook_size": 1000})
    make_config("cnn", preset, quantizer=quantizer, **sizes).check()
    if quantizer == "none":
        with pytest.raises(UserError, match=r"beta is 3\.0, of which quantizer 'none' makes no use"):
            make_config("cnn", preset, quantizer=quantizer, beta=3.0, **sizes).check()
