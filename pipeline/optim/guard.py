"""A non-finite update never reaches the weights, and ends the run with the loss part and the step that caused it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pipeline.distributed import collectives

if TYPE_CHECKING:
    from accelerate.optimizer import AcceleratedOptimizer

GRADIENT = "the gradient"
SMALLEST_SCALE = 2.0**-20
"""A GradScaler's scale that no overflow of scaled gradients explains."""


class NonFiniteError(ValueError):
    """A loss part or a gradient stopped being finite; the message names it and the step."""


class FiniteGuard:
    """Watches loss parts and gradients on the device, without a wait of the host.

    ``first_step_P`` is sticky: the first step at which each part was not finite. The host reads it, agreed over all
    ranks, where it waits anyway (when it logs and before it saves). P loss parts; the last entry is the gradient.
    """

    NEVER = 2**62

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.names: list[str] = []
        self.scaler: torch.amp.GradScaler | None = None
        self.half_answers: Mapping[tuple[str, str], Tensor] = {}
        """What the teacher's networks that compute in float16 answered last, by key and name (``half_answers``).

        Looked at only to say what was not finite.
        """
        self.first_step_P = torch.empty(0, dtype=torch.int64, device=device)

    def watch(self, losses: dict[str, Tensor], step: int | Tensor) -> None:
        """Note which of the named ``losses`` of ``step`` (counted from 1) are not finite."""
        if not self.names:
            self.names = [*losses, GRADIENT]
            self.first_step_P = torch.full((len(self.names),), self.NEVER, dtype=torch.int64, device=self.device)
        finite = torch.isfinite(torch.stack([value.detach().float() for value in losses.values()]))
        self._note(self.first_step_P[:-1], finite, step)

    def skip_step_if_nonfinite(
        self, optimizer: AcceleratedOptimizer, gradient_norm: Tensor, step: int | Tensor
    ) -> None:
        """Make the fused ``optimizer`` leave weights and momentum alone in ``step`` if its gradients are not finite.

        The gradients have been averaged over the ranks, and a non-finite total makes them non-finite (``poisoned``), so
        every rank decides alike. Under a GradScaler it is the scaler that skips, and an overflow of scaled gradients is
        no error. DeepSpeed, which has stepped by now, has skipped by the same norm, and does not read the flag.
        """
        if optimizer.scaler is not None:
            self.scaler = optimizer.scaler
            return
        finite = torch.isfinite(gradient_norm.detach()).reshape(1)
        self._note(self.first_step_P[-1:], finite, step)
        optimizer.optimizer.found_inf = (~finite[0]).float()  # type: ignore[attr-defined]

    def _advice(self) -> str:
        """Return what to do; it depends on whether it is the teacher that is not finite, or may be."""
        advice = "lower schedule.rate, or precision: fp32"
        for (key, name), value in self.half_answers.items():
            if not value.isfinite().all():
                return f"the teacher's own {name} are not finite in float16; give {key}.dtype: bf16, or fp32"
        keys = dict.fromkeys(f"{key}.dtype: bf16" for key, _ in self.half_answers)
        return f"{advice}; or {', '.join(keys)}, if the teacher overflows float16" if keys else advice

    def _note(self, first_step: Tensor, finite: Tensor, step: int | Tensor) -> None:
        torch.minimum(first_step, torch.where(finite, self.NEVER, step), out=first_step)

    def check(self) -> None:
        """Raise NonFiniteError if anything so far, on any rank, was not finite. Every rank calls it at one step."""
        first_steps = collectives.all_reduce_min(self.first_step_P).tolist()
        step = min(first_steps, default=self.NEVER)
        if step < self.NEVER:
            # Parts come before the total and the gradient in the dict, so the first of the earliest step is the cause.
            name = self.names[first_steps.index(step)]
            raise NonFiniteError(f"{name} is not finite at step {step}, which touched no weight; {self._advice()}")
        if self.scaler is not None and self.scaler.get_scale() < SMALLEST_SCALE:
            raise NonFiniteError(f"{GRADIENT} was not finite for many steps on end, all skipped; use precision: bf16")


def propagate_nonfinite(total: Tensor) -> Tensor:
    """Return ``total`` with a gradient of NaN where it is not finite itself, so that averaging tells every rank."""
    return total * torch.where(torch.isfinite(total), 1.0, torch.nan).detach()
