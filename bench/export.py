"""A trained tokenizer as a folder that works elsewhere: to load, to share, or as ONNX.

    python -m bench.export results/runs/RUN --to my-tokenizer
    python -m bench.export RUN --to my-tokenizer --onnx
    python -m bench.export RUN --to my-tokenizer --push USER/my-tokenizer

DIR then holds config.json, model.safetensors and README.md, a model card with the scores and how they were measured, as
the Hugging Face Hub lays models out. bench.Tokenizer.from_pretrained("DIR") loads it, with nothing installed but torch,
safetensors, NumPy and vqbench's own code, and gives the same codes and images to the last bit.
"""

import os
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from rich.markup import escape
from torch import Tensor

from bench.analysis.tables import NONE, heading, inline, text_of
from bench.core.cli import command, command_line
from bench.core.errors import Damaged, UserError
from bench.core.files import atomic_folder, atomic_path
from bench.core.progress import say, stdout
from bench.core.runs import HELD_OUT, Run
from bench.core.store import find_tokenizer
from bench.data import from_uint8
from bench.metrics import EVALUATORS
from bench.tokenizers import onnx, pretrained
from bench.tokenizers.config import Config
from bench.tokenizers.tokenizer import FILE, Tokenizer

CARD, PICTURE = "README.md", "reconstructions.png"
OURS = {pretrained.SETTINGS, pretrained.WEIGHTS, CARD, PICTURE, onnx.ENCODER, onnx.DECODER}  # files of an export
NOISE = 4  # images of it, on which ONNX is checked besides the run's samples
SCORES = {name: metric for evaluator in EVALUATORS for name, metric in evaluator.METRICS.items() if metric.better}


@dataclass(frozen=True)
class Options:
    """What the command line takes."""

    run: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="RUN")] = ()
    """folder or id of a finished tokenizer run"""
    to: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """the folder to write; an export that is there is replaced, anything else is left alone"""
    onnx: bool = False
    """write encoder.onnx (images to codes) and decoder.onnx (codes to images), too, for any number of images, and check
    them against PyTorch; takes the extra onnx"""
    push: Annotated[str | None, tyro.conf.arg(metavar="USER/NAME")] = None
    """upload DIR to the Hugging Face Hub under that name, with your own token (hf auth login, or HF_TOKEN); a new
    repository is private, and one that exists stays as visible as it is; takes the extra hub"""
    results: Path = Path("results")
    """where ids are looked up, in runs/"""


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns the exit code: 0, or 2 for what the user can fix."""
    return command(work, arguments)


def work(arguments: list[str]) -> int:
    """Parses the command line, exports, and says where to. Returns the exit code."""
    options = command_line(Options, arguments, "python -m bench.export", __doc__)
    if len(options.run) != 1 or options.to is None:
        raise UserError("name one run and a folder: python -m bench.export RUN --to DIR")
    check_place(options.to)
    upload = uploader(options.push) if options.push else None
    if options.onnx:
        onnx.check_packages()
    run = find_tokenizer(options.run[0], options.results)
    tokenizer = Tokenizer.from_run(run.folder)
    with atomic_folder(options.to) as folder:
        pretrained.write(run, run.folder / FILE, folder)
        notes = []
        if options.onnx:
            say("Writing ONNX, and comparing it with PyTorch: about a minute")
            notes = [agreed(onnx.export(tokenizer, examples(run, tokenizer.config.image_size), folder))]
        if (run.folder / PICTURE).is_file():
            with atomic_path(folder / PICTURE) as temporary:
                temporary.write_bytes((run.folder / PICTURE).read_bytes())
        with atomic_path(folder / CARD) as temporary:
            temporary.write_text(card(run, tokenizer.config, os.listdir(folder), notes), encoding="utf-8")
    for note in notes:
        stdout.print(note, soft_wrap=True)
    stdout.print(f"Exported: {escape(str(options.to))}", soft_wrap=True)
    if upload:
        stdout.print(f"Pushed: {escape(upload(options.to))}", soft_wrap=True)
    return 0


def check_place(folder: Path) -> None:
    """Raises UserError where ``folder`` is there and anything but an export, or nothing at all, is in it."""
    if not os.path.lexists(folder):
        return
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; name another one: --to DIR")
    names = set(os.listdir(folder))
    if others := sorted(names - OURS):
        raise UserError(f"{folder} holds {others[0]}, which is of no export; name a new folder: --to DIR")
    if names:
        try:
            pretrained.content(folder)
        except UserError as error:
            raise UserError(f"{folder} is no export that could be replaced; name a new folder: --to DIR") from error


def uploader(name: str) -> Callable[[Path], str]:
    """What uploads a folder to the Hub as ``name`` and gives its address. Raises UserError where that cannot be."""
    if not pretrained.ON_THE_HUB.fullmatch(name):
        raise UserError(f"--push {name!r} is no name on the Hub; give USER/NAME")
    hub = pretrained.the_hub("--push")
    if not hub.get_token():
        raise UserError("--push takes your own token of the Hub, and there is none; hf auth login, or set HF_TOKEN")

    def upload(folder: Path) -> str:
        try:
            address = hub.HfApi().create_repo(name, private=True, exist_ok=True)
            hub.HfApi().upload_folder(repo_id=name, folder_path=folder, delete_patterns=sorted(OURS))
        except Exception as error:  # its clients raise what they like
            told = f"{folder} is complete, and was not pushed to {name} ({pretrained.in_a_line(error)})"
            raise UserError(f"{told}; the same command tries again") from error
        return str(address)

    return upload


def examples(run: Run, side: int) -> Tensor:
    """Images of so many pixels a ``side`` to compare graphs on: noise, and the run's samples where it has any. In
    [-1, 1], (B, 3, side, side)."""
    noise = torch.rand(NOISE, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1
    try:
        samples = from_uint8(torch.from_numpy(run.arrays("samples.npz")["x"]).permute(0, 3, 1, 2))
    except (FileNotFoundError, Damaged):
        return noise
    return torch.cat([noise, samples]) if samples.shape[2:] == noise.shape[2:] else noise


def agreed(found: onnx.Agreement) -> str:
    """A sentence on how ONNX agrees with PyTorch."""
    codes = f"{found.codes - found.ties:,} of {found.codes:,} codes are the same"
    codes += f", and {found.ties} tie within rounding" if found.ties else ""
    images = f"images are within {found.error:.0e}"
    return f"ONNX and PyTorch on {found.images} images: {f'{codes}; {images}' if found.codes else images}"


def card(run: Run, config: Config, files: Collection[str], notes: Sequence[str]) -> str:
    """The model card of an export with those ``files``: Markdown behind a head of YAML. ``notes`` are what there is to
    say of ONNX."""
    metrics, protocol, side, grid = run.metrics(), run.protocol(), config.image_size, config.grid_size
    latents = f"{grid}×{grid} latents of {config.code_dim} numbers, which are no codes"
    codes = f"{grid}×{grid} codes of K = {config.codebook_size}"
    split, count, data = HELD_OUT[protocol["scored_on"]], protocol["count"], pretrained.unplaced(protocol["data"])
    told = {name: value for name, value in protocol.items() if value is not None} | {"data": data}
    return CARD_TEXT.format(
        run=run.folder.resolve().name,
        backbone=config.backbone,
        quantizer=config.quantizer,
        tags="\n".join(f"- {one}" for one in dict.fromkeys((config.backbone.partition(":")[0], config.quantizer))),
        what=f"{side}×{side} images in {codes if config.discrete else latents}",
        parameters=f"{metrics['params'] / 1e6:.2f} M",
        side=side,
        codes=f"(1, {grid}, {grid}) int64" if config.discrete else f"(1, {config.code_dim}, {grid}, {grid})",
        picture=f"![Originals, and what the tokenizer makes of them]({PICTURE})\n\n" * (PICTURE in files),
        onnx="".join(f"{line}\n\n" for line in (ONNX_TEXT, *notes) if notes),
        scored=f"Of all {count} {split} images of {inline(data)}",
        scores="\n".join(scores(metrics)),
        protocol="\n".join(f"- {name.replace('_', ' ')}: {inline(str(value))}" for name, value in told.items()),
        data=inline(data),
    )


def scores(metrics: Mapping[str, float]) -> Iterator[str]:
    """The lines of a table of Markdown: what the tokenizer was scored with and, where it is known, k-means."""
    shown = [name for name in SCORES if name in metrics]
    columns = {"this tokenizer": "", "k-means on patches, as many bits": "_kmeans"}
    columns = {label: suffix for label, suffix in columns.items() if any(name + suffix in metrics for name in shown)}
    yield f"| | {' | '.join(columns)} |"
    yield f"| --- |{' ---: |' * len(columns)}"
    for name in shown:
        values = (metrics.get(name + suffix) for suffix in columns.values())
        yield f"| {inline(heading(name))} | {' | '.join(NONE if x is None else text_of(x, name) for x in values)} |"


CARD_TEXT = """---
library_name: vqbench
license: unknown
tags:
- image-tokenizer
- vector-quantization
{tags}
---

# {run}

An image tokenizer, {what}: backbone `{backbone}`, quantizer `{quantizer}`, {parameters} parameters.
Trained and scored with vqbench.

{picture}## Use

```python
import torch
from bench import Tokenizer

tokenizer = Tokenizer.from_pretrained(".")  # this folder, or USER/NAME on the Hub
x = torch.zeros(1, 3, {side}, {side})  # in [-1, 1]: uint8 images / 127.5 - 1
codes = tokenizer.encode(x)  # {codes}
x_hat = tokenizer.decode(codes)  # (1, 3, {side}, {side}) in [-1, 1]
```

This takes vqbench's code, torch, safetensors and NumPy. `tokenizer.config` has all settings.

{onnx}## Scores

{scored}. Arrows point where a score gets better.

{scores}

How they were measured; numbers that were measured otherwise do not compare:

{protocol}

## Licence

vqbench's code is under the MIT licence. That says nothing of these weights: they were trained on {data}, and
the licence of those images may reach them. Whoever publishes the weights chooses a licence that is allowed, and writes
it into the head of this card in place of `unknown`.
"""

ONNX_TEXT = f"`{onnx.ENCODER}` and `{onnx.DECODER}` are the same as graphs, for any number of images."


if __name__ == "__main__":
    sys.exit(main())
