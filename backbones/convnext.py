"""ConvNeXt in the NeXtformer form: depthwise 7×7 convolutions and SwiGLU, both behind a norm.

The norm is ConvNeXt's own, LayerNorm over the channels (Liu et al. 2022): on CPUs it is one fused pass, three to eight
times faster than RMSNorm under bfloat16, which NeXtformer has and ``rms_norm`` chooses.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import Layer, PyramidDecoder, PyramidEncoder, mlp, zero_init

EPSILON = 1e-6  # of norms


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of (B, channels, H, W)."""

    def __init__(self, channels: int):
        super().__init__(channels, eps=EPSILON)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class RMSNorm2d(nn.RMSNorm):
    """RMSNorm over the channels of (B, channels, H, W), as plain operations: they need no other layout."""

    def __init__(self, channels: int):
        super().__init__(channels, eps=EPSILON)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + self.eps) * self.weight.view(-1, 1, 1)


class Depthwise(nn.Conv2d):
    """A depthwise convolution with an odd ``kernel`` that keeps the size of (B, channels, H, W): nn.Conv2d, but for how
    CPUs find its gradients (``_Depthwise``)."""

    def __init__(self, channels: int, kernel: int):
        super().__init__(channels, channels, kernel, padding=kernel // 2, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu":
            return super().forward(x)
        return _Depthwise.apply(x, self.weight, self.bias)


class _Depthwise(torch.autograd.Function):
    """The gradients of a depthwise convolution as two more of them, for which oneDNN has fast kernels.

    The input's is the convolution of the output's gradient with the mirrored weights. The weights' is each channel of
    each image convolved with a kernel as large as itself, the output's gradient, which takes a quarter to a half of the
    time of oneDNN's own pass for it. It is float32 (float64 for float64 weights), whatever autocast says.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y = F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=len(weight))
        ctx.save_for_backward(x.to(y.dtype), weight)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor]:
        x, weight = ctx.saved_tensors
        (images, channels, height, width), kernel = x.shape, weight.shape[-1]
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = F.conv2d(grad, weight.flip(2, 3).to(grad.dtype), padding=kernel // 2, groups=channels)
        if ctx.needs_input_grad[1]:
            planes = x.to(weight.dtype).permute(2, 3, 0, 1).reshape(1, height, width, -1).permute(0, 3, 1, 2)
            kernels = grad.to(weight.dtype).reshape(-1, 1, height, width)
            products = F.conv2d(planes, kernels, padding=kernel // 2, groups=images * channels)
            grad_weight = products.view(images, channels, kernel, kernel).sum(0).unsqueeze(1)
        return grad_x, grad_weight, grad.sum((0, 2, 3), dtype=weight.dtype)


class NeXtformerBlock(nn.Module):
    """x = dwconv7×7(norm(x)) + x; x = SwiGLU(norm(x)) + x, on (B, channels, H, W)."""

    def __init__(self, channels: int, norm: Layer = LayerNorm2d, token_norm: Layer = nn.LayerNorm):
        super().__init__()
        self.norm1 = norm(channels)
        self.depthwise = zero_init(Depthwise(channels, 7))
        self.norm2 = token_norm(channels)
        self.mlp = mlp(channels)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.depthwise(self.norm1(x))
        return x + self.mlp(self.norm2(x.movedim(1, -1))).movedim(-1, 1)


def convnext(side: Callable[..., nn.Module], *shape: int, rms_norm: bool = False, **options: Any) -> nn.Module:
    """PyramidEncoder or PyramidDecoder with blocks of either norm."""
    if not rms_norm:
        return side(NeXtformerBlock, LayerNorm2d, *shape, **options)
    token_norm = partial(nn.RMSNorm, eps=EPSILON)
    return side(partial(NeXtformerBlock, norm=RMSNorm2d, token_norm=token_norm), RMSNorm2d, *shape, **options)


Encoder = partial(convnext, PyramidEncoder)
Decoder = partial(convnext, PyramidDecoder)
