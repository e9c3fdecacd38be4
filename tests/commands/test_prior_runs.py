"""Priors from the command line: encode, train, generate, score, show; and every mistake in one sentence."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch_fidelity.metric_prc import prc_features_to_metric

from bench import encode, prior, run
from bench.analysis.frames import PRIOR, read
from bench.analysis.rankings import generation
from bench.core.progress import runnable
from bench.core.runs import Run
from bench.core.store import Store
from bench.metrics import ImageSet, perceptual
from bench.priors.codes import digest, load_data
from bench.priors.codes import encode as encode_run
from bench.priors.config import PriorConfig
from bench.priors.generate import nearest, rate
from bench.priors.models import LEARNED, PRIORS, Prior
from bench.sweeps.child import run_in_child
from bench.tokenizers.config import make_config
from bench.tokenizers.tokenizer import Tokenizer
from tests.fabricate import fabricate, fabricate_prior, lacking

TINY = "--preset smoke --width 16 --depth 1 --codebook-size 16 --steps 12 --batch-size 8 --lpips-weight 0 --device cpu"
QUICK = "--parameters 30000 --depth 1 --steps 6 --batch-size 8 --samples 8 --device cpu"


@pytest.fixture(scope="session")
def trained(image_folder, tmp_path_factory):
    """Results folder with one tiny tokenizer."""
    results = tmp_path_factory.mktemp("results")
    command = [*TINY.split(), "--backbone", "cnn", "--data", f"folder:{image_folder}", "--results", str(results)]
    assert run.main(command) == 0
    return results


@pytest.fixture
def results(trained, tmp_path):
    """A copy of it that a test may spoil."""
    shutil.copytree(trained, tmp_path / "results")
    return tmp_path / "results"


def tokenizer_of(results) -> Run:
    (one,) = Store(results).runs()
    return one


def command(results, *arguments: str) -> int:
    return prior.main([tokenizer_of(results).folder.name, "--results", str(results), *QUICK.split(), *arguments])


# -- encoding ---------------------------------------------------------------------------------------------------------


def test_encode_writes_what_the_tokenizer_says_once(results, capsys):
    folder = tokenizer_of(results).folder
    assert encode.main([str(folder)]) == 0
    assert "encoded: " in capsys.readouterr().out
    tokenizer = Tokenizer.from_run(folder)
    data = load_data(folder, tokenizer)
    codes = encode_run(folder, tokenizer, data)
    assert codes.train.shape == (96, 4, 4)  # mirror images after the 48
    assert (codes.held_out.shape, codes.held_out.dtype) == ((24, 4, 4), np.uint8)
    assert isinstance(codes.train, np.memmap)
    assert codes.tokenizer == digest(folder)
    x = torch.from_numpy(data.train[5].copy()).permute(2, 0, 1)[None] / 127.5 - 1
    for row, image in ((5, x), (53, x.flip(-1))):
        assert (codes.train[row] == tokenizer.encode(image)[0].numpy()).all()
    before = (folder / "codes" / "train.npy").stat().st_mtime_ns
    assert encode.main([str(folder)]) == 0
    assert "already encoded" in capsys.readouterr().out
    assert (folder / "codes" / "train.npy").stat().st_mtime_ns == before


# -- training and scoring ---------------------------------------------------------------------------------------------


def test_every_prior_from_the_command_line(results, capsys):
    assert command(results, "--prior", *PRIORS) == 0
    out = " ".join(capsys.readouterr().out.split())
    for name in (*PRIORS, "real codes", "shuffled codes"):
        assert name in out
    assert "8 samples (temperature 1)" in out
    assert "Bits of masked are an upper bound" in out
    runs = {one.config()["prior"]: one for one in Store(results).priors()}
    assert set(runs) == set(PRIORS)
    for name, one in runs.items():
        metrics = one.metrics()
        assert metrics["coded_bits_per_image"] == pytest.approx(16 * metrics["coded_bits_per_token"])
        assert metrics["coded_bits_per_pixel"] == pytest.approx(metrics["coded_bits_per_image"] / 32**2)
        assert 0 < metrics["coded_bits_per_token"] < 4.5
        assert all(np.isfinite(value) for value in metrics.values() if value is not None)
        assert {"samples.png", "neighbours.png", "prior.safetensors"} <= {path.name for path in one.folder.iterdir()}
        assert (one.folder / "curves.png").exists() == (name in LEARNED)
        assert not (one.folder / "checkpoint.pt").exists()
    floor = runs["independent"].metrics()
    assert floor["coded_bits_per_token"] == pytest.approx(floor["coded_bits_per_token_independent"])
    stamps = {name: (one.folder / "metrics.json").stat().st_mtime_ns for name, one in runs.items()}
    assert command(results, "--prior", *PRIORS) == 0
    assert stamps == {name: (one.folder / "metrics.json").stat().st_mtime_ns for name, one in runs.items()}


def test_a_stored_prior_samples_what_it_sampled(results):
    assert command(results, "--prior", "rnn", "--seeds", "3") == 0
    (one,) = Store(results).priors()
    loaded = Prior.from_run(one.folder)
    config = loaded.config
    again = loaded.sample(config.samples, torch.Generator().manual_seed(config.seed))
    with np.load(one.folder / "samples.npz") as stored:
        assert (again.numpy() == stored["codes"]).all()


def test_equal_runs_give_equal_weights_and_scores(results, tmp_path):
    shutil.copytree(results, tmp_path / "other")
    found = []
    for folder in (results, tmp_path / "other"):
        assert command(folder, "--prior", "transformer") == 0
        (one,) = Store(folder).priors()
        metrics = {name: value for name, value in one.metrics().items() if "second" not in name}
        found.append((load_file(one.folder / "prior.safetensors"), metrics))
    (weights, metrics), (other_weights, other_metrics) = found
    assert all(weights[name].equal(other_weights[name]) for name in weights)
    clocked = {"sampling_speedup", "peak_memory_mb"}
    assert {k: v for k, v in metrics.items() if k not in clocked} == {
        k: v for k, v in other_metrics.items() if k not in clocked
    }


def test_another_temperature_takes_the_same_weights(results, monkeypatch):
    assert command(results, "--prior", "pixelcnn") == 0
    monkeypatch.setattr("bench.priors.trial.train_prior", None)  # would be called to train
    assert command(results, "--prior", "pixelcnn", "--temperature", "0.5", "--top-k", "3") == 0
    first, second = sorted(Store(results).priors(), key=lambda one: -one.config()["temperature"])
    assert first.metrics()["coded_bits_per_token"] == second.metrics()["coded_bits_per_token"]
    with np.load(first.folder / "samples.npz") as one, np.load(second.folder / "samples.npz") as other:
        assert (one["codes"] != other["codes"]).any()


@pytest.mark.slow
def test_a_child_process_runs_a_prior(results):
    config = PriorConfig(
        tokenizer_of(results).folder.name, "mamba", 1, 30_000, steps=4, batch_size=8, samples=8, device="cpu"
    )
    store = Store(results)
    assert run_in_child(config, store, threads=1).status == "finished"
    assert store.run(config).finished
    lost = run_in_child(PriorConfig("cnn-ema-nowhere", "rnn", device="cpu"), store, threads=1)
    assert lost.status == "refused"
    assert "holds no finished run" in lost.reason


def test_classes_condition_the_prior(image_folder, tmp_path):
    """Images of a class lie in a folder of its name."""
    folder = tmp_path / "classes"
    for split in ("train", "val"):
        for number, path in enumerate(sorted((image_folder / split).iterdir())):
            target = folder / split / ("even" if number % 2 == 0 else "odd") / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    arguments = [
        *TINY.split(),
        "--backbone",
        "cnn",
        "--data",
        f"folder:{folder}",
        "--results",
        str(tmp_path / "results"),
    ]
    assert run.main(arguments) == 0
    assert command(tmp_path / "results", "--prior", "rnn", "independent", "--conditional") == 0
    learned = next(one for one in Store(tmp_path / "results").priors() if one.config()["prior"] == "rnn")
    assert learned.codes()["classes"] == ["even", "odd"]
    loaded = Prior.from_run(learned.folder)
    assert loaded.sample(2, torch.Generator(), labels=torch.tensor([0, 1])).shape == (2, 4, 4)


def test_the_class_is_coded_too():
    """A conditional prior is told the class; an entropy coder would have to send it."""
    codes, labels = np.zeros((6, 2, 2), dtype=np.uint8), np.array([0, 1, 0, 1, 0, 1])
    given = rate(PRIORS["independent"](16, (2, 2), 2).eval(), codes, labels, labels)
    free = rate(PRIORS["independent"](16, (2, 2)).eval(), codes, None, None)
    assert (free, given) == (pytest.approx(4), pytest.approx(4 + 1 / 4))


def test_one_code_per_image(image_folder, tmp_path):
    """The whole way at 1×1: the codebook as a picture, and priors that can only be as good as a histogram."""
    results = tmp_path / "results"
    arguments = [*TINY.split(), "--backbone", "vit", "--data", f"folder:{image_folder}", "--grid-size", "1"]
    assert run.main([*arguments, "--results", str(results)]) == 0
    assert (tokenizer_of(results).folder / "codebook.png").is_file()
    assert command(results, "--prior", "independent", "pixelcnn", "transformer") == 0
    for one in Store(results).priors():
        assert one.metrics()["coded_bits_per_image"] == one.metrics()["coded_bits_per_token"]


# -- mistakes ---------------------------------------------------------------------------------------------------------


def refused(results, capsys, *arguments: str) -> str:
    assert command(results, *arguments) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert not (results / "priors").exists() or not any(one.finished for one in Store(results).priors())
    return line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--temperature", "0"), "temperature is 0.0; it must be above 0"),
        (("--prior", "pixelsnail"), "unknown prior 'pixelsnail'; choose from independent, pixelcnn"),
        (("--top-k", "-3"), "top_k is -3; it must be 0 or more"),
        (("--samples", "1"), "samples is 1; it must be at least 4"),
        (("--conditional",), "has no classes to condition on; leave out --conditional"),
        (("--parameters", "10"), "cannot have 10 parameters"),
        (("--dropout", "1"), "dropout is 1.0; it must be at least 0 and below 1"),
        (("--device", "cuda:9"), "device 'cuda:9' is not available here"),
    ],
)
def test_bad_settings(results, capsys, arguments, words):
    assert words in refused(results, capsys, *arguments)


def test_codes_of_another_tokenizer(results, capsys):
    folder = tokenizer_of(results).folder
    assert encode.main([str(folder)]) == 0
    weights = load_file(folder / "tokenizer.safetensors")
    save_file({name: value + 1e-3 for name, value in weights.items()}, folder / "tokenizer.safetensors")
    assert "its digest is that of other weights" in refused(results, capsys)
    age(folder)
    line = refused(results, capsys)
    assert "has codes of another tokenizer" in line
    assert "delete that folder to encode again" in line


def age(folder: Path) -> None:
    """Has a run's scores as older versions wrote them, without digests."""
    scored = json.loads((folder / "metrics.json").read_text())
    (folder / "metrics.json").write_text(json.dumps({part: scored[part] for part in ("metrics", "protocol")}))


def test_a_prior_of_another_tokenizer(results, capsys):
    assert command(results, "--prior", "rnn") == 0
    folder = tokenizer_of(results).folder
    weights = load_file(folder / "tokenizer.safetensors")
    save_file({name: value + 1e-3 for name, value in weights.items()}, folder / "tokenizer.safetensors")
    shutil.rmtree(folder / "codes")
    age(folder)
    capsys.readouterr()
    assert command(results, "--prior", "rnn") == 2
    assert "is a prior over the codes of another tokenizer" in " ".join(capsys.readouterr().err.split())


def test_runs_that_are_no_tokenizers(results, capsys):
    folder = tokenizer_of(results).folder
    assert prior.main([]) == 2
    assert prior.main(["nothing", "--results", str(results)]) == 2
    assert command(results, "--prior", "independent") == 0
    (one,) = Store(results).priors()
    assert prior.main([str(one.folder)]) == 2
    (folder / "metrics.json").unlink()
    assert prior.main([str(folder)]) == 2
    err = " ".join(capsys.readouterr().err.split())
    assert "name the run of a tokenizer" in err
    assert f"unknown run 'nothing'; below {results / 'runs'} there are {folder.name}" in err
    assert "is the run of a prior" in err
    again = f"--config {folder.resolve()}/config.toml --results {results.resolve()} first"
    assert runnable(f"is unfinished; finish it with python -m bench.run {again}") in err


def test_what_is_not_done_is_told_of_priors_and_of_the_tokenizer_under_them(tmp_path):
    store = Store(tmp_path)
    poor = fabricate(store, make_config("cnn", "smoke"), psnr=20.0, psnr_kmeans=21.5)
    good = fabricate(store, make_config("vit", "smoke"), psnr=22.0, psnr_kmeans=21.5)
    assert prior.of_its_codes(poor) == (
        f"the tokenizer {poor.folder.name} is 1.5 dB below k-means at the same bits: train that for longer first"
    )
    assert prior.of_its_codes(good) == ""
    told = [
        prior.not_done(fabricate_prior(store, PriorConfig(good.folder.name, "rnn", seed=seed), bits, 100.0))
        for seed, bits in enumerate((6.4, 6.5, 6.6))
    ]
    worse = "worse than independent codes (6.60 bits per token against 6.50)"
    assert told == ["", "", f"rnn 2: {worse}: train longer"]


def test_changed_images_are_noticed(results, capsys):
    folder = tokenizer_of(results).folder
    stored = json.loads((folder / "metrics.json").read_text())
    del stored["sha256"]  # as older versions wrote it
    stored["protocol"]["fingerprint"] = "0" * 64
    (folder / "metrics.json").write_text(json.dumps(stored))
    assert "has other images now than when" in refused(results, capsys)


def test_whatever_a_prior_lacks_it_is_damaged_or_shown_without(tmp_path):
    """Each of its scores, and each part of its protocol, missing and null: no table, no line and no ranking of a report
    ends in an error."""
    store, config = Store(tmp_path), make_config("cnn", "smoke", device="cpu")
    fabricate(store, config)
    made = fabricate_prior(store, PriorConfig(config.run_id(), "rnn", device="cpu"), 6.0, 90.0)
    whole = made._read("metrics.json")
    shown = 0
    for name, content in lacking(whole):
        made.write("metrics.json", content)
        assert len(list(generation(read([made], PRIOR)[0]))) == 1
        if made.finished:
            prior.result_table([made])
            assert prior.protocol_line(made)
            shown += 1
        else:
            assert made.status == "damaged"
            assert name in made.reason
    assert shown > 25


# -- what is measured -------------------------------------------------------------------------------------------------


def test_nearest_finds_copies_mirror_images_too():
    generator = np.random.default_rng(0)
    train = generator.integers(0, 256, (40, 64, 64, 3), dtype=np.uint8)
    images = torch.from_numpy(np.stack([train[7], train[21][:, ::-1], generator.integers(0, 256, (64, 64, 3))]))
    psnr, rows = nearest(images.permute(0, 3, 1, 2).to(torch.uint8), train, "cpu")
    assert rows[:2].tolist() == [7, 21]
    assert (psnr[:2] > 60).all()
    assert psnr[2] < 20


def test_distances_agree_with_torch_fidelity_and_are_zero_for_equal_sets():
    generator = torch.Generator().manual_seed(0)
    real = torch.randint(0, 256, (12, 3, 32, 32), generator=generator, dtype=torch.uint8)
    made = (real // 2)[:10]
    sets = [ImageSet.of(images.split(5)) for images in (made, real)]
    with torch.no_grad():
        expected = perceptual("vgg", torch.device("cpu")).features(real.float() / 127.5 - 1)[-1].mean((2, 3))
    torch.testing.assert_close(sets[1].features["vgg16"], expected, rtol=1e-4, atol=1e-4)
    distances = sets[0].distances(sets[1])
    found = prc_features_to_metric(
        sets[0].features["vgg16"], sets[1].features["vgg16"], prc_neighborhood=3, verbose=False
    )
    assert distances["precision_vgg16"] == found["precision"]
    assert distances["recall_vgg16"] == found["recall"]
    same = sets[1].distances(sets[1])
    assert same["gfid_vgg16"] == pytest.approx(0, abs=1e-2)
    assert same["precision_vgg16"] == same["recall_vgg16"] == 1
