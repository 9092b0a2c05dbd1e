"""Autocast, activation checkpointing, and the conversion of half-precision outputs to float32."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pipeline.batch import Outputs

AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Autocast dtype by the recipe's ``precision``."""


def autocast_call(dtype: torch.dtype | None, network: Callable[..., Tensor], x: Tensor, *more: Tensor) -> Tensor:
    """Return the network's output under autocast to ``dtype`` (None: no autocast), in the dtype of ``x``."""
    with autocast(x, dtype):
        return network(x, *more).to(x.dtype)


def checkpointed(function: Callable[..., Tensor], x: Tensor, *more: Tensor) -> Tensor:
    """Return ``function(x, …)`` without storing its activations; backward computes them again.

    The function must draw no random numbers. On the meta device, where operations are counted, it runs only once.
    """
    if x.device.type == "meta":
        return function(x, *more)
    output = checkpoint(function, x, *more, use_reentrant=False, preserve_rng_state=False)
    assert isinstance(output, Tensor)
    return output


def autocast(x: Tensor, dtype: torch.dtype | None) -> AbstractContextManager[object]:
    """Return the context for autocast to ``dtype`` on the device of ``x`` (None: no autocast)."""
    if x.device.type == "meta":  # torch has no autocast there, and only shapes are computed
        return nullcontext()
    return torch.autocast(x.device.type, dtype=dtype, enabled=dtype is not None)


def promote_to_float32(outputs: Outputs) -> Outputs:
    """Return ``outputs`` with half-precision tensors in float32; float32 and float64 stay as they are."""

    def promote(x: Tensor) -> Tensor:
        return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x

    return Outputs(promote(outputs.logits), {name: promote(x) for name, x in outputs.features.items()})
