"""Run folders with known scores, written without training: what a report reads."""

import json
from collections.abc import Iterator
from dataclasses import asdict

import numpy as np
from PIL import Image

from bench.core.files import read_json
from bench.core.runs import NUMBERS, SCORED, TOLD, Run
from bench.core.store import Store
from bench.priors.config import PriorConfig
from bench.tokenizers.codecs import FORMATS
from bench.tokenizers.config import Config, make_config
from bench.tokenizers.curves import curve_metrics
from bench.training.trial import complete

SIDE = 8  # pixels of a fabricated sample picture
MACHINE = {"commit": "abc", "processor": "x", "threads": 2}


def least(shelf: str = "runs", protocol: dict | None = None, **metrics) -> dict:
    """What a metrics.json has at least, of a finished run that lies in ``shelf``, with ``metrics`` and ``protocol``."""
    told = {**dict.fromkeys(TOLD, "x"), "extractor_inception": None, **dict.fromkeys(NUMBERS[shelf], 64)}
    return {"metrics": {**dict.fromkeys(SCORED[shelf], 1), **metrics}, "protocol": {**told, **(protocol or {})}}


def lacking(whole: dict) -> Iterator[tuple[str, dict]]:
    """The content of a metrics.json without each of its scores and parts of its protocol, missing and null, by name."""
    for part, values in whole.items():
        for name in values:
            yield name, {**whole, part: {key: value for key, value in values.items() if key != name}}
            yield name, {**whole, part: {**values, name: None}}


def fabricate(store: Store, config: Config, quality: float = 0.0, noise: float = 0.0, **changes) -> Run:
    """A finished run of ``config`` whose LPIPS is lower and PSNR higher by ``quality``, with seed ``noise`` added.

    Images differ in difficulty, the same for every run. ``changes`` replace protocol fields or metrics by name.
    """
    config = config.resolved()
    run = store.run(config)
    run.folder.mkdir(parents=True, exist_ok=True)
    run.write("config.json", {"config": asdict(config), "environment": MACHINE})
    count = 64
    difficulty = np.random.default_rng(7).normal(size=count)  # shared by all runs
    cell = f"{config.backbone} {config.beta} {config.codebook_size} {config.grid_size}"  # not the id: fields join it
    own = np.random.default_rng([config.seed, *cell.encode()]).normal(size=count)
    shift = quality - noise
    per_image = {
        "lpips_alex": 0.30 + 0.05 * difficulty + 0.01 * own - shift,
        "lpips_vgg": 0.45 + 0.05 * difficulty + 0.01 * own - shift,
        "psnr": 25 + 2 * difficulty + 0.3 * own + 20 * shift,
        "ssim": 0.6 + 0.05 * difficulty + 0.01 * own + shift,
    }
    np.savez_compressed(
        run.folder / "per_image.npz", **{name: row.astype(np.float32) for name, row in per_image.items()}
    )
    pixels = np.random.default_rng(0).integers(0, 256, (6, SIDE, SIDE, 3), dtype=np.uint8)
    np.savez_compressed(run.folder / "samples.npz", x=pixels, x_hat=pixels // 2 + 64)
    np.savez_compressed(run.folder / "untrained.npz", untrained=pixels // 8 + 112)
    Image.fromarray(pixels[0]).save(run.folder / "reconstructions.png")
    steps = np.arange(10, config.steps + 1, max(1, config.steps // 20))
    rows = [
        {"step": int(step), "lr": config.lr, "reconstruction": float(1 / step), "quantizer": float(0.5 / step)}
        | {"grad_norm": 1.0, "distortion": 0.1, "perplexity": float(config.codebook_size * step / (step + 50))}
        | {"codes_used": config.codebook_size // 2, "seconds": float(step) / 10}
        for step in steps
    ]
    tokens = config.grid_size**2
    bits = tokens * float(np.log2(config.codebook_size))
    scores = {name: float(row.mean(dtype=np.float64)) for name, row in per_image.items()}
    metrics = {
        **scores,
        **{"fid_vgg16": 100 - 200 * shift, "kid_vgg16": 0.05 - 0.1 * shift},
        **{"sharpness": 0.7, "grid_energy": 2.0, "grid_edges": 1.0, "grid_energy_init": 4.0, "grid_edges_init": 3.0},
        **{"perplexity": 0.4 * config.codebook_size, "usage": 0.9, "dead_codes": 0.1 * config.codebook_size},
        **{"tokens": tokens, "bits_per_image": bits, "bits_per_pixel": bits / config.image_size**2},
        **{"params_encoder": 400_000 + 1000 * config.width, "params_decoder": 450_000 + 1000 * config.width},
        **{"flops_encode": 40_000_000 + 10**5 * config.width, "flops_decode": 50_000_000},
        **{"images_per_second_encode": 500.0 - config.width, "images_per_second_decode": 400.0 - config.width},
        **{"train_seconds": 30.0 + config.width / 10, "score_seconds": 5.0, "peak_memory_mb": 900.0},
        "images_seen": config.steps * config.batch_size,
        **curve_metrics(rows, config.warmup),
        **{f"{name}_kmeans": value * 0.9 for name, value in scores.items()},
    }
    protocol = {"version": 1, "data": "photos", "fingerprint": "f" * 64, "split": "a / b", "count": count, "skipped": 0}
    protocol["scored_on"] = config.split
    protocol |= {"image_size": config.image_size, "resizer": "none", "rounding": "uint8", "precision": "fp32"}
    protocol |= {"extractor_vgg16": "v", "extractor_alex": "a", "extractor_inception": None, "device": "cpu"}
    if not config.discrete:
        codes = {"perplexity", "usage", "dead_codes", "tokens", "codes_used"}
        codes |= {"bits_per_image", "bits_per_pixel"} if config.quantizer == "none" else set()
        metrics = {name: value for name, value in metrics.items() if name not in codes and "_kmeans" not in name}
        rows = [{name: value for name, value in row.items() if name not in codes} for row in rows]
    (run.folder / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, value in changes.items():
        (metrics if name in metrics or name.endswith(tuple(FORMATS)) else protocol)[name] = value
    run.write("metrics.json", {"metrics": metrics, "protocol": protocol})
    return run


def seal(run: Run) -> None:
    """Has a fabricated run the digests of its files, as those have that are trained."""
    scored = read_json(run.folder / "metrics.json")
    complete(run, scored["metrics"], scored["protocol"])


def fabricate_prior(store: Store, config: PriorConfig, bits: float, distance: float) -> Run:
    """A finished prior over the codes of a fabricated tokenizer: so many bits per token, at that gFID."""
    config = config.resolved()
    tokenizer, run = store.named(config.tokenizer).config(), store.run(config)
    run.folder.mkdir(parents=True, exist_ok=True)
    codes = {"codebook_size": tokenizer["codebook_size"], "grid_size": tokenizer["grid_size"], "classes": []}
    about = {"config": asdict(config), "environment": MACHINE, "codes": codes, "tokenizer": tokenizer}
    run.write("config.json", about)
    tokens, pixels = tokenizer["grid_size"] ** 2, tokenizer["image_size"] ** 2
    pixel = np.random.default_rng(config.seed).integers(0, 256, (16, SIDE, SIDE, 3), dtype=np.uint8)
    np.savez_compressed(run.folder / "samples.npz", x=pixel, codes=np.zeros((16, 1, 1), dtype=np.uint8))
    metrics = {
        **{"coded_bits_per_token": bits, "coded_bits_per_image": tokens * bits},
        **{"coded_bits_per_pixel": tokens * bits / pixels, "coded_bits_per_token_train": bits - 0.1},
        **{
            "coded_bits_per_token_independent": 6.5,
            "params_prior": 1_000_000,
            "flops_prior": 10**8,
            "images_per_second_sample": 100.0,
        },
        **{"sampling_speedup": 4.0, "gfid_vgg16": distance, "gkid_vgg16": distance / 1000, "precision_vgg16": 0.5},
        **{
            "recall_vgg16": 0.4,
            "nearest_train_psnr": 18.0,
            "nearest_val_psnr": 19.0,
            "copy_rate": 0.05,
            "train_seconds": 30.0,
        },
        **{"peak_memory_mb": 900.0, "grids_seen": 25_600, "gfid_vgg16_real": 50.0, "gfid_vgg16_shuffled": 150.0},
        **{"gkid_vgg16_real": 0.05, "gkid_vgg16_shuffled": 0.15},
    }
    protocol = {"version": 1, "tokenizer": config.tokenizer[-8:], "data": "photos", "fingerprint": "f" * 64}
    protocol |= {
        "split": "a / b",
        "scored_on": tokenizer["split"],
        "count": 64,
        "samples": config.samples,
        "temperature": config.temperature,
        "top_k": config.top_k,
        "precision": "fp32",
    }
    protocol |= {"image_size": tokenizer["image_size"], "rounding": "uint8", "extractor_vgg16": "v", "device": "cpu"}
    run.write("metrics.json", {"metrics": metrics, "protocol": {**protocol, "extractor_inception": None}})
    return run


def fabricate_failed(store: Store, config: Config, status: str = "diverged") -> Run:
    """A run of ``config`` that ended without scores."""
    config = config.resolved()
    run = store.run(config)
    run.folder.mkdir(parents=True, exist_ok=True)
    run.write("config.json", {"config": asdict(config), "environment": MACHINE})
    run.fail(status, f"it {status}")
    return run


def sweep(
    store: Store, effects: dict[str, float], betas=(0.25, 1.0), seeds=(0, 1, 2), spread=0.002, draw=0
) -> list[Run]:
    """Backbones × betas × seeds in preset smoke; each backbone better by its effect, seeds spread normally."""
    generator = np.random.default_rng(draw)
    return [
        fabricate(store, make_config(name, "smoke", beta=beta, seed=seed), effect, spread * generator.normal())
        for name, effect in effects.items()
        for beta in betas
        for seed in seeds
    ]
