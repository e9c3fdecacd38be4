"""The state-space-duality (SSD) scan and the Mamba-2 layer around it.

Glossary, after "Mamba-2": Dao & Gu 2024, *Transformers are SSMs*, arXiv 2405.21060.

    x       input of the scan                 (b, l, h, p)
    dt  Δ   step size, positive               (b, l, h)
    A       decay rate, negative              (h,)
    B       writes an input into the state    (b, l, g, n)
    C       reads an output from the state    (b, l, g, n)
    D       skip connection from x to y       (h,)
    b  batch        l  length               h  heads
    p  head dim     n  state dim (N)        g  groups of heads that share one B and one C
    q  chunk length (Q)                     k  heads per group, h / g

Each head carries a state S of p × n numbers through a linear recurrence (section 2; `ssd_step`):

    S_t = exp(Δ_t A) S_{t-1} + Δ_t x_t ⊗ B_t        y_t = S_t C_t + D x_t

Unrolled, y = (L ∘ C Bᵀ) Δx + D x with L_ts = exp(Σ_{s<r≤t} Δ_r A), zero above the diagonal: causal attention with
decays in the place of a softmax (section 5). That costs O(l²). The chunked algorithm (section 6; `ssd_scan`) attends
only inside chunks of length q and lets the state carry everything between them: O(l (q + n)), mostly matrix products.

On CUDA, `Mamba2` calls mamba-ssm's Triton kernel where that package is installed; everywhere else `ssd_scan` runs.
"""

import contextlib
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    chunk_size: int = 64,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Scan whole sequences: the chunked algorithm of section 6 (listing 1), with the chunks in a loop.

    Shapes and signs are the glossary's, l >= 1; head i belongs to group i // k, and without D there is no skip
    connection. chunk_size, the longest chunk, changes the speed, never the result. initial_state (b, h, p, n) is the
    state before the first step, zero unless given.

    Returns y (b, l, h, p) in the dtype of x and, with return_final_state, also the state after the last step. The
    arithmetic and the state are float32 (float64 if x is) whatever autocast says: decays are products of up to l
    factors. Raises ValueError if the shapes do not fit together or chunk_size < 1.
    """
    _check_shapes(x, dt, A, B, C, D, initial_state)
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    length, groups = x.shape[1], B.shape[2]
    out_dtype, dtype = x.dtype, torch.promote_types(x.dtype, torch.float32)
    x, dt, A, B, C = (t.to(dtype) for t in (x, dt, A, B, C))

    chunks = math.ceil(length / chunk_size)
    q = math.ceil(length / chunks)  # even chunks: 130 steps are 44 + 44 + 42 rather than 64 + 64 + 2
    future = torch.full((q, q), -math.inf, dtype=dtype, device=x.device).triu_(1)

    state = None  # (b, g, n, k p): the heads of a group side by side, so that one matrix product serves them all
    if initial_state is not None:
        state = initial_state.to(dtype).unflatten(1, (groups, -1)).permute(0, 1, 4, 2, 3).flatten(3)

    with _without_autocast(x.device):
        pieces = zip(
            (x * dt.unsqueeze(-1)).unflatten(2, (groups, -1)).split(q, 1),  # Δx (b, q, g, k, p)
            (dt * A).unflatten(2, (groups, -1)).split(q, 1),  # ΔA, the log of each step's decay (b, q, g, k)
            B.transpose(1, 2).split(q, 2),  # (b, g, q, n)
            C.transpose(1, 2).split(q, 2),  # (b, g, q, n)
            strict=True,
        )
        outputs = []
        for i, (dx, dA, B_i, C_i) in enumerate(pieces):
            since_start = dA.cumsum(1)  # every exponent below is a difference of these that is at most zero
            y = _attend(dx, since_start, B_i, C_i, future)
            outputs.append(y if state is None else _recall(y, since_start, C_i, state))
            if i + 1 < chunks or return_final_state:
                state = _carry(dx, since_start, B_i, state)
        y = torch.cat(outputs, 1).flatten(2, 3)
        if D is not None:
            y = torch.addcmul(y, x, D.to(dtype).unsqueeze(-1))

    y = y.to(out_dtype)
    if not return_final_state:
        return y
    return y, state.unflatten(3, (-1, x.shape[3])).permute(0, 1, 3, 4, 2).flatten(1, 2)


def _attend(dx: Tensor, since_start: Tensor, B: Tensor, C: Tensor, future: Tensor) -> Tensor:
    """(L ∘ C Bᵀ) Δx over one chunk: what its steps read of each other (section 5, the quadratic mode).

    dx (b, q, g, k, p), since_start (b, q, g, k), B and C (b, g, q, n), future (>= q, >= q) -> (b, q, g, k, p).
    """
    q = dx.shape[1]
    s = since_start.permute(0, 2, 3, 1).contiguous()  # (b, g, k, q): the q × q matrices below take their layout from it
    # -inf goes in before exp: the half above the diagonal, whose differences are positive, must neither overflow nor
    # turn into inf · 0 in the backward pass. It is added, and s subtracted as + (-s), for what backward passes do then
    # to a q × q matrix: nothing, in place of a fill and a change of sign.
    decay = (s.unsqueeze(-1) + s.neg().unsqueeze(-2)).add_(future[:q, :q]).exp_()
    scores = (C @ B.mT).unsqueeze(2) * decay  # C Bᵀ once per group, not once per head
    return (scores @ dx.permute(0, 2, 3, 1, 4)).permute(0, 3, 1, 2, 4)


def _recall(y: Tensor, since_start: Tensor, C: Tensor, state: Tensor) -> Tensor:
    """y (b, q, g, k, p) of a chunk, plus what its steps read of the state before it, (b, g, n, k p)."""
    read = (C @ state).unflatten(3, y.shape[3:]).transpose(1, 2)
    return torch.addcmul(y, read, since_start.exp().unsqueeze(-1))


def _carry(dx: Tensor, since_start: Tensor, B: Tensor, state: Tensor | None) -> Tensor:
    """The state (b, g, n, k p) after a chunk, from the one before it: what remains of that, and what is written."""
    until_end = (since_start[:, -1:] - since_start).exp().unsqueeze(-1)
    written = B.mT @ (dx * until_end).transpose(1, 2).flatten(3)
    if state is None:
        return written
    kept = since_start[:, -1].exp().repeat_interleave(dx.shape[-1], -1).unsqueeze(2)  # (b, g, 1, k p)
    return torch.addcmul(written, kept, state)


def ssd_step(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One step of the recurrence itself: `ssd_scan` at l = 1, without the length axis and several times faster.

    x (b, h, p), dt (b, h), A (h,), B and C (b, g, n), D (h,) or None, state (b, h, p, n) -> y (b, h, p) in the dtype of
    x and the next state (b, h, p, n) in at least float32. Signs, ranges and errors as in `ssd_scan`.
    """
    _check_shapes(x.unsqueeze(1), dt.unsqueeze(1), A, B.unsqueeze(1), C.unsqueeze(1), D, state)
    by_group = (B.shape[1], -1)
    out_dtype, dtype = x.dtype, torch.promote_types(x.dtype, torch.float32)
    x, dt, A, B, C, state = (t.to(dtype) for t in (x, dt, A, B, C, state))
    with _without_autocast(x.device):
        dx = (x * dt.unsqueeze(-1)).unflatten(1, by_group)  # (b, g, k, p)
        written = (dx.unsqueeze(-1) * B[:, :, None, None]).flatten(1, 2)  # (b, h, p, n)
        state = torch.addcmul(written, (dt * A).exp()[..., None, None], state)
        y = (state.unflatten(1, by_group) @ C[:, :, None, :, None]).squeeze(-1).flatten(1, 2)
        if D is not None:
            y = torch.addcmul(y, x, D.to(dtype).unsqueeze(-1))
    return y.to(out_dtype), state


def _check_shapes(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, state: Tensor | None
) -> None:
    """Raise ValueError unless the arguments of `ssd_scan` agree: broadcasting would hide most slips."""
    if x.ndim != 4 or B.ndim != 4 or x.shape[1] < 1:
        raise ValueError(f"x must be (b, l >= 1, h, p) and B (b, l, g, n), got {tuple(x.shape)} and {tuple(B.shape)}")
    b, length, h, p = x.shape
    g, n = B.shape[2:]
    if h % g:
        raise ValueError(f"the number of groups must divide the number of heads, got g={g} and h={h}")
    expected = {
        "dt": (dt, (b, length, h)),
        "A": (A, (h,)),
        "B": (B, (b, length, g, n)),
        "C": (C, (b, length, g, n)),
        "D": (D, (h,)),
        "state": (state, (b, h, p, n)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")


def _without_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """Computing in the dtypes as they are. The meta device, on which FLOPs are counted, has no autocast to leave."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


@functools.cache
def fast_scan() -> Callable | None:
    """mamba-ssm's Triton kernel `mamba_chunk_scan_combined`; None without CUDA or without a mamba-ssm that imports."""
    if not torch.cuda.is_available():
        return None
    try:
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
    except Exception:  # built for another torch, CUDA or Triton, it fails in more ways than ImportError
        return None
    return mamba_chunk_scan_combined


def scan_backend() -> str:
    """The fastest scan that `Mamba2` has on this machine: "mamba-ssm <version> (Triton)" or "PyTorch"."""
    if fast_scan() is None:
        return "PyTorch"
    import mamba_ssm

    return f"mamba-ssm {mamba_ssm.__version__} (Triton)"


class Cache(NamedTuple):
    """All that `Mamba2` remembers of the past; its size does not depend on how much past there was."""

    conv: Tensor  # (b, d_conv - 1, conv_dim): the latest inputs of the convolution
    state: Tensor  # (b, h, p, n): the state of the scan


class RMSNormGated(nn.Module):
    """RMSNorm(y · SiLU(z)) over each of `groups` equal slices of the channels, in float32 (float64 for float64 inputs).

    mamba-ssm's module of that name with `norm_before_gate=False` and `group_size = dim // groups`.
    """

    def __init__(self, dim: int, groups: int = 1, eps: float = 1e-5) -> None:
        super().__init__()
        self.groups = groups
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        """y (..., dim), z (..., dim) -> (..., dim) in the dtype of z."""
        dtype = torch.promote_types(z.dtype, torch.float32)
        gated = (y.to(dtype) * F.silu(z.to(dtype))).unflatten(-1, (self.groups, -1))
        normed = F.rms_norm(gated, gated.shape[-1:], eps=self.eps).flatten(-2)
        return (normed * self.weight).to(z.dtype)


def scan_parameters(heads: int) -> tuple[nn.Parameter, nn.Parameter, nn.Parameter]:
    """What a scan learns besides its inputs, (h,) each: the bias of the step size before softplus, log(-A), and D. -A
    starts uniform in [1, 16], the step size log-uniform in [0.001, 0.1]. None of them is to decay."""
    dt = torch.empty(heads).uniform_(math.log(0.001), math.log(0.1)).exp_()
    bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
    found = bias, nn.Parameter(torch.empty(heads).uniform_(1, 16).log_()), nn.Parameter(torch.ones(heads))
    for parameter in found:
        parameter._no_weight_decay = True
    return found


class Mamba2(nn.Module):
    """The Mamba-2 layer (section 7, figure 6): causal, O(l); the residual and the norm in front are its user's.

    in_proj → [z, x, B, C, dt]; depthwise causal convolution, SiLU on [x, B, C]; scan; RMSNorm(y · SiLU(z)); out_proj.

    Arguments and parameters are named as in `mamba_ssm.modules.mamba2.Mamba2`, so state dicts travel both ways. One
    extension: d_inner is expand · d_model rounded *up* to a multiple of headdim, where mamba-ssm refuses a remainder.
    A_log, D and dt_bias carry `_no_weight_decay = True`: optimisers should exempt them.

    d_model is the width of input and output, d_state n, d_conv >= 1 the taps of the convolution, expand d_inner /
    d_model before rounding, headdim p, ngroups g, also of the normalisation. chunk_size is the Triton kernel's; the
    PyTorch scan takes at most 64, where it measured fastest. bias is of in_proj and out_proj. -A starts uniform in
    [1, 16], the step size log-uniform in [0.001, 0.1]. Raises ValueError unless ngroups divides h.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 128,
        d_conv: int = 4,
        expand: float = 2,
        headdim: int = 64,
        ngroups: int = 1,
        chunk_size: int = 256,
        bias: bool = False,
        conv_bias: bool = True,
    ) -> None:
        super().__init__()
        self.d_state = d_state
        self.d_conv = d_conv
        self.headdim = headdim
        self.ngroups = ngroups
        self.chunk_size = chunk_size
        self.nheads = math.ceil(expand * d_model / headdim)
        self.d_inner = self.nheads * headdim
        if self.nheads % ngroups:
            raise ValueError(f"ngroups={ngroups} must divide the number of heads, {self.nheads}")
        self.conv_dim = self.d_inner + 2 * ngroups * d_state

        self.in_proj = nn.Linear(d_model, self.d_inner + self.conv_dim + self.nheads, bias=bias)
        self.conv1d = nn.Conv1d(
            self.conv_dim, self.conv_dim, d_conv, groups=self.conv_dim, padding=d_conv - 1, bias=conv_bias
        )
        self.dt_bias, self.A_log, self.D = scan_parameters(self.nheads)
        self.norm = RMSNormGated(self.d_inner, ngroups)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias)

    def forward(self, u: Tensor) -> Tensor:
        """u (b, l, d_model), l >= 1 -> (b, l, d_model). Output t depends on inputs 0..t alone."""
        out, _ = self._run(u, None)
        return out

    def initial_cache(self, batch: int) -> Cache:
        """The empty past of `batch` sequences, on the layer's device, in float32 (float64 for a float64 layer)."""
        weight = self.in_proj.weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        return Cache(
            conv=weight.new_zeros(batch, self.d_conv - 1, self.conv_dim, dtype=dtype),
            state=weight.new_zeros(batch, self.nheads, self.headdim, self.d_state, dtype=dtype),
        )

    def step(self, u_t: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
        """Continue the sequences behind `cache` by u_t (b, 1, d_model) -> their outputs (b, 1, d_model), the new cache.

        Step by step this equals `forward` on the whole sequence, at a cost per step that does not grow with the past.
        Longer pieces (b, l, d_model) are welcome: that is how to read a prompt. The given cache is left unchanged.
        """
        return self._run(u_t, cache)

    def _run(self, u: Tensor, cache: Cache | None) -> tuple[Tensor, Cache | None]:
        z, xBC, dt = self.in_proj(u).split([self.d_inner, self.conv_dim, self.nheads], -1)
        dtype = torch.promote_types(z.dtype, torch.float32)  # z.dtype is what autocast chose

        xBC = xBC.to(dtype)
        window = F.pad(xBC, (0, 0, self.d_conv - 1, 0)) if cache is None else torch.cat([cache.conv, xBC], 1)
        weight, bias = (None if t is None else t.to(dtype) for t in (self.conv1d.weight, self.conv1d.bias))
        xBC = F.silu(_DepthwiseConv.apply(window, weight, bias))

        x, B, C = xBC.split([self.d_inner, self.ngroups * self.d_state, self.ngroups * self.d_state], -1)
        x = x.unflatten(-1, (self.nheads, self.headdim))
        B, C = (t.unflatten(-1, (self.ngroups, self.d_state)) for t in (B, C))
        dt = F.softplus(dt.to(dtype) + self.dt_bias)
        y, state = self._scan(x, dt, B, C, None if cache is None else cache.state, z.dtype)

        out = self.out_proj(self.norm(y.flatten(2), z))
        return out, None if cache is None else Cache(window[:, u.shape[1] :], state)

    def _scan(
        self, x: Tensor, dt: Tensor, B: Tensor, C: Tensor, state: Tensor | None, kernel_dtype: torch.dtype
    ) -> tuple[Tensor, Tensor | None]:
        """The scan by whatever is fastest here; a final state only if there is an initial one."""
        A = -self.A_log.to(dt.dtype).exp()
        remember = state is not None
        if remember and x.shape[1] == 1:
            y, state = ssd_step(x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], self.D, state)
            return y.unsqueeze(1), state
        kernel = fast_scan() if x.is_cuda and dt.dtype == torch.float32 else None  # the kernel knows no float64
        if kernel is None:
            result = ssd_scan(x, dt, A, B, C, self.D, min(self.chunk_size, 64), state, remember)
        else:
            x, B, C = (t.to(kernel_dtype) for t in (x, B, C))
            result = kernel(
                x, dt, A, B, C, self.chunk_size, D=self.D, initial_states=state, return_final_states=remember
            )
        return result if remember else (result, None)


class _DepthwiseConv(torch.autograd.Function):
    """Depthwise correlation over time: (b, l + k - 1, c), (c, 1, k) and (c,) or None -> (b, l, c).

    Channels-last images of height 1 have this very layout, and oneDNN's forward pass for them is 2 to 6 times faster on
    a CPU than conv1d or a sum of k shifted products. Its backward pass is not; hence the gradients here, with which
    both passes take 30 % of conv1d's time (16 × 256 × 384, k = 4).
    """

    @staticmethod
    def forward(ctx, window: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(window, weight)
        return _correlate(window, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        window, weight = ctx.saved_tensors
        length, taps = grad.shape[1], weight.shape[-1]
        grad_window = _correlate(grad, weight.flip(-1), None, padding=taps - 1)
        grad_weight = torch.empty_like(weight)
        product = torch.empty_like(grad)  # one buffer for all taps: fresh pages cost as much as the arithmetic
        for tap in range(taps):
            torch.mul(grad, window[:, tap : tap + length], out=product)
            grad_weight[:, 0, tap] = product.sum((0, 1))
        grad_bias = grad.sum((0, 1)) if ctx.needs_input_grad[2] else None
        return grad_window, grad_weight, grad_bias


def _correlate(sequence: Tensor, weight: Tensor, bias: Tensor | None, padding: int = 0) -> Tensor:
    """sequence (b, l, c) and weight (c, 1, k) -> (b, l + 2 padding - k + 1, c), in the dtype of the arguments."""
    image = sequence.transpose(1, 2).unsqueeze(2)  # (b, c, 1, l), a view that is channels-last already
    with _without_autocast(sequence.device):
        out = F.conv2d(image, weight.unsqueeze(2), bias, padding=(0, padding), groups=len(weight))
    return out.squeeze(2).transpose(1, 2)
