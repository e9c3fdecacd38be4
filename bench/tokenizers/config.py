"""The one description of a run: a flat, frozen Config, its checks and its identity.

A field's name is the command-line flag, the Optuna parameter and the DataFrame column; its type says what it may be.
"""

import itertools
import os
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, ClassVar, Literal

from backbones import OPTIONS, Backbone, backbone, users
from backbones.layers import downsamplings
from backbones.orders import TURNS, order
from backbones.plugins import version_of
from bench.core import settings
from bench.core.device import check_device, resolve_device, resolve_precision
from bench.core.errors import UserError
from bench.core.files import DIGEST, located
from bench.core.settings import (
    Count,
    Features,
    Fraction,
    Layers,
    Natural,
    OneOf,
    Positive,
    Precision,
    Seed,
    StepShare,
    Weight,
)
from bench.data import AUGMENTATIONS
from bench.metrics import MINIMUM_SIZE
from bench.quantizers import ENTROPY_WEIGHT, QUANTIZERS

from .alignment import check_model, content
from .presets import PRESETS
from .sizes import width_of
from .source import FROZEN, built, check_source, weights_in

# How runs are trained and scored; raised when the same config gives other numbers (tests/golden.json notices).
# 2: FLOPs count attention and the Mamba-2 scan, on every device; seeds other than 0 have random draws of their own.
# 3: three splits; scores are of the test unless a config says otherwise; other crops of other photographs.
PROTOCOL_VERSION = 3

SETTINGS = {name for quantizer in QUANTIZERS.values() for name in quantizer.settings}  # of any quantizer
SMALLEST = max(MINIMUM_SIZE.values())
LARGEST = 8192  # pixels or codes a side
TOO_SMALL = f"LPIPS needs at least {SMALLEST} pixels a side"
SEEN_BY_LPIPS = settings.Limit(lambda side: side >= SMALLEST, TOO_SMALL, f"from {SMALLEST}")


@dataclass(frozen=True)
class Config:
    """Everything that a run's numbers depend on, the seed included."""

    SHELF: ClassVar[str] = "runs"

    backbone: str
    """a key of BACKBONES, or timm:MODEL, whose encoder is a model of timm, its decoder cnn's"""
    width: Features
    """channels at the token grid; with depth it sets the parameter count (timm:MODEL: of the decoder)"""
    depth: Layers
    """blocks per level (cnn, convnext, the decoder of timm:MODEL) or per side (vit, mamba, bimamba, hybrid)"""
    patch_overlap: bool = False
    """vit, mamba, bimamba, hybrid: patches twice as wide as their stride, a cure for grid artefacts"""
    final_conv: bool = False
    """vit, mamba, bimamba, hybrid: a 3×3 convolution over the pixels at the end, the other cure"""
    attention: Annotated[Natural, settings.at_most(1000)] = 0
    """transformer layers on either side of the quantizer, whatever the backbone"""
    token_order: Annotated[str, OneOf(TURNS), settings.LATER] = "raster"
    """mamba, bimamba, hybrid: the order in which tokens are read: raster, columns, snake, hilbert, or cross, where rows
    and columns take turns from block to block"""
    two_streams: Annotated[bool, settings.LATER] = False
    """bimamba: a residual stream for either direction, as published, in place of one for both"""
    vision_mixer: Annotated[bool, settings.LATER] = False
    """hybrid: MambaVision's mixer, a scan beside a convolution, in place of two scans"""
    rotary: Annotated[bool, settings.LATER] = False
    """vit, hybrid: rotary positions in attention in place of learned ones, which other sizes would interpolate"""
    rms_norm: Annotated[bool, settings.LATER] = False
    """convnext: RMSNorm in place of LayerNorm, as in NeXtformer; slower on CPUs"""
    full_resolution: Annotated[bool, settings.LATER] = False
    """cnn, convnext: blocks at the image's own resolution too, as in NeXtformer, where they take longest"""
    pretrained: bool = False
    """timm:MODEL: start the encoder from timm's weights"""
    init_from: Annotated[str, settings.LATER] = ""
    """folder of a finished run whose weights to start from, with its architecture unless that is given. A run is known
    by these weights, not by where they lie"""
    freeze: Annotated[str, OneOf(FROZEN), settings.LATER] = "none"
    """what of init_from stays as it is: none, encoder, quantizer, decoder, encoder,quantizer or quantizer,decoder"""
    quantizer: Annotated[str, OneOf(QUANTIZERS)] = "ema"
    """how the codebook learns: standard (codebook loss), ema (moving average), l2 or ema_l2 (unit sphere), gumbel
    (sampled codes), ibq (gradient through the choice), product (several codebooks side by side), bsq (signs on a
    sphere); fsq, lfq, simvq, residual, of an optional package; or, as references without codes, none (the latent as it
    is) and kl (a Gaussian latent), which have no use for codebook_size"""
    data: str = "photos"
    """photos (embedded, no download), folder:PATH, shards:DIR, parquet:DIR, npy:FILE, hf:NAME, cifar10, fashion_mnist,
    stl10, celeba or flowers102"""
    train_images: Natural = 0
    """so many of the images to train on, drawn once for all seeds; 0 takes all"""
    split: Literal["test", "val"] = "test"
    """what the run is scored on; val (validation) while you are still choosing between settings, as searches do"""
    image_size: Annotated[int, SEEN_BY_LPIPS, settings.at_most(LARGEST)] = 64
    """side of the square images, in pixels"""
    grid_size: Annotated[Count, settings.at_most(LARGEST)] = 8
    """side of the grid of codes; must divide image_size as a power of two; 1 is one code per image"""
    codebook_size: Annotated[Count, settings.at_most(2**24)] = 512
    """K, the number of codes"""
    code_dim: Features = 16
    """d, the length of a code vector"""
    beta: Weight = 0.25
    """β, weight of the commitment loss"""
    ema_decay: Fraction = 0.99
    """ema, ema_l2, residual: decay of the running sums"""
    kmeans_init: bool = False
    """start the codebook at k-means centroids of encoder outputs rather than at random ones"""
    entropy_weight: Annotated[float | None, settings.NOT_NEGATIVE] = None
    """weight of the entropy penalty: sure about each token, all codes in use; unless given, 0.1 for lfq and bsq, which
    need it, 0.02 for simvq, which gains by it, and 0 for all others"""
    gradient: Literal["straight_through", "rotation"] = "straight_through"
    """how the decoder's gradient passes the quantizer: copied, or rotated along with the code"""
    temperature: Positive = 1.0
    """gumbel: temperature of the soft choice of a code in training"""
    temperature_end: Annotated[float | None, settings.ABOVE_0, settings.LATER] = None
    """gumbel: the temperature that training ends with, reached geometrically; unless given, it stays as it is"""
    uniform_weight: Annotated[Weight, settings.LATER] = 0.0
    """gumbel: weight of the divergence of soft choices from the uniform, in nats per token (DALL-E's KL term)"""
    codebooks: Annotated[Count, settings.at_most(16), settings.LATER] = 2
    """residual, product: how many codebooks there are, the product of whose sizes is codebook_size"""
    kl_weight: Weight = 1e-2
    """kl: weight of the divergence from the unit Gaussian, in nats per component of the latent"""
    revive_after: Natural = 50
    """a code that missed this many times its equal share of tokens is reset to a random token; 0 never resets"""
    reconstruction: Literal["l1", "l2"] = "l2"
    """pixel loss on [-1, 1]: mean absolute or mean squared error"""
    reconstruction_weight: Annotated[Weight, settings.LATER] = 1.0
    """weight of the pixel loss"""
    reconstruction_end: Annotated[float | None, settings.NOT_NEGATIVE, settings.LATER] = None
    """its weight at the end of training, reached linearly; unless given, it stays as it is"""
    lpips_weight: Weight = 0.05
    """weight of the perceptual loss; 0 leaves it out"""
    lpips_net: Literal["alex", "vgg"] = "alex"
    """network of the perceptual loss; vgg is slow without a GPU"""
    alignment_weight: Annotated[Weight, settings.LATER] = 0.0
    """weight of the alignment of the quantized latent with features of a frozen model (VA-VAE); 0 leaves it out"""
    alignment_model: Annotated[str, settings.LATER] = "vit_small_patch14_dinov2"
    """the model of timm whose features these are"""
    alignment_file: Annotated[str, settings.LATER] = ""
    """file with its weights (safetensors, or torch.save of a state dict); unless given, timm's own are fetched. A run
    is known by what is in the file, not by where it lies"""
    gan_weight: Weight = 0.0
    """weight of the adversarial loss; 0 trains no discriminator"""
    gan_start: StepShare = 0.5
    """share of the steps after which the tokenizer sees the discriminator"""
    gan_ramp: StepShare = 0.1
    """share of the steps over which gan_weight then grows from 0 to its full value"""
    gan_warmup: StepShare = 0.1
    """share of the steps, before gan_start, in which the discriminator trains alone"""
    gan_loss: Literal["hinge", "nonsaturating"] = "hinge"
    """adversarial loss of both sides"""
    gan_adaptive: bool = True
    """scale gan_weight by the ratio of gradients at the decoder's last layer (VQGAN)"""
    gan_lr: Weight = 0.2
    """the discriminator's learning rate as a share of lr"""
    gan_width: Features = 64
    """channels of PatchGAN's first layer"""
    gan_layers: Annotated[Count, settings.at_most(10)] = 3
    """PatchGAN's downsampling layers; each doubles the channels, up to eight times gan_width"""
    gan_norm: Literal["group", "spectral"] = "group"
    """PatchGAN's normalisation"""
    lecam_weight: Weight = 0.0
    """weight of the LeCAM regulariser of the discriminator; for little data"""
    r1_weight: Weight = 0.0
    """weight of the R1 gradient penalty of the discriminator on real images"""
    steps: Count = 700
    """training steps"""
    batch_size: Annotated[Count, settings.at_most(2**16)] = 16
    """images per step"""
    lr: Positive = 2e-3
    """peak learning rate of AdamW, reached after the warm-up, cosine to zero afterwards"""
    warmup: Natural = 50
    """steps of linear warm-up"""
    weight_decay: Weight = 0.05
    """AdamW weight decay; never on norms, biases, codes, positions, A_log, D or dt_bias"""
    grad_clip: Weight = 1.0
    """largest gradient norm; 0 does not clip"""
    weight_ema: Fraction = 0.99
    """decay of the weight average that is scored; 0 scores the last weights"""
    augment: Annotated[str, OneOf(AUGMENTATIONS)] = "flip"
    """none, flip, or blog (crop 0.8-1, flip, sharpness, autocontrast)"""
    precision: Precision = "auto"
    """autocast in training; auto is bf16 where the hardware has it. Scoring is always fp32"""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N"""
    seed: Seed = 0
    """weights, batches and augmentation follow from it"""

    def resolved(self) -> "Config":
        """The same config with every ``auto`` replaced by what this machine gives, an open ``entropy_weight`` by the
        quantizer's own, and the real paths of a data folder and of what the weights are from."""
        device = resolve_device(self.device)
        precision = resolve_precision(self.precision, device)
        data, source = located(self.data), self.init_from
        if source and not source.startswith(DIGEST):
            source = os.path.realpath(os.path.expanduser(source))
        entropy_weight = ENTROPY_WEIGHT.get(self.quantizer, 0.0) if self.entropy_weight is None else self.entropy_weight
        found = {"device": device, "precision": precision, "data": data, "entropy_weight": entropy_weight}
        found["init_from"] = source
        changes = {name: value for name, value in found.items() if value != getattr(self, name)}
        return replace(self, **changes) if changes else self

    def run_id(self) -> str:
        """Identity of the run: readable head, then a hash of the canonical config and the protocol version."""
        head = f"{self.backbone.replace(':', '-')}-{self.quantizer}"
        named = {"backbones": self.backbone, "quantizers": self.quantizer, "data": self.data}
        packages = sorted(filter(None, itertools.starmap(version_of, named.items())))
        return f"{head}-{settings.identity(PROTOCOL_VERSION, self.resolved().stored(), packages)[:12]}"

    def stored(self) -> "Config":
        """The config as its run keeps it: with what is in ``alignment_file`` and ``init_from`` in place of their paths.
        Raises UserError where there are no such files."""
        known = {"alignment_file": content, "init_from": weights_in}
        changes = {name: digest(path) for name, digest in known.items() if (path := getattr(self, name))}
        return replace(self, **changes) if changes else self

    @property
    def tokens(self) -> int:
        """Codes per image."""
        return self.grid_size**2

    @property
    def discrete(self) -> bool:
        """Whether the latent is of codes; otherwise it is continuous, and K means nothing."""
        return QUANTIZERS[self.quantizer].discrete

    def check(self) -> None:
        """Raises UserError, one sentence with value and fix, on the first setting that cannot work."""
        settings.check_values(self)
        self._check_backbone()
        settings.check_choices(self)
        self._check_quantizer()
        try:
            downsamplings(self.image_size, self.grid_size)
        except ValueError as error:
            sizes = [self.image_size >> k for k in range(20) if (self.image_size >> k) << k == self.image_size]
            raise UserError(f"{error}; choose from {', '.join(map(str, filter(None, sizes)))}") from error
        if self.full_resolution and self.grid_size == self.image_size:
            raise UserError("full_resolution adds no level to a grid as large as the image; leave it out")
        check_source(self)
        for name in TURNS[self.token_order]:
            check_order(name, self.grid_size, self.grid_size)
        if self.alignment_weight:
            check_model(self.alignment_model)
        for name in () if self.alignment_weight else ("alignment_model", "alignment_file"):
            if getattr(self, name) != getattr(Config, name):
                told = f"{name} is {getattr(self, name)}, and alignment_weight is 0"
                raise UserError(f"{told}; give that too, such as --alignment-weight 0.5")
        check_device(self.resolved().device)

    def _check_backbone(self) -> None:
        taken = _backbone(self.backbone).options
        defaults = {field.name: field.default for field in fields(self)}
        for name in OPTIONS:
            if getattr(self, name) != defaults[name] and name not in taken:
                raise _useless(name, getattr(self, name), f"backbone {self.backbone!r}", users(name))

    def _check_quantizer(self) -> None:
        given = self.resolved()
        for field in fields(self):
            if field.name not in SETTINGS or field.name in QUANTIZERS[self.quantizer].settings:
                continue
            value = getattr(given, field.name)
            if value not in (field.default, field.default or 0.0):  # an open entropy_weight is none
                choices = [name for name, quantizer in QUANTIZERS.items() if field.name in quantizer.settings]
                raise _useless(field.name, value, f"quantizer {self.quantizer!r}", choices)
        quantizer = QUANTIZERS[self.quantizer]
        if quantizer.discrete and self.codebook_size < 2:
            raise UserError("codebook_size is 1, and one code tells nothing; take at least 2")
        own = {name: getattr(given, name) for name in quantizer.settings}
        quantizer.check(self.codebook_size, self.code_dim, **own)


def check_order(name: str, height: int, width: int) -> None:
    """Raises UserError where a grid of so many rows and columns has no order ``name``."""
    try:
        order(name, height, width)
    except ValueError as error:
        raise UserError(f"{error}; take the order snake, or a grid that has it") from error


def _useless(name: str, value: Any, chosen: str, users: list[str]) -> UserError:
    fix = f"leave it out or choose from {', '.join(users)}"
    return UserError(f"{name} is {value}, of which {chosen} makes no use; {fix}")


def _backbone(name: str) -> Backbone:
    try:
        return backbone(name)
    except ValueError as error:
        raise UserError(str(error)) from error


def preset_settings(preset: str) -> dict[str, Any]:
    """Config fields that ``preset`` sets for every backbone. Raises UserError on an unknown name."""
    settings.check_choice("preset", preset, PRESETS)
    return {name: value for name, value in PRESETS[preset].items() if name not in ("about", "params", "depth", "own")}


def make_config(backbone: str, preset: str = "cpu", **overrides: Any) -> Config:
    """Config of ``backbone`` in ``preset``. ``overrides`` are Config fields; whatever is given wins over the preset,
    and None means the preset's own value. A width that is not given is the preset's, whatever else is; what the preset
    says of another quantizer than the given one is left out, and what the run in ``init_from`` was built with wins over
    it. Raises UserError on an unknown backbone, preset or field, and where ``init_from`` is no such run.
    """
    shared = preset_settings(preset)
    _backbone(backbone)
    for name in overrides:
        settings.check_choice("setting", name, [field.name for field in fields(Config)])
    sized = "cnn" if backbone.startswith("timm:") else backbone
    own = {"depth": PRESETS[preset]["depth"], **shared, **PRESETS[preset]["own"].get(sized, {})}
    given = {name: value for name, value in overrides.items() if value is not None}
    if given.get("init_from"):
        theirs, taken = built(given["init_from"], Config), _backbone(backbone).options
        own |= {name: value for name, value in theirs.items() if name not in OPTIONS or name in taken}
    heeded = QUANTIZERS[quantizer].settings if (quantizer := given.get("quantizer")) in QUANTIZERS else SETTINGS
    own = {name: value for name, value in own.items() if name not in SETTINGS or name in heeded}
    if "width" not in {**own, **given}:
        own["width"] = width_of(Config(**{"backbone": sized, "width": 1, **own}), PRESETS[preset]["params"])
    return Config(**{**own, **given, "backbone": backbone})
