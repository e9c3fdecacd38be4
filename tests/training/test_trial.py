"""Around the training of either kind: who holds the folder, which ends are recorded, and what is whole or not there."""

import json

import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file
from torch import nn

from bench.core.errors import Diverged, Interrupted, UserError
from bench.core.runs import Busy, Run
from bench.training import trial
from bench.training.trial import begun, complete
from bench.training.weights import read_weights, write_weights
from tests.fabricate import least


@pytest.fixture
def run(tmp_path, monkeypatch) -> Run:
    """A run whose folder does not exist yet."""
    monkeypatch.setattr(trial, "environment", lambda: {"threads": 3})
    return Run(tmp_path / "runs" / "one")


def test_a_run_is_held_from_its_config_to_its_end(run):
    """Who comes second changes nothing in the folder; who comes after the end may begin."""
    with begun(run, {"config": {"beta": 1}, "codes": {}}):
        stored = json.loads((run.folder / "config.json").read_text())
        assert len(stored.pop("sha256")) == 64
        assert stored == {"config": {"beta": 1}, "codes": {}, "environment": {"threads": 3}, "run": run.folder.name}
        run.fail("crashed", "by the first")
        with pytest.raises(Busy), begun(run, {"config": {"beta": 2}}):
            pass
        assert run.config() == {"beta": 1}
        assert run.reason == "by the first"
    with begun(run, {"config": {"beta": 2}}):
        assert run.status == "unfinished"
    assert run.config() == {"beta": 2}


@pytest.mark.parametrize(
    ("raised", "status"),
    [(Diverged("too steep"), "diverged"), (Interrupted("by hand"), "unfinished"), (ZeroDivisionError(), "unfinished")],
)
def test_only_what_diverged_is_recorded_as_failed(run, raised, status):
    """A run that was stopped goes on; either way the folder is free again."""
    with pytest.raises(type(raised)), begun(run, {"config": {}}):
        raise raised
    assert run.status == status
    assert (run.folder / "failure.json").exists() == (status == "diverged")
    with run.locked():
        pass


def test_weights_are_written_whole_or_not_at_all(run, monkeypatch):
    run.folder.mkdir(parents=True)
    model = nn.Linear(2, 3)
    write_weights(run, "prior.safetensors", model)
    before = (run.folder / "prior.safetensors").read_bytes()
    assert load_file(run.folder / "prior.safetensors")["weight"].equal(model.weight)

    def fail(model: nn.Module, name: str) -> None:
        with open(name, "wb") as file:
            file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(safetensors.torch, "save_model", fail)
    with pytest.raises(OSError, match="disk full"):
        write_weights(run, "prior.safetensors", nn.Linear(2, 3))
    assert (run.folder / "prior.safetensors").read_bytes() == before
    assert [path.name for path in run.folder.iterdir()] == ["prior.safetensors"]


def test_weights_that_do_not_fit_are_refused_with_the_file_and_the_reason(run):
    """Of another model, or of none."""
    run.folder.mkdir(parents=True)
    path = run.folder / "prior.safetensors"
    write_weights(run, path.name, nn.Linear(2, 3))
    with pytest.raises(UserError) as error:
        read_weights(run, path.name, nn.Linear(4, 3))
    reason = "weight is (3, 2) and should be (3, 4)"
    assert str(error.value) == f"{path} does not hold the weights of this run ({reason}); move that folder"
    path.unlink()
    with pytest.raises(UserError, match=r"does not hold the weights of this run \(No such file"):
        read_weights(run, path.name, nn.Linear(2, 3))


def test_a_run_without_scores_keeps_its_checkpoint(run):
    """Scores that JSON has not are no scores; with them it is done, also where there is no checkpoint."""
    run.folder.mkdir(parents=True)
    torch.save({}, run.folder / "checkpoint.pt")
    with pytest.raises(ValueError, match="nan"):
        complete(run, {"psnr": float("nan")}, {})
    assert (run.folder / "checkpoint.pt").exists()
    assert not run.finished
    for _ in range(2):
        complete(run, **least(psnr=20.0))
        assert run.metrics() == {**least(psnr=20.0)["metrics"], "params": 2, "flops": 2}
        assert run.protocol() == {"scored_on": "val", **least()["protocol"]}
        assert [path.name for path in run.folder.iterdir()] == ["metrics.json"]


MADE = {"commit": "a", "python": "3.11", "versions": {"torch": "2.13", "timm": "1.0"}, "threads": 3}


def test_a_run_that_goes_on_elsewhere_keeps_its_earlier_environments(run, monkeypatch, capsys):
    """The present one is that of the run; who resumes under other code is warned, since numbers may follow it."""
    for changes, said in (
        ({}, []),
        ({}, []),
        ({"threads": 1}, []),
        ({"threads": 1, "commit": "b"}, ["one goes on under another commit: a before, b now"]),
        (
            {"threads": 1, "commit": "b", "versions": {"torch": "2.14", "timm": "1.0"}},
            ["one goes on under other versions: torch 2.13 before, 2.14 now"],
        ),
    ):
        monkeypatch.setattr(trial, "environment", lambda changes=changes: MADE | changes)
        with begun(run, {"config": {}}):
            (run.folder / "checkpoint.pt").touch()
        assert capsys.readouterr().err.splitlines() == said
    assert run.environment() == MADE | changes
    threads = [made["threads"] for made in run.environments()]
    assert threads == [3, 1, 1, 1]
    assert [made["commit"] for made in run.environments()] == ["a", "a", "b", "b"]
    monkeypatch.setattr(trial, "environment", lambda: MADE)
    with begun(run, {"config": {}}, resume=False):
        pass
    assert run.environments() == [MADE]  # it starts again, and nothing in it is older
    (run.folder / "checkpoint.pt").unlink()
    monkeypatch.setattr(trial, "environment", lambda: MADE | {"commit": "c"})
    with begun(run, {"config": {}}):
        pass
    assert run.environments() == [MADE | {"commit": "c"}]


def test_what_a_killed_process_left_half_written_is_removed_by_the_next(run):
    run.folder.mkdir(parents=True)
    left = run.folder / ".part-checkpoint-x.pt"
    left.touch()
    with begun(run, {"config": {}}):
        assert not left.exists()


@pytest.mark.parametrize("name", ["config.json", "metrics.json", "failure.json"])
def test_a_damaged_run_is_not_begun_before_somebody_has_looked(run, name):
    run.folder.mkdir(parents=True)
    (run.folder / name).write_text("{")
    with pytest.raises(UserError) as error, begun(run, {"config": {}}):
        pass
    assert str(error.value).startswith(f"{run.folder / name} is damaged: ")
    assert (run.folder / name).read_text() == "{"


def test_a_run_that_goes_on_twice_in_one_place_tells_of_that_place_once(run, monkeypatch, capsys):
    for commit in ("a", "b", "b", "b"):
        monkeypatch.setattr(trial, "environment", lambda commit=commit: MADE | {"commit": commit})
        with begun(run, {"config": {}}):
            (run.folder / "checkpoint.pt").touch()
    assert [made["commit"] for made in run.environments()] == ["a", "b"]
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_weights_that_changed_after_they_were_scored_are_refused(run):
    """A flipped bit gives other scores; runs of older versions have no digest and are read."""
    run.folder.mkdir(parents=True)
    model = nn.Linear(2, 3)
    write_weights(run, "prior.safetensors", model)
    complete(run, {"psnr": 20.0}, {"count": 64})
    read_weights(run, "prior.safetensors", nn.Linear(2, 3))
    path = run.folder / "prior.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(
        UserError, match=r"does not hold the weights of this run \(its digest is that of other weights\)"
    ):
        read_weights(run, "prior.safetensors", nn.Linear(2, 3))
    run.write("metrics.json", {"metrics": {}, "protocol": {}})
    read_weights(run, "prior.safetensors", nn.Linear(2, 3))
