"""A training step: forward and backward of a micro-batch, and the update that ends a global batch.

Both ask the host nothing and return tensors only. What ZeRO does otherwise is hidden here.
"""

from __future__ import annotations

import math
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
    if largest is None and accelerator.deepspeed_plugin is None:
        accelerator.unscale_gradients()
        gradients = [parameter.grad for parameter in distiller.parameters() if parameter.grad is not None]
        return nn.utils.get_total_norm(gradients)
    # DeepSpeed, which has clipped and stepped in backward, gives a number.
    norm = accelerator.clip_grad_norm_(distiller.parameters(), math.inf if largest is None else largest)
    return torch.as_tensor(norm, device=accelerator.device)


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
