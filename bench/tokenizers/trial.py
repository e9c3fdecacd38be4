"""One config in, one finished run folder out."""

import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.modules.batchnorm import _BatchNorm

from bench.core import group
from bench.core.environment import peak_memory
from bench.core.errors import UserError
from bench.core.files import atomic_path, cache_dir, reason
from bench.core.recipe import write_recipe
from bench.core.runs import Run, check_whole
from bench.core.store import Store
from bench.data import Data, check_name, load
from bench.metrics import Codec, digests, from_uint8, to_uint8, weights
from bench.training.loop import logged
from bench.training.track import check_sink, tracked
from bench.training.trial import begun, complete, tidy
from bench.training.weights import check_weights, write_weights

from .alignment import features
from .codecs import format_references
from .config import Config
from .costs import static_costs, throughput
from .curves import curve_metrics
from .evaluate import EVAL_BATCH, PICTURES, evenly_spaced, kmeans_reference, protocol, score, score_untrained
from .measure import check_instruments, measure
from .sizes import check_size, parameter_count
from .tokenizer import Tokenizer, started
from .train import train

COPIES = 5  # of a model's parameters in training: weights, gradients, their moments, average
CODES = 1024  # of them, at most, in the picture of a codebook


def prepare(config: Config, store: Store, fid_weights: Path | None = None) -> Data:
    """Everything that can go wrong for a reason the user can fix, before any training is spent: the settings, the
    device, the results folder, the pretrained weights (fetched if need be) and the data. Raises UserError."""
    config.check()
    check_name(config.data)  # before anything is fetched
    check_size(config, config.resolved().device, COPIES)
    images, place = Path(config.resolved().data.removeprefix("folder:")), Path(os.path.realpath(store.root))
    if config.data.startswith("folder:") and images in (place, *place.parents):
        what = f"the results folder {place} lies among the images of {images}, and so would its pictures"
        raise UserError(f"{what}; name another with --results")
    tokenizer = started(Tokenizer(config))
    if config.alignment_weight:
        features(config.alignment_model, config.alignment_file, config.image_size, config.grid_size)
    state_megabytes = COPIES * 4 * parameter_count(tokenizer) >> 20
    if group.first():
        store.check_writable(50 + 2 * state_megabytes)
    try:
        cache_dir().mkdir(parents=True, exist_ok=True)
    except OSError as error:
        place, fix = cache_dir(), "set VQBENCH_CACHE to another"
        raise UserError(f"cannot create the cache folder {place}: {reason(error, place)}; {fix}") from error
    weights.inception(fid_weights)  # a file that was given and is none is told before others are fetched
    weights.dinov2(fid_weights)
    for net in weights.TRUNKS:
        weights.trunk_state(net)
    return load(config.data, config.image_size).with_train(config.train_images)


def run_trial(
    config: Config,
    store: Store | str | Path = "results",
    fid_weights: Path | None = None,
    resume: bool = True,
    instruments: Sequence[str] = (),
    accumulate: int = 1,
    track: str | None = None,
) -> Run:
    """Trains and scores ``config``, or returns at once when ``store``, or the one in that folder, has it finished. Then
    ``instruments``, names or groups of them (see ``bench.instruments``), look at it, but for those that have. Networks
    see a batch in ``accumulate`` parts, which takes less memory and changes nothing but rounding. A run that is trained
    now can be watched by ``track``, a key of SINKS (see ``bench.training.track``).

    Raises UserError before any training, Interrupted when stopped (the same call continues), Diverged (also recorded as
    failure.json) when the loss was not finite. Several processes (see ``bench.core.group``) call it alike."""
    began = time.monotonic()
    check_sink(track)
    config = config.resolved()
    store = store if isinstance(store, Store) else Store(store)
    run = store.run(config)
    check_processes(config, group.size(), accumulate)
    group.by_first(partial(check_whole, run))
    data = group.in_turn(partial(prepare, config, store, fid_weights))
    if group.size() > 1:
        group.check_alike(settings=run.folder.name, images=data.fingerprint, weights_to_score_by=digests(fid_weights))
    if min(len(data.train), len(data.images(config.split))) < 2:
        found = f"{config.data} has {len(data.train)} train and {len(data.images(config.split))} {config.split} images"
        raise UserError(f"{found}; distances between sets need at least 2 of each")
    if group.of_first(run.finished):
        group.by_first(partial(_seen_again, run, data, instruments))
        return run

    group.by_first(partial(check_instruments, config, data, instruments))
    group.by_first(partial(store.check_images, run, config.data, config.image_size, data.fingerprint))
    about = {"config": asdict(config.stored()), "trained_on": data.fingerprint}
    with ExitStack() as held:
        group.by_first(lambda: held.enter_context(begun(run, about, resume)))
        tracker = held.enter_context(tracked(track, run, about["config"]))
        reference, untrained = group.by_first(partial(_before_training, run, data, config, fid_weights)) or ({}, {})
        before = time.monotonic() - began
        with peak_memory(config.device) as peak:
            options = {"accumulate": accumulate, "tell": tracker.row}
            tokenizer, seconds = train(config, data.train, run.folder, resume, **options)
            measured = {**untrained, "train_seconds": seconds, "peak_memory_mb": peak()}
        finish(run, tokenizer, data, reference, fid_weights, measured, before)
        tracker.scores("reconstructions.png")
    group.by_first(partial(measure, run, data, instruments))
    return run


def check_processes(config: Config, processes: int, accumulate: int = 1) -> None:
    """Raises UserError where so many ``processes``, or parts of a batch, cannot train ``config`` as one would."""
    own = config.batch_size // processes
    if not 1 <= accumulate <= max(1, own):
        raise UserError(f"accumulate is {accumulate}; a batch of {own} images has 1 to {own} parts")
    if processes == accumulate == 1:
        return
    if config.batch_size % processes:
        told = f"batch_size {config.batch_size} cannot be shared evenly by {processes} processes"
        raise UserError(f"{told}; take {own * processes or processes}")
    if any(isinstance(module, _BatchNorm) for module in Tokenizer(config).modules()):
        told = f"backbone {config.backbone!r} normalises the images of a batch together"
        raise UserError(f"{told}; train it in one process, and with --accumulate 1")


def _seen_again(run: Run, data: Data, instruments: Sequence[str]) -> None:
    """A finished ``run`` that is asked for once more."""
    if run.protocol().get("fingerprint") != data.fingerprint:
        raise UserError(f"{data.name} has other images now than when {run.folder} was scored; move that folder")
    check_weights(run, "tokenizer.safetensors")
    tidy(run)
    measure(run, data, instruments)


def _before_training(
    run: Run, data: Data, config: Config, fid_weights: Path | None
) -> tuple[dict[str, float], dict[str, float]]:
    """What does not depend on training: scores of k-means where there are codes, and of the weights to start from."""
    write_recipe(run.folder / "config.toml", recipe_of(config))
    reference = kmeans_reference(config, data, fid_weights) if config.discrete else {}
    untrained, pictures = score_untrained(config, data.images(config.split))
    with atomic_path(run.folder / "untrained.npz") as temporary:
        np.savez_compressed(temporary, untrained=pictures)
    return reference, untrained


def recipe_of(config: Config) -> dict[str, Any]:
    """What --config of bench.run needs for the run of ``config``."""
    settings = asdict(config)
    seed = settings.pop("seed")
    return {**settings, "seeds": [seed]}


def finish(
    run: Run,
    tokenizer: Tokenizer,
    data: Data,
    reference: dict[str, float],
    fid_weights: Path | None,
    measured: dict[str, float | None],
    before: float = 0.0,
) -> None:
    """Scores a trained tokenizer, of several processes with them all, and writes everything a finished run holds,
    metrics.json last. ``measured``: what is
    known already, of the time before and during training; ``before``: seconds that were spent until it began, which
    count with those of scoring, pictures and references as ``score_seconds``: all that is not training."""
    from bench.core import plots  # and seaborn: not before it is needed

    config, images = tokenizer.config, data.images(tokenizer.config.split)
    label = f"scoring {config.backbone} {config.quantizer} seed {config.seed}"
    began = time.monotonic()
    codes = config.codebook_size if config.discrete else None
    metrics, per_image = score(tokenizer, codes, images, config.device, fid_weights, label, together=True)
    if not group.first():
        return
    references = {f"{name}_kmeans": value for name, value in reference.items()}
    if "bits_per_image" in metrics:
        references |= format_references(config, data, metrics["bits_per_image"], fid_weights)
    write_weights(run, "tokenizer.safetensors", tokenizer)
    with atomic_path(run.folder / "per_image.npz") as temporary:
        np.savez_compressed(temporary, **per_image)
    size = f"{f'K = {codes}' if codes else f'd = {config.code_dim}'}, {config.grid_size}×{config.grid_size}"
    title = f"{config.backbone}, {config.quantizer}, {size}"
    show(run, *sample_reconstructions(tokenizer, images, config.device), f"{title}: {metrics['psnr']:.1f} dB")
    history = run.history()
    plots.curves(run.folder / "curves.png", history, codes, title)
    if codes and config.grid_size == 1:
        plots.codebook(run.folder / "codebook.png", codebook_images(tokenizer), f"{title}: what each code decodes to")
    costs = {**static_costs(tokenizer), **throughput(tokenizer, config.image_size, config.device), **measured}
    costs["images_seen"] = config.steps * config.batch_size
    whole = [row["step"] for row in history] == logged(config.steps)  # else it was damaged, and its curves have gaps
    learned = curve_metrics(history, config.warmup) if whole else {}
    conditions = protocol(data, config.split, config.device, fid_weights)
    costs["score_seconds"] = before + max(0.0, time.monotonic() - began)
    complete(run, {**metrics, **learned, **costs, **references}, conditions)


@torch.no_grad()
def sample_reconstructions(codec: Codec, images: np.ndarray, device: str) -> tuple[np.ndarray, np.ndarray]:
    """Evenly spaced ``images`` and what the codec, on ``device``, makes of them, both (PICTURES, H, W, 3) uint8."""
    x = evenly_spaced(images, PICTURES)
    x_hat = codec.decode(codec.encode(from_uint8(torch.from_numpy(x).to(device).permute(0, 3, 1, 2))))
    return x, to_uint8(x_hat).permute(0, 2, 3, 1).cpu().numpy()


def show(run: Run, x: np.ndarray, x_hat: np.ndarray, title: str) -> None:
    """Writes images and their reconstructions, (N, H, W, 3) uint8 both, as data and as a picture."""
    from bench.core import plots  # and seaborn: not before it is needed

    with atomic_path(run.folder / "samples.npz") as temporary:
        np.savez_compressed(temporary, x=x, x_hat=x_hat)
    plots.reconstructions(run.folder / "reconstructions.png", x, x_hat, title)


@torch.no_grad()
def codebook_images(tokenizer: Tokenizer) -> np.ndarray:
    """All that a tokenizer with one code per image can show: its codes' images, (K, H, W, 3) uint8, at most CODES."""
    device = next(tokenizer.parameters()).device
    codes = torch.arange(min(CODES, tokenizer.config.codebook_size), device=device).view(-1, 1, 1)
    images = torch.cat([to_uint8(tokenizer.decode(part)) for part in codes.split(EVAL_BATCH)])
    return images.permute(0, 2, 3, 1).cpu().numpy()
