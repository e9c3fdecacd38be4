"""The manners of every command: one sentence for a mistake, an exit code, no traceback."""

import errno
import io
import itertools
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, suppress
from pathlib import Path
from typing import NamedTuple, TextIO, TypeVar

import tyro
from rich.markup import escape

from .errors import Diverged, Interrupted, UserError, terminations
from .files import cache_dir, reason
from .manual import Manual, show, wanted
from .progress import runnable, say
from .runs import Run
from .text import is_text

# What the system says of a place that takes no more.
REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO)
SHELVES = {"runs", "priors", "studies", "reports"}  # folders of a store
# What it says where something else is than the file or folder that belongs there.
IN_THE_WAY = (errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG)

Parsed = TypeVar("Parsed")

# An address, which may hold a password: what stands before :// alone may be repeated.
ADDRESS = re.compile(r"(?!folder:)\b([\w+.-]+://)\S+")


def command(work: Callable[[list[str]], int], arguments: list[str] | None, addresses: bool = False) -> int:
    """Exit code of ``work`` on ``arguments``, by default those of the process, as ``guarded`` has it. A word that no
    file can be called by is refused, and an empty one, which stands for the present folder. Unless the command takes
    ``addresses``, one among them is a mistake that will be told, and is hidden."""
    words = sys.argv[1:] if arguments is None else arguments
    words = words if addresses else [ADDRESS.sub(r"\1***", word) for word in words]
    _occupy()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal may not have every arrow

    def checked() -> int:
        for before, word in itertools.pairwise(["", *words]):
            flag, _, value = word.partition("=") if re.match("--.*=", word) else (before, "", word)
            if not value or not is_text(value):
                whose = f"{flag} " if flag.startswith("--") and is_text(flag) else ""
                raise UserError(f"{whose}{value!a} is no text that a file could be called by; name another")
        try:
            return work(words)
        finally:
            _flush(sys.stdout)

    code = guarded(checked)
    with suppress(OSError):  # nobody is left to tell
        _flush(sys.stderr)
    return code


def _occupy() -> None:
    """Has a standard stream that whoever started this closed lead nowhere: else the next file that is opened would be
    taken for it, and whatever is printed below Python would go into that."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free


def _flush(stream: TextIO | None) -> None:
    """Writes what is left of an output, or has it go nowhere at the exit and raises what the system says."""
    if stream is None:  # closed by whoever started this
        return
    try:
        stream.flush()
    except OSError:
        with suppress(OSError):  # a stream that is no file
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        raise


def guarded(work: Callable[[], int]) -> int:
    """Exit code of ``work``; 2 for what the user can fix and 130 when stopped by SIGINT or SIGTERM, each told in one
    sentence; 141, as of a program that SIGPIPE ends, when nobody reads the output any more, as after ``| head``."""
    try:
        with _terminable():
            return work()
    except UserError as error:
        return fail(str(error))
    except BrokenPipeError:
        return 128 + signal.SIGPIPE
    except OSError as error:
        if error.errno not in REFUSALS + IN_THE_WAY and not _has_gone(error):
            raise
        return fail(refusal(error))
    except (MemoryError, RuntimeError) as error:
        if not lacks_memory(error):
            raise
        said = str(error).partition("\n")[0][:200]
        return fail(f"not enough memory ({said}); try a smaller --batch-size or --width")
    except Interrupted as stopped:
        say(escape(str(stopped)))
        return 130
    except KeyboardInterrupt:
        say("stopped; the same command continues")
        return 130


def lacks_memory(error: BaseException) -> bool:
    """Whether it says that there is no memory left; torch's CPU allocator has no exception type of its own."""
    if isinstance(error, MemoryError):
        return True
    return bool(re.search("can't allocate memory|not enough memory|out of memory|Cannot allocate memory", str(error)))


def _has_gone(error: OSError) -> bool:
    """Whether it is about a file of the store, whose folder somebody has removed or moved."""
    return error.errno == errno.ENOENT and bool(error.filename) and _in_store(Path(os.fsdecode(error.filename)))


def _in_store(path: Path) -> bool:
    return not SHELVES.isdisjoint(parent.name for parent in path.parents)


def refusal(error: OSError) -> str:
    """What a place that takes no more, or where something else is, means for the user, in one sentence."""
    if _has_gone(error):
        return f"{error.filename} has gone while this command was at work; run the same command again"
    path = Path(error.filename or "the output")  # all files are named
    if error.errno in IN_THE_WAY:
        move = "" if error.errno == errno.ENAMETOOLONG else "move away what is there, or "
        return f"{reason(error)}; {move}name another place"
    other = "name another place"
    if cache_dir() in path.parents:
        other = "set VQBENCH_CACHE to another folder"
    elif _in_store(path):
        other = "choose another --results"
    return f"{error.strerror} while writing {path}; free or {other}"


@contextmanager
def _terminable() -> Iterator[None]:
    """Makes each of ``terminations`` a KeyboardInterrupt, outside of loops that have a better answer
    (``bench.training.loop``)."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals reach the main thread only
        return

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, stop) for number in terminations()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# What tyro says of a command line → what commands say of it.
MISTAKES = (
    (r"Error parsing (\S+): could not convert string to float: (.*)", r"\1 is \2, which is no number"),
    (r"Error parsing (\S+): invalid literal for int\(\) with base 10: (.*)", r"\1 is \2, which is no whole number"),
    (r"Error parsing (\S+): Could not find valid parse for arguments: \[(.*)\]", r"\1 cannot take \2"),
    (r"Error parsing (\S+): (.*)", r"\1: \2"),
    (r"Missing from .*?: (\S+) .*", r"\1 is missing"),
    (r"Missing value for argument '(\S+)'.*", r"\1 needs a value"),
    (r"invalid choice (.*) for argument '(\S+)'\. Expected one of \((.*?),?\) ?\.?", r"\2 is \1; choose from \3"),
    (r"Unrecognized options: (--\S+?)(?:,.*)?", r"unknown option \1"),
    (r"Unrecognized options: (.*)", r"\1 belongs to no option"),
)


def command_line(
    kind: type[Parsed],
    arguments: Sequence[str],
    prog: str,
    description: str | None,
    default: Parsed | None = None,
    manual: Manual = Manual(),  # noqa: B008
) -> Parsed:
    """``arguments`` as ``kind``, where they do not say otherwise as in ``default``. On a mistake one sentence, and exit
    code 2; on --help what ``manual`` makes of ``kind``, and exit code 0."""
    prog, description = runnable(prog), description and runnable(description)
    if asked := wanted(arguments):
        show(kind, default, prog, description, manual, asked == "--help-all")
    given = {} if default is None else {"default": default}
    return parsed(lambda: tyro.cli(kind, args=arguments, prog=prog, description=description, **given), prog)


def parsed(parse: Callable[[], Parsed], prog: str) -> Parsed:
    """What ``parse`` makes of a command line with tyro, whose boxes become one sentence, with exit code 2."""
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            made = parse()
        sys.stderr.write(said.getvalue())
        return made
    except SystemExit as stop:
        if stop.code:
            fail(_sentence(said.getvalue(), prog))
        raise


def _sentence(box: str, prog: str) -> str:
    """The mistake that tyro has drawn a ``box`` around, and where to read on."""
    lines = [line.strip("│ ") for line in re.sub("\x1b\\[[0-9;]*m", "", box).splitlines()]
    lines = lines[1 if lines[:1] and lines[0].startswith("╭") else 2 :]  # without UTF-8 a title is a line of its own
    first = " ".join(itertools.takewhile(lambda line: line.strip("─-"), lines))
    words = next((re.sub(f"^{old}$", new, first) for old, new in MISTAKES if re.match(f"^{old}$", first)), first)
    meant = [line.split()[0] for line in lines if re.match("--\\w", line)]
    if words.startswith("unknown") and meant:
        words += f"; perhaps {' or '.join(dict.fromkeys(meant))}"
    return f"{words.rstrip('.')}; {prog} --help lists all"


def fail(message: str) -> int:
    """Prints one sentence and returns the exit code of mistakes that the user can fix."""
    say(f"[bold red]error:[/] {escape(message)}")
    return 2


class Trial(NamedTuple):
    """One trial of a command: what it is called, its run, and what trains and scores that."""

    label: str
    run: Run
    work: Callable[[], Run]


def run_each(trials: Iterable[Trial]) -> tuple[list[Run], list[str]]:
    """Runs one trial after the other, and says how each ended. Returns the finished runs, and the labels of those that
    diverged."""
    finished, diverged = [], []
    for label, run, work in trials:
        known = run.finished
        try:
            finished.append(work())
        except Diverged as error:
            diverged.append(label)
            say(f"[red]diverged:[/] {escape(f'{label}: {error}')}")
        else:
            say(f"{'already finished' if known else 'finished'}: {escape(str(run.folder))}")
    return finished, diverged
