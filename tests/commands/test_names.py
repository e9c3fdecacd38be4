"""Whatever a command line names where a folder, a file, a run or a database belongs: a result or one sentence."""

import os
from pathlib import Path

import pytest

from bench import diff, encode, prior, reconstruct, report, run, study
from bench.core.progress import stdout
from bench.core.store import Store
from bench.sweeps import workers
from bench.sweeps.definition import Ablation
from bench.tokenizers.config import make_config
from tests.commands import TINY
from tests.fabricate import fabricate

NONE = ["--data", "folder:/nowhere"]  # nothing is trained
BETA = Ablation("s", {"beta": (0.25,)}, backbones=("cnn",))
WORDS = "somebody's words " * 100
NAMES = {
    "long": "x" * 5000,
    "deep": "x/" * 3000,
    "nul": "a\0b",
    "surrogate": "\udce4",
    "control": "a\x07b",
    "empty": "",
    "nobody": "~no-such-user",
    "device": "/dev/null",
    "file": "made/file",
    "below a file": "made/file/x",
    "pipe": "made/pipe",
    "loop": "made/loop",
    "dangling": "made/dangling",
    "folder": "made/folder",
}
COMMANDS = {
    "run --results": lambda name: run.main([*TINY, *NONE, "--results", name]),
    "run --data": lambda name: run.main([*TINY, "--data", f"folder:{name}"]),
    "run --fid-weights": lambda name: run.main([*TINY, *NONE, "--fid-weights", name]),
    "prior RUN": lambda name: prior.main([name, "--results", "good"]),
    "prior --results": lambda name: prior.main(["cnn", "--results", name]),
    "prior --fid-weights": lambda name: prior.main(["cnn", "--fid-weights", name, "--results", "good"]),
    "diff RUN": lambda name: diff.main([name, "cnn", "--results", "good"]),
    "diff --results": lambda name: diff.main(["cnn", "cnn", "--results", name]),
    "encode RUN": lambda name: encode.main([name, "--results", "good"]),
    "encode --results": lambda name: encode.main(["cnn", "--results", name]),
    "reconstruct IMAGE": lambda name: reconstruct.main([name, "--run", "cnn", "--results", "good"]),
    "reconstruct --run": lambda name: reconstruct.main(["x.png", "--run", name, "--results", "good"]),
    "reconstruct --results": lambda name: reconstruct.main(["x.png", "--run", "cnn", "--results", name]),
    "reconstruct --out": lambda name: reconstruct.main(["x.png", "--run", "cnn", "--results", "good", "--out", name]),
    "report NAME": lambda name: report.main([name, "--results", "good"]),
    "report --results": lambda name: report.main(["--results", name]),
    "report --out": lambda name: report.main(["--results", "good", "--out", name]),
    "study list": lambda name: study.run(["list", "--results", name]),
    "study rebuild NAME": lambda name: study.run(["rebuild", name, "--results", "good"]),
    "study rebuild --results": lambda name: study.run(["rebuild", "--results", name]),
    "study rebuild --storage": lambda name: study.run(
        ["rebuild", "--results", "good", "--storage", f"sqlite:///{name}"]
    ),
    "studies --results": lambda name: workers.main(BETA, "", [*TINY, *NONE, "--results", name]),
    "studies --plan": lambda name: workers.main(BETA, "", [*TINY, *NONE, "--plan", "--results", name]),
    "studies --storage": lambda name: workers.main(BETA, "", [*TINY, *NONE, "--storage", f"sqlite:///{name}"]),
    "studies --data": lambda name: workers.main(BETA, "", [*TINY, "--data", f"folder:{name}"]),
}


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A folder with one of everything that may be in the way, and with results that are ``good``."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(stdout, "width", 120)
    monkeypatch.setattr("bench.sweeps.plan.step_seconds", lambda config, steps: 1.0)
    made = tmp_path / "made"
    (made / "folder").mkdir(parents=True)
    (made / "file").write_text(WORDS)
    os.mkfifo(made / "pipe")
    (made / "loop").symlink_to(made / "loop")
    (made / "dangling").symlink_to(made / "nowhere" / "x")
    store = Store(tmp_path / "good")
    fabricate(store, make_config("cnn", "smoke", device="cpu"))
    store.extend_study("one", {"kind": "ablation", "sweep": ["beta"], "metrics": ["psnr"], "space": {}}, {})
    return tmp_path


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("command", COMMANDS)
def test_whatever_is_named_there_is_a_result_or_one_sentence(here, capsys, command, kind):
    """Nothing hangs, and nothing that cannot be read again is made."""
    code, told = COMMANDS[command](NAMES[kind]), capsys.readouterr().err
    if code == 2:
        assert told.splitlines()[-1].startswith("error: ")
        assert sum(line.startswith("error: ") for line in told.splitlines()) == 1
    else:
        assert code == 0
    assert code == 2 or kind not in ("nul", "surrogate", "control")
    assert (here / "made" / "file").read_text() == WORDS


@pytest.mark.parametrize("command", [name for name in COMMANDS if "--data" not in name and "storage" not in name])
def test_an_empty_word_names_nothing(here, capsys, command):
    """As an unset variable of a shell gives it; it would be the present folder, and the beginning of every run's id."""
    assert COMMANDS[command]("") == 2
    flag = f"{command.split()[-1]} " if "--" in command else ""
    flag = "--results " if command in ("study list", "studies --plan") else flag
    told = f"error: {flag}'' is no text that a file could be called by; name another\n"
    assert capsys.readouterr().err == told


@pytest.mark.parametrize("kind", ["device", "file", "pipe", "loop", "dangling"])
def test_a_report_asks_for_its_folder_before_it_reads_anything(here, capsys, kind):
    assert COMMANDS["report --out"](NAMES[kind]) == 2
    assert capsys.readouterr().err == f"error: {NAMES[kind]} is no folder; name one with --out\n"


def test_a_report_that_cannot_be_written_is_told_before_it_reads_anything(here, capsys):
    assert COMMANDS["report --out"]("/dev/null/x") == 2
    told = "error: cannot write to /dev/null/x: Not a directory; name another folder with --out\n"
    assert capsys.readouterr().err == told


def test_a_run_goes_by_its_folder_s_name_as_a_shell_completes_it(here, capsys):
    """The beginning of it, too; and a slash alone is no run's name."""
    (run,) = Store("good").runs()
    for name in (run.folder.name, run.folder.name[:6]):
        assert diff.main([f"{name}/", "cnn", "--results", "good"]) == 0
    assert diff.main(["x/", "cnn", "--results", "good"]) == 2
    assert "unknown run 'x/'" in capsys.readouterr().err
