"""A teacher that is the moving average of the student."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipeline.features.taps import FeatureTaps
from pipeline.optim.ema import EMA
from pipeline.optim.ema import Config as Averaging
from pipeline.teachers.follower import StudentFollower


class EMATeacher(StudentFollower):
    """A teacher that is the moving average of the student's weights ("mean teacher").

    Source: Tarvainen and Valpola, NeurIPS 2017, arXiv:1703.01780.
    """

    def __init__(
        self, taps: FeatureTaps, average: Averaging, *, batch: int, device: torch.device, autocast: torch.dtype | None
    ) -> None:
        super().__init__(taps, batch=batch, device=device, autocast=autocast)
        self.average = average

    def follow(self, student: nn.Module) -> None:
        """Copy the weights of ``student``, a plain network without wrappers, and average over them from now on."""
        super().follow(student)
        self.ema = EMA(self.average, student, into=dict(self.taps.model.named_parameters()))

    @torch.no_grad()
    def update(self, step: int | Tensor) -> None:
        """Update the averages after optimizer ``step``, counted from 1.

        Every rank must call it, because buffers are averaged.
        """
        self.ema.update(step)
        # Buffers are copied, not averaged over time: BatchNorm statistics are moving averages themselves.
        self.copy_buffers()
