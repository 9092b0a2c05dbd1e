"""Teachers that are the student's own network at another time."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipeline.distributed import collectives
from pipeline.features.taps import FeatureTaps
from pipeline.teachers.frozen import Teacher


class StudentFollower(Teacher):
    """A teacher that is the student's own network, with weights that follow the student's. The base of such teachers.

    It runs in evaluation mode. Under DDP its BatchNorm statistics are averaged over the ranks, so that every rank has
    the same teacher. Weights are float32, and the forward runs under ``autocast``. Its half precision is bf16 and not
    fp16: early statistics do not fit the network yet, and the outputs of deep networks then exceed 65504.
    """

    moves = True

    def __init__(self, taps: FeatureTaps, *, batch: int, device: torch.device, autocast: torch.dtype | None) -> None:
        super().__init__(
            taps, batch=batch, image_size=0, dtype=torch.float32, device=device, fold=False, autocast=autocast
        )
        # Losses read these parameters once, when they are built; those of a network that moves would soon be outdated.
        self.norms = {}
        self.head_KD = None
        # In a tuple, because a module that is an attribute would be a part of this one and of its state.
        self.followed: tuple[nn.Module, ...] = ()

    @property
    def student(self) -> nn.Module:
        """Return the plain network that is followed."""
        return self.followed[0]

    def follow(self, student: nn.Module) -> None:
        """Copy the weights of ``student``, a plain network without wrappers, and follow it from now on."""
        self.followed = (student,)
        self.taps.model.load_state_dict(student.state_dict())

    def update(self, step: int | Tensor) -> None:
        """Follow the student after optimizer ``step``, counted from 1, if this teacher does so at every step."""

    @torch.no_grad()
    def copy_buffers(self) -> None:
        """Copy the student's buffers, averaged over the ranks; every rank must call it."""
        with collectives.average_buffers(self.student):
            for buffer, student_buffer in zip(self.taps.model.buffers(), self.student.buffers(), strict=True):
                buffer.copy_(student_buffer)
