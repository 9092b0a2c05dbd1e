"""Convolutions for the GPU that computes nothing: tensors of the right shape, where cuDNN would be asked."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

convolutions: Counter[str] = Counter()
"""How many there have been, under the name ``convolutions``."""
_registered: list[torch.library.Library] = []


def register() -> None:
    """Turn cuDNN off and let blanks stand for convolutions until the process ends."""
    torch.backends.cudnn.enabled = False
    library = torch.library.Library("aten", "IMPL")
    library.impl("convolution", convolution, "CUDA")
    library.impl("convolution_backward", convolution_backward, "CUDA")
    _registered.append(library)


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, stride, padding, dilation, transposed, more, groups):
    """Return a blank of the shape that the convolution has."""
    convolutions["convolutions"] += 1
    pairs = zip(x.shape[2:], weight.shape[2:], stride, padding, dilation, more, strict=True)
    if transposed:
        channels = weight.shape[1] * groups
        sides = [(size - 1) * s - 2 * p + d * (k - 1) + m + 1 for size, k, s, p, d, m in pairs]
    else:
        channels = weight.shape[0]
        sides = [(size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, p, d, _ in pairs]
    blank = torch.empty((len(x), channels, *sides), dtype=x.dtype, device=x.device)
    return blank.contiguous(memory_format=torch.channels_last)


def convolution_backward(grad, x, weight, bias_sizes, stride, padding, dilation, transposed, more, groups, mask):
    """Return blanks for the gradients that are asked for."""
    convolutions["convolutions"] += sum(mask[:2])
    bias = grad.new_empty(grad.shape[1]) if mask[2] else None
    return torch.empty_like(x) if mask[0] else None, torch.empty_like(weight) if mask[1] else None, bias
