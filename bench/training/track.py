"""Where a run can be watched besides its own files: TensorBoard and Weights & Biases, each a small sink.

Curves are the rows of history.jsonl. A sink is told all of them when training begins or goes on, and then each as it is
written, so that a run that was stopped has every step once. Nothing of it is part of a run, or can cost one: a sink
that fails is told of in a line, and left out from there on.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Protocol

import numpy as np
import tyro
from PIL import Image
from rich.markup import escape

from bench.core import group
from bench.core.errors import UserError
from bench.core.progress import say
from bench.core.runs import Run
from bench.core.settings import OneOf, check_choice

Row = dict[str, float]
PATIENCE = 60.0  # seconds that a server may take to begin, and to take what is left in the end


class Sink(Protocol):
    """What a place to watch ``run`` has, whose ``settings`` are told where they can be."""

    def __init__(self, run: Run, settings: dict[str, Any]): ...

    def row(self, row: Row) -> None:
        """Takes a row of the history: ``step``, and scalars; one that it has already may come again."""

    def scores(self, metrics: Row, picture: Path) -> None:
        """Takes the final metrics, and a picture of what the run makes."""

    def close(self, finished: bool) -> None:
        """Ends, and says whether the run did."""


class TensorBoard:
    """Event files in the run's folder ``tensorboard``; those of an earlier part of its training are superseded."""

    def __init__(self, run: Run, settings: dict[str, Any]):
        from torch.utils.tensorboard import SummaryWriter  # seconds

        self.writer, self.step = SummaryWriter(str(run.folder / "tensorboard"), purge_step=0), 0

    def row(self, row: Row) -> None:
        self.step = int(row["step"])
        self._add("train", row)

    def scores(self, metrics: Row, picture: Path) -> None:
        self._add("scores", metrics)
        with Image.open(picture) as image:
            self.writer.add_image(picture.stem, np.asarray(image.convert("RGB")), self.step, dataformats="HWC")

    def close(self, finished: bool) -> None:
        self.writer.close()

    def _add(self, head: str, scalars: Row) -> None:
        for name, value in scalars.items():
            if name != "step":
                self.writer.add_scalar(f"{head}/{name}", value, self.step)
        self.writer.flush()


class WandB:
    """A run of the same id in the project ``vqbench``, or $WANDB_PROJECT; its files are in the run's folder ``wandb``.
    Neither output nor code is sent; the package itself notes the machine's name and versions."""

    def __init__(self, run: Run, settings: dict[str, Any]):
        import wandb  # seconds

        waits = {"init_timeout": PATIENCE, "login_timeout": PATIENCE, "finish_timeout": PATIENCE}
        keeps = {"disable_code": True, "disable_git": True, "x_disable_stats": True, "x_disable_meta": True}
        keeps |= {"x_disable_machine_info": True, "x_save_requirements": False, "console": "off", "silent": True}
        self.image = wandb.Image
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "vqbench"),
            **{"id": run.folder.name, "name": run.folder.name, "dir": str(run.folder), "config": settings},
            **{"resume": "allow", "settings": wandb.Settings(**waits, **keeps)},
        )
        self.step = self.next = self.run.step  # a server that knows the run has the steps before

    def row(self, row: Row) -> None:
        if row["step"] >= self.next:
            self.step = int(row["step"])
            self.run.log({f"train/{name}": value for name, value in row.items() if name != "step"}, step=self.step)

    def scores(self, metrics: Row, picture: Path) -> None:
        self.run.log({picture.stem: self.image(str(picture))}, step=self.step)
        self.run.summary.update({f"scores/{name}": value for name, value in metrics.items()})

    def close(self, finished: bool) -> None:
        self.run.finish(exit_code=int(not finished))


SINKS: dict[str, type[Sink]] = {"tensorboard": TensorBoard, "wandb": WandB}


Track = Annotated[str | None, OneOf(SINKS), tyro.conf.arg(metavar="NAME")]  # of a command line


def check_sink(name: str | None) -> None:
    """Raises UserError where there is no sink ``name``, or its package is missing; None is none."""
    if name is None:
        return
    check_choice("track", name, SINKS)
    if find_spec(name) is None:
        raise UserError(f"track is {name}, a package that is not installed; pip install 'vqbench[track]'")


class Tracker:
    """Tells the sink ``name``, if any, what ``run`` has to show; of several processes the first does. Whatever the sink
    raises becomes one line, and the end of the telling."""

    def __init__(self, name: str | None, run: Run, settings: dict[str, Any]):
        self.run, self.name, self.finished, self.sink = run, name, False, None
        if name is not None and group.first():
            self._tried(lambda: setattr(self, "sink", SINKS[name](run, settings)))

    def row(self, row: Row) -> None:
        """A row of the history."""
        if self.sink is not None:
            self._tried(lambda: self.sink.row(row))

    def scores(self, picture: str) -> None:
        """The scores of the run, which is finished, and the file ``picture`` of it."""
        self.finished = True
        if self.sink is not None:
            self._tried(lambda: self.sink.scores(self.run.metrics(), self.run.folder / picture))

    def close(self) -> None:
        """Nothing more will be told."""
        if self.sink is not None:
            self._tried(lambda: self.sink.close(self.finished))

    def _tried(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:
            self.sink = None
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            say(f"[yellow]{self.name} is told no more of {escape(self.run.folder.name)}:[/] {escape(reason[:200])}")


@contextmanager
def tracked(name: str | None, run: Run, settings: dict[str, Any]) -> Iterator[Tracker]:
    """A Tracker that is closed in the end."""
    tracker = Tracker(name, run, settings)
    try:
        yield tracker
    finally:
        tracker.close()
