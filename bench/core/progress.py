"""Progress for anything longer than a few seconds: a bar on a terminal, plain lines elsewhere."""

import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from shutil import which
from typing import Any, TextIO

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.segment import Segment

from .text import printable

COMMAND = re.compile(
    r"(?<![\w/])python(?= -m (?:bench|studies)\.)"
)  # by its bare name: one with a path is one that runs


class SafeConsole(Console):
    """A console that takes no orders from what it shows: a name in a stranger's folder is text and nothing else. It
    raises BrokenPipeError where nobody reads it any more, of which commands have an exit code."""

    def on_broken_pipe(self) -> None:
        """In place of rich's exit code 1."""
        raise BrokenPipeError

    def render(self, *arguments: Any, **options: Any) -> Iterable[Segment]:
        """As rich renders it, the text made ``printable``."""
        for segment in super().render(*arguments, **options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))


class _Patient:
    """A stream, but that what it does not take is lost."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> None:
        with suppress(OSError):
            self.stream.write(text)

    def flush(self) -> None:
        with suppress(OSError):
            self.stream.flush()


class Notices(SafeConsole):
    """What happens, on the error stream. No work ends because nobody reads of it, or the disk of a log is full."""

    @property
    def file(self) -> TextIO:
        """Where it goes now."""
        return _Patient(super().file)


console = Notices(stderr=True, highlight=False, emoji=False)  # what happens: progress, notices, errors
stdout = SafeConsole(highlight=False)  # what was asked for: tables


def say(line: str) -> None:
    """Prints one line of what happens, in rich's markup, without wrapping it; commands in it are ``runnable``."""
    console.print(runnable(line), soft_wrap=True)


def runnable(text: str) -> str:
    """``text`` with the interpreter that runs this for "python" in the commands of ours that it names."""
    return COMMAND.sub(lambda _: shlex.quote(program("python", sys.executable)), text)


def program(name: str, path: str) -> str:
    """What a shell in this folder calls the program at ``path``: its bare ``name``, where PATH finds it by that, or its
    path, from here where it is below."""
    if which(name) == path:
        return name
    below = path.removeprefix(f"{os.getcwd()}{os.sep}")
    return below if os.sep in below else os.path.join(os.curdir, below)


def in_words(seconds: float | None) -> str:
    """So many seconds, or that nobody knows."""
    return "unknown" if seconds is None else f"{seconds:.0f} s"


class Bar:
    """Counts from ``start`` to ``total`` with an ETA and a line of figures; use as a context manager.

    On a terminal a live bar; elsewhere one plain line every ``seconds`` (none for work that is done sooner), so
    that log files stay readable. ``eta`` tells how many seconds are left, or None, where that does not follow from how
    much is done.
    """

    def __init__(
        self,
        label: str,
        total: int,
        start: int = 0,
        seconds: float = 10.0,
        eta: Callable[[], float | None] | None = None,
    ):
        self.label, self.total, self.start, self.seconds, self.eta = label, total, start, seconds, eta
        self.done = start

    def __enter__(self) -> "Bar":
        self.began = self.printed = time.monotonic()
        self.live: Progress | None = None
        if console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn())
            times = (
                TimeElapsedColumn(),
                TextColumn("ETA"),
                TextColumn("{task.fields[eta]}") if self.eta else TimeRemainingColumn(),
                TextColumn("{task.fields[figures]}"),
            )
            self.live = Progress(*columns, *times, console=console, transient=True)
            self.live.start()
            self.task = self.live.add_task(
                self.label, total=self.total, completed=self.start, figures="", eta="unknown"
            )
        return self

    def advance(self, count: int = 1, figures: str = "") -> None:
        """Reports ``count`` more units done, with optional ``figures`` such as ``loss 0.12  perplexity 210``."""
        self.done += count
        if self.live is not None:
            told = {"figures": figures} if figures else {}
            self.live.update(self.task, completed=self.done, **told, eta=in_words(self.eta and self.eta()))
            return
        now = time.monotonic()
        if now - self.printed >= self.seconds:
            self.printed = now
            rate = (self.done - self.start) / (now - self.began)
            left = self.eta() if self.eta else (self.total - self.done) / rate if rate else None
            say(escape(f"{self.label}  {self.done}/{self.total}  ETA {in_words(left)}  {figures}".rstrip()))

    def __exit__(self, *exception: object) -> None:
        if self.live is not None:
            self.live.stop()
