"""One config in, one finished run folder out: or nothing that looks finished."""

import json
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_train import CHANGES

from bench import trial
from bench.config import make_config
from bench.data import Data
from bench.evaluate import PatchKMeans, kmeans_reference, protocol, score, score_untrained
from bench.files import UserError
from bench.metrics import Artefacts, from_uint8, psnr, to_uint8
from bench.store import Store
from bench.tokenizer import Tokenizer
from bench.train import Diverged
from bench.trial import run_trial

# What a clock or the machine decides, beside what config and seed decide.
MEASURED = {
    *("images_per_second_encode", "images_per_second_decode", "peak_memory_mb", "train_seconds", "score_seconds")
}
KEYS = MEASURED | {
    *("fid_vgg16", "kid_vgg16", "lpips_alex", "lpips_vgg", "psnr", "ssim", "perplexity", "usage", "dead_codes"),
    *("grid_energy", "grid_edges", "sharpness", "grid_energy_init", "grid_edges_init"),
    *("tokens", "bits_per_image", "bits_per_pixel", "images_seen"),
    *("params_encoder", "params_decoder", "flops_encode", "flops_decode"),
}
FILES = {"config.json", "history.jsonl", "metrics.json", "tokenizer.safetensors", "per_image.npz", "samples.npz"}
PICTURES = {"reconstructions.png", "curves.png"}


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "results")


def test_a_finished_run_holds_everything(trial_data, tiny, store):
    run = run_trial(tiny, store)
    assert {path.name for path in run.folder.iterdir()} - {".lock"} == FILES | PICTURES
    metrics = run.metrics()
    assert metrics.keys() >= KEYS
    assert {
        f"{name}_kmeans" for name in ("psnr", "lpips_alex", "fid_vgg16", "perplexity", "grid_edges")
    } <= metrics.keys()
    assert metrics["bits_per_image"] == 16 * 4
    assert metrics["bits_per_pixel"] == 64 / 32**2
    assert metrics["images_seen"] == tiny.steps * tiny.batch_size
    per_image = np.load(run.folder / "per_image.npz")
    assert per_image["psnr"].shape == (len(trial_data.val),)
    for name in ("psnr", "ssim", "lpips_alex", "lpips_vgg"):
        assert metrics[name] == pytest.approx(float(per_image[name].mean()), rel=1e-5)
    stored = json.loads((run.folder / "config.json").read_text())
    assert stored["config"]["backbone"] == "cnn"
    assert stored["environment"]["versions"]["torch"] == torch.__version__
    assert run.protocol()["count"] == len(trial_data.val)


def test_the_scores_are_those_of_decode_encode(trial_data, tiny, store):
    """From the stored weights, by hand: clamp, round, compare (bug 11)."""
    run = run_trial(tiny, store)
    tokenizer = Tokenizer.from_run(run.folder)
    x = torch.from_numpy(trial_data.val).permute(0, 3, 1, 2)
    codes = tokenizer.encode(x.float() / 127.5 - 1)
    x_hat = ((tokenizer.decode(codes).clamp(-1, 1) + 1) * 127.5).round()
    error = (x_hat - x.float()).square().mean((1, 2, 3))
    assert run.metrics()["psnr"] == pytest.approx(float((10 * (255**2 / error).log10()).mean()), abs=1e-3)
    frequencies = torch.bincount(codes.flatten(), minlength=16).double() / codes.numel()
    perplexity = float(torch.special.entr(frequencies).sum().exp())  # of the whole set (bug 9)
    assert run.metrics()["perplexity"] == pytest.approx(perplexity, rel=1e-3)


def test_same_config_and_seed_in_two_folders_give_identical_metrics(trial_data, tiny, tmp_path):
    first, second = (run_trial(tiny, Store(tmp_path / name)).metrics() for name in "ab")
    for name in first.keys() - MEASURED:
        assert first[name] == second[name], name


def test_a_finished_run_is_not_run_again(trial_data, tiny, store, monkeypatch):
    first = run_trial(tiny, store)
    monkeypatch.setattr(trial, "train", None)
    assert run_trial(tiny, store) == first
    assert run_trial(replace(tiny, device="auto", precision="auto"), store) == first


def test_a_crash_while_scoring_leaves_no_metrics_and_training_is_not_repeated(trial_data, tiny, store, monkeypatch):
    config = replace(tiny, steps=4)
    with monkeypatch.context() as patch:
        patch.setattr(trial, "throughput", lambda tokenizer: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run_trial(config, store)
    run = store.run(config)
    assert not run.finished
    assert run.status == "unfinished"
    with pytest.raises(UserError, match="no finished run"):
        Tokenizer.from_run(run.folder)
    assert run_trial(config, store).finished


def test_divergence_is_recorded(trial_data, tiny, store):
    config = replace(tiny, lr=1e30, grad_clip=0.0, precision="fp32")
    with pytest.raises(Diverged):
        run_trial(config, store)
    run = store.run(config)
    assert run.status == "diverged"
    assert not run.finished
    assert [found.folder for found in store.runs()] == [run.folder]


def test_changed_images_are_not_mixed_with_old_scores(trial_data, tiny, store, monkeypatch):
    run_trial(tiny, store)
    other = Data(trial_data.name, trial_data.train, trial_data.val, "1" * 64, trial_data.split, ())
    monkeypatch.setattr(trial, "load", lambda data, image_size: other)
    with pytest.raises(UserError, match="other images"):
        run_trial(tiny, store)


def test_data_and_image_size_reach_the_loader(tiny, store, monkeypatch):
    """The two settings that only the loader sees (bug 16)."""
    asked = []
    monkeypatch.setattr(trial, "load", lambda *arguments: asked.append(arguments) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_trial(replace(tiny, data="cifar10", image_size=64), store)
    assert asked == [("cifar10", 64)]


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
    found = score_untrained(config, images.val)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    assert score_untrained(config, images.val) == found
    assert score_untrained(tiny, images.val) != found  # another seed, another start
    torch.manual_seed(3)
    tokenizer = Tokenizer(config).eval()
    x = torch.from_numpy(images.val).permute(0, 3, 1, 2)
    with torch.no_grad():
        x_hat = to_uint8(tokenizer.decoder(tokenizer.encoder(from_uint8(x))))
    artefacts = Artefacts()
    artefacts.update(x, x_hat)
    assert found["grid_energy_init"] == pytest.approx(artefacts.grid_energy(4), abs=1e-3)
    assert found["grid_edges_init"] == pytest.approx(artefacts.grid_edges(4), abs=1e-3)


def test_a_vit_starts_with_a_grid_and_both_cures_lower_it(images):
    """Means over seeds, at an 8×8 grid of 32×32 images."""

    def energy(backbone: str, **options) -> float:
        config = make_config(backbone, "smoke", grid_size=8, device="cpu", **options)
        return np.mean([score_untrained(replace(config, seed=k), images.val)["grid_energy_init"] for k in range(6)])

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
    x = from_uint8(torch.from_numpy(images.val).permute(0, 3, 1, 2))
    codec.centroids = codec._patches(x)
    every = torch.arange(len(x) * 16).view(len(x), 4, 4)
    assert torch.equal(codec.decode(every), x)


def test_kmeans_reference_is_computed_once(trial_data, monkeypatch):
    first = kmeans_reference(trial_data, 4, 16, "cpu", None)
    monkeypatch.setattr("bench.evaluate.PatchKMeans", None)
    assert kmeans_reference(trial_data, 4, 16, "cpu", None) == first


def test_a_perfect_codec_scores_perfectly(images):
    class Perfect:
        def encode(self, x):
            self.x = x
            return torch.zeros(len(x), 1, 1, dtype=torch.int64)

        def decode(self, codes):
            return self.x

    metrics, per_image = score(Perfect(), 2, images.val, "cpu", None, "perfect")
    assert metrics["lpips_alex"] == metrics["lpips_vgg"] == 0
    assert metrics["ssim"] == pytest.approx(1)
    assert metrics["psnr"] == per_image["psnr"].min() == float(psnr(*[torch.zeros(1, 3, 8, 8, dtype=torch.uint8)] * 2))
    assert metrics["fid_vgg16"] == pytest.approx(0, abs=1e-4)
    assert metrics["grid_energy"] == metrics["grid_edges"] == 0
    assert metrics["sharpness"] == 1
    assert metrics["perplexity"] == 1
    assert metrics["dead_codes"] == 1


def test_protocol_names_data_count_extractor_and_resolution(images):
    found = protocol(images, "cuda:3", None)
    assert found["fingerprint"] == images.fingerprint
    assert found["count"] == 24
    assert found["image_size"] == 32
    assert found["device"] == "cuda"
    assert "relu5_3" in found["extractor_vgg16"]


def test_run_id_covers_every_setting(tiny):
    ids = {tiny.run_id()}
    for name, value in {**CHANGES, "image_size": 64, "data": "cifar10", "device": "cuda", "pretrained": True}.items():
        ids.add(replace(tiny, **{name: value}).run_id())
    assert len(ids) >= len(CHANGES)  # precision auto may be bf16 already
    assert replace(tiny, data="folder:a/../b").run_id() == replace(tiny, data="folder:b").run_id()


def test_make_config_overrides_the_preset():
    config = make_config("vit", "smoke", steps=7, width=None)
    assert config.steps == 7
    assert config.width == make_config("vit", "smoke").width
    with pytest.raises(UserError, match="unknown setting 'stepz'"):
        make_config("vit", "smoke", stepz=7)


def test_many_processes_may_look_at_one_results_folder_at_once(tmp_path):
    """Each writes a probe of its own."""
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
    assert list((tmp_path / "runs").iterdir()) == []
