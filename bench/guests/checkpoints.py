"""Tokenizers in the layouts of diffusers and transformers: a folder, or an id on the Hub, with config.json and
safetensors.

Nothing is built before the settings were seen to be plausible, and nothing is loaded before the file was seen to have
just the tensors that the settings ask for: what these libraries would leave at random numbers is refused here.
"""

import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from backbones.torchvision_repair import repair
from bench.core.errors import UserError
from bench.core.files import read_json, sha256_file, sha256_json

from .guest import Guest, Sides

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".msgpack")
MOST = 2**20  # of any number among the settings: a codebook, channels
LONGEST = 64  # list among the settings: levels


class Checkpoint(nn.Module):
    """A published tokenizer as ``Codec``: ``encoder``, (B, 3, H, W) → (B, d, h, w), ``nearest``, that → codes
    (B, h, w), ``lookup``, the reverse, and ``decoder``, (B, d, h, w) → images. Without ``nearest`` its latents are
    what the encoder gives."""

    def __init__(self, encoder: nn.Module, decoder: nn.Module, nearest: Any = None, lookup: Any = None):
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.nearest, self.lookup = nearest or _same, lookup or _same

    def encode(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] → codes (B, h, w) int64, or latents."""
        return self.nearest(self.encoder(x))

    def decode(self, codes: Tensor) -> Tensor:
        """What ``encode`` gives → (B, 3, H, W) in [-1, 1]."""
        return self.decoder(self.lookup(codes)).clamp(-1, 1)


def _same(z: Tensor) -> Tensor:
    return z


class Passing(nn.Module):
    """``modules``, which it holds, passed as ``work`` says."""

    def __init__(self, work: Callable[[Tensor], Tensor], *modules: nn.Module):
        super().__init__()
        self.held, self.work = nn.ModuleList(modules), work

    def forward(self, x: Tensor) -> Tensor:
        return self.work(x)


def _vectors(embedding: nn.Embedding) -> Callable[[Tensor], Tensor]:
    """Codes (B, h, w) → their vectors (B, d, h, w)."""
    return lambda codes: embedding(codes).permute(0, 3, 1, 2)


def _vq(model: Any) -> Checkpoint:
    """diffusers' VQModel, the VQGAN of latent diffusion. Its own decode would look codes up once more."""

    def nearest(z: Tensor) -> Tensor:
        return model.quantize(z)[2][2].view(len(z), *z.shape[2:])

    def decoded(z: Tensor) -> Tensor:
        return model.decoder(model.post_quant_conv(z), z if model.config.norm_type == "spatial" else None)

    encoder = nn.Sequential(model.encoder, model.quant_conv)
    decoder = Passing(decoded, model.post_quant_conv, model.decoder)
    return Checkpoint(encoder, decoder, nearest, _vectors(model.quantize.embedding))


def _kl(model: Any) -> Checkpoint:
    """diffusers' AutoencoderKL: no codes, and its latent's mean."""

    def mean(x: Tensor) -> Tensor:
        return model.encode(x).latent_dist.mode()

    own = [part for part in (model.quant_conv, model.post_quant_conv) if part is not None]
    encoder = Passing(mean, model.encoder, *own[:1])
    return Checkpoint(encoder, Passing(lambda z: model.decode(z).sample, model.decoder, *own[1:]))


def _janus(model: Any) -> Checkpoint:
    """transformers' JanusVQVAE, the VQ-16 tokenizer of LlamaGen: vectors of codes are of unit length. Its own decode
    takes one grid alone; convolutions take any."""
    vectors = _vectors(model.quantize.embedding)

    def nearest(z: Tensor) -> Tensor:
        return model.quantize(z)[2].view(len(z), *z.shape[2:])

    encoder = nn.Sequential(model.encoder, model.quant_conv)
    decoder = nn.Sequential(model.post_quant_conv, model.decoder)
    return Checkpoint(encoder, decoder, nearest, lambda codes: F.normalize(vectors(codes), dim=1))


def _emu3(model: Any) -> Checkpoint:
    """transformers' Emu3VQVAE, a tokenizer of films: an image is a film that stands still."""

    def encoded(x: Tensor) -> Tensor:
        film = x[:, None].expand(-1, model.config.temporal_downsample_factor, -1, -1, -1)
        return model.quant_conv(model.encoder(film).transpose(1, 2)).squeeze(2)

    def decoded(z: Tensor) -> Tensor:
        z = z[:, :, None]
        films = model.decoder(model.post_quant_conv(z).transpose(1, 2), z.transpose(1, 2))
        return films.view(len(z), -1, *films.shape[1:])[:, 0]

    return Checkpoint(
        Passing(encoded, model.encoder, model.quant_conv),
        Passing(decoded, model.post_quant_conv, model.decoder),
        lambda z: model.quantize(z[:, None])[:, 0],
        _vectors(model.quantize.embedding),
    )


class Kind(NamedTuple):
    """A class of one of the libraries: what makes a codec of its model, and which setting is K."""

    wrap: Callable[[Any], Checkpoint]
    codebook_size: str | None


KINDS: dict[str, dict[str, Kind]] = {
    "diffusers": {"VQModel": Kind(_vq, "num_vq_embeddings"), "AutoencoderKL": Kind(_kl, None)},
    "transformers": {"JanusVQVAE": Kind(_janus, "num_embeddings"), "Emu3VQVAE": Kind(_emu3, "codebook_size")},
}
# How transformers calls them in config.json; a whole multimodal model has its tokenizer's settings below one key and
# its tensors below one prefix.
MODEL_TYPES = {"janus_vqgan": "JanusVQVAE", "emu3_vqgan": "Emu3VQVAE"}
WHOLE = {"janus": ("JanusVQVAE", "model.vqmodel."), "emu3": ("Emu3VQVAE", "model.vqmodel.")}


def checkpoint(library: str, name: str, device: str) -> Guest:
    """The guest ``library:name``, name being a folder or ORGANISATION/NAME[/SUBFOLDER] on the Hub, which is downloaded.
    Raises UserError where the library is missing, or the folder or its weights are not what is expected."""
    called = f"{library}:{name}"
    if find_spec(library) is None:
        raise UserError(f"{called} needs the package {library}; pip install 'vqbench[guests]'")
    folder = Path(name).expanduser() if os.path.isdir(os.path.expanduser(name)) else _downloaded(called, name)
    kind_name, settings, prefix = _described(called, library, folder)
    kind = KINDS[library][kind_name]
    files = _weights(called, folder)
    shapes = {key: shape for file in files for key, shape in _shapes(called, file, prefix).items()}
    _check_plausible(called, settings, len(shapes))
    repair()
    build = _builder(library, kind_name, settings)
    with torch.device("meta"):
        _check_same(called, {key: tuple(value.shape) for key, value in build(called).state_dict().items()}, shapes)
    model = build(called)
    model.load_state_dict({key: value for file in files for key, value in _tensors(called, file, prefix).items()})
    codec = kind.wrap(model.float()).to(device).eval().requires_grad_(False)
    return Guest(
        name=called,
        codec=codec,
        codebook_size=settings.get(kind.codebook_size, getattr(model.config, kind.codebook_size))
        if kind.codebook_size
        else None,
        digest=sha256_json([kind_name, settings, *map(sha256_file, files)]),
        device=device,
        about={"class": f"{library}.{kind_name}", "range": "[-1, 1]"},
        sides=Sides(codec.encoder, codec.decoder),
        lookup=codec.lookup if kind.codebook_size else None,
    )


def _downloaded(called: str, name: str) -> Path:
    """The folder of what is called so on the Hub."""
    parts = name.split("/")
    if len(parts) not in (2, 3) or not all(parts) or name.startswith((".", "~")):
        raise UserError(f"{called}: there is no folder {name}, and ids on the Hub are ORGANISATION/NAME")
    from huggingface_hub import snapshot_download  # which both libraries bring

    below = f"{parts[2]}/" if len(parts) == 3 else ""
    wanted = [f"{below}config.json", f"{below}*.safetensors"]
    try:
        return Path(snapshot_download("/".join(parts[:2]), allow_patterns=wanted), below)
    except Exception as error:  # the library has a dozen kinds, and those of its transport
        said = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(f"{called}: there is no folder {name}, and it cannot be downloaded ({said})") from error


def _described(called: str, library: str, folder: Path) -> tuple[str, dict[str, Any], str]:
    """Class, settings and the prefix of the tensors' names that config.json of ``folder`` tells of."""
    try:
        settings = read_json(folder / "config.json")
    except FileNotFoundError as error:
        raise UserError(f"{called} has no config.json in {folder}; name the folder that has it") from error
    prefix, found = "", settings.get("_class_name")
    if library == "transformers":
        found = str(settings.get("model_type"))
        if found in WHOLE and isinstance(settings.get("vq_config"), dict):
            found, prefix = WHOLE[found]
            settings = settings["vq_config"]
        found = MODEL_TYPES.get(found, found)
    if found not in KINDS[library]:
        reason = "; the one in transformers has no decoder" if str(found).startswith("chameleon") else ""
        raise UserError(f"{called} is of the class {found!r}, and {', '.join(KINDS[library])} can be scored{reason}")
    return found, settings, prefix


def _weights(called: str, folder: Path) -> list[Path]:
    files = sorted(path for path in folder.glob("*.safetensors") if path.is_file())
    if not files:
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
        why = f" but {pickles[0]}, which may run anything when it is read" if pickles else ""
        raise UserError(f"{called} has no weights in safetensors{why}; save it anew with save_pretrained")
    return files


def _shapes(called: str, file: Path, prefix: str) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors whose names begin with ``prefix``, by the rest of their names; nothing of them is read."""
    try:
        with safe_open(file, "pt") as tensors:
            names = [key for key in tensors.keys() if key.startswith(prefix)]  # noqa: SIM118
            return {key.removeprefix(prefix): tuple(tensors.get_slice(key).get_shape()) for key in names}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{called}: {file} does not hold weights ({error}); download or save it anew") from error


def _tensors(called: str, file: Path, prefix: str) -> dict[str, Tensor]:
    with safe_open(file, "pt") as tensors:
        found = {key: tensors.get_tensor(key).float() for key in tensors.keys() if key.startswith(prefix)}  # noqa: SIM118
    for key, value in found.items():
        if not value.isfinite().all():
            raise UserError(f"{called}: {key} in {file} has numbers that are not finite; download or save it anew")
    return {key.removeprefix(prefix): value for key, value in found.items()}


def _check_plausible(called: str, settings: dict[str, Any], tensors: int) -> None:
    """Raises UserError where building a model of ``settings`` would take more than a file of so many ``tensors`` can
    fill: the settings are a stranger's."""
    for key, value in settings.items():
        values = value if isinstance(value, list) else [value]
        most = max(tensors, 1) if "layers" in key or "blocks" in key else MOST
        wrong = [one for one in values if isinstance(one, (int, float)) and not -MOST <= one <= most]
        if wrong or len(values) > LONGEST:
            said = wrong[0] if wrong else f"{len(values)} values"
            raise UserError(f"{called}: its config.json has {key} {said}, and {tensors} tensors; it is not whole")


def _builder(library: str, kind: str, settings: dict[str, Any]) -> Callable[[str], Any]:
    def build(called: str) -> Any:
        """A model of the settings, its weights at random. Raises UserError where they cannot be built."""
        try:
            if library == "diffusers":
                import diffusers

                return getattr(diffusers, kind).from_config(settings)
            import transformers

            return getattr(transformers, kind)(getattr(transformers, f"{kind}Config")(**settings))
        except Exception as error:  # whatever these libraries raise on a stranger's settings, types of their own too
            said = str(error).strip().partition("\n")[0] or type(error).__name__
            raise UserError(f"{called}: its config.json describes no {kind} ({said}); download it anew") from error

    return build


def _check_same(called: str, asked: dict[str, tuple[int, ...]], there: dict[str, tuple[int, ...]]) -> None:
    """Raises UserError unless the weights have just the tensors that the settings ask for."""
    wrong = sorted(key for key in asked if there.get(key) != asked[key]) or sorted(there.keys() - asked.keys())
    if wrong:
        key = wrong[0]
        more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        said = f"{key} is {there.get(key, 'missing')} in its weights and {asked.get(key, 'unknown')} in its settings"
        raise UserError(f"{called}: {said}{more}; weights and config.json are not of one model")
