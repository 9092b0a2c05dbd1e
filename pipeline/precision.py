"""Autocast, recomputation in backward, and half-precision answers in float32."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pipeline.batch import Outputs

AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
"""The autocast type of a recipe's ``precision``."""


def autocast_call(dtype: torch.dtype | None, network: Callable[..., Tensor], x: Tensor, *more: Tensor) -> Tensor:
    """Return the network's answer under that autocast type, None for none, brought back to the dtype of ``x``."""
    with autocast(x, dtype):
        return network(x, *more).to(x.dtype)


def checkpointed(function: Callable[..., Tensor], x: Tensor, *more: Tensor) -> Tensor:
    """Return ``function(x, …)``, which draws nothing; backward computes it again, and what is inside is not kept.

    On the meta device, where operations are counted, none is done twice.
    """
    if x.device.type == "meta":
        return function(x, *more)
    found = checkpoint(function, x, *more, use_reentrant=False, preserve_rng_state=False)
    assert isinstance(found, Tensor)
    return found


def autocast(x: Tensor, dtype: torch.dtype | None) -> AbstractContextManager[object]:
    """Return the context that computes with ``x`` under that autocast type, None for none."""
    if x.device.type == "meta":  # where shapes are computed and numbers are not; torch has no autocast there
        return nullcontext()
    return torch.autocast(x.device.type, dtype=dtype, enabled=dtype is not None)


def promote_to_float32(outputs: Outputs) -> Outputs:
    """Return ``outputs`` with half-precision tensors in float32; float32 and float64 pass as they are."""

    def promote(x: Tensor) -> Tensor:
        return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x

    return Outputs(promote(outputs.logits_BK), {name: promote(x) for name, x in outputs.features.items()})
