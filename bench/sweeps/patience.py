"""An Optuna storage that waits for a database which is away for a while, and says what no waiting mends."""

import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from json import JSONDecodeError
from typing import Any

from alembic.util import CommandError
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage, RDBStorage
from optuna.storages._rdb.models import NOT_FOUND_MSG
from rich.markup import escape
from sqlalchemy import event, exc

from bench.core.errors import UserError
from bench.core.progress import say

from .address import EXAMPLES, check_place, without_password
from .bulk import add_trials, narrow

PATIENCE_SECONDS = 60.0  # until a database that is away is given up
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 10.0  # seconds between attempts; each is twice the one before
HASTE = "PRAGMA synchronous=OFF"
# What databases say of a file that is broken, of tables that are another program's, and of what no waiting mends.
BROKEN = re.compile("malformed|not a database|no such table|relation .* does not exist")
FOREIGN = re.compile("no such column|has no column|column .* does not exist")
REFUSED = re.compile("readonly|read-only|disk I/O error|disk is full|unable to open database file")
MISUSED = (TypeError, AttributeError, AssertionError, JSONDecodeError)  # of values that Optuna never wrote
MISREAD = (*MISUSED, ValueError, LookupError, RecursionError)  # where nothing else can be wrong
REBUILD = "python -m bench.study rebuild makes it again from the runs"


class PatientStorage(RDBStorage):
    """As RDBStorage, which it is but for errors: calls are repeated while the database is away. ``shown`` is the URL as
    it may be printed. Raises UserError where it stays away for PATIENCE_SECONDS, and at once where it is damaged
    or takes nothing.

    A call that reached the database before it went away may count twice: a further waiting trial, which finds its run
    finished, or one that nobody runs and that is taken for dead. Neither loses or repeats a run.
    """

    def __init__(self, url: str, shown: str, **options: Any):
        self.shown, self.busy = shown, threading.local()
        try:
            super().__init__(url, **options)
        except (StorageInternalError, exc.SQLAlchemyError) as error:
            self._check_damage(error)
            raise
        except (RuntimeError, CommandError) as error:
            raise self.damage("another version of Optuna made it") from error
        if url.startswith("sqlite"):  # it has nothing that the runs have not, so it need not wait for the disk
            event.listen(self.engine, "checkout", lambda raw, *_: raw.execute(HASTE))  # several are connected already

    def damage(self, reason: str) -> UserError:
        """What to raise where the database holds what it should not, for ``reason``."""
        fix = "delete it" if self.shown.startswith("sqlite") else "drop it, or name another with --storage"
        return UserError(f"the database {self.shown} is damaged ({reason}); {fix}, and {REBUILD}")

    @contextmanager
    def reading(self) -> Iterator[None]:
        """For what uses values of the database: those that Optuna never wrote, such as a time that is a text, are told
        as damage."""
        try:
            yield
        except MISUSED as error:
            raise self.damage(f"{type(error).__name__} {error}") from error

    def _check_damage(self, error: Exception) -> None:
        reason = reason_of(error)
        if BROKEN.search(reason) or isinstance(error, exc.IntegrityError):  # rows of a table without those of another
            raise self.damage(reason) from error
        if FOREIGN.search(reason):
            told = f"the database {self.shown} has tables of another program ({reason})"
            raise UserError(f"{told}; name another with --storage, and {REBUILD}") from error

    def _check_use(self, error: Exception) -> None:
        reason = reason_of(error)
        self._check_damage(error)
        if REFUSED.search(reason):
            fix = "see that it is there, has room and can be written, or name another with --storage"
            told = f"the database {self.shown} takes nothing ({reason})"
            raise UserError(f"{told}; {fix}; the same command continues") from error


@contextmanager
def opening(url: str) -> Iterator[None]:
    """For what opens the database at ``url``: why that cannot be is told as a UserError, with the fix."""
    check_place(url)
    with telling(url):
        yield


@contextmanager
def telling(url: str) -> Iterator[None]:
    """The same for what only reads ``url``, whose database may have no place yet."""
    shown = without_password(url)
    try:
        yield
    except ImportError as error:
        driver = (error.__cause__ or error).name  # Optuna's own error has none
        fix = f"install the Python package that has {driver}"
        if shown.startswith("postgresql"):
            fix = "pip install 'vqbench[postgres]', and let the URL begin with postgresql+psycopg://"
        raise UserError(f"there is no driver for {shown}; {fix}") from error
    except (StorageInternalError, exc.SQLAlchemyError, ValueError) as error:
        reason = f" ({reason_of(error)})" if "://" in shown else ""  # which may have a part of what is hidden
        place = "VQBENCH_STORAGE" if url == os.environ.get("VQBENCH_STORAGE") else "--storage"
        raise UserError(f"cannot open {shown}{reason}; name a database with {place}, such as {EXAMPLES}") from error


def reason_of(error: BaseException) -> str:
    """What the database itself said, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(getattr(error, "orig", None) or error).strip().partition("\n")[0]


def _is_away(error: BaseException | None) -> bool:
    """Whether the connection failed, and not what was asked."""
    away = (exc.OperationalError, exc.InterfaceError, exc.PendingRollbackError, exc.DisconnectionError)
    return error is not None and (
        isinstance(error, away) or getattr(error, "connection_invalidated", False) or _is_away(error.__cause__)
    )


def _is_stored(error: Exception, reading: bool) -> bool:
    """Whether ``error`` is of what the database holds. Who reads asks by names and ids alone that are from there; who
    writes may have asked wrongly, but for text that is no JSON and no state of a trial."""
    return reading or type(error) is LookupError or isinstance(error, JSONDecodeError)


def _patient(method: Callable[..., Any]) -> Callable[..., Any]:
    reading = method.__name__.lstrip("_").startswith(("get", "narrow"))  # which is told nothing but a study

    @wraps(method)
    def call(self: PatientStorage, *arguments: Any, **options: Any) -> Any:
        if getattr(self.busy, "inside", False):
            return method(self, *arguments, **options)  # the outermost call is repeated as a whole
        self.busy.inside, pause, since = True, FIRST_PAUSE, time.monotonic()
        try:
            while True:
                try:
                    return method(self, *arguments, **options)
                except MISREAD as error:
                    if not reading and error.args == (NOT_FOUND_MSG,):
                        told = f"the study is gone from the database {self.shown}"
                        raise UserError(f"{told}; its results are in the store; the same command continues") from error
                    if _is_stored(error, reading):
                        raise self.damage(f"{type(error).__name__} {error}") from error
                    raise
                except (StorageInternalError, exc.SQLAlchemyError) as error:
                    self._check_use(error)
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
PatientStorage.add_trials = _patient(add_trials)
PatientStorage.narrow = _patient(narrow)
