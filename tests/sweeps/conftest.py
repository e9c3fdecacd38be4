"""What tests of studies share."""

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
