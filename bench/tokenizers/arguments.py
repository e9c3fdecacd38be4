"""What the command lines share: a Config of several backbones and seeds, one sentence for mistakes, exit codes."""

import itertools
import shlex
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

from backbones import BACKBONES, OPTIONS, backbone
from bench.core.cli import command_line
from bench.core.errors import Damaged, UserError
from bench.core.files import DIGEST
from bench.core.manual import Manual
from bench.core.recipe import Recipe, from_file
from bench.core.runs import Run
from bench.core.store import find_tokenizer
from bench.instruments import GROUPS, INSTRUMENTS
from bench.quantizers import QUANTIZERS
from bench.training.track import Track

from .budgets import COSTS, match
from .config import SETTINGS, Config, make_config, preset_settings
from .curves import undecided

BACKBONE = f"{', '.join(BACKBONES)} or timm:MODEL; several are run in turn and compared"
LOOKS = (
    f"what looks at each run, finished ones too: {', '.join(INSTRUMENTS)}; or all, "
    f"cheap ({', '.join(GROUPS['cheap'])}), none"
)
OPEN = tyro.conf.arg(metavar="INT", help_behavior_hint="(default: the preset's)")


@dataclass(frozen=True)
class Arguments(Config):
    """A Config whose backbone and seed may be several, and whose size defaults to the preset's."""

    backbone: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME [NAME ...]", help=BACKBONE)] = ("convnext",)
    width: Annotated[int | None, OPEN] = None
    """channels at the token grid; the preset's own matches parameters across backbones"""
    depth: Annotated[int | None, OPEN] = None
    """blocks per level (cnn, convnext) or per side (vit, mamba, bimamba, hybrid)"""
    init_from: Annotated[str, tyro.conf.arg(metavar="RUN")] = ""
    """a finished run, by folder or id, whose weights to start from, and whose architecture unless that is given. A run
    is known by these weights, not by where they lie"""
    seed: tyro.conf.Suppress[int] = 0
    seeds: Annotated[tuple[int, ...], tyro.conf.arg(metavar="INT [INT ...]")] = (0,)
    """each is one run per backbone; weights, batches and augmentation follow from it"""
    preset: str = "cpu"
    """smoke (half a minute, proves that all works), cpu (minutes, a real comparison), blog64 and blog64-fair, or for
    GPUs vqgan64, vqvae32, celeba64, vitvqgan-s, blog256 and blog256-fair; other settings override it"""
    results: Path = Path("results")
    """runs are stored below it, in runs/"""
    match: str | None = None
    """one budget for every backbone: params:4M or flops:2G sets widths, time:60s sets steps, params:4M,time:60s both"""
    fid_weights: Path | None = None
    """file with torch-fidelity's Inception weights, where they cannot be downloaded, or with DINOv2's; or a folder with
    both, under their published names"""
    track: Track = None
    """tensorboard or wandb: where to watch what is trained now, too"""
    recipe: Recipe = None
    """file with settings in TOML, by the names of the flags: such as RUN/config.toml, which repeats that run; flags win
    over it"""
    given: tyro.conf.Suppress[frozenset[str]] = frozenset()

    def settings(self) -> dict[str, Any]:
        """The Config fields that were given, which win over the preset whatever their value, and that all runs share.
        ``given`` names them; the other fields hold the preset's values for --help alone."""
        return {name: getattr(self, name) for name in _FIELDS if name in self.given - {"backbone", "seed"}}

    @property
    def timed(self) -> bool:
        """Whether the budget to match has a time, which sets the steps."""
        return "time:" in (self.match or "")

    @property
    def sized(self) -> bool:
        """Whether the budget to match has parameters or FLOPs, which set width and depth."""
        return any(f"{kind}:" in (self.match or "") for kind in COSTS)

    def longer(self, runs: Iterable[Run]) -> list[str]:
        """The flag for twice as many steps, where one of ``runs`` that is finished says that it should be trained for
        longer; nothing where none does, and where a time sets the steps."""
        return ["--steps", str(2 * self.steps)] if not self.timed and any(map(_short, runs)) else []

    def config(self, backbone: str, seed: int, **settings: Any) -> Config:
        """Config of one run, at the budget to match if there is one; ``settings`` override those of all runs. Raises
        UserError on a budget for what was given."""
        settings = {**self.settings(), **settings}
        config = make_config(backbone, self.preset, **settings, seed=seed)
        if self.match is None:
            return config
        for name in ("steps",) * self.timed + ("width", "depth") * self.sized:
            if settings.get(name) is not None:
                raise UserError(f"{name} is {settings[name]}, and --match {self.match} sets it; leave out one of them")
        config.check()  # before a model of it is built
        return match(config, self.match)


def _short(run: Run) -> bool:
    """Whether a tokenizer is finished and says that it should be trained for longer."""
    try:
        return bool(undecided(run.metrics(), run.history()))
    except (OSError, Damaged):
        return False


_FIELDS = tuple(field.name for field in fields(Config))
_DEFAULTS = {field.name: field.default for field in fields(Config)}
Parsed = TypeVar("Parsed", bound=Arguments)

# The groups of --help, by the field that each begins with; and what it shows of Config, the rest being for --help-all.
SECTIONS = {"backbone": "model", "quantizer": "quantizer", "data": "data", "codebook_size": "quantizer"}
SECTIONS |= {"reconstruction": "loss", "gan_weight": "adversary", "steps": "budget", "lr": "optimiser"}
SECTIONS |= {"augment": "data", "precision": "run", "preset": "budget", "results": "run", "match": "budget"}
SECTIONS |= {"fid_weights": "run", "metric": "study"}
ESSENTIAL = ("backbone", "quantizer", "data", "preset", "steps", "image_size", "grid_size", "codebook_size", "seeds")
ESSENTIAL += ("results",)
COMMON = ("width", "depth", "code_dim", "beta", "train_images", "split", "lpips_weight", "gan_weight", "batch_size")
COMMON += ("lr", "init_from", "freeze", "device")


def parse(
    kind: type[Parsed],
    arguments: list[str],
    prog: str,
    description: str,
    swept: Collection[str] = (),
    some: Collection[str] = (),
    **defaults: Any,
) -> Parsed:
    """Command line → ``kind``; the preset is looked up first, so that --help shows its values as the defaults.
    ``defaults`` replace those of ``kind`` and of the preset, and count as given. --help shows those that are ``swept``
    first; ``some`` are those that not all of several backbones have to know. Exits with code 2 on an unknown flag, as
    tyro does; raises UserError on an unknown preset."""
    checks = {"backbone": backbone, "preset": preset_settings}
    recipe = _of_other_size(from_file(kind, arguments, checks), arguments)
    defaults |= recipe
    names = [after for before, after in itertools.pairwise(arguments) if before == "--preset"]
    names += [word.partition("=")[2] for word in arguments if word.startswith("--preset=")]
    preset = names[-1] if names else defaults.get("preset", "cpu")
    flags = {word.partition("=")[0][2:].replace("-", "_") for word in arguments if word.startswith("--")}
    given = frozenset(name for name in _FIELDS if {name, f"no_{name}"} & flags or name in defaults)
    default = kind(**{**preset_settings(preset), **defaults, "preset": preset, "given": given})
    essential = tuple(dict.fromkeys((*swept, *ESSENTIAL)))
    tail = {*_FIELDS} - {*essential, *COMMON}
    options = command_line(kind, arguments, prog, description, default, Manual(SECTIONS, essential, tail))
    options = _as_its_source(options, {*flags, *recipe, *swept})
    _check_lists(options, arguments, prog, some)
    return options


def _as_its_source(options: Parsed, chosen: Collection[str]) -> Parsed:
    """``options`` with the folder of the run that --init-from means, and with its backbone and quantizer unless these
    are among what was ``chosen``. Raises UserError where there is no such run."""
    if not options.init_from or options.init_from.startswith(DIGEST):
        return options
    run = find_tokenizer(options.init_from, options.results)
    own = run.settings(Config)
    lists = [name for name in ("backbone", "quantizer") if isinstance(getattr(options, name), tuple)]
    changes = {name: (getattr(own, name),) for name in lists if name not in chosen}
    return replace(options, **changes, init_from=str(run.folder), given=options.given | {"backbone"})


def _of_other_size(recipe: dict[str, Any], words: Sequence[str]) -> dict[str, Any]:
    """What a file of settings has, without the width and depth of its backbone where --match is to find those of
    others. Raises UserError where --backbone names others and nothing says how large they are to be."""
    flags = {word.partition("=")[0] for word in words if word.startswith("--")}
    split = [part for word in words for part in (word.split("=", 1) if word.startswith("--backbone=") else [word])]
    after = split[split.index("--backbone") + 1 :] if "--backbone" in split else ()
    named = {*itertools.takewhile(lambda word: not word.startswith("-"), after)}
    sized = {"width", "depth"} & recipe.keys()
    if not sized or not named - {*recipe.get("backbone", named)}:
        return recipe
    if "--match" in flags or {"--width", "--depth"} <= flags:
        return {name: value for name, value in recipe.items() if name not in sized}
    own = ", ".join(recipe["backbone"])
    raise UserError(f"the file has width and depth of {own} alone; add --match params:1M or another budget for others")


def _check_lists(options: Arguments, words: Sequence[str], prog: str, some: Collection[str]) -> None:
    """Raises UserError, with two commands in place of that one, where some of several backbones or quantizers make no
    use of an option that was given and is not among ``some``."""
    known = {"backbone": (OPTIONS, lambda name: backbone(name).options)}
    known["quantizer"] = SETTINGS, lambda name: QUANTIZERS[name].settings
    for field, (names, options_of) in known.items():
        chosen = getattr(options, field)
        for name in sorted({*names} - {*some}) if isinstance(chosen, tuple) else ():
            with suppress(ValueError, KeyError):  # one that is unknown, which is told elsewhere
                users = [one for one in chosen if name in options_of(one)]
                if name in options.given and getattr(options, name) != _DEFAULTS[name] and 0 < len(users) < len(chosen):
                    others = [one for one in chosen if one not in users]
                    _split(field, f"--{name.replace('_', '-')}", users, others, words, prog)


def _split(field: str, flag: str, users: list[str], others: list[str], words: Sequence[str], prog: str) -> None:
    names = {flag, flag.replace("-", "_").replace("__", "--")}
    works = f"{flag} works with {', '.join(users)} and not with {', '.join(others)}"
    if not names & {word.partition("=")[0] for word in words}:  # a study sweeps it
        raise UserError(f"{works}; leave out {', '.join(others)}")
    rest = without(words, {f"--{field}"})
    with_it = shlex.join([*rest, f"--{field}", *users])
    less = shlex.join([*without(rest, names), f"--{field}", *others])
    raise UserError(f"{works}; run {prog} {with_it}, then {prog} {less}, and python -m bench.report compares them")


def without(words: Sequence[str], flags: Collection[str]) -> list[str]:
    """``words`` of a command line but for ``flags`` and what follows each up to the next one."""
    kept, dropping = [], False
    for word in words:
        if word.startswith("--"):
            dropping = word.partition("=")[0] in flags
        if not dropping:
            kept.append(word)
    return kept
