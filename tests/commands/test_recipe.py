"""--config FILE.toml: what a run writes repeats it, flags win, and a mistake in a file is told with file and key."""

import shutil
from dataclasses import fields, replace
from pathlib import Path

import pytest

from bench import prior, run
from bench.core.errors import UserError
from bench.core.recipe import from_file, write_recipe
from bench.core.store import Store
from bench.prior import PriorArguments
from bench.priors.config import PriorConfig
from bench.priors.trial import recipe_of as prior_recipe
from bench.run import RunArguments
from bench.sweeps.definition import Ablation, parse_study
from bench.sweeps.search import make_plan
from bench.tokenizers.arguments import parse
from bench.tokenizers.config import Config, make_config
from bench.tokenizers.sizes import parameters
from bench.tokenizers.trial import recipe_of
from tests.commands import TINY
from tests.tokenizers.test_config import OTHER


def configs(*words: str) -> list[Config]:
    """What bench.run makes of a command line."""
    return list(parse(RunArguments, list(words), "run", "").configs())


def settings(folder: Path, text: str) -> str:
    """A file with that text."""
    path = folder / "settings.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_a_run_writes_the_file_that_repeats_it(trial_data, tmp_path, capsys):
    words = ["--backbone", "vit", *TINY, "--beta", "0.3", "--rotary", "--seeds", "3", "--results", str(tmp_path)]
    assert run.main(words) == 0
    (made,) = Store(tmp_path).runs()
    again = configs("--config", str(made.folder / "config.toml"))
    assert [config.run_id() for config in again] == [made.folder.name]
    capsys.readouterr()
    shutil.copy(made.folder / "config.toml", tmp_path / "mine.toml")
    assert run.main(["--config", str(tmp_path / "mine.toml"), "--results", str(tmp_path)]) == 0
    assert f"already finished: {made.folder}" in capsys.readouterr().err


@pytest.mark.parametrize("name", [field.name for field in fields(Config) if field.name not in ("backbone", "seed")])
def test_every_setting_comes_back_as_it_was(tmp_path, name):
    """Of a config in which that one differs from its default, whatever else then has to."""
    config = replace(make_config("cnn", "smoke", seed=2), **{name: OTHER[name]})
    write_recipe(tmp_path / "config.toml", recipe_of(config))
    (again,) = configs("--config", str(tmp_path / "config.toml"))
    assert again == config


def test_flags_win_over_the_file_and_the_file_over_the_preset(tmp_path):
    path = settings(
        tmp_path, 'backbone = ["cnn", "vit"]\npreset = "smoke"\nsteps = 9\nlr = 1\nseeds = 4\nbatch-size = 3'
    )
    first, second = configs("--config", path)
    assert [first.backbone, second.backbone, first.seed] == ["cnn", "vit", 4]
    assert (first.steps, first.lr, first.batch_size, first.image_size) == (9, 1.0, 3, 32)
    (one,) = configs(f"--config={path}", "--backbone", "mamba", "--steps", "8", "--preset", "cpu")
    assert (one.backbone, one.steps, one.image_size, one.seed) == ("mamba", 8, 64, 4)


def test_a_study_reads_what_it_sweeps_from_the_file(tmp_path):
    path = settings(tmp_path, 'beta = [0.5, 1]\nbackbone = "cnn"\nworkers = 2\nseeds = [0]\npreset = "smoke"')
    study = Ablation("beta", {"beta": (0.25,)}, backbones=("vit",))
    options = parse_study(study, "", ["--config", path, "--results", str(tmp_path)])
    assert (options.beta, options.backbone, options.workers) == ((0.5, 1), ("cnn",), 2)
    assert len(make_plan(study, options).cells["cnn"]) == 2


def test_a_prior_comes_back_as_it_was(tmp_path):
    config = PriorConfig("cnn-ema-1", "rnn", dropout=0.3, conditional=True, seed=5, device="cpu", precision="fp32")
    write_recipe(tmp_path / "config.toml", prior_recipe(config, None))
    options = PriorArguments(**from_file(PriorArguments, ["--config", str(tmp_path / "config.toml")]))
    assert [options.config(*options.tokenizer, *options.prior, *options.seeds)] == [config]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("stepz = 3", "there is no setting 'stepz'; perhaps it is steps"),
        ("seed = 3", "there is no setting 'seed'; perhaps it is seeds"),
        ("given = 3", "there is no setting 'given'"),
        ("quux = 3", "there is no setting 'quux'; --help-all lists all that there are"),
        ("steps = 'x'", "steps is 'x'; it must be a whole number"),
        ("steps = 1.5", "steps is 1.5; it must be a whole number"),
        ("steps = true", "steps is True; it must be a whole number"),
        ("steps = 0", "steps is 0; it must be at least 1"),
        ("lr = 'fast'", "lr is 'fast'; it must be a number"),
        ("lr = nan", "lr is nan; it must be above 0"),
        ("lr = [1]", "lr is [1]; it must be a number"),
        ("rotary = 1", "rotary is 1; it must be true or false"),
        ("data = 3", "data is 3; it must be text"),
        ("backbone = ['cnn', 'resnet']", "unknown backbone 'resnet'; choose from"),
        ("preset = 'huge'", "unknown preset 'huge'; choose from"),
        ("quantizer = 'x'", "unknown quantizer 'x'; choose from"),
        ("split = 'train'", "unknown split 'train'; choose from test, val"),
        ("seeds = [0, -1]", "seed is -1; it must be 0 or more"),
        ("[model]\nwidth = 3", "there is no setting 'model'"),
        ("steps = ", "is no TOML: Invalid value"),
        ("steps = 1\nsteps = 2", "is no TOML: Cannot overwrite a value"),
    ],
)
def test_what_is_wrong_in_a_file_is_told_with_file_and_key(tmp_path, capsys, text, told):
    path = settings(tmp_path, text)
    assert run.main(["--config", path, "--results", str(tmp_path / "results")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {path}")
    assert told in line
    assert [one.name for one in tmp_path.iterdir()] == ["settings.toml"]


def test_a_file_that_cannot_be_read_is_told(tmp_path, capsys):
    (tmp_path / "x.toml").write_bytes(b"\xff")
    for name, told in (("none.toml", "cannot read"), (".", "cannot read"), ("x.toml", "is no TOML")):
        for main in (run.main, prior.main):
            assert main(["--config", str(tmp_path / name)]) == 2
            assert told in capsys.readouterr().err
    with pytest.raises(UserError, match="prior 'x'"):
        from_file(PriorArguments, ["--config", settings(tmp_path, "prior = 'x'")])


def test_a_file_s_size_is_that_of_its_backbone_alone(tmp_path):
    """Others are matched, or given one; with neither, nobody would have asked for what they get."""
    path = tmp_path / "cnn.toml"
    path.write_text('backbone = "cnn"\nwidth = 40\ndepth = 3\nimage_size = 32\ngrid_size = 4\n')

    def made(*words: str) -> list[Config]:
        return configs("--config", str(path), "--device", "cpu", *words)

    assert [(one.width, one.depth) for one in made()] == [(40, 3)]
    assert [(one.width, one.depth) for one in made("--backbone", "cnn")] == [(40, 3)]
    with pytest.raises(UserError, match="the file has width and depth of cnn alone; add --match params:1M"):
        made("--backbone", "cnn", "vit")
    with pytest.raises(UserError, match="the file has width and depth of cnn alone"):
        made("--backbone=vit")
    matched = made("--backbone", "cnn", "vit", "--match", "params:275k")
    assert [one.depth for one in matched] != [3, 3]
    assert all(abs(parameters(one) / 275e3 - 1) < 0.02 for one in matched)
    assert [(one.width, one.depth) for one in made("--backbone", "vit", "--width", "32", "--depth", "1")] == [(32, 1)]


def test_a_file_may_name_a_folder(tmp_path):
    path = tmp_path / "a.toml"
    path.write_text(f'results = "{tmp_path}"\n')
    assert parse(RunArguments, ["--config", str(path)], "run", "").results == tmp_path
