"""The run store: a run is what its files say, and no writer loses what another has written."""

import contextlib
import json
import threading
from pathlib import Path

import numpy as np
import pytest

from bench.core.errors import UserError
from bench.core.store import FAILURES, Busy, NoSpace, Run, Store
from bench.priors.config import PriorConfig
from bench.tokenizers.config import make_config

HEADER = {"kind": "ablation", "sweep": ["beta"], "metrics": ["psnr"]}
METRICS = {
    **{"params_encoder": 3, "params_decoder": 4, "flops_encode": 50, "flops_decode": 60},
    **{"psnr": 20.0, "train_seconds": 9.0},
}


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path)


@pytest.fixture
def run(store) -> Run:
    """A run that was started."""
    started = store.run(make_config("cnn", "smoke"))
    started.folder.mkdir(parents=True)
    started.write("config.json", {"config": {"beta": 0.5}, "environment": {"threads": 2}})
    return started


def test_metrics_mean_finished_and_nothing_else_does(run):
    """A failure that was recorded before counts no more; one that was forgiven leaves the run unfinished."""
    assert (run.status, run.reason, run.finished) == ("unfinished", "", False)
    for status in FAILURES:
        run.fail(status, f"it {status}")
        assert (run.status, run.reason, run.finished) == (status, f"it {status}", False)
    run.forgive()
    assert (run.status, run.reason) == ("unfinished", "")
    run.forgive()  # and again is no error
    run.fail("crashed", "a signal")
    run.write("metrics.json", {"metrics": METRICS, "protocol": {"count": 64}})
    assert (run.status, run.reason, run.finished) == ("finished", "", True)


def test_a_tokenizers_costs_are_those_of_both_sides(run):
    run.write("metrics.json", {"metrics": METRICS, "protocol": {"count": 64}})
    metrics = run.metrics()
    assert (metrics["params"], metrics["flops"]) == (7, 110)
    assert {name: metrics[name] for name in METRICS} == METRICS
    assert run.protocol() == {"count": 64}
    assert (run.config(), run.environment()) == ({"beta": 0.5}, {"threads": 2})
    run.write("metrics.json", {"metrics": {"gfid": 9.0}, "protocol": {}})  # a prior's
    assert run.metrics() == {"gfid": 9.0}


def test_a_line_that_is_being_written_is_no_history_yet(run):
    rows = [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25}]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    for torn in ("", '{"step": 3', '{"step": 3, "loss": 0.1}'):
        (run.folder / "history.jsonl").write_text(text + torn)
        assert run.history() == rows


def test_a_failing_write_leaves_the_file_as_it_was(run):
    """Numbers that JSON has not, such as nan, are refused rather than written."""
    run.write("metrics.json", {"metrics": METRICS, "protocol": {}})
    for value in (float("nan"), float("inf"), object()):
        with pytest.raises((ValueError, TypeError)):
            run.write("metrics.json", {"metrics": {"psnr": value}, "protocol": {}})
    assert run.metrics()["psnr"] == 20.0
    assert [path.name for path in run.folder.iterdir() if path.name.startswith(".")] == []


def test_only_one_has_a_run_and_an_error_gives_it_free(run):
    with run.locked(), pytest.raises(Busy, match="another process"), Run(run.folder).locked():
        pass
    with pytest.raises(ZeroDivisionError), run.locked():
        1 / 0  # noqa: B018
    with Run(run.folder).locked():
        pass


def test_tokenizers_and_priors_have_folders_of_their_own(store):
    config = make_config("cnn", "smoke")
    prior = PriorConfig(config.run_id(), "rnn")
    assert store.run(config).folder == store.named(config.run_id()).folder == store.root / "runs" / config.run_id()
    assert store.run(prior).folder == store.root / "priors" / prior.run_id()
    for one in (config, prior):
        store.run(one).folder.mkdir(parents=True)
    assert store.runs() == store.priors() == []  # without a config.json they were not started
    for one in (config, prior):
        store.run(one).write("config.json", {"config": {}, "environment": {}})
    for folder in ("runs", "priors"):
        (store.root / folder / "alien").mkdir()
        (store.root / folder / "alien" / "config.json").write_text('{"config": {}}')
    assert store.runs() == [store.run(config)]
    assert store.priors() == [store.run(prior)]


def test_scores_per_image_that_are_not_there_are_none(run):
    assert run.per_image() == {}
    path = run.folder / "per_image.npz"
    np.savez_compressed(path, psnr=np.arange(100.0))
    assert list(run.per_image()["psnr"]) == list(range(100))
    whole = path.read_bytes()
    for damage in (b"", b"noise", whole[:-30], whole[:100] + b"\xff" * 20 + whole[120:]):
        path.write_bytes(damage)
        assert run.per_image() == {}


# -- studies ----------------------------------------------------------------------------------------------------------


def test_a_study_only_grows(store):
    """What is there already stays; what is given again is replaced; the header is the newest."""
    store.extend_study("beta", HEADER, {"a": {"beta": 1}, "b": {"beta": 2}})
    store.extend_study("beta", HEADER | {"metrics": ["fid"]}, {"b": {"beta": 3}, "c": {"beta": 4}})
    found = store.study("beta")
    assert found["runs"] == {"a": {"beta": 1}, "b": {"beta": 3}, "c": {"beta": 4}}
    assert (found["name"], found["kind"], found["metrics"]) == ("beta", "ablation", ["fid"])
    store.extend_study("alpha", HEADER, {})
    assert store.studies() == ["alpha", "beta"]
    with pytest.raises(UserError, match=r"no study 'gamma' .* known studies: alpha, beta"):
        store.study("gamma")


def test_a_study_has_its_priors_beside_its_runs(store):
    """If it has any; each grows by itself."""
    store.extend_study("beta", HEADER, {"a": {"beta": 1}})
    assert "priors" not in store.study("beta")
    store.extend_study("beta", HEADER, {"p": {"prior": "rnn"}}, "priors")
    store.extend_study("beta", HEADER, {"b": {"beta": 2}})
    found = store.study("beta")
    assert (found["runs"], found["priors"]) == ({"a": {"beta": 1}, "b": {"beta": 2}}, {"p": {"prior": "rnn"}})
    assert store.named("p", "priors").folder == store.root / "priors" / "p"


def test_two_that_extend_a_study_at_once_lose_nothing(tmp_path):
    """Each waits, once it has read, until the other has read as well: without the lock both would write what they
    read then, and one of them would lose."""
    both_have_read = threading.Barrier(2)

    class Slow(Store):
        def study(self, name):
            found = super().study(name)
            with contextlib.suppress(threading.BrokenBarrierError):
                both_have_read.wait(0.3)
            return found

    Store(tmp_path).extend_study("beta", HEADER, {"first": {}})
    writers = [threading.Thread(target=Slow(tmp_path).extend_study, args=("beta", HEADER, {name: {}})) for name in "ab"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert set(Store(tmp_path).study("beta")["runs"]) == {"first", "a", "b"}


def test_a_kill_in_the_middle_of_a_write_leaves_the_study_whole(store, monkeypatch):
    store.extend_study("beta", HEADER, {"a": {}})

    def torn(self, text, **options):
        with open(self, "w") as file:
            file.write(text[: len(text) // 2])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", torn)
        with pytest.raises(KeyboardInterrupt):
            store.extend_study("beta", HEADER, {"b": {}})
    assert store.study("beta")["runs"] == {"a": {}}
    assert store.studies() == ["beta"]
    store.extend_study("beta", HEADER, {"b": {}})  # and the lock was given free
    assert set(store.study("beta")["runs"]) == {"a", "b"}


# -- room -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("free", "enough"), [(100, True), (99, False)])
def test_a_run_needs_so_many_megabytes(store, monkeypatch, free, enough):
    usage = type("Usage", (), {"free": free << 20})
    monkeypatch.setattr("bench.core.store.shutil.disk_usage", lambda folder: usage)
    if enough:
        store.check_writable(100)
    else:
        with pytest.raises(NoSpace, match="99 MB free and the run needs 100"):
            store.check_writable(100)


def test_a_place_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(NoSpace, match="--results"):
        Store(tmp_path).check_writable(0)
