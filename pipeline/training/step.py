"""A training step: forward and backward of a micro-batch, and the update that ends a global batch.

It asks the host nothing and returns tensors only, so that it can be captured as a CUDA graph (``graph.py``). What ZeRO
does otherwise is hidden here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from pipeline.batch import Batch, Progress
from pipeline.distiller import Distiller
from pipeline.distributed import collectives
from pipeline.optim.ema import EMA
from pipeline.optim.guard import FiniteGuard
from pipeline.teachers.average import EMATeacher
from pipeline.teachers.cached import AnyTeacher, half_answers
from pipeline.training.timer import StepTimer


class StepOutput(NamedTuple):
    """What a step leaves on the device for the journal."""

    names: tuple[str, ...]
    parts_P: Tensor
    """The weighted parts of the micro-batch's loss, with ``total`` and ``top1``, in the order of ``names``."""
    gradient_norm: Tensor | None
    """Before clipping; None within a global batch."""


class Step:
    """What the device does with a micro-batch: teacher, student, losses, backward and, where a global batch ends, the
    update, and what follows the weights.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        distiller: nn.Module,
        teacher: AnyTeacher | None,
        optimizer: Any,
        averages: Iterable[EMA | EMATeacher],
        clip: float | None,
        guard: FiniteGuard,
        timer: StepTimer,
    ) -> None:
        self.accelerator = accelerator
        self.distiller = distiller
        self.unwrapped = cast(Distiller, accelerator.unwrap_model(distiller))
        self.teacher = teacher
        self.optimizer = optimizer
        self.averages = tuple(averages)
        self.clip = clip
        self.guard = guard
        self.timer = timer

    def __call__(self, batch: Batch, progress: Progress, number: Tensor | None = None) -> StepOutput:
        """Learn from a micro-batch of the step that begins at ``progress``.

        ``number`` is that step's, counted from 1, where it has to be on the device.
        """
        current = progress.step + 1 if number is None else number
        with self.accelerator.accumulate(self.distiller):
            losses = self._forward_backward(batch, progress)
            self.guard.watch(losses, current)
            parts_P = torch.stack([value.detach() for value in losses.values()])
            norm = self._update(current)
            self.timer.lap("optimizer")
        if norm is not None:
            self.unwrapped.commit()  # the losses' banks take in the global batch
            for average in self.averages:
                average.update()
        return StepOutput(tuple(losses), parts_P, norm)

    def _forward_backward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """Return the parts of the loss of a micro-batch, with ``total``, whose gradients are added up."""
        self.guard.half_answers = {}  # whose memory the next ones may take
        with self.timer("teacher"):
            answers = self.teacher(batch) if self.teacher else None
        if self.teacher and answers:
            self.guard.half_answers = half_answers(self.teacher, answers)
        losses = self.distiller(batch, answers, progress, self.timer)
        with self.timer.backward(losses["total"]):
            self.accelerator.backward(losses["total"])
        return losses

    def _update(self, number: int | Tensor) -> Tensor | None:
        """Move the weights where a global batch ends, and return the norm their gradients had before clipping.

        Within a global batch nothing is done, and there is None. Where a gradient is not finite the weights stay.
        """
        norm = None
        if self.accelerator.sync_gradients:
            norm = clip_gradients(self.accelerator, self.distiller, self.clip)
            self.guard.skip_step_if_nonfinite(self.optimizer, norm, number)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
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
