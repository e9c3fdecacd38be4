"""What a trial of either kind does around its training: hold the folder, record a failure, write the scores last."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import nn

from bench.core.environment import environment
from bench.core.errors import Diverged, UserError
from bench.core.files import atomic_path
from bench.core.store import Run


@contextmanager
def begun(run: Run, about: dict[str, Any]) -> Iterator[None]:
    """Holds the folder of ``run`` while it is trained and scored; ``about`` goes into its config.json. Forgets an
    earlier failure, and records Diverged as failure.json. Raises Busy where another process has the folder."""
    run.folder.mkdir(parents=True, exist_ok=True)
    with run.locked():
        run.write("config.json", {**about, "environment": environment()})
        run.forgive()
        try:
            yield
        except Diverged as error:
            run.fail("diverged", str(error))
            raise


def write_weights(run: Run, name: str, model: nn.Module) -> None:
    """Writes the scored weights of ``model``, on any device, as the file ``name``."""
    with atomic_path(run.folder / name) as temporary:
        safetensors.torch.save_model(model, str(temporary))


def read_weights(run: Run, name: str, model: nn.Module) -> None:
    """Loads what ``write_weights`` wrote into ``model``. Raises UserError on a damaged file or that of another model,
    such as one that an older version of the code built."""
    path = run.folder / name
    try:
        safetensors.torch.load_model(model, path)
    except (RuntimeError, SafetensorError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"{path} does not hold the weights of this run ({reason}); move that folder") from error


def complete(run: Run, metrics: dict[str, Any], protocol: dict[str, Any]) -> None:
    """Writes metrics.json, which makes ``run`` a finished one, and drops its checkpoint; call it last."""
    run.write("metrics.json", {"metrics": metrics, "protocol": protocol})
    (run.folder / "checkpoint.pt").unlink(missing_ok=True)
