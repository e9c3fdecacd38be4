"""The manners of commands: which mistakes are told in one sentence, and in which words."""

import errno
import io
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import pytest
import tyro

from bench.core import cli
from bench.core.cli import command, fail, guarded, parsed
from bench.core.errors import Interrupted, UserError

ROOT = Path(__file__).parents[2]
REFUSALS = [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO]


@pytest.mark.parametrize("number", REFUSALS)
def test_a_place_that_takes_no_more_is_a_mistake_that_users_can_mend(capsys, number):
    """A full disk, a full quota, no permission, a disk for reading only or broken; with the file, where it is known."""
    for file, fix in (
        ("results/runs/a/x.pt", "choose another --results"),
        ("elsewhere/report.html", "name another place"),
        (None, "name another place"),
    ):

        def write(file=file) -> int:
            raise OSError(number, "no way", *([file] if file else []))

        assert guarded(write) == 2
        said = capsys.readouterr()
        assert said.err == f"error: no way while writing {file or 'the output'}; free or {fix}\n"
        assert said.out == ""


def test_brackets_of_a_message_are_shown_as_they_are(capsys):
    """And are not taken for markup, which would hide the value that is wrong."""

    def work() -> int:
        raise UserError("unknown data '[bold]x[/]'; choose photos")

    assert guarded(work) == fail("unknown data '[bold]x[/]'; choose photos") == 2
    assert capsys.readouterr().err == 2 * "error: unknown data '[bold]x[/]'; choose photos\n"


def test_a_full_cache_is_told_as_the_cache(capsys, monkeypatch, tmp_path):
    """Another --results would not help."""
    monkeypatch.setenv("VQBENCH_CACHE", str(tmp_path))

    def work() -> int:
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "data" / "x.npy"))

    assert guarded(work) == 2
    told = f"No space left on device while writing {tmp_path / 'data' / 'x.npy'}"
    assert capsys.readouterr().err == f"error: {told}; free or set VQBENCH_CACHE to another folder\n"


def test_other_errors_of_the_system_are_no_mistake_of_the_users():
    def work() -> int:
        raise OSError(errno.ENOENT, "No such file or directory", "x")

    with pytest.raises(OSError, match="No such file"):
        guarded(work)


def test_a_file_of_the_store_that_goes_while_a_command_works_is_told(capsys):
    def work() -> int:
        raise OSError(errno.ENOENT, "No such file or directory", "/x/results/runs/cnn-ema-1/history.jsonl")

    assert guarded(work) == 2
    told = "error: /x/results/runs/cnn-ema-1/history.jsonl has gone while this command was at work; run the same"
    assert capsys.readouterr().err.startswith(told)


@pytest.mark.parametrize("error", [MemoryError("no room"), RuntimeError("mmap: Cannot allocate memory (12)\nmore")])
def test_a_lack_of_memory_is_told_in_one_sentence_and_other_errors_are_not(capsys, error):
    def work(error: Exception) -> int:
        raise error

    assert guarded(partial(work, error)) == 2
    assert capsys.readouterr().err.startswith("error: not enough memory (")
    with pytest.raises(RuntimeError, match="a bug"):
        guarded(partial(work, RuntimeError("a bug")))


def test_who_is_terminated_says_that_it_stopped(capsys):
    """Wherever that happens; what SIGTERM did before, it does again afterwards."""
    before = signal.getsignal(signal.SIGTERM)

    def work() -> int:
        signal.raise_signal(signal.SIGTERM)
        return 0

    assert guarded(work) == 130
    assert capsys.readouterr().err == "stopped; the same command continues\n"
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(("name", "code"), [("SIGINT", -signal.SIGINT), ("SIGTERM", 130)])
@pytest.mark.parametrize("module", ["bench.run", "studies.beta"])
def test_who_is_stopped_while_modules_are_imported_says_so(tmp_path, module, name, code):
    """And any other error there keeps its traceback."""
    words = [sys.executable, "-m", module, "--help"]
    options = {"capture_output": True, "text": True, "cwd": ROOT, "env": {**os.environ, "PYTHONPATH": str(tmp_path)}}
    (tmp_path / "tyro.py").write_text(f"import signal; signal.raise_signal(signal.{name})")
    stopped = subprocess.run(words, **options)
    assert (stopped.returncode, stopped.stderr) == (code, "stopped; the same command continues\n")
    (tmp_path / "tyro.py").write_text("1 / 0")
    broken = subprocess.run(words, **options)
    assert (broken.returncode, broken.stderr.splitlines()[-1]) == (1, "ZeroDivisionError: division by zero")


def test_commands_can_be_called_from_any_thread():
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(guarded, lambda: 7).result() == 7


def test_what_an_interrupted_run_says_is_shown_as_it_is(capsys):
    def work() -> int:
        raise Interrupted("stopped at step 3 of [bold]x[/]")

    assert guarded(work) == 130
    assert capsys.readouterr().err == "stopped at step 3 of [bold]x[/]\n"


@pytest.mark.parametrize("number", [errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG])
def test_what_is_in_the_way_is_named(capsys, number):
    def work() -> int:
        raise OSError(number, os.strerror(number), "results/runs/x/codes")

    assert guarded(work) == 2
    move = "" if number == errno.ENAMETOOLONG else "move away what is there, or "
    fix = f"{move}name another place"
    assert capsys.readouterr().err == f"error: {os.strerror(number)}: results/runs/x/codes; {fix}\n"


def test_a_link_that_leads_nowhere_is_told_as_such(capsys, tmp_path):
    """The system says of it that it exists."""
    (tmp_path / "codes").symlink_to(tmp_path / "nowhere")
    assert guarded(lambda: (tmp_path / "codes").mkdir(exist_ok=True)) == 2
    told = f"error: {tmp_path}/codes is a link that leads nowhere; move away what is there, or name another place\n"
    assert capsys.readouterr().err == told


@pytest.mark.parametrize("how", ["print('x' * 10**6)", "print('x')", "stdout.print('x')", "sys.exit(print('x'))"])
def test_output_that_nobody_reads_or_takes_ends_the_command_quietly(how):
    """``| head -1`` as SIGPIPE ends programs, and without a word; a full disk with a sentence."""
    code = "import sys; from bench.core.cli import command; from bench.core.progress import stdout\n"
    code += f"sys.exit(command(lambda words: {how} or 0, []))"
    options = {"stderr": subprocess.PIPE, "text": True, "cwd": ROOT, "env": {**os.environ, "PYTHONUNBUFFERED": ""}}
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "wb") as pipe, open("/dev/full", "wb") as full:
        unread, refused = (subprocess.run([sys.executable, "-c", code], stdout=out, **options) for out in (pipe, full))
    assert (unread.returncode, unread.stderr) == (141, "")
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert refused.stderr == "error: No space left on device while writing the output; free or name another place\n"


@pytest.mark.parametrize("kind", ["full", "unread", "closed"])
def test_what_cannot_be_said_ends_no_work(tmp_path, kind):
    """Lines of progress and notices are lost, and neither the result nor the exit code."""
    code = "import os, sys; from bench.core.cli import command; from bench.core.progress import Bar, say\n"
    code += "def work(words):\n"
    code += "    with Bar('x', 9, seconds=0) as bar: [bar.advance() for _ in range(9)]\n"
    code += "    say('y' * 10**5); print('the result', os.open(words[0], os.O_WRONLY | os.O_CREAT) > 2); return 7\n"
    code += "sys.exit(command(work, sys.argv[1:]))"
    reader, writer = os.pipe()
    os.close(reader)
    words = [sys.executable, "-c", code, str(tmp_path / "x")]
    with open(writer, "wb") as unread, open("/dev/full", "wb") as full:
        errors = {"full": full, "unread": unread, "closed": None}[kind]
        close = partial(os.close, 2) if kind == "closed" else None
        options = {"text": True, "cwd": ROOT, "env": {**os.environ, "PYTHONUNBUFFERED": ""}, "preexec_fn": close}
        done = subprocess.run(words, stdout=subprocess.PIPE, stderr=errors, **options)
    assert (done.returncode, done.stdout) == (7, "the result True\n")


def test_a_mistake_that_cannot_be_told_has_its_exit_code():
    code = "import sys; from bench.core.cli import command; from bench.core.errors import UserError\n"
    code += "def work(words): raise UserError('a mistake')\nsys.exit(command(work, []))"
    with open("/dev/full", "wb") as full:
        options = {"stderr": full, "cwd": ROOT, "env": {**os.environ, "PYTHONUNBUFFERED": ""}}
        assert subprocess.run([sys.executable, "-c", code], **options).returncode == 2


def test_a_terminal_that_lacks_a_character_shows_another(monkeypatch):
    """Such as one whose encoding is ASCII."""
    streams = [io.TextIOWrapper(io.BytesIO(), encoding="ascii") for _ in range(2)]
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    assert command(lambda words: print("3 × 3") or 0, []) == 0
    streams[0].flush()
    assert streams[0].buffer.getvalue() == b"3 ? 3\n"


@pytest.mark.parametrize(
    "word", ["postgresql://me:secret@host/x", "--storage=mysql+x://me:secret@h", "a://b?pasword=secret"]
)
def test_an_address_where_none_belongs_is_hidden(word):
    """Commands that take none tell which word they do not know, and it may hold a password."""
    seen = []
    command(lambda words: seen.extend(words) or 0, [word, "folder:///data/x", "plain"])
    assert "secret" not in seen[0]
    assert seen[0].endswith("://***")
    assert seen[1:] == ["folder:///data/x", "plain"]
    command(lambda words: seen.extend(words) or 0, [word], addresses=True)
    assert seen[-1] == word


@pytest.mark.parametrize("words", [["--results", ""], ["--results="], ["x", "--results", "", "--no-resume"]])
def test_an_empty_value_is_told_with_its_flag(capsys, words):
    assert command(lambda words: 0, words) == 2
    told = "error: --results '' is no text that a file could be called by; name another\n"
    assert capsys.readouterr().err == told


def test_a_command_without_an_output_ends_as_it_would(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    assert command(lambda words: 0, []) == 0


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--rate x", "--rate is 'x', which is no number"),
        ("--steps 1.5", "--steps is '1.5', which is no whole number"),
        ("--steps", "--steps needs a value"),
        ("--seeds 1 x", "--seeds cannot take '1', 'x'"),
        ("--kind foo", "--kind is 'foo'; choose from 'hinge', 'other'"),
        ("--step 3", "unknown option --step; perhaps --steps"),
        ("--nowhere-near-it 3", "unknown option --nowhere-near-it"),
        ("name more", "more belongs to no option"),
        ("", "STR is missing"),
    ],
)
def test_a_mistake_on_a_command_line_is_one_sentence_with_the_value_and_the_fix(capsys, monkeypatch, words, told):
    @dataclass
    class Options:
        """What there is."""

        name: tyro.conf.Positional[str]
        rate: float = 0.5
        steps: int = 3
        seeds: tuple[int, ...] = (0,)
        kind: Literal["hinge", "other"] = "hinge"

    arguments = words.split() if words.startswith("name") else ["name" for _ in words[:1]] + words.split()
    with pytest.raises(SystemExit) as stopped:
        cli.command_line(Options, arguments, "python -m it", "Does it.")
    assert stopped.value.code == 2
    assert capsys.readouterr().err == f"error: {told}; python -m it --help lists all\n"
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(encoding="utf-8", isatty=lambda: True))  # a box, and colours
    with pytest.raises(SystemExit):
        cli.command_line(Options, arguments, "python -m it", "Does it.")
    assert capsys.readouterr().err == f"error: {told}; python -m it --help lists all\n"
    assert cli.command_line(Options, ["a", "--steps", "4"], "it", "").steps == 4


def test_what_is_said_while_a_command_line_is_read_is_not_lost(capsys):
    """Only the boxes of mistakes are put into other words."""

    def parse() -> int:
        print("a warning", file=sys.stderr)
        return 7

    assert parsed(parse, "prog") == 7
    assert capsys.readouterr().err == "a warning\n"
