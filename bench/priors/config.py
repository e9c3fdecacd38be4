"""The one description of a prior's run: as Config is of a tokenizer's, a flat dataclass whose fields are the flags."""

from dataclasses import dataclass, fields, replace
from typing import Annotated, ClassVar

from backbones.orders import ORDERS
from backbones.plugins import version_of
from bench.core import settings
from bench.core.device import check_device, resolve_device, resolve_precision
from bench.core.errors import UserError
from bench.core.settings import (
    Count,
    Fraction,
    Natural,
    OneOf,
    Positive,
    Precision,
    RunId,
    Seed,
    Weight,
    at_least,
    at_most,
)

from .models import LEARNED, PRIORS, SEQUENCES
from .models.masked import PASSES

# How priors are trained and scored; raised when the same config gives other numbers (tests/golden.json notices).
# 2: seeds other than 0 have random draws of their own.
# 3: on the codes of the split that the tokenizer was scored on.
PRIOR_VERSION = 3
# Layers, unless given; pixelcnn has as many as see all rows, and so the whole of a square grid.
DEPTH = {"rnn": 3, "transformer": 4, "mamba": 4, "masked": 4}
SAMPLING = ("samples", "temperature", "top_k", "guidance", "passes")  # fields that training knows nothing of


@dataclass(frozen=True)
class PriorConfig:
    """Everything that a prior's numbers depend on besides its tokenizer, the seed included."""

    SHELF: ClassVar[str] = "priors"

    tokenizer: RunId
    """run id of the tokenizer"""
    prior: Annotated[str, OneOf(PRIORS)]
    """pixelcnn, rnn, transformer, mamba, masked, or independent, the floor: a histogram of the codes of each
    position"""
    depth: Annotated[int | None, at_least(1), at_most(1000)] = None
    """layers; unless given 4 for transformer, mamba and masked, 3 for rnn, and for pixelcnn, which sees 2 rows and
    columns further with each, half as many as the grid has rows but at least 5"""
    parameters: Annotated[int, at_least(1), at_most(10**11)] = 1_000_000
    """of the prior; its width is chosen so that it has so many, within 2 %"""
    token_order: Annotated[str, OneOf(ORDERS), settings.LATER] = "raster"
    """rnn, transformer, mamba: the order in which codes are read and drawn: raster, columns, snake or hilbert"""
    dropout: Fraction = 0.1
    """share of features that training leaves out"""
    conditional: bool = False
    """condition on the class of the image, where the data has classes (photos: which photograph)"""
    label_dropout: Annotated[Fraction, settings.LATER] = 0.0
    """share of the labels that training leaves out, for guidance; about 0.1"""
    steps: Count = 400
    """training steps"""
    batch_size: Annotated[Count, at_most(2**16)] = 64
    """grids of codes per step"""
    lr: Positive = 3e-3
    """peak learning rate of AdamW, reached after the warm-up, cosine to zero afterwards"""
    warmup: Natural = 50
    """steps of linear warm-up"""
    weight_decay: Weight = 0.05
    """AdamW weight decay; never on norms, biases, embeddings, positions, A_log, D or dt_bias"""
    grad_clip: Weight = 1.0
    """largest gradient norm; 0 does not clip"""
    weight_ema: Fraction = 0.99
    """decay of the weight average that is scored; 0 scores the last weights"""
    samples: Annotated[int, at_least(4), at_most(10**7)] = 512
    """images to generate and score"""
    temperature: Annotated[Positive, at_least(0.001)] = 1.0
    """of sampling; below 1 likely codes become likelier"""
    top_k: Natural = 0
    """sample among so many likeliest codes only; 0 is all"""
    guidance: Annotated[Positive, at_most(1000), settings.LATER] = 1.0
    """of sampling by class: how far logits are drawn away from those without a label; 1 is none, 1.5 to 4 usual"""
    passes: Annotated[Count, at_most(2**20), settings.LATER] = PASSES
    """masked: in how many a grid is drawn, at most one for each code; more are slower and often better"""
    precision: Precision = "auto"
    """autocast in training; auto is bf16 where the hardware has it. Scoring is always fp32"""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N"""
    seed: Seed = 0
    """weights, batches, dropout and samples follow from it"""

    def resolved(self) -> "PriorConfig":
        """The same config with every ``auto`` replaced by what this machine gives. What the independent prior makes no
        use of, which is all of training, is at its default."""
        device = resolve_device(self.device)
        config = replace(self, device=device, precision=resolve_precision(self.precision, device))
        if self.prior not in LEARNED:
            kept = ("tokenizer", "prior", *SAMPLING, "precision", "device", "seed")
            unused = {field.name: field.default for field in fields(self) if field.name not in kept}
            config = replace(config, **unused, precision="fp32")
        return config

    def run_id(self) -> str:
        """Identity of the run: readable head, then a hash of the canonical config and the version."""
        packages = [*filter(None, [version_of("priors", self.prior)])]
        return f"{self.prior}-{self.tokenizer}-{settings.identity(PRIOR_VERSION, self.resolved(), packages)[:8]}"

    def stored(self) -> "PriorConfig":
        """The config as its run keeps it: as it is."""
        return self

    def trains_as(self, other: "PriorConfig") -> bool:
        """Whether both come to the same weights: equal but for how they are sampled from."""
        usual = {field.name: field.default for field in fields(self) if field.name in SAMPLING}
        return replace(self.resolved(), **usual) == replace(other.resolved(), **usual)

    def check(self) -> None:
        """Raises UserError, one sentence with value and fix, on the first setting that cannot work."""
        settings.check_fields(self if self.prior in LEARNED else replace(self, depth=None))  # the floor has no layers
        if self.label_dropout and not self.conditional:
            raise UserError(f"label_dropout is {self.label_dropout:g}, and without --conditional there are no labels")
        if self.guidance != 1 and not self.label_dropout:
            fix = "train with --label-dropout 0.1 and --conditional"
            raise UserError(f"guidance is {self.guidance:g}, and the prior knows nothing without a label; {fix}")
        if self.token_order != "raster" and self.prior not in SEQUENCES:
            fix = f"leave it out or choose from {', '.join(SEQUENCES)}"
            raise UserError(f"token_order is {self.token_order}, of which prior {self.prior!r} makes no use; {fix}")
        if self.passes != PASSES and self.prior != "masked":
            raise UserError(
                f"passes is {self.passes}, of which prior {self.prior!r} makes no use; leave it out or choose masked"
            )
        check_device(self.resolved().device)
