"""One config in, one finished run folder out: or nothing that looks finished."""

import json
import math
import threading
from contextlib import nullcontext
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bench.analysis.frames import METRICS
from bench.core.errors import Diverged, UserError
from bench.core.files import cache_dir
from bench.core.runs import SCORED, Busy, Run
from bench.core.store import Store
from bench.data import Data
from bench.instruments import METRICS as INSTRUMENT_METRICS
from bench.metrics import Artefacts, from_uint8, full_precision, psnr, to_uint8, weights
from bench.tokenizers import curves, evaluate, trial
from bench.tokenizers.codecs import KEPT, available
from bench.tokenizers.config import Config, make_config
from bench.tokenizers.evaluate import PatchKMeans, kmeans_reference, protocol, score, score_untrained
from bench.tokenizers.sizes import parameter_count
from bench.tokenizers.tokenizer import Tokenizer, to_device
from bench.tokenizers.trial import codebook_images, finish, run_trial, sample_reconstructions
from tests.fabricate import fabricate, least
from tests.tokenizers.test_train import CHANGES

# What a clock or the machine decides, beside what config and seed decide.
MEASURED = {
    *("images_per_second_encode", "images_per_second_decode", "peak_memory_mb", "train_seconds", "score_seconds")
}
FILES = {"config.json", "history.jsonl", "metrics.json", "tokenizer.safetensors", "per_image.npz", "samples.npz"}
FILES |= {"config.toml", "untrained.npz"}
PICTURES = {"reconstructions.png", "curves.png"}
LEAST = dict.fromkeys(SCORED["runs"], 1.0)  # what a finished run has


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "results")


SMALL = {"width": 16, "depth": 1, "codebook_size": 16, "code_dim": 4, "steps": 12, "batch_size": 8, "warmup": 2}


@pytest.fixture(scope="module")
def trained(images, tmp_path_factory) -> Run:
    """The run of ``tiny``, trained once; tests only read it."""
    folder, kept = tmp_path_factory.mktemp("trained"), cache_dir() / "weights"
    kept.mkdir(parents=True, exist_ok=True)
    (folder / "weights").symlink_to(kept)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VQBENCH_CACHE", str(folder))
        patch.setattr(trial, "load", lambda data, image_size: images)
        config = make_config("cnn", "smoke", **SMALL, lpips_weight=0.0, device="cpu", precision="fp32")
        return run_trial(config, Store(folder / "results"))


def test_a_finished_run_holds_everything(trained, images):
    assert {path.name for path in trained.folder.iterdir()} - {".lock"} == FILES | PICTURES
    metrics = trained.metrics()
    assert metrics["bits_per_image"] == 16 * 4
    assert metrics["bits_per_pixel"] == 64 / 32**2
    assert metrics["images_seen"] == 12 * 8
    per_image = np.load(trained.folder / "per_image.npz")
    assert per_image["psnr"].shape == (len(images.test),)
    for name in ("psnr", "ssim", "lpips_alex", "lpips_vgg"):
        assert metrics[name] == pytest.approx(float(per_image[name].mean()), rel=1e-5)
    stored = json.loads((trained.folder / "config.json").read_text())
    assert stored["config"]["backbone"] == "cnn"
    assert stored["environment"]["versions"]["torch"] == torch.__version__
    assert trained.protocol() == protocol(images, "test", "cpu", None)


def test_a_run_has_the_metrics_that_reports_list_and_no_others(trained):
    """And of k-means those that do not depend on a network's size or speed, of image formats the main ones."""
    found = trained.metrics()
    absent = {"fid": weights.inception_missing(), "fd_dinov2": weights.dinov2_missing()}
    listed = set(METRICS) - set(INSTRUMENT_METRICS) - {name for name, reason in absent.items() if reason}
    others = ("_kmeans", *(f"_{name}" for name in available()))
    assert {name for name in found if not name.endswith(others)} == listed
    own = listed - MEASURED - set(curves.METRICS)
    own -= {"params", "flops", "images_seen", "grid_energy_init", "grid_edges_init"}
    own -= {f"{what}_{side}" for what in ("params", "flops") for side in ("encoder", "decoder", "encode", "decode")}
    assert {name for name in found if name.endswith("_kmeans")} == {f"{name}_kmeans" for name in own}
    for name in available():
        assert {key for key in found if key.endswith(f"_{name}")} == {f"{key}_{name}" for key in {*KEPT} & listed}


def test_the_scores_are_those_of_decode_encode(trained, images):
    """From the stored weights, by hand: clamp, round, compare (bug 11)."""
    tokenizer = Tokenizer.from_run(trained.folder)
    x = torch.from_numpy(images.test).permute(0, 3, 1, 2)
    codes = tokenizer.encode(x.float() / 127.5 - 1)
    x_hat = ((tokenizer.decode(codes).clamp(-1, 1) + 1) * 127.5).round()
    error = (x_hat - x.float()).square().mean((1, 2, 3))
    assert trained.metrics()["psnr"] == pytest.approx(float((10 * (255**2 / error).log10()).mean()), abs=1e-3)
    frequencies = torch.bincount(codes.flatten(), minlength=16).double() / codes.numel()
    perplexity = float(torch.special.entr(frequencies).sum().exp())  # of the whole set (bug 9)
    assert trained.metrics()["perplexity"] == pytest.approx(perplexity, rel=1e-3)


def test_same_config_and_seed_in_two_folders_give_identical_metrics(trained, trial_data, tiny, store):
    torch.rand(9)  # what happened before must not matter
    first, second = trained.metrics(), run_trial(replace(tiny, precision="fp32"), store).metrics()
    assert first.keys() == second.keys()
    for name in first.keys() - MEASURED:
        assert first[name] == second[name], name


def test_a_finished_run_is_not_run_again(trial_data, tiny, store, monkeypatch):
    first = fabricate(store, tiny, fingerprint=trial_data.fingerprint)
    before = {path: path.stat().st_mtime_ns for path in first.folder.iterdir()}
    monkeypatch.setattr(trial, "train", None)
    assert run_trial(tiny, store) == first
    assert run_trial(replace(tiny, device="auto", precision="auto"), store) == first
    assert {path: path.stat().st_mtime_ns for path in first.folder.iterdir()} == before


def greys(config) -> Tokenizer:
    """A tokenizer of random weights, with a codebook of what its encoder gives."""
    torch.manual_seed(0)
    tokenizer = to_device(Tokenizer(config), config.device)
    tokenizer.quantizer.initialise(tokenizer.encoder(torch.rand(8, 3, config.image_size, config.image_size) * 2 - 1))
    return tokenizer.eval().requires_grad_(False)


def begun(store, config) -> Run:
    """The folder of a run that has been trained and not scored."""
    run = store.run(config)
    run.folder.mkdir(parents=True)
    run.write("config.json", {"config": asdict(config), "environment": {}})
    rows = [{"step": k, "reconstruction": 1 / k, "quantizer": 0.1, "perplexity": 2.0, "codes_used": 3} for k in (6, 12)]
    (run.folder / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run.folder / "checkpoint.pt").touch()
    return run


@pytest.fixture(scope="module")
def scored(images, tmp_path_factory):
    """A run that ``finish`` has written, its tokenizer and its data; the reference and the costs are made up."""
    config = make_config("cnn", "smoke", **SMALL, device="cpu", precision="fp32").resolved()
    data = replace(images, test=images.test[:15])
    run, tokenizer = begun(Store(tmp_path_factory.mktemp("scored")), config), greys(config)
    reference = {"psnr": 1.25, "usage": 0.5}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trial, "format_references", lambda *_: {})
        finish(run, tokenizer, data, reference, None, {"train_seconds": 7.5, "grid_edges_init": 0.25})
    return run, tokenizer, data


def test_the_reference_and_what_was_measured_before_are_written_as_they_are(scored):
    metrics = scored[0].metrics()
    assert {name: value for name, value in metrics.items() if name.endswith("_kmeans")} == {
        "psnr_kmeans": 1.25,
        "usage_kmeans": 0.5,
    }
    assert (metrics["train_seconds"], metrics["grid_edges_init"]) == (7.5, 0.25)
    assert metrics["images_seen"] == 96


def test_stored_weights_reproduce_the_stored_scores(scored):
    run, _, data = scored
    tokenizer = Tokenizer.from_run(run.folder)
    metrics, per_image = score(tokenizer, 16, data.test, "cpu", None, "again")
    stored = run.metrics()
    assert metrics == pytest.approx({name: stored[name] for name in metrics}, rel=1e-3, abs=1e-3)
    assert run.protocol()["count"] == 15
    for name, values in per_image.items():
        np.testing.assert_allclose(values, run.per_image()[name], rtol=1e-3, atol=1e-3)


def test_pictures_show_what_is_scored(scored):
    """samples.npz holds originals from the whole set, and decode(encode(x)) of them (bug 6)."""
    run, tokenizer, data = scored
    with np.load(run.folder / "samples.npz") as samples:
        x, x_hat = samples["x"], samples["x_hat"]
    np.testing.assert_array_equal(x, data.test[np.linspace(0, 14, 12, dtype=int)])
    images = from_uint8(torch.from_numpy(x).permute(0, 3, 1, 2))
    with full_precision(images.device):
        expected = to_uint8(tokenizer.decode(tokenizer.encode(images)))
    np.testing.assert_array_equal(x_hat, expected.permute(0, 2, 3, 1))


def test_a_run_that_finished_keeps_no_checkpoint(scored):
    assert scored[0].finished
    assert {path.name for path in scored[0].folder.iterdir()} == FILES - {"config.toml", "untrained.npz"} | PICTURES


WRITERS = ("tokenizers.trial.write_weights", "tokenizers.trial.np.savez_compressed")
WRITERS += ("core.plots.reconstructions", "core.plots.curves")


@pytest.mark.parametrize("writer", WRITERS)
def test_whatever_cannot_be_written_leaves_no_metrics(writer, images, tiny, store, monkeypatch):
    """metrics.json comes last: what looks finished is whole. Training is not lost either."""
    config = replace(tiny, precision="fp32").resolved()
    run, tokenizer = begun(store, config), greys(config)
    monkeypatch.setattr(trial, "score", lambda *_, **__: ({**LEAST, "psnr": 20.0}, {"psnr": np.zeros(24)}))
    monkeypatch.setattr(trial, "throughput", lambda *_: {})
    monkeypatch.setattr(trial, "static_costs", lambda tokenizer: {})
    with monkeypatch.context() as patch:
        patch.setattr(f"bench.{writer}", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            finish(run, tokenizer, images, {}, None, {})
    assert not run.finished
    assert (run.folder / "checkpoint.pt").exists()
    finish(run, tokenizer, images, {}, None, {})
    assert run.finished


class Flat(torch.nn.Module):
    """One code per image, its mean grey; a code decodes to an image of that grey."""

    config = SimpleNamespace(codebook_size=256)

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def encode(self, x):
        return ((x.mean((1, 2, 3)) + 1) * 127.5).round().long().view(-1, 1, 1)

    def decode(self, codes):
        return from_uint8(codes.view(-1, 1, 1, 1)).expand(-1, 3, 8, 8)


def test_sample_reconstructions_are_spread_over_the_set():
    images = np.arange(100, dtype=np.uint8).repeat(8 * 8 * 3).reshape(100, 8, 8, 3)
    x, x_hat = sample_reconstructions(Flat(), images, "cpu")
    assert x.dtype == x_hat.dtype == np.uint8
    assert x[:, 0, 0, 0].tolist() == [0, 9, 18, 27, 36, 45, 54, 63, 72, 81, 90, 99]
    np.testing.assert_array_equal(x_hat, x)
    x, _ = sample_reconstructions(Flat(), images[:5], "cpu")
    assert len(x) == 5


def test_the_picture_of_a_codebook_shows_every_code_in_order(monkeypatch):
    assert codebook_images(Flat())[:, 0, 0, 0].tolist() == list(range(256))
    assert codebook_images(Flat()).shape == (256, 8, 8, 3)
    monkeypatch.setattr(trial, "CODES", 10)
    assert codebook_images(Flat())[:, 7, 7, 2].tolist() == list(range(10))


def test_a_codebook_is_pictured_where_one_code_is_an_image(images, tiny, store, monkeypatch):
    """And what is no training counts as scoring: what was before, the scores, and speeds."""
    config, now = replace(tiny, grid_size=1, width=8, precision="fp32").resolved(), [100.0]

    def wait(seconds, found):
        now[0] += seconds
        return found

    run = begun(store, config)
    monkeypatch.setattr(trial, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(trial, "score", lambda *_, **__: wait(4.5, ({**LEAST, "psnr": 20.0}, {"psnr": np.zeros(24)})))
    monkeypatch.setattr(trial, "throughput", lambda *_: wait(9, {}))
    finish(run, greys(config), images, {}, None, {}, 3.0)
    assert (run.folder / "codebook.png").exists()
    assert run.metrics()["score_seconds"] == 3 + 4.5 + 9


def test_a_trial_is_prepared_and_measured_with_its_own_settings(trial_data, tiny, store, monkeypatch, tmp_path):
    """Which config, data, grid, K, weights and folder reach which step; an earlier failure is forgiven."""
    config, seen = replace(tiny, grid_size=8, codebook_size=32).resolved(), {}
    run = store.run(config)
    run.folder.mkdir(parents=True)
    run.fail("crashed", "before")

    def train(*arguments, accumulate, tell):
        seen["train"] = arguments
        assert run.status == "unfinished"
        assert run.config() == asdict(config)
        return "tokenizer", 5.0

    monkeypatch.setattr(trial, "train", train)
    monkeypatch.setattr(trial, "kmeans_reference", lambda *arguments: {"psnr": arguments})
    monkeypatch.setattr(trial, "score_untrained", lambda *arguments: ({"grid_edges_init": arguments}, np.ones(3)))
    monkeypatch.setattr(trial, "finish", lambda *arguments: seen.update(finish=arguments))
    monkeypatch.setattr(trial, "peak_memory", lambda device: nullcontext(lambda: 12.5 if device == "cpu" else 0))
    monkeypatch.setattr(trial, "prepare", lambda *arguments: seen.update(prepare=arguments) or trial_data)
    assert run_trial(config, store, tmp_path, resume=False) == run
    assert seen["prepare"] == (config, store, tmp_path)
    assert seen["train"] == (config, trial_data.train, run.folder, False)
    *given, measured, before = seen["finish"]
    assert before >= 0
    assert given == [run, "tokenizer", trial_data, {"psnr": (config, trial_data, tmp_path)}, tmp_path]
    assert measured.keys() == {"grid_edges_init", "train_seconds", "peak_memory_mb"}
    assert measured["grid_edges_init"] == (config, trial_data.test)
    assert np.load(run.folder / "untrained.npz")["untrained"].tolist() == [1, 1, 1]
    assert (measured["train_seconds"], measured["peak_memory_mb"]) == (5.0, 12.5)


@pytest.mark.parametrize(
    ("quantizer", "bits", "asked"),
    [("ema", 64.0, ["k-means", 64.0]), ("kl", 333.25, [333.25]), ("none", None, [])],
)
def test_references_are_those_that_apply(trial_data, tiny, store, monkeypatch, quantizer, bits, asked):
    """k-means where there are codes, image formats where there are bits; without codes no K reaches the scores."""
    found, given = [], []
    scores = {**LEAST, "psnr": 20.0, "bits_per_image": bits}
    monkeypatch.setattr(trial, "kmeans_reference", lambda *_: found.append("k-means") or {"psnr": 1.0})
    monkeypatch.setattr(
        trial, "format_references", lambda config, data, bits, _: found.append(bits) or {"psnr_webp": 2.0}
    )
    monkeypatch.setattr(trial, "score_untrained", lambda *_: ({}, np.zeros(1)))
    per_image = {"psnr": np.zeros(24)}
    kept = {name: value for name, value in scores.items() if value is not None}
    monkeypatch.setattr(trial, "score", lambda *arguments, **_: given.append(arguments) or (kept, per_image))
    run = run_trial(replace(tiny, quantizer=quantizer, grid_size=1, steps=2), store)
    assert found == asked
    assert run.finished
    assert run.metrics().get("psnr_kmeans") == (1.0 if quantizer == "ema" else None)
    assert run.metrics().get("psnr_webp") == (None if quantizer == "none" else 2.0)
    assert given[0][1] == (tiny.codebook_size if quantizer == "ema" else None)
    assert (run.folder / "codebook.png").exists() == (quantizer == "ema")
    row = run.history()[-1]
    assert ("perplexity" in row, "bits_per_image" in row) == (quantizer == "ema", quantizer == "kl")


def test_every_network_that_scores_is_looked_for_before_training(images, tiny, store, monkeypatch, tmp_path):
    """Also those whose files the user has: one that is absent or damaged is told before hours are spent."""
    asked = []
    monkeypatch.setattr(weights, "trunk_state", asked.append)
    monkeypatch.setattr(weights, "inception", lambda path: asked.append(path))
    monkeypatch.setattr(weights, "dinov2", lambda path: asked.append(("dinov2", path)))
    monkeypatch.setattr(trial, "load", lambda data, image_size: images)
    assert trial.prepare(tiny.resolved(), store, tmp_path / "inception.pth") is images
    assert asked == [tmp_path / "inception.pth", ("dinov2", tmp_path / "inception.pth"), "alex", "vgg"]


def test_a_trial_asks_for_the_room_of_two_checkpoints_of_its_own_model(tiny, tmp_path):
    """The one that is there and the one that is written: five times the weights each, in float32."""
    asked = []

    def refuse(megabytes: int) -> None:
        asked.append(megabytes)
        raise UserError("the disk is full")

    full, counts = SimpleNamespace(check_writable=refuse, root=tmp_path), []
    for width in (16, 256):
        config = replace(tiny, width=width)
        counts.append(parameter_count(Tokenizer(config)))
        with pytest.raises(UserError, match="disk is full"):
            trial.prepare(config, full)
    assert counts[1] > 100 * counts[0]
    assert asked == [pytest.approx(50 + 2 * 20 * count / 2**20, abs=2) for count in counts]


def test_a_crash_while_scoring_leaves_no_metrics_and_the_next_call_finishes(trial_data, tiny, store, monkeypatch):
    config = replace(tiny, steps=4)
    monkeypatch.setattr(trial, "kmeans_reference", lambda *_: {})
    monkeypatch.setattr(trial, "score", lambda *_, **__: ({**LEAST, "psnr": 20.0}, {"psnr": np.zeros(24)}))
    with monkeypatch.context() as patch:
        patch.setattr(trial, "throughput", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run_trial(config, store)
    run = store.run(config)
    assert not run.finished
    assert run.status == "unfinished"
    with pytest.raises(UserError, match="no finished run"):
        Tokenizer.from_run(run.folder)
    assert run_trial(config, store).finished


def test_divergence_is_recorded(trial_data, tiny, store, monkeypatch):
    config = replace(tiny, lr=1e30, grad_clip=0.0, precision="fp32")
    monkeypatch.setattr(trial, "kmeans_reference", lambda *_: {})
    with pytest.raises(Diverged) as error:
        run_trial(config, store)
    run = store.run(config)
    assert (run.status, run.reason) == ("diverged", str(error.value))
    assert not run.finished
    assert [found.folder for found in store.runs()] == [run.folder]


def test_changed_images_are_not_mixed_with_old_scores(trial_data, tiny, store, monkeypatch):
    run = fabricate(store, tiny, fingerprint="1" * 64)
    monkeypatch.setattr(trial, "train", None)
    with pytest.raises(UserError) as error:
        run_trial(tiny, store)
    said = f"{tiny.data} has other images now than when {run.folder} was scored; move that folder"
    assert str(error.value) == said


def test_data_and_image_size_reach_the_loader(tiny, store, monkeypatch):
    """The two settings that only the loader sees (bug 16)."""
    asked = []
    monkeypatch.setattr(trial, "load", lambda *arguments: asked.append(arguments) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_trial(replace(tiny, data="cifar10", image_size=64), store)
    assert asked == [("cifar10", 64)]


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_trial_trains_on_its_share_and_is_scored_on_its_split(trial_data, tiny, store, told, monkeypatch, split):
    """By whatever looks at images: training, the k-means reference, both scores and the pictures."""
    config, seen = replace(tiny, split=split, train_images=20, precision="fp32").resolved(), {}
    monkeypatch.setattr(evaluate, "PatchKMeans", lambda images, *_: seen.update(kmeans=images))
    monkeypatch.setattr(evaluate, "score", lambda *given: seen.update(reference=given[2]) or ({"psnr": 1.0}, {}))
    monkeypatch.setattr(trial, "score_untrained", lambda _, images: seen.update(untrained=images) or ({}, np.zeros(1)))
    monkeypatch.setattr(
        trial, "train", lambda _, images, *rest, **options: seen.update(train=images) or (greys(config), 5.0)
    )
    run = run_trial(config, store)
    chosen, scored_on = trial_data.with_train(20), trial_data.images(split)
    assert len(chosen.train) == 20
    assert np.array_equal(seen["train"][:], chosen.train[:])
    assert np.array_equal(seen["kmeans"][:], chosen.train[:])
    assert seen["reference"] is seen["untrained"] is told["tokenizers.trial.score"][2] is scored_on
    assert told["tokenizers.trial.protocol"][1] == split
    with np.load(run.folder / "samples.npz") as samples:
        np.testing.assert_array_equal(samples["x"], scored_on[np.linspace(0, 23, 12, dtype=int)])


def test_a_subset_that_there_is_not_is_told_before_any_training(trial_data, tiny, store):
    with pytest.raises(UserError, match=r"^train_images is 49 and photos has 48 to train on; 0 takes all$"):
        run_trial(replace(tiny, train_images=49), store)
    assert not list(store.root.glob("runs/*/history.jsonl"))


def test_one_process_per_run_folder(trial_data, tiny, store):
    run = store.run(tiny.resolved())
    run.folder.mkdir(parents=True)
    problems = []

    def second() -> None:
        try:
            with run.locked():
                pass
        except UserError as error:
            problems.append(str(error))

    with run.locked():
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
    assert "another process" in problems[0]
    with run.locked():
        pass


def test_the_untrained_score_sees_the_starting_weights_and_draws_nothing(tiny, images):
    config = replace(tiny, seed=3)
    before = torch.get_rng_state()
    found, pictures = score_untrained(config, images.test)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    assert score_untrained(config, images.test)[0] == found
    assert score_untrained(tiny, images.test)[0] != found  # another seed, another start
    torch.manual_seed(3)
    tokenizer = Tokenizer(config).eval()
    x = torch.from_numpy(images.test).permute(0, 3, 1, 2)
    with torch.no_grad():
        x_hat = to_uint8(tokenizer.decoder(tokenizer.encoder(from_uint8(x))))
    artefacts = Artefacts()
    artefacts.update(x, x_hat)
    assert found["grid_energy_init"] == pytest.approx(artefacts.grid_energy(4), abs=1e-3)
    assert found["grid_edges_init"] == pytest.approx(artefacts.grid_edges(4), abs=1e-3)
    shown = x_hat[np.linspace(0, 23, 12, dtype=int)].permute(0, 2, 3, 1).numpy()
    assert (pictures.shape, pictures.dtype) == ((12, 32, 32, 3), np.uint8)
    assert np.abs(pictures.astype(int) - shown).max() <= 1  # batches may round otherwise


def test_the_untrained_score_is_of_images_spread_over_the_set(tiny, images, monkeypatch):
    monkeypatch.setattr(evaluate, "UNTRAINED_IMAGES", 5)
    found = score_untrained(tiny, images.test)[0]
    assert found == score_untrained(tiny, images.test[[0, 5, 11, 17, 23]])[0]
    assert found.keys() == {"grid_energy_init", "grid_edges_init"}


def test_the_untrained_score_knows_nothing_of_batches(tiny, images, monkeypatch):
    """Of a backbone whose norms would couple the images of a training batch."""
    config, found = replace(tiny, backbone="timm:test_resnet"), []
    for size in (3, 24):
        monkeypatch.setattr(evaluate, "EVAL_BATCH", size)
        found.append(score_untrained(config, images.test)[0])
    assert found[0] == pytest.approx(found[1], abs=1e-3)


def test_a_vit_starts_with_a_grid_and_both_cures_lower_it(images):
    """Means over seeds, at an 8×8 grid of 32×32 images."""

    def energy(backbone: str, **options) -> float:
        config = make_config(backbone, "smoke", grid_size=8, device="cpu", **options)
        return np.mean([score_untrained(replace(config, seed=k), images.test)[0]["grid_energy_init"] for k in range(6)])

    plain = energy("vit")
    assert plain > energy("cnn") + 3
    overlap, conv = energy("vit", patch_overlap=True), energy("vit", final_conv=True)
    assert overlap < plain
    assert conv < plain - 1
    assert energy("vit", patch_overlap=True, final_conv=True) < overlap - 1


def test_patch_kmeans_beats_every_single_colour_and_is_a_codec(images):
    codec = PatchKMeans(images.train, 8, 16, "cpu")
    x = from_uint8(torch.from_numpy(images.train).permute(0, 3, 1, 2))
    codes = codec.encode(x)
    assert codes.shape == (48, 8, 8)
    x_hat = codec.decode(codes)
    assert x_hat.shape == x.shape
    assert torch.equal(codec.encode(x_hat), codes)  # a centroid's nearest centroid is itself
    assert (x_hat - x).square().mean() < (x - x.mean((2, 3), keepdim=True)).square().mean()
    fine = PatchKMeans(images.train, 32, 256, "cpu")
    assert (fine.decode(fine.encode(x)) - x).square().mean() < (x_hat - x).square().mean()


def test_patches_and_images_are_inverses(images):
    codec = PatchKMeans(images.train, 4, 4, "cpu")
    x = from_uint8(torch.from_numpy(images.test).permute(0, 3, 1, 2))
    codec.centroids = codec._patches(x)
    every = torch.arange(len(x) * 16).view(len(x), 4, 4)
    assert torch.equal(codec.decode(every), x)


def flat(*levels: int) -> np.ndarray:
    """One flat 32×32 image per grey level."""
    return np.array(levels, dtype=np.uint8).repeat(32 * 32 * 3).reshape(len(levels), 32, 32, 3)


def test_patch_kmeans_finds_every_patch_where_there_are_no_more_than_codes():
    """Also those that the random start missed: empty clusters are restarted."""
    levels = range(0, 240, 24)
    codec = PatchKMeans(flat(*levels), 4, 10, "cpu")
    found = to_uint8(codec.centroids)
    assert found.shape == (10, 8 * 8 * 3)
    assert sorted(found[:, 0].tolist()) == list(levels)
    x = from_uint8(torch.from_numpy(flat(*levels)).permute(0, 3, 1, 2))
    assert torch.equal(to_uint8(codec.decode(codec.encode(x))), to_uint8(x))


def test_patch_kmeans_ends_at_the_means_of_its_clusters():
    """Lloyd's fixed point. The global generator is left alone."""
    rng = np.random.default_rng(0)
    centres = np.array([40, 120, 200])[rng.integers(0, 3, (9, 4, 4))]
    images = np.clip(centres.repeat(8, 1).repeat(8, 2)[..., None] + rng.normal(0, 6, (9, 32, 32, 3)), 0, 255)
    images = images.astype(np.uint8)
    x = from_uint8(torch.from_numpy(images).permute(0, 3, 1, 2))
    state = torch.get_rng_state()
    codec = PatchKMeans(images, 4, 3, "cpu")
    assert torch.equal(torch.get_rng_state(), state)
    patches, codes = codec._patches(x), codec.encode(x).flatten()
    for code in range(3):
        torch.testing.assert_close(codec.centroids[code], patches[codes == code].mean(0), atol=1e-5, rtol=0)


def test_each_iteration_of_patch_kmeans_lowers_the_distortion(images, monkeypatch):
    x = from_uint8(torch.from_numpy(images.train).permute(0, 3, 1, 2))
    distortion = []
    for iterations in (0, 1, 3, 25):
        monkeypatch.setattr(evaluate, "KMEANS_ITERATIONS", iterations)
        codec = PatchKMeans(images.train, 4, 8, "cpu")
        distortion.append(float((codec.decode(codec.encode(x)) - x).square().mean()))
    assert distortion == sorted(set(distortion), reverse=True)


def test_patch_kmeans_sees_no_more_patches_than_it_says_and_any_number_of_codes(monkeypatch):
    monkeypatch.setattr(evaluate, "KMEANS_PATCHES", 40)
    seen = []
    nearest = evaluate.nearest
    monkeypatch.setattr(evaluate, "nearest", lambda a, b: seen.append((len(a), len(b))) or nearest(a, b))
    PatchKMeans(flat(*range(100)), 4, 5, "cpu")
    assert set(seen) == {(40, 5)}  # of three images, 48
    assert len(PatchKMeans(flat(7), 4, 20, "cpu").centroids) == 20  # more codes than patches


def reference(**changes) -> Config:
    """What a reference looks at: 4×4 codes of 16 on the CPU, scored on the test."""
    return make_config("cnn", "smoke", **{"codebook_size": 16, "device": "cpu", **changes})


def test_the_reference_has_k_centroids_of_the_training_images(trial_data):
    """Two of them lie between four training greys. Neither twice as many nor the scored images' own would do."""
    data = Data("x", flat(0, 20, 200, 220), flat(10, 10), flat(10, 30, 30), "a" * 64, "", ())
    found = kmeans_reference(reference(codebook_size=2), data, None)
    expected = (100 + 2 * 10 * math.log10(255**2 / 20**2)) / 3  # 10 is met exactly, and 30 is taken for 10
    assert found["psnr"] == pytest.approx(expected, abs=1e-3)
    assert (found["perplexity"], found["usage"], found["dead_codes"]) == (1, 0.5, 1)
    assert (found["tokens"], found["bits_per_image"]) == (16, 16)


def test_a_reference_is_computed_once_for_everything_that_it_depends_on(trial_data, monkeypatch, tmp_path):
    """Data, images to train on, split, grid, K, kind of device, Inception's weights and both versions: each alone asks
    for another."""
    computed = []
    monkeypatch.setattr(evaluate, "PatchKMeans", lambda *_: None)
    monkeypatch.setattr(
        evaluate, "score", lambda *given: (computed.append(given) or {"psnr": float(len(computed))}, {})
    )
    monkeypatch.setattr(weights, "inception_missing", lambda: "no network")
    arguments = reference(), trial_data, None
    first = kmeans_reference(*arguments)
    assert kmeans_reference(*arguments) == first == {"psnr": 1.0}
    other, fewer = replace(trial_data, fingerprint="1" * 64), trial_data.with_train(40)
    changes = [
        *((reference(), data, None) for data in (other, fewer)),
        *((reference(**it), trial_data, None) for it in ({"grid_size": 8}, {"codebook_size": 32}, {"split": "val"})),
        (replace(reference(), device="cuda"), trial_data, None),
        (reference(), trial_data, tmp_path / "inception.pth"),
    ]
    for config, data, fid_weights in changes:
        count = len(computed)
        assert [kmeans_reference(config, data, fid_weights) for _ in range(2)] == [{"psnr": count + 1.0}] * 2
        assert computed[-1][1] == config.codebook_size
        assert computed[-1][2] is data.images(config.split)
        assert computed[-1][3:5] == (config.device, fid_weights)
    for version in ("REFERENCE_VERSION", "PROTOCOL_VERSION"):
        with monkeypatch.context() as patch:
            patch.setattr(evaluate, version, 99)
            count = len(computed)
            assert kmeans_reference(*arguments) == {"psnr": count + 1.0}
    count = len(computed)
    assert kmeans_reference(*arguments) == first
    kmeans_reference(replace(reference(), device="cuda:1"), trial_data, None)  # which GPU does not matter
    assert len(computed) == count


class Greys:
    """The mean grey of a patch, in ``levels`` steps; it decodes to a flat patch."""

    def __init__(self, grid_size, levels):
        self.grid_size, self.levels, self.dtypes = grid_size, levels, set()

    def encode(self, x):
        assert x.dtype == torch.float32
        assert -1 <= x.min() <= -0.9
        assert 0.9 <= x.max() <= 1
        grey = torch.nn.functional.adaptive_avg_pool2d(x.mean(1), self.grid_size)
        return ((grey + 1) / 2 * (self.levels - 1)).round().long()

    def decode(self, codes):
        grey = codes[:, None].expand(-1, 3, -1, -1) / (self.levels - 1) * 2 - 1
        image = torch.nn.functional.interpolate(grey, (32, 32))
        self.dtypes.add(torch.nn.functional.conv2d(image, torch.zeros(1, 3, 1, 1)).dtype)
        return image


def test_scores_are_of_the_whole_set_and_not_of_its_batches(images, monkeypatch):
    """Every number by hand, from more images than a batch holds (bugs 9, 10)."""
    monkeypatch.setattr(evaluate, "EVAL_BATCH", 4)
    codec, val = Greys(4, 10), images.test[:10].copy()
    val[:, 0, 0], val[:, 0, 1] = 0, 255
    found, per_image = score(codec, 10, val, "cpu", None, "greys")
    x = torch.from_numpy(val).permute(0, 3, 1, 2)
    codes = codec.encode(from_uint8(x))
    x_hat = to_uint8(codec.decode(codes))
    counts = np.bincount(codes.flatten(), minlength=10)
    p = counts[counts > 0] / counts.sum()
    assert found["perplexity"] == pytest.approx(np.exp(-(p * np.log(p)).sum()))
    assert 0 < found["dead_codes"] == (counts == 0).sum()
    assert found["usage"] == pytest.approx((counts > 0).mean())
    assert found["tokens"] == 16
    assert found["bits_per_image"] == pytest.approx(16 * math.log2(10))
    assert found["bits_per_pixel"] == pytest.approx(16 * math.log2(10) / 1024)
    error = ((x_hat.double() - x.double()) ** 2).mean((1, 2, 3))
    expected = 10 * (255**2 / error).log10()
    np.testing.assert_allclose(per_image["psnr"], expected, atol=1e-3)  # in the order of the images
    assert found["psnr"] == pytest.approx(expected.mean().item(), abs=1e-3)
    for name, values in per_image.items():
        assert values.shape == (10,)
        assert found[name] == pytest.approx(values.mean(), rel=1e-5)
    steep = [y.double().diff(dim=2).abs().sum() + y.double().diff(dim=3).abs().sum() for y in (x_hat, x)]
    assert found["sharpness"] == pytest.approx(float(steep[0] / steep[1]), rel=1e-4)
    artefacts = Artefacts()
    artefacts.update(x, x_hat)
    assert found["grid_edges"] == pytest.approx(artefacts.grid_edges(4), abs=1e-3)
    assert found["grid_energy"] == pytest.approx(artefacts.grid_energy(4), abs=1e-3)
    assert found["grid_edges"] != pytest.approx(artefacts.grid_edges(8), abs=0.1)


def test_weights_are_looked_for_where_they_are_said_to_be(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(weights, "inception", lambda path: asked.append(path))
    monkeypatch.setattr(weights, "dinov2", lambda path: asked.append(path))
    score(Greys(4, 3), 3, flat(0, 255), "cpu", tmp_path, "")
    assert asked == [tmp_path, tmp_path]


def test_scoring_is_in_float32_whatever_surrounds_it(images):
    codec, val = Greys(4, 10), images.test[:2].copy()
    val[:, 0, 0], val[:, 0, 1] = 0, 255
    plain, _ = score(codec, 10, val, "cpu", None, "plain")
    with torch.autocast("cpu", torch.bfloat16):
        cast, _ = score(codec, 10, val, "cpu", None, "cast")
    assert codec.dtypes == {torch.float32}
    assert cast == plain


def test_values_beyond_the_range_are_clamped_before_anything_is_measured(images):
    """(bug 11)"""

    class Loud(Greys):
        def decode(self, codes):
            return super().decode(codes) * 3

    codec, val = Loud(4, 3), flat(0, 255)
    found, _ = score(codec, 3, val, "cpu", None, "loud")
    assert found["psnr"] == 100  # −3 and 3 are black and white


def test_a_perfect_codec_scores_perfectly(images):
    class Perfect:
        def encode(self, x):
            self.x = x
            return torch.zeros(len(x), 1, 1, dtype=torch.int64)

        def decode(self, codes):
            return self.x

    metrics, per_image = score(Perfect(), 2, images.test, "cpu", None, "perfect")
    assert metrics["lpips_alex"] == metrics["lpips_vgg"] == 0
    assert metrics["ssim"] == pytest.approx(1)
    assert metrics["psnr"] == per_image["psnr"].min() == float(psnr(*[torch.zeros(1, 3, 8, 8, dtype=torch.uint8)] * 2))
    assert metrics["fid_vgg16"] == pytest.approx(0, abs=1e-4)
    assert metrics["grid_energy"] == metrics["grid_edges"] == 0
    assert metrics["sharpness"] == 1
    assert metrics["perplexity"] == 1
    assert metrics["dead_codes"] == 1


def test_protocol_names_data_count_extractor_and_resolution(images):
    found = protocol(images, "test", "cuda:3", None)
    assert found["fingerprint"] == images.fingerprint
    assert (found["scored_on"], found["count"]) == ("test", 24)
    fewer = protocol(replace(images, val=images.val[:9]), "val", "cuda:3", None)
    assert (fewer["scored_on"], fewer["count"]) == ("val", 9)
    assert found["image_size"] == 32
    assert found["device"] == "cuda"
    assert "relu5_3" in found["extractor_vgg16"]


def test_what_makes_scores_incomparable_changes_the_protocol_and_nothing_else_does(images, monkeypatch, tmp_path):
    """One field each, so that the report can name it (bug 17)."""

    def changed(data=images, split="test", device="cpu", fid=None):
        now = protocol(data, split, device, fid)
        return {name for name in now if now[name] != before[name]}

    monkeypatch.setattr(weights, "inception_missing", lambda: "no network")
    before = protocol(images, "test", "cpu", None)
    assert changed(replace(images, fingerprint="1" * 64)) == {"fingerprint"}
    assert changed(replace(images, name="folder:x")) == {"data"}
    assert changed(replace(images, split="other")) == {"split"}
    assert changed(replace(images, test=images.test[:7])) == {"count"}
    small = {split: getattr(images, split)[:, :16, :16] for split in ("val", "test")}
    assert changed(replace(images, **small)) == {"image_size"}
    assert changed(split="val") == {"scored_on"}
    assert changed(replace(images, skipped=("a", "b"))) == {"skipped"}
    assert changed(replace(images, train=images.train[:7])) == set()  # the fingerprint covers all splits
    assert changed(device="cuda:1") == {"device"}
    assert changed(fid=tmp_path / "any.pth") == {"extractor_inception"}
    assert changed(fid=tmp_path / "dinov2_vitl14_pretrain.pth") == {"extractor_dinov2"}
    assert (before["skipped"], before["extractor_inception"], before["version"]) == (0, None, evaluate.PROTOCOL_VERSION)
    for net, field in (("vgg", "extractor_vgg16"), ("alex", "extractor_alex"), ("inception", None), ("dinov2", None)):
        with monkeypatch.context() as patch:
            patch.setitem(weights.DIGESTS, net, "f" * 64)
            assert changed() == ({field} if field else set())
    assert before["precision"] == "fp32"
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "PROTOCOL_VERSION", 99)
        assert changed() == {"version"}


def test_run_id_covers_every_setting(tiny):
    """One id for each change, and the same one for other spellings of the same."""
    base = replace(tiny, precision="fp32")
    changes = {**CHANGES, "image_size": 64, "data": "cifar10", "device": "cuda", "pretrained": True}
    ids = {name: replace(base, **{name: value}).run_id() for name, value in changes.items()}
    assert len({base.run_id(), *ids.values()}) == len(changes) + 1
    assert replace(tiny, data="folder:a/../b").run_id() == replace(tiny, data="folder:b").run_id()


def test_make_config_overrides_the_preset():
    config = make_config("vit", "smoke", steps=7, width=None)
    assert config.steps == 7
    assert config.width == make_config("vit", "smoke").width
    with pytest.raises(UserError, match="unknown setting 'stepz'"):
        make_config("vit", "smoke", stepz=7)


def test_many_processes_may_look_at_one_results_folder_at_once(tmp_path):
    """Each writes a probe of its own, of which nothing stays."""
    store, errors = Store(tmp_path), []

    def look():
        try:
            for _ in range(200):
                store.check_writable(0)
        except UserError as error:
            errors.append(error)

    threads = [threading.Thread(target=look) for _ in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not errors
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def told(monkeypatch) -> dict:
    """Scores are made up; what scoring, protocol and pictures are given, by name."""
    seen = {}

    def note(name, result):
        monkeypatch.setattr(f"bench.{name}", lambda *given, **_: seen.update({name: given}) or result)

    note("tokenizers.trial.score", ({**LEAST, "psnr": 20.06}, {"psnr": np.zeros(24)}))
    note("tokenizers.trial.static_costs", {})
    note("tokenizers.trial.throughput", {})
    note("tokenizers.trial.format_references", {})
    note("tokenizers.trial.protocol", least()["protocol"])
    for name in ("reconstructions", "curves", "codebook"):
        note(f"core.plots.{name}", None)
    return seen


def test_a_run_is_scored_and_pictured_under_its_own_name(images, tiny, store, told, tmp_path):
    """Backbone, quantizer, K, grid and PSNR above the pictures; Inception's weights are those that were given."""
    config = replace(tiny, grid_size=1, width=8, seed=4, precision="fp32").resolved()
    run, tokenizer = begun(store, config), greys(config)
    finish(run, tokenizer, images, {}, tmp_path, {})
    assert told["tokenizers.trial.score"][1:] == (16, images.test, "cpu", tmp_path, "scoring cnn ema seed 4")
    assert told["tokenizers.trial.protocol"] == (images, "test", "cpu", tmp_path)
    assert run.protocol() == {"scored_on": "val", **least()["protocol"]}
    title = "cnn, ema, K = 16, 1×1"
    path, x, x_hat, above = told["core.plots.reconstructions"]
    assert (path, above) == (run.folder / "reconstructions.png", f"{title}: 20.1 dB")
    with np.load(run.folder / "samples.npz") as stored:
        np.testing.assert_array_equal(x, stored["x"])
        np.testing.assert_array_equal(x_hat, stored["x_hat"])
    assert told["core.plots.curves"] == (run.folder / "curves.png", run.history(), 16, title)
    path, shown, above = told["core.plots.codebook"]
    assert (path, above) == (run.folder / "codebook.png", f"{title}: what each code decodes to")
    np.testing.assert_array_equal(shown, codebook_images(tokenizer))


@pytest.mark.parametrize(("before", "lost"), [(0, "per_image.npz"), (1, "samples.npz")])
def test_arrays_of_a_run_are_written_whole_or_not_at_all(images, tiny, store, told, monkeypatch, before, lost):
    config = replace(tiny, precision="fp32").resolved()
    run, tokenizer, save, written = begun(store, config), greys(config), np.savez_compressed, []

    def full(path, **arrays):
        if len(written) == before:
            path.write_bytes(b"half")
            raise OSError("disk full")
        written.append(save(path, **arrays))

    monkeypatch.setattr(trial.np, "savez_compressed", full)
    with pytest.raises(OSError, match="disk full"):
        finish(run, tokenizer, images, {}, None, {})
    names = {path.name for path in run.folder.iterdir()}
    assert lost not in names
    assert ("per_image.npz" in names) == (before > 0)
    assert not [name for name in names if name.endswith(".npz") and name.startswith(".")]


def test_a_cache_that_cannot_be_is_told_before_anything_is_fetched(images, tiny, store, monkeypatch, tmp_path):
    """One that is not there yet is made, with the folders above it."""
    monkeypatch.setattr(weights, "trunk_state", lambda net: None)
    monkeypatch.setattr(weights, "inception", lambda path: None)
    monkeypatch.setattr(trial, "load", lambda data, image_size: images)
    monkeypatch.setattr(trial, "check_size", lambda *arguments: None)  # sizes that are remembered would make it first
    monkeypatch.setenv("VQBENCH_CACHE", str(tmp_path / "new" / "cache"))
    assert trial.prepare(tiny.resolved(), store) is images
    assert (tmp_path / "new" / "cache").is_dir()
    (tmp_path / "file").touch()
    monkeypatch.setenv("VQBENCH_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(weights, "trunk_state", None)  # would be called to fetch
    with pytest.raises(UserError) as error:
        trial.prepare(tiny.resolved(), store)
    said = f"cannot create the cache folder {tmp_path / 'file' / 'cache'}: Not a directory; set VQBENCH_CACHE"
    assert str(error.value) == f"{said} to another"


def test_a_run_is_held_until_it_is_scored(trial_data, tiny, store, monkeypatch):
    """From before its reference is computed; nobody else can begin to train it meanwhile."""
    config, taken = tiny.resolved(), []

    def look(result):
        def looking(*arguments, **options):
            with pytest.raises(Busy), Run(store.run(config).folder).locked():
                pass
            taken.append(True)
            return result

        return looking

    given = {"kmeans_reference": {}, "score_untrained": ({}, np.ones(1)), "train": ("tokenizer", 5.0), "finish": None}
    for name, result in given.items():
        monkeypatch.setattr(trial, name, look(result))
    run_trial(config, store)
    assert len(taken) == 4
    with store.run(config).locked():
        pass


@pytest.mark.parametrize("content", ["", "{}", '{"psnr": "2.0"}', '{"content": {"psnr": 2.0}, "sha256": ""}'])
def test_a_damaged_reference_is_computed_again(trial_data, monkeypatch, capsys, content):
    computed = []
    monkeypatch.setattr(evaluate, "PatchKMeans", lambda *_: None)
    monkeypatch.setattr(evaluate, "score", lambda *given: (computed.append(given) or {"psnr": 1.0}, {}))
    assert kmeans_reference(reference(), trial_data, None) == {"psnr": 1.0}
    (path,) = (cache_dir() / "references").iterdir()
    path.write_text(content)
    assert kmeans_reference(reference(), trial_data, None) == {"psnr": 1.0}
    assert len(computed) == 2
    assert f"{path} is damaged: " in capsys.readouterr().err


def test_a_trial_that_no_memory_holds_is_refused_before_anything_is_built(tiny, store, monkeypatch):
    """Training holds a tokenizer five times: weights, gradients, two moments and an average."""
    asked = []

    def refuse(*given) -> None:
        asked.append(given)
        raise UserError("too large")

    monkeypatch.setattr(trial, "check_size", refuse)
    monkeypatch.setattr(trial, "Tokenizer", None)
    with pytest.raises(UserError, match="too large"):
        trial.prepare(tiny, store)
    assert asked == [(tiny, "cpu", 5)]


def test_a_damaged_run_is_not_trained_over(tiny, store, monkeypatch):
    """It is told at once, before data are loaded."""
    monkeypatch.setattr(trial, "prepare", None)
    run = store.run(tiny.resolved())
    run.folder.mkdir(parents=True)
    (run.folder / "metrics.json").write_text("{")
    with pytest.raises(UserError, match=r"metrics\.json is damaged: "):
        run_trial(tiny, store)
    assert (run.folder / "metrics.json").read_text() == "{"


@pytest.mark.parametrize("split", ["val", "test"])
@pytest.mark.parametrize(("train", "val"), [(1, 2), (2, 1)])
def test_two_images_of_each_split_are_needed_before_any_training(trial_data, monkeypatch, tmp_path, train, val, split):
    """Distances between sets have no spread of one."""
    few = replace(trial_data, train=trial_data.train[:train], **{split: trial_data.images(split)[:val]})
    monkeypatch.setattr("bench.tokenizers.trial.load", lambda data, image_size: few)
    with pytest.raises(UserError, match=f"photos has {train} train and {val} {split} images; distances"):
        run_trial(make_config("cnn", "smoke", device="cpu", split=split), tmp_path)
    assert not list(tmp_path.glob("runs/*/history.jsonl"))


def test_a_folder_that_is_not_there_is_told_before_anything_is_fetched(tiny, store, monkeypatch):
    monkeypatch.setattr(weights, "trunk_state", lambda net: pytest.fail("fetched"))
    with pytest.raises(UserError, match=r"^cannot read the folder /nowhere \(No such file or directory\): "):
        trial.prepare(replace(tiny, data="folder:/nowhere").resolved(), store)


def test_an_unknown_data_set_is_told_before_anything_is_fetched(tmp_path, monkeypatch):
    """And what a folder that is there has to be called."""
    monkeypatch.setattr(trial.weights, "trunk_state", lambda net: pytest.fail("fetched"))
    config = make_config("cnn", "smoke", data=str(tmp_path), device="cpu")
    with pytest.raises(UserError, match=f"is there: write folder:{tmp_path}$"):
        trial.prepare(config, Store(tmp_path / "results"))
