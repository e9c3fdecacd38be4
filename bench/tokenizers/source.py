"""What a run may start from: the weights of a finished one; and which of their parts may then stay as they are."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from backbones import OPTIONS
from bench.core.errors import UserError
from bench.core.files import DIGEST, named_by_content, reason
from bench.core.runs import Run, check_finished
from bench.quantizers import ENTROPY_WEIGHT

if TYPE_CHECKING:
    from .config import Config

WEIGHTS = "tokenizer.safetensors"  # of a run's folder
# Parts that stay as they are. Without encoder and decoder a codebook would be left alone, which may have no gradient.
FROZEN: dict[str, tuple[str, ...]] = {
    "none": (),
    "encoder": ("encoder",),
    "quantizer": ("quantizer",),
    "decoder": ("decoder",),
    "encoder,quantizer": ("encoder", "quantizer"),
    "quantizer,decoder": ("quantizer", "decoder"),
}
# What weights are of: settings that a run has in common with the one that it starts from, but for an image size that
# goes with as large a patch per code.
BUILT = ("backbone", "width", "depth", *(name for name in OPTIONS if name != "pretrained"))
BUILT += ("quantizer", "codebook_size", "code_dim", "codebooks")
SIZES = ("image_size", "grid_size")
STARTS = ("pretrained", "kmeans_init")  # settings of how weights or codes begin
LEARNS = ("ema_decay", "revive_after", "entropy_weight", "temperature", "temperature_end", "uniform_weight")


def weights_in(folder: str) -> str:
    """What stands for the weights in ``folder`` wherever that lies; of such a word itself. Raises UserError where there
    are none."""
    if folder.startswith(DIGEST):
        return folder
    path, why = Path(folder) / WEIGHTS, "it is not a file"
    try:
        if path.is_file() or not path.exists():  # nobody waits for a pipe
            return named_by_content(path)
    except OSError as error:
        why = reason(error, path)
    raise UserError(f"init_from is {folder}, and {WEIGHTS} cannot be read there ({why}); name a finished run's folder")


def built(folder: str, kind: type["Config"]) -> dict[str, Any]:
    """The settings that weights in ``folder``, the run of a ``kind``, are of. Raises UserError where none is there, and
    gives none where ``folder`` is a word for their content."""
    if folder.startswith(DIGEST):
        return {}
    run = Run(Path(folder))
    check_finished(run)
    theirs = run.settings(kind)
    return {name: getattr(theirs, name) for name in (*BUILT, *SIZES)}


def check_source(config: "Config") -> None:
    """Raises UserError where ``config`` cannot start from the run that it names, or has a setting that is of no use
    where weights are given, or kept as they are."""
    frozen = FROZEN[config.freeze]
    if not config.init_from:
        if frozen:
            told = f"freeze is {config.freeze}, and weights that nothing has trained are not worth keeping"
            raise UserError(f"{told}; give --init-from RUN, too")
        return
    theirs = built(config.init_from, type(config))
    if not theirs:
        raise UserError(f"init_from is {config.init_from}, which does not say where these weights are; name a folder")
    for name in BUILT:
        if (own := getattr(config, name)) != theirs[name]:
            raise UserError(f"{name} is {own}, and that of {config.init_from} is {theirs[name]}; leave it out")
    own, patch = config.image_size // config.grid_size, theirs["image_size"] // theirs["grid_size"]
    if own != patch:
        told = f"a code stands for {own}×{own} pixels, and for {patch}×{patch} in {config.init_from}"
        fix = f"take grid_size {config.image_size // patch}" if config.image_size >= patch else "leave it out"
        raise UserError(f"grid_size is {config.grid_size} at image_size {config.image_size}: {told}; {fix}")
    _check_use(config, STARTS, "a run from given weights")
    if "quantizer" in frozen:
        _check_use(config, LEARNS, "a frozen quantizer")
    if "encoder" in frozen and config.alignment_weight:
        told = f"alignment_weight is {config.alignment_weight:g}, and would train the encoder, which is frozen"
        raise UserError(f"{told}; leave out one of them")
    if "decoder" in frozen and config.gan_weight and config.gan_adaptive:
        told = "gan_adaptive goes by gradients of the decoder's last layer, which is frozen"
        raise UserError(f"{told}; give --no-gan-adaptive, too")


def _check_use(config: "Config", names: tuple[str, ...], whose: str) -> None:
    for name in names:
        value, usual = getattr(config, name), getattr(type(config), name)
        known = (usual, ENTROPY_WEIGHT.get(config.quantizer, 0.0)) if name == "entropy_weight" else (usual,)
        if value not in known:
            raise UserError(f"{name} is {value}, of which {whose} makes no use; leave it out")
