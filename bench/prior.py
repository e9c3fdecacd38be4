"""Train priors over a tokenizer's codes, or over pixels, generate images, and compare the priors in one table.

    python -m bench.prior results/runs/RUN --prior transformer
    python -m bench.prior RUN --prior pixelcnn rnn transformer mamba independent
    python -m bench.prior RUN --prior transformer --temperature 0.9 --top-k 100     the same weights, sampled otherwise
    python -m bench.prior RUN --prior pixelcnn --conditional
    python -m bench.prior pixels --data photos --image-size 32 --prior pixelcnn     no tokenizer: bits per dimension

RUN is the folder or the id of a tokenizer that python -m bench.run has finished; it is encoded once. The word pixels in
its place is no tokenizer: the codes are the values of all pixels, 3072 of 32×32 in colour. A step of pixelcnn on 64 of
those takes some 10 GB and, on one core, half a minute; smaller --batch-size, --parameters and --samples take less. A
prior that the store already holds is shown, not repeated; one that was interrupted goes on where it stopped.
"""

import itertools
import shlex
import sys
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Annotated

import tyro
from rich.markup import escape
from rich.table import Table

from bench.analysis.tables import Group, put, score_table, with_suffix
from bench.core import group
from bench.core.cli import Trial, command, command_line, run_each
from bench.core.errors import UserError
from bench.core.manual import Manual
from bench.core.progress import runnable, stdout
from bench.core.recipe import Recipe, from_file
from bench.core.runs import HELD_OUT, Run
from bench.core.store import Store, find_tokenizer, known_tokenizers
from bench.priors.config import PriorConfig
from bench.priors.models.masked import BOUND
from bench.priors.pixels import BITS, PIXELS, Pixels
from bench.priors.trial import run_prior
from bench.tokenizers.curves import undecided
from bench.training.track import Track

# Metrics that the table shows, those of them that the runs have.
COLUMNS = (
    *("coded_bits_per_token", "coded_bits_per_pixel", "gfid", "gfid_vgg16", "gkid_vgg16"),
    *("precision_vgg16", "recall_vgg16", "copy_rate", "images_per_second_sample", "train_seconds"),
)

# How --help shows what the command takes.
SECTIONS = {"prior": "prior", "steps": "budget", "lr": "optimiser", "samples": "sampling", "precision": "run"}
SECTIONS |= {"data": "pixels", "seeds": "run"}
ESSENTIAL = ("prior", "steps", "parameters", "conditional", "samples", "temperature", "top_k", "seeds", "results")
TAIL = {field.name for field in fields(PriorConfig)} - {*ESSENTIAL, "tokenizer", "depth", "batch_size", "lr", "device"}


@dataclass(frozen=True)
class PriorArguments(PriorConfig):
    """A PriorConfig of several tokenizers, priors and seeds."""

    tokenizer: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="RUN [RUN ...]")] = ()
    """folders or ids of finished tokenizer runs; or pixels, the images themselves"""
    data: str | None = None
    """of pixels alone: whose, as python -m bench.run takes them; photos unless given"""
    image_size: int | None = None
    """of pixels alone: side of the images, 32 unless given"""
    prior: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME [NAME ...]")] = ("transformer",)
    """pixelcnn, rnn, transformer, mamba, masked, or independent, the floor: a histogram of the codes of each position;
    several are trained in turn and compared"""
    seed: tyro.conf.Suppress[int] = 0
    seeds: Annotated[tuple[int, ...], tyro.conf.arg(metavar="INT [INT ...]")] = (0,)
    """each is one run per prior; weights, batches, dropout and samples follow from it"""
    results: Path = Path("results")
    """where ids are looked up, in runs/; priors are stored beside the tokenizer's runs/, in priors/, and those over
    pixels here"""
    fid_weights: Path | None = None
    """file with torch-fidelity's Inception weights, where they cannot be downloaded, or with DINOv2's; or a folder with
    both, under their published names"""
    resume: bool = True
    """continue interrupted runs from their checkpoint"""
    track: Track = None
    """tensorboard or wandb: where to watch what is trained now, too"""
    recipe: Recipe = None
    """file with settings in TOML, by the names of the flags and tokenizer for RUN: such as config.toml in the folder of
    a prior, which repeats that; flags win over it"""

    def config(self, tokenizer: str, prior: str, seed: int) -> PriorConfig:
        """The PriorConfig of one run."""
        shared = {field.name: getattr(self, field.name) for field in fields(PriorConfig)}
        return PriorConfig(**{**shared, "tokenizer": tokenizer, "prior": prior, "seed": seed})

    def pixels(self) -> Pixels | None:
        """What the word pixels means, if it is there. Raises UserError on what is said of them where it is not."""
        given = {name: value for name in ("data", "image_size") if (value := getattr(self, name)) is not None}
        if PIXELS in self.tokenizer:
            return Pixels(**given)
        for name, value in given.items():
            fix = f"leave it out, or put the word {PIXELS} in the place of RUN"
            raise UserError(f"{name} is {value}, and a tokenizer has images of its own; {fix}")
        return None


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns the exit code: 0, 1 when a run diverged, 2 for what the user can fix, 130 stopped."""
    return command(work, arguments)


def work(arguments: list[str]) -> int:
    """Parses the command line, runs every prior, prints the table, and returns the exit code."""
    group.alone("bench.prior")
    stored = PriorArguments(**from_file(PriorArguments, arguments))
    manual = Manual(SECTIONS, ESSENTIAL, TAIL)
    options = command_line(PriorArguments, arguments, "python -m bench.prior", __doc__, stored, manual)
    if not options.tokenizer:
        raise UserError(f"name the run of a tokenizer, or pixels: {known_tokenizers(options.results)}")
    pixels = options.pixels()
    tokenizers = [pixels if name == PIXELS else find_tokenizer(name, options.results) for name in options.tokenizer]
    trials = []
    for over, prior, seed in itertools.product(tokenizers, options.prior, options.seeds):
        config = options.config(over.name if over is pixels else over.folder.name, prior, seed)
        store = Store(options.results if over is pixels else over.folder.parent.parent)
        config.check()  # all of them, before any is trained
        work = partial(run_prior, config, over, store, options.fid_weights, options.resume, options.track)
        trials.append(Trial(f"{prior} {seed}", store.run(config), work))
    finished, diverged = run_each(trials)
    if finished:
        reports = "python -m bench.report" if pixels else "the report of the tokenizer, python -m bench.report RUN"
        put(result_table(finished), runnable(f"their metrics.json, or {reports}"))
        bound = f" Masked was drawn in {options.passes} passes. {BOUND}" * ("masked" in options.prior)
        line = protocol_line(finished[0]) + bound + f" {BITS}" * (pixels is not None)
        stdout.print(escape(line), soft_wrap=True)
        codes = [of_its_codes(one) for one in tokenizers if one is not pixels]
        for line in filter(None, [*map(not_done, finished), *codes]):
            stdout.print(f"[yellow]not done:[/] {escape(line)}", soft_wrap=True)
        shown = finished[-1].folder
        again = ["--config", str(shown / "config.toml"), "--results", str(shown.parent.parent)]
        stdout.print(escape(f"Pictures: {shown}/samples.png, neighbours.png"), soft_wrap=True)
        if (shown / "config.toml").is_file():  # older runs have none
            stdout.print(escape(runnable(f"Repeat: python -m bench.prior {shlex.join(again)}")), soft_wrap=True)
    return 1 if diverged else 0


def not_done(run: Run) -> str:
    """What says that a prior has learned less than how often each code is used, in a line; empty where nothing does."""
    config, metrics = run.config(), run.metrics()
    rates = metrics["coded_bits_per_token"], metrics["coded_bits_per_token_independent"]
    if rates[0] <= rates[1]:
        return ""
    told = f"worse than independent codes ({rates[0]:.2f} bits per token against {rates[1]:.2f})"
    return f"{config['prior']} {config['seed']}: {told}: train longer"


def of_its_codes(tokenizer: Run) -> str:
    """The same of a tokenizer that is worse than k-means, whose codes are little to generate from."""
    reasons = undecided(tokenizer.metrics(), [])
    return f"the tokenizer {tokenizer.folder.name} is {reasons[0]}: train that for longer first" if reasons else ""


def result_table(runs: list[Run]) -> Table:
    """One row per prior, and the floors and ceilings under them; the best over one tokenizer's codes is bold."""
    groups = []
    for tokenizer, own in itertools.groupby(runs, lambda run: run.config()["tokenizer"]):
        rows = [(f"{run.config()['prior']} {run.config()['seed']}", run.metrics()) for run in own]
        rows = [(label, metrics["params_prior"], metrics) for label, metrics in rows]
        bounds = (("real codes", "_real"), ("shuffled codes", "_shuffled"))
        references = [(label, 0, with_suffix(rows[-1][2], suffix)) for label, suffix in bounds]
        groups.append(Group(rows, references, title=tokenizer))
    if len(groups) == 1:
        groups = [groups[0]._replace(title="")]
    return score_table("prior, seed", COLUMNS, groups)


def protocol_line(run: Run) -> str:
    """How the table's numbers were measured, in a few sentences."""
    protocol, metrics = run.protocol(), run.metrics()
    how = "conditional, " * bool(run.config().get("conditional")) + f"temperature {protocol['temperature']:g}"
    how += f", top {protocol['top_k']}" if protocol["top_k"] else ""
    how += f", guidance {protocol['guidance']:g}" if protocol.get("guidance", 1) != 1 else ""
    side = protocol["image_size"]
    return (
        f"Protocol {protocol['version']}: {protocol['split']}; bits on the codes of all {protocol['count']} "
        f"{HELD_OUT[protocol['scored_on']]} images, where independent codes take "
        f"{metrics['coded_bits_per_token_independent']:.2f} per token; "
        f"{protocol['samples']} samples ({how}) against those images at {side}×{side}: Fréchet and kernel distance, "
        f"precision and recall on {protocol['extractor_vgg16']}; copies are samples nearer to a training image, at "
        "32×32 or less, than 95 % of reconstructed held-out images are (0.05 is innocent; median PSNR "
        f"{metrics['nearest_train_psnr']:.1f} dB, of those {metrics['nearest_val_psnr']:.1f}); sampling step by step "
        f"is {metrics['sampling_speedup']:.1f} times as fast as whole passes. Real codes are those of the training "
        "set, shuffled ones the same in random order within each grid."
    )


if __name__ == "__main__":
    sys.exit(main())
