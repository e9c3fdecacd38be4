"""A database that goes away for a while, for good, or is broken: nothing is lost, and one sentence says what to do."""

import contextlib
import shutil
import sqlite3
from types import SimpleNamespace

import optuna
import pytest
from optuna.exceptions import StorageInternalError
from sqlalchemy import exc

from bench.core.errors import UserError
from bench.core.store import Store
from bench.sweeps import patience
from bench.sweeps.index import Index, rebuild
from bench.sweeps.patience import PatientStorage, reason_of
from bench.tokenizers.config import make_config
from tests.fabricate import fabricate


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


def get_all_studies(self: Flaky) -> str:
    return _read(self)


def delete_study(self: Flaky) -> str:
    return _read(self)


Flaky.get_all_studies, Flaky.delete_study = map(patience._patient, (get_all_studies, delete_study))


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
        exc.DataError("INSERT", {}, sqlite3.DataError("too long")),
        optuna.exceptions.UpdateFinishedTrialError("ended"),
    ],
)
def test_what_was_asked_wrongly_is_not_asked_again(storage, clock, error):
    def refuse():
        raise error

    storage.left, storage.error = 1, refuse
    with pytest.raises(type(error)):
        storage.get_all_studies()
    assert (storage.asked, clock.pauses) == (1, [])


@pytest.mark.parametrize("error", [KeyError("study"), ValueError("not like this"), TypeError("nor like that")])
def test_what_is_written_wrongly_is_no_damage(storage, clock, error):
    """It may be a mistake of this program; one that reads asks by what it was told before."""

    def refuse():
        raise error

    storage.left, storage.error = 9, refuse
    with pytest.raises(type(error)):
        storage.delete_study()
    with pytest.raises(UserError, match=rf"is damaged \({type(error).__name__} "):
        storage.get_all_studies()
    assert (storage.asked, clock.pauses) == (2, [])


REFUSED = [
    "attempt to write a readonly database",
    "disk I/O error",
    "database or disk is full",
    "unable to open database file",
    "cannot execute INSERT in a read-only transaction",
]


@pytest.mark.parametrize("message", REFUSED)
def test_a_database_that_takes_nothing_is_not_waited_for(storage, clock, message):
    """No pause mends it, and its trials are nobody's failure: it is told at once, with the fix."""
    storage.left, storage.error = 99, lambda: away(message)
    with pytest.raises(UserError) as error:
        storage.get_all_studies()
    assert str(error.value) == (
        f"the database sqlite:///x takes nothing ({message}); see that it is there, has room and can be written, or "
        "name another with --storage; the same command continues"
    )
    assert (storage.asked, clock.pauses) == (1, [])


@pytest.mark.parametrize("message", ["database is locked", "database table is locked"])
def test_a_database_that_another_process_holds_is_waited_for(storage, clock, message):
    storage.left, storage.error = 2, lambda: away(message)
    assert storage.get_all_studies() == "found"
    assert clock.pauses == [0.5, 1]


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
    once_away(lambda: index.enqueue(opened, [({"beta": 0.5}, "run")]))
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


# -- a database that opens, and holds what Optuna did not write -------------------------------------------------------

STUDY = {"kind": "ablation", "sweep": ["beta"], "metrics": ["psnr"], "space": {}}
DAMAGE = {  # SQL → what is said of the database
    "DROP TABLE trials": "UNIQUE constraint failed: trial_",
    "DELETE FROM trials": "UNIQUE constraint failed: trial_",
    "DROP TABLE studies": "KeyError 'Record does not exist.'",
    "UPDATE trials SET state = 'DONE'": "LookupError 'DONE' is not among the defined enum values",
    "UPDATE trials SET datetime_start = 'noon'": "ValueError ",
    "UPDATE trial_user_attributes SET value_json = '{'": "JSONDecodeError ",
    "UPDATE trial_user_attributes SET value_json = '%s'" % ("[" * 50_000): "RecursionError ",
    "UPDATE trial_system_attributes SET value_json = NULL": "TypeError ",
    "UPDATE study_system_attributes SET value_json = 'psnr'": "JSONDecodeError ",
    "UPDATE trial_params SET distribution_json = '{}'": "KeyError ",
    """UPDATE trial_params SET distribution_json = '{"name": "No", "attributes": {}}'""": "ValueError ",
    "UPDATE study_directions SET direction = 'MINIMIZE'": "study one-cnn is optimised in another direction than its",
    "UPDATE study_directions SET direction = 'UP'": "LookupError 'UP' is not among the defined enum values",
    "DELETE FROM study_directions": "study one-cnn is optimised in another direction than its metrics are",
    "UPDATE alembic_version SET version_num = 'v99'": "another version of Optuna made it",
    "INSERT INTO alembic_version VALUES ('v99')": "another version of Optuna made it",
    "UPDATE trial_user_attributes SET value_json = '[1]' WHERE key = 'run_id'": "TypeError ",
    "UPDATE trial_user_attributes SET value_json = '\"long\"' WHERE key = 'seconds'": "TypeError ",
    "UPDATE trials SET state = 'FAIL'; INSERT INTO trial_user_attributes (trial_id, key, value_json) "
    "VALUES (1, 'status', '{}')": "TypeError ",
    "UPDATE study_system_attributes SET value_json = '5' WHERE key = 'study:metric_names'": "TypeError ",
    "INSERT INTO study_system_attributes (study_id, key, value_json) VALUES (1, 'artifacts:abc', '5')": "TypeError ",
    "INSERT INTO study_system_attributes (study_id, key, value_json) VALUES (1, 'dashboard:note_ver', '\"1\"')": (
        "TypeError "
    ),
    "INSERT INTO study_system_attributes (study_id, key, value_json) VALUES (1, 'dashboard:3:note_ver', '\"1\"')": (
        "TypeError "
    ),
    "UPDATE trial_values SET value = NULL": "AssertionError ",
    "UPDATE trials SET number = NULL": "TypeError ",
}


@pytest.fixture(scope="module")
def indexed(tmp_path_factory):
    """A store with a study of two runs, and the bytes of its database."""
    store = Store(tmp_path_factory.mktemp("indexed"))
    runs = [fabricate(store, make_config("cnn", "smoke", seed=seed)) for seed in (0, 1)]
    rows = {run.folder.name: {"backbone": "cnn", "beta": 0.25, "seed": seed} for seed, run in enumerate(runs)}
    store.extend_study("one", STUDY, rows)
    assert rebuild(Index(f"sqlite:///{store.root}/x.db", store.root), store, "one") == 2
    return store, (store.root / "x.db").read_bytes()


def use(path, store) -> None:
    """What a study does with the database that lies at ``path``."""
    index = Index(f"sqlite:///{path}", path.parent)
    rebuild(index, store, "one")
    study = index.open("one-cnn", ("psnr",))
    index.enqueue(study, [({"beta": 0.5}, "another")])
    index.tell(study, index.claim(study, {"another"}), [store.runs()[0]], ("psnr",))
    index.ended(study), index.seconds(study)
    index.attach(study, "what was found", [])


@pytest.mark.parametrize("statement", DAMAGE, ids=lambda statement: statement[:60])
def test_a_database_that_holds_what_optuna_did_not_write_is_damaged(indexed, tmp_path, clock, statement):
    store, whole = indexed
    path = tmp_path / "x.db"
    path.write_bytes(whole)
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        database.executescript(statement)
    with pytest.raises(UserError) as error:
        use(path, store)
    told = str(error.value)
    assert told.startswith(f"the database sqlite:///{path} is damaged ({DAMAGE[statement]}")
    assert told.endswith("); delete it, and python -m bench.study rebuild makes it again from the runs")
    assert told.count("\n") == 0
    assert clock.pauses == []


def test_a_database_that_was_deleted_is_made_again(indexed, tmp_path):
    store, whole = indexed
    path = tmp_path / "x.db"
    for content in (whole, None):
        path.unlink() if content is None else path.write_bytes(content)
        use(path, store)


@pytest.mark.parametrize("table", ["trials", "studies", "version_info", "trial_user_attributes"])
def test_a_database_of_another_program_is_not_to_be_deleted(indexed, tmp_path, clock, table):
    store, path = indexed[0], tmp_path / "theirs.db"
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        database.execute(f"CREATE TABLE {table} (theirs TEXT)")
    with pytest.raises(UserError) as error:
        use(path, store)
    told = str(error.value)
    assert told.startswith(f"the database sqlite:///{path} has tables of another program (")
    assert told.endswith(
        "); name another with --storage, and python -m bench.study rebuild makes it again from the runs"
    )
    assert clock.pauses == []


def test_a_server_s_database_is_not_a_file_to_delete():
    shown = "postgresql://host/x"
    storage = SimpleNamespace(shown=shown)
    told = str(PatientStorage.damage(storage, 'relation "trials" does not exist'))
    fix = "drop it, or name another with --storage, and python -m bench.study rebuild makes it again from the runs"
    assert told == f'the database {shown} is damaged (relation "trials" does not exist); {fix}'


def test_a_study_whose_results_are_removed_is_told_at_once(tmp_path, clock):
    """SQLite calls the file that it has open one that cannot be written."""
    folder = tmp_path / "studies"
    index = Index(f"sqlite:///{folder}/x.db", folder)
    study = index.open("one", ("psnr",))
    shutil.rmtree(folder)
    with pytest.raises(
        UserError, match=r"x\.db takes nothing \(.*\); see that it is there, has room and can be written"
    ):
        index.enqueue(study, [({"beta": 0.5}, "run")])
    assert clock.pauses == []


def test_a_study_that_is_deleted_while_a_trial_runs_is_told(tmp_path, clock):
    """And is made again by the same command."""
    index = Index(f"sqlite:///{tmp_path}/x.db", tmp_path)

    def taken():
        study = index.open("one", ("psnr",))
        index.enqueue(study, [({"beta": 0.5}, "run")])
        return study, index.claim(study, {"run"})

    study, trial = taken()
    optuna.delete_study(study_name="one", storage=f"sqlite:///{tmp_path}/x.db")
    runs = [fabricate(Store(tmp_path), make_config("cnn", "smoke"))]
    with pytest.raises(UserError) as error:
        index.tell(study, trial, runs, ("psnr",))
    assert str(error.value) == (
        f"the study is gone from the database sqlite:///{tmp_path}/x.db; its results are in the store; "
        "the same command continues"
    )
    assert clock.pauses == []
    study, trial = taken()
    index.tell(study, trial, runs, ("psnr",))
    assert [one.state.name for one in study.trials] == ["COMPLETE"]
