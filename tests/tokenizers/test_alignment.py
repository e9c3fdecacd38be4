"""Alignment with a frozen model: the paper's losses, features that nothing moves, and no trace where it is off."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from backbones import timm_encoder
from bench.core.errors import UserError
from bench.data import batch
from bench.tokenizers import alignment, trial
from bench.tokenizers import config as config_module
from bench.tokenizers import train as module
from bench.tokenizers.losses import marginal_cosine, marginal_distances
from bench.tokenizers.tokenizer import Tokenizer
from bench.tokenizers.trial import run_trial
from tests.watched import Crash, checkpoint, same

MODELS = ("test_vit", "test_convnext", "test_efficientnet")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """Random weights of small models, as a user would give them: with their classifier."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(5)
    found = {}
    for name in MODELS:
        model = timm.create_model(name)
        for buffer in (buffer for key, buffer in model.named_buffers() if key.endswith("running_mean")):
            buffer.normal_()
        found[name] = folder / f"{name}.safetensors"
        save_file(model.state_dict(), found[name])
    return found


@pytest.fixture
def aligned(tiny, files):
    return replace(
        tiny,
        precision="fp32",
        alignment_weight=0.5,
        alignment_model="test_vit",
        alignment_file=str(files["test_vit"]),
    ).resolved()


def made(files, name: str, image_size: int = 32, grid_size: int = 4) -> nn.Module:
    return alignment.features(name, str(files[name]), image_size, grid_size)


# ----------------------------------------------------------------------------------------------------------- the losses


def test_losses_are_the_paper_s_written_out():
    """Equations 4 and 5, position by position and pair by pair, at margins between which some of either pull."""
    torch.manual_seed(0)
    z, f = torch.randn(3, 5, 2, 4), torch.randn(3, 5, 2, 4)
    one, two = [], []
    for image in range(3):
        a, b = z[image].flatten(1).T, f[image].flatten(1).T
        for i in range(8):
            one.append(max(0.0, 1 - 0.5 - float(a[i] @ b[i] / a[i].norm() / b[i].norm())))
            for j in range(8):
                first, second = (float(x[i] @ x[j] / x[i].norm() / x[j].norm()) for x in (a, b))
                two.append(max(0.0, abs(first - second) - 0.25))
    assert 0 in one
    assert 0 in two
    assert float(marginal_cosine(z, f)) == pytest.approx(sum(one) / len(one), rel=1e-5)
    assert float(marginal_distances(z, f)) == pytest.approx(sum(two) / len(two), rel=1e-5)


def test_features_themselves_are_aligned_whatever_their_scale():
    """At any margin; and where neither loss is 0, no length of a vector matters."""
    torch.manual_seed(0)
    f, z = torch.randn(2, 3, 6, 4, 4)
    scales = 0.1 + 9 * torch.rand(3, 1, 4, 4)
    for loss in (marginal_cosine, marginal_distances):
        assert float(loss(scales * f, f, 0.0)) < 1e-6
        torch.testing.assert_close(loss(scales * z, 100 * f), loss(z, f))
        assert loss(z, f) > 0.01


def test_within_the_margins_nothing_pulls():
    """And beyond them the loss is what is beyond."""
    f = torch.tensor([1.0, 0.0]).view(1, 2, 1, 1)
    for degrees, pulled in ((59, 0.0), (61, 0.5 - 0.48480962), (180, 1.5)):
        angle = torch.tensor(degrees).deg2rad()
        z = torch.stack([angle.cos(), angle.sin()]).view(1, 2, 1, 1).requires_grad_()
        loss = marginal_cosine(z, f)
        assert float(loss.detach()) == pytest.approx(pulled, abs=1e-6)
        loss.backward()
        assert (z.grad.norm() > 1e-3) == (degrees == 61)
    f = torch.eye(2).view(1, 2, 1, 2)  # two positions that are not alike at all
    for cosine, pulled in ((0.24, 0.0), (0.26, 0.01), (-0.45, 0.2)):
        z = torch.tensor([[1.0, cosine], [0.0, (1 - cosine**2) ** 0.5]]).view(1, 2, 1, 2)
        assert float(marginal_distances(z, f)) == pytest.approx(2 * pulled / 4, abs=1e-6)


def test_pairs_are_of_one_image():
    """The loss of a batch is the mean of its images', and latents need not be as long as features."""
    torch.manual_seed(0)
    z, f = torch.randn(4, 3, 2, 2), torch.randn(4, 9, 2, 2)
    single = torch.stack([marginal_distances(z[i : i + 1], f[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(marginal_distances(z, f), single.mean())


# --------------------------------------------------------------------------------------------------------- the features


@pytest.mark.parametrize(
    ("name", "size", "grid", "seen"),
    [("test_vit", 64, 8, 128), ("test_vit", 32, 1, 32), ("test_convnext", 32, 4, 32), ("test_efficientnet", 32, 8, 32)],
)
def test_features_are_the_model_s_own_of_an_image_of_its_size(files, name, size, grid, seen):
    """Behind its norm, of pixels normalised as it was trained; a patch, or a mean of patches, for every cell."""
    model = timm.create_model(name, num_classes=0, **({"img_size": seen} if name == "test_vit" else {})).eval()
    published = timm.create_model(name)
    published.load_state_dict(alignment.read(str(files[name])))
    timm_encoder.load(model, published.state_dict(), name)
    x = torch.rand(2, 3, size, size)
    shown = F.interpolate(x, (seen, seen), mode="bicubic", antialias=True) if seen != size else x
    mean, std = (torch.tensor(model.pretrained_cfg[key])[:, None, None] for key in ("mean", "std"))
    shown = (shown - mean) / std
    if name == "test_vit":
        tokens = model.forward_features(shown)[:, model.num_prefix_tokens :]
        expected = tokens.mT.unflatten(2, (seen // 16, seen // 16))
    else:
        maps = model.forward_intermediates(shown, norm=True, intermediates_only=True)
        expected = next(found for found in reversed(maps) if found.shape[-1] == grid)
    found = made(files, name, size, grid)
    assert found(x * 2 - 1).shape == (2, found.channels, grid, grid)
    torch.testing.assert_close(found(x * 2 - 1), F.adaptive_avg_pool2d(expected, grid), rtol=1e-4, atol=1e-5)


def test_patches_of_14_pixels_make_any_grid(monkeypatch):
    """As those of DINOv2: images are enlarged to 14 pixels a cell."""
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *given, **options: create(*given, **options, patch_size=14))
    state = timm.create_model("vit_tiny_patch16_224", img_size=518).state_dict()
    found = timm_encoder.Features("vit_tiny_patch16_224", 64, 8, state)
    assert found.image_size == 8 * 14
    assert found(torch.zeros(1, 3, 64, 64)).shape == (1, 192, 8, 8)


@pytest.mark.parametrize("name", MODELS)
def test_features_of_an_image_are_its_own_and_nothing_moves_them(files, name):
    """Neither other images of its batch nor a gradient; BatchNorm's statistics stay."""
    features, x = made(files, name), torch.rand(4, 3, 32, 32) * 2 - 1
    before = {key: value.clone() for key, value in features.state_dict().items()}
    x.requires_grad_()
    together = features(x)
    assert not together.requires_grad
    assert not any(parameter.requires_grad for parameter in features.parameters())
    torch.testing.assert_close(together[:1], features(x[:1]), rtol=1e-4, atol=1e-5)
    assert same(before, features.state_dict())


def test_weights_come_from_either_kind_of_file(files, tmp_path):
    state = alignment.read(str(files["test_vit"]))
    torch.save(state, tmp_path / "weights.pth")
    assert same(alignment.read(str(tmp_path / "weights.pth")), state)
    found = alignment.features("test_vit", str(tmp_path / "weights.pth"), 64, 4).model.state_dict()
    for key in ("blocks.0.mlp.fc1.weight", "norm.weight", "patch_embed.proj.weight"):
        assert torch.equal(found[key], state[key]), key


class Unsafe:
    """What a pickle may hold besides tensors."""


def test_files_that_do_not_help_are_one_sentence(files, tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"nonsense")
    (tmp_path / "b.pth").write_bytes(b"nonsense")
    (tmp_path / "empty.pth").touch()
    torch.save({"weight": Unsafe()}, tmp_path / "unsafe.pth")
    torch.save(torch.zeros(3), tmp_path / "tensor.pth")
    torch.save({"norm.weight": 3}, tmp_path / "number.pth")
    os.mkfifo(tmp_path / "pipe.pth")  # which nobody waits for
    for name, sentence in {
        **dict.fromkeys(("", "pipe.pth"), "is not a file; name one with weights of the alignment_model"),
        "none.pth": "cannot be read .*name a file with weights of the alignment_model, or leave it out",
        **dict.fromkeys(("a.safetensors", "b.pth", "empty.pth", "unsafe.pth", "tensor.pth"), "holds no weights"),
        "number.pth": "these are no weights of timm's test_vit",
    }.items():
        with pytest.raises(UserError, match=sentence) as told:
            alignment.features("test_vit", str(tmp_path / name), 32, 4)
        assert "\n" not in str(told.value)
        assert str(tmp_path / name) in str(told.value)
    for name in ("test_convnext", "test_efficientnet"):
        with pytest.raises(UserError, match=r"these are no weights of timm's test_vit \(cls_token is missing\)"):
            alignment.features("test_vit", str(files[name]), 32, 4)
    with pytest.raises(UserError, match=r"these are no weights of timm's vit_tiny_patch16_224 \(.*\)"):
        alignment.features("vit_tiny_patch16_224", str(files["test_vit"]), 32, 4)


def test_without_a_file_the_weights_are_timm_s_own(files, monkeypatch):
    published = alignment.read(str(files["test_vit"]))
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", lambda *_, **__: dict(published))
    found = alignment.features("test_vit", "", 64, 4)
    assert same(found.state_dict(), made(files, "test_vit", 64, 4).state_dict())

    def offline(*_, **__):
        raise OSError("no network,\nand nothing in the cache")

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", offline)
    with pytest.raises(UserError, match=r"^timm's weights of test_vit could not be loaded.*: --alignment-file$"):
        alignment.features("test_vit", "", 64, 4)


# ---------------------------------------------------------------------------------------------------------- in training


def test_without_weight_it_leaves_no_trace(watch, aligned, monkeypatch):
    """Nothing is drawn, logged, kept or asked for; and the tokenizer starts as it does with it."""
    seen = watch.train(aligned, "seen")
    plain = watch.train(replace(aligned, alignment_weight=0.0, alignment_file=""), "plain")
    start = [tensor for tensor in seen.steps[0].before if tensor.shape != (64, 4, 1, 1)]  # but for the linear map
    assert same(start, plain.steps[0].before)
    assert checkpoint(seen.folder).keys() == checkpoint(plain.folder).keys() | {"alignment"}
    assert seen.rows[0].keys() == plain.rows[0].keys() | {"alignment"}
    assert seen.rows[0]["reconstruction"] == plain.rows[0]["reconstruction"]
    assert seen.weights.keys() == plain.weights.keys()
    assert not same(seen.weights, plain.weights)
    monkeypatch.setattr(module, "features", None)
    off = watch.train(replace(aligned, alignment_weight=0.0), "off")
    assert same(off.weights, plain.weights)
    assert off.rows == plain.rows


def test_resume_is_bit_exact(watch, aligned):
    """The linear map is in the checkpoint, with its moments, and the frozen model is not."""
    whole = watch.train(aligned, "whole")
    for stop in (1, 7):
        with pytest.raises(Crash):
            watch.train(aligned, "parts", crash_at=stop)
    parts = watch.train(aligned, "parts")
    assert same(parts.weights, whole.weights)
    assert same(checkpoint(parts.folder), checkpoint(whole.folder))
    assert parts.rows == whole.rows
    assert {key: value.shape for key, value in checkpoint(whole.folder)["alignment"].items()} == {
        "weight": (64, 4, 1, 1)
    }


@pytest.mark.parametrize("quantizer", ["ema", "gumbel", "kl"])
def test_the_loss_is_of_what_the_decoder_gets_and_reaches_encoder_and_linear_map_alone(aligned, images, quantizer):
    """Its gradient is alignment_weight times that of the loss written out; it is logged unweighted."""
    config = replace(aligned, quantizer=quantizer, grad_clip=0.0)
    rows, gradients, kept = {}, {}, []
    for weight in (0.5, 1.0, 2.0):
        learner = module.TokenizerLearner(replace(config, alignment_weight=weight), images.train)
        learner.begin()
        learner.model.decoder.register_forward_pre_hook(lambda _, given: kept.append(given[0]))
        frozen = {key: value.clone() for key, value in learner.features.state_dict().items()}
        linear = learner.linear.weight.detach().clone()
        torch.manual_seed(3)
        rows[weight] = learner.step(0, 1e-3)
        named = [*learner.model.named_parameters(), ("linear", learner.linear.weight)]
        gradients[weight] = {name: p.grad.clone() for name, p in named if p.grad is not None}
        assert same(frozen, learner.features.state_dict())
        assert not torch.equal(linear, learner.linear.weight)
    x = batch(images.train, config.seed, 0, config.batch_size, config.augment, "cpu")
    z_q, f = kept[-1].detach(), learner.features(x)
    expected = marginal_cosine(F.conv2d(z_q, linear), f) + marginal_distances(z_q, f)
    for row in rows.values():
        torch.testing.assert_close(row["alignment"].detach(), expected)
    moved = set()
    for name in gradients[1.0]:
        small, middle, large = (gradients[weight][name] for weight in (0.5, 1.0, 2.0))
        torch.testing.assert_close(large - middle, 2 * (middle - small), rtol=1e-3, atol=1e-5)
        if (middle - small).abs().max() > 1e-6:
            moved.add(name.partition(".")[0])
    assert {"encoder", "linear"} <= moved
    assert "decoder" not in moved


def test_alignment_brings_the_latent_near_to_the_features(watch, aligned):
    """On images that it trains on, of whose loss a tokenizer that is not aligned leaves more."""
    watch.images = watch.images[[0, 30]]
    config = replace(aligned, quantizer="none", steps=60, batch_size=2, augment="none", lr=1e-2, weight_ema=0.0)
    rows = watch.train(replace(config, alignment_weight=3.0), checkpoint_seconds=1e9).rows
    assert rows[-1]["alignment"] < 0.3 * rows[0]["alignment"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_features_are_computed_in_the_precision_asked_for_and_compared_in_float32(
    aligned, files, images, precision, monkeypatch
):
    cast, dtypes = [], set()

    def spied(z, f):
        dtypes.update({z.dtype, f.dtype})
        return marginal_cosine(z, f)

    monkeypatch.setattr(module, "marginal_cosine", spied)
    convolutions = {"alignment_model": "test_efficientnet", "alignment_file": str(files["test_efficientnet"])}
    learner = module.TokenizerLearner(replace(aligned, precision=precision, **convolutions), images.train)
    learner.features.register_forward_hook(lambda *_: cast.append(torch.is_autocast_enabled("cpu")))
    learner.step(0, 1e-3)
    assert cast == [precision == "bf16"]
    assert dtypes == {torch.float32}


def test_clipping_and_decay_know_the_linear_map(watch, aligned):
    """It is trained by the tokenizer's own optimizer, as one more layer."""
    free = watch.train(replace(aligned, grad_clip=0.0), "free")
    assert len(free.optimisers) == 1
    shapes = [tensor.shape for tensor in free.steps[0].before]
    assert shapes.index((64, 4, 1, 1)) < free.steps[0].sizes[0]  # among those that decay
    norm = free.steps[0].norm()
    assert free.rows[0]["grad_norm"] == pytest.approx(norm, rel=1e-4)
    clipped = watch.train(replace(aligned, grad_clip=norm / 3), "clipped")
    assert clipped.steps[0].norm() == pytest.approx(norm / 3, rel=1e-4)


# ------------------------------------------------------------------------------------------------------------- identity


def test_a_run_is_known_by_what_is_in_the_file(aligned, files, tmp_path):
    """Wherever it lies; other weights are another run, also under the same name, and none another still."""
    elsewhere = tmp_path / "copy.safetensors"
    shutil.copy(files["test_vit"], elsewhere)
    moved = replace(aligned, alignment_file=str(elsewhere))
    assert moved.run_id() == aligned.run_id() == aligned.stored().run_id()
    assert str(files["test_vit"].parent) not in str(aligned.stored())
    assert aligned.stored().alignment_file == alignment.content(str(elsewhere))
    shutil.copy(files["test_efficientnet"], elsewhere)
    assert len({moved.run_id(), aligned.run_id(), replace(aligned, alignment_file="").run_id()}) == 3
    elsewhere.unlink()
    with pytest.raises(UserError, match=r"alignment_file .*copy.safetensors cannot be read"):
        moved.run_id()


def test_an_unknown_model_is_refused_where_it_is_used(aligned):
    with pytest.raises(UserError, match="alignment_model is test_vut, and alignment_weight is 0; give that too"):
        replace(aligned, alignment_weight=0.0, alignment_file="", alignment_model="test_vut").check()
    with pytest.raises(UserError, match="unknown timm model 'test_vut'; did you mean test_vit"):
        replace(aligned, alignment_model="test_vut").check()


def test_a_finished_run_is_known_again_and_gives_its_tokenizer_without_the_file(
    trial_data, aligned, files, tmp_path, monkeypatch
):
    """Its files name the weights by their content, and a wrong file is told before any training."""
    kept = tmp_path / "vit.safetensors"
    shutil.copy(files["test_convnext"], kept)
    config = replace(aligned, alignment_file=str(kept), steps=2)
    with pytest.raises(UserError, match="these are no weights of timm's test_vit"):
        run_trial(config, tmp_path / "results")
    assert not list((tmp_path / "results").glob("runs/*/config.json"))
    shutil.copy(files["test_vit"], kept)
    run = run_trial(config, tmp_path / "results")
    assert run.config()["alignment_file"] == alignment.content(str(kept))
    monkeypatch.setattr(trial, "train", None)
    again = run_trial(replace(config, alignment_file=str(files["test_vit"])), tmp_path / "results")
    assert again.folder == run.folder
    kept.unlink()
    monkeypatch.setattr(config_module, "check_model", None)
    assert Tokenizer.from_run(run.folder).config.alignment_weight == 0.5
