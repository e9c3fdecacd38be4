"""Instruments on a run: which of those that are asked for can look at it, and the file of what they found."""

import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from rich.markup import escape
from torch import Tensor

from bench.core.errors import Damaged, UserError
from bench.core.files import atomic_path, sha256_file
from bench.core.progress import say
from bench.core.runs import Run
from bench.data import Data, load
from bench.instruments import INSTRUMENTS, Subject, choose
from bench.metrics import Codec

from .config import Config
from .tokenizer import Tokenizer, to_device


class Seen(Protocol):
    """What a Config, or another identity of scores, has to say about what is looked at."""

    data: str
    split: str
    codebook_size: int
    device: str


def subject_of(tokenizer: Tokenizer, data: Data) -> Subject:
    """``tokenizer``, on its device, as instruments take it, with the images that it is scored on."""
    return subject(tokenizer, tokenizer.quantizer.lookup, tokenizer.config, data)


def subject(codec: Codec, lookup: Callable[[Tensor], Tensor] | None, config: Seen, data: Data) -> Subject:
    """The same of any ``codec``, with the ``lookup`` of its codes where that is known."""
    return Subject(
        codec=codec,
        lookup=lookup,
        codebook_size=config.codebook_size,
        images=data.images(config.split),
        train=data.train,
        labels=data.labels and (data.labels_of("train"), data.labels_of(config.split)),
        at=lambda image_size: load(config.data, image_size).images(config.split),
        device=config.device,
    )


def fit(subject: Subject, chosen: dict[str, bool]) -> list[str]:
    """Those of the ``chosen`` instruments, see ``choose``, that can look at ``subject``; a line tells why each other
    one is left out. Raises UserError where that one was asked for by its name."""
    able = []
    for name, asked in chosen.items():
        reason = INSTRUMENTS[name].unfit(subject)
        if reason and asked:
            raise UserError(f"instrument {name}: {reason}")
        if reason:
            say(escape(f"instrument {name} is left out: {reason.partition(';')[0]}"))
        else:
            able.append(name)
    return able


def check_instruments(config: Config, data: Data, words: Sequence[str]) -> None:
    """Raises UserError where ``measure`` would once ``config`` is trained."""
    if asked := {name: True for name, asked in choose(words).items() if asked}:
        fit(subject_of(to_device(Tokenizer(config), config.device).eval(), data), asked)


def seen(run: Run, words: Sequence[str]) -> bool:
    """Whether all instruments that ``words`` mean have looked at a finished ``run``; not where what they found is
    damaged. Raises UserError as ``choose`` does."""
    try:
        found = run.instruments()
    except Damaged:
        return False
    return all(_seen(found, name) for name in choose(words))


def _seen(found: dict[str, dict[str, Any]], name: str) -> bool:
    """Whether the instrument ``name``, as it is now, is among what a run's instruments ``found``."""
    return found.get(name, {}).get("version") == INSTRUMENTS[name].version


def measure(run: Run, data: Data, words: Sequence[str]) -> None:
    """Has the instruments that ``words`` mean look at a finished ``run`` of ours, as ``look`` does."""

    def trained() -> Subject:
        return subject_of(Tokenizer.from_run(run.folder, run.settings(Config).device), data)

    look(run, trained, lambda: sha256_file(run.folder / "tokenizer.safetensors"), words)


def look(run: Run, subject_of_run: Callable[[], Subject], weights: Callable[[], str], words: Sequence[str]) -> None:
    """Has the instruments that ``words`` mean look at the subject of a finished ``run``, but for those that have; each
    takes a line that tells its cost, or why it is left out. ``weights``: the digest of those that it was scored with.
    Raises UserError as ``choose`` and ``fit`` do."""
    chosen = choose(words)
    if not chosen:
        return
    with run.locked():
        try:
            found = run.instruments()
        except Damaged as error:
            say(f"[yellow]{escape(str(error).partition(';')[0])}; it is made again[/]")
            found = {}
        missing = {name: asked for name, asked in chosen.items() if not _seen(found, name)}
        if not missing:
            return
        subject, digest = subject_of_run(), weights()
        for name in fit(subject, missing):
            began = time.monotonic()
            reading = INSTRUMENTS[name].measure(subject)
            if reading.draw:
                with atomic_path(run.folder / f"{name}.png") as temporary:
                    reading.draw(temporary)
            seconds = max(0.0, time.monotonic() - began)
            found[name] = {
                **{"version": INSTRUMENTS[name].version, "seconds": seconds},
                **{"weights": digest, "metrics": reading.metrics},
            }
            run.seal("instruments.json", {"instruments": found})
            say(f"instrument {name}: {seconds:.1f} s")
