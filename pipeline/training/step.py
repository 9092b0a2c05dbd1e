"""A training step: forward and backward of a micro-batch, and the update that ends a global batch.

The host reads no value in it, and it returns only tensors, so that it can be captured as a CUDA graph (``graph.py``).
The differences of ZeRO are hidden here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from pipeline.batch import Batch, Outputs, Progress
from pipeline.distiller import Distiller
from pipeline.distributed import collectives
from pipeline.errors import RecipeError
from pipeline.optim.ema import EMA
from pipeline.optim.guard import FiniteGuard
from pipeline.teachers.cached import AnyTeacher, half_answers
from pipeline.teachers.peers import FollowingTeacher
from pipeline.training.timer import StepTimer


class StepOutput(NamedTuple):
    """The results of a step, on the device, for the journal."""

    names: tuple[str, ...]
    parts_P: Tensor
    """The micro-batch's weighted parts of the loss, ``total`` and the training metric, in the order of ``names``."""
    gradient_norm: Tensor | None
    """Norm before clipping; None unless the micro-batch ends a global batch."""


class Step:
    """The work on a micro-batch: teacher, student, losses and backward.

    The end of a global batch adds the optimizer step, the losses' memory banks and the moving averages.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        distiller: nn.Module,
        teacher: AnyTeacher | None,
        optimizer: Any,
        averages: Iterable[EMA | FollowingTeacher],
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

    def __call__(
        self, batch: Batch, progress: Progress, answers: Outputs | None = None, number: Tensor | None = None
    ) -> StepOutput:
        """Train on a micro-batch of the step that begins at ``progress``.

        ``answers`` are the teacher's outputs for the batch; None computes them here. ``number`` is the step's number,
        counted from 1, as a tensor: a captured step needs it on the device.
        """
        current = progress.step + 1 if number is None else number
        # Within a global batch this context turns off DDP's all-reduce.
        with self.accelerator.accumulate(self.distiller):
            losses = self._forward_backward(batch, progress, answers)
            self.guard.watch(losses, current)
            parts_P = torch.stack([value.detach() for value in losses.values()])
            norm = self._update(current)
            self.timer.lap("optimizer")
        if norm is not None:
            self.unwrapped.commit()  # the losses' memory banks store the global batch
            for average in self.averages:
                average.update(current)
        return StepOutput(tuple(losses), parts_P, norm)

    def _forward_backward(self, batch: Batch, progress: Progress, answers: Outputs | None) -> dict[str, Tensor]:
        """Accumulate the gradients of a micro-batch, and return the parts of its loss, with ``total``."""
        self.guard.half_answers = {}  # frees the previous ones, so that the teacher can reuse their memory
        with self.timer("teacher"):
            if self.teacher and answers is None:
                answers = self.teacher(batch)
        if self.teacher and answers:
            self.guard.half_answers = half_answers(self.teacher, answers)
        losses = self.distiller(batch, answers, progress, self.timer)
        if not losses["total"].requires_grad:
            raise RecipeError(
                "losses: none depends on a parameter that trains; change student.freeze or student.train, or add a loss"
            )
        with self.timer.backward(losses["total"]):
            self.accelerator.backward(losses["total"])
        return losses

    def _update(self, number: int | Tensor) -> Tensor | None:
        """Update the weights at the end of a global batch, and return the gradients' norm before clipping.

        Return None within a global batch. The weights do not change if a gradient is not finite.
        """
        norm, skipped = None, False
        if self.accelerator.sync_gradients:
            norm = clip_gradients(self.accelerator, self.distiller, self.clip)
            # Sets a flag on the device that a fused optimizer reads: an ``if`` would make the host wait.
            skipped = self.guard.skip_step_if_nonfinite(self.optimizer, norm, number)
        # Accelerate's wrapper ignores both calls within a global batch.
        if not skipped:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm


def clip_gradients(accelerator: Accelerator, distiller: nn.Module, largest: float | None) -> Tensor:
    """Scale the gradients down to the norm ``largest``, unless it is None, and return their norm before that."""
    if accelerator.deepspeed_plugin is not None:
        # DeepSpeed has already clipped and stepped inside backward; this call only reads its norm, a Python number.
        norm = accelerator.clip_grad_norm_(distiller.parameters(), math.inf if largest is None else largest)
        return torch.as_tensor(norm, device=accelerator.device)
    accelerator.unscale_gradients()
    gradients = [parameter.grad for parameter in distiller.parameters() if parameter.grad is not None]
    norm = gradient_norm(gradients)
    if largest is not None:
        # ``clip_grad_norm_`` would compute the norm a second time, in float32.
        nn.utils.clip_grads_with_norm_(distiller.parameters(), largest, norm)
    return norm


def gradient_norm(gradients: Sequence[Tensor]) -> Tensor:
    """Return the norm of all gradients as one vector, in float32 and exact to its last bit.

    It takes few kernels, all of which a CUDA graph can capture. ``nn.utils.get_total_norm`` copies from host memory
    that is not pinned, which cannot be captured. The squares are added in float64, because float32 on a CPU loses
    digits over a long vector.
    """
    vector = torch.cat([_flatten_in_memory_order(gradient) for gradient in gradients])
    return torch.linalg.vector_norm(vector, dtype=torch.float64).float()


def _flatten_in_memory_order(x: Tensor) -> Tensor:
    """Return the elements of a tensor as a vector, without a copy if the tensor is dense."""
    # ``flatten`` keeps the order of the indices, so it would copy every channels-last gradient. A norm needs no order.
    extent = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.as_strided((x.numel(),), (1,)) if extent == x.numel() else x.flatten()


def seed_draws(seed: int, step: int) -> None:
    """Seed torch's default generators for one step: the CPU's and that of this rank's GPU.

    A resumed run therefore repeats the draws of an uninterrupted one, and no generator state needs to be saved. The
    micro-batches of a step draw one after the other from the same seed.
    """
    # SeedSequence mixes the three numbers: with a plain sum, step 1 of seed 0 would draw like step 0 of seed 1. The
    # rank is one of them, so that the ranks draw different noise for their different images.
    mixed = np.random.SeedSequence([seed, step, collectives.rank()]).generate_state(1, np.uint64)
    step_seed = int(mixed[0])
    # ``torch.manual_seed`` gives the same draws but takes many times as long: it also looks for other kinds of devices.
    torch.default_generator.manual_seed(step_seed)
    # A process that trains on its CPU must not initialize CUDA here.
    if torch.cuda.is_initialized():
        # A graph reads this generator's seed at every replay, so a captured step draws what an eager step would.
        torch.cuda.default_generators[torch.cuda.current_device()].manual_seed(step_seed)
