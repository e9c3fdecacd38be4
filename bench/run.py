"""Train and score tokenizers, and compare them in one table.

    python -m bench.run --backbone convnext
    python -m bench.run --backbone cnn convnext vit mamba --seeds 0 1
    python -m bench.run --backbone cnn --data folder:DIR --grid-size 16 --steps 2000
    python -m bench.run --list

Every setting below is a column of the results. A run that the store already holds is shown, not repeated; one that was
interrupted goes on where it stopped.
"""

from __future__ import annotations

import errno
import itertools
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated

import tyro
from rich import box
from rich.markup import escape
from rich.table import Table

from . import weights
from .config import Config, make_config, preset_settings
from .costs import static_costs
from .files import UserError
from .progress import console, stdout
from .store import Run, Store
from .tokenizer import Tokenizer
from .train import Diverged, Interrupted
from .trial import run_trial


@dataclass(frozen=True)
class Arguments(Config):
    """A Config whose backbone and seed may be several, and whose size defaults to the preset's."""

    backbone: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME [NAME ...]")] = ("convnext",)
    """cnn, convnext, vit, mamba or bimamba; several are run in turn and compared"""
    width: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    """channels at the token grid; the preset's own matches parameters across backbones"""
    depth: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    """blocks per level (cnn, convnext) or per side (vit, mamba, bimamba); default as for width"""
    seed: tyro.conf.Suppress[int] = 0
    seeds: Annotated[tuple[int, ...], tyro.conf.arg(metavar="INT [INT ...]")] = (0,)
    """each is one run per backbone; weights, batches and augmentation follow from it"""
    preset: str = "cpu"
    """smoke (seconds, proves that all works) or cpu (minutes, a real comparison); other settings override it"""
    results: Path = Path("results")
    """runs are stored below it, in runs/"""
    fid_weights: Path | None = None
    """file with torch-fidelity's Inception weights, where they cannot be downloaded"""
    resume: bool = True
    """continue interrupted runs from their checkpoint"""
    list: bool = False
    """show backbones, parameters, FLOPs and tokens at these settings, and stop"""

    def configs(self) -> list[Config]:
        """One Config per backbone and seed."""
        overrides = {field.name: getattr(self, field.name) for field in fields(Config)}
        del overrides["backbone"], overrides["seed"]
        return [
            make_config(backbone, self.preset, **overrides, seed=seed)
            for backbone in self.backbone
            for seed in self.seeds
        ]


# What the table shows: metric → (heading, format, which direction is better).
COLUMNS: dict[str, tuple[str, str, str]] = {
    "fid": ("FID\n", ".1f", "↓"),
    "fid_vgg16": ("FID\nvgg16", ".1f", "↓"),
    "lpips_alex": ("LPIPS\nalex", ".3f", "↓"),
    "lpips_vgg": ("LPIPS\nvgg", ".3f", "↓"),
    "psnr": ("PSNR\ndB", ".2f", "↑"),
    "ssim": ("SSIM\n", ".3f", "↑"),
    "perplexity": ("perp.\n", ".0f", "↑"),
    "images_per_second_encode": ("enc.\n/s", ".0f", "↑"),
    "images_per_second_decode": ("dec.\n/s", ".0f", "↑"),
    "train_seconds": ("train\ns", ".0f", "↓"),
}


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns the exit code: 0, 1 when a run diverged, 2 for what the user can mend, 130 stopped."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        options = parse(arguments)
        if options.list:
            stdout.print(size_table(options.configs()))
            return 0
        return compare(options)
    except UserError as error:
        return fail(str(error))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        return fail(f"{error.strerror} while writing {error.filename or 'results'}; free or choose another --results")
    except Interrupted as stopped:
        console.print(f"{stopped}")
        return 130


def fail(message: str) -> int:
    """Prints one sentence and returns the exit code of mistakes that the user can mend."""
    console.print("[bold red]error:[/]", escape(message), soft_wrap=True)
    return 2


def parse(arguments: list[str]) -> Arguments:
    """Command line → Arguments; the preset is looked up first, so that --help shows its values as the defaults."""
    names = [after for before, after in itertools.pairwise(arguments) if before == "--preset"]
    names += [word.partition("=")[2] for word in arguments if word.startswith("--preset=")]
    preset = names[-1] if names else "cpu"
    default = Arguments(**preset_settings(preset), preset=preset)
    return tyro.cli(Arguments, default=default, args=arguments, prog="python -m bench.run", description=__doc__)


def compare(options: Arguments) -> int:
    """Runs every config, prints the table, and returns the exit code."""
    store = Store(options.results)
    finished: list[Run] = []
    failed: list[tuple[Config, str]] = []
    for config in options.configs():
        known = store.run(config).finished
        try:
            run = run_trial(config, store, options.fid_weights, options.resume)
        except Diverged as error:
            failed.append((config, str(error)))
            console.print(f"[red]diverged:[/] {config.backbone} seed {config.seed}: {error}")
            continue
        console.print(f"{'already finished' if known else 'finished'}: {run.folder}", soft_wrap=True)
        finished.append(run)
    if finished:
        stdout.print(result_table(finished, failed))
        stdout.print(escape(protocol_line(finished[0])), soft_wrap=True)
        stdout.print(escape(next_command(options, finished)), soft_wrap=True)
    return 1 if failed else 0


def result_table(runs: list[Run], failed: list[tuple[Config, str]]) -> Table:
    """One row per run, per run that diverged, and for k-means at the same bits; the best of a column is bold."""
    rows = [(run.config(), run.metrics()) for run in runs]
    config, metrics = rows[0]
    shown = {name: column for name, column in COLUMNS.items() if name in metrics}
    best = {
        name: (min if arrow == "↓" else max)(metrics[name] for _, metrics in rows)
        for name, (_, _, arrow) in shown.items()
    }

    bits = f"{metrics['bits_per_image']:.0f} bits per image: {metrics['tokens']} codes of K = {config['codebook_size']}"
    table = Table(title=bits, title_justify="left", box=box.SIMPLE_HEAD, padding=0)
    table.add_column("tokenizer, seed", no_wrap=True)
    table.add_column("M\npar.", justify="right")
    for heading, _, arrow in shown.values():
        table.add_column(f"{heading}{arrow}", justify="right", no_wrap=True)

    for config, metrics in rows:
        cells = [f"{(metrics['params_encoder'] + metrics['params_decoder']) / 1e6:.2f}"]
        for name, (_, form, _) in shown.items():
            bold = len(rows) > 1 and metrics[name] == best[name]
            cells.append(f"[bold]{metrics[name]:{form}}[/]" if bold else f"{metrics[name]:{form}}")
        table.add_row(f"{config['backbone']} {config['quantizer']} {config['seed']}", *cells)
    for config, _ in failed:
        table.add_row(f"{config.backbone} {config.quantizer} {config.seed}", "[red]diverged[/]")
    table.add_section()
    reference = {name: metrics.get(f"{name}_kmeans") for name in shown}
    cells = ["–" if value is None else f"{value:{shown[name][1]}}" for name, value in reference.items()]
    table.add_row("k-means on patches", "–", *cells)
    return table


def protocol_line(run: Run) -> str:
    """How the table's numbers were measured, in one line."""
    protocol = run.protocol()
    fid = "" if protocol["extractor_inception"] else f" No FID: {weights.inception_missing()}"
    skipped = f" ({protocol['skipped']} unreadable files skipped)" if protocol["skipped"] else ""
    return (
        f"Protocol {protocol['version']}: {protocol['split']}{skipped}; scored on all {protocol['count']} validation "
        f"images at {protocol['image_size']}×{protocol['image_size']}, decode(encode(x)) in {protocol['precision']}, "
        f"{protocol['rounding']}; FID-VGG16 is the Fréchet distance on {protocol['extractor_vgg16']}.{fid}"
    )


def next_command(options: Arguments, runs: list[Run]) -> str:
    """The command that is most useful after this one."""
    words = ["python -m bench.run"]
    if len(options.backbone) == 1:
        words += ["--backbone cnn convnext vit mamba bimamba"]
    else:
        words += ["--backbone", *options.backbone, "--seeds", *map(str, range(max(options.seeds) + 2))]
    if options.preset != "cpu":
        words += ["--preset", options.preset]
    if options.data != "photos":
        words += ["--data", options.data]
    return f"Picture: {runs[-1].folder / 'reconstructions.png'}\nNext: {' '.join(words)}"


def size_table(configs: list[Config]) -> Table:
    """Parameters, FLOPs and tokens of each config; nothing is trained."""
    first = configs[0]
    table = Table(title=f"{first.image_size}×{first.image_size} images", title_justify="left")
    for heading in ("backbone", "width", "depth", "encoder M", "decoder M", "encode MFLOP", "decode MFLOP", "tokens"):
        table.add_column(heading, justify="left" if heading == "backbone" else "right")
    for config in configs:
        config.check()
        costs = static_costs(Tokenizer(config).eval())
        millions = [f"{costs[name] / 1e6:.2f}" for name in ("params_encoder", "params_decoder")]
        flops = [f"{costs[name] / 1e6:.0f}" for name in ("flops_encode", "flops_decode")]
        sizes = [str(config.width), str(config.depth)]
        table.add_row(config.backbone, *sizes, *millions, *flops, f"{config.grid_size}×{config.grid_size}")
    return table


if __name__ == "__main__":
    sys.exit(main())
