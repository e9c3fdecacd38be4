"""A prior that fills in what is hidden, many codes at a time: MaskGIT (Chang et al. 2022, arXiv 2202.04200)."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones.layers import TransformerBlock, zero_init

from .prior import Prior

PASSES = 12  # in which a grid is drawn, unless told otherwise
HIDINGS = 16  # of a grid, over which its bound is averaged
BOUND = "Bits of masked are an upper bound of what its likelihood would take: the mean over random orders of the codes."
CHOICE = 4.5  # temperature of the noise on what is kept: that of the published code


class MaskedPrior(Prior):
    """Transformer layers over all codes of a grid, of which the code K, ``codebook_size``, says that they are hidden.

    It has no order of its own. Trained on, and scored with, what an order drawn at random costs on average (see
    ``nll``), for which the number of hidden codes is uniform where the paper draws it from the cosine that ``sample``
    follows. ``dropout`` is of the embeddings and of what each layer adds.
    """

    def __init__(
        self,
        codebook_size: int,
        grid: tuple[int, int],
        width: int,
        depth: int,
        dropout: float,
        classes: int = 0,
        unlabelled: bool = False,
    ):
        super().__init__(codebook_size, grid, classes, unlabelled=unlabelled)
        self.embedding = nn.Embedding(codebook_size + 1, width)
        self.label = nn.Embedding(max(classes, 1) + unlabelled, width)  # one row per label
        self.position = nn.Parameter(0.02 * torch.randn(self.tokens, width))
        for table in (self.embedding, self.label):
            nn.init.normal_(table.weight, std=0.02)
            table.weight._no_weight_decay = True
        self.layers = nn.ModuleList(TransformerBlock(width) for _ in range(depth))
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, codebook_size)
        zero_init(self.head)  # starts as the uniform distribution

    def logits(self, codes: Tensor, labels: Tensor | None = None) -> Tensor:
        """Unnormalised log p of every code at every position, given those that are not hidden.

        codes (B, h, w) int64 in [0, K], where K is hidden, labels as its siblings have them → (B, h, w, K).
        """
        if labels is None:
            labels = torch.zeros(len(codes), dtype=torch.int64, device=codes.device)
        x = self.dropout(self.embedding(codes.flatten(1)) + self.position + self.label(labels)[:, None])
        for layer in self.layers:
            x = x + self.dropout(layer(x) - x)
        return self.head(self.norm(x)).unflatten(1, codes.shape[1:])

    def nll(self, codes: Tensor, labels: Tensor | None = None) -> Tensor:
        """An upper bound of −ln p of a grid, in nats, as its sum over the positions of a grid: (B, h, w) int64 →
        (B, h, w) float32. Errors are its siblings'.

        It is −Σ ln p(code | codes before it) in a random order, the mean over all orders of which is never below −ln p
        (Hoogeboom et al. 2022, arXiv 2110.02037, equation 2), and what an entropy coder would need with one of them.
        Estimated without bias by hiding m codes, m uniform in 1 … h·w, whose terms count h·w / m times: in training
        once, else HIDINGS times with m spread evenly, at random but the same for every batch of that size.
        """
        self._check(codes, labels)
        flat, total = codes.flatten(1), 0.0
        tokens, times = flat.shape[1], 1 if self.training else HIDINGS
        generator, device = (None, codes.device) if self.training else (torch.Generator().manual_seed(0), "cpu")
        for i in range(times):
            dice = torch.rand(len(codes), 1 + tokens, generator=generator, device=device).to(codes.device)
            count = 1 + ((i + dice[:, :1]) / times * tokens).long().clamp_max(tokens - 1)
            hidden = dice[:, 1:].argsort(1).argsort(1) < count
            given = flat.masked_fill(hidden, self.codebook_size).view_as(codes)
            terms = F.cross_entropy(self.logits(given, labels).float().flatten(0, 2), flat.flatten(), reduction="none")
            total = total + terms.view_as(flat) * hidden * (tokens / count)
        return (total / times).view_as(codes)

    @torch.no_grad()
    def sample(
        self,
        n: int,
        generator: torch.Generator,
        temperature: float = 1.0,
        top_k: int = 0,
        labels: Tensor | None = None,
        guidance: float = 1.0,
        progress: Callable[[int], object] | None = None,
        passes: int = PASSES,
    ) -> Tensor:
        """The same as of its siblings, but drawn in ``passes``, at most one for each code. Each draws all codes that
        are still hidden and keeps those that the prior is surest of, with noise (``CHOICE``) that fades; after the
        share t of the passes cos(π t / 2) of the codes are hidden (section 3.2 of the paper)."""
        self._check_sampling(n, temperature, top_k, labels, guidance)
        if guidance != 1:  # both at once, side by side
            labels = torch.cat([labels, torch.full_like(labels, self.classes)])
        codes = torch.full((n, self.tokens), self.codebook_size, device=self.position.device)
        for i, left in enumerate(schedule := hidden_after(passes, self.tokens), 1):
            logits = self.logits(codes.repeat(1 + (guidance != 1), 1).unflatten(1, self.grid), labels).flatten(0, 2)
            chances = self._chances(logits, temperature, top_k, guidance)
            drawn = torch.multinomial(chances, 1, generator=generator)
            noise = -torch.empty_like(chances[:, :1]).exponential_(generator=generator).log()  # Gumbel's
            sure = chances.gather(1, drawn).log() + CHOICE * (1 - i / len(schedule)) * noise
            known = codes != self.codebook_size
            sure = sure.view_as(codes).masked_fill(known, torch.inf)
            codes = torch.where(known, codes, drawn.view_as(codes))
            codes.scatter_(1, sure.topk(left, largest=False).indices, self.codebook_size)
            if progress:
                progress(n * ([self.tokens, *schedule][i - 1] - left))
        return codes.unflatten(1, self.grid)


def hidden_after(passes: int, tokens: int) -> list[int]:
    """How many of ``tokens`` are hidden after each of ``passes``, or of as many as there are tokens: those of a cosine,
    but one less each time at least; 0 in the end."""
    passes, left = min(passes, tokens), [tokens]
    for i in range(1, passes + 1):
        cosine = int(tokens * math.cos(math.pi / 2 * i / passes))
        left.append(max(min(cosine, left[-1] - 1), passes - i))
    return left[1:]
