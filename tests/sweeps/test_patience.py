"""A database that goes away for a while, for good, or is broken: nothing is lost, and one sentence says what to do."""

import sqlite3
from types import SimpleNamespace

import optuna
import pytest
from optuna.exceptions import StorageInternalError
from sqlalchemy import exc

from bench.core.errors import UserError
from bench.sweeps import patience
from bench.sweeps.index import Index
from bench.sweeps.patience import PatientStorage, check_damage, reason_of


class Clock:
    """Stands in for the time module; sleeping is all that makes time pass."""

    def __init__(self):
        self.now, self.pauses = 0.0, []

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(patience, "time", clock)
    return clock


def away(message: str = "server closed the connection") -> Exception:
    """What Optuna raises while the database is away."""
    error = StorageInternalError("An exception is raised during the commit.")
    error.__cause__ = exc.OperationalError("SELECT", {}, sqlite3.OperationalError(f"{message}\nIs it running?"))
    return error


class Flaky(PatientStorage):
    """A storage whose reads fail as often as ``left`` says, with ``error``."""

    left, asked, error = 0, 0, staticmethod(away)


def _read(self: Flaky, *arguments, **options):
    self.asked += 1
    if self.left:
        self.left -= 1
        raise self.error()
    return "found"


Flaky.get_all_studies = patience._patient(_read)


@pytest.fixture
def storage(clock) -> Flaky:
    return Flaky("sqlite:///:memory:", "sqlite:///x")


def test_a_call_is_repeated_until_the_database_is_back(storage, clock, capsys):
    """Each pause is twice the one before up to the longest, and a single line tells."""
    storage.left = 7
    assert storage.get_all_studies() == "found"
    assert clock.pauses == [0.5, 1, 2, 4, 8, 10, 10]
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "the database sqlite:///x is away (server closed the connection); trying again for 60 s"


def test_one_that_stays_away_is_told_in_one_sentence(storage, clock):
    storage.left = 99
    with pytest.raises(UserError) as error:
        storage.get_all_studies()
    told = "the database sqlite:///x is away (server closed the connection)"
    assert str(error.value) == f"{told}; when it is back, the same command continues"
    assert 50 < clock.now <= 60
    storage.left = 0
    assert storage.get_all_studies() == "found"  # the next call has patience of its own


@pytest.mark.parametrize("message", ["database disk image is malformed", "file is not a database", "no such table: x"])
def test_a_broken_file_is_not_waited_for_and_its_fix_is_named(storage, clock, message):
    storage.left, storage.error = 99, lambda: away(message)
    with pytest.raises(UserError) as error:
        storage.get_all_studies()
    assert str(error.value) == (
        f"the database sqlite:///x is damaged ({message}); delete it, and python -m bench.study rebuild makes it again "
        "from the runs"
    )
    assert clock.pauses == []


@pytest.mark.parametrize(
    "error",
    [
        exc.IntegrityError("INSERT", {}, sqlite3.IntegrityError("UNIQUE")),
        exc.DataError("INSERT", {}, sqlite3.DataError("too long")),
        optuna.exceptions.UpdateFinishedTrialError("ended"),
        KeyError("study"),
    ],
)
def test_what_was_asked_wrongly_is_not_asked_again(storage, clock, error):
    def refuse():
        raise error

    storage.left, storage.error = 1, refuse
    with pytest.raises(type(error)):
        storage.get_all_studies()
    assert (storage.asked, clock.pauses) == (1, [])


def test_a_connection_that_was_cut_is_away_whatever_the_error_is_called():
    cut = exc.DBAPIError("SELECT", {}, sqlite3.Error("terminated"), connection_invalidated=True)
    assert patience._is_away(cut)
    assert not patience._is_away(exc.DBAPIError("SELECT", {}, sqlite3.Error("x"), connection_invalidated=False))
    assert patience._is_away(away())


def test_the_reason_is_what_the_database_said_and_has_no_address():
    assert reason_of(away("gone")) == "gone"
    assert reason_of(ValueError("\nrefused\n(details)")) == "refused"


def test_every_call_that_a_study_makes_has_patience(tmp_path, clock, monkeypatch):
    """Of opening, enqueueing, claiming, telling and looking: the database is away before each, once."""
    index = Index(f"sqlite:///{tmp_path}/x.db", tmp_path)
    failing = SimpleNamespace(next=False)
    engine_of = index.storage.scoped_session

    def session():
        if failing.next:
            failing.next = False
            raise exc.OperationalError("SELECT", {}, sqlite3.OperationalError("away"))
        return engine_of()

    monkeypatch.setattr(index.storage, "scoped_session", session)

    def once_away(call):
        failing.next, before = True, len(clock.pauses)
        result = call()
        assert len(clock.pauses) > before, call
        return result

    opened = once_away(lambda: index.open("one", ("psnr",), 10))
    once_away(lambda: index.enqueue(opened, {"beta": 0.5}, "run"))
    trial = once_away(lambda: index.claim(opened, {"run"}))
    assert once_away(lambda: index.states(opened)) == {"run": {"RUNNING"}}
    once_away(lambda: index.recover(opened))
    once_away(lambda: trial.set_user_attr("status", "interrupted"))
    once_away(lambda: trial.suggest_float("lr", 0.1, 0.2))
    once_away(lambda: trial.report(0.5, 1))
    once_away(lambda: opened.tell(trial, 20.0))
    (ended,) = index.trials(opened)
    assert (ended.state.name, ended.value, ended.params["beta"]) == ("COMPLETE", 20.0, 0.5)


def test_a_broken_sqlite_file_is_told_when_it_is_opened(tmp_path):
    path = tmp_path / "x.db"
    path.write_bytes(b"this is no database" * 100)
    with pytest.raises(UserError, match=r"is damaged \(file is not a database\); delete it, and python -m bench.study"):
        Index(f"sqlite:///{path}", tmp_path)
    check_damage("x", ValueError("something else"))
