"""Gradient checkpointing: the backward computes the inside of a network's blocks again, so that none of it is kept.

Numbers are those without it. The second forward of a block draws the random numbers of the first. It works on copies of
the block's buffers, as they were before the first. So BatchNorm's running statistics are updated once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def checkpoint_blocks(model: nn.Module) -> None:
    """Let the network's blocks be computed again in the backward. Raises ValueError if it has none."""
    found = list(blocks(model))
    if not found:
        raise ValueError(f"{type(model).__name__} has no sequence of blocks to compute again; remove checkpoint")
    for block in found:
        # The method, so that the block's own hooks and the names in the state dict stay as they are.
        block.forward = partial(_checkpointed, block, block.forward)


def blocks(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the outermost modules with modules of their own in a ``Sequential``, ``ModuleList`` or ``ModuleDict``."""
    containers = (nn.Sequential, nn.ModuleList)
    for child in model.children():
        # A ModuleDict in another container is a block itself: DenseNet's.
        if isinstance(model, (*containers, nn.ModuleDict)) and not isinstance(child, containers):
            if any(True for _ in child.children()) and any(True for _ in child.parameters()):
                yield child
        else:
            yield from blocks(child)


def _checkpointed(block: nn.Module, forward: Any, *args: Any, **keys: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **keys)
    before = {
        (module, name): buffer.clone()
        for module in block.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    }

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _replaced(before)

    return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **keys)


@contextmanager
def _replaced(buffers: dict[tuple[nn.Module, str], Tensor]) -> Iterator[None]:
    """Put other tensors in the place of modules' buffers inside the context."""
    own = {(module, name): module._buffers[name] for module, name in buffers}
    try:
        for (module, name), buffer in buffers.items():
            module._buffers[name] = buffer.clone()  # the graph may be walked again
        yield
    finally:
        for (module, name), buffer in own.items():
            module._buffers[name] = buffer
