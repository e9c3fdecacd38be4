"""How a trial ended, in the words of the process that trained it."""

from typing import NamedTuple

import torch

from bench.core.cli import REFUSALS, lacks_memory, refusal
from bench.core.errors import Diverged, Interrupted, Lost, UserError
from bench.core.runs import Busy, Changed, NoSpace

LONGEST = 500  # characters of a reason: what a pipe takes at once, whether anybody reads it or not
ENDINGS: dict[type[BaseException], str] = {  # error → status, the first that fits; any other is a crash
    Busy: "busy",
    NoSpace: "blocked",
    Changed: "blocked",
    Lost: "crashed",
    UserError: "refused",
    Diverged: "diverged",
    Interrupted: "interrupted",
    MemoryError: "out_of_memory",
    torch.OutOfMemoryError: "out_of_memory",
}


class Outcome(NamedTuple):
    """How a trial ended: ``status`` is finished, interrupted, busy (another process has it), blocked (its folder cannot
    be written, or the images have changed) or a key of FAILURES."""

    status: str
    reason: str = ""


class Ended(Exception):
    """Raised for an ``outcome`` that another process has told."""

    def __init__(self, outcome: Outcome):
        super().__init__(outcome.reason)
        self.outcome = outcome


def outcome_of(error: BaseException) -> Outcome:
    """How a trial ended that ``error`` was raised in."""
    if isinstance(error, Ended):
        return error.outcome
    status = next((status for kind, status in ENDINGS.items() if isinstance(error, kind)), "crashed")
    if isinstance(error, OSError) and error.errno in REFUSALS:
        return Outcome("blocked", refusal(error)[:LONGEST])
    reason = str(error) or type(error).__name__
    if status == "crashed" and not isinstance(error, UserError):
        reason = f"{type(error).__name__}: {error}"
        status = "out_of_memory" if lacks_memory(error) else status
    return Outcome(status, reason.partition("\n")[0][:LONGEST])
