"""A teacher that is the moving average of the student."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipeline.distributed import collectives
from pipeline.features.taps import FeatureTaps
from pipeline.optim.ema import EMA
from pipeline.optim.ema import Config as Averaging
from pipeline.teachers.frozen import Teacher


class EMATeacher(Teacher):
    """A teacher that is the moving average of the student's weights ("mean teacher").

    It runs in evaluation mode, with the student's BatchNorm statistics. Under DDP these are averaged over the ranks, so
    that every rank has the same teacher. Weights are float32, and the forward runs under ``autocast``. Its half
    precision is bf16 and not fp16: early statistics do not fit the network yet, and the outputs of deep networks then
    exceed 65504. Source: Tarvainen and Valpola, NeurIPS 2017, arXiv:1703.01780.
    """

    def __init__(
        self, taps: FeatureTaps, average: Averaging, *, batch: int, device: torch.device, autocast: torch.dtype | None
    ) -> None:
        super().__init__(
            taps, batch=batch, image_size=0, dtype=torch.float32, device=device, fold=False, autocast=autocast
        )
        self.average = average
        # Losses read these parameters once, when they are built; those of a moving average would soon be outdated.
        self.norms = {}
        self.head_KD = None

    def follow(self, student: nn.Module) -> None:
        """Copy the weights of ``student``, a plain network without wrappers, and average over them from now on."""
        network = self.taps.model
        network.load_state_dict(student.state_dict())
        self.ema = EMA(self.average, student, into=dict(network.named_parameters()))

    @torch.no_grad()
    def update(self, step: int | Tensor) -> None:
        """Update the averages after optimizer ``step``, counted from 1.

        Every rank must call it, because buffers are averaged.
        """
        self.ema.update(step)
        with collectives.average_buffers(self.ema.network):
            # Buffers are copied, not averaged over time: BatchNorm statistics are moving averages themselves.
            for buffer, student_buffer in zip(self.taps.model.buffers(), self.ema.network.buffers(), strict=True):
                buffer.copy_(student_buffer)
