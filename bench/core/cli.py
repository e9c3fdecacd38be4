"""The manners of every command: one sentence for a mistake, an exit code, no traceback."""

import errno
from collections.abc import Callable, Iterable
from typing import NamedTuple

from rich.markup import escape

from .errors import Diverged, Interrupted, UserError
from .progress import say
from .store import Run


def guarded(work: Callable[[], int]) -> int:
    """Exit code of ``work``; 2 for what the user can fix and 130 when stopped, each told in one sentence."""
    try:
        return work()
    except UserError as error:
        return fail(str(error))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        return fail(f"{error.strerror} while writing {error.filename or 'results'}; free or choose another --results")
    except Interrupted as stopped:
        say(str(stopped))
        return 130
    except KeyboardInterrupt:
        say("stopped")
        return 130


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
