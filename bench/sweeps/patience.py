"""An Optuna storage that waits for a database which is away for a while."""

import threading
import time
from collections.abc import Callable
from functools import wraps
from typing import Any

from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage, RDBStorage
from rich.markup import escape
from sqlalchemy import event, exc

from bench.core.errors import UserError
from bench.core.progress import say

from .bulk import add_ended

PATIENCE_SECONDS = 60.0  # until a database that is away is given up
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 10.0  # seconds between attempts; each is twice the one before
HASTE = "PRAGMA synchronous=OFF"
DAMAGED = ("malformed", "not a database", "no such table")  # in what SQLite says of a broken file


class PatientStorage(RDBStorage):
    """As RDBStorage, which it is but for errors: calls are repeated while the database is away. ``shown`` is the URL as
    it may be printed. Raises UserError where it stays away for PATIENCE_SECONDS, and at once where it is damaged.

    A call that reached the database before it went away may count twice: a further waiting trial, which finds its run
    finished, or one that nobody runs and that is taken for dead. Neither loses or repeats a run.
    """

    def __init__(self, url: str, shown: str, **options: Any):
        self.shown, self.busy = shown, threading.local()
        super().__init__(url, **options)
        if url.startswith("sqlite"):  # it has nothing that the runs have not, so it need not wait for the disk
            event.listen(self.engine, "checkout", lambda raw, *_: raw.execute(HASTE))  # several are connected already


def reason_of(error: BaseException) -> str:
    """What the database itself said, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(getattr(error, "orig", None) or error).strip().partition("\n")[0]


def check_damage(shown: str, error: BaseException) -> None:
    """Raises UserError, with the fix, where ``error`` says that the database ``shown`` is a broken file."""
    reason = reason_of(error)
    if any(words in reason for words in DAMAGED):
        fix = "delete it, and python -m bench.study rebuild makes it again from the runs"
        raise UserError(f"the database {shown} is damaged ({reason}); {fix}") from error


def _is_away(error: BaseException | None) -> bool:
    """Whether the connection failed, and not what was asked."""
    away = (exc.OperationalError, exc.InterfaceError, exc.PendingRollbackError, exc.DisconnectionError)
    return error is not None and (
        isinstance(error, away) or getattr(error, "connection_invalidated", False) or _is_away(error.__cause__)
    )


def _patient(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def call(self: PatientStorage, *arguments: Any, **options: Any) -> Any:
        if getattr(self.busy, "inside", False):
            return method(self, *arguments, **options)  # the outermost call is repeated as a whole
        self.busy.inside, pause, since = True, FIRST_PAUSE, time.monotonic()
        try:
            while True:
                try:
                    return method(self, *arguments, **options)
                except (StorageInternalError, exc.SQLAlchemyError) as error:
                    check_damage(self.shown, error)
                    if not _is_away(error):
                        raise
                    told = f"the database {self.shown} is away ({reason_of(error)})"
                    if time.monotonic() - since + pause > PATIENCE_SECONDS:
                        raise UserError(f"{told}; when it is back, the same command continues") from error
                    if pause == FIRST_PAUSE:
                        say(f"[yellow]{escape(told)}; trying again for {PATIENCE_SECONDS:.0f} s[/]")
                    time.sleep(pause)
                    pause = min(2 * pause, LONGEST_PAUSE)
        finally:
            self.busy.inside = False

    return call


# What Optuna calls, of the storage itself and of the one behind its cache.
for _name in {
    *BaseStorage.__abstractmethods__,
    "_create_new_trial",
    "_set_trial_param",
    "_get_trials",
    "_get_stale_trial_ids",
}:
    setattr(PatientStorage, _name, _patient(getattr(RDBStorage, _name)))
PatientStorage.first_heartbeat = _patient(RDBStorage.record_heartbeat)  # for further ones the next is soon enough
PatientStorage.add_ended = _patient(add_ended)
