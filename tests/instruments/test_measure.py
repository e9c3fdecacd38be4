"""What instruments find lies beside a run, changes nothing about it, and can be added at any time."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bench import run as command
from bench.analysis import frames
from bench.analysis.rankings import instruments as sheet_of
from bench.analysis.report import contents, markdown, select
from bench.core.errors import Damaged, UserError
from bench.core.files import sha256_file
from bench.core.runs import Run
from bench.core.store import Store
from bench.instruments import GROUPS, INSTRUMENTS, METRICS, choose, readings
from bench.tokenizers import measure, trial
from bench.tokenizers.config import make_config
from bench.tokenizers.measure import fit, subject_of
from bench.tokenizers.tokenizer import Tokenizer
from bench.tokenizers.trial import run_trial
from tests.commands import TINY
from tests.fabricate import fabricate

TWO = ("robustness", "equivariance")


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "results")


@pytest.fixture
def untrained(tiny, store, trial_data, monkeypatch) -> Run:
    """A finished run of fabricated scores and random weights; whatever would train it fails."""
    run = fabricate(store, tiny, fingerprint=trial_data.fingerprint)
    torch.manual_seed(0)
    tokenizer = Tokenizer(tiny)
    tokenizer.quantizer.initialise(tokenizer.encoder(torch.rand(8, 3, 32, 32) * 2 - 1))
    trial.write_weights(run, "tokenizer.safetensors", tokenizer)
    monkeypatch.setattr(trial, "train", None)
    return run


def fake(run: Run, **metrics: float) -> None:
    """An instruments.json as if robustness had found ``metrics``."""
    reading = {"version": INSTRUMENTS["robustness"].version, "seconds": 1.0, "weights": "w", "metrics": metrics}
    run.seal("instruments.json", {"instruments": {"robustness": reading}})


def test_a_finished_run_gets_what_it_lacks_and_keeps_what_it_has(untrained, tiny, store, trial_data):
    before = {path.name: path.read_bytes() for path in untrained.folder.iterdir()}
    assert untrained.instruments() == {}
    assert run_trial(tiny, store, instruments=TWO) == untrained
    found = untrained.instruments()
    assert {*found} == {*TWO}
    assert {name: path for name, path in before.items() if (untrained.folder / name).read_bytes() != path} == {}
    for name, reading in found.items():
        assert {*reading["metrics"]} == {*INSTRUMENTS[name].metrics}
        assert reading["seconds"] >= 0
        assert reading["weights"] == sha256_file(untrained.folder / "tokenizer.safetensors")
    run_trial(tiny, store, instruments=("all",))
    more = untrained.instruments()
    assert {name: more[name] for name in TWO} == found  # the seconds, too: they did not look again
    assert "atlas" in more
    assert (untrained.folder / "atlas.png").is_file()
    expected = INSTRUMENTS["robustness"].measure(subject_of(Tokenizer.from_run(untrained.folder), trial_data))
    assert found["robustness"]["metrics"] == expected.metrics


def test_a_run_that_is_trained_is_looked_at_as_well(tiny, store, trial_data):
    run = run_trial(replace(tiny, steps=2), store, instruments=("equivariance",))
    assert {*run.instruments()} == {"equivariance"}
    assert run_trial(replace(tiny, steps=2, seed=1), store).instruments() == {}


def test_columns_are_those_of_the_present_versions_and_weights(untrained, monkeypatch):
    fake(untrained, loss_random=1.5, of_another_version=3.0)
    row = frames.frame([untrained]).iloc[0]
    assert row.loss_random == 1.5
    assert np.isnan(row.loss_near)
    assert "of_another_version" not in row
    scored = json.loads((untrained.folder / "metrics.json").read_text())
    untrained.write("metrics.json", {**scored, "weights": {"tokenizer.safetensors": "w"}})
    assert readings(untrained) == {"loss_random": 1.5}
    untrained.write("metrics.json", {**scored, "weights": {"tokenizer.safetensors": "others"}})
    assert readings(untrained) == {}
    untrained.write("metrics.json", scored)
    monkeypatch.setitem(INSTRUMENTS, "robustness", INSTRUMENTS["robustness"]._replace(version=99))
    assert readings(untrained) == {}


@pytest.mark.parametrize("how", ["flipped", "emptied", "a list", "no metrics", "no digest", "no number", "beyond use"])
def test_damage_is_named_and_the_run_is_reported_all_the_same(untrained, tiny, store, how, capsys):
    fake(untrained, loss_random=1.5)
    path = untrained.folder / "instruments.json"
    whole = json.loads(path.read_text())["instruments"]["robustness"]
    if how == "flipped":
        path.write_text(path.read_text().replace("1.5", "3.5"))
    elif how == "emptied":
        path.write_text("")
    elif how == "a list":
        untrained.seal("instruments.json", {"instruments": {"robustness": []}})
    else:
        change = {
            "no metrics": {"metrics": None},
            "no digest": {"weights": None},
            "no number": {"metrics": {"loss_random": True}},
            "beyond use": {"metrics": {"loss_random": 1e308}},
        }[how]
        untrained.seal("instruments.json", {"instruments": {"robustness": {**whole, **change}}})
    with pytest.raises(Damaged, match=r"instruments\.json is damaged: "):
        untrained.instruments()
    table, damaged = frames.read([untrained])
    assert len(damaged) == 1
    assert str(path) in damaged[0]
    assert table.status.item() == "finished"
    assert table.psnr.item() == untrained.metrics()["psnr"]
    assert np.isnan(table.loss_random.item())
    run_trial(tiny, store, instruments=("robustness",))
    assert "instruments.json is damaged" in capsys.readouterr().err
    assert frames.read([untrained])[1] == []
    assert {*readings(untrained)} == {*INSTRUMENTS["robustness"].metrics}


def test_words_mean_instruments():
    assert choose(["robustness", "atlas"]) == {"robustness": True, "atlas": True}
    assert choose(["atlas", "robustness"]) == choose(["robustness", "atlas"])
    assert choose(["all"]) == dict.fromkeys(INSTRUMENTS, False)
    assert choose(["all", "probes"])["probes"] is True
    assert choose(["none"]) == choose([]) == {}
    assert {*choose(["cheap"])} == {*GROUPS["cheap"]} < {*INSTRUMENTS}
    with pytest.raises(UserError, match=r"^unknown instrument 'x-ray'; choose from robustness, .* none$"):
        choose(["atlas", "x-ray"])


def test_every_instrument_gives_the_metrics_that_it_lists_and_shows_some_of_them(tiny, images):
    labels = tuple(np.arange(len(part)) % 3 for part in (images.train, images.val, images.test))
    subject = subject_of(Tokenizer(tiny).eval(), replace(images, labels=labels, classes=("a", "b", "c")))
    subject = replace(subject, at=lambda size: np.repeat(np.repeat(images.test, 2, 1), 2, 2)[:, :size, :size])
    for name, each in INSTRUMENTS.items():
        assert each.unfit(subject) == "", name
        assert {*each.measure(subject).metrics} == {*each.metrics}, name
        assert {*each.shown} <= {*each.metrics}
        assert each.about
        assert each.seconds > 0
    assert len(METRICS) == sum(len(each.metrics) for each in INSTRUMENTS.values())


def test_what_cannot_look_is_refused_by_name_and_left_out_of_a_group(tiny, images, capsys):
    subject = subject_of(Tokenizer(tiny).eval(), images)
    with pytest.raises(UserError, match=r"^instrument probes: the data have no labels; give images in a folder per cl"):
        fit(subject, {"probes": True})
    assert fit(subject, {"robustness": False, "probes": False}) == ["robustness"]
    assert "instrument probes is left out: the data have no labels" in capsys.readouterr().err


@pytest.mark.parametrize("words", [("probes",), ("robustness", "x-ray")])
def test_it_is_refused_before_any_training(tiny, store, trial_data, monkeypatch, words):
    monkeypatch.setattr(trial, "train", None)
    with pytest.raises(UserError, match="instrument"):
        run_trial(tiny, store, instruments=words)
    assert not store.run(tiny).folder.exists()


def test_codes_are_needed_where_codes_are_looked_at(tiny, images):
    tokenizer = Tokenizer(tiny).eval()
    subject = subject_of(tokenizer, replace(images, labels=(np.zeros(48, int), np.zeros(24, int), np.zeros(24, int))))
    subject = replace(subject, codec=SimpleNamespace(encode=tokenizer.encoder, decode=tokenizer.decoder))
    for name in ("robustness", "atlas", "probes"):
        assert "numbers and no codes" in INSTRUMENTS[name].unfit(subject)
    assert INSTRUMENTS["equivariance"].unfit(subject) == ""


def test_a_size_that_the_backbone_cannot_take_is_refused(tiny, images, monkeypatch):
    def at(size):
        raise UserError(f"no images of {size}")

    subject = replace(subject_of(Tokenizer(replace(tiny, grid_size=1)).eval(), images), at=lambda size: images.test)
    assert INSTRUMENTS["sizes"].unfit(subject).startswith("this backbone and grid take no images of 48×48 (")
    subject = replace(subject_of(Tokenizer(tiny).eval(), images), at=at)
    assert INSTRUMENTS["sizes"].unfit(subject) == "no images of 48"


def test_the_command_line_shows_them_and_refuses_others(trial_data, tmp_path, capsys, monkeypatch):
    arguments = ["--backbone", "cnn", *TINY, "--results", str(tmp_path / "results")]
    assert command.main([*arguments, "--instruments", "x-ray"]) == 2
    assert "unknown instrument 'x-ray'" in capsys.readouterr().err
    assert command.main([*arguments, "--instruments", "equivariance"]) == 0
    printed = capsys.readouterr()
    assert "instrument equivariance: " in printed.err
    assert "What instruments found" in printed.out
    for metric in INSTRUMENTS["equivariance"].metrics.values():
        assert metric.label in printed.out
    monkeypatch.setattr(trial, "measure", lambda run, data, words: asked.append(tuple(words)))
    asked: list[tuple] = []
    for more in ((), ("--instruments", "all"), ("--seeds", "1")):
        assert command.main([*arguments, *more]) == 0
    assert asked == [(), ("all",), ("cheap",)]


def test_the_command_line_shows_each_metric_in_its_row(store):
    for backbone, loss in {"cnn": 1.0, "vit": 4.0}.items():
        fake(fabricate(store, make_config(backbone, "smoke"), -loss), loss_random=loss, loss_near=0.5)
    (table,) = command.instrument_tables(store.runs())
    cells = [list(column.cells) for column in table.columns]
    assert [column.header for column in table.columns] == ["", "cnn", "vit"]
    label = METRICS["loss_random"].label + "\u00a0↓"
    assert cells[0][:2] == ["seeds", label]
    assert [column[1] for column in cells[1:]] == [
        "1.00",
        "4.00",
    ]  # none is marked: the worse tokenizer may have less to lose


def test_reports_have_means_over_seeds(store):
    for backbone, losses in {"cnn": (1.0, 2.0), "vit": (4.0, 6.0)}.items():
        for seed, loss in enumerate(losses):
            fake(fabricate(store, make_config(backbone, "smoke", seed=seed)), loss_random=loss, loss_near=0.5)
    fabricate(store, make_config("mamba", "smoke"))  # which none has looked at
    table = frames.frame(store.runs())
    (block,) = frames.blocks(table)
    sheet = sheet_of(block)
    assert sheet.keys == ["backbone", "n", "loss_random", "loss_near"]
    rows = {row[0].text: [cell.text for cell in row[1:]] for row in sheet.rows}
    assert rows == {"cnn": ["2", "1.50", "0.50"], "vit": ["2", "5.00", "0.50"]}
    assert [row[2].best for row in sheet.rows if row[0].text == "cnn"] == [False]
    text = markdown(contents(select([], store.root), table, frames.frame([], frames.PRIOR)))
    assert "### Instruments" in text
    assert INSTRUMENTS["robustness"].about in text
    assert sheet_of(block.assign(loss_random=np.nan, loss_near=np.nan)).rows == []


def test_instruments_look_with_the_images_that_runs_are_scored_on_at_any_size(tiny, images, monkeypatch):
    asked = []
    monkeypatch.setattr(measure, "load", lambda data, size: asked.append((data, size)) or images)
    subject = subject_of(Tokenizer(tiny), images)
    assert subject.images is images.test
    assert subject.train is images.train
    assert subject.at(48) is images.test
    assert asked == [(tiny.data, 48)]
