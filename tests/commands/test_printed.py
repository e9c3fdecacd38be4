"""Commands that are printed run as they are: by the interpreter that printed them, quoted, known to their parsers."""

import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from bench import run
from bench.core.cli import command, command_line
from bench.core.errors import UserError
from bench.core.progress import program, runnable
from bench.core.recipe import from_file
from bench.core.store import Store, known_tokenizers
from bench.prior import PriorArguments
from bench.sweeps import workers
from bench.sweeps.definition import Ablation, parse_study
from bench.tokenizers.arguments import parse
from bench.tokenizers.config import make_config
from tests.commands import TINY
from tests.fabricate import fabricate

PRINTED = re.compile(r"((?:'[^']*'|\S*)python\S*|'[^']*python[^']*') -m ((?:bench|studies)\.\w+)([^\n;]*)")


def printed(text: str) -> list[tuple[str, str, list[str]]]:
    """Interpreter, module and words of every command in ``text``."""
    return [
        (shlex.split(python)[0], module, shlex.split(words.split(", then ")[0].split(", and ")[0]))
        for python, module, words in PRINTED.findall(text)
    ]


def read(module: str, words: list[str]) -> object:
    """What the parser of a command makes of ``words``; fails where it refuses them."""
    if module == "bench.run":
        return list(parse(run.RunArguments, words, module, "").configs())
    if module == "bench.prior":
        return command_line(PriorArguments, words, module, "", PriorArguments(**from_file(PriorArguments, words)))
    known = importlib.import_module(module)
    if module.startswith("studies."):
        return parse_study(known.STUDY, "", words)
    return command_line(known.Options, words, module, "")


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A folder that a shell would take for two words, and the present one."""
    folder = tmp_path / "my results"
    folder.mkdir()
    monkeypatch.chdir(tmp_path)
    return folder


def test_what_a_run_suggests_can_be_run(trial_data, place, capsys):
    """The next command, images, and the file that repeats it, in a folder with a space."""
    words = ["--backbone", "cnn", *TINY, "--instruments", "none", "--results", str(place)]
    assert run.main(words) == 0
    commands = printed(capsys.readouterr().out)
    assert [module for _, module, _ in commands] == ["bench.run", "bench.prior", "bench.run"]
    for python, module, given in commands:
        assert Path(python).absolute() == Path(sys.executable)
        assert read(module, given)
    (made,) = Store(place).runs()
    assert commands[1][2] == [str(made.folder)]
    assert run.main(commands[2][2]) == 0  # from its file
    assert "already finished" in capsys.readouterr().err


def test_commands_in_mistakes_can_be_run(place, capsys):
    """Those that are given in place of one that cannot work, and those that would make what is missing."""
    words = ["--backbone", "cnn", "vit", "--rotary", "--data", "folder:a b", "--results", str(place)]
    assert run.main(words) == 2
    said = capsys.readouterr().err
    commands = printed(said.replace(", then ", "; ").replace(", and ", "; "))
    assert [module for _, module, _ in commands] == ["bench.run", "bench.run", "bench.report"]
    assert [[config.backbone for config in read(module, given)] for _, module, given in commands[:2]] == [
        ["vit"],
        ["cnn"],
    ]
    assert read("bench.run", commands[0][2])[0].data == "folder:a b"

    def fail(words: list[str]) -> int:
        raise UserError(known_tokenizers(place))

    assert command(fail, []) == 2
    ((python, module, given),) = printed(capsys.readouterr().err)
    assert (Path(python).absolute(), module, given) == (Path(sys.executable), "bench.run", [])


def test_the_dashboards_line_starts_the_program_of_this_environment(place, monkeypatch, capsys):
    study = Ablation("beta", {"beta": (0.25,)}, backbones=("cnn",), seeds=(0,))
    for one in ("look", "conclude", "run_missing", "prepare", "check_instruments"):
        monkeypatch.setattr(workers, one, lambda *arguments: 0)
    monkeypatch.setenv("PATH", "/nowhere")
    fabricate(Store(place), make_config("cnn", "smoke", beta=0.25, device="cpu"))
    words = ["--preset", "smoke", "--device", "cpu", "--results", "my results"]
    assert workers.main(study, "", words) == 0
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("dashboard:"))
    path, url, *rest = shlex.split(line.partition(" ")[2])
    assert Path(path).with_name("python") == Path(sys.executable).with_name("python")
    assert url.startswith("sqlite:///my results/")
    assert rest == ["--artifact-dir", "my results/studies/artifacts"]


def test_a_program_is_called_as_shortly_as_it_can_be(tmp_path, monkeypatch):
    """By its name where PATH means it, from the present folder where it is below, else by all of its path."""
    home = tmp_path / "a b" / "bin"
    home.mkdir(parents=True)
    (home / "python").write_text("#!/bin/sh\necho here\n")
    (home / "python").chmod(0o755)
    monkeypatch.chdir(tmp_path)
    path = str(home / "python")
    assert program("python", path) == os.path.join("a b", "bin", "python")
    monkeypatch.setattr(sys, "executable", path)
    text = runnable("run python -m bench.run, not python -m pip or a python")
    assert text == "run 'a b/bin/python' -m bench.run, not python -m pip or a python"
    assert runnable(text) == text
    done = subprocess.run(text[4:].partition(",")[0], shell=True, capture_output=True, text=True, check=True)
    assert done.stdout == "here\n"
    monkeypatch.chdir(home)
    assert program("python", path) == "./python"
    monkeypatch.chdir("/")
    assert program("python", path) == path
    monkeypatch.setenv("PATH", str(home))
    assert program("python", path) == "python"


def test_a_mistake_names_an_interpreter_that_is_not_on_the_path_once(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", str(tmp_path / ".venv" / "bin" / "python"))
    with pytest.raises(SystemExit):
        run.main(["--bakcbone", "cnn"])
    assert capsys.readouterr().err.endswith("; .venv/bin/python -m bench.run --help lists all\n")
