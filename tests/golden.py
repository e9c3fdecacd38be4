"""What a few steps give: the numbers of golden.json, which hold a protocol version to its word.

    python -m tests.golden                     renews them, after PROTOCOL_VERSION or PRIOR_VERSION was raised
    python -m tests.golden --only-defaults     also where neither was: only defaults of a config changed

Two training steps and a scoring of every backbone (with ``ema``), of every quantizer (with ``cnn``) and of a run with
all losses; two steps and a scoring of every prior. All in float32 on the CPU, on crops of one photograph. Values that
are what they were, up to rounding, are kept.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import tyro

from backbones import BACKBONES
from bench.data import photographs
from bench.metrics import ImageSet
from bench.priors.codes import Codes
from bench.priors.config import PRIOR_VERSION, PriorConfig
from bench.priors.generate import rate
from bench.priors.models import LEARNED, PRIORS
from bench.priors.train import train_prior
from bench.quantizers import QUANTIZERS
from bench.tokenizers.config import PROTOCOL_VERSION, Config, make_config
from bench.tokenizers.evaluate import PatchKMeans, score
from bench.tokenizers.train import train

PATH = Path(__file__).with_suffix(".json")
Values = dict[str, float]
ON_CPU = {"precision": "fp32", "device": "cpu", "seed": 1, "steps": 2, "batch_size": 8, "warmup": 1}
SMALL = {**ON_CPU, "width": 24, "depth": 2, "codebook_size": 64, "code_dim": 4, "lpips_weight": 0.0}
ALL_LOSSES = {"lpips_weight": 0.1, "gan_weight": 0.5, "gan_start": 0.0, "gan_ramp": 0.0, "gan_width": 8}
REGULARISED = {"lecam_weight": 0.1, "r1_weight": 0.1, "entropy_weight": 0.1, "reconstruction": "l1", "augment": "blog"}


def images(count: int) -> np.ndarray:
    """The first ``count`` crops of 32×32 of a photograph, row by row: (count, 32, 32, 3) uint8."""
    rows = photographs()["astronaut"].pixels[:256, :256].reshape(8, 32, 8, 32, 3).swapaxes(1, 2)
    return np.ascontiguousarray(rows.reshape(64, 32, 32, 3)[:count])


def history(folder: str) -> Values:
    """What the last step logged, without the clock."""
    row = json.loads((Path(folder) / "history.jsonl").read_text().splitlines()[-1])
    return {name: value for name, value in row.items() if name not in ("seconds", "step")}


def tokenizer(config: Config) -> Values:
    """Two steps of training, then the scores of eight images."""
    with tempfile.TemporaryDirectory() as folder:
        trained, _ = train(config.resolved(), images(64), Path(folder))
        logged = history(folder)
    codes = config.codebook_size if config.discrete else None
    scores, _ = score(trained, codes, images(16)[8:], "cpu", None, "golden")
    return {**logged, **{f"{name} scored": value for name, value in scores.items()}}


def reference() -> Values:
    """The scores of k-means on patches."""
    scores, _ = score(PatchKMeans(images(64), 4, 16, "cpu"), 16, images(16), "cpu", None, "golden")
    return scores


def generated() -> Values:
    """Distances between two sets of images, as samples of priors are scored."""
    first, second = (ImageSet.of([torch.from_numpy(part).permute(0, 3, 1, 2)]) for part in np.split(images(48), 2))
    return first.distances(second)


def prior(name: str) -> Values:
    """Two steps of training on the codes of images by k-means, then the rate of others."""
    codec = PatchKMeans(images(64), 4, 16, "cpu")
    pixels = torch.from_numpy(images(64)).permute(0, 3, 1, 2) / 127.5 - 1
    grids = codec.encode(pixels).numpy().astype(np.uint8)
    codes = Codes(grids[:48], grids[48:], 16, "golden", (), None, None)
    config = PriorConfig("golden", name, depth=2, parameters=30_000, **ON_CPU).resolved()
    with tempfile.TemporaryDirectory() as folder:
        trained, _ = train_prior(config, codes, Path(folder))
        logged = history(folder) if name in LEARNED else {}
    return {**logged, "bits_per_token scored": rate(trained, codes.held_out, None, None)}


CASES: dict[str, Callable[[], Values]] = {
    **{f"{name} ema": partial(tokenizer, make_config(name, "smoke", **SMALL)) for name in BACKBONES},
    **{f"cnn {name}": partial(tokenizer, make_config("cnn", "smoke", quantizer=name, **SMALL)) for name in QUANTIZERS},
    "cnn all losses": partial(tokenizer, make_config("cnn", "smoke", **{**SMALL, **ALL_LOSSES, **REGULARISED})),
    "k-means": reference,
    "generated": generated,
    **{f"prior {name}": partial(prior, name) for name in PRIORS},
}


def versions() -> dict[str, int | str]:
    """What the numbers may change with: raised by hand, or another torch."""
    return {"PROTOCOL_VERSION": PROTOCOL_VERSION, "PRIOR_VERSION": PRIOR_VERSION, "torch": torch.__version__}


# Relative, for what other processors round otherwise (measured: 1e-4). Where a set is small, one token that falls to
# another code weighs much in how codes are used, and a little in distances between sets.
TOLERANCE = 5e-4
WIDER = dict.fromkeys(("perplexity", "usage", "dead_codes", "codes_used", "precision", "recall"), 0.03)
WIDER |= dict.fromkeys(("fid", "kid", "gfid", "gkid", "grid"), 0.005)


def same(name: str, found: float, stored: float) -> bool:
    """Whether two values of the metric ``name`` are equal up to rounding."""
    tolerance = next((wide for start, wide in WIDER.items() if name.startswith(start)), TOLERANCE)
    return math.isclose(found, stored, rel_tol=tolerance, abs_tol=1e-4)


def main(only_defaults: bool = False) -> int:
    """Renews golden.json. Returns the exit code: 2 when numbers moved under versions that did not.

    Args:
        only_defaults: nothing but defaults of a config changed, so that its runs have other ids in any case
    """
    torch.set_num_threads(1)
    before = json.loads(PATH.read_text(encoding="utf-8"))
    raised = any(before["versions"][name] != versions()[name] for name in ("PROTOCOL_VERSION", "PRIOR_VERSION"))
    values, moved = {}, []
    for name, compute in CASES.items():
        stored = before["values"].get(name, {})
        values[name] = {
            key: stored[key] if key in stored and same(key, found, stored[key]) else found
            for key, found in compute().items()
        }
        moved += [f"{name}: {key}" for key, value in stored.items() if values[name].get(key) != value]
    added = [name for name in CASES if name not in before["values"]]
    print(f"{len(CASES)} cases, {len(moved)} numbers moved: {', '.join(moved[:6]) or 'none'}")
    print(f"added: {', '.join(added) or 'none'}")
    if moved and not raised and not only_defaults:
        print("nothing written: raise PROTOCOL_VERSION or PRIOR_VERSION, or say --only-defaults if that is all;")
        print("of a variant that nobody has used yet delete the entry from golden.json, and run this again")
        return 2
    PATH.write_text(json.dumps({"versions": versions(), "values": values}, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main, prog="python -m tests.golden", description=__doc__))
