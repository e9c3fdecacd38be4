"""Train priors over a tokenizer's codes, generate images, and compare the priors in one table.

    python -m bench.prior results/runs/RUN --prior transformer
    python -m bench.prior RUN --prior pixelcnn rnn transformer mamba independent
    python -m bench.prior RUN --prior transformer --temperature 0.9 --top-k 100     the same weights, sampled otherwise
    python -m bench.prior RUN --prior pixelcnn --conditional

RUN is the folder or the id of a tokenizer that python -m bench.run has finished; it is encoded once. A prior that the
store already holds is shown, not repeated; one that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated

import tyro
from rich import box
from rich.markup import escape
from rich.table import Table

from bench.analysis.frames import PRIOR_METRICS
from bench.core.cli import guarded
from bench.core.errors import Diverged, UserError
from bench.core.progress import console, say, stdout
from bench.core.store import Run, Store, find_tokenizer, known_tokenizers
from bench.priors.config import PriorConfig
from bench.priors.trial import run_prior

# Metrics that the table shows, those of them that the runs have.
COLUMNS = (
    *("coded_bits_per_token", "coded_bits_per_pixel", "gfid", "gfid_vgg16", "gkid_vgg16"),
    *("precision_vgg16", "recall_vgg16", "copies", "images_per_second_sample", "train_seconds"),
)
SHORT = {  # headings, by lines
    "coded_bits_per_token": "bits/\ntoken",
    "coded_bits_per_pixel": "bits/\npixel",
    "precision_vgg16": "prec.\n",
    "recall_vgg16": "rec.\n",
    "copies": "copies\n",
    "images_per_second_sample": "draw\n/s",
    "train_seconds": "train\ns",
}


@dataclass(frozen=True)
class PriorArguments(PriorConfig):
    """A PriorConfig of several tokenizers, priors and seeds."""

    tokenizer: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="RUN [RUN ...]")] = ()
    """folders or ids of finished tokenizer runs"""
    prior: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME [NAME ...]")] = ("transformer",)
    """pixelcnn, rnn, transformer, mamba, or independent, the floor: a histogram of the codes of each position; several
    are trained in turn and compared"""
    seed: tyro.conf.Suppress[int] = 0
    seeds: Annotated[tuple[int, ...], tyro.conf.arg(metavar="INT [INT ...]")] = (0,)
    """each is one run per prior; weights, batches, dropout and samples follow from it"""
    results: Path = Path("results")
    """where ids are looked up, in runs/; priors are stored beside the tokenizer's runs/, in priors/"""
    fid_weights: Path | None = None
    """file with torch-fidelity's Inception weights, where they cannot be downloaded"""
    resume: bool = True
    """continue interrupted runs from their checkpoint"""

    def config(self, tokenizer: str, prior: str, seed: int) -> PriorConfig:
        """The PriorConfig of one run."""
        shared = {field.name: getattr(self, field.name) for field in fields(PriorConfig)}
        return PriorConfig(**{**shared, "tokenizer": tokenizer, "prior": prior, "seed": seed})


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns the exit code: 0, 1 when a run diverged, 2 for what the user can mend, 130 stopped."""
    return guarded(lambda: work(sys.argv[1:] if arguments is None else arguments))


def work(arguments: list[str]) -> int:
    """Parses the command line, runs every prior, prints the table, and returns the exit code."""
    options = tyro.cli(PriorArguments, args=arguments, prog="python -m bench.prior", description=__doc__)
    tokenizers = [find_tokenizer(name, options.results) for name in options.tokenizer]
    if not tokenizers:
        raise UserError(f"name the run of a tokenizer: {known_tokenizers(options.results)}")
    runs = [(run, prior, seed) for run in tokenizers for prior in options.prior for seed in options.seeds]
    for run, prior, seed in runs:
        options.config(run.folder.name, prior, seed).check()  # all of them, before any is trained
    finished, failed = [], False
    for run, prior, seed in runs:
        config, store = options.config(run.folder.name, prior, seed), Store(run.folder.parent.parent)
        known = store.run(config).finished
        try:
            made = run_prior(config, run, store, options.fid_weights, options.resume)
        except Diverged as error:
            failed = True
            console.print(f"[red]diverged:[/] {prior} seed {seed}: {error}")
            continue
        say(f"{'already finished' if known else 'finished'}: {escape(str(made.folder))}")
        finished.append(made)
    if finished:
        stdout.print(result_table(finished))
        stdout.print(escape(protocol_line(finished[0])), soft_wrap=True)
        stdout.print(escape(f"Pictures: {finished[-1].folder}/samples.png, neighbours.png"), soft_wrap=True)
    return int(failed)


def result_table(runs: list[Run]) -> Table:
    """One row per prior, and the floors and ceilings under them; the best over one tokenizer's codes is bold."""
    rows = [(run.config(), run.metrics()) for run in runs]
    shown = {name: PRIOR_METRICS[name] for name in COLUMNS if all(name in metrics for _, metrics in rows)}
    several = len({config["tokenizer"] for config, _ in rows}) > 1
    table = Table(box=box.SIMPLE_HEAD, padding=0)
    table.add_column("prior, seed", no_wrap=True)
    table.add_column("M\npar.", justify="right", no_wrap=True)
    for name, metric in shown.items():
        heading = SHORT.get(name, metric.label.replace(" ", "\n"))
        table.add_column(f"{heading}\n{metric.arrow}", justify="right", no_wrap=True)
    for index, (config, metrics) in enumerate(rows):
        if several and (index == 0 or config["tokenizer"] != rows[index - 1][0]["tokenizer"]):
            table.add_row(f"[italic]{config['tokenizer']}[/]")
        cells = [f"{metrics['params_prior'] / 1e6:.2f}" if metrics["params_prior"] else "–"]
        rivals = [other for its, other in rows if its["tokenizer"] == config["tokenizer"]]
        for name, metric in shown.items():
            values = [other[name] for other in rivals]
            best = {"lower": min(values), "higher": max(values), "": None}[metric.better]
            bold = len(rivals) > 1 and metrics[name] == best
            cells.append(f"[bold]{metrics[name]:{metric.form}}[/]" if bold else f"{metrics[name]:{metric.form}}")
        table.add_row(f"{config['prior']} {config['seed']}", *cells)
        last = index + 1 == len(rows) or rows[index + 1][0]["tokenizer"] != config["tokenizer"]
        if last:
            table.add_section()
            for name, label in (("_real", "real codes"), ("_shuffled", "shuffled codes")):
                values = [metrics.get(f"{column}{name}") for column in shown]
                shows = zip(values, shown.values(), strict=True)
                table.add_row(label, "–", *("–" if value is None else f"{value:{m.form}}" for value, m in shows))
            table.add_section()
    return table


def protocol_line(run: Run) -> str:
    """How the table's numbers were measured, in a few sentences."""
    protocol, metrics = run.protocol(), run.metrics()
    how = f"temperature {protocol['temperature']:g}" + (f", top {protocol['top_k']}" if protocol["top_k"] else "")
    side = protocol["image_size"]
    return (
        f"Protocol {protocol['version']}: {protocol['split']}; bits on the codes of all {protocol['count']} validation "
        f"images, where independent codes take {metrics['coded_bits_per_token_independent']:.2f} per token; "
        f"{protocol['samples']} samples ({how}) against those images at {side}×{side}: Fréchet and kernel distance, "
        f"precision and recall on {protocol['extractor_vgg16']}; copies are samples nearer to a training image, at "
        "32×32 or less, than 95 % of reconstructed validation images are (0.05 is innocent; median PSNR "
        f"{metrics['nearest_train_psnr']:.1f} dB, of those {metrics['nearest_val_psnr']:.1f}); sampling step by step "
        f"is {metrics['sampling_speedup']:.1f} times as fast as whole passes. Real codes are those of the training "
        "set, shuffled ones the same in random order within each grid."
    )


if __name__ == "__main__":
    sys.exit(main())
