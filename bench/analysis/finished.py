"""Finished runs as commands print them: which may share a table, what stands in grey below them, and how they were
measured."""

import math

from bench.core.files import sha256_json
from bench.core.runs import HELD_OUT, Run
from bench.metrics import weights
from bench.tokenizers.codecs import FORMATS

from .references import KMEANS, with_bits
from .tables import with_suffix

# Metrics that the table shows, those of them that all of the runs have.
COLUMNS = (
    *("fid", "fid_vgg16", "fd_dinov2", "lpips_alex", "lpips_vgg", "psnr", "ssim", "perplexity"),
    *("images_per_second_encode", "images_per_second_decode", "train_seconds"),
)


def label_of(run: Run) -> str:
    """What ``run`` is called in tables and lines."""
    config = run.config()
    return f"{config['backbone']} {config['quantizer']} {config['seed']}"


def alike(runs: list[Run]) -> list[list[Run]]:
    """``runs`` by how they were measured, such as on which images: a table ranks those of one group."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(sha256_json(run.protocol()), []).append(run)
    return list(groups.values())


def apart(run: Run, first: Run) -> str:
    """Why ``run`` is not in the table of ``first``, in a sentence; empty where it is."""
    own, other = run.protocol(), first.protocol()
    names = [name for name in {**other, **own} if own.get(name) != other.get(name)]
    words = ", ".join(f"{name} {str(other.get(name))[:16]} there, {str(own.get(name))[:16]} here" for name in names)
    return f" Not to be ranked against the first table: {words}." if words else ""


def references(metrics: dict[str, float]) -> list[tuple[str, float, dict[str, float]]]:
    """Rows of a table, from the ``metrics`` of a run: k-means and image formats, with the bits that these took."""
    rows = [(KMEANS, 0, with_suffix(metrics, "_kmeans"))]
    for name, one in FORMATS.items():
        scores = with_suffix(metrics, f"_{name}")
        rows.append((with_bits(one.label, scores.get("bits_per_image", math.nan)), 0, scores))
    return [row for row in rows if row[2]]


def protocol_line(run: Run) -> str:
    """How the table's numbers were measured, in one line."""
    protocol = run.protocol()
    missing = "" if protocol["extractor_inception"] else f" No FID: {weights.inception_missing()}"
    missing += "" if protocol.get("extractor_dinov2") else f" No FD-DINOv2: {weights.dinov2_missing()}"
    skipped = f" ({protocol['skipped']} unreadable files skipped)" if protocol["skipped"] else ""
    few = run.config().get("train_images")
    trained = f"; trained on {few} of the training images" if few else ""
    return (
        f"Protocol {protocol['version']}: {protocol['split']}{skipped}{trained}; scored on all {protocol['count']} "
        f"{HELD_OUT[protocol['scored_on']]} images at {protocol['image_size']}×{protocol['image_size']}, "
        f"decode(encode(x)) in {protocol['precision']}, {protocol['rounding']}; "
        f"FID-VGG16 is the Fréchet distance on {protocol['extractor_vgg16']}.{missing}"
    )
