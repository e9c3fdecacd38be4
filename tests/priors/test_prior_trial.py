"""A prior's run: what is written and in which order, whose weights may be lent, and the table that compares priors.

The tokenizer, its codes and the scores are made up, so a run takes no time.
"""

from __future__ import annotations

import json
import os
import shutil
from contextlib import nullcontext
from dataclasses import asdict, fields
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
from rich.table import Table

import bench
from bench import prior
from bench.core.errors import Diverged, UserError
from bench.core.runs import Busy, Run
from bench.core.store import Store, find_tokenizer
from bench.data import Data
from bench.priors import trial as prior_trial
from bench.priors.codes import Codes, digest
from bench.priors.config import PRIOR_VERSION, PriorConfig
from bench.priors.generate import Generated
from bench.priors.models import PRIORS, Prior
from bench.priors.trial import run_prior
from bench.tokenizers import evaluate
from bench.training.trial import complete
from tests.fabricate import least

K, SIDE, NAME = 300, 2, "cnn-ema-toy"


class World:
    """One finished tokenizer with toy codes; remembers how priors were trained and scored."""

    def __init__(self, root: Path, tiny):
        self.store, self.tokenizer = Store(root), Run(root / "runs" / NAME)
        self.tokenizer.folder.mkdir(parents=True)
        (self.tokenizer.folder / "tokenizer.safetensors").write_bytes(b"weights")
        self.tokenizer.write("config.json", {"config": {}, "environment": {}})
        self.tokenizer.write("metrics.json", least())
        self.tiny, self.trained, self.scored, self.diverges = tiny, [], [], False
        self.count, self.training, self.classes = 12, None, ("a", "b", "c")

    @property
    def data(self) -> Data:
        images = np.zeros((self.count, 8, 8, 3), dtype=np.uint8)
        splits = images[: self.training], images[:5], images
        return Data("toy", *splits, "f" * 64, "toy split", ("broken.png",), self.classes)

    def codes(self) -> Codes:
        generator = np.random.default_rng(0)
        grids = [generator.integers(0, K, (self.count, SIDE, SIDE), dtype=np.uint16) for _ in range(2)]
        labels = [generator.integers(0, 3, self.count) if self.classes else None for _ in range(2)]
        return Codes(*grids, K, digest(self.tokenizer.folder), self.classes, *labels)

    def score(self, prior, tokenizer, codes, data, config, known, fid_weights) -> Generated:
        self.scored.append(SimpleNamespace(config=config, weights=prior.state_dict(), known=known))
        images = np.zeros((4, 8, 8, 3), dtype=np.uint8)
        metrics = least("priors", coded_bits_per_token=2.5, nearest_train_psnr=20.0)["metrics"]
        return Generated(metrics, codes.train[:4].astype(np.int64), images, images)

    def run(self, **settings) -> Run:
        resume = settings.pop("resume", True)
        return run_prior(self.config(**settings), self.tokenizer, self.store, None, resume)

    @staticmethod
    def config(**settings) -> PriorConfig:
        usual = {"prior": "rnn", "depth": 1, "parameters": 20_000, "steps": 3, "batch_size": 4, "samples": 4}
        return PriorConfig(NAME, **{**usual, "precision": "fp32", "device": "cpu", **settings})


@pytest.fixture
def world(tmp_path, monkeypatch, tiny) -> World:
    made = World(tmp_path, tiny)
    train = prior_trial.train_prior

    def small(config, codebook_size, grid, classes):
        """Of a width that need not be looked for."""
        shape = () if config.prior == "independent" else (8, 1, 0.1)
        return PRIORS[config.prior](codebook_size, grid, *shape, classes)

    monkeypatch.setattr("bench.priors.train.build", small)

    def count_training(config, codes, folder, resume, tell):
        made.trained.append((config, resume))
        if made.diverges:
            raise Diverged("too steep")
        trained, _ = train(config, codes, folder, resume)
        return trained, 12.5

    replaced = {
        "train_prior": count_training,
        "Tokenizer": SimpleNamespace(from_run=lambda *arguments: SimpleNamespace(config=tiny)),
        "load_data": lambda *arguments: made.data,
        "encode": lambda *arguments: made.codes(),
        "references": lambda *arguments: {"nearest_val_psnr_95": 30.0, "coded_bits_per_token_independent": 3.5},
        "score_prior": made.score,
        "build": small,
    }
    for name, value in replaced.items():
        monkeypatch.setattr(prior_trial, name, value)
    monkeypatch.setattr("bench.training.trial.environment", dict)
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # a busy disk takes seconds
    for name in PICTURES:
        monkeypatch.setattr(f"bench.core.plots.{name}", lambda path, *rest: path.touch())
    return made


# -- what a run leaves behind -----------------------------------------------------------------------------------------


PICTURES = ("samples", "neighbours", "prior_curve")


@pytest.mark.parametrize(
    "writer",
    ["safetensors.torch.save_model", "numpy.savez_compressed", *(f"bench.core.plots.{name}" for name in PICTURES)],
)
def test_scores_are_written_last(world, monkeypatch, writer):
    """Their presence means that the run is complete, so nothing may fail after them."""

    def fail(*arguments, **options):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(writer, fail)
        with pytest.raises(OSError, match="disk full"):
            world.run()
    run = world.store.run(world.config())
    assert not run.finished
    assert not (run.folder / "metrics.json").exists()
    assert world.run().finished


def test_passes_are_a_setting_and_no_part_of_the_protocol(world):
    """So that priors are ranked beside each other, whatever each is drawn by."""
    few, many = world.run(prior="masked", passes=3), world.run(prior="masked", passes=4)
    assert few.folder != many.folder
    assert few.settings(PriorConfig).passes == 3
    assert few.protocol() == many.protocol() == world.run().protocol()


def test_a_finished_run_holds_scores_references_costs_and_protocol(world, monkeypatch):
    monkeypatch.setattr(prior_trial, "PRIOR_VERSION", 77)  # another than that of tokenizers
    run = world.run(temperature=0.7, top_k=5, samples=6)
    metrics = run.metrics()
    assert metrics.pop("peak_memory_mb") >= 0
    assert metrics == {
        **least("priors")["metrics"],
        **{"coded_bits_per_token": 2.5, "nearest_train_psnr": 20.0, "nearest_val_psnr_95": 30.0},
        **{"coded_bits_per_token_independent": 3.5, "train_seconds": 12.5, "grids_seen": 12},
    }
    assert run.protocol() == {
        **evaluate.protocol(world.data, "test", "cpu", None),
        **{"version": 77, "tokenizer": digest(world.tokenizer.folder)},
        **{"samples": 6, "temperature": 0.7, "top_k": 5},
    }
    assert run.codes() == {"codebook_size": K, "grid": (SIDE, SIDE), "classes": ["a", "b", "c"]}
    assert run.settings(PriorConfig) == world.config(temperature=0.7, top_k=5, samples=6)
    assert [row["step"] for row in run.history()] == [1, 2, 3]
    assert not (run.folder / "checkpoint.pt").exists()
    assert world.scored[0].known == {"nearest_val_psnr_95": 30.0, "coded_bits_per_token_independent": 3.5}
    with np.load(run.folder / "samples.npz") as stored:
        assert stored["codes"].dtype == np.uint16
        assert np.array_equal(stored["codes"], world.codes().train[:4])
    floor = world.run(prior="independent")
    assert floor.metrics()["grids_seen"] == 0
    assert not (floor.folder / "history.jsonl").exists()


@pytest.mark.parametrize("settings", [{}, {"conditional": True}, {"prior": "independent"}])
def test_a_stored_prior_is_the_one_that_was_scored(world, settings):
    run = world.run(**settings)
    loaded = Prior.from_run(run.folder)
    assert loaded.config == world.config(**settings).resolved()
    assert loaded.classes == (3 if loaded.config.conditional else 0)
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    for name, value in world.scored[0].weights.items():
        assert loaded.state_dict()[name].equal(value)
    for lost in ("prior.safetensors", "metrics.json"):
        (run.folder / lost).unlink()
        with pytest.raises(UserError) as error:
            Prior.from_run(run.folder)
        assert str(error.value) == f"{run.folder} holds no finished prior; train one with python -m bench.prior"


def test_a_prior_that_finished_keeps_no_checkpoint(world):
    """However much of it there was, nothing is left to go on with."""
    folder = world.store.run(world.config()).folder
    folder.mkdir(parents=True)
    (folder / "checkpoint.pt").write_bytes(b"of an attempt that was stopped")
    assert world.run(resume=False).finished
    assert not (folder / "checkpoint.pt").exists()


def test_a_finished_run_is_not_repeated_and_a_divergence_is_recorded_and_forgiven(world):
    world.diverges = True
    with pytest.raises(Diverged):
        world.run()
    run = world.store.run(world.config())
    assert (run.status, run.reason) == ("diverged", "too steep")
    world.diverges = False
    world.run(resume=False)
    assert (run.status, run.reason) == ("finished", "")
    assert not (run.folder / "failure.json").exists()
    assert [resume for _, resume in world.trained] == [True, False]
    world.run()
    assert len(world.trained) == 2
    assert len(world.scored) == 1


@pytest.mark.parametrize("count", [3, 4])
def test_four_images_of_each_split_are_needed(world, count):
    world.count = count
    if count == 4:
        assert world.run().finished
        return
    with pytest.raises(UserError, match="3 train and 3 test images; scoring generation needs at least 4"):
        world.run()
    assert not (world.store.root / "priors").exists()


def test_three_training_images_do_not_suffice_however_many_validate(world):
    world.training = 3
    with pytest.raises(UserError, match="3 train and 12 test images; scoring generation needs at least 4"):
        world.run()
    assert not (world.store.root / "priors").exists()


def test_without_classes_nothing_can_be_conditioned(world):
    world.classes = ()
    with pytest.raises(UserError, match=r"^toy has no classes to condition on; leave out --conditional$"):
        world.run(conditional=True)
    assert not (world.store.root / "priors").exists()


def test_device_weights_and_folder_reach_whoever_needs_them(world, monkeypatch, tmp_path):
    """The tokenizer's device, Inception's weights, and references beside the codes that they are of."""
    seen, file = {}, tmp_path / "inception.pth"

    def note(name):
        replaced = getattr(prior_trial, name)
        monkeypatch.setattr(prior_trial, name, lambda *given: seen.update({name: given}) or replaced(*given))

    for name in ("references", "score_prior", "load_data", "encode"):
        note(name)
    loaded = SimpleNamespace(config=world.tiny)
    monkeypatch.setattr(
        prior_trial, "Tokenizer", SimpleNamespace(from_run=lambda *given: seen.update(loaded=given) or loaded)
    )
    measured, told = [], lambda digest: least("priors", {"extractor_inception": digest})["protocol"]
    monkeypatch.setattr(prior_trial, "peak_memory", lambda device: measured.append(device) or nullcontext(lambda: 7.5))
    monkeypatch.setattr(evaluate, "protocol", lambda data, split, device, path: told(f"{split} {device} {path}"))
    run = run_prior(world.config(), world.tokenizer, world.store, file)
    folder = world.tokenizer.folder
    assert seen["loaded"] == (folder, "cpu")
    assert seen["load_data"] == (folder, loaded)
    assert seen["encode"][:2] == (folder, loaded)
    config = world.config().resolved()
    assert seen["references"][0] is loaded
    assert seen["references"][3:] == (config, folder / "codes", file)
    assert seen["score_prior"][1] is loaded
    assert seen["score_prior"][4] == config
    assert seen["score_prior"][6] == file
    assert run.protocol()["extractor_inception"] == f"test cpu {file}"
    assert measured == ["cpu"]
    assert run.metrics()["peak_memory_mb"] == 7.5
    assert run.tokenizer() == json.loads(json.dumps(asdict(world.tiny)))


def test_pictures_show_the_samples_and_say_whose_they_are(world, monkeypatch):
    """Prior, backbone, grid, K and rate; the floor has no curve. The samples are kept with their codes."""
    drawn = {}
    for name in PICTURES:
        monkeypatch.setattr(f"bench.core.plots.{name}", lambda *given, name=name: drawn.update({name: given}))
    images, neighbours = (np.full((4, 8, 8, 3), grey, dtype=np.uint8) for grey in (3, 5))
    codes = world.codes().train[:4].astype(np.int64)
    generated = Generated({"coded_bits_per_token": 2.506}, codes, images, neighbours, ["a", "b", "a", "a"])
    monkeypatch.setattr(prior_trial, "score_prior", lambda *given: generated)
    run = world.run()
    title = f"rnn over {world.tiny.backbone}, 2×2 of 300: 2.51 bits per token"
    assert drawn.keys() == set(PICTURES)
    assert drawn["samples"] == (run.folder / "samples.png", images, title, ["a", "b", "a", "a"])
    assert drawn["neighbours"] == (run.folder / "neighbours.png", images, neighbours, title)
    path, history, metrics, above = drawn["prior_curve"]
    assert (path, history, above) == (run.folder / "curves.png", run.history(), title)
    assert metrics["coded_bits_per_token_independent"] == 3.5
    with np.load(run.folder / "samples.npz") as stored:
        assert np.array_equal(stored["x"], images)
    drawn.clear()
    world.run(prior="independent")
    assert drawn.keys() == {"samples", "neighbours"}


def test_samples_are_written_whole_or_not_at_all(world, monkeypatch):
    def full(path, **arrays):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez_compressed", full)
    with pytest.raises(OSError, match="disk full"):
        world.run()
    names = {path.name for path in world.store.run(world.config()).folder.iterdir()}
    assert not [name for name in names if "samples" in name]


def test_a_store_is_named_by_its_folder_too(world):
    """As ``bench.run_prior``, in text or as a path, and what it holds is returned."""
    runs = [bench.run_prior(world.config(), world.tokenizer, kind(world.store.root)) for kind in (str, Path)]
    assert {run.folder for run in runs} == {world.store.run(bench.PriorConfig(**asdict(world.config()))).folder}
    assert len(world.trained) == 1


def test_a_prior_asks_for_room_before_anything_else():
    """And its settings are checked before that; there is no run of a tokenizer that it could look at."""
    asked = []

    def refuse(megabytes: int) -> None:
        asked.append(megabytes)
        raise UserError("the disk is full")

    full = SimpleNamespace(check_writable=refuse)
    with pytest.raises(UserError, match="the disk is full"):
        run_prior(World.config(), None, full)
    with pytest.raises(UserError, match="lr is -1"):
        run_prior(World.config(lr=-1.0), None, full)
    assert asked == [200]


def test_a_prior_that_cannot_be_built_leaves_nothing_behind(world, monkeypatch):
    """It is tried with the sizes of the codes, and with their classes only where it is conditioned on them."""
    asked = []

    def refuse(*given):
        asked.append(given)
        raise UserError("no width will do")

    monkeypatch.setattr(prior_trial, "build", refuse)
    for conditional, classes in ((False, 0), (True, 3)):
        with pytest.raises(UserError, match="no width will do"):
            world.run(conditional=conditional)
        assert asked[-1] == (world.config(conditional=conditional).resolved(), K, (SIDE, SIDE), classes)
    assert not (world.store.root / "priors").exists()


def test_data_without_classes_will_do_where_nothing_is_conditioned(world):
    world.classes = ()
    assert world.run().codes()["classes"] == []


@pytest.mark.parametrize(("codebook_size", "kind"), [(256, np.uint8), (257, np.uint16)])
def test_drawn_codes_are_kept_in_the_smallest_type_that_holds_them(world, codebook_size, kind):
    run, images = world.run(prior="independent"), np.zeros((4, 8, 8, 3), dtype=np.uint8)
    drawn = np.full((4, SIDE, SIDE), codebook_size - 1)
    generated = Generated({"coded_bits_per_token": 2.5}, drawn, images, images)
    prior_trial.finish(run, PRIORS["independent"](codebook_size, (SIDE, SIDE)), generated, generated.metrics, {})
    with np.load(run.folder / "samples.npz") as stored:
        assert stored["codes"].dtype == kind
        assert np.array_equal(stored["codes"], drawn)


def test_a_prior_is_held_until_it_is_scored(world, monkeypatch):
    """From before its references are read to its last file."""
    folder, taken = world.store.run(world.config()).folder, []

    def look(name):
        replaced = getattr(prior_trial, name)

        def looking(*arguments, **options):
            with pytest.raises(Busy), Run(folder).locked():
                pass
            taken.append(name)
            return replaced(*arguments, **options)

        monkeypatch.setattr(prior_trial, name, looking)

    names = ["references", "train_prior", "score_prior", "finish"]
    for name in names:
        look(name)
    assert world.run().finished
    assert taken == names
    with Run(folder).locked():
        pass


def test_a_stored_prior_comes_on_the_device_asked_for(world):
    run = world.run()
    for device in ("meta", "cpu"):
        assert {value.device.type for value in Prior.from_run(run.folder, device).state_dict().values()} == {device}
    assert {value.device.type for value in Prior.from_run(str(run.folder)).state_dict().values()} == {"cpu"}


# -- whose weights are lent -------------------------------------------------------------------------------------------


def test_a_prior_that_was_trained_alike_lends_its_weights_and_costs(world):
    first = world.run()
    shutil.copy(first.folder / "metrics.json", world.store.root / "kept.json")
    second = world.run(temperature=0.5, top_k=2, samples=5)
    assert len(world.trained) == 1
    assert first.folder != second.folder
    one, other = (safetensors.torch.load_file(run.folder / "prior.safetensors") for run in (first, second))
    assert one.keys() == other.keys()
    assert all(one[name].equal(other[name]) for name in one)
    for name in ("train_seconds", "peak_memory_mb", "grids_seen"):
        assert first.metrics()[name] == second.metrics()[name]
    assert first.history() == second.history()
    assert world.scored[1].config.temperature == 0.5
    assert (first.folder / "metrics.json").read_bytes() == (world.store.root / "kept.json").read_bytes()


@pytest.mark.parametrize("difference", ["tokenizer", "version", "unfinished", "seed", "steps", "prior", "conditional"])
def test_each_difference_alone_refuses_the_loan(world, difference):
    """Weights over another tokenizer's codes, of another version, half trained, or of other settings."""
    twin = world.run()
    path = twin.folder / "metrics.json"
    content, settings = json.loads(path.read_text()), {}
    del content["sha256"]  # or it would be refused as damaged
    if difference == "tokenizer":
        content["protocol"]["tokenizer"] = "0" * 16
    elif difference == "version":
        content["protocol"]["version"] = PRIOR_VERSION + 1
    else:
        changes = {"seed": 1, "steps": 2, "prior": "transformer", "conditional": True}
        settings = {difference: changes[difference]} if difference in changes else {}
    path.write_text(json.dumps(content))
    if difference == "unfinished":
        path.unlink()
    world.run(temperature=0.5, **settings)
    assert len(world.trained) == 2


def test_a_run_over_another_tokenizers_codes_is_refused(world):
    run = world.run()
    before = digest(world.tokenizer.folder)
    (world.tokenizer.folder / "tokenizer.safetensors").write_bytes(b"trained again")
    with pytest.raises(UserError) as error:
        world.run()
    assert str(error.value) == (
        f"{run.folder} is a prior over the codes of another tokenizer ({before}) than {world.tokenizer.folder} now "
        f"holds ({digest(world.tokenizer.folder)}); move that folder"
    )
    assert len(world.scored) == 1
    assert run.protocol()["tokenizer"] != digest(world.tokenizer.folder)


# -- the command and its table ----------------------------------------------------------------------------------------


def test_every_option_reaches_the_config():
    """Each field of a PriorConfig is told by a flag of its name (bug 16)."""
    told = {"depth": 7, "parameters": 8, "dropout": 0.9, "conditional": True, "steps": 10, "batch_size": 11, "lr": 0.12}
    told |= {"warmup": 13, "weight_decay": 0.14, "grad_clip": 0.15, "weight_ema": 0.16, "samples": 17}
    told |= {"token_order": "snake", "label_dropout": 0.1, "guidance": 2.0, "passes": 3}
    told |= {"temperature": 0.18, "top_k": 19, "precision": "fp32", "device": "cpu"}
    made = prior.PriorArguments(("a",), ("rnn",), **told).config("b", "mamba", 20)
    assert {field.name for field in fields(PriorConfig)} == {*told, "tokenizer", "prior", "seed"}
    assert made == PriorConfig("b", "mamba", **told, seed=20)


def test_every_tokenizer_prior_and_seed_is_one_run(world, monkeypatch, capsys):
    asked = []

    def finish(config, run, store, fid_weights, resume, track):
        asked.append((config.tokenizer, config.prior, config.seed, store.root, fid_weights, resume))
        if config.seed == 5:
            raise Diverged("too steep")
        return store.run(config)

    monkeypatch.setattr(prior, "run_prior", finish)
    monkeypatch.setattr(prior, "result_table", lambda runs: Table(f"{len(runs)} in the table"))
    monkeypatch.setattr(prior, "protocol_line", lambda run: "")
    for name in ("not_done", "of_its_codes"):
        monkeypatch.setattr(prior, name, lambda run: "")
    arguments = [str(world.tokenizer.folder), "--prior", "rnn", "mamba", "--seeds", "3", "5", "--device", "cpu"]
    assert prior.main([*arguments, "--fid-weights", "file", "--no-resume"]) == 1
    root = world.store.root.resolve()
    expected = [(name, seed) for name in ("rnn", "mamba") for seed in (3, 5)]
    assert asked == [(NAME, name, seed, root, Path("file"), False) for name, seed in expected]
    assert "2 in the table" in capsys.readouterr().out


def test_a_prior_that_was_only_begun_is_not_said_to_be_finished_already(world, monkeypatch, capsys):
    def begin_then_finish(config, run, store, fid_weights, resume, track):
        made = store.run(config)
        if not made.folder.is_dir():
            made.folder.mkdir(parents=True)
            raise Diverged("too steep")
        made.write("config.json", {"config": {}, "environment": {}})
        made.write("metrics.json", least("priors"))
        return made

    monkeypatch.setattr(prior, "run_prior", begin_then_finish)
    monkeypatch.setattr(prior, "result_table", lambda runs: Table())
    monkeypatch.setattr(prior, "protocol_line", lambda run: "")
    ends = []
    for _ in range(3):
        code = prior.main([str(world.tokenizer.folder), "--prior", "rnn", "--device", "cpu"])
        ends.append((code, "already finished" in capsys.readouterr().err))
    assert ends == [(1, False), (0, False), (0, True)]


def row(tokenizer: str, name: str, seed: int = 0, **metrics: float) -> SimpleNamespace:
    usual = {
        **{"coded_bits_per_token": 3.0, "coded_bits_per_pixel": 0.1, "gfid_vgg16": 9.0, "gkid_vgg16": 0.5},
        **{"copy_rate": 0.1, "recall_vgg16": 0.5},
        **{"precision_vgg16": 0.5, "images_per_second_sample": 10.0, "train_seconds": 1.0},
        **{"params_prior": 2_340_000, "gfid_vgg16_real": 1.0, "gfid_vgg16_shuffled": 99.0},
        **{"recall_vgg16_real": 0.75, "coded_bits_per_token_independent": 4.25},
    }  # fmt: skip
    config = {"tokenizer": tokenizer, "prior": name, "seed": seed}
    return SimpleNamespace(config=lambda: config, metrics=lambda: usual | metrics)


def cells(runs: list) -> list[list[str]]:
    table = prior.result_table(runs)
    return [list(line) for line in zip(*(column.cells for column in table.columns), strict=True)]


def test_the_best_prior_over_one_tokenizers_codes_is_bold_in_the_metrics_own_direction():
    runs = [
        row("a", "rnn", coded_bits_per_token=2.0, precision_vgg16=0.25, images_per_second_sample=5.0),
        row("a", "mamba", 1, coded_bits_per_token=4.0, precision_vgg16=0.75, copy_rate=0.4),
        row("b", "rnn", coded_bits_per_token=1.0, precision_vgg16=0.9),
    ]
    table = cells(runs)
    assert [line[0] for line in table] == [
        *("[italic]a[/]", "rnn 0", "mamba 1", "real codes", "shuffled codes"),
        *("[italic]b[/]", "rnn 0", "real codes", "shuffled codes"),
    ]
    names = [name for name in prior.COLUMNS if name != "gfid"]  # which these runs do not have
    first, second, other = (
        {name: line[2 + at] for at, name in enumerate(names)} for line in (table[1], table[2], table[6])
    )
    assert first["coded_bits_per_token"] == "[bold]2.000[/]"
    assert second["coded_bits_per_token"] == "4.000"
    assert (first["precision_vgg16"], second["precision_vgg16"]) == ("0.25", "[bold]0.75[/]")
    assert (first["images_per_second_sample"], second["images_per_second_sample"]) == ("5", "[bold]10[/]")
    assert "bold" not in first["copy_rate"] + second["copy_rate"]  # neither few nor many are better
    assert not any("bold" in cell for cell in other.values())  # it has no rival
    assert table[1][1] == "2.34"


def test_the_table_has_the_columns_that_all_runs_have_and_no_number_of_parameters_where_there_are_none():
    first, second = row("a", "rnn", gfid=7.0), row("a", "independent", params_prior=0)
    for runs in ([first, second], [second, first]):
        lines = {line[0]: line for line in cells(runs)}
        assert {len(line) for line in lines.values()} == {1 + len(prior.COLUMNS)}  # all but gfid, and two of its own
        assert (lines["rnn 0"][1], lines["independent 0"][1]) == ("2.34", "–")


def test_a_name_that_is_no_tokenizers_is_answered_with_those_there_are(world, tmp_path, monkeypatch):
    """Eight finished ones at most; a prior is told from a run that is not there, and what is found has a whole path."""
    made = world.run()
    world.tokenizer.write("config.json", {"config": {}, "environment": {}})
    monkeypatch.chdir(tmp_path.parent)
    results = Path(tmp_path.name)
    assert find_tokenizer(NAME, results).folder == tmp_path / "runs" / NAME
    for number in range(8):
        other = Run(tmp_path / "runs" / f"{NAME}-{number}")
        other.folder.mkdir()
        other.write("config.json", {"config": {}, "environment": {}})
        if number:
            other.write("metrics.json", least())
    names = ", ".join([NAME, *(f"{NAME}-{number}" for number in range(1, 8))])
    with pytest.raises(UserError, match=f"is the run of a prior; name that of a tokenizer: .* has {names}$"):
        find_tokenizer(str(made.folder), results)
    with pytest.raises(UserError, match=r"^unknown run 'nothing'; below .* there are .*, \.\.\.$"):
        find_tokenizer("nothing", results)


def test_references_stand_under_their_own_columns():
    table = cells([row("a", "rnn", 0)])
    names = [name for name in prior.COLUMNS if name != "gfid"]
    real, shuffled = ({name: line[2 + at] for at, name in enumerate(names)} for line in table[1:])
    assert {name: cell for name, cell in real.items() if cell != "–"} == {"gfid_vgg16": "1.0", "recall_vgg16": "0.75"}
    assert {name: cell for name, cell in shuffled.items() if cell != "–"} == {"gfid_vgg16": "99.0"}


def test_the_line_below_the_table_tells_how_it_was_measured(world):
    run = world.run(temperature=0.7, top_k=5, samples=6)
    metrics = run.metrics() | {"nearest_val_psnr": 18.5, "sampling_speedup": 7.25}
    line = prior.protocol_line(SimpleNamespace(protocol=run.protocol, metrics=lambda: metrics, config=run.config))
    for words in (
        f"Protocol {PRIOR_VERSION}: toy split",
        "codes of all 12 test images, where independent codes take 3.50 per token",
        "6 samples (temperature 0.7, top 5) against those images at 8×8",
        "median PSNR 20.0 dB, of those 18.5",
        "is 7.2 times as fast",
    ):
        assert words in line


# -- what strangers' folders may hold ---------------------------------------------------------------------------------


def changed(run: Run, **settings) -> None:
    """Writes other ``settings`` into the config.json of ``run``."""
    content = json.loads((run.folder / "config.json").read_text())
    del content["sha256"]  # as older versions wrote it
    content["config"] |= settings
    run.write("config.json", content)


def test_a_prior_with_damaged_settings_lends_nothing_and_is_in_nobody_s_way(world):
    changed(world.run(), steps="3")
    assert world.run(temperature=0.5).finished
    assert len(world.trained) == 2


def test_a_damaged_prior_is_not_trained_over(world, monkeypatch):
    """It is told at once, before data are loaded and encoded."""
    run = world.run()
    monkeypatch.setattr(prior_trial, "load_data", None)
    (run.folder / "metrics.json").write_text("{")
    with pytest.raises(UserError, match=r"metrics\.json is damaged: "):
        world.run()
    with pytest.raises(UserError, match=r"metrics\.json is damaged: "):
        Prior.from_run(run.folder)
    assert len(world.trained) == 1


@pytest.mark.parametrize("name", ["prior.safetensors", "history.jsonl"])
def test_a_prior_with_damaged_files_is_named_before_anything_is_written(world, name):
    """By who asks for it again, if it is the weights, and by who would be lent them."""
    path = world.run().folder / name
    path.write_bytes(flipped(path.read_bytes()))
    for settings in ({"temperature": 0.5}, {})[: 1 + (name == "prior.safetensors")]:
        with pytest.raises(UserError) as error:
            world.run(**settings)
        assert str(error.value).startswith(f"{path} ")
        assert "its digest is that of " in str(error.value)
    assert len(world.store.priors()) == 1
    path.unlink()
    path.parent.rename(world.store.root / "moved")
    assert world.run(temperature=0.5).finished


def test_a_tokenizer_whose_weights_are_damaged_is_named_and_not_taken_for_another(world):
    run, path = world.run(), world.tokenizer.folder / "tokenizer.safetensors"
    complete(world.tokenizer, **least())
    path.write_bytes(flipped(path.read_bytes()))
    for settings in ({}, {"seed": 1}):
        with pytest.raises(UserError) as error:
            world.run(**settings)
        reason = "its digest is that of other weights"
        assert str(error.value) == f"{path} does not hold the weights of this run ({reason}); move that folder"
    assert world.store.priors() == [run]


def flipped(whole: bytes) -> bytes:
    """``whole`` with a bit of its last byte but one flipped."""
    return whole[:-2] + bytes([whole[-2] ^ 1]) + whole[-1:]


def test_a_prior_that_cannot_be_is_refused_before_it_is_built(world, monkeypatch):
    """Its settings are checked on the device that it shall go to, and its size against the memory there."""
    run, asked = world.run(), []
    monkeypatch.setattr("bench.core.device.check_memory", None)
    monkeypatch.setattr("bench.priors.models.prior.check_memory", lambda *given: asked.append(given))
    Prior.from_run(run.folder)
    assert asked == [(20_000 + K * SIDE**2, "cpu")]
    with pytest.raises(UserError, match="device 'cuda:77' is not available"):
        Prior.from_run(run.folder, "cuda:77")
    changed(run, prior="lstm")
    with pytest.raises(UserError, match="unknown prior 'lstm'"):
        Prior.from_run(run.folder)


def test_codes_that_are_not_there_cannot_be_left_out(world):
    """Of K codes or more the likeliest K are all: another run with the same samples."""
    for top_k in (K, K + 1):
        with pytest.raises(UserError, match=f"top_k is {top_k}, of {K} codes; take fewer, or 0 for all"):
            world.run(top_k=top_k)
    assert world.trained == []


@pytest.mark.parametrize("how", ["gone", "a pipe", "a folder"])
def test_a_prior_that_has_lost_its_weights_is_named_by_who_asks_for_it_again(world, how):
    run = world.run()
    path = run.folder / "prior.safetensors"
    path.unlink()
    if how == "a pipe":
        os.mkfifo(path)
    elif how == "a folder":
        path.mkdir()
    words = "is gone" if how == "gone" else "is no file"
    with pytest.raises(UserError, match=f"{path} {words}, and the run was scored with its weights; move that folder"):
        world.run()
