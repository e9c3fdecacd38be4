"""The run store: a run is what its files say, and no writer loses what another has written."""

import contextlib
import json
import os
import re
import shutil
import threading
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from bench import study
from bench.core.errors import Damaged, UserError
from bench.core.runs import FAILURES, NUMBERS, SCORED, TOLD, Busy, NoSpace, Run, check_whole
from bench.core.store import Store, find_tokenizer, known_tokenizers
from bench.priors.config import PriorConfig
from bench.tokenizers.config import Config, make_config
from tests.disturbed import flips
from tests.fabricate import fabricate, least

HEADER = {"kind": "ablation", "sweep": ["beta"], "metrics": ["psnr"]}
WHOLE = least(params_encoder=3, params_decoder=4, flops_encode=50, flops_decode=60, psnr=20.0, train_seconds=9.0)
METRICS, PROTOCOL = WHOLE["metrics"], WHOLE["protocol"]


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
    run.write("metrics.json", WHOLE)
    assert (run.status, run.reason, run.finished) == ("finished", "", True)


def test_a_tokenizers_costs_are_those_of_both_sides(run):
    run.write("metrics.json", WHOLE)
    metrics = run.metrics()
    assert (metrics["params"], metrics["flops"]) == (7, 110)
    assert {name: metrics[name] for name in METRICS} == METRICS
    assert run.protocol() == {"scored_on": "val", **PROTOCOL}  # as versions were that did not say so
    assert (run.config(), run.environment()) == ({"beta": 0.5}, {"threads": 2})


def test_a_line_that_is_being_written_is_no_history_yet(run):
    rows = [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25}]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    for torn in ("", '{"step": 3', '{"step": 3, "loss": 0.1}'):
        (run.folder / "history.jsonl").write_text(text + torn)
        assert run.history() == rows


def test_a_failing_write_leaves_the_file_as_it_was(run):
    """Numbers that JSON has not, such as nan, are refused rather than written."""
    run.write("metrics.json", WHOLE)
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
    assert store.runs() == [store.run(config)]
    assert store.priors() == [store.run(prior)]


def test_scores_per_image_that_are_not_there_are_none(run):
    assert run.per_image() == {}
    run.write("metrics.json", least(protocol={"count": 100}, psnr=49.5))
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
    with pytest.raises(NoSpace) as error:
        Store(tmp_path).check_writable(0)
    assert str(error.value) == f"cannot write to {tmp_path / 'runs'}: File exists; choose another --results folder"
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(NoSpace, match=f"runs: {tmp_path / 'link'} is a link that leads nowhere; choose another"):
        Store(tmp_path / "link").check_writable(0)


def test_settings_that_a_run_was_made_without_have_their_default(tmp_path):
    """And those that are gone since are passed over: a store outlives its settings."""
    config = make_config("cnn", "smoke", beta=0.5)
    stored = {**asdict(config), "no_longer": 1}
    del stored["gan_ramp"]
    run = Run(tmp_path)
    run.write("config.json", {"config": stored, "environment": {}})
    assert run.settings(Config) == config


def test_a_lock_is_that_of_one_run(store):
    """Others of the same store stay free, a prior of the same name too."""
    runs = [store.named("a"), store.named("b"), Run(store.root / "priors" / "a")]
    for one in runs:
        one.folder.mkdir(parents=True)
    with runs[0].locked(), runs[1].locked(), runs[2].locked(), pytest.raises(Busy), Run(runs[0].folder).locked():
        pass


def test_metrics_of_older_runs_have_their_present_names(tmp_path):
    run = Run(tmp_path)
    run.write("metrics.json", {"metrics": {"copies": 0.25, "gfid_vgg16": 3.0}, "protocol": {}})
    assert run.metrics() == {"copy_rate": 0.25, "gfid_vgg16": 3.0}


# -- names ------------------------------------------------------------------------------------------------------------


def started(store: Store, *names: str) -> None:
    for name in names:
        store.named(name).folder.mkdir(parents=True)
        store.named(name).write("config.json", {"config": {}, "environment": {}})


def test_a_run_goes_by_its_folder_its_id_or_the_beginning_of_one_id(store, monkeypatch):
    """A whole id counts before the beginning of others; several, or none, are told with those that there are."""
    started(store, "vit-b", "cnn-a2", "cnn-a", "cnn-a1")
    store.named("cnn-a1").fail("diverged", "too steep")
    assert [run.folder.name for run in store.runs()] == ["cnn-a", "cnn-a1", "cnn-a2", "vit-b"]
    for name, meant in (("vit", "vit-b"), ("cnn-a", "cnn-a"), ("cnn-a2", "cnn-a2")):
        assert store.find(name) == store.named(meant)
    assert store.find(str(store.named("cnn-a1").folder)) == store.named("cnn-a1")
    with monkeypatch.context() as patch:
        patch.chdir(store.root / "runs")  # folders are looked for here first, not below the store
        assert store.find("./cnn-a1").folder.resolve() == store.named("cnn-a1").folder
    with pytest.raises(
        UserError, match=r"beginning of cnn-a \(\w+\), cnn-a1 \(diverged\), cnn-a2 \(unfin.*; give more of it$"
    ):
        store.find("cnn")
    for name in ("b", "a1"):  # a part of an id is not its beginning
        with pytest.raises(UserError) as error:
            store.find(name)
        known = "cnn-a, cnn-a1, cnn-a2, vit-b"
        assert str(error.value) == f"unknown run {name!r}; below {store.root / 'runs'} there are {known}"
    store.named("empty").folder.mkdir()
    for name in ("empty", str(store.named("empty").folder)):
        with pytest.raises(UserError, match=r"runs/empty has no config.json, so it is no run; name a folder like"):
            store.find(name)
    with pytest.raises(UserError, match=r"unknown run 'x'; below .* there are none$"):
        Store(store.root / "elsewhere").find("x")


def test_a_tokenizer_that_cannot_be_used_is_told_with_the_reason(store):
    started(store, "cnn-a")
    run = store.named("cnn-a")
    assert known_tokenizers(store.root) == f"{store.root} has none; train one with python -m bench.run"
    with pytest.raises(UserError, match=r"cnn-a is unfinished; finish it with python -m bench.run first$"):
        find_tokenizer("cnn", store.root)
    (run.folder / "config.toml").touch()
    command = f"python -m bench.run --config {run.folder}/config.toml --results {store.root} first"
    with pytest.raises(UserError, match=re.escape(f"cnn-a is unfinished; finish it with {command}")):
        find_tokenizer("cnn", store.root)
    run.fail("diverged", "too steep")
    with pytest.raises(UserError, match=r"cnn-a is diverged; finish it"):
        find_tokenizer("cnn", store.root)
    run.write("metrics.json", {})
    with pytest.raises(UserError, match=r"metrics.json is damaged: it has no metrics; move it away and run the same"):
        find_tokenizer("cnn", store.root)
    run.write("metrics.json", WHOLE)
    assert known_tokenizers(store.root) == f"{store.root} has cnn-a"
    with pytest.raises(UserError, match=r"cnn-a has lost its tokenizer.safetensors; move that folder and train"):
        find_tokenizer("cnn", store.root)
    (run.folder / "tokenizer.safetensors").touch()
    assert find_tokenizer("cnn", store.root) == run


DAMAGE = {  # of a JSON file → what is said of it
    "": "it is empty",
    "[]": "a list where an object belongs",
    '"config"': "a str where an object belongs",
    '{"config": {': "Expecting property name enclosed in double quotes: line 1 column 13 (char 12)",
    "\x00" * 40: "Expecting value: line 1 column 1 (char 0)",
    "\xff\xfe": "'utf-8' codec can't decode",
    "[" * 100_000: "maximum recursion depth exceeded",
    '{"x": 1e400}': "1e400 where a finite number belongs",
    '{"x": NaN}': "NaN where a finite number belongs",
    '{"x": "\\u001b[2J"}': "control characters",
    '{"x": "\x9b2J"}': "control characters",
}


@pytest.mark.parametrize("content", DAMAGE, ids=lambda content: repr(content[:12]))
@pytest.mark.parametrize("name", ["config.json", "metrics.json", "failure.json"])
def test_a_file_that_was_not_written_so_makes_its_run_a_damaged_one(run, name, content):
    """The run is told with the file, what is wrong and what to do; it is neither finished nor unfinished."""
    path = run.folder / name
    path.write_bytes(content.encode("latin-1" if "\xff" in content else "utf-8"))
    assert (run.status, run.finished) == ("damaged", False)
    assert run.reason.startswith(f"{path} is damaged: {DAMAGE[content]}")
    assert run.reason.endswith("; move it away and run the same command again")
    path.unlink()
    assert run.status == ("unfinished")


@pytest.mark.parametrize("name", ["config.json", "metrics.json", "failure.json"])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/nowhere", path)])
def test_what_is_no_file_is_not_read(run, name, make):
    """A pipe would be waited for for ever; a folder and a link that leads nowhere are no files either."""
    (run.folder / name).unlink(missing_ok=True)
    make(run.folder / name)
    assert run.status == "damaged"
    assert run.reason.startswith(f"{run.folder / name} is damaged: it is not a file")


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("metrics.json", {"metrics": {}}, "it has no protocol"),
        ("metrics.json", {"metrics": [], "protocol": {}}, "it has no metrics"),
        ("metrics.json", {"metrics": {"psnr": "20"}, "protocol": {}}, "psnr is '20', which is no number"),
        ("metrics.json", {"metrics": {"psnr": True}, "protocol": {}}, "psnr is True, which is no number"),
        ("metrics.json", {"metrics": {"psnr": [20.0]}, "protocol": {}}, "psnr is [20.0], which is no number"),
        ("metrics.json", {"metrics": {}, "protocol": PROTOCOL}, "it has no params_encoder"),
        ("metrics.json", {"metrics": METRICS, "protocol": {}}, "its protocol has no version"),
        ("metrics.json", {"metrics": METRICS, "protocol": {"count": [1]}}, "its protocol has lists"),
        ("metrics.json", {"metrics": METRICS, "protocol": {"count": {}}}, "its protocol has lists"),
        *(
            (
                "metrics.json",
                {"metrics": METRICS, "protocol": PROTOCOL | {"scored_on": split}},
                f"its scored_on is {split!r}",
            )
            for split in ("train", "", None, 1)
        ),
        ("config.json", {"config": {}}, "it has no environment"),
        ("config.json", {"config": 1, "environment": {}}, "it has no config"),
        ("failure.json", {"status": "crashed"}, "it tells no status and reason"),
        ("failure.json", {"status": 1, "reason": ""}, "it tells no status and reason"),
        ("failure.json", {"status": "finished", "reason": ""}, "it tells no status and reason"),
    ],
)
def test_a_part_that_is_missing_or_of_another_kind_is_damage(run, name, content, what):
    run.write(name, content)
    assert run.status == "damaged"
    assert run.reason.startswith(f"{run.folder / name} is damaged: {what}")


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"width": "4"}, "width is '4'; it must be a whole number"),
        ({"width": -1}, "width is -1; it must be at least 1"),
        ({"width": 2.0}, "width is 2.0; it must be a whole number"),
        ({"width": True}, "width is True; it must be a whole number"),
        ({"codebook_size": 0}, "codebook_size is 0; it must be at least 1"),
        ({"beta": [1]}, "beta is [1]; it must be a number"),
        ({"backbone": 3}, "backbone is 3; it must be text"),
        ({"pretrained": 1}, "pretrained is 1; it must be True or False"),
        ({"width": None}, "width is None; it must be a whole number"),
    ],
)
def test_settings_that_no_run_can_have_are_damage(run, change, what):
    stored = asdict(make_config("cnn", "smoke")) | change
    run.write("config.json", {"config": stored, "environment": {}})
    with pytest.raises(Damaged) as error:
        run.settings(Config)
    assert str(error.value).startswith(f"{run.folder / 'config.json'} is damaged: {what}")


def test_choices_of_other_versions_are_not_damage(run):
    """A store outlives its quantizers and backbones, and is shared with versions that have further ones."""
    stored = asdict(make_config("cnn", "smoke")) | {"quantizer": "next", "backbone": "new", "gradient": "other"}
    run.write("config.json", {"config": stored, "environment": {}})
    assert run.settings(Config).quantizer == "next"


def test_a_damaged_run_is_listed_with_the_others(store):
    started(store, "cnn-a")
    store.named("cnn-b").folder.mkdir()
    (store.named("cnn-b").folder / "config.json").touch()
    assert [run.status for run in store.runs()] == ["unfinished", "damaged"]


def test_damaged_lines_of_a_history_are_left_out(run):
    """Curves are drawn of the others; nothing that was trained is lost for them."""
    lines = [b'{"step": 1, "loss": 0.5}', b"\xff\x00", b"[]", b'{"loss": 1}', b'{"step": 2, "loss": "x"}', b"[" * 9999]
    (run.folder / "history.jsonl").write_bytes(b"\n".join([*lines, b'{"step": 3, "loss": 0.25}', b""]))
    assert run.history() == [{"step": 1, "loss": 0.5}, {"step": 3, "loss": 0.25}]


def test_what_steers_a_terminal_is_not_written_as_a_reason(run):
    run.fail("crashed", "\x1b[31mred\x9b and \x07 bell,\n two lines \u202e")
    assert run.reason == "\ufffd[31mred\ufffd and \ufffd bell,\n two lines \ufffd"


STUDY = {"name": "beta", **HEADER, "runs": {}}


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("{", "Expecting property name"),
        *((json.dumps({**STUDY, part: 1}), f"it does not tell the {part} of the study") for part in ("kind", "sweep")),
        (json.dumps({**STUDY, "metrics": "psnr"}), "it does not tell the metrics of the study"),
        (json.dumps({**STUDY, "runs": []}), "it does not tell the runs of the study"),
        (json.dumps({**STUDY, "runs": {"a": 1}}), "'a' is no run with its settings"),
        (json.dumps({**STUDY, "runs": {"../../x": {}}}), "'../../x' is no run with its settings"),
        (json.dumps({**STUDY, "priors": {"..": {}}}), "'..' is no run with its settings"),
        (json.dumps({**STUDY, "priors": {"": {}}}), "'' is no run with its settings"),
    ],
)
def test_a_study_that_was_not_written_so_is_named_and_not_overwritten(store, content, what):
    path = store.root / "studies" / "beta.json"
    path.parent.mkdir()
    path.write_text(content)
    for touch in (lambda: store.study("beta"), lambda: store.extend_study("beta", HEADER, {})):
        with pytest.raises(Damaged) as error:
            touch()
        assert str(error.value).startswith(f"{path} is damaged: {what}")
    assert path.read_text() == content


def test_no_flipped_bit_of_a_study_is_read_as_another(store):
    """Neither a run's id, nor what is swept or ranked by, nor its kind; what older versions wrote has no digest."""
    store.extend_study("beta", HEADER, {"cnn-a": {"backbone": "cnn", "beta": 0.25, "seed": 0}})
    path, known = store.root / "studies" / "beta.json", store.study("beta")
    whole = path.read_bytes()
    for flipped in flips(whole, range(8 * len(whole))):
        path.write_bytes(flipped)
        with contextlib.suppress(Damaged):
            assert store.study("beta").items() >= known.items()
    path.write_text(json.dumps(known))
    store.extend_study("beta", HEADER, {})
    assert store.study("beta") == known
    assert path.read_bytes() == whole


def test_a_link_that_leads_nowhere_is_no_study_and_stays(store):
    path = store.root / "studies" / "beta.json"
    path.parent.mkdir()
    path.symlink_to("nowhere")
    for touch in (lambda: store.study("beta"), lambda: store.extend_study("beta", HEADER, {})):
        with pytest.raises(Damaged, match=r"beta.json is damaged: it is not a file but a link that leads nowhere;"):
            touch()
    assert path.is_symlink()


def test_a_damaged_study_is_named_and_the_others_are_listed_and_rebuilt(store, capsys):
    for name in ("beta", "gamma", "delta"):
        store.extend_study(name, HEADER, {})
    path = store.root / "studies" / "delta.json"
    path.write_text("{")
    assert study.run(["list", "--results", str(store.root)]) == 0
    said = capsys.readouterr()
    assert "beta" in said.out
    assert "gamma" in said.out
    assert said.err.startswith(f"left out: {path} is damaged: ")
    assert study.run(["rebuild", "--results", str(store.root)]) == 0
    assert "study gamma: 0 trials added" in capsys.readouterr().err
    assert study.run(["rebuild", "delta", "--results", str(store.root)]) == 2


def test_the_first_study_is_asked_for_by_its_command(store):
    with pytest.raises(UserError) as error:
        store.study("beta")
    where = f"there is no study 'beta' in {store.root}"
    assert str(error.value) == f"{where}; known studies: none yet; start one with python -m studies.beta"


def test_each_study_has_a_lock_of_its_own_beside_it(store, monkeypatch):
    """Two that are extended at once need not wait for one another."""
    locks = []
    monkeypatch.setattr("bench.core.store.FileLock", lambda path: locks.append(path) or contextlib.nullcontext())
    for name in ("beta", "grids"):
        store.extend_study(name, HEADER, {})
    assert locks == [store.root / "studies" / f"{name}.lock" for name in ("beta", "grids")]


def test_a_prior_that_failed_early_has_no_tokenizer_yet(run):
    """Who asks for it gets an empty config."""
    assert run.tokenizer() == {}
    run.write("config.json", {"config": {}, "tokenizer": {"backbone": "vit"}, "environment": {}})
    assert run.tokenizer() == {"backbone": "vit"}


def test_a_folder_that_is_taken_is_named_at_once(run):
    with run.locked(), pytest.raises(Busy) as error, Run(run.folder).locked():
        pass
    assert str(error.value) == f"another process is working on {run.folder}; wait until it is done"


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"codebook_size": 0}, "the codebook_size of its codes is 0"),
        ({"codebook_size": 2**24 + 1}, "the codebook_size of its codes is 16777217"),
        ({"codebook_size": "512"}, "the codebook_size of its codes is '512'"),
        ({"grid": [4, -1]}, "the grid of its codes is [4, -1]"),
        ({"grid": [True, 4]}, "the grid of its codes is [True, 4]"),
        ({"grid": [4]}, "the grid of its codes is [4]"),
        ({"grid": 4}, "the grid of its codes is 4"),
        ({"grid": None}, "the grid of its codes is None"),
        ({"grid": [2**24 + 1, 1]}, "the grid of its codes is [16777217, 1]"),
        ({"classes": None}, "its codes have no classes"),
        ({"classes": 3}, "its codes have no classes"),
    ],
)
def test_codes_that_no_tokenizer_has_are_damage(run, change, what):
    codes = {"codebook_size": 2**24, "grid": [1, 2**24], "classes": []}
    run.write("config.json", {"config": {}, "environment": {}, "codes": codes})
    assert run.codes() == {**codes, "grid": (1, 2**24)}
    run.write("config.json", {"config": {}, "environment": {}, "codes": codes | change})
    with pytest.raises(Damaged) as error:
        run.codes()
    assert str(error.value).startswith(f"{run.folder / 'config.json'} is damaged: {what}; ")


@pytest.mark.parametrize("grid_size", [8, 0, None])
def test_codes_of_older_priors_are_square(run, grid_size):
    """They tell the one side alone."""
    codes = {"codebook_size": 4, "grid_size": grid_size, "classes": ["a"]}
    run.write("config.json", {"config": {}, "environment": {}, "codes": codes})
    if grid_size:
        assert run.codes() == {"codebook_size": 4, "grid": (8, 8), "classes": ["a"]}
        return
    with pytest.raises(Damaged, match=re.escape(f"the grid of its codes is [{grid_size}, {grid_size}]")):
        run.codes()


def test_settings_that_lack_a_field_without_a_default_are_damage(run):
    with pytest.raises(Damaged, match=r"config\.json is damaged: .*'backbone'"):
        run.settings(Config)


def test_a_score_that_was_not_taken_is_no_damage(run):
    """It reads as one that is not there."""
    run.write("metrics.json", least(psnr=20.0, fid=None, peak_memory_mb=None))
    assert run.status == "finished"
    assert run.metrics()["psnr"] == 20.0
    assert not {"fid", "peak_memory_mb"} & run.metrics().keys()


@pytest.mark.parametrize(("shelf", "name"), [(shelf, name) for shelf, names in SCORED.items() for name in names])
def test_a_run_without_what_every_version_has_written_is_damaged(store, shelf, name):
    """Whether it is missing, null, or all are."""
    run = Run(store.root / shelf / "one")
    run.folder.mkdir(parents=True)
    run.write("config.json", {"config": {}, "environment": {}})
    run.write("metrics.json", least(shelf))
    assert run.status == "finished"
    without = least(shelf)
    del without["metrics"][name]
    for content in (without, least(shelf, **{name: None})):
        run.write("metrics.json", content)
        told = (
            f"{run.folder / 'metrics.json'} is damaged: it has no {name}; move it away and run the same command again"
        )
        assert run.ending() == ("damaged", told)


@pytest.mark.parametrize(("shelf", "name"), [(shelf, name) for shelf in NUMBERS for name in (*TOLD, *NUMBERS[shelf])])
def test_a_protocol_without_what_is_told_of_it_is_damage(store, shelf, name):
    """Null says something of Inception's weights only; and a number is one."""
    run = Run(store.root / shelf / "one")
    run.folder.mkdir(parents=True)
    run.write("config.json", {"config": {}, "environment": {}})
    for value in (None, "many") if name in NUMBERS[shelf] else ():
        run.write("metrics.json", least(shelf, {name: value}))
        assert f"is damaged: its protocol has no {name}; " in run.reason
    without = least(shelf)
    del without["protocol"][name]
    run.write("metrics.json", without)
    assert f"{run.folder / 'metrics.json'} is damaged: its protocol has no {name}; " in run.reason


def test_scores_per_image_of_another_shape_are_none(run):
    """Two lengths, that of another set, two axes, words, a bare array: no two runs could be compared by them."""
    run.write("metrics.json", least(protocol={"count": 3}, psnr=0.0))
    path = run.folder / "per_image.npz"
    np.savez(path, psnr=np.zeros(3), ssim=np.zeros(3))
    assert {*run.per_image()} == {"psnr", "ssim"}
    three, four, words = np.zeros(3), np.zeros(4), np.array(["x"] * 3)
    for arrays in ({"psnr": three, "ssim": four}, {"psnr": four}, {"psnr": np.zeros((3, 3))}, {"psnr": words}, {}):
        np.savez(path, **arrays)
        assert run.per_image() == {}
    with path.open("wb") as file:
        np.save(file, np.zeros(3))
    assert run.per_image() == {}
    path.unlink()
    os.mkfifo(path)
    assert run.per_image() == {}


def test_scores_per_image_of_another_run_are_none(run):
    """As many as the run's own, and whole: their mean tells whose they are, however it was rounded."""
    run.write("metrics.json", least(protocol={"count": 3}, psnr=22.0, ssim=0.5))
    path = run.folder / "per_image.npz"
    np.savez(path, psnr=np.array([21.0, 22.0, 23.0 + 1e-6]), ssim=np.array([0.5] * 3), lpips_of_later=np.ones(3))
    assert {*run.per_image()} == {"psnr", "ssim", "lpips_of_later"}
    np.savez(path, psnr=np.array([21.0, 22.0, 23.01]), ssim=np.array([0.5] * 3))
    assert run.per_image() == {}


def test_a_priors_tokenizer_that_is_no_object_is_damage(run):
    run.write("config.json", {"config": {}, "environment": {}, "tokenizer": [1]})
    with pytest.raises(Damaged, match="its tokenizer is no object"):
        run.tokenizer()


def test_a_snapshot_is_of_one_moment(tmp_path):
    """What is read of a file fits what was read of it before, also when it is replaced in between."""
    run = fabricate(Store(tmp_path), make_config("cnn", "smoke", device="cpu"))
    seen, before = run.snapshot(), run.config()
    assert (seen.folder, seen.config(), seen.status) == (run.folder, before, "finished")
    run.write("config.json", {"config": {**before, "beta": 9.0}, "environment": {}})
    assert (seen.config(), run.config()["beta"], run.snapshot().config()["beta"]) == (before, 9.0, 9.0)


def test_the_costs_of_one_side_alone_are_no_sum(tmp_path):
    """Of a folder that lies elsewhere, which may be of any kind."""
    run = Run(tmp_path)
    run.write("metrics.json", {"metrics": {"params_encoder": 3, "flops_encode": 5, "flops_decode": 6}, "protocol": {}})
    assert run.metrics() == {"params_encoder": 3, "flops_encode": 5, "flops_decode": 6, "flops": 11}


@pytest.mark.parametrize("name", ["config.json", "metrics.json"])
def test_a_file_of_another_run_is_damage(tmp_path, name):
    """Also a whole one; but a run folder that lies elsewhere may be called anything."""
    store = Store(tmp_path)
    runs = [store.named(one) for one in ("a", "b")]
    for run in runs:
        run.folder.mkdir(parents=True)
        run.seal("config.json", {"config": {}, "environment": {}})
        run.seal("metrics.json", WHOLE)
    assert [run.status for run in runs] == ["finished"] * 2
    (runs[0].folder / name).write_bytes((runs[1].folder / name).read_bytes())
    assert runs[0].ending()[0] == "damaged"
    assert "it is of the run b" in runs[0].reason
    runs[0].folder.rename(tmp_path / "exported")
    assert Run(tmp_path / "exported").status == "finished"


@pytest.mark.parametrize("finished", [True, False])
def test_a_copy_of_a_run_is_told_as_one(store, finished):
    """Whoever copied it knows that it is not damaged."""
    run = store.named("a")
    run.folder.mkdir(parents=True)
    run.seal("config.json", {"config": {}, "environment": {}})
    if finished:
        run.seal("metrics.json", WHOLE)
    copy = store.named("of-a")
    shutil.copytree(run.folder, copy.folder)
    told = f"{copy.folder} is a copy of the run a, whose id its files have; call it that, or move it out of "
    assert copy.reason == f"{told}{store.root / 'runs'}"
    with pytest.raises(UserError, match="is a copy of the run a"):
        check_whole(copy)
    assert run.status == ("finished" if finished else "unfinished")


@pytest.mark.parametrize("how", ["gone", "dangling"])
def test_scores_without_settings_are_a_damaged_run(tmp_path, how):
    run = fabricate(Store(tmp_path), make_config("cnn", "smoke", device="cpu"))
    (run.folder / "config.json").unlink()
    if how == "dangling":
        (run.folder / "config.json").symlink_to("nowhere")
    assert [one.status for one in Store(tmp_path).runs()] == ["damaged"]
    assert "config.json" in run.reason
    (run.folder / "metrics.json").unlink()
    assert run.started == (how == "dangling")


@pytest.mark.parametrize("value", [1e31, -1e308])
def test_a_score_beyond_all_use_is_damage(tmp_path, value):
    """The sum or square of such is infinite."""
    run = fabricate(Store(tmp_path), make_config("cnn", "smoke", device="cpu"), psnr=value)
    assert run.status == "damaged"
    assert f"psnr is {value!r}" in run.reason
