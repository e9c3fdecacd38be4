"""Runs that start from the weights of others: these and no others, frozen parts to the bit, and no path in an id."""

import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file

from bench.core import group
from bench.core.errors import UserError
from bench.core.files import read_json
from bench.core.runs import Run
from bench.core.store import Store
from bench.data import batch
from bench.metrics import psnr, to_uint8
from bench.quantizers import QUANTIZERS
from bench.run import RunArguments
from bench.run import main as run_main
from bench.sweeps.definition import Ablation, parse_study
from bench.sweeps.search import make_plan
from bench.tokenizers.arguments import parse
from bench.tokenizers.config import Config, make_config
from bench.tokenizers.evaluate import score_untrained
from bench.tokenizers.source import BUILT, FROZEN, SIZES
from bench.tokenizers.tokenizer import Tokenizer, started
from bench.tokenizers.train import TokenizerLearner, initialise_codebook, train
from bench.tokenizers.trial import run_trial
from bench.training.loop import autocast
from bench.training.weights import write_weights
from tests.fabricate import fabricate, seal
from tests.training.test_group import GAN, environ, free_port, rows
from tests.watched import Crash, checkpoint, same

KEEPS = [name for name in FROZEN if name != "none"]


@pytest.fixture
def tiny(tiny):
    """In the same arithmetic on every machine."""
    return replace(tiny, precision="fp32")


def finished(root: Path, config: Config, images: np.ndarray | None = None) -> Run:
    """A finished run of ``config`` in the store ``root``, with weights of another seed than its own and, of ``images``,
    codes and statistics that a step has moved."""
    run = fabricate(Store(root), config)
    torch.manual_seed(99)
    tokenizer = Tokenizer(config)
    if images is not None:
        initialise_codebook(tokenizer, images, autocast(config.resolved()))
        tokenizer.train()(batch(images, 5, 0, 8, "none", "cpu"))
    write_weights(run, "tokenizer.safetensors", tokenizer)
    seal(run)
    return run


def weights_of(run: Run) -> dict[str, torch.Tensor]:
    return load_file(run.folder / "tokenizer.safetensors")


def part_of(state: dict, frozen: str, wrapped: str = "") -> dict[str, torch.Tensor]:
    """Of a state those tensors that belong to what is ``frozen``."""
    heads = tuple(f"{wrapped}{part}." for part in FROZEN[frozen])
    return {name.removeprefix(wrapped): value for name, value in state.items() if name.startswith(heads)}


# ---------------------------------------------------------------------------------------------------------- what starts


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_training_goes_on_from_the_weights_and_codes_of_the_source(tiny, images, tmp_path, quantizer):
    """Codes and their statistics too, which nothing starts anew; with a fresh optimizer, and whatever the seed."""
    source = finished(tmp_path, replace(tiny, quantizer=quantizer), images.train)
    config = replace(tiny, quantizer=quantizer, init_from=str(source.folder), seed=3).resolved()
    learner = TokenizerLearner(config, images.train)
    learner.begin()
    assert same(learner.model.state_dict(), weights_of(source))
    assert not learner.optimizer.state_dict()["state"]
    fresh = TokenizerLearner(replace(config, init_from=""), images.train)
    assert not same(fresh.model.state_dict(), weights_of(source))


def test_what_a_run_makes_before_training_is_of_the_weights_that_it_starts_from(tiny, images, tmp_path):
    source = finished(tmp_path, tiny)
    config = replace(tiny, init_from=str(source.folder)).resolved()
    _, pictures = score_untrained(config, images.test)
    tokenizer, x = Tokenizer.from_run(source.folder), torch.from_numpy(images.test[[0, 2]]).permute(0, 3, 1, 2)
    shown = to_uint8(tokenizer.decoder(tokenizer.encoder(x / 127.5 - 1))).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(pictures[[0]], shown[[0]])
    assert not np.array_equal(score_untrained(tiny.resolved(), images.test)[1][0], shown[0])


# --------------------------------------------------------------------------------------------------------- what is kept

CASES = [*((name, "encoder,quantizer") for name in QUANTIZERS if name != "none"), *(("ema", name) for name in KEEPS)]
CASES = [*dict.fromkeys((*CASES, ("standard", "quantizer"), ("none", "encoder")))]


@pytest.mark.parametrize(("quantizer", "frozen"), CASES)
def test_what_is_frozen_is_equal_to_the_bit_afterwards(watch, tiny, tmp_path, quantizer, frozen):
    """Parameters, codes, running sums and counts, in the weights, in their average and in the checkpoint, though codes
    would be revived and weights decay; all else moves. What is frozen has no optimizer state."""
    revives = {"revive_after": 1} if "revive_after" in QUANTIZERS[quantizer].settings else {}
    config = replace(tiny, quantizer=quantizer, steps=3, weight_decay=0.5, codebook_size=64, **revives)
    source = weights_of(finished(tmp_path / "store", config, watch.images))
    config = replace(config, init_from=str(Store(tmp_path / "store").runs()[0].folder), freeze=frozen)
    trained = watch.train(config)
    kept = checkpoint(trained.folder)
    for state, wrapped in ((trained.weights, ""), (kept["tokenizer"], ""), (kept["ema"], "module.")):
        found = part_of(state, frozen, wrapped)
        assert found.keys() == part_of(source, frozen).keys() != set()
        assert same(found, part_of(source, frozen))
    others = {part for part in ("encoder", "quantizer", "decoder") if part not in FROZEN[frozen]}
    for part in others - ({"quantizer"} if quantizer == "none" else set()):
        own = [name for name in source if name.startswith(f"{part}.")]
        assert not all(torch.equal(trained.weights[name], source[name]) for name in own), part
    free = [p for name, p in trained.tokenizer.named_parameters() if name.partition(".")[0] in others]
    assert sum(len(group["params"]) for group in kept["optimizer"]["param_groups"]) == len(free)
    assert len(kept["optimizer"]["state"]) == len(free)


def test_statistics_of_batches_are_frozen_with_their_network(tiny, images, tmp_path):
    config = replace(tiny, backbone="timm:test_efficientnet")
    source = finished(tmp_path, config)
    learner = TokenizerLearner(replace(config, init_from=str(source.folder), freeze="encoder").resolved(), images.train)
    learner.step(0, 1e-3)
    before = part_of(weights_of(source), "encoder")
    assert any(name.endswith("running_mean") for name in before)
    assert same(part_of(learner.model.state_dict(), "encoder"), before)


@pytest.mark.parametrize("frozen", KEEPS)
def test_what_is_frozen_costs_no_gradient(tiny, images, tmp_path, frozen):
    """Of an encoder no graph is kept; through a decoder one is, to the encoder."""
    source = finished(tmp_path, replace(tiny, quantizer="standard"))
    config = replace(tiny, quantizer="standard", init_from=str(source.folder), freeze=frozen).resolved()
    learner, seen = TokenizerLearner(config, images.train), []
    learner.model.encoder.register_forward_hook(lambda part, x, y: seen.append(y.requires_grad))
    learner.step(0, 1e-3)
    assert seen == ["encoder" not in FROZEN[frozen]]
    for name, parameter in learner.model.named_parameters():
        assert (parameter.grad is None) == (name.partition(".")[0] in FROZEN[frozen]), name


@pytest.mark.parametrize("quantizer", ["standard", "ema", "ema_l2", "product", "residual", "simvq", "bsq", "lfq"])
def test_frozen_codes_pull_the_encoder_as_codes_that_learn_do(quantizer):
    """The commitment and its gradient are those of training."""
    torch.manual_seed(0)
    module, found = QUANTIZERS[quantizer](16, 4), []
    if hasattr(module, "start"):
        module.initialise(torch.randn(2, 4, 4, 4))
    state = {name: value.clone() for name, value in module.state_dict().items()}
    for training in (True, False):
        module.load_state_dict(state)
        z = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(1)).requires_grad_()
        frozen = module.train(training)
        found.append((loss := frozen(z).loss, torch.autograd.grad(loss, z)[0]))
    torch.testing.assert_close(found[1], found[0])
    assert found[1][1].abs().max() > 0


def test_the_adversary_trains_a_decoder_alone_and_a_run_goes_on_to_the_bit(watch, tiny, tmp_path):
    source = finished(tmp_path / "store", tiny, watch.images)
    config = replace(tiny, **GAN, init_from=str(source.folder), freeze="encoder,quantizer")
    config.resolved().check()
    whole = watch.train(config, "whole")
    with pytest.raises(Crash):
        watch.train(config, "parts", crash_at=7)
    parts = watch.train(config, "parts")
    assert len(parts.steps) == 5
    assert same(checkpoint(parts.folder), checkpoint(whole.folder))
    assert "gan" in whole.rows[-1]
    assert same(part_of(whole.weights, config.freeze), part_of(weights_of(source), config.freeze))


def test_a_batch_in_parts_gives_the_weights_of_a_whole_one(tiny, images, tmp_path):
    source = finished(tmp_path / "store", tiny, images.train)
    config = replace(tiny, steps=4, init_from=str(source.folder), freeze="encoder").resolved()
    states = []
    for parts in (1, 4):
        (tmp_path / f"{parts}").mkdir()
        states.append(train(config, images.train, tmp_path / f"{parts}", accumulate=parts)[0].state_dict())
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-3, atol=1e-4, msg=name)


def _process(rank: int, port: int, config: Config, images: np.ndarray, folder: Path) -> None:
    environ(rank, 2, port)
    with group.joined("cpu"):
        tokenizer, _ = train(config, images, folder)
        if group.first():
            torch.save(tokenizer.state_dict(), folder / "weights.pt")


@pytest.mark.slow
def test_two_processes_are_one(tiny, images, tmp_path):
    source = finished(tmp_path / "store", tiny, images.train)
    config = replace(tiny, steps=4, **GAN, init_from=str(source.folder), freeze="encoder,quantizer").resolved()
    for name in ("1", "2"):
        (tmp_path / name).mkdir()
    alone, _ = train(config, images.train, tmp_path / "1")
    mp.spawn(_process, (free_port(), config, images.train, tmp_path / "2"), nprocs=2)
    together = torch.load(tmp_path / "2" / "weights.pt", weights_only=True)
    assert same(part_of(together, config.freeze), part_of(weights_of(source), config.freeze))
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(together[name], value, rtol=1e-3, atol=1e-4, msg=name)
    for one, other in zip(rows(tmp_path / "1"), rows(tmp_path / "2"), strict=True):
        assert other["reconstruction"] == pytest.approx(one["reconstruction"], rel=2e-4)


# ------------------------------------------------------------------------------------------------------------- identity


def test_a_run_is_known_by_the_weights_that_it_starts_from(tiny, tmp_path, monkeypatch):
    """Not by where they lie; written again, they are looked at again."""
    source = finished(tmp_path, tiny)
    config = replace(tiny, init_from=str(source.folder))
    known = config.run_id()
    assert known != tiny.run_id()
    assert config.resolved().stored().run_id() == known
    shutil.copytree(source.folder, tmp_path / "elsewhere")
    (tmp_path / "link").symlink_to(source.folder)
    monkeypatch.chdir(tmp_path)
    for other in ("elsewhere", "link", "./runs/../elsewhere"):
        assert replace(tiny, init_from=other).run_id() == known
    assert replace(tiny, init_from="link").resolved().init_from == str(source.folder.resolve())
    state = weights_of(source)
    state["decoder.layers.0.weight" if "decoder.layers.0.weight" in state else next(iter(state))] += 1
    save_file(state, tmp_path / "elsewhere" / "tokenizer.safetensors")
    assert replace(tiny, init_from="elsewhere").run_id() != known
    assert replace(config, freeze="encoder").run_id() not in (known, replace(config, freeze="decoder").run_id())


@pytest.mark.slow
def test_a_tuned_run_is_whole_without_its_source(trial_data, tiny, tmp_path, capsys):
    """It is scored, known again and read; its file of settings repeats it."""
    store = Store(tmp_path / "store")
    source = finished(store.root, tiny, trial_data.train)
    words = ["--init-from", source.folder.name, "--freeze", "encoder", "--lr", "0.01", "--preset", "smoke"]
    words += ["--steps", "2", "--batch-size", "8", "--lpips-weight", "0", "--device", "cpu", "--instruments", "none"]
    assert run_main([*words, "--results", str(store.root)]) == 0
    (run,) = (run for run in store.runs() if run.folder != source.folder)
    assert "--backbone cnn convnext" not in capsys.readouterr().out.replace("\n", " ")  # others could not start there
    assert run.config()["init_from"].startswith("sha256:")
    assert (run.config()["width"], run.config()["freeze"]) == (16, "encoder")
    (again,) = parse(RunArguments, ["--config", str(run.folder / "config.toml")], "run", "").configs()
    assert store.run(again) == run
    assert run_main([*words, "--results", str(store.root)]) == 0
    assert "already finished" in capsys.readouterr().err
    shutil.rmtree(source.folder)
    assert Tokenizer.from_run(run.folder).config.freeze == "encoder"
    assert run.settings(Config).run_id() == run.folder.name


# ----------------------------------------------------------------------------------------------- settings of the source


def command_line(*words: str) -> Config:
    (config,) = parse(RunArguments, list(words), "run", "").configs()
    return config


@pytest.fixture
def vit(tiny, tmp_path) -> Run:
    """A finished run whose every setting of its architecture is none of the preset's."""
    size = {"width": 24, "depth": 1, "codebook_size": 32, "code_dim": 5, "grid_size": 8, "image_size": 32}
    options = {"rotary": True, "patch_overlap": True, "attention": 1, "quantizer": "product", "codebooks": 3}
    return finished(tmp_path, replace(tiny, backbone="vit", **size, **options, beta=3.0))


def test_architecture_is_the_source_s_and_all_else_the_preset_s(vit, tmp_path):
    """From the command line and from Python; of backbone and quantizer, too."""
    config = command_line("--init-from", vit.folder.name[:8], "--results", str(tmp_path), "--preset", "cpu")
    theirs, usual = vit.settings(Config), make_config("vit", "cpu")
    for name in (*BUILT, *SIZES):
        assert getattr(config, name) == getattr(theirs, name), name
    assert (config.rotary, config.patch_overlap, config.attention, config.codebooks) == (True, True, 1, 3)
    for name in ("steps", "lr", "beta", "data", "lpips_weight", "batch_size"):
        assert getattr(config, name) == getattr(usual, name), name
    assert config.init_from == str(vit.folder)
    assert make_config("vit", "cpu", init_from=str(vit.folder)) == config
    config.check()


def test_a_study_sweeps_what_is_frozen_and_is_named_by_the_weights(vit, tmp_path):
    study = Ablation("keep", sweep={"freeze": ("none", "encoder,quantizer")}, seeds=(0,))
    words = ["--init-from", vit.folder.name, "--results", str(tmp_path), "--preset", "smoke"]
    plan = make_plan(study, parse_study(study, "", words))
    assert [*plan.cells] == ["vit"]
    assert [cell.configs[0].freeze for cell in plan.cells["vit"]] == ["none", "encoder,quantizer"]
    assert {cell.configs[0].init_from for cell in plan.cells["vit"]} == {str(vit.folder)}
    assert len({cell.run.folder for cell in plan.cells["vit"]}) == 2
    assert plan.name.startswith("keep-smoke-init_from=sha256_")


OTHERS = [
    ("--backbone cnn", "backbone is cnn, and that of {} is vit; leave it out"),
    ("--width 32", "width is 32, and that of {} is 24; leave it out"),
    ("--depth 2", "depth is 2, and that of {} is 1; leave it out"),
    ("--codebook-size 64", "codebook_size is 64, and that of {} is 32; leave it out"),
    ("--code-dim 6", "code_dim is 6, and that of {} is 5; leave it out"),
    ("--quantizer ema", "quantizer is ema, and that of {} is product; leave it out"),
    ("--codebooks 2", "codebooks is 2, and that of {} is 3; leave it out"),
    ("--no-rotary", "rotary is False, and that of {} is True; leave it out"),
    ("--attention 0", "attention is 0, and that of {} is 1; leave it out"),
    ("--grid-size 4", "a code stands for 8×8 pixels, and for 4×4 in {}; take grid_size 8"),
    ("--image-size 64", "a code stands for 8×8 pixels, and for 4×4 in {}; take grid_size 16"),
    ("--kmeans-init", "kmeans_init is True, of which a run from given weights makes no use; leave it out"),
    ("--freeze quantizer --revive-after 9", "revive_after is 9, of which a frozen quantizer makes no use"),
    ("--freeze decoder --gan-weight 1", "is frozen; give --no-gan-adaptive, too"),
    ("--freeze encoder --alignment-weight 1", "alignment_weight is 1, and would train the encoder, which is frozen"),
    ("--freeze codebook", "unknown freeze 'codebook'; choose from none, encoder,"),
    ("--freeze encoder,decoder", "unknown freeze 'encoder,decoder'; choose from none, encoder,"),
    ("--match params:1M", "and that of {} is"),
]


@pytest.mark.parametrize(("words", "told"), OTHERS)
def test_what_does_not_fit_the_source_is_one_sentence_with_both_values(vit, tmp_path, capsys, words, told):
    before = {*tmp_path.rglob("*")}
    place = ["--init-from", str(vit.folder), "--results", str(tmp_path), "--preset", "smoke", "--device", "cpu"]
    assert run_main([*place, *words.split()]) == 2
    (sentence,) = capsys.readouterr().err.splitlines()
    assert told.format(vit.folder) in sentence
    assert {*tmp_path.rglob("*")} == before


def test_another_image_size_is_taken_where_the_backbone_can(tiny, tmp_path):
    """Convolutions know no size; positions that were learned do."""
    cnn, vit = (finished(tmp_path, replace(tiny, backbone=name)) for name in ("cnn", "vit"))
    words = ["--results", str(tmp_path), "--device", "cpu", "--image-size", "64", "--grid-size", "8"]
    config = command_line("--init-from", str(cnn.folder), *words)
    config.check()
    tokenizer = started(Tokenizer(config)).eval()
    assert tokenizer.encode(torch.zeros(1, 3, 64, 64)).shape == (1, 8, 8)
    assert same(tokenizer.state_dict(), weights_of(cnn))
    with pytest.raises(UserError, match=r"^image_size is 64, and .* was trained on 32, to which .*position belongs"):
        started(Tokenizer(command_line("--init-from", str(vit.folder), *words)))


def test_what_makes_no_sense_without_a_source_is_told(tiny):
    with pytest.raises(UserError, match=r"freeze is encoder, and weights that nothing .*; give --init-from RUN, too"):
        replace(tiny, freeze="encoder").check()
    with pytest.raises(UserError, match="does not say where these weights are; name a folder"):
        replace(tiny, init_from="sha256:0123456789abcdef").check()
    with pytest.raises(UserError, match="quantizer 'none' has nothing that could learn; leave it out"):
        Tokenizer(replace(tiny, quantizer="none", freeze="quantizer"))


# ------------------------------------------------------------------------------------------------------- what is broken


class Unsafe:
    """What a pickle may do."""

    def __reduce__(self):
        return os.mkdir, ("unpickled",)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def piped(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def without(path: Path) -> None:
    state = load_file(path)
    state.pop(next(iter(state)))
    save_file(state, path)


def infinite(path: Path) -> None:
    state = load_file(path)
    next(value for name, value in state.items() if name.startswith("decoder")).view(-1)[0] = float("nan")
    save_file(state, path)


def of_other_size(path: Path) -> None:
    state = load_file(path)
    save_file({name: torch.cat([value, value]) if value.ndim else value for name, value in state.items()}, path)


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (lambda path: path.write_bytes(pickle.dumps(Unsafe())), "does not hold the weights of this"),
        (lambda path: path.write_bytes(b""), "does not hold the weights of this"),
        (lambda path: path.write_bytes(b"\xff" * 64), "does not hold the weights of this"),
        (cut, "does not hold the weights of this"),
        (without, "does not hold the weights of this"),
        (of_other_size, "does not hold the weights of this"),
        (infinite, "has numbers that are not finite"),
        (piped, "has lost its tokenizer.safetensors"),
        (Path.unlink, "has lost its tokenizer.safetensors"),
        (lambda path: (path.parent / "metrics.json").unlink(), "is unfinished; finish it"),
        (lambda path: (path.parent / "config.json").write_text("{"), "is damaged"),
        (lambda path: shutil.rmtree(path.parent), "unknown run"),
    ],
)
@pytest.mark.parametrize("sealed", [True, False])
@pytest.mark.usefixtures("impatient")
def test_broken_weights_are_one_sentence_and_run_nothing(tiny, tmp_path, capsys, monkeypatch, fault, told, sealed):
    """With the digests that runs have, and, as of runs that somebody made up, without."""
    monkeypatch.chdir(tmp_path)
    run = finished(tmp_path, tiny)
    if not sealed:
        scored = read_json(run.folder / "metrics.json")
        run.write("metrics.json", {"metrics": scored["metrics"], "protocol": scored["protocol"]})
    fault(run.folder / "tokenizer.safetensors")
    before = {*tmp_path.rglob("*")}
    told = "does not hold the weights" if sealed and fault is infinite else told
    assert run_main(["--init-from", str(run.folder), "--results", str(tmp_path), "--device", "cpu"]) == 2
    (sentence,) = capsys.readouterr().err.splitlines()
    assert told in sentence
    assert {*tmp_path.rglob("*")} == before


@pytest.mark.parametrize("name", ["", "tokenizer.safetensors"])
@pytest.mark.usefixtures("impatient")
def test_from_python_a_folder_without_a_run_is_one_sentence(tiny, tmp_path, name):
    if name:
        os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match=r"tokenizer\.safetensors cannot be read there"):
        run_trial(replace(tiny, init_from=str(tmp_path)), tmp_path / "results")
    assert not (tmp_path / "results").exists()


# ------------------------------------------------------------------------------------------------------- what it is for


@pytest.mark.slow
@pytest.mark.parametrize("frozen", ["none", "encoder,quantizer"])
def test_tuning_on_other_images_improves_scores_there(tiny, images, tmp_path, frozen):
    """Negatives of the images that a source has learned: as a whole, or its decoder alone."""
    config = replace(tiny, steps=60, lr=3e-3, augment="none").resolved()
    folder = tmp_path / "first"
    folder.mkdir()
    tokenizer, _ = train(config, images.train, folder)
    source = fabricate(Store(tmp_path), config)
    write_weights(source, "tokenizer.safetensors", tokenizer)
    (tmp_path / "second").mkdir()
    tuned = replace(config, init_from=str(source.folder), freeze=frozen, steps=30)
    better, _ = train(tuned, 255 - images.train, tmp_path / "second")
    x = torch.from_numpy(255 - images.test).permute(0, 3, 1, 2)

    def decibels(one: Tokenizer) -> float:
        return float(psnr(to_uint8(one.decode(one.encode(x / 127.5 - 1))), x).mean())

    assert decibels(better) > decibels(Tokenizer.from_run(source.folder)) + 0.5
