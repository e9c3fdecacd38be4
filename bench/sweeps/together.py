"""One trial of a study on several processes of this machine. The child that it has is torchrun, which starts them; each
of them says how it ended in the file that torchrun keeps for that.
"""

import json
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from dataclasses import asdict
from pathlib import Path

import torch

from bench.core import group
from bench.core.errors import Interrupted, Lost
from bench.core.store import Store
from bench.tokenizers.config import Config
from bench.tokenizers.trial import run_trial

from .outcome import Ended, Outcome, outcome_of

POLL_SECONDS = 0.5
GRACE_SECONDS = 30.0  # from the end of torchrun, while the checkpoint is written, until a process ends itself
TOLD = "TORCHELASTIC_ERROR_FILE"  # where torchrun has each process say why it failed


def train_together(processes: int, track: str | None, config: Config, store: Store, fid_weights: Path | None) -> None:
    """Trains and scores ``config`` by so many ``processes``, with as many threads each as this one has, watched by
    ``track``. Where a signal ends one of them, it ends this one too. Raises Ended for what they say, and Interrupted
    where this is terminated."""
    from torch.distributed import run as torchrun  # not for a study's --help
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    task = {"config": asdict(config), "results": str(store.root), "track": track}
    task["fid_weights"] = fid_weights and str(fid_weights)
    launcher = ["--standalone", "--nproc-per-node", str(processes)]
    with tempfile.TemporaryDirectory() as folder:
        try:
            torchrun.main([*launcher, "--log-dir", folder, "-m", __name__, json.dumps(task)])
            return
        except SignalException as error:
            raise Interrupted("stopped") from error
        except ChildFailedError as error:
            failures = [error.failures[rank] for rank in sorted(error.failures)]
    for failure in failures:
        if failure.exitcode < 0:
            os.kill(os.getpid(), -failure.exitcode)
    raise Ended(cause([failure.error_file_data for failure in failures]))


def cause(told: list[dict]) -> Outcome:
    """Of what processes that failed have ``told``, in order, the first that is not the loss of another."""
    known = [one for one in told if "outcome" in one]
    if not known:
        return Outcome("crashed", "a process ended without a word; see log.txt")
    first = next((one for one in known if not one["lost"]), known[0])
    return Outcome(*first["outcome"])


def main() -> None:
    """The life of one of the processes, which torchrun has started."""
    task = json.loads(sys.argv[1])
    config = Config(**task["config"])
    threading.Thread(target=_stop_with, args=(os.getppid(),), daemon=True).start()
    group.hush()
    try:
        with group.joined(config.resolved().device):
            weights = task["fid_weights"] and Path(task["fid_weights"])
            run_trial(config, task["results"], weights, track=task["track"])
    except BaseException as error:
        outcome, lost = outcome_of(error), isinstance(error, Lost)
        if outcome.status == "crashed" and not lost:
            traceback.print_exception(error)
        about = {"message": outcome.reason, "extraInfo": {"timestamp": str(int(time.time()))}}
        Path(os.environ[TOLD]).write_text(json.dumps({"message": about, "outcome": outcome, "lost": lost}))
        os._exit(1)  # without waiting for others


def _stop_with(launcher: int) -> None:
    """Stops this process when ``launcher``, its parent, is gone: as if asked to, and then at once."""
    while os.getppid() == launcher:
        time.sleep(POLL_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_SECONDS)
    os._exit(1)


if __name__ == "__main__":
    main()
