"""A training step: forward and backward of a micro-batch, and the update that ends a global batch.

Both ask the host nothing and return tensors only. What ZeRO does otherwise is hidden here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from pipeline.batch import Batch, Progress
from pipeline.distributed import collectives
from pipeline.optim.guard import FiniteGuard
from pipeline.teachers.cached import AnyTeacher
from pipeline.training.timer import StepTimer


def forward_backward(
    accelerator: Accelerator,
    distiller: nn.Module,
    teacher: AnyTeacher | None,
    batch: Batch,
    progress: Progress,
    timer: StepTimer,
) -> dict[str, Tensor]:
    """Return the weighted parts of the loss of a micro-batch, with ``total``, whose gradients are added up."""
    with timer("teacher"):
        answers = teacher(batch) if teacher else None
    losses = distiller(batch, answers, progress, timer)
    with timer.backward(losses["total"]):
        accelerator.backward(losses["total"])
    return losses


def update(
    accelerator: Accelerator, distiller: nn.Module, optimizer: Any, clip: float | None, guard: FiniteGuard, step: int
) -> Tensor | None:
    """Take the step, counted from 1, that ends a global batch; return the norm its gradients had before clipping.

    Within a global batch nothing is done, and there is None. Where the gradient is not finite the weights stay.
    """
    norm = None
    if accelerator.sync_gradients:
        norm = clip_gradients(accelerator, distiller, clip)
        guard.arm(optimizer, norm, step)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def clip_gradients(accelerator: Accelerator, distiller: nn.Module, largest: float | None) -> Tensor:
    """Scale the gradients down to the ``largest`` norm, if there is one, and return the norm they had."""
    if accelerator.deepspeed_plugin is not None:
        # DeepSpeed, which has clipped and stepped in backward, gives a number.
        norm = accelerator.clip_grad_norm_(distiller.parameters(), math.inf if largest is None else largest)
        return torch.as_tensor(norm, device=accelerator.device)
    accelerator.unscale_gradients()
    gradients = [parameter.grad for parameter in distiller.parameters() if parameter.grad is not None]
    norm = gradient_norm(gradients)
    if largest is not None:
        nn.utils.clip_grads_with_norm_(distiller.parameters(), largest, norm)
    return norm


def gradient_norm(gradients: Sequence[Tensor]) -> Tensor:
    """Return the norm of all gradients as one vector, in float32 and exact to its last bit.

    Few kernels, which a CUDA graph can capture; ``nn.utils.get_total_norm`` copies from memory of the host that is not
    pinned. The squares are added in float64: over one long vector a CPU's float32 loses digits. Each gradient is taken
    as it lies in memory: rows of a map with channels last would be copied first.
    """
    vector = torch.cat([_as_it_lies(gradient) for gradient in gradients])
    return torch.linalg.vector_norm(vector, dtype=torch.float64).float()


def _as_it_lies(x: Tensor) -> Tensor:
    """Return the numbers of a tensor as a vector, in the order of its memory and nothing copied where it is dense."""
    extent = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.as_strided((x.numel(),), (1,)) if extent == x.numel() else x.flatten()


def seed_draws(seed: int, step: int) -> None:
    """Seed torch's default generators for one step: the draws of a run repeat, and none of their state needs saving.

    The CPU's and this rank's GPU's. ``torch.manual_seed`` gives the same draws, and takes many times as long: it looks
    for every kind of device that there is none of.
    """
    numbers = np.random.SeedSequence([seed, step, collectives.rank()]).generate_state(1, np.uint64)
    number = int(numbers[0])
    torch.default_generator.manual_seed(number)
    if torch.cuda.is_initialized():
        torch.cuda.default_generators[torch.cuda.current_device()].manual_seed(number)
