"""A guard that skips non-finite updates and ends the run with an error that names the loss part and the step."""

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
"""Scale of a GradScaler below which the scaling cannot be the cause of an overflow any more."""


class NonFiniteError(ValueError):
    """The error of a loss part or gradient that became NaN or inf. The message names it and the step."""


class FiniteGuard:
    """A guard that checks loss parts and gradients for NaN and inf on the device, so that the host never waits.

    ``first_step_P`` is the first step at which each part was not finite; it never returns to ``NEVER``. The host reads
    its minimum over all ranks when it waits anyway: before it logs and before it saves. P loss parts; the last entry is
    the gradient.
    """

    # An integer above every step, so that the minimum over steps and ranks is the first step.
    NEVER = 2**62

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.names: list[str] = []
        self.scaler: torch.amp.GradScaler | None = None
        self.half_answers: Mapping[tuple[str, str], Tensor] = {}
        """The last float16 outputs of the teacher's networks, by (recipe key, name); see ``half_answers``.

        Only an error message reads them.
        """
        self.first_step_P = torch.empty(0, dtype=torch.int64, device=device)

    def watch(self, losses: dict[str, Tensor], step: int | Tensor) -> None:
        """Record which of the named ``losses`` of ``step`` (counted from 1) are not finite."""
        if not self.names:
            self.names = [*losses, GRADIENT]
            self.first_step_P = torch.full((len(self.names),), self.NEVER, dtype=torch.int64, device=self.device)
        finite = torch.isfinite(torch.stack([value.detach().float() for value in losses.values()]))
        self._record(self.first_step_P[:-1], finite, step)

    def skip_step_if_nonfinite(
        self, optimizer: AcceleratedOptimizer, gradient_norm: Tensor, step: int | Tensor
    ) -> bool:
        """Make a fused ``optimizer`` skip ``step``, weights and state, if its gradients are not finite.

        Return whether the host must skip the step of another one, which cannot do so on the device. The host then waits
        for the gradients at every step.
        The gradients are averaged over the ranks by now, and a non-finite total has made them NaN
        (``propagate_nonfinite``). So every rank decides alike. With a GradScaler, the scaler skips the step, and an
        overflow of scaled gradients is no error. DeepSpeed has made its step already, or skipped it by the same norm,
        and does not read the flag.
        """
        if optimizer.scaler is not None:
            self.scaler = optimizer.scaler
            return False
        finite = torch.isfinite(gradient_norm.detach()).reshape(1)
        self._record(self.first_step_P[-1:], finite, step)
        inner = optimizer.optimizer
        if isinstance(inner, torch.optim.Optimizer) and not skips_on_device(inner):
            return not finite.item()
        # The attribute that GradScaler sets: a fused step reads it on the device, and does nothing where it is 1. An
        # ``if`` on the host would wait for the GPU at every step, and could not be captured in a CUDA graph.
        inner.found_inf = (~finite[0]).float()  # type: ignore[attr-defined]
        return False

    def _advice(self) -> str:
        """Return what the user can do, which depends on whether the teacher's outputs are not finite, or may be."""
        advice = "lower schedule.rate, or set precision: fp32"
        for (key, name), value in self.half_answers.items():
            if not value.isfinite().all():
                return f"the teacher's own {name} are not finite in float16; set {key}.dtype: bf16, or fp32"
        keys = dict.fromkeys(f"{key}.dtype: bf16" for key, _ in self.half_answers)
        return f"{advice}; or {', '.join(keys)}, if the teacher overflows float16" if keys else advice

    def _record(self, first_step: Tensor, finite: Tensor, step: int | Tensor) -> None:
        # In place and without a branch on the host: a captured CUDA graph repeats it for every step.
        torch.minimum(first_step, torch.where(finite, self.NEVER, step), out=first_step)

    def check(self) -> None:
        """Raise NonFiniteError if anything so far, on any rank, was not finite.

        All ranks must call it at the same step, because it is a collective.
        """
        first_steps = collectives.all_reduce_min(self.first_step_P).tolist()
        step = min(first_steps, default=self.NEVER)
        if step < self.NEVER:
            # Parts come before the total and the gradient in the dict, so the first of the earliest step is the cause.
            name = self.names[first_steps.index(step)]
            raise NonFiniteError(f"{name} became NaN or inf at step {step}; the update was skipped; {self._advice()}")
        if self.scaler is not None and self.scaler.get_scale() < SMALLEST_SCALE:
            raise NonFiniteError(f"{GRADIENT} was NaN or inf for many steps in a row, all skipped; use precision: bf16")


def skips_on_device(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether the optimizer's step reads a flag on the device and does nothing where it is set."""
    return getattr(optimizer, "_step_supports_amp_scaling", False)  # as GradScaler asks


def propagate_nonfinite(total: Tensor) -> Tensor:
    """Return ``total``; if it is not finite, its gradient becomes NaN."""
    # The all-reduce then makes the gradients NaN on every rank, so that all ranks skip the same step.
    return total * torch.where(torch.isfinite(total), 1.0, torch.nan).detach()
