"""The training loop: repeatable, resumable to the bit, honest about divergence, and true to every setting."""

import ast
import math
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from bench.data import batch
from bench.metrics import perceptual
from bench.quantizers import QUANTIZERS
from bench.tokenizers import train as module
from bench.tokenizers.config import Config
from bench.tokenizers.tokenizer import Tokenizer
from bench.training.loop import parameter_groups
from tests.watched import Crash, checkpoint, rows, same

every = pytest.mark.parametrize("quantizer", QUANTIZERS)


@pytest.fixture
def tiny(tiny):
    """In the same arithmetic on every machine."""
    return replace(tiny, precision="fp32")


# ------------------------------------------------------------------------------------------------- repeat, resume, stop


@every
def test_same_seed_same_bits(watch, tiny, quantizer):
    config = replace(tiny, quantizer=quantizer, steps=6)
    first = watch.train(config, "a").weights
    torch.rand(7)  # what happened before must not matter
    assert same(first, watch.train(config, "b").weights)
    assert not same(first, watch.train(replace(config, seed=1), "c").weights)


@every
def test_resume_is_bit_exact(watch, tiny, quantizer):
    """Weights, optimiser, average, codebook statistics and every random draw, in the middle of an epoch, where it was
    stopped and nowhere else, and after every stop (bug 14)."""
    config = replace(tiny, quantizer=quantizer, augment="blog", weight_ema=0.3)
    config = replace(config, revive_after=1) if "revive_after" in QUANTIZERS[quantizer].settings else config
    whole = watch.train(config, "whole")
    for stop in (1, 5, 11):
        with pytest.raises(Crash):
            watch.train(config, "parts", crash_at=stop)
        assert checkpoint(watch.folder / "parts")["at"] == (stop, float(stop))
    parts = watch.train(config, "parts")
    assert len(parts.steps) == 1  # only what was missing
    assert same(parts.weights, whole.weights)
    assert same(checkpoint(parts.folder), checkpoint(whole.folder))
    assert parts.rows == whole.rows
    assert parts.seconds == whole.seconds == 12.0


# ----------------------------------------------------------------------------------------------- one step after another


def test_every_step_trains_on_its_own_batch(watch, tiny, toys):
    """Batch k of (seed, k), augmented as the config says: 12 batches of 8 are two epochs of 48 images."""
    config = replace(tiny, seed=3)
    for augment in ("flip", "none", "blog"):
        watch.train(replace(config, augment=augment), augment)
        seen = [x for x, *_ in toys[-1].seen]
        expected = [batch(watch.images, 3, step, 8, augment, "cpu") for step in range(12)]
        assert all(torch.equal(a, b) for a, b in zip(seen, expected, strict=True))
    assert not torch.equal(seen[0], seen[6])


def test_without_augmentation_an_epoch_is_every_image_once(watch, tiny, toys):
    watch.train(replace(tiny, augment="none"))
    pixels = [image.tobytes() for x, *_ in toys[-1].seen[:6] for image in x.contiguous().numpy()]
    photos = (torch.from_numpy(watch.images).permute(0, 3, 1, 2).float() / 127.5 - 1).contiguous().numpy()
    assert sorted(pixels) == sorted(photo.tobytes() for photo in photos)


def test_gradients_are_those_of_the_step_s_own_loss(watch, tiny, toys):
    """Of mean squared or absolute error between colour and image, in closed form. Colours beyond [-1, 1] have one,
    what was accumulated before is gone, and norms above 1 are not clipped by 0."""
    for name, derivative in (("l2", lambda error: 2 * error), ("l1", torch.sign)):
        trained = watch.train(replace(tiny, reconstruction=name, grad_clip=0.0), name)
        for step, (x, x_hat, *_) in zip(trained.steps, toys[-1].seen, strict=True):
            colour = next(g for g in step.gradients if g.shape == (1, 3, 1, 1))
            expected = derivative(x_hat - x).mean((0, 2, 3)) / 3
            torch.testing.assert_close(colour.flatten(), expected)
            assert (colour.flatten()[[0, 2]].sign() == torch.tensor([-1, 1])).all()  # at -3 and 3
        assert trained.steps[0].norm() > 1 or name == "l1"


def test_the_quantizer_s_loss_is_added_once_whatever_its_gradient(watch, tiny, toys):
    trained = watch.train(replace(tiny, grad_clip=0.0))
    pulls = [gradient.item() for step in trained.steps for gradient in step.gradients if gradient.shape == (1, 1)]
    assert pulls == [1.0] * 12


def test_terms_are_logged_unweighted(watch, tiny, toys):
    for name, loss in (("l2", lambda a, b: (a - b).square()), ("l1", lambda a, b: (a - b).abs())):
        trained = watch.train(replace(tiny, reconstruction=name), name)
        for row, (x, x_hat, quantized, _) in zip(trained.rows, toys[-1].seen, strict=True):
            assert row["reconstruction"] == pytest.approx(float(loss(x_hat, x).mean()), rel=1e-5)
            assert row["quantizer"] == pytest.approx(float(quantized.loss.detach()), rel=1e-5)
            assert row["distortion"] == pytest.approx(float(quantized.distortion), rel=1e-5)


def test_the_weight_of_the_pixel_loss_scales_its_gradient_alone(watch, tiny, toys):
    """Linearly from its first value to its last over the steps; logged unweighted."""
    config = replace(tiny, steps=3, grad_clip=0.0, lpips_weight=0.0, lr=1e-9)
    for name, weights in (("constant", (2.0, None)), ("rising", (1.0, 3.0)), ("ending", (1.0, 0.0))):
        first, last = weights
        trained = watch.train(replace(config, reconstruction_weight=first, reconstruction_end=last), name)
        expected = np.linspace(first, first if last is None else last, 3)
        for weight, step, row, (x, *_) in zip(expected, trained.steps, trained.rows, toys[-1].seen, strict=True):
            colour = torch.tensor([-3.0, 0.0, 3.0]).view(1, 3, 1, 1).requires_grad_()
            loss = F.mse_loss(colour.expand_as(x), x)
            loss.backward()
            found = next(gradient for gradient in step.gradients if gradient.shape == (1, 3, 1, 1))
            torch.testing.assert_close(found, weight * colour.grad, rtol=1e-4, atol=1e-6, check_dtype=False)
            assert row["reconstruction"] == pytest.approx(float(loss.detach()), rel=1e-4)


def test_schedules_follow_the_share_of_the_steps_that_is_done(watch, tiny, toys):
    watch.train(replace(tiny, steps=4))
    assert toys[-1].quantizer.annealed == [0.0, 0.25, 0.5, 0.75]


@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_the_perceptual_loss_is_lpips_of_images_in_its_range(watch, tiny, toys, net):
    """Logged as it is and added by its weight: the gradient at the colour is that of the sum, in [-1, 1]."""
    config = replace(tiny, lpips_weight=3.0, lpips_net=net, grad_clip=0.0, batch_size=2, steps=1)
    (step,), (row,) = (trained := watch.train(config)).steps, trained.rows
    x, *_ = toys[-1].seen[0]
    colour = torch.tensor([-3.0, 0.0, 3.0]).view(1, 3, 1, 1).requires_grad_()
    distance = perceptual(net, torch.device("cpu"))(colour.expand_as(x), x).mean()
    assert row["lpips"] == pytest.approx(float(distance.detach()), rel=1e-4)
    (F.mse_loss(colour.expand_as(x), x) + 3.0 * distance).backward()
    found = next(gradient for gradient in step.gradients if gradient.shape == (1, 3, 1, 1))
    torch.testing.assert_close(found, colour.grad, rtol=1e-3, atol=1e-5)


def test_without_weight_there_is_no_perceptual_loss(watch, tiny, toys, monkeypatch):
    monkeypatch.setattr(module, "perceptual", None)
    assert "lpips" not in watch.train(replace(tiny, steps=1)).rows[0]


def test_weight_decay_shrinks_matrices_by_rate_times_decay(watch, tiny, toys):
    """And nothing else that has no gradient."""
    for decay in (0.0, 0.5):
        trained = watch.train(replace(tiny, lr=0.1, weight_decay=decay), f"{decay}")
        for step in trained.steps:
            for before, after in zip(step.before, step.after, strict=True):
                if before.shape == (2, 2):
                    torch.testing.assert_close(after, before * (1 - step.rates[0] * decay))
                if before.shape == (2,):
                    assert torch.equal(after, torch.ones(2))


def test_grad_clip_bounds_the_norm_of_all_gradients_together(watch, tiny):
    """The log has the norm before; 0 does not clip; what is below the bound stays as it is."""
    free = watch.train(replace(tiny, grad_clip=0.0), "free")
    norms = [step.norm() for step in free.steps]
    assert [row["grad_norm"] for row in free.rows] == pytest.approx(norms, rel=1e-4)
    bound = norms[0] / 3
    clipped = watch.train(replace(tiny, grad_clip=bound), "clipped")
    assert clipped.rows[0]["grad_norm"] == pytest.approx(norms[0], rel=1e-4)
    for step, row in zip(clipped.steps, clipped.rows, strict=True):
        assert step.norm() == pytest.approx(min(row["grad_norm"], bound), rel=1e-4)
    for gradient, whole in zip(clipped.steps[0].gradients, free.steps[0].gradients, strict=True):
        torch.testing.assert_close(gradient, whole / 3, rtol=1e-4, atol=1e-9)  # the direction stays
    loose = watch.train(replace(tiny, grad_clip=1e9), "loose")
    assert same(loose.weights, free.weights)


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_precision_is_that_of_encoder_and_decoder_from_the_first_codes_on(watch, tiny, monkeypatch, precision, dtype):
    """Losses are float32 all the same."""
    found = set()

    class Spied(Tokenizer):
        def __init__(self, config):
            super().__init__(config)
            for part in (self.encoder, self.decoder):
                part.register_forward_hook(lambda part, x, y: found.add(y.dtype))

    compared = []
    loss = lambda x_hat, x: compared.append((x_hat.dtype, x.dtype)) or F.mse_loss(x_hat, x)  # noqa: E731
    monkeypatch.setattr(module, "Tokenizer", Spied)
    monkeypatch.setitem(module.RECONSTRUCTION, "l2", loss)
    watch.train(replace(tiny, precision=precision, steps=1))
    assert found == {dtype}
    assert compared == [(torch.float32, torch.float32)]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_networks_run_in_the_precision_asked_for_and_losses_in_float32(tiny, images, monkeypatch, precision):
    """The networks that judge reconstructions, too; pixels are compared at full precision."""
    cast, dtypes = [], set()

    def l2(x_hat, x):
        dtypes.update({x_hat.dtype, x.dtype})
        return F.mse_loss(x_hat, x)

    def look(*given):
        cast.append(torch.is_autocast_enabled("cpu"))

    monkeypatch.setitem(module.RECONSTRUCTION, "l2", l2)
    shares = {"gan_weight": 0.1, "gan_start": 0.0, "gan_warmup": 0.0, "gan_width": 8, "gan_layers": 1}
    learner = module.TokenizerLearner(replace(tiny, **shares, precision=precision).resolved(), images.train)
    learner.lpips = lambda x_hat, x: look() or (x_hat - x).square()
    learner.adversary.discriminator.register_forward_hook(look)
    learner.step(0, 1e-3)
    assert cast == [precision == "bf16"] * 4  # LPIPS, and the discriminator on reconstructions, on real images, again
    assert dtypes == {torch.float32}


def test_the_codebook_s_start_keeps_no_graph(tiny, images):
    tokenizer, given = module.Tokenizer(tiny.resolved()), []
    tokenizer.quantizer.initialise = given.append
    module.initialise_codebook(tokenizer, images.train, torch.autocast("cpu", enabled=False))
    assert [z.requires_grad for z in given] == [False]


def test_images_and_model_are_sent_to_the_device(watch, tiny, toys, monkeypatch):
    sent = []
    monkeypatch.setattr(module, "batch", lambda *arguments: sent.append(arguments[5]) or batch(*arguments))
    monkeypatch.setattr(module, "to_device", lambda part, device: sent.append(device) or part)
    watch.train(replace(tiny, device="cpu:0", steps=2, gan_weight=0.5))
    assert len(sent) >= 5  # tokenizer, discriminator, the first codes' batches, two steps'
    assert set(sent) == {"cpu:0"}


# ------------------------------------------------------------------------------------------------------------- the log


def entropy_exp(codes: list[torch.Tensor]) -> float:
    """Perplexity, by numpy."""
    counts = np.unique(torch.cat([each.flatten() for each in codes]).numpy(), return_counts=True)[1]
    shares = counts / counts.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def test_a_row_stands_for_all_steps_since_the_last(watch, tiny, toys):
    """Means of every term, and perplexity and codes in use over all codes together (bug 9)."""
    config = replace(tiny, steps=600, codebook_size=64, batch_size=1, grad_clip=0.0)  # a row every three steps
    with pytest.raises(Crash):
        watch.train(config, crash_at=9)
    seen, found = toys[-1].seen, rows(watch.folder / "run")
    assert [row["step"] for row in found] == [3, 6, 9]
    for row in found:
        window = seen[row["step"] - 3 : row["step"]]
        codes = [quantized.codes for _, _, quantized, _ in window]
        assert row["perplexity"] == pytest.approx(entropy_exp(codes))
        assert row["perplexity"] > max(entropy_exp([each]) for each in codes)
        assert row["codes_used"] == len(torch.cat(codes).unique())
        errors = [float(F.mse_loss(x_hat, x)) for x, x_hat, *_ in window]
        assert row["reconstruction"] == pytest.approx(sum(errors) / 3, rel=1e-5)
        distortions = [float(quantized.distortion) for _, _, quantized, _ in window]
        assert row["distortion"] == pytest.approx(sum(distortions) / 3, rel=1e-5)


def test_figures_of_the_bar(tiny, images):
    learner = module.TokenizerLearner(replace(tiny, codebook_size=512), images.train)
    row = {"reconstruction": 0.12345, "perplexity": 209.6, "codes_used": 300}
    assert learner.figures(row) == "loss 0.1235  perplexity 210  codes 300/512"
    assert "loss 0.1235  lpips 0.457  perplexity" in learner.figures(row | {"lpips": 0.4567})


# -------------------------------------------------------------------------------------------------------- what is built


def test_the_codebook_starts_at_codes_of_enough_training_images(watch, tiny, toys):
    """Not augmented, no image twice, eight tokens for every code, or one batch at least, or all there are."""
    photos = {image.tobytes() for image in (torch.from_numpy(watch.images).permute(0, 3, 1, 2).float() / 127.5 - 1)
              .contiguous().numpy()}  # fmt: skip
    for codebook_size, count in ((2, 8), (16, 8), (17, 16), (64, 32), (512, 48)):
        watch.train(replace(tiny, codebook_size=codebook_size, augment="blog", steps=1), f"{codebook_size}")
        (given,) = toys[-1].quantizer.given
        found = {image.tobytes() for image in given.contiguous().numpy()}
        assert len(given) == len(found) == count
        assert found <= photos


@pytest.mark.parametrize("seed", [0, 3])
def test_the_codebook_starts_at_the_images_that_its_seed_trains_on_first(watch, tiny, toys, seed):
    """Repetitions of a run that began at the same images would differ by less than chance makes them."""
    watch.train(replace(tiny, codebook_size=64, augment="none", seed=seed, steps=1))
    (given,) = toys[-1].quantizer.given
    expected = [batch(watch.images, seed, step, 8, "none", "cpu") for step in range(4)]
    assert torch.equal(given, torch.cat(expected))
    assert torch.equal(given[:8], toys[-1].seen[0][0])


@pytest.mark.parametrize("quantizer", ["standard", "ema"])
def test_first_codes_are_outputs_of_the_encoder(watch, tiny, quantizer):
    """Of images in the range and order of training, without augmentation."""
    config = replace(tiny, quantizer=quantizer).resolved()
    torch.manual_seed(0)
    tokenizer = Tokenizer(config)
    codebook = tokenizer.quantizer.codebook.detach().clone()
    with torch.no_grad():
        tokens = tokenizer.encoder(batch(watch.images, 0, 0, 8, "none", "cpu")).movedim(1, -1).reshape(-1, 4)
    module.initialise_codebook(tokenizer, watch.images, torch.autocast("cpu", torch.bfloat16, enabled=False))
    found = tokenizer.quantizer.codebook.detach()
    assert not torch.equal(found, codebook)
    assert (found[:, None] - tokens).abs().amax(-1).amin(1).max() < 1e-5
    assert len(found.unique(dim=0)) == 16


@pytest.mark.parametrize("backbone", ["cnn", "vit", "bimamba"])
def test_weight_decay_spares_what_is_no_weight(tiny, backbone):
    tokenizer = Tokenizer(replace(tiny, backbone=backbone, quantizer="l2"))
    groups = parameter_groups(tokenizer, 0.1)
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    decayed, free = (set(map(id, group["params"])) for group in groups)
    for name, parameter in tokenizer.named_parameters():
        spared = parameter.ndim < 2 or name.split(".")[-1] in ("codebook", "position", "A_log", "D", "dt_bias")
        assert (id(parameter) in free) == spared, name
        assert (id(parameter) in decayed) != spared, name


@every
def test_two_images_are_learned_by_heart(watch, tiny, quantizer):
    """With any quantizer the loss ends far below where it began; 0.1 to 0.22 of it here."""
    watch.images = watch.images[[0, 30]]
    size = {"batch_size": 2, "codebook_size": 64, "augment": "none", "lr": 1e-2, "weight_ema": 0.0}
    trained = watch.train(replace(tiny, quantizer=quantizer, steps=60, **size), checkpoint_seconds=math.inf)
    losses = [row["reconstruction"] for row in trained.rows]
    assert losses[-1] < 0.4 * losses[0]


# -------------------------------------------------------------------------------------------------------- every setting


def test_beta_scales_the_commitment_alone(watch, tiny):
    """The first step's loss is β times the distortion; nothing else of that step knows β (bugs 1 and 2)."""
    for beta in (0.25, 0.5):
        (row,) = watch.train(replace(tiny, beta=beta, steps=1), f"{beta}").rows
        assert row["quantizer"] == pytest.approx(beta * row["distortion"], rel=1e-4)
    assert same(*[{k: row[k] for k in ("reconstruction", "distortion")} for row in
                  (rows(watch.folder / name)[0] for name in ("0.25", "0.5"))])  # fmt: skip


def encoder_and_decoder(trained):
    """Gradients of the first step, as one vector for either side."""
    names = [name for name, _ in trained.tokenizer.named_parameters()]
    order = parameter_groups(trained.tokenizer, 0.0)
    parameters = [id(parameter) for group in order for parameter in group["params"]]
    by_id = {id(parameter): name for name, parameter in trained.tokenizer.named_parameters()}
    assert len(names) == len(parameters)
    sides = {"encoder": [], "decoder": [], "quantizer": []}
    for key, gradient in zip(parameters, trained.steps[0].gradients, strict=True):
        sides[by_id[key].partition(".")[0]].append(gradient.flatten())
    return torch.cat(sides["encoder"]), torch.cat(sides["decoder"])


@pytest.mark.parametrize(
    ("setting", "values"), [("gradient", ("straight_through", "rotation")), ("temperature", (1.0, 0.5))]
)
def test_gradient_and_temperature_change_the_encoder_s_gradient_alone(watch, tiny, setting, values):
    """The forward pass, and with it the decoder's gradient, knows nothing of them."""
    config = replace(tiny, quantizer="gumbel" if setting == "temperature" else "ema", steps=1, grad_clip=0.0)
    first, second = (watch.train(replace(config, **{setting: value}), f"{value}") for value in values)
    for name in ("reconstruction", "quantizer", "distortion"):
        assert first.rows[0][name] == pytest.approx(second.rows[0][name], rel=1e-5)
    (encoder, decoder), (other_encoder, other_decoder) = map(encoder_and_decoder, (first, second))
    torch.testing.assert_close(decoder, other_decoder, rtol=1e-3, atol=1e-6)
    assert (encoder - other_encoder).norm() > 1e-3 * encoder.norm()


def test_ema_decay_sets_what_remains_of_the_running_sums(watch, tiny):
    """After one step the sizes sum up to γK + (1 − γ)N, for K that start at 1 and N tokens."""
    for decay in (0.9, 0.5):
        trained = watch.train(replace(tiny, ema_decay=decay, steps=1), f"{decay}")
        total = float(trained.tokenizer.quantizer.cluster_size.sum())
        assert total == pytest.approx(decay * 16 + (1 - decay) * 8 * 16, rel=1e-5)


def test_kmeans_init_starts_nearer_to_the_tokens(watch, tiny):
    """Lloyd's algorithm goes on from the random codes and never gets worse."""
    config = replace(tiny, steps=1, augment="none")
    random, centroids = (watch.train(replace(config, kmeans_init=on), f"{on}").rows[0] for on in (False, True))
    assert centroids["distortion"] < random["distortion"]


def test_entropy_weight_scales_the_penalty(watch, tiny):
    config = replace(tiny, quantizer="standard", steps=1)
    plain, once, twice = (
        watch.train(replace(config, entropy_weight=weight), f"{weight}").rows[0]["quantizer"]
        for weight in (0, 0.1, 0.2)
    )
    assert once < plain  # the penalty is negative
    assert twice - plain == pytest.approx(2 * (once - plain), rel=1e-4)


def test_codes_are_reset_after_revive_after_and_never_with_0(watch, tiny):
    """In ``standard`` a code that no token chose has no gradient and no decay: it can only move by a reset. 128 tokens
    a step are half an equal share for 256 codes: with 1, none is idle for longer than two steps."""
    config = replace(tiny, quantizer="standard", codebook_size=256, weight_ema=0.0)
    first = watch.train(replace(config, steps=1, lr=1e-12, revive_after=0), "first").tokenizer.quantizer.codebook
    never = watch.train(replace(config, revive_after=0), "never").tokenizer.quantizer
    unused = never.idle == 12 * 128
    assert unused.any()
    torch.testing.assert_close(never.codebook[unused], first[unused], rtol=0, atol=1e-9)
    soon = watch.train(replace(config, revive_after=1), "soon").tokenizer.quantizer
    assert soon.idle.max() <= 256
    assert not torch.isclose(soon.codebook[unused], first[unused], rtol=0, atol=1e-9).all(1).any()


def test_steps_batch_size_and_seed_are_those_of_the_run(watch, tiny, toys):
    trained = watch.train(replace(tiny, steps=5, batch_size=3, seed=2))
    assert [len(x) for x, *_ in toys[-1].seen] == [3] * 5
    assert trained.rows[-1]["step"] == 5
    assert torch.equal(toys[-1].seen[4][0], batch(watch.images, 2, 4, 3, "flip", "cpu"))


@pytest.mark.parametrize("seed", [0, 1])
def test_first_weights_follow_from_the_seed(watch, tiny, seed):
    torch.manual_seed(seed)
    expected = Tokenizer(tiny.resolved())
    first = watch.train(replace(tiny, seed=seed, steps=1)).steps[0].before
    drawn = [parameter for group in parameter_groups(expected, 0.0) for parameter in group["params"]]
    assert all(torch.equal(a, b) for a, b in zip(first, drawn, strict=True))


# A value for each setting that is not the one of ``tiny``.
CHANGES = {
    "backbone": "convnext",
    "width": 24,
    "depth": 2,
    "patch_overlap": True,
    "final_conv": True,
    "attention": 1,
    "token_order": "columns",
    "two_streams": True,
    "vision_mixer": True,
    "rotary": True,
    "rms_norm": True,
    "full_resolution": True,
    "pretrained": None,  # checked in test_backbones
    "quantizer": "l2",
    "image_size": None,  # the data's; checked below
    "grid_size": 8,
    "codebook_size": 17,
    "code_dim": 5,
    "beta": 1.0,
    "ema_decay": 0.5,
    "kmeans_init": True,
    "entropy_weight": 0.1,
    "gradient": "rotation",
    "temperature": 0.5,
    "temperature_end": 0.1,
    "uniform_weight": 0.5,
    "codebooks": 3,
    "kl_weight": 0.5,
    "revive_after": 1,
    "reconstruction": "l1",
    "reconstruction_weight": 0.5,
    "reconstruction_end": 0.5,
    "lpips_weight": 0.5,
    "lpips_net": "vgg",
    **dict.fromkeys(("alignment_weight", "alignment_model", "alignment_file")),  # checked in test_alignment
    **dict.fromkeys(("init_from", "freeze")),  # checked in test_source
    "gan_weight": 1.0,
    "gan_start": 0.7,
    "gan_ramp": 0.9,
    "gan_warmup": 0.0,
    "gan_loss": "nonsaturating",
    "gan_adaptive": False,
    "gan_lr": 1.0,
    "gan_width": 4,
    "gan_layers": 1,
    "gan_norm": "spectral",
    "lecam_weight": 1.0,
    "r1_weight": 1.0,
    "steps": 11,
    "batch_size": 7,
    "lr": 1e-3,
    "warmup": 5,
    "weight_decay": 0.5,
    "grad_clip": 1e-3,
    "weight_ema": 0.1,
    "augment": "none",
    "precision": "bf16",
    "device": None,  # checked in test_config
    **dict.fromkeys(("data", "split", "train_images")),  # checked in test_trial
    "seed": 1,
}


# What each setting does, and in which direction: the tests that say so.
PROPERTIES = {
    "backbone": "tokenizers/test_tokenizer.py::test_the_parts_are_those_of_the_backbone",
    "width": "tokenizers/test_tokenizer.py::test_settings_of_the_backbone_reach_both_sides",
    "depth": "tokenizers/test_tokenizer.py::test_settings_of_the_backbone_reach_both_sides",
    "patch_overlap": "tokenizers/test_tokenizer.py::test_the_parts_are_those_of_the_backbone",
    "final_conv": "tokenizers/test_tokenizer.py::test_the_parts_are_those_of_the_backbone",
    "attention": "tokenizers/test_tokenizer.py::test_the_parts_are_those_of_the_backbone",
    "two_streams": "backbones/test_backbones.py::test_two_streams_are_the_published_block",
    "vision_mixer": "backbones/test_backbones.py::test_the_vision_mixer_is_the_published_one_with_our_scan",
    "rotary": "backbones/test_backbones.py::test_rotary_attention_is_the_published_one",
    "rms_norm": "backbones/test_backbones.py::test_rms_norm_neither_centres_nor_shifts",
    "full_resolution": "backbones/test_backbones.py::test_a_pyramid_at_full_resolution_has_blocks_there",
    "token_order": "backbones/test_orders.py::test_an_order_changes_what_a_scan_makes_of_the_same_weights",
    "pretrained": "tokenizers/test_tokenizer.py::test_settings_of_the_backbone_reach_both_sides",
    "quantizer": "tokenizers/test_tokenizer.py::test_settings_of_the_quantizer_reach_it",
    "data": "tokenizers/test_trial.py::test_data_and_image_size_reach_the_loader",
    "split": "tokenizers/test_trial.py::test_a_trial_trains_on_its_share_and_is_scored_on_its_split",
    "train_images": "tokenizers/test_trial.py::test_a_trial_trains_on_its_share_and_is_scored_on_its_split",
    "image_size": "tokenizers/test_train.py::test_image_size_changes_the_model",
    "grid_size": "tokenizers/test_tokenizer.py::test_codes_are_a_grid_of_integers",
    "codebook_size": "tokenizers/test_tokenizer.py::test_settings_of_the_quantizer_reach_it",
    "code_dim": "tokenizers/test_tokenizer.py::test_settings_of_the_quantizer_reach_it",
    "beta": "tokenizers/test_train.py::test_beta_scales_the_commitment_alone",
    "ema_decay": "tokenizers/test_train.py::test_ema_decay_sets_what_remains_of_the_running_sums",
    "kmeans_init": "tokenizers/test_train.py::test_kmeans_init_starts_nearer_to_the_tokens",
    "entropy_weight": "tokenizers/test_train.py::test_entropy_weight_scales_the_penalty",
    "gradient": "tokenizers/test_train.py::test_gradient_and_temperature_change_the_encoder_s_gradient_alone",
    "temperature": "tokenizers/test_train.py::test_gradient_and_temperature_change_the_encoder_s_gradient_alone",
    "temperature_end": "tokenizers/test_train.py::test_schedules_follow_the_share_of_the_steps_that_is_done",
    "uniform_weight": "quantizers/test_quantizers.py::test_gumbel_s_divergence_from_the_uniform_is_in_nats_per_token",
    "codebooks": "quantizers/test_quantizers.py::test_three_codebooks_write_one_code",
    "kl_weight": "quantizers/test_continuous.py::test_kl_weight_scales_the_divergence_alone",
    "revive_after": "tokenizers/test_train.py::test_codes_are_reset_after_revive_after_and_never_with_0",
    "reconstruction": "tokenizers/test_train.py::test_gradients_are_those_of_the_step_s_own_loss",
    "reconstruction_weight": "tokenizers/test_train.py::test_the_weight_of_the_pixel_loss_scales_its_gradient_alone",
    "reconstruction_end": "tokenizers/test_train.py::test_the_weight_of_the_pixel_loss_scales_its_gradient_alone",
    "lpips_weight": "tokenizers/test_train.py::test_the_perceptual_loss_is_lpips_of_images_in_its_range",
    "lpips_net": "tokenizers/test_train.py::test_the_perceptual_loss_is_lpips_of_images_in_its_range",
    "alignment_weight": "tokenizers/test_alignment.py::"
    "test_the_loss_is_of_what_the_decoder_gets_and_reaches_encoder_and_linear_map_alone",
    "alignment_model": "tokenizers/test_alignment.py::test_features_are_the_model_s_own_of_an_image_of_its_size",
    "alignment_file": "tokenizers/test_alignment.py::test_a_run_is_known_by_what_is_in_the_file",
    "init_from": "tokenizers/test_source.py::test_training_goes_on_from_the_weights_and_codes_of_the_source",
    "freeze": "tokenizers/test_source.py::test_what_is_frozen_is_equal_to_the_bit_afterwards",
    "gan_weight": "tokenizers/test_gan.py::test_gan_weight_and_ramp_scale_the_adversary_s_gradient_alone",
    "gan_start": "tokenizers/test_gan.py::test_gan_start_and_warmup_set_the_steps_at_which_things_begin",
    "gan_ramp": "tokenizers/test_gan.py::test_gan_weight_and_ramp_scale_the_adversary_s_gradient_alone",
    "gan_warmup": "tokenizers/test_gan.py::test_gan_start_and_warmup_set_the_steps_at_which_things_begin",
    "gan_loss": "tokenizers/test_gan.py::test_settings_of_the_discriminator_reach_it",
    "gan_adaptive": "tokenizers/test_gan.py::test_an_adaptive_adversary_pulls_as_hard_as_the_fidelity_does",
    "gan_lr": "tokenizers/test_gan.py::test_the_discriminator_is_updated_by_adamw_at_its_share_of_the_rate",
    "gan_width": "tokenizers/test_gan.py::test_settings_of_the_discriminator_reach_it",
    "gan_layers": "tokenizers/test_gan.py::test_settings_of_the_discriminator_reach_it",
    "gan_norm": "tokenizers/test_gan.py::test_settings_of_the_discriminator_reach_it",
    "lecam_weight": "tokenizers/test_gan.py::test_regularisers_scale_their_own_gradient_alone",
    "r1_weight": "tokenizers/test_gan.py::test_regularisers_scale_their_own_gradient_alone",
    "steps": "tokenizers/test_train.py::test_steps_batch_size_and_seed_are_those_of_the_run",
    "batch_size": "tokenizers/test_train.py::test_steps_batch_size_and_seed_are_those_of_the_run",
    "lr": "training/test_loop.py::test_the_applied_rate_warms_up_and_follows_the_cosine",
    "warmup": "training/test_loop.py::test_the_applied_rate_warms_up_and_follows_the_cosine",
    "weight_decay": "tokenizers/test_train.py::test_weight_decay_shrinks_matrices_by_rate_times_decay",
    "grad_clip": "tokenizers/test_train.py::test_grad_clip_bounds_the_norm_of_all_gradients_together",
    "weight_ema": "training/test_loop.py::test_only_the_average_s_weights_are_returned",
    "augment": "tokenizers/test_train.py::test_every_step_trains_on_its_own_batch",
    "precision": "tokenizers/test_train.py::test_precision_is_that_of_encoder_and_decoder_from_the_first_codes_on",
    "device": "tokenizers/test_train.py::test_images_and_model_are_sent_to_the_device",
    "seed": "tokenizers/test_train.py::test_first_weights_follow_from_the_seed",
}


def test_every_setting_is_in_both_tables_and_its_property_is_tested():
    """The tests that are named exist, under that name."""
    names = {field.name for field in fields(Config)}
    assert CHANGES.keys() == names, "another value of every setting belongs into CHANGES"
    assert PROPERTIES.keys() == names, "the test that says what a setting does belongs into PROPERTIES"
    folder = Path(__file__).parents[1]
    for file in {test.partition("::")[0] for test in PROPERTIES.values()}:
        tree = ast.parse((folder / file).read_text(encoding="utf-8"))
        there = {f"{file}::{part.name}" for part in tree.body if isinstance(part, ast.FunctionDef)}
        assert {test for test in PROPERTIES.values() if test.startswith(file)} <= there


@pytest.fixture(scope="module")
def known() -> dict[Config, dict[str, torch.Tensor]]:
    """Weights that a config gave, so that none is trained twice."""
    return {}


@pytest.mark.parametrize("name", [name for name, value in CHANGES.items() if value is not None])
def test_every_setting_changes_the_result(watch, tiny, known, name):
    """Flags that are parsed and never used (bug 16)."""
    base = replace(tiny, codebook_size=64 if name == "revive_after" else 16)
    if name == "codebooks":
        base = replace(base, quantizer="product")
    if name in ("temperature", "temperature_end", "uniform_weight"):
        base = replace(base, quantizer="gumbel")
    if name == "kl_weight":
        base = replace(base, quantizer="kl")
    if name == "lpips_net":
        base = replace(base, lpips_weight=0.5, steps=2)
    if name == "rms_norm":
        base = replace(base, backbone="convnext")
    if name in ("patch_overlap", "final_conv", "rotary"):
        base = replace(base, backbone="vit")
    if name in ("token_order", "two_streams"):
        base = replace(base, backbone="bimamba")
    if name == "vision_mixer":
        base = replace(base, backbone="hybrid")
    if name.startswith(("gan_", "lecam_", "r1_")):
        base = replace(base, gan_weight=0.5, gan_start=0.3, gan_warmup=0.2, gan_ramp=0.2, gan_width=8, gan_layers=2)
    changed = replace(base, **{name: CHANGES[name]})
    for config in {base, changed} - known.keys():
        known[config] = watch.train(config, config.run_id(), checkpoint_seconds=math.inf).weights
    a, b = known[base], known[changed]
    assert {k: v.shape for k, v in a.items()} != {k: v.shape for k, v in b.items()} or not same(a, b)


def test_image_size_changes_the_model(tiny):
    sizes = [
        Tokenizer(replace(tiny, image_size=size)).decode(torch.zeros(1, 4, 4, dtype=torch.int64)).shape
        for size in (32, 64)
    ]
    assert sizes == [(1, 3, 32, 32), (1, 3, 64, 64)]
