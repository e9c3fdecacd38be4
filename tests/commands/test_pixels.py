"""Priors over pixels from the command line: trained, scored, shown, reported apart; mistakes in one sentence."""

import json
import math
import shutil
import signal

import numpy as np
import pytest
import torch
from PIL import Image

from bench import diff, encode, prior, report, study
from bench.core.runs import Run
from bench.core.store import Store
from bench.data import load
from bench.priors.config import PriorConfig
from bench.priors.models import Prior
from bench.priors.pixels import BITS
from bench.priors.train import PriorLearner
from bench.tokenizers.config import make_config
from tests.fabricate import fabricate, fabricate_prior

QUICK = "--image-size 16 --parameters 30000 --depth 1 --steps 4 --batch-size 8 --samples 8 --device cpu"


def command(folder, results, *arguments: str) -> int:
    return prior.main(["pixels", "--data", f"folder:{folder}", "--results", str(results), *QUICK.split(), *arguments])


@pytest.fixture(scope="session")
def trained(image_folder, tmp_path_factory):
    """A store of two priors over pixels and nothing else."""
    results = tmp_path_factory.mktemp("pixels")
    assert command(image_folder, results, "--prior", "pixelcnn", "independent") == 0
    return results


@pytest.fixture
def results(trained, tmp_path):
    """A copy of it that a test may spoil."""
    shutil.copytree(trained, tmp_path / "results")
    return tmp_path / "results"


def runs_of(results) -> dict[str, Run]:
    return {run.config()["prior"]: run for run in Store(results).priors()}


def test_a_prior_over_pixels_is_trained_scored_and_shown(results, image_folder, capsys, monkeypatch):
    """And the second time taken from the store."""
    for name, run in runs_of(results).items():
        assert run.finished
        assert run.folder.name.startswith(f"{name}-pixels-folder-")
        assert run.codes() == {"codebook_size": 256, "grid": (16, 48), "classes": []}
        assert run.tokenizer() | {"data": ""} == {
            **{"data": "", "image_size": 16, "channels": 3, "backbone": "pixels", "split": "test", "augment": "none"},
            **{"train_images": 0, "codebook_size": 256},
        }
        metrics, protocol = run.metrics(), run.protocol()
        assert (protocol["codes"], protocol["count"], protocol["image_size"]) == ("pixels", 24, 16)
        assert metrics["coded_bits_per_pixel"] == pytest.approx(3 * metrics["coded_bits_per_token"])
        assert metrics["coded_bits_per_image"] == pytest.approx(16 * 48 * metrics["coded_bits_per_token"])
        assert metrics["nearest_val_psnr"] < 40
        for picture in ("samples.png", "neighbours.png"):
            with Image.open(run.folder / picture) as image:
                assert min(image.size) > 100
    floor = runs_of(results)["independent"].metrics()
    assert floor["coded_bits_per_token"] == pytest.approx(floor["coded_bits_per_token_independent"])
    monkeypatch.setattr("bench.priors.trial.train_prior", None)  # would be called to train
    assert command(image_folder, results, "--prior", "pixelcnn", "independent") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert BITS in out
    for words in ("pixelcnn 0", "independent 0", "real codes", "shuffled codes", "8 samples (temperature 1)"):
        assert words in out
    assert command(image_folder, results, "--prior", "pixelcnn", "--temperature", "0.5") == 0  # lends its weights
    assert len(Store(results).priors()) == 3


def test_real_codes_of_pixels_are_training_images_and_samples_are_what_was_drawn(results, image_folder):
    """The set that is compared is that of the images themselves: nothing is lost between codes and scores."""
    run = runs_of(results)["pixelcnn"]
    loaded = Prior.from_run(run.folder)
    drawn = loaded.sample(8, torch.Generator().manual_seed(0))
    with np.load(run.folder / "samples.npz") as stored:
        assert (stored["codes"] == drawn.numpy()).all()
        assert (stored["x"] == stored["codes"].reshape(8, 16, 16, 3)).all()
    data = load(f"folder:{image_folder}", 16)
    held_out = torch.from_numpy(data.test.reshape(-1, 16, 48).astype(np.int64))
    with torch.no_grad():
        bits = loaded.nll(held_out).mean().item() / math.log(2)
    assert run.metrics()["coded_bits_per_token"] == pytest.approx(bits, rel=1e-5)


def test_grey_images_have_one_channel(image_folder, tmp_path):
    folder = tmp_path / "grey"
    for split in ("train", "val", "test"):
        (folder / split).mkdir(parents=True)
        for path in (image_folder / split).iterdir():
            with Image.open(path) as image:
                image.convert("L").save(folder / split / path.name)
    assert command(folder, tmp_path, "--prior", "independent") == 0
    (run,) = Store(tmp_path).priors()
    assert run.codes()["grid"] == (16, 16)
    metrics = run.metrics()
    assert metrics["coded_bits_per_pixel"] == pytest.approx(metrics["coded_bits_per_token"])
    with np.load(run.folder / "samples.npz") as stored:
        assert (stored["x"] == stored["x"][..., :1]).all()


def test_a_prior_that_was_stopped_goes_on(results, image_folder, monkeypatch):
    """From its checkpoint, to the same weights."""
    folder = runs_of(results)["pixelcnn"].folder
    weights, taken = (folder / "prior.safetensors").read_bytes(), []
    shutil.rmtree(folder)
    step = PriorLearner.step

    def note(learner, number, rate):
        taken.append(number)
        if taken == [0, 1]:
            signal.raise_signal(signal.SIGINT)
        return step(learner, number, rate)

    monkeypatch.setattr(PriorLearner, "step", note)
    assert command(image_folder, results, "--prior", "pixelcnn") == 130
    assert (folder / "checkpoint.pt").exists()
    assert command(image_folder, results, "--prior", "pixelcnn") == 0
    assert taken == [0, 1, 2, 3]
    assert (folder / "prior.safetensors").read_bytes() == weights


def test_other_images_of_the_same_name_are_noticed(image_folder, tmp_path, capsys):
    folder = tmp_path / "images"
    shutil.copytree(image_folder, folder)
    assert command(folder, tmp_path, "--prior", "independent") == 0
    path = folder / "test" / "000.png"
    with Image.open(path) as image:
        turned = image.rotate(90)
    turned.save(path)
    capsys.readouterr()
    assert command(folder, tmp_path, "--prior", "independent") == 2
    err = " ".join(capsys.readouterr().err.split())
    assert "is a prior over other images" in err
    assert f"than folder:{folder} now has" in err


def test_classes_of_images_condition_a_prior_over_their_pixels(image_folder, tmp_path):
    for split in ("train", "test"):
        for number, path in enumerate(sorted((image_folder / split).iterdir())):
            target = tmp_path / "classes" / split / ("even" if number % 2 == 0 else "odd") / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    assert command(tmp_path / "classes", tmp_path, "--prior", "pixelcnn", "--conditional") == 0
    (run,) = Store(tmp_path).priors()
    assert run.codes()["classes"] == ["even", "odd"]


# -- shown beside others ----------------------------------------------------------------------------------------------


def test_a_report_lists_priors_over_pixels_apart(results, capsys):
    """In a table of their own, which says what their bits are; of a whole store alone."""
    store = Store(results)
    tokenizer = fabricate(store, make_config("cnn", "smoke", device="cpu"))
    fabricate_prior(store, PriorConfig(tokenizer.folder.name, "rnn", device="cpu", samples=8), 4.0, 50.0)
    assert report.main(["--results", str(results)]) == 0
    shown = (results / "reports/all/tables.md").read_text()
    tables = [part for part in shown.split("\n## ") if "bits per image before coding" in part]
    assert [("pixels" in table, " rnn " in table) for table in tables] == [(False, True), (True, False)]
    assert "6144 bits per image before coding" in tables[1]
    assert BITS in tables[1]
    assert BITS not in tables[0]
    listed = (results / "reports/all/priors_wide.csv").read_text()
    assert listed.count("pixelcnn-pixels-folder") > 0
    assert report.main([tokenizer.folder.name, "--results", str(results)]) == 0
    assert "pixels" not in (results / "reports/selection/tables.md").read_text()


def test_a_store_of_nothing_else_is_reported(results, capsys):
    """And in it what is damaged, by name: settings, or what it says of its pixels."""
    assert report.main(["--results", str(results)]) == 0
    assert BITS in (results / "reports/all/tables.md").read_text()
    assert "Runs: none." in capsys.readouterr().out
    one, other = (run.folder / "config.json" for run in runs_of(results).values())
    stored = json.loads(one.read_text())
    one.write_text(json.dumps({**{part: stored[part] for part in ("config", "codes", "environment")}, "tokenizer": 3}))
    capsys.readouterr()
    assert report.main(["--results", str(results)]) == 0
    assert f"{one} is damaged: its tokenizer is no object" in capsys.readouterr().err
    other.write_text("{")
    assert report.main(["--results", str(results)]) == 0
    assert f"{other} is damaged" in capsys.readouterr().err


def test_other_commands_say_what_they_want(results, capsys):
    run = runs_of(results)["pixelcnn"]
    assert study.run(["list", "--results", str(results)]) == 0
    assert "no studies below" in capsys.readouterr().out
    assert diff.main([str(run.folder), str(run.folder)]) == 2
    assert encode.main(["pixels", "--results", str(results)]) == 2
    err = " ".join(capsys.readouterr().err.split())
    assert "is the run of a prior; name two tokenizers" in err
    assert "unknown run 'pixels'" in err


# -- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["pixels", "--data", "mnist"], "unknown data 'mnist': choose one of photos"),
        (["pixels", "--image-size", "8"], "image_size is 8; it must be at least 16"),
        (["pixels", "--image-size", "2000"], "image_size 2000 is larger than photos allows"),
        (["run", "--image-size", "32"], "image_size is 32, and a tokenizer has images of its own; leave it out, or"),
        (["run", "--data", "photos"], "data is photos, and a tokenizer has images of its own; leave it out, or put"),
        ([], "name the run of a tokenizer, or pixels: "),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, capsys, arguments, words):
    assert prior.main([*arguments, "--results", str(tmp_path), "--device", "cpu"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert words in line
    assert not (tmp_path / "priors").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--conditional"], "has no classes to condition on; leave out --conditional"),
        (["--token-order", "hilbert", "--prior", "rnn"], "side is a power of two, not 16×48"),
        (["--top-k", "256"], "top_k is 256, of 256 codes; take fewer, or 0 for all"),
    ],
)
def test_what_pixels_cannot_have_is_refused(image_folder, tmp_path, capsys, arguments, words):
    assert command(image_folder, tmp_path, *arguments) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert words in line
    assert not (tmp_path / "priors").exists()


def test_help_names_the_word(capsys):
    with pytest.raises(SystemExit):
        prior.main(["--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert "or pixels, the images themselves" in out
    assert "python -m bench.prior pixels --data photos --image-size 32" in out
