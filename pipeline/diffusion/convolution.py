"""The denoiser's convolution: on a CPU a 1×1 one is the matrix product that it is, and what is used in many passes is
differentiated once.

B batch, C channels, H W space.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class Convolution(nn.Conv2d):
    """A convolution of odd size that keeps height and width."""

    def __init__(self, in_channels: int, out_channels: int, size: int = 1) -> None:
        super().__init__(in_channels, out_channels, size, padding=size // 2)
        self.uses = 0
        """How often it is used where its weight is differentiated once, see ``differentiated_once``; 0 elsewhere."""
        self.slots: Iterator[tuple[Tensor, ...]] | None = None

    def forward(self, input: Tensor) -> Tensor:
        """Return the convolved map."""
        if not (self.uses and self.weight.requires_grad and torch.is_grad_enabled()):
            return convolve(input, self.weight, self.bias)
        kind = input.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else input.dtype
        if self.slots is None:
            self.slots = self._slots(input.shape, dtype)
        return _ConvolutionCall.apply(input.to(dtype), *next(self.slots))

    def _slots(self, shape: torch.Size, dtype: torch.dtype) -> Iterator[tuple[Tensor, ...]]:
        """Yield for each use what it needs besides its input: its ends, and weight and bias, cast once for all."""
        assert self.bias is not None
        cast = self.weight.detach().to(dtype), self.bias.detach().to(dtype)
        ends = _BatchedWeightGrad.apply(self.weight, self.bias, shape, dtype, self.uses)
        return ((*pair, *cast) for pair in zip(ends[::2], ends[1::2], strict=True))


def convolve(x_BCHW: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return the convolution of odd size that keeps height and width."""
    if _is_product(weight):
        return F.linear(x_BCHW.movedim(1, -1), weight.flatten(1), bias).movedim(-1, 1)
    return F.conv2d(x_BCHW, weight, bias, padding=weight.shape[-1] // 2)


@contextmanager
def batched_weight_grad(network: nn.Module, uses: int) -> Iterator[None]:
    """Inside, the network runs at most ``uses`` times, and backward computes each convolution's gradient in one go.

    Of U passes of N rows the gradient is one product over U·N rows in place of U products that are then added up: the
    same sum. With few rows those U weights, written and added, cost more than the arithmetic.
    """
    convolutions = [module for module in network.modules() if isinstance(module, Convolution)]
    for convolution in convolutions:
        convolution.uses = uses
    try:
        yield
    finally:
        for convolution in convolutions:
            convolution.uses, convolution.slots = 0, None


class _ConvolutionCall(torch.autograd.Function):
    """One use of a weight. Its ends' gradients are what the weight's is made of: the input, and the output's own."""

    @staticmethod
    def forward(ctx: Any, x_BCHW: Tensor, end_x: Tensor, end_grad: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x_BCHW, weight)
        return convolve(x_BCHW, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x_BCHW, weight = ctx.saved_tensors
        return _input_gradient(grad, x_BCHW, weight) if ctx.needs_input_grad[0] else None, x_BCHW, grad, None, None


class _BatchedWeightGrad(torch.autograd.Function):
    """Two ends for each use of a weight, which hold no numbers; what comes back through them is all that it takes."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, bias: Tensor, shape: torch.Size, dtype: torch.dtype, uses: int
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(weight)
        blank, shapes = weight.new_empty(1, dtype=dtype), [shape, (shape[0], len(weight), *shape[2:])] * uses
        return tuple(blank.expand(each) for each in shapes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *ends: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (weight,) = ctx.saved_tensors
        x_BCHW, grad = (torch.cat([end for end in kind if end is not None]) for kind in (ends[::2], ends[1::2]))
        gradient = _weight_gradient(grad, x_BCHW, weight.to(grad.dtype))
        return gradient.to(weight.dtype), grad.sum((0, 2, 3)).to(weight.dtype), None, None, None


def _is_product(weight: Tensor) -> bool:
    """Whether to compute a product of matrices, which a 1×1 convolution is.

    On a CPU it is the quicker, for few rows by far; a GPU convolves in TF32 where it multiplies in float32.
    """
    return weight.shape[-1] == 1 and weight.device.type == "cpu"


def _input_gradient(grad: Tensor, x_BCHW: Tensor, weight: Tensor) -> Tensor:
    if _is_product(weight):
        return (grad.movedim(1, -1) @ weight.flatten(1)).movedim(-1, 1)
    return _backward(grad, x_BCHW, weight, [True, False, False])[0]


def _weight_gradient(grad: Tensor, x_BCHW: Tensor, weight: Tensor) -> Tensor:
    if _is_product(weight):
        grad_NO, x_NI = (tensor.movedim(1, -1).flatten(0, -2) for tensor in (grad, x_BCHW))
        return (grad_NO.t() @ x_NI).view_as(weight)
    return _backward(grad, x_BCHW, weight, [False, True, False])[1]


def _backward(grad: Tensor, x_BCHW: Tensor, weight: Tensor, wanted: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    side = weight.shape[-1] // 2
    return torch.ops.aten.convolution_backward(
        grad, x_BCHW, weight, None, [1, 1], [side, side], [1, 1], False, [0, 0], 1, wanted
    )
