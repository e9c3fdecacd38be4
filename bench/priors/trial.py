"""One prior config in, one finished run folder out: as ``trial`` does for tokenizers, in ``results/priors/``."""

import shutil
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from bench.core.environment import peak_memory
from bench.core.errors import Damaged, UserError
from bench.core.files import atomic_path
from bench.core.recipe import write_recipe
from bench.core.runs import Run, check_whole
from bench.core.store import Store
from bench.data import Data
from bench.metrics import PRECISION_NEIGHBOURS
from bench.tokenizers import evaluate
from bench.tokenizers.config import Config
from bench.tokenizers.tokenizer import Tokenizer
from bench.training.track import check_sink, tracked
from bench.training.trial import begun, complete, tidy
from bench.training.weights import check_weights, write_weights

from .codes import Codes, digest, encode, load_data
from .config import PRIOR_VERSION, SAMPLING, PriorConfig
from .generate import Generated, references, score_prior
from .models import LEARNED, Prior
from .pixels import PIXELS, PixelConfig, Pixels
from .train import build, train_prior

MINIMUM_IMAGES = PRECISION_NEIGHBOURS + 1


def run_prior(
    config: PriorConfig,
    over: Run | Pixels,
    store: Store | str | Path = "results",
    fid_weights: Path | None = None,
    resume: bool = True,
    track: str | None = None,
) -> Run:
    """Trains and scores a prior on the codes of ``over``, the run of a tokenizer or pixels, or returns at once when
    ``store``, or the one in that folder, has it finished. A finished prior that was trained alike and sampled from
    otherwise lends its weights. Errors and ``track`` are ``run_trial``'s."""
    check_sink(track)
    store = Store(store) if isinstance(store, str | Path) else store
    config = config.resolved()
    config.check()
    store.check_writable(200)
    pixels = over if isinstance(over, Pixels) else None
    identity = pixels.digest if pixels else digest(over.folder)
    run = store.run(config)
    check_whole(run)
    if run.finished:
        made_with = run.protocol().get("tokenizer")
        if made_with != identity:
            what = "other images" if pixels else "the codes of another tokenizer"
            now = f"{pixels.data.name} now has" if pixels else f"{over.folder} now holds"
            what += f" ({made_with}) than {now} ({identity})"
            raise UserError(f"{run.folder} is a prior over {what}; move that folder")
        check_weights(run, "prior.safetensors")
        tidy(run)
        return run

    tokenizer = pixels or Tokenizer.from_run(over.folder, config.device)
    data = pixels.data if pixels else load_data(over.folder, tokenizer)
    if config.conditional and not data.classes:
        raise UserError(f"{data.name} has no classes to condition on; leave out --conditional")
    codes = pixels.codes() if pixels else encode(over.folder, tokenizer, data)
    if min(len(data.train), len(codes.held_out)) < MINIMUM_IMAGES:
        found = f"{data.name} has {len(data.train)} train and {len(codes.held_out)} {tokenizer.config.split} images"
        raise UserError(f"{found}; scoring generation needs at least {MINIMUM_IMAGES} of each")
    if config.top_k >= codes.codebook_size:
        raise UserError(f"top_k is {config.top_k}, of {codes.codebook_size} codes; take fewer, or 0 for all")
    classes = len(codes.classes) if config.conditional else 0
    build(config, codes.codebook_size, codes.grid, classes)  # before anything is written: can it be?

    twin = next((other for other in store.priors() if _lends(other, config, identity)), None)
    if twin is not None:  # also before: its files may be damaged
        lent = Prior.from_run(twin.folder, config.device)
        twin.check_file("history.jsonl")

    shape = {"codebook_size": codes.codebook_size, "grid": codes.grid, "classes": list(codes.classes)}
    about = {"config": asdict(config), "codes": shape, "tokenizer": asdict(tokenizer.config), "trained_on": identity}
    with begun(run, about, resume), tracked(track, run, about["config"]) as tracker:
        write_recipe(run.folder / "config.toml", recipe_of(config, pixels))
        beside = pixels.references if pixels else over.folder / "codes"
        known = references(tokenizer, codes, data, config, beside, fid_weights)
        with peak_memory(config.device) as peak:
            if twin is None:
                prior, seconds = train_prior(config, codes, run.folder, resume, tell=tracker.row)
                costs = {"train_seconds": seconds, "peak_memory_mb": peak()}
            else:
                prior, costs = lent, {name: twin.metrics().get(name) for name in ("train_seconds", "peak_memory_mb")}
                if (twin.folder / "history.jsonl").is_file():
                    with atomic_path(run.folder / "history.jsonl") as temporary:
                        shutil.copyfile(twin.folder / "history.jsonl", temporary)
                for row in run.history():
                    tracker.row(row)
        generated = score_prior(prior, tokenizer, codes, data, config, known, fid_weights)
        metrics = {**generated.metrics, **known, **costs}
        finish(run, prior, generated, metrics, protocol(config, codes, data, tokenizer.config, fid_weights))
        tracker.scores("samples.png")
    return run


def recipe_of(config: PriorConfig, pixels: Pixels | None) -> dict[str, Any]:
    """What --config of bench.prior needs for the run of ``config``, over the codes of a tokenizer or ``pixels``."""
    settings = asdict(config)
    seed = settings.pop("seed")
    if pixels:
        settings |= {"tokenizer": PIXELS, "data": pixels.config.data, "image_size": pixels.config.image_size}
    return {**settings, "seeds": [seed]}


def _lends(other: Run, config: PriorConfig, identity: str) -> bool:
    if not other.finished:
        return False
    made = other.protocol()
    current = (made.get("version"), made.get("tokenizer")) == (PRIOR_VERSION, identity)
    with suppress(Damaged):
        return current and other.settings(PriorConfig).trains_as(config)
    return False


def finish(
    run: Run, prior: Prior, generated: Generated, metrics: dict[str, float | None], conditions: dict[str, Any]
) -> None:
    """Writes everything a finished run holds, metrics.json, with ``metrics`` measured under ``conditions``, last."""
    from bench.core import plots  # and seaborn: not before it is needed

    config = run.settings(PriorConfig)
    write_weights(run, "prior.safetensors", prior)
    with atomic_path(run.folder / "samples.npz") as temporary:
        kind = np.min_scalar_type(prior.codebook_size - 1)
        np.savez_compressed(temporary, codes=generated.codes.astype(kind), x=generated.images)
    size, bits = f"{'×'.join(map(str, prior.grid))} of {prior.codebook_size}", metrics["coded_bits_per_token"]
    title = f"{config.prior} over {run.tokenizer()['backbone']}, {size}: {bits:.2f} bits per token"
    plots.samples(run.folder / "samples.png", generated.images, title, generated.classes)
    plots.neighbours(run.folder / "neighbours.png", generated.images, generated.neighbours, title)
    if config.prior in LEARNED:
        plots.prior_curve(run.folder / "curves.png", run.history(), metrics, title)
    seen = config.steps * config.batch_size if config.prior in LEARNED else 0
    complete(run, {**metrics, "grids_seen": seen}, conditions)


def protocol(
    config: PriorConfig, codes: Codes, data: Data, tokenizer: Config | PixelConfig, fid_weights: Path | None
) -> dict[str, Any]:
    """Everything that must be equal for the scores of two priors to be comparable, and the tokenizer's identity."""
    sampling = {name: getattr(config, name) for name in SAMPLING}
    del sampling["passes"]  # a setting of one kind of prior, whatever its samples are compared with
    if config.guidance == 1:
        del sampling["guidance"]  # as of priors that were made before there was any
    images = evaluate.protocol(data, tokenizer.split, config.device, fid_weights)
    if isinstance(tokenizer, PixelConfig):
        images["codes"] = PIXELS
    return {**images, "version": PRIOR_VERSION, "tokenizer": codes.tokenizer, **sampling}
