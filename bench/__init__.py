"""Which backbone makes the best discrete image tokenizer, at what cost?

The public face, from which nothing is imported before it is used::

    import bench

    data = bench.load_data("photos", 64)
    tokenizer = bench.Tokenizer.from_run("results/runs/RUN")
    metrics, per_image = bench.score(tokenizer, tokenizer.config.codebook_size, data.test)
    table = bench.load_runs("results")  # a pandas DataFrame, one row per run
"""

import itertools
import os
import signal
import sys
from contextlib import suppress
from importlib import import_module
from typing import Any

_HOMES = {
    "Config": ("bench.tokenizers.config", "Config"),
    "make_config": ("bench.tokenizers.config", "make_config"),
    "run_trial": ("bench.tokenizers.trial", "run_trial"),
    "Tokenizer": ("bench.tokenizers.tokenizer", "Tokenizer"),
    "PriorConfig": ("bench.priors.config", "PriorConfig"),
    "run_prior": ("bench.priors.trial", "run_prior"),
    "Prior": ("bench.priors.models", "Prior"),
    "load_data": ("bench.data", "load"),
    "load_runs": ("bench.analysis.frames", "load_runs"),
    "score": ("bench.tokenizers.evaluate", "score"),
}
__all__ = [*_HOMES]


STOPPED = "stopped; the same command continues"


def _say_stopped(kind: type[BaseException], *error: Any) -> None:
    """In place of the traceback of a command that is stopped while its modules are imported."""
    if kind is KeyboardInterrupt:
        print(STOPPED, file=sys.stderr)
    else:
        sys.__excepthook__(kind, *error)


def _terminate(*_: Any) -> None:
    """The same, on SIGTERM: nothing has been begun."""
    with suppress(OSError):
        os.write(2, f"{STOPPED}\n".encode())
    os._exit(130)


if any(flag == "-m" and name.startswith(("bench.", "studies.")) for flag, name in itertools.pairwise(sys.orig_argv)):
    sys.excepthook = _say_stopped
    signal.signal(signal.SIGTERM, _terminate)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _HOMES[name]
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
