"""Train and score tokenizers, and compare them in one table.

    python -m bench.run --backbone convnext
    python -m bench.run --backbone cnn convnext vit mamba --seeds 0 1
    python -m bench.run --backbone cnn --data folder:DIR --grid-size 16 --steps 2000
    python -m bench.run --list

Every setting below is a column of the results. A run that the store already holds is shown, not repeated; one that was
interrupted goes on where it stopped.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from rich.markup import escape
from rich.table import Table

from backbones import BACKBONES
from bench.core.cli import Trial, command, run_each
from bench.core.progress import stdout
from bench.core.runs import Run
from bench.core.store import Store
from bench.metrics import weights
from bench.tokenizers.arguments import Arguments, parse
from bench.tokenizers.config import Config
from bench.tokenizers.costs import static_costs
from bench.tokenizers.tokenizer import Tokenizer


@dataclass(frozen=True)
class RunArguments(Arguments):
    """What the command line takes."""

    resume: bool = True
    """continue interrupted runs from their checkpoint"""
    list: bool = False
    """show parameters, FLOPs and tokens of the given backbones at these settings, and stop"""


# Metrics that the table shows, those of them that all of the runs have.
COLUMNS = (
    *("fid", "fid_vgg16", "fd_dinov2", "lpips_alex", "lpips_vgg", "psnr", "ssim", "perplexity"),
    *("images_per_second_encode", "images_per_second_decode", "train_seconds"),
)


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns the exit code: 0, 1 when a run diverged, 2 for what the user can fix, 130 stopped."""
    return command(work, arguments)


def work(arguments: list[str]) -> int:
    """Parses the command line and does what it says. Returns the exit code."""
    options = parse(RunArguments, arguments, "python -m bench.run", __doc__)
    if options.list:
        stdout.print(size_table(options.configs(), options.timed))
        return 0
    return compare(options)


def compare(options: RunArguments) -> int:
    """Runs every config, prints the table, and returns the exit code."""
    from bench.tokenizers.trial import run_trial  # and seaborn: not before the command line is known to be right

    store = Store(options.results)
    trials = [
        Trial(
            f"{config.backbone} {config.quantizer} {config.seed}",
            store.run(config),
            partial(run_trial, config, store, options.fid_weights, options.resume),
        )
        for config in options.configs()
    ]
    finished, diverged = run_each(trials)
    if finished:
        stdout.print(result_table(finished, diverged))
        stdout.print(escape(protocol_line(finished[0])), soft_wrap=True)
        stdout.print(escape(next_command(options, finished)), soft_wrap=True)
    return 1 if diverged else 0


def result_table(runs: list[Run], diverged: Sequence[str] = ()) -> Table:
    """One row per run, per run that diverged, and for k-means at the same bits; the best of a column is bold."""
    from bench.analysis.frames import UNMATCHED, frame, unmatched
    from bench.analysis.tables import Group, score_table

    rows = [(run.config(), run.metrics()) for run in runs]
    off = unmatched(frame(runs))
    marks = [f" {UNMATCHED}" if marked else "" for marked in off]
    group = Group(
        rows=[
            (f"{config['backbone']} {config['quantizer']} {config['seed']}{mark}", metrics["params"], metrics)
            for (config, metrics), mark in zip(rows, marks, strict=True)
        ],
        references=[("k-means on patches", "_kmeans")],
        diverged=list(diverged),
    )
    config, metrics = rows[0]
    bits = f"{metrics['bits_per_image']:.0f} bits per image: {metrics['tokens']} codes of K = {config['codebook_size']}"
    table = score_table("tokenizer, seed", COLUMNS, [group], bits)
    if off.any():
        table.caption = f"{UNMATCHED} parameters, FLOPs and time all differ from the others'; --match gives equal ones"
    return table


def protocol_line(run: Run) -> str:
    """How the table's numbers were measured, in one line."""
    protocol = run.protocol()
    missing = "" if protocol["extractor_inception"] else f" No FID: {weights.inception_missing()}"
    missing += "" if protocol.get("extractor_dinov2") else f" No FD-DINOv2: {weights.dinov2_missing()}"
    skipped = f" ({protocol['skipped']} unreadable files skipped)" if protocol["skipped"] else ""
    return (
        f"Protocol {protocol['version']}: {protocol['split']}{skipped}; scored on all {protocol['count']} validation "
        f"images at {protocol['image_size']}×{protocol['image_size']}, decode(encode(x)) in {protocol['precision']}, "
        f"{protocol['rounding']}; FID-VGG16 is the Fréchet distance on {protocol['extractor_vgg16']}.{missing}"
    )


def next_command(options: RunArguments, runs: list[Run]) -> str:
    """Where the picture is, and the commands that are most useful after this one."""
    words = ["python -m bench.run"]
    if len(options.backbone) == 1:
        words += ["--backbone", *BACKBONES]
    else:
        words += ["--backbone", *options.backbone, "--seeds", *map(str, range(max(options.seeds) + 2))]
    if options.preset != "cpu":
        words += ["--preset", options.preset]
    if options.data != "photos":
        words += ["--data", options.data]
    folder = runs[-1].folder
    lines = [f"Picture: {folder / 'reconstructions.png'}", f"Next: {' '.join(words)}"]
    return "\n".join([*lines, f"Generate images: python -m bench.prior {folder}"])


def size_table(configs: list[Config], timed: bool = False) -> Table:
    """Parameters, FLOPs and tokens of each config, and its steps where they are ``timed``; nothing is trained."""
    first = configs[0]
    table = Table(title=f"{first.image_size}×{first.image_size} images", title_justify="left")
    headings = ("backbone", "width", "depth", "encoder M", "decoder M", "encode MFLOP", "decode MFLOP", "tokens")
    for heading in (*headings, "steps") if timed else headings:
        table.add_column(heading, justify="left" if heading == "backbone" else "right")
    for config in configs:
        config.check()
        costs = static_costs(Tokenizer(config).eval())
        millions = [f"{costs[name] / 1e6:.2f}" for name in ("params_encoder", "params_decoder")]
        flops = [f"{costs[name] / 1e6:.0f}" for name in ("flops_encode", "flops_decode")]
        sizes = [str(config.width), str(config.depth)]
        steps = [str(config.steps)] if timed else []
        table.add_row(config.backbone, *sizes, *millions, *flops, f"{config.grid_size}×{config.grid_size}", *steps)
    return table


if __name__ == "__main__":
    sys.exit(main())
