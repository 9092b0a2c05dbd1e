"""The denoiser's convolution, and the batched weight gradient of a network that runs several times in a step.

On a CPU a 1×1 convolution is computed as a matrix product.

B batch, C channels, H W space. U is the number of uses of a weight in a step, O output and I input channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# The batched weight gradient, step by step:
#
# 1. The first call inside ``batched_weight_grad`` runs _BatchedWeightGrad on the weight.
#    It returns two placeholders for each use of the weight.
# 2. Each call runs _ConvolutionCall on its input, its two placeholders and a detached copy of the weight.
# 3. In backward, _ConvolutionCall computes the gradient of its input only.
#    As "gradients" of its placeholders it returns its input and its output gradient.
# 4. Autograd runs _BatchedWeightGrad.backward once, after all calls, with all inputs and all output gradients.
#    That computes one weight gradient over their concatenation.


class Convolution(nn.Conv2d):
    """A convolution of odd size that keeps height and width."""

    def __init__(self, in_channels: int, out_channels: int, size: int = 1) -> None:
        super().__init__(in_channels, out_channels, size, padding=size // 2)
        self.uses = 0
        """Most calls whose weight gradients are batched, see ``batched_weight_grad``; 0 if they are not."""
        self.slots: Iterator[tuple[Tensor, ...]] | None = None
        """Extra arguments of the calls that are still to come; None before the first call."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the convolved map."""
        # Without a weight gradient (a frozen network, no_grad) there is nothing to batch.
        if not (self.uses and self.weight.requires_grad and torch.is_grad_enabled()):
            return convolve(input, self.weight, self.bias)
        kind = input.device.type
        # The placeholders are made before the convolution runs, and need the dtype in which autocast will run it.
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else input.dtype
        if self.slots is None:
            self.slots = self._slots(input.shape, dtype)
        return _ConvolutionCall.apply(input.to(dtype), *next(self.slots))

    def _slots(self, shape: torch.Size, dtype: torch.dtype) -> Iterator[tuple[Tensor, ...]]:
        """Return an iterator over the calls' extra arguments: two placeholders, the weight and the bias."""
        assert self.bias is not None
        # Detached: the gradient of weight and bias comes from the placeholders alone. Cast here: once for all calls.
        cast = self.weight.detach().to(dtype), self.bias.detach().to(dtype)
        placeholders = _BatchedWeightGrad.apply(self.weight, self.bias, shape, dtype, self.uses)
        return ((*pair, *cast) for pair in zip(placeholders[::2], placeholders[1::2], strict=True))


def convolve(x_BCHW: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return the convolution of odd size that keeps height and width."""
    if _is_product(weight):
        return F.linear(x_BCHW.movedim(1, -1), weight.flatten(1), bias).movedim(-1, 1)
    return F.conv2d(x_BCHW, weight, bias, padding=weight.shape[-1] // 2)


@contextmanager
def batched_weight_grad(network: nn.Module, uses: int) -> Iterator[None]:
    """Compute each convolution's weight gradient once for all calls of ``network`` inside the context.

    The network may run at most ``uses`` times inside. With ``uses`` 0, gradients are computed as usual.

    Autograd would compute one weight gradient for each of U passes over N rows, and add them up. Here it is one product
    over U·N rows, which is the same sum. With few rows, writing and adding U weight-sized tensors costs more than the
    arithmetic.
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
    """One use of a weight. The "gradients" of its placeholders are its input and its output gradient."""

    @staticmethod
    def forward(ctx: Any, x_BCHW: Tensor, slot_x: Tensor, slot_grad: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        # The placeholders are not read. They are arguments only so that autograd asks for their gradients.
        ctx.save_for_backward(x_BCHW, weight)
        return convolve(x_BCHW, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x_BCHW, weight = ctx.saved_tensors
        # The input of a network's first convolution may need no gradient; computing it would be wasted work.
        return _input_gradient(grad, x_BCHW, weight) if ctx.needs_input_grad[0] else None, x_BCHW, grad, None, None


class _BatchedWeightGrad(torch.autograd.Function):
    """A function that computes the weight gradient of all uses of a convolution at once.

    Forward returns two placeholders for each use. As their gradients, backward receives the use's input and its output
    gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, bias: Tensor, shape: torch.Size, dtype: torch.dtype, uses: int
    ) -> tuple[Tensor, ...]:
        # The network may run fewer than ``uses`` times. Unused placeholders then have the gradient None, not zeros.
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(weight)
        # Autograd checks that a gradient has the shape and dtype of its tensor, so the placeholders need both.
        # Expanding one element gives them the shape without the memory.
        blank, shapes = weight.new_empty(1, dtype=dtype), [shape, (shape[0], len(weight), *shape[2:])] * uses
        return tuple(blank.expand(each) for each in shapes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *slots: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (weight,) = ctx.saved_tensors
        # Even positions are inputs, odd ones output gradients. Both are in the order of the calls, whatever the order
        # in which autograd ran their backward, so rows match and the sum is reproducible.
        x_BCHW, grad = (torch.cat([slot for slot in kind if slot is not None]) for kind in (slots[::2], slots[1::2]))
        gradient = _weight_gradient(grad, x_BCHW, weight.to(grad.dtype))
        return gradient.to(weight.dtype), grad.sum((0, 2, 3)).to(weight.dtype), None, None, None


def _is_product(weight: Tensor) -> bool:
    """Return whether to compute the convolution as a matrix product: a 1×1 one on a CPU.

    On a CPU the product is faster, by far for few rows. A GPU would convolve in TF32 but multiply in float32, so there
    the product would change the numbers.
    """
    return weight.shape[-1] == 1 and weight.device.type == "cpu"


def _input_gradient(grad: Tensor, x_BCHW: Tensor, weight: Tensor) -> Tensor:
    if _is_product(weight):
        return (grad.movedim(1, -1) @ weight.flatten(1)).movedim(-1, 1)
    return _convolution_backward(grad, x_BCHW, weight, [True, False, False])[0]


def _weight_gradient(grad: Tensor, x_BCHW: Tensor, weight: Tensor) -> Tensor:
    if _is_product(weight):
        # Every pixel is a row of the product. For channels-last tensors both calls return views and copy nothing.
        grad_NO, x_NI = (tensor.movedim(1, -1).flatten(0, -2) for tensor in (grad, x_BCHW))
        return (grad_NO.t() @ x_NI).view_as(weight)
    return _convolution_backward(grad, x_BCHW, weight, [False, True, False])[1]


def _convolution_backward(
    grad: Tensor, x_BCHW: Tensor, weight: Tensor, output_mask: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of input, weight and bias; only those that ``output_mask`` selects are computed."""
    padding = weight.shape[-1] // 2
    return torch.ops.aten.convolution_backward(
        grad, x_BCHW, weight, None, [1, 1], [padding, padding], [1, 1], False, [0, 0], 1, output_mask
    )
