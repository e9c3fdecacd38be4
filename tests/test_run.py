"""The command line as a stranger uses it."""

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import pytest
from fabricate import fabricate
from PIL import Image
from safetensors.torch import load_file

from backbones import BACKBONES
from bench import run, store, trial, weights
from bench.cli import parse
from bench.config import PRESETS, PROTOCOL_VERSION, Config, make_config
from bench.doctor import main as doctor
from bench.files import cache_dir
from bench.frames import frame, unmatched
from bench.quantizers import QUANTIZERS
from bench.store import Store

ROOT = Path(__file__).parent.parent
TINY = [
    "--preset",
    "smoke",
    "--width",
    "16",
    "--depth",
    "1",
    "--codebook-size",
    "16",
    "--steps",
    "3",
    "--device",
    "cpu",
]


@pytest.fixture
def command(tmp_path, capsys):
    """Runs the command line; gives the exit code, what it printed on stdout, and on stderr."""

    def command(*arguments: str) -> tuple[int, str, str]:
        try:
            code = run.main([*arguments, "--results", str(tmp_path / "results")])
        except SystemExit as stop:
            code = stop.code
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return command


def test_one_run_ends_with_a_table_a_protocol_and_the_next_command(trial_data, command):
    code, out, err = command("--backbone", "cnn", *TINY)
    assert code == 0
    assert "cnn ema 0" in out
    assert "k-means on patches" in out
    assert f"Protocol {PROTOCOL_VERSION}" in out
    assert "24 validation images" in out
    assert "Next: python -m bench.run --backbone cnn convnext" in out
    assert "finished" in err
    code, out, err = command("--backbone", "cnn", *TINY)
    assert code == 0
    assert "already finished" in err


def test_several_backbones_and_seeds(trial_data, command):
    code, out, _ = command("--backbone", "cnn", "vit", "--seeds", "0", "3", *TINY)
    assert code == 0
    for label in ("cnn ema 0", "cnn ema 3", "vit ema 0", "vit ema 3"):
        assert label in out


def test_a_diverged_run_is_shown_and_the_others_go_on(trial_data, command, monkeypatch):
    real = trial.train

    def train(config, *rest):
        if config.backbone == "cnn":
            raise run.Diverged("loss or gradient not finite by step 1; try --lr below 0.1")
        return real(config, *rest)

    monkeypatch.setattr(trial, "train", train)
    code, out, _ = command("--backbone", "cnn", "vit", *TINY)
    assert code == 1
    assert "diverged" in out
    assert "vit ema 0" in out


def test_list_shows_sizes_and_trains_nothing(command, monkeypatch):
    monkeypatch.setattr(trial, "train", None)
    code, out, _ = command("--list", "--backbone", "cnn", "convnext", "vit", "mamba", "bimamba", "--preset", "smoke")
    assert code == 0
    for word in ("cnn", "convnext", "vit", "mamba", "bimamba", "4×4", "MFLOP"):
        assert word in out


def test_help_names_every_setting(command):
    code, out, _ = command("--help")
    assert code == 0
    for field in fields(Config):
        name = "--seeds" if field.name == "seed" else f"--{field.name.replace('_', '-')}"
        assert name in out, name
    for name in QUANTIZERS:
        assert name in out


def write_images(folder: Path, count: int, broken: int = 0) -> Path:
    folder.mkdir(parents=True)
    for index in range(count):
        Image.new("RGB", (40, 40), (index, 0, 0)).save(folder / f"{index}.png")
    for index in range(broken):
        (folder / f"broken{index}.png").write_bytes(b"nothing")
    return folder


BAD = {
    "unknown backbone": (["--backbone", "resnet"], "unknown backbone 'resnet'; choose from cnn"),
    "unknown quantizer": (["--quantizer", "vq"], "unknown quantizer 'vq'; choose from standard"),
    "unknown augmentation": (["--augment", "mixup"], "unknown augment 'mixup'; choose from none"),
    "unknown data": (["--data", "imagenet"], "unknown data 'imagenet'"),
    "unknown preset": (["--preset", "huge"], "unknown preset 'huge'; choose from smoke"),
    "grid does not divide": (["--grid-size", "7"], "grid_size 7 does not divide image_size 32 as a power of two"),
    "no codes": (["--codebook-size", "0"], "codebook_size is 0; it must be at least 1"),
    "negative beta": (["--beta", "-0.5"], "beta is -0.5; it must be 0 or more"),
    "beta is not a number": (["--beta", "nan"], "beta is nan; it must be 0 or more"),
    "no learning rate": (["--lr", "0"], "lr is 0.0; it must be above 0"),
    "images too small": (["--image-size", "16"], "image_size is 16; LPIPS needs at least"),
    "images too large": (["--image-size", "4096"], "352"),
    "no such device": (["--device", "cuda:77"], "device 'cuda:77' is not available here; use --device cpu"),
    "no such folder": (["--data", "folder:/no/such/folder"], "/no/such/folder"),
    "no such weights": (["--fid-weights", "/no/such/file"], "/no/such/file"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_sentence_and_exit_code_2(name, command, monkeypatch, tmp_path):
    arguments, sentence = BAD[name]
    monkeypatch.setattr(trial, "train", None)  # nothing may be trained
    code, out, err = command("--preset", "smoke", *arguments)
    assert code == 2
    assert sentence in err
    assert err.count("\n") == 1
    assert "Traceback" not in err + out
    assert not list((tmp_path / "results").glob("runs/*/*"))


def test_unknown_flag_is_exit_code_2(command):
    code, out, err = command("--bakcbone", "cnn")
    assert code == 2
    assert "--backbone" in out + err  # the likely one is suggested


@pytest.mark.parametrize(("images", "broken"), [(0, 0), (0, 3), (10, 2)], ids=["empty", "all broken", "many broken"])
def test_folders_that_cannot_be_used(command, tmp_path, monkeypatch, images, broken):
    monkeypatch.setattr(trial, "train", None)
    folder = write_images(tmp_path / "images", images, broken)
    code, _, err = command("--preset", "smoke", "--data", f"folder:{folder}")
    assert code == 2
    assert str(folder) in err
    assert not list((tmp_path / "results").glob("runs/*/*"))


def test_results_that_cannot_be_written(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(trial, "train", None)
    (tmp_path / "file").write_text("")
    assert run.main(["--preset", "smoke", "--results", str(tmp_path / "file")]) == 2
    assert "cannot write to" in capsys.readouterr().err


def test_full_disk_before_training(command, monkeypatch, tmp_path):
    monkeypatch.setattr(trial, "train", None)
    monkeypatch.setattr(store.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 2 << 20))
    code, _, err = command("--preset", "smoke")
    assert code == 2
    assert "2 MB free" in err


def test_full_disk_in_the_middle(trial_data, command, monkeypatch, tmp_path):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trial.plots, "curves", full)
    code, _, err = command("--backbone", "cnn", *TINY)
    assert code == 2
    assert "No space left on device" in err
    assert not list(tmp_path.glob("results/runs/*/metrics.json"))
    assert not list(tmp_path.glob("results/runs/*/.*.png"))  # no half-written picture either


def test_damaged_weights(command, monkeypatch, tmp_path):
    monkeypatch.setenv("VQBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(trial, "train", None)
    path = weights.trunk_path("alex")
    path.parent.mkdir(parents=True)
    path.write_bytes(b"damaged")
    code, _, err = command("--preset", "smoke")
    assert code == 2
    assert str(path) in err.replace("\n", "")


def test_weights_without_network(command, monkeypatch, tmp_path):
    monkeypatch.setenv("VQBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setattr(trial, "train", None)
    code, _, err = command("--preset", "smoke")
    assert code == 2
    assert "alexnet.safetensors" in err
    assert not list((tmp_path / "cache").glob("weights/*.safetensors"))


def test_doctor_names_what_is_missing_and_how_to_mend_it(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VQBENCH_CACHE", str(tmp_path / "cache"))
    assert doctor() == 0
    out = capsys.readouterr().out
    for word in ("torchvision", "mamba scan", "weights alex", "weights inception", "not cached", "GB free", "→"):
        assert word in out
    path = weights.trunk_path("vgg")
    path.parent.mkdir(parents=True)
    path.write_bytes(b"damaged")
    assert doctor() == 1
    assert "damaged" in capsys.readouterr().out


@pytest.mark.slow
def test_killed_in_the_middle_it_resumes_and_ends_bit_equal(tmp_path):
    """SIGKILL, as the kernel or a cluster would send it (bug 14, from outside)."""
    command = [sys.executable, "-m", "bench.run", "--backbone", "cnn", *TINY, "--steps", "600"]
    environment = {**os.environ, "VQBENCH_CACHE": str(cache_dir())}

    def start(results: Path) -> subprocess.Popen:
        return subprocess.Popen(
            [*command, "--results", str(results)], cwd=ROOT, env=environment, stderr=subprocess.PIPE
        )

    whole = start(tmp_path / "whole")
    assert whole.wait(300) == 0, whole.stderr.read()
    killed = start(tmp_path / "killed")
    deadline = time.monotonic() + 200
    while not list(tmp_path.glob("killed/runs/*/checkpoint.pt")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not list(tmp_path.glob("killed/runs/*/metrics.json"))
    again = start(tmp_path / "killed")
    assert again.wait(300) == 0, again.stderr.read()
    first, second = (
        load_file(next(tmp_path.glob(f"{name}/runs/*/tokenizer.safetensors"))) for name in ("whole", "killed")
    )
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert value.equal(second[name]), name


def test_rows_at_another_budget_are_marked(tmp_path):
    """A row is off only if it is off in parameters, FLOPs and time alike."""
    configs = [make_config(name, "smoke", device="cpu") for name in ("cnn", "vit", "mamba")]
    even = {"params_encoder": 400_000, "params_decoder": 400_000, "flops_encode": 1e8, "flops_decode": 1e8}
    even |= {"train_seconds": 60.0}

    def marked(name, **changes):
        folder = Store(tmp_path / name)
        runs = [fabricate(folder, config, **even) for config in configs[:2]]
        runs.append(fabricate(folder, configs[2], **(even | changes)))
        return list(unmatched(frame(runs)))

    assert marked("equal") == [False] * 3
    assert marked("wider", params_encoder=900_000) == [False] * 3  # but as fast and as many FLOPs
    assert marked("other", params_encoder=900_000, flops_encode=3e8, train_seconds=90.0) == [False, False, True]
    assert list(unmatched(frame([fabricate(Store(tmp_path / "one"), configs[0])]))) == [False]


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_the_same_from_the_command_line(preset):
    """Command lines give every field, most of them at its default, and must not undo what a preset sets."""
    arguments = ["--preset", preset, "--backbone", *BACKBONES, "--device", "cpu"]
    options = parse(run.RunArguments, arguments, "run", "")
    assert options.configs() == [make_config(name, preset, device="cpu") for name in BACKBONES]
