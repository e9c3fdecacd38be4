"""Progress for anything longer than a few seconds: a bar on a terminal, plain lines elsewhere."""

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

console = Console(stderr=True, highlight=False)  # what happens: progress, notices, errors
stdout = Console(highlight=False)  # what was asked for: tables


def say(line: str) -> None:
    """Prints one line of what happens, in rich's markup, without wrapping it."""
    console.print(line, soft_wrap=True)


class Bar:
    """Counts from ``start`` to ``total`` with an ETA and a line of figures; use as a context manager.

    On a terminal a live bar; elsewhere one plain line every ``seconds`` (none for work that is done sooner), so
    that log files stay readable.
    """

    def __init__(self, label: str, total: int, start: int = 0, seconds: float = 10.0):
        self.label, self.total, self.start, self.seconds = label, total, start, seconds
        self.done = start

    def __enter__(self) -> "Bar":
        self.began = self.printed = time.monotonic()
        self.live: Progress | None = None
        if console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn())
            times = (
                TimeElapsedColumn(),
                TextColumn("ETA"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[figures]}"),
            )
            self.live = Progress(*columns, *times, console=console, transient=True)
            self.live.start()
            self.task = self.live.add_task(self.label, total=self.total, completed=self.start, figures="")
        return self

    def advance(self, count: int = 1, figures: str = "") -> None:
        """Reports ``count`` more units done, with optional ``figures`` such as ``loss 0.12  perplexity 210``."""
        self.done += count
        if self.live is not None:
            self.live.update(self.task, completed=self.done, **({"figures": figures} if figures else {}))
            return
        now = time.monotonic()
        if now - self.printed >= self.seconds:
            self.printed = now
            rate = (self.done - self.start) / (now - self.began)
            eta = f"{(self.total - self.done) / rate:.0f} s" if rate else "unknown"
            print(
                f"{self.label}  {self.done}/{self.total}  ETA {eta}  {figures}".rstrip(),
                file=sys.stderr,
                flush=True,
            )

    def __exit__(self, *exception: object) -> None:
        if self.live is not None:
            self.live.stop()
