"""Gated PixelCNN (van den Oord et al. 2016, "Conditional Image Generation with PixelCNN Decoders", section 2)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones.layers import zero_init

from .prior import Prior

ROWS, COLUMNS = 3, 5  # what one vertical convolution sees: its own row of the stack and two above, two to either side
BEFORE = 3  # what one horizontal convolution sees: its own pixel of the stack and two to the left


class GatedLayer(nn.Module):
    """One layer of both stacks; pads above and to the left only, so that neither sees what comes later.

    The vertical stack holds at row r what rows above r say, the horizontal one at (r, c) what they and the pixels to
    the left say: all before (r, c), without the blind spot of masked square kernels. Both (B, width, h, w), residual.
    """

    def __init__(self, width: int, dropout: float):
        super().__init__()
        self.vertical = nn.Conv2d(width, 2 * width, (ROWS, COLUMNS))
        self.horizontal = nn.Conv2d(width, 2 * width, (1, BEFORE))
        self.across = nn.Conv2d(2 * width, 2 * width, 1)  # from the vertical stack to the horizontal one
        self.vertical_out = zero_init(nn.Conv2d(width, width, 1))
        self.horizontal_out = zero_init(nn.Conv2d(width, width, 1))
        self.norms = nn.ModuleList(ChannelNorm(width) for _ in range(2))
        self.dropout = nn.Dropout(dropout)

    def forward(self, v: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        v, above = self.down(F.pad(self.norms[0](v), (0, 0, ROWS - 1, 0)), v)
        return v, self.right(F.pad(self.norms[1](h), (BEFORE - 1, 0)), h, above)

    def down(self, window: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The vertical stack from normed rows ``window`` (rows of ``v`` and ROWS − 1 above): its next ``v``, and what
        the horizontal stack gets of it."""
        pre = self.vertical(F.pad(window, (COLUMNS // 2, COLUMNS // 2)))
        return v + self.vertical_out(self.dropout(gate(pre))), self.across(pre)

    def right(self, window: Tensor, h: Tensor, above: Tensor) -> Tensor:
        """The horizontal stack from normed pixels ``window`` (those of ``h`` and BEFORE − 1 to the left)."""
        return h + self.horizontal_out(self.dropout(gate(self.horizontal(window) + above)))


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of each pixel alone: (B, C, h, w). Norms over pixels would let the future in."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


def gate(x: Tensor) -> Tensor:
    """tanh(a) · σ(b) of the two halves of the channels (eq. 2)."""
    a, b = x.chunk(2, 1)
    return a.tanh() * b.sigmoid()


class PixelCNN(Prior):
    """``depth`` gated layers over an embedding of the codes, shifted by one so that a pixel never sees itself. Sampling
    keeps the last rows and pixels of each layer, so that every one is computed once (Ramachandran et al. 2017).

    A pixel here is a code: each layer sees two rows and columns further, whatever these are. Where a column is one of
    three channels of an image's pixel, 16 layers see 32 rows above, and of the image 11 pixels to either side.
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
        self.embedding = nn.Embedding(codebook_size, width)
        self.label = nn.Embedding(max(classes, 1) + unlabelled, width)
        self.position = nn.Parameter(0.02 * torch.randn(width, *grid))
        for table in (self.embedding, self.label):
            nn.init.normal_(table.weight, std=0.02)
            table.weight._no_weight_decay = True
        self.layers = nn.ModuleList(GatedLayer(width, dropout) for _ in range(depth))
        self.dropout = nn.Dropout(dropout)
        self.norm = ChannelNorm(width)
        self.head = nn.Conv2d(width, codebook_size, 1)
        zero_init(self.head)  # starts as the uniform distribution

    def logits(self, codes: Tensor, labels: Tensor | None = None) -> Tensor:
        x = self.dropout(self.embedding(codes).movedim(-1, 1))
        context = self._context(labels, len(codes))
        v = F.pad(x, (0, 0, 1, 0))[:, :, :-1] + context
        h = F.pad(x, (1, 0))[..., :-1] + context
        for layer in self.layers:
            v, h = layer(v, h)
        return self.head(self.norm(h)).movedim(1, -1)

    def start(self, labels: Tensor | None, count: int) -> Any:
        width, _, columns = self.position.shape
        context = self._context(labels, count).expand(count, -1, -1, -1)
        rows = [context.new_zeros(count, width, ROWS - 1, columns) for _ in self.layers]
        return context, context.new_zeros(count, width, 1, columns), rows, None, None

    def step(self, position: int, before: Tensor | None, state: Any) -> tuple[Tensor, Any]:
        context, row, rows, above, pixels = state  # row: embedded codes of the row above; rows, pixels: normed windows
        r, c = divmod(position, self.grid[1])
        if before is not None:
            left = self.embedding(before)[:, :, None, None]
            row = torch.cat([row[..., 1:], left], 3)  # in a row's first column, all of the row above
        if c == 0:
            v, above, after = row + context[:, :, r : r + 1], [], []
            for layer, window in zip(self.layers, rows, strict=True):
                window = torch.cat([window, layer.norms[0](v)], 2)
                v, passed = layer.down(window, v)
                above.append(passed)
                after.append(window[:, :, 1:])
            rows, left = after, torch.zeros_like(row[..., :1])
            pixels = [left.expand(-1, -1, -1, BEFORE - 1) for _ in self.layers]
        h, after = left + context[:, :, r : r + 1, c : c + 1], []
        for layer, window, passed in zip(self.layers, pixels, above, strict=True):
            window = torch.cat([window, layer.norms[1](h)], 3)
            h = layer.right(window, h, passed[..., c : c + 1])
            after.append(window[..., 1:])
        return self.head(self.norm(h))[:, :, 0, 0], (context, row, rows, above, after)

    def _context(self, labels: Tensor | None, count: int) -> Tensor:
        if labels is None:
            labels = torch.zeros(count, dtype=torch.int64, device=self.position.device)
        return self.position + self.label(labels)[:, :, None, None]
