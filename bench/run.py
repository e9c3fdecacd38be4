"""Train and score tokenizers, and compare them in one table.

    python -m bench.run --backbone convnext
    python -m bench.run --backbone cnn convnext vit mamba --seeds 0 1
    python -m bench.run --backbone cnn --data folder:DIR --grid-size 16 --steps 2000
    python -m bench.run --list
    python -m bench.run --backbone cnn vit --profile

Every setting below is a column of the results. A run that the store already holds is shown, not repeated; one that was
interrupted goes on where it stopped.
"""

import ast
import itertools
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import tyro
from rich import box
from rich.markup import escape
from rich.table import Table

from backbones import ABOUT, BACKBONES
from backbones.plugins import version_of
from bench.core import group
from bench.core.cli import Trial, command, run_each
from bench.core.errors import UserError
from bench.core.progress import runnable, say, stdout
from bench.core.recipe import FLAG
from bench.core.runs import Run
from bench.core.store import Store
from bench.instruments import choose
from bench.quantizers import QUANTIZERS
from bench.tokenizers.arguments import LOOKS, Arguments, parse, without
from bench.tokenizers.config import Config
from bench.tokenizers.costs import shape_costs
from bench.tokenizers.curves import undecided
from bench.tokenizers.presets import PRESETS

QUANTIZER = f"{', '.join(QUANTIZERS)}; several are run in turn and compared, none and kl as references without codes"
UNASKED = "(default: cheap, for runs that are trained now)"


@dataclass(frozen=True)
class RunArguments(Arguments):
    """What the command line takes."""

    quantizer: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME [NAME ...]", help=QUANTIZER)] = (
        Config.quantizer,
    )
    resume: bool = True
    """continue interrupted runs from their checkpoint"""
    instruments: Annotated[
        tuple[str, ...], tyro.conf.arg(metavar="NAME [NAME ...]", help=LOOKS, help_behavior_hint=UNASKED)
    ] = ()
    list: bool = False
    """show all that can be chosen by name, and width, depth, steps, parameters, FLOPs and tokens of the given backbones
    (of all, unless given) at these settings, and stop"""
    accumulate: Annotated[int, tyro.conf.arg(metavar="PARTS")] = 1
    """parts of a batch that each network sees in turn, for less memory: the same numbers up to rounding, one more pass
    forward"""
    profile: bool = False
    """show where the time of a training step goes, write traces below --results, and stop"""

    def __post_init__(self) -> None:
        if isinstance(self.quantizer, str):  # a preset has one
            object.__setattr__(self, "quantizer", (self.quantizer,))

    def configs(self) -> Sequence[Config]:
        """One Config per backbone, quantizer and seed. Raises UserError where one of these is empty."""
        for flag, values in (("--backbone", self.backbone), ("--quantizer", self.quantizer), ("--seeds", self.seeds)):
            if not values:
                raise UserError(f"{flag} needs at least one value")
        each = itertools.product(*map(dict.fromkeys, (self.backbone, self.quantizer, self.seeds)))
        return [self.config(backbone, seed, quantizer=quantizer) for backbone, quantizer, seed in each]


REPORTS = "the runs' metrics.json and instruments.json, or python -m bench.report RUN RUN"  # which have all


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns the exit code: 0, 1 when a run diverged, 2 for what the user can fix, 130 stopped."""
    group.hush()
    return command(work, arguments)


def work(arguments: list[str]) -> int:
    """Parses the command line and does what it says. Returns the exit code."""
    options = parse(RunArguments, arguments, "python -m bench.run", __doc__)
    from bench.analysis.tables import put  # and pandas: not for --help

    if options.list or options.profile:
        group.alone("--list" if options.list else "--profile")
    if options.list:
        backbones = options.backbone if "backbone" in options.given else tuple(BACKBONES)
        sizes = size_table(replace(options, backbone=backbones).configs())  # what cannot work is told first
        stdout.print(overview())
        put(sizes, "a wider terminal")
        return 0
    if options.profile:
        put(profile_table(options), "a wider terminal")
        return 0
    return compare(options, arguments)


def compare(options: RunArguments, given: Sequence[str]) -> int:
    """Runs every config of ``options``, which the words ``given`` mean, prints the table, and returns the exit code."""
    from bench.analysis.finished import alike, apart, protocol_line
    from bench.analysis.tables import put
    from bench.tokenizers.trial import run_trial  # and seaborn: not before the command line is known to be right

    store = Store(options.results)
    choose(options.instruments)  # raises UserError on an unknown one

    def trial(config: Config) -> Trial:
        run = store.run(config)
        instruments = options.instruments or (() if run.finished else ("cheap",))
        how = options.fid_weights, options.resume, instruments, options.accumulate, options.track
        work = partial(run_trial, config, store, *how)
        return Trial(f"{config.backbone} {config.quantizer} {config.seed}", run, work)

    if options.timed:
        group.alone("--match time, which measures steps,")
    configs = options.configs()
    with group.joined(configs[0].resolved().device):
        finished, diverged = run_each([trial(config) for config in configs])
        tells = group.first()
    if finished and tells:
        parts = alike(finished)
        for part in parts:
            put(result_table(part, diverged if part is parts[-1] else ()), runnable(REPORTS))
            stdout.print(escape(protocol_line(part[0]) + apart(part[0], parts[0][0])), soft_wrap=True)
        for table in instrument_tables(finished):
            put(table, runnable(REPORTS))
        for line in map(not_done, finished):
            if line:
                stdout.print(f"[yellow]not done:[/] {escape(line)}", soft_wrap=True)
        stdout.print(escape(next_command(options, finished, given)), soft_wrap=True)
    return 1 if diverged else 0


def not_done(run: Run) -> str:
    """What says that ``run`` should have been trained for longer, in a line; empty where nothing does."""
    from bench.analysis.finished import label_of

    reasons = undecided(run.metrics(), run.history())
    return f"{label_of(run)}: train longer: {'; '.join(reasons)}" if reasons else ""


def result_table(runs: list[Run], diverged: Sequence[str] = ()) -> Table:
    """One row per run and per run that diverged, the best of a column bold; in grey what k-means and image formats make
    of the same bits, and runs whose latents are no codes."""
    from bench.analysis.finished import COLUMNS, label_of, references
    from bench.analysis.frames import UNMATCHED, coded, continuous, frame, unmatched
    from bench.analysis.references import notes
    from bench.analysis.tables import Group, score_table

    known = frame(runs)
    off = unmatched(known)
    rows = []
    for run, marked in zip(runs, off, strict=True):
        label, metrics = label_of(run), run.metrics()
        rows.append((f"{label} {UNMATCHED}" if marked else label, metrics["params"], metrics))
    ranked = [rows[place] for place in coded(known).index]
    latents = [rows[place] for place in continuous(known).index]
    rows = Group(ranked, [*references(ranked[-1][2] if ranked else {}), *latents], list(diverged))
    table = score_table("tokenizer, seed", COLUMNS, [rows], "no codes")
    caption = [f"{UNMATCHED} parameters, FLOPs and time all differ from the others'; --match gives equal ones"]
    caption = caption if off.any() else []
    if ranked:
        metrics, codes = ranked[-1][2], known.codebook_size[coded(known).index[0]]
        table.title = f"{metrics['bits_per_image']:.0f} bits per image: {metrics['tokens']} codes of K = {codes}"
        caption += notes(coded(known), continuous(known))
    table.caption = "\n".join(caption) or None
    return table


def instrument_tables(runs: list[Run]) -> list[Table]:
    """What instruments found, means over seeds, in a table per block of ``runs``; none where none looked."""
    from bench.analysis.frames import blocks, continuous, read
    from bench.analysis.rankings import instruments
    from bench.analysis.tables import upright

    table, damaged = read(runs)
    for sentence in damaged:
        say(f"[yellow]left out:[/] {escape(sentence)}")
    sheets = [instruments(block, continuous(table)) for block in blocks(table)]
    return [upright(sheet, "What instruments found") for sheet in sheets if sheet.rows or sheet.references]


def next_command(options: RunArguments, runs: list[Run], given: Sequence[str]) -> str:
    """Where the picture is, and the commands that are most useful after this one, whose words were ``given``: the same
    for twice as long where a run asks for that, else with all backbones or with more seeds; images from the last run
    that has codes, and that run from its file."""
    longer = options.longer(runs)
    if longer:
        others = longer
    elif len(options.backbone) == 1 and not options.init_from:
        others = ["--backbone", *BACKBONES]
    else:
        others = ["--backbone", *options.backbone, "--seeds", *map(str, range(max(options.seeds) + 2))]
    if options.recipe and options.match is None and not longer:  # whose width is that of its own backbone
        others += ["--match", f"params:{runs[-1].metrics()['params']:.0f}"]
    words = without(given, {word for word in others if word.startswith("--")})
    with_codes = [run for run in runs if QUANTIZERS[run.config()["quantizer"]].discrete]
    shown = (with_codes or runs)[-1].folder
    lines = [f"Picture: {shown / 'reconstructions.png'}", f"Next: python -m bench.run {shlex.join([*words, *others])}"]
    if with_codes:
        lines.append(f"Generate images: python -m bench.prior {shlex.quote(str(shown))}")
    if (recipe := shown / "config.toml").is_file():  # older runs have none
        place = ["--results", str(options.results)] * (options.results != RunArguments.results)
        lines.append(f"Repeat: python -m bench.run {shlex.join([FLAG, str(recipe), *place])}")
    return runnable("\n".join(lines))


def overview() -> Table:
    """All that can be chosen by name, with a line on each."""
    from bench.data import ABOUT as DATA
    from bench.data import DATASETS
    from bench.priors.models import ABOUT as ABOUT_PRIORS
    from bench.priors.models import PRIORS

    shelves: dict[str, Mapping[str, str]] = {
        "--backbone": {name: ABOUT.get(name, version_of("backbones", name)) for name in (*BACKBONES, "timm:MODEL")},
        "--quantizer": {name: first_sentence(kind.__doc__) for name, kind in QUANTIZERS.items()},
        "--data": {name: version_of("data", name) for name in DATASETS} | DATA,
        "--preset": {name: settings["about"] for name, settings in PRESETS.items()},
        "bench.prior --prior": {name: version_of("priors", name) for name in PRIORS} | ABOUT_PRIORS,
        "studies": studies(),
    }
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_header=False)
    for _ in ("name", "what it is"):
        table.add_column(overflow="fold")
    for shelf, names in shelves.items():
        table.add_row(f"[bold]{shelf}[/]")
        for name, about in names.items():
            table.add_row(escape(f"  {name}"), escape(about))
    return table


def studies() -> dict[str, str]:
    """The studies that are installed, and what each asks."""
    package = find_spec("studies")
    folders = map(Path, package.submodule_search_locations or ()) if package else ()
    paths = [path for folder in folders for path in sorted(folder.glob("[!_]*.py"))]
    return {path.stem: first_sentence(ast.get_docstring(ast.parse(path.read_text("utf-8")))) for path in paths}


def first_sentence(text: str | None) -> str:
    """That of a docstring, without its full stop."""
    first = " ".join((text or "").split("\n\n")[0].split())
    return re.split(r"\.\s+(?=[A-Z])", first)[0].rstrip(".")


def size_table(configs: Sequence[Config]) -> Table:
    """Width, depth and steps of each config, as the preset or the budget to match has them, and the parameters, FLOPs
    and tokens that follow; nothing is trained, and nothing built whose size is known."""
    first = configs[0]
    table = Table(
        title=f"{first.image_size}×{first.image_size} images",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    headings = ("backbone", "width", "depth", "steps", "encoder\nM", "decoder\nM", "encode\nMFLOP", "decode\nMFLOP")
    for heading in (*headings, "tokens"):
        table.add_column(heading, justify="left" if heading == "backbone" else "right", no_wrap=True)
    for config in configs:
        config.check()
        costs = shape_costs(config)
        millions = [f"{costs[name] / 1e6:.2f}" for name in ("params_encoder", "params_decoder")]
        flops = [f"{costs[name] / 1e6:.0f}" for name in ("flops_encode", "flops_decode")]
        sizes = map(str, (config.width, config.depth, config.steps))
        table.add_row(config.backbone, *sizes, *millions, *flops, f"{config.grid_size}×{config.grid_size}")
    return table


def profile_table(options: RunArguments) -> Table:
    """Milliseconds of a training step of each config by part, and their share of it; traces are in ``profiles``."""
    from bench.tokenizers.profile import PARTS, profile
    from bench.tokenizers.trial import prepare

    store, found = Store(options.results), {}
    for config in (one.resolved() for one in options.configs()):
        data, place = prepare(config, store, options.fid_weights), store.root / "profiles"
        label = f"{config.backbone} {config.quantizer}" + f" {config.seed}" * (len(set(options.seeds)) > 1)
        found[label] = profile(config, data.train, place / f"{config.run_id()}.json")
    table = Table(title="a training step, ms", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("part")
    for label in found:
        table.add_column(label, justify="right")
    for part in PARTS:
        if any(part in spent for spent in found.values()):
            cells = (f"{s[part]:.1f} ({s[part] / s['step']:3.0%})" if part in s else "–" for s in found.values())
            table.add_row(part, *cells)
    table.add_section()
    table.add_row("step", *(f"{spent['step']:.1f}      " for spent in found.values()))
    table.caption = f"forward and backward passes together; traces for Perfetto or Chrome: {store.root / 'profiles'}"
    return table


if __name__ == "__main__":
    sys.exit(main())
