"""How a run can end without scores, as exceptions that every room knows."""

import signal
from pathlib import Path


class UserError(Exception):
    """Something the user can fix. The message is one sentence with the offending value and the fix.

    Command lines print it after ``error:`` without a traceback and exit with code 2.
    """


class Lost(UserError):
    """Another process that works on the same trial ended or is silent."""


class Damaged(UserError):
    """A stored file does not hold what was written to it. The message names the file."""

    def __init__(self, path: object, what: str):
        super().__init__(f"{path} is damaged: {what}; move it away and run the same command again")


class Copied(Damaged):
    """A run lies in a folder that is called otherwise. The message names both."""

    def __init__(self, folder: Path, owner: str):
        told = f"{folder} is a copy of the run {owner}, whose id its files have"
        UserError.__init__(self, f"{told}; call it that, or move it out of {folder.parent}")


class Diverged(Exception):
    """A loss or gradient was not finite. The message names the step and the settings to change."""


class Interrupted(Exception):
    """The user stopped the run; the checkpoint is written and the same command continues it."""


def terminations() -> list[signal.Signals]:
    """Signals that ask a process to stop besides Ctrl-C: SIGTERM, and that of a terminal that is gone, unless whoever
    started this has it ignored, as nohup does."""
    gone = getattr(signal, "SIGHUP", None)
    ignored = gone is None or signal.getsignal(gone) == signal.SIG_IGN
    return [signal.SIGTERM] if ignored else [signal.SIGTERM, gone]
