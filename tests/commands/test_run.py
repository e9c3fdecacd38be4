"""The command line as a stranger uses it."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_model

import backbones
from backbones import BACKBONES
from bench import doctor as doctor_module
from bench import encode, run
from bench.analysis import finished
from bench.analysis.frames import frame, unmatched
from bench.core import store
from bench.core.errors import Diverged, UserError
from bench.core.files import cache_dir
from bench.core.progress import runnable
from bench.core.runs import Run
from bench.core.store import Store
from bench.data import DATASETS
from bench.data.datasets import ABOUT, FORMATS
from bench.doctor import main as doctor
from bench.metrics import from_uint8, weights
from bench.priors import models
from bench.priors.models import PRIORS
from bench.quantizers import QUANTIZERS
from bench.tokenizers import arguments, costs, sizes, trial
from bench.tokenizers.arguments import parse
from bench.tokenizers.config import PROTOCOL_VERSION, Config, make_config
from bench.tokenizers.costs import shape_costs
from bench.tokenizers.presets import PRESETS
from bench.tokenizers.sizes import parameters, width_of
from bench.tokenizers.tokenizer import Tokenizer
from bench.tokenizers.trial import prepare
from tests.commands import TINY
from tests.fabricate import fabricate, lacking
from tests.watched import Toy

ROOT = Path(__file__).parents[2]


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
    assert "24 test images" in out
    assert re.search(r"^not done: cnn ema 0: train longer: \d+\.\d dB below k-means at the same bits$", out, re.M)
    suggested = out[out.index("Next: ") :].partition("\nGenerate")[0]
    assert suggested.startswith(runnable("Next: python -m bench.run --backbone cnn --preset smoke"))
    assert suggested.endswith(" --steps 6")
    assert "finished" in err
    code, out, err = command("--backbone", "cnn", *TINY)
    assert code == 0
    assert "already finished" in err


def test_a_run_that_is_done_is_not_told_to_train_longer(tmp_path):
    made = fabricate(Store(tmp_path), make_config("cnn", "smoke"))
    steep = run.not_done(made)  # its loss is one by the number of steps
    assert steep.startswith("cnn ema 0: train longer: the second half of training still took ")
    (made.folder / "history.jsonl").write_text('{"step": 1, "reconstruction": 1.0}\n' * 150)
    assert run.not_done(made) == ""


def test_a_run_on_validation_says_so_and_is_another_run(trial_data, command, tmp_path):
    for split in ("val", "test"):
        code, out, _ = command("--backbone", "cnn", *TINY, "--split", split)
        assert code == 0
        assert f"24 {'validation' if split == 'val' else 'test'} images" in out
    store = Store(tmp_path / "results")
    assert sorted((run.config()["split"], run.protocol()["scored_on"]) for run in store.runs()) == [
        ("test", "test"),
        ("val", "val"),
    ]


def test_more_images_than_there_are_is_one_sentence(trial_data, command):
    code, _, err = command("--backbone", "cnn", *TINY, "--train-images", "49")
    assert code == 2
    assert "train_images is 49 and photos has 48 to train on; 0 takes all" in " ".join(err.split())


def test_a_split_without_images_is_one_sentence(tmp_path, command):
    for name in ("train", "val", "test"):
        (tmp_path / "pets" / name).mkdir(parents=True)
    for name in ("train", "val"):
        for number in range(3):
            Image.new("RGB", (8, 8)).save(tmp_path / "pets" / name / f"{number}.png")
    code, _, err = command("--backbone", "cnn", *TINY, "--data", f"folder:{tmp_path / 'pets'}")
    assert code == 2
    assert f"no images in {tmp_path / 'pets' / 'test'}: put some there" in " ".join(err.split())


def test_every_backbone_and_seed_is_a_run_and_a_row(command, monkeypatch):
    """All asked for with what the command line gave; one that diverges is shown, and the others go on."""
    asked = []

    def run_trial(config, results, fid_weights, resume, instruments, *how):
        asked.append((config.backbone, config.seed, config.steps, fid_weights, resume, *how))
        if (config.backbone, config.seed) == ("cnn", 3):
            raise Diverged("loss or gradient not finite by step 1; try --lr below 0.1")
        return fabricate(results, config)

    monkeypatch.setattr(trial, "run_trial", run_trial)
    several = ("--backbone", "cnn", "vit", *TINY, "--no-resume", "--fid-weights", "file", "--accumulate", "2")
    several += ("--track", "wandb")
    code, out, err = command(*several, "--seeds", "0")
    assert code == 0
    assert err.count("finished: ") == 2
    assert "already" not in err
    code, out, err = command(*several, "--seeds", "0", "3")
    assert code == 1
    assert err.count("already finished: ") == 2
    rows = [("cnn", 0), ("vit", 0), ("cnn", 0), ("cnn", 3), ("vit", 0), ("vit", 3)]
    assert asked == [(*row, 3, Path("file"), False, 2, "wandb") for row in rows]
    for label in ("cnn ema 0", "vit ema 0", "vit ema 3"):
        assert label in out
    (line,) = (line for line in out.splitlines() if "cnn ema 3" in line)
    assert "diverged" in line
    assert "try --lr below 0.1" in err.replace("\n", " ")


def test_a_run_that_was_only_begun_is_not_said_to_be_finished_already(command, monkeypatch):
    def run_trial(config, results, *_):
        begun = results.run(config).folder
        if not begun.is_dir():
            begun.mkdir(parents=True)
            (begun / "config.json").touch()
            raise Diverged("too steep")
        return fabricate(results, config)

    monkeypatch.setattr(trial, "run_trial", run_trial)
    ends = [command("--backbone", "cnn", *TINY) for _ in range(3)]
    assert [code for code, _, _ in ends] == [1, 0, 0]
    assert ["already finished" in said for _, _, said in ends] == [False, False, True]


def test_list_shows_sizes_and_trains_nothing(command, monkeypatch):
    monkeypatch.setattr(trial, "train", None)
    code, out, _ = command("--list", "--backbone", "cnn", "convnext", "vit", "mamba", "bimamba", "--preset", "smoke")
    assert code == 0
    for word in ("cnn", "convnext", "vit", "mamba", "bimamba", "4×4", "MFLOP"):
        assert word in out


def test_list_names_all_that_can_be_chosen_with_a_line_each(command):
    """Backbones, quantizers, data, presets, priors and studies; and, unless some are given, the sizes of all."""
    code, out, _ = command("--list", "--preset", "smoke", "--device", "cpu")
    assert code == 0
    choices, _, sizes = out.partition("32×32 images")
    studies = [path.stem for path in (ROOT / "studies").glob("[a-z]*.py")]
    for name in (*BACKBONES, *QUANTIZERS, *DATASETS, *PRESETS, *PRIORS, *studies):
        assert re.search(rf"^   {name} +\S", choices, re.M), name
    rows = {line.split()[0]: line.split()[1:4] for line in sizes.splitlines() if "×" in line}
    configs = [make_config(name, "smoke") for name in BACKBONES]
    assert rows == {one.backbone: [str(one.width), str(one.depth), "150"] for one in configs}
    assert backbones.ABOUT.keys() == BACKBONES.keys() | {"timm:MODEL"}
    assert set(ABOUT) == {*DATASETS, *(f"{name}:{kind.place}" for name, kind in FORMATS.items())}
    assert set(models.ABOUT) == set(PRIORS)


def test_sizes_that_are_known_are_not_counted_again(monkeypatch, tmp_path):
    """The same numbers, without a model or timm; and those of code that is not ours, which may change, anew."""
    monkeypatch.setenv("VQBENCH_CACHE", str(tmp_path))
    for counted in (width_of, parameters):
        counted.cache_clear()
    first = [(one, shape_costs(one)) for one in (make_config("cnn", "smoke"), make_config("vit", "smoke", depth=1))]
    width_of.cache_clear()
    built = []
    monkeypatch.setattr(sizes, "sides", lambda config: built.append(config) or [])
    monkeypatch.setattr(costs, "Tokenizer", None)
    again = [(one, shape_costs(one)) for one in (make_config("cnn", "smoke"), make_config("vit", "smoke", depth=1))]
    assert again == first
    assert not built
    with pytest.raises(TypeError):
        shape_costs(make_config("vit", "smoke", depth=2))  # another shape is counted
    ours, own = make_config("vit", "smoke"), make_config("cnn", "smoke")
    assert [sizes.remembered(ours, "x", lambda n=n: {"n": n}) for n in (1, 2)] == [{"n": 1}, {"n": 1}]
    monkeypatch.setitem(BACKBONES, "cnn", BACKBONES["cnn"]._replace(Decoder=partial(BACKBONES["vit"].Decoder, [Toy])))
    assert [sizes.remembered(own, "x", lambda n=n: {"n": n}) for n in (1, 2)] == [{"n": 1}, {"n": 2}]


def test_help_names_every_setting(command):
    code, out, _ = command("--help-all")
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
    "images too large": (["--image-size", "4096"], "202"),
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

    monkeypatch.setattr("bench.core.plots.curves", full)
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


CHECKED = {"python", "device", "precision", "torchvision", "mamba scan", "weights alex", "cache", "results"}


def checked(tmp_path, monkeypatch, *rows: weights.Status, free: float = 50) -> dict[str, doctor_module.Check]:
    """What the doctor finds with these weight files and so many gigabytes free."""
    monkeypatch.setenv("VQBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(weights, "status", lambda: list(rows))
    usage = shutil._ntuple_diskusage(10**12, 10**12, int(free * 2**30))
    monkeypatch.setattr(doctor_module.shutil, "disk_usage", lambda path: usage)
    return {check.name: check for check in doctor_module.checks(tmp_path / "results")}


def test_doctor_tells_what_is_needed_from_what_is_not(tmp_path, monkeypatch):
    """Sound is good; damaged is broken, needed or not; what a run would fetch, or can do without, is a note."""
    path = tmp_path / "file"
    for name in ("alex", "vgg", "inception", "dinov2"):
        for cached, ok, good in ((True, True, True), (True, False, False), (False, False, None)):
            row = weights.Status(name, cached, path, "abc", ok)
            check = checked(tmp_path, monkeypatch, row)[f"weights {name}"]
            assert check.good is good
            assert bool(check.fix) is not bool(good)
            assert name != "dinov2" or "fetch" not in check.fix  # nobody does
    assert (
        "next run fetches"
        in checked(tmp_path, monkeypatch, weights.Status("alex", False, path, "", False))["weights alex"].fix
    )
    assert "--fid-weights" in check.fix
    assert checked(tmp_path, monkeypatch, weights.Status("alex", True, path, "abc", True)).keys() == CHECKED


@pytest.mark.parametrize(("free", "good"), [(1.9, False), (2.0, True), (50, True)])
def test_doctor_wants_two_gigabytes(tmp_path, monkeypatch, free, good):
    found = checked(tmp_path, monkeypatch, free=free)
    assert found["cache"].good is found["results"].good is good
    assert f"{free:.0f} GB free" in found["cache"].found


def test_doctor_finds_a_results_folder_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "results").write_text("")
    found = checked(tmp_path, monkeypatch)
    assert found["results"].good is False
    assert "cannot write to" in found["results"].found
    assert found["cache"].good is True


@pytest.mark.parametrize(("there", "precision"), [(True, "bf16"), (False, "fp32")])
def test_doctor_tells_the_precision_of_the_device_that_runs_would_take(tmp_path, monkeypatch, there, precision):
    """Whatever the other one could do."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr("bench.core.device.has_fast_bf16", lambda device: device == "cuda")
    monkeypatch.setattr(doctor_module, "scan_backend", lambda: "PyTorch")
    found = checked(tmp_path, monkeypatch)
    assert found["precision"].found.startswith(precision)
    assert ("a GPU" in found["device"].found) is there


@pytest.mark.parametrize("repaired", [True, False])
def test_doctor_tells_whether_torchvision_had_to_be_repaired(tmp_path, monkeypatch, repaired):
    monkeypatch.setattr(doctor_module, "repair", lambda: repaired)
    check = checked(tmp_path, monkeypatch)["torchvision"]
    assert check.good is True
    assert ("repaired" in check.found, "healthy" in check.found) == (repaired, not repaired)


@pytest.mark.parametrize(("good", "code"), [(True, 0), (None, 0), (False, 1)])
def test_doctor_fails_only_for_what_is_broken(monkeypatch, capsys, good, code):
    found = [doctor_module.Check("one", True, "here", "unneeded"), doctor_module.Check("two", good, "there", "fix it")]
    monkeypatch.setattr(doctor_module, "checks", lambda results: iter(found))
    assert doctor() == code
    out = capsys.readouterr().out
    assert ("fix it" in out) is not bool(good)
    assert "unneeded" not in out
    assert {True: "ok", None: "note", False: "broken"}[good] in out


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


def columns(table) -> dict[str, list[str]]:
    """Heading, in one line → cells, in rich's markup."""
    return {" ".join(str(column.header).split()): list(column.cells) for column in table.columns}


def test_whatever_a_run_lacks_it_is_damaged_or_shown_without(tmp_path):
    """Each of its scores, and each part of its protocol, missing and null: no table and no line ends in an error."""
    made = fabricate(Store(tmp_path), make_config("cnn", "smoke", device="cpu"))
    whole = made._read("metrics.json")
    shown = 0
    for name, content in lacking(whole):
        made.write("metrics.json", content)
        if made.finished:
            run.result_table([made])
            assert finished.protocol_line(made)
            shown += 1
        else:
            assert made.status == "damaged"
            assert name in made.reason
    assert shown > 40  # most of it


ARROWS = {
    "FID vgg16 ↓": "fid_vgg16",
    "LPIPS alex ↓": "lpips_alex",
    "LPIPS vgg ↓": "lpips_vgg",
    "train s ↓": "train_seconds",
}
ARROWS |= {"PSNR dB ↑": "psnr", "SSIM ↑": "ssim", "perp. ↑": "perplexity"}
ARROWS |= {"enc. /s ↑": "images_per_second_encode", "dec. /s ↑": "images_per_second_decode"}
FORMS = {"fid_vgg16": ".1f", "lpips_alex": ".3f", "lpips_vgg": ".3f", "psnr": ".2f", "ssim": ".3f"}


def test_the_best_of_a_column_is_the_lowest_or_highest_as_its_arrow_says(tmp_path):
    """Every column by itself: two runs take turns at having more."""
    for low, high in ((0, 1), (1, 0)):
        runs = []
        for number, more in ((0, low), (1, high)):
            config = make_config(("cnn", "vit")[number], "smoke", device="cpu")
            values = dict.fromkeys(ARROWS.values(), 7.0 + more)
            runs.append(fabricate(Store(tmp_path / f"{low}"), config, **values))
        found = columns(run.result_table(runs, []))
        assert found.keys() == {"tokenizer, seed", "M par.", *ARROWS}
        for heading, name in ARROWS.items():
            first = (low > high) == (heading[-1] == "↑")  # the first row has ``low`` more, the second ``high``
            assert [cell.startswith("[bold]") for cell in found[heading][:2]] == [first, not first], heading
            form = FORMS.get(name, ".0f")
            shown = [cell.removeprefix("[bold]").removesuffix("[/]") for cell in found[heading][:2]]
            assert shown == [f"{7 + low:{form}}", f"{7 + high:{form}}"]


def test_equals_are_bold_together_and_a_single_run_never_is(tmp_path):
    configs = [make_config(name, "smoke", device="cpu") for name in ("cnn", "vit", "mamba")]
    runs = [fabricate(Store(tmp_path), config, psnr=value) for config, value in zip(configs, (9, 9, 8), strict=True)]
    assert columns(run.result_table(runs, []))["PSNR dB ↑"][:3] == ["[bold]9.00[/]", "[bold]9.00[/]", "8.00"]
    assert not any("bold" in cell for cells in columns(run.result_table(runs[:1], [])).values() for cell in cells)


def test_a_row_is_that_runs_and_the_last_that_of_the_reference(tmp_path):
    names = ("cnn", "vit")
    configs = [make_config(name, "smoke", device="cpu", seed=seed) for name, seed in zip(names, (0, 3), strict=True)]
    sizes = {"params_encoder": 1_500_000, "params_decoder": 250_000, "psnr_kmeans": 3.25, "lpips_alex_kmeans": 0.875}
    runs = [fabricate(Store(tmp_path), config, **sizes) for config in configs]
    table = run.result_table(runs, ["mamba ema 5"])
    found = columns(table)
    assert found["tokenizer, seed"] == ["cnn ema 0", "vit ema 3", "mamba ema 5", "k-means on patches"]
    assert found["M par."] == ["1.75", "1.75", "[red]diverged[/]", "–"]
    assert found["PSNR dB ↑"][-1] == "3.25"
    assert found["LPIPS alex ↓"][-1] == "0.875"
    assert found["FID vgg16 ↓"][-1] == "–"  # no reference has it here
    assert table.title == "112 bits per image: 16 codes of K = 128"
    assert table.caption is None


def test_runs_on_other_images_are_not_in_one_table(command, monkeypatch):
    """As where images change between two runs of a command; each has its own best, and what sets them apart is said."""

    def run_trial(config, store, *_):
        return fabricate(store, config, config.seed, fingerprint="ab"[config.seed // 2] * 64)

    monkeypatch.setattr(trial, "run_trial", run_trial)
    code, out, _ = command("--backbone", "cnn", *TINY, "--seeds", "0", "1", "2")
    shown = " ".join(out.split())
    assert code == 0
    assert out.count("tokenizer, seed") == 2
    first, second = shown.split("Protocol 1: ", 1)
    assert "cnn ema 1" in first
    assert "cnn ema 2" not in first
    assert "cnn ema 2" in second
    apart = f"Not to be ranked against the first table: fingerprint {'a' * 16} there, {'b' * 16} here."
    assert shown.count("Not to be ranked") == 1
    assert apart in shown


def test_a_metric_that_not_all_runs_have_is_no_column(tmp_path):
    """A run that was scored with Inception beside one without."""
    runs = [fabricate(Store(tmp_path), make_config(name, "smoke", device="cpu")) for name in ("cnn", "vit")]
    for chosen in (runs[:1], runs[1:]):
        assert "FID ↓" not in columns(run.result_table(chosen, []))
    stored = runs[0]._read("metrics.json")
    stored["metrics"]["fid"] = 12.5
    runs[0].write("metrics.json", stored)
    assert columns(run.result_table(runs[:1], []))["FID ↓"][0] == "12.5"
    for chosen in (runs, runs[::-1]):
        assert "FID ↓" not in columns(run.result_table(chosen, []))


def test_rows_at_another_budget_carry_a_mark_and_a_caption(tmp_path):
    configs = [make_config(name, "smoke", device="cpu") for name in ("cnn", "vit", "mamba")]
    even = {"params_encoder": 400_000, "params_decoder": 400_000, "flops_encode": 1e8, "flops_decode": 1e8}
    even |= {"train_seconds": 60.0}
    off = {"params_encoder": 900_000, "flops_encode": 3e8, "train_seconds": 90.0}
    runs = [fabricate(Store(tmp_path), config, **even) for config in configs[:2]]
    runs.append(fabricate(Store(tmp_path), configs[2], **(even | off)))
    table = run.result_table(runs, [])
    assert columns(table)["tokenizer, seed"][:3] == ["cnn ema 0", "vit ema 0", "mamba ema 0 †"]
    assert "--match" in table.caption


def test_the_protocol_line_says_how_the_numbers_were_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "inception_missing", lambda: "no network.")
    monkeypatch.setattr(weights, "dinov2_missing", lambda: "no file.")
    config = make_config("cnn", "smoke", device="cpu")
    protocol = {"version": 7, "split": "these / those", "count": 321, "skipped": 0, "image_size": 48}
    protocol |= {"extractor_vgg16": "layer digest", "rounding": "rounded", "precision": "fp64"}
    line = finished.protocol_line(fabricate(Store(tmp_path), config, **protocol))
    for words in ("Protocol 7: these / those; scored on all 321 test", "48×48", "layer digest", "fp64, rounded"):
        assert words in line
    assert line.endswith("No FID: no network. No FD-DINOv2: no file.")
    assert "unreadable" not in line
    protocol |= {"skipped": 4, "extractor_inception": "abc", "extractor_dinov2": "def"}
    line = finished.protocol_line(fabricate(Store(tmp_path), config, **protocol))
    assert "these / those (4 unreadable files skipped);" in line
    assert "No F" not in line


def test_what_should_be_trained_for_longer_is_trained_for_longer_next(tmp_path, monkeypatch):
    """Whatever else there was to compare, as the lines above it say; where a time sets the steps, it stays."""
    runs = [fabricate(Store(tmp_path), make_config("cnn", "smoke", device="cpu"))]

    def suggested(*words: str) -> str:
        (line,) = (one for one in next_of(runs, *words).splitlines() if one.startswith("Next: "))
        return line.partition("bench.run ")[2]

    assert run.not_done(runs[0]).startswith("cnn ema 0: train longer: ")
    assert suggested("--backbone", "cnn", "--preset", "smoke") == "--backbone cnn --preset smoke --steps 300"
    assert suggested("--steps", "7", "--backbone", "cnn") == "--backbone cnn --steps 14"
    assert "--steps" not in suggested("--backbone", "cnn", "--match", "time:9s")
    monkeypatch.setattr(arguments, "undecided", lambda metrics, history: [])
    assert "--steps" not in suggested("--backbone", "cnn", "--preset", "smoke")


def next_of(runs: list[Run], *words: str) -> str:
    return run.next_command(parse(run.RunArguments, [*words, "--device", "cpu"], "run", ""), runs, words)


def test_the_next_command_compares_backbones_and_then_seeds(tmp_path, monkeypatch):
    monkeypatch.setattr(arguments, "undecided", lambda metrics, history: [])

    def suggested(*arguments):
        options = parse(run.RunArguments, [*arguments, "--device", "cpu"], "run", "")
        runs = [fabricate(Store(tmp_path), make_config(name, "smoke", device="cpu")) for name in ("cnn", "vit")]
        picture, command, generate = run.next_command(options, runs, arguments).splitlines()
        assert picture == f"Picture: {runs[-1].folder / 'reconstructions.png'}"
        assert generate == runnable(f"Generate images: python -m bench.prior {runs[-1].folder}")
        return command.removeprefix(runnable("Next: python -m bench.run "))

    assert suggested("--backbone", "vit") == f"--backbone {' '.join(BACKBONES)}"
    several = ("--backbone", "cnn", "vit", "--seeds", "0", "1")
    assert suggested(*several) == "--backbone cnn vit --seeds 0 1 2"
    given = suggested(*several, "--preset", "smoke", "--data=folder:a b", "--split", "val", "--no-resume")
    assert given == "--preset smoke '--data=folder:a b' --split val --no-resume --backbone cnn vit --seeds 0 1 2"
    assert suggested("--backbone=cnn", "--steps", "7") == f"--steps 7 --backbone {' '.join(BACKBONES)}"


def test_only_runs_with_codes_are_shown_and_generated_from(tmp_path):
    options = parse(run.RunArguments, ["--device", "cpu"], "run", "")
    configs = [make_config("cnn", "smoke", device="cpu", quantizer=name) for name in ("ema", "none")]
    coded, latent = (fabricate(Store(tmp_path), config) for config in configs)
    assert run.next_command(options, [coded, latent], []).count(str(coded.folder)) == 2
    alone = run.next_command(options, [latent], [])
    assert str(latent.folder / "reconstructions.png") in alone
    assert "bench.prior" not in alone


def test_list_shows_each_size_in_its_own_column(monkeypatch):
    counted = {"params_encoder": 1_230_000, "params_decoder": 4_560_000, "flops_encode": 7e6, "flops_decode": 89e6}
    monkeypatch.setattr(run, "shape_costs", lambda config: counted)
    config = make_config("vit", "smoke", device="cpu")
    found = columns(run.size_table([config, replace(config, depth=1)]))
    shown = {"encoder M": "1.23", "decoder M": "4.56", "encode MFLOP": "7", "decode MFLOP": "89", "tokens": "4×4"}
    shown |= {"backbone": "vit", "width": str(config.width), "steps": "150"}
    assert found == {**{name: [value] * 2 for name, value in shown.items()}, "depth": [str(config.depth), "1"]}


def test_encode_writes_the_codes_of_both_splits_and_says_so(images, tmp_path, monkeypatch, capsys):
    config = replace(make_config("cnn", "smoke", device="cpu", codebook_size=300), width=16, depth=1, augment="none")
    folder = fabricate(Store(tmp_path), config).folder
    torch.manual_seed(0)
    tokenizer = Tokenizer(config.resolved())
    tokenizer.quantizer.initialise(tokenizer.encoder(torch.rand(8, 3, 32, 32) * 2 - 1))
    save_model(tokenizer, str(folder / "tokenizer.safetensors"))
    asked = []
    monkeypatch.setattr(encode, "load_data", lambda *arguments: asked.append(arguments[0]) or images)
    monkeypatch.setattr(encode.stdout, "print", lambda text, **_: print(text))
    assert encode.main([str(folder), "--device", "cpu"]) == 0
    assert asked == [folder.resolve()]
    out = capsys.readouterr().out
    assert out.startswith(f"encoded: {folder.resolve() / 'codes'}, 48 train / 24 test grids of 4×4 as uint16, 0.0 MB")
    for name, split in (("train", images.train), ("held_out", images.test)):
        x = from_uint8(torch.from_numpy(split).permute(0, 3, 1, 2))
        codes = np.load(folder / "codes" / f"{name}.npy")
        assert (codes == tokenizer.eval().encode(x).numpy()).mean() > 0.99  # rounding may tip a tie
        assert len(np.unique(codes)) > 1
    assert encode.main([folder.name, "--results", str(tmp_path)]) == 0
    assert capsys.readouterr().out.startswith("already encoded: ")
    (folder / "codes" / "meta.json").write_text("{}")
    assert encode.main([str(folder), "--device", "cpu"]) == 0
    said = capsys.readouterr()
    assert said.err.endswith("it is made again\n")
    assert said.out.startswith("encoded: ")


@pytest.mark.parametrize(("there", "device"), [(True, "cuda"), (False, "cpu")])
def test_encode_takes_the_gpu_where_there_is_one_and_counts_both_splits(tmp_path, monkeypatch, capsys, there, device):
    """Unless it is told otherwise; megabytes are those of all codes together."""
    asked = []
    grids = [np.zeros((count, 32, 32), dtype=np.uint16) for count in (1000, 500)]
    codes = SimpleNamespace(train=grids[0], held_out=grids[1], grid=(32, 32))
    reader = SimpleNamespace(config=SimpleNamespace(split="val"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(encode, "check_device", asked.append)
    monkeypatch.setattr(encode, "find_tokenizer", lambda *arguments: Store(tmp_path).named("toy"))
    monkeypatch.setattr(encode, "Tokenizer", SimpleNamespace(from_run=lambda _, device: asked.append(device) or reader))
    monkeypatch.setattr(encode, "load_data", lambda *arguments: None)
    monkeypatch.setattr(encode, "encode", lambda *arguments: codes)
    assert encode.main(["toy"]) == 0
    assert asked == [device] * 2
    assert "1000 train / 500 val grids of 32×32 as uint16, 3.1 MB" in " ".join(capsys.readouterr().out.split())


def test_encode_refuses_a_device_that_is_not_there(tmp_path, capsys):
    assert encode.main(["run", "--results", str(tmp_path), "--device", "cuda:77"]) == 2
    assert "device 'cuda:77' is not available here; use --device cpu" in capsys.readouterr().err


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_the_same_from_the_command_line(preset):
    """Command lines give every field, most of them at its default, and must not undo what a preset sets."""
    arguments = ["--preset", preset, "--backbone", *BACKBONES, "--device", "cpu"]
    options = parse(run.RunArguments, arguments, "run", "")
    assert options.configs() == [make_config(name, preset, device="cpu") for name in BACKBONES]


def test_without_arguments_the_process_s_own_are_taken(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["run.py", "--list", "--backbone", "cnn", "--preset", "smoke"])
    assert run.main() == 0
    assert "cnn" in capsys.readouterr().out


def test_doctor_takes_a_results_folder_and_nothing_else(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert doctor(["--results", str(tmp_path / "file")]) == 1
    told = " ".join(capsys.readouterr().out.split())
    assert "Not a directory" in told
    assert "choose another --results" in told
    with pytest.raises(SystemExit) as stopped:
        doctor(["--foo"])
    assert stopped.value.code == 2


def test_values_that_are_named_twice_are_run_once():
    words = ["--backbone", "cnn", "cnn", "--seeds", "1", "1", "--quantizer", "ema", "ema", "--device", "cpu"]
    assert len(parse(run.RunArguments, words, "run", "").configs()) == 1


def test_results_among_the_images_are_refused(tmp_path, command, capsys):
    for place in (tmp_path, tmp_path / "deep" / "results"):
        with pytest.raises(UserError, match=r"lies among the images of .*; name another with --results$"):
            prepare(make_config("cnn", "smoke", device="cpu", data=f"folder:{tmp_path}"), Store(place))


@pytest.mark.parametrize(
    ("words", "works", "first", "second"),
    [
        (
            "--backbone cnn bimamba vit --two-streams --steps 9",
            "--two-streams works with bimamba and not with cnn, vit",
            "--two-streams --steps 9 --backbone bimamba",
            "--steps 9 --backbone cnn vit",
        ),
        (
            "--quantizer ema product --codebooks=4",
            "--codebooks works with product and not with ema",
            "--codebooks=4 --quantizer product",
            "--quantizer ema",
        ),
        (
            "--backbone cnn hybrid --vision_mixer",
            "--vision-mixer works with hybrid and not with cnn",
            "--vision_mixer --backbone hybrid",
            "--backbone cnn",
        ),
    ],
)
def test_an_option_of_some_of_a_list_is_refused_with_the_two_commands_to_run(
    tmp_path, command, words, works, first, second
):
    code, _, err = command(*words.split())
    results = f"--results {tmp_path / 'results'}"
    one, other = (re.sub("(?=--(backbone|quantizer))", f"{results} ", part, count=1) for part in (first, second))
    told = f"{works}; run python -m bench.run {one}, then python -m bench.run {other}, and python -m bench.report"
    assert (code, err) == (2, runnable(f"error: {told} compares them\n"))
    assert all(command(*part.split(), "--list")[0] == 0 for part in (first, second))
