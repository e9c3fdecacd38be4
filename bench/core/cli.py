"""The manners of every command: one sentence for a mistake, an exit code, no traceback."""

from __future__ import annotations

import errno
from collections.abc import Callable

from rich.markup import escape

from .errors import Interrupted, UserError
from .progress import say


def guarded(work: Callable[[], int]) -> int:
    """Exit code of ``work``; 2 for what the user can mend and 130 when stopped, each told in one sentence."""
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
    """Prints one sentence and returns the exit code of mistakes that the user can mend."""
    say(f"[bold red]error:[/] {escape(message)}")
    return 2
