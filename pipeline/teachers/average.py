"""A teacher that is the moving average of the student."""

from __future__ import annotations

import torch
from torch import nn

from pipeline.distributed import collectives
from pipeline.features.taps import FeatureTaps
from pipeline.optim.ema import EMA
from pipeline.optim.ema import Config as Averaging
from pipeline.teachers.frozen import Teacher


class EMATeacher(Teacher):
    """The moving average of the student's weights: mean teacher, Tarvainen and Valpola, NeurIPS 2017, arXiv:1703.01780.

    It answers in evaluation mode, with the student's BatchNorm statistics, which under DDP are the ranks' mean: every
    rank has the same teacher. Weights are float32 and the forward runs under ``autocast``: of the precisions bf16
    rather than fp16, because the first statistics fit no network yet, and deep ones answer with more than 65504.
    """

    def __init__(
        self, taps: FeatureTaps, average: Averaging, *, batch: int, device: torch.device, autocast: torch.dtype | None
    ) -> None:
        super().__init__(
            taps, batch=batch, image_size=0, dtype=torch.float32, device=device, fold=False, autocast=autocast
        )
        self.average = average
        self.norms = {}  # They move, and what a loss takes from them it takes once.

    def follow(self, student: nn.Module) -> None:
        """Begin as that plain network is, and follow it from now on."""
        network = self.taps.model
        network.load_state_dict(student.state_dict())
        self.ema = EMA(self.average, student, into=dict(network.named_parameters()))

    @torch.no_grad()
    def update(self) -> None:
        """Follow the student by one step; every rank calls it."""
        self.ema.update()
        with collectives.average_buffers(self.ema.network):
            for own, students in zip(self.taps.model.buffers(), self.ema.network.buffers(), strict=True):
                own.copy_(students)
