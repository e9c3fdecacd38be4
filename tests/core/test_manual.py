"""--help: every flag once, in its group, with what it means; the essential ones first, the long tail when asked for."""

import importlib
import io
import re
from contextlib import redirect_stdout
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Literal

import pytest
import tyro

import studies
from bench import doctor, encode, prior, report, run, speed, study
from bench.core.cli import command_line
from bench.core.manual import Manual, docstrings
from bench.core.settings import Count, Natural, at_least, at_most
from bench.sweeps import workers
from bench.tokenizers.arguments import ESSENTIAL, SECTIONS
from bench.tokenizers.config import Config

NAMES = sorted(path.stem for path in Path(studies.__file__).parent.glob("[a-z]*.py"))
COMMANDS = {one.__name__: one.main for one in (doctor, encode, prior, report, run, speed)}
COMMANDS |= {"study rebuild": lambda words: study.run(["rebuild", *words])}
COMMANDS |= {"study list": lambda words: study.run(["list", *words])}


@pytest.fixture(autouse=True)
def boxes(monkeypatch):
    """Pages as a terminal shows them."""
    monkeypatch.setenv("COLUMNS", "80")


def of_study(name: str):
    module = importlib.import_module(f"studies.{name}")
    return lambda words: workers.main(module.STUDY, module.__doc__, words)


def page(command, *words: str) -> str:
    """What a command says of itself, on a stream whose encoding has boxes."""
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    with redirect_stdout(out), pytest.raises(SystemExit) as stopped:
        command(list(words) or ["--help"])
    assert stopped.value.code == 0
    out.flush()
    return out.buffer.getvalue().decode()


def flags(text: str) -> list[str]:
    """The flags that a page describes, in order."""
    return re.findall(r"^│ (--[\w-]+)", text, re.M)


def groups(text: str) -> dict[str, list[str]]:
    """The boxes of a page by their titles, and what flags each has."""
    parts = re.split(r"^╭─ (.+?) ─+╮$", text, flags=re.M)[1:]
    return {title: flags(box) for title, box in zip(parts[::2], parts[1::2], strict=True)}


@pytest.mark.parametrize("name", [*COMMANDS, *(f"studies.{name}" for name in NAMES)])
def test_a_page_has_neither_types_nor_defaults_that_say_nothing(name):
    """Whichever command: no text that stands for nothing, no flag twice, none without a word on what it does."""
    command = COMMANDS.get(name) or of_study(name.removeprefix("studies."))
    text = page(command)
    assert not re.search(r"\{None\}|default: *\)|default: (None|False|'')\)|\[(\S+) \[\S+ \.\.\.\]\]", text)
    assert len(flags(text)) == len(set(flags(text)))
    assert not re.search(r"^│ --[\w-]+(, --[\w-]+)?(?: [A-Z]+)? +│\n(│ -|╰)", text, re.M)  # nothing is said of it


def test_the_essential_flags_come_first_and_the_long_tail_when_it_is_asked_for():
    short, whole = page(run.main), page(run.main, "--help-all", "--preset", "smoke")
    essential = [f"--{name.replace('_', '-')}" for name in ESSENTIAL]
    assert groups(short)["essential options"] == groups(whole)["essential options"] == essential
    assert len(essential) == 10
    assert [*groups(short)][:2] == ["options", "essential options"]
    assert {f"{name} options" for name in SECTIONS.values()} - {"study options"} == {*groups(whole)} - {
        "options",
        "essential options",
    }
    assert {*flags(short)} < {*flags(whole)}
    settings = {f"--{field.name.replace('_', '-')}" for field in fields(Config) if field.name != "seed"}
    assert settings <= {*flags(whole)}
    told = sum(int(count) for count in re.findall(r"(\d+) more with --help-all", short))
    assert told == len({*flags(whole)} - {*flags(short)})
    assert "more with --help-all" not in whole
    assert "(default: 150)" in whole  # steps of that preset
    assert "--gan-norm" in groups(whole)["adversary options"]


@pytest.mark.parametrize("name", ["beta", "variants", "prior_rate"])
def test_a_study_shows_what_it_sweeps_first(name):
    text = page(of_study(name))
    swept = importlib.import_module(f"studies.{name}").STUDY.sweep
    shown = groups(text)["essential options"]
    assert shown[: len(swept)] == [f"--{one.replace('_', '-')}" for one in swept]
    assert "--workers" in groups(text)["study options"]


def test_a_flag_is_told_by_its_docstring_its_range_and_its_default():
    @dataclass
    class Options:
        """What there is."""

        names: tyro.conf.Positional[tuple[str, ...]] = ()
        """who"""
        steps: Count = 3
        """how many,
        in all"""
        layers: Annotated[int | None, at_least(1), at_most(16)] = None
        """of them"""
        top: Natural = 0
        """how high"""
        kinds: tuple[Literal["a", "b"], ...] = ("a",)
        """which"""
        rate: float = 1e-3
        """how fast"""
        fast: bool = False
        """haste"""
        safe: bool = True
        """care"""
        hidden: tyro.conf.Suppress[int] = 0

    assert docstrings(Options)["steps"] == "how many, in all"
    manual = Manual({"steps": "work", "kinds": "rest"}, ("rate",), {"top"})
    text = page(lambda words: command_line(Options, words, "it", "Does it.", manual=manual))
    lines = {line.split()[1]: " ".join(line.strip("│ ").split()) for line in text.splitlines() if "│ --" in line}
    assert lines["--steps"] == "--steps INT how many, in all; from 1 (default: 3)"
    assert lines["--layers"] == "--layers INT of them; from 1, up to 16"
    assert lines["--rate"] == "--rate FLOAT how fast (default: 0.001)"
    assert lines["--fast"] == "--fast haste"
    assert "care (default: True)" in text
    assert "{a,b} [{a,b} ...]" in text
    assert "names" not in lines
    assert groups(text)["work options"] == ["--steps", "--layers"]
    assert groups(text)["essential options"] == ["--rate"]
    assert "1 more with --help-all" in text
    assert "hidden" not in text
    text = page(lambda words: command_line(Options, words, "it", "Does it.", Options(steps=7), manual), "--help-all")
    assert groups(text)["work options"] == ["--steps", "--layers", "--top"]
    assert "(default: 7)" in text


def test_what_a_class_says_of_a_flag_wins_over_its_parent():
    assert docstrings(Config)["width"].startswith("channels at the token grid; with depth")
    assert docstrings(run.RunArguments)["width"].endswith("the preset's own matches parameters across backbones")
    assert docstrings(run.RunArguments)["beta"] == docstrings(Config)["beta"]
