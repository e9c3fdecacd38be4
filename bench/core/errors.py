"""How a run can end without scores, as exceptions that every room knows."""


class UserError(Exception):
    """Something the user can fix. The message is one sentence with the offending value and the fix.

    Command lines print it after ``error:`` without a traceback and exit with code 2.
    """


class Diverged(Exception):
    """A loss or gradient was not finite. The message names the step and the settings to change."""


class Interrupted(Exception):
    """The user stopped the run; the checkpoint is written and the same command continues it."""
