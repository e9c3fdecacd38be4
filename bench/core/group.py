"""The processes that work on one trial together, as torchrun starts them. Alone, all of this does nothing.

A batch is split evenly, the first rows to the first process. What is drawn at random or computed of a whole batch is
the same on any number of processes, up to rounding.
"""

import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_map

from .errors import Diverged, Interrupted, Lost, UserError

PATIENCE = timedelta(minutes=30)  # of a step with a process that is silent
LONG = timedelta(days=2)  # of those who wait while another decodes images, scores references or looks by instruments
NEEDED = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # besides WORLD_SIZE, where there are several
GONE = re.compile("closed by peer|pair closure|[Tt]imed out|[Ww]ait timeout|Connection re(set|fused)|[Bb]roken pipe")
START = ".venv/bin/torchrun --standalone --nproc-per-node 2 -m bench.run"

Found = TypeVar("Found")
_patient: dist.ProcessGroup | None = None  # the same processes, for messages that may have to wait


def size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Which of them this one is, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def first() -> bool:
    """Whether this is the one that writes and prints."""
    return rank() == 0


def share(count: int) -> slice:
    """Which of ``count`` rows are this process's: a run of them, as many as anybody's or one less, and never fewer
    than those of a later process."""
    begins = [-(-count * number // size()) for number in (rank(), rank() + 1)]
    return slice(*begins)


def total(x: Tensor) -> Tensor:
    """Sum of ``x`` over all processes, in place."""
    if size() > 1:
        dist.all_reduce(x)
    return x


def mean(x: Tensor) -> Tensor:
    """Mean of ``x``, without a gradient, over all processes."""
    return total(x.detach().clone()).div_(size()) if size() > 1 else x.detach()


def any_of(flag: bool) -> bool:
    """Whether ``flag`` is set in any process."""
    return bool(total(torch.tensor(float(flag)))) if size() > 1 else flag


def whole(draw: Callable[[int], Tensor], rows: int) -> Tensor:
    """This process's ``rows`` of what ``draw`` gives for those of all: random numbers that do not depend on how many
    share a batch, as long as their generators agree."""
    return draw(rows * size())[rank() * rows :][:rows]


def picked(tokens: Tensor, count: int) -> Tensor:
    """``count`` random rows of the ``tokens`` (N, d) of all processes, the same rows everywhere: (count, d)."""
    rows = torch.randint(len(tokens) * size(), (count,), device=tokens.device)
    if size() == 1:
        return tokens[rows]
    dist.broadcast(rows, src=0)
    own = rows // len(tokens) == rank()
    return total(tokens[rows % len(tokens)] * own[:, None])


def average_gradients(parameters: Iterable[Tensor]) -> None:
    """Makes each gradient its mean over all processes, by one message."""
    if size() == 1:
        return
    gradients = [one.grad for one in parameters if one.grad is not None]
    flat = total(torch.cat([gradient.flatten() for gradient in gradients])).div_(size())
    for gradient, part in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def of_first(value: Found) -> Found:
    """The first process's ``value``, which must survive pickling."""
    if size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0, group=_patient)
    return values[0]


def by_first(work: Callable[[], Found]) -> Found | None:
    """What ``work`` gives to the first process, which does it alone. Where that raises UserError, all raise it."""
    if size() == 1:
        return work()
    found, told = None, None
    if first():
        try:
            found = work()
        except UserError as error:
            told = error
    said = of_first(told and (type(told), str(told)))
    if said is not None:
        raise told or _again(*said)
    return found


def _again(kind: type[UserError], message: str) -> UserError:
    """The error of another process, whose own arguments its message may not tell."""
    return kind.__new__(kind, message)


def spread(part: Any) -> None:
    """Gives a module or optimizer, ``part``, of every process the state of the first's."""
    if size() > 1:
        state = tree_map(lambda x: x.cpu() if isinstance(x, Tensor) else x, part.state_dict())
        part.load_state_dict(of_first(state))


def gathered(value: Found) -> list[Found]:
    """The ``value`` of every process in order, which must survive pickling."""
    values: list[Any] = [value] * size()
    if size() > 1:
        dist.all_gather_object(values, value, group=_patient)
    return values


def in_turn(work: Callable[[], Found]) -> Found:
    """``work`` of the first process of a machine, and then of the others, for whom it leaves its results in caches.
    Where that raises UserError in any process, all raise it."""
    if size() == 1:
        return work()
    found, said, leads = None, None, os.environ["LOCAL_RANK"] == "0"
    for turn in (True, False):
        if leads == turn:
            try:
                found = work()
            except UserError as error:
                said = type(error), str(error)
        errors = gathered(said)
    for number, error in enumerate(errors):
        if error is not None:
            kind, message = error
            raise _again(kind, message if number == 0 else f"process {number}: {message}")
    return found


def check_alike(**what: str) -> None:
    """Raises UserError where processes differ in ``what``, by name."""
    others = gathered(what)
    for number, own in enumerate(others):
        for name, value in own.items():
            if value != others[0][name]:
                told = f"process {number} has other {name.replace('_', ' ')} than the first, {value} and not"
                raise UserError(f"{told} {others[0][name]}; give all machines the same")


def started_as_several() -> bool:
    """Whether torchrun or its like started this process as one of several."""
    return os.environ.get("WORLD_SIZE", "1") not in ("", "1")


def alone(what: str) -> None:
    """Raises UserError where this process was started as one of several, which ``what`` has no use for."""
    if started_as_several():
        count = os.environ["WORLD_SIZE"]
        raise UserError(f"{what} works in one process, and WORLD_SIZE is {count}; start it without torchrun")


def check_gpus(device: str, processes: int) -> None:
    """Raises UserError where ``device`` are GPUs, and this machine has not one for each of several ``processes``."""
    if device.startswith("cuda") and (":" in device or processes > torch.cuda.device_count()):
        told = f"each process takes a GPU of its own, and this machine has {torch.cuda.device_count()}"
        raise UserError(f"{told}; start as many processes on it at most, with --device cuda and no number")


def hush() -> None:
    """Has all processes but the first print nothing: what they would say, it says."""
    from .progress import console, stdout

    if started_as_several() and os.environ.get("RANK", "0") != "0":
        console.quiet = stdout.quiet = True


@contextmanager
def joined(device: str) -> Iterator[None]:
    """Joins the processes that were started with this one, for work on ``device``. UserError where there is no
    rendezvous, and Lost where another process ends or is silent for PATIENCE."""
    if not started_as_several():
        yield
        return
    from .progress import console

    global _patient
    if missing := [name for name in NEEDED if name not in os.environ]:
        console.quiet = False  # whoever is not the first may be alone
        told = f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, and there is no {missing[0]} to meet the others by"
        raise UserError(f"{told}; start with {START}, or unset WORLD_SIZE")
    cuda, own = device.startswith("cuda"), int(os.environ["LOCAL_RANK"])
    check_gpus(device, own + 1)
    try:
        if cuda:
            torch.cuda.set_device(own)
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=PATIENCE)
        _patient = dist.new_group(backend="gloo", timeout=LONG)
        yield
    except (UserError, Diverged, Interrupted, KeyboardInterrupt):
        raise  # of all alike, and the first tells it
    except BaseException as error:
        console.quiet = False
        if not isinstance(error, (RuntimeError, ValueError)) or not GONE.search(str(error)):
            raise
        reason = str(error).strip().partition("\n")[0][-120:]
        told = f"another process of this trial ended or is silent ({reason})"
        raise Lost(f"{told}; the same command continues") from error
    finally:
        _patient = None
        if dist.is_initialized():
            dist.destroy_process_group()
