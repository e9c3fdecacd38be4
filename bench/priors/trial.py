"""One prior config in, one finished run folder out: as ``trial`` does for tokenizers, in ``results/priors/``."""

from __future__ import annotations

import shutil
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch

from bench.core import plots
from bench.core.environment import environment, peak_memory
from bench.core.errors import Diverged, UserError
from bench.core.files import atomic_path
from bench.core.store import Run, Store
from bench.data import Data
from bench.metrics import PRECISION_NEIGHBOURS
from bench.tokenizers import evaluate
from bench.tokenizers.tokenizer import Tokenizer

from .codes import Codes, digest, encode, load_data
from .config import PRIOR_VERSION, SAMPLING, PriorConfig
from .generate import references, score_prior
from .models import LEARNED, Prior
from .train import build, train_prior

MINIMUM_IMAGES = PRECISION_NEIGHBOURS + 1


def run_prior(
    config: PriorConfig, tokenizer_run: Run, store: Store, fid_weights: Path | None = None, resume: bool = True
) -> Run:
    """Trains and scores a prior on the codes of ``tokenizer_run``, or returns at once when the store has it finished.

    A finished prior that was trained alike and sampled from otherwise lends its weights. Raises UserError before any
    training, Interrupted when stopped (the same call continues), Diverged as ``run_trial`` does.
    """
    config = config.resolved()
    config.check()
    store.check_writable(200)
    identity = digest(tokenizer_run.folder)
    run = store.run(config)
    if run.finished:
        made_with = run.protocol()["tokenizer"]
        if made_with != identity:
            raise UserError(
                f"{run.folder} is a prior over the codes of another tokenizer ({made_with}) than "
                f"{tokenizer_run.folder} now holds ({identity}); move that folder"
            )
        return run

    tokenizer = Tokenizer.from_run(tokenizer_run.folder, config.device)
    data = load_data(tokenizer_run.folder, tokenizer)
    if config.conditional and not data.classes:
        raise UserError(f"{data.name} has no classes to condition on; leave out --conditional")
    codes = encode(tokenizer_run.folder, tokenizer, data)
    if min(len(data.val), len(data.train)) < MINIMUM_IMAGES:
        raise UserError(
            f"{data.name} has {len(data.train)} training and {len(data.val)} validation images; scoring generation "
            f"needs at least {MINIMUM_IMAGES} of each"
        )
    classes = len(codes.classes) if config.conditional else 0
    build(config, codes.codebook_size, codes.grid_size, classes)  # before anything is written: can it be?

    run.folder.mkdir(parents=True, exist_ok=True)
    with run.locked():
        shape = {"codebook_size": codes.codebook_size, "grid_size": codes.grid_size, "classes": list(codes.classes)}
        about = {"config": asdict(config), "environment": environment(), "codes": shape}
        run.write("config.json", {**about, "tokenizer": asdict(tokenizer.config)})
        run.forgive()
        known = references(tokenizer, codes, data, config, tokenizer_run.folder / "codes", fid_weights)
        twin = next((other for other in store.priors() if _lends(other, config, identity)), None)
        try:
            with peak_memory(config.device) as peak:
                if twin is not None:
                    prior, _ = load_prior(twin.folder, config.device)
                    seconds, megabytes = (twin.metrics()[name] for name in ("train_seconds", "peak_memory_mb"))
                    if config.prior in LEARNED:
                        shutil.copy(twin.folder / "history.jsonl", run.folder)
                else:
                    prior, seconds = train_prior(config, codes, run.folder, resume)
                    megabytes = peak()
        except Diverged as error:
            run.fail("diverged", str(error))
            raise
        finish(run, prior, tokenizer, codes, data, config, fid_weights, known, seconds, megabytes)
    return run


def _lends(other: Run, config: PriorConfig, identity: str) -> bool:
    if not other.finished:
        return False
    made = other.protocol()
    current = (made["version"], made["tokenizer"]) == (PRIOR_VERSION, identity)
    return current and prior_config(other).trains_as(config)


def finish(
    run: Run,
    prior: Prior,
    tokenizer: Tokenizer,
    codes: Codes,
    data: Data,
    config: PriorConfig,
    fid_weights: Path | None,
    known: dict[str, float],
    seconds: float,
    megabytes: float | None,
) -> None:
    """Scores a trained prior and writes everything a finished run holds, metrics.json last."""
    generated = score_prior(prior, tokenizer, codes, data, config, known, fid_weights)
    with atomic_path(run.folder / "prior.safetensors") as temporary:
        safetensors.torch.save_model(prior, str(temporary))
    with atomic_path(run.folder / "samples.npz") as temporary:
        kind = np.min_scalar_type(codes.codebook_size - 1)
        np.savez_compressed(temporary, codes=generated.codes.astype(kind), x=generated.images)
    metrics = {**generated.metrics, **known}
    title = (
        f"{config.prior} over {tokenizer.config.backbone}, {codes.grid_size}×{codes.grid_size} of {codes.codebook_size}"
    )
    title += f": {metrics['coded_bits_per_token']:.2f} bits per token"
    plots.samples(run.folder / "samples.png", generated.images, title)
    plots.neighbours(run.folder / "neighbours.png", generated.images, generated.neighbours, title)
    if config.prior in LEARNED:
        plots.prior_curve(run.folder / "curves.png", run.history(), metrics, title)
    steps = config.steps * config.batch_size if config.prior in LEARNED else 0
    costs = {"train_seconds": seconds, "peak_memory_mb": megabytes, "grids_seen": steps}
    run.write(
        "metrics.json",
        {"metrics": {**metrics, **costs}, "protocol": protocol(config, codes, data, fid_weights)},
    )
    (run.folder / "checkpoint.pt").unlink(missing_ok=True)


def protocol(config: PriorConfig, codes: Codes, data: Data, fid_weights: Path | None) -> dict[str, Any]:
    """Everything that must be equal for the scores of two priors to be comparable, and the tokenizer's identity."""
    sampling = {name: getattr(config, name) for name in SAMPLING}
    images = evaluate.protocol(data, config.device, fid_weights)
    return {**images, "version": PRIOR_VERSION, "tokenizer": codes.tokenizer, **sampling}


def prior_config(run: Run) -> PriorConfig:
    """The PriorConfig of a run."""
    stored = run.config()
    return PriorConfig(**{field.name: stored[field.name] for field in fields(PriorConfig) if field.name in stored})


def load_prior(folder: str | Path, device: str = "cpu") -> tuple[Prior, PriorConfig]:
    """The scored prior of a finished run folder, in eval mode on ``device``, and its config.

    Raises UserError when the folder holds no finished prior.
    """
    run = Run(Path(folder))
    if not run.finished or not (run.folder / "prior.safetensors").is_file():
        raise UserError(f"{folder} holds no finished prior; train one with python -m bench.prior")
    config, codes = prior_config(run), run.codes()
    classes = len(codes["classes"]) if config.conditional else 0
    prior = build(config, codes["codebook_size"], codes["grid_size"], classes)
    safetensors.torch.load_model(prior, run.folder / "prior.safetensors")
    return prior.to(device).eval().requires_grad_(False), config
