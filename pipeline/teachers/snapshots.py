"""A teacher that is the student at the end of its last cycle: Yang et al., CVPR 2019, arXiv:1812.00123."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.batch import Batch, Outputs, Progress
from pipeline.distributed import collectives
from pipeline.features.taps import FeatureTaps
from pipeline.teachers.follower import StudentFollower


class SnapshotTeacher(StudentFollower):
    """A teacher that is a snapshot of the student, taken at the end of each cycle of ``epochs`` epochs.

    It teaches the whole next cycle. In the first there is none yet: its outputs are zeros, and no network runs.
    """

    cycle: Tensor
    """Number of the cycle that it teaches, counted from 0; a checkpoint has it beside the weights."""

    def __init__(
        self, taps: FeatureTaps, epochs: int, *, batch: int, device: torch.device, autocast: torch.dtype | None
    ) -> None:
        super().__init__(taps, batch=batch, device=device, autocast=autocast)
        self.epochs = epochs
        self.register_buffer("cycle", torch.zeros((), dtype=torch.int64))  # on the CPU, which reads it at every step
        self.blank: dict[tuple[int, int], dict[str, tuple[int, ...]]] = {}
        """The shapes of the outputs, without the batch, by the images' height and width."""

    def at(self, progress: Progress) -> None:
        """Take a snapshot of the student if a cycle has begun; every rank must call it."""
        cycle = progress.epoch // self.epochs
        # Once a cycle: with accumulation, the micro-batches of a step change the student's BatchNorm statistics.
        if cycle == int(self.cycle):
            return
        with collectives.average_buffers(self.student):
            self.taps.model.load_state_dict(self.student.state_dict())
        self.cycle.fill_(cycle)

    def forward(self, batch: Batch) -> Outputs:
        """Return the outputs of the snapshot, or zeros of the same shapes in the first cycle."""
        if int(self.cycle) > 0:
            return super().forward(batch)
        rows, (height, width) = len(batch.images_BCHW), batch.images_BCHW.shape[2:]
        if (height, width) not in self.blank:
            self.blank[height, width] = self.shapes((height, width))
        zeros = {name: batch.images_BCHW.new_zeros(rows, *shape) for name, shape in self.blank[height, width].items()}
        return Outputs(zeros["logits"], {name: zeros[name] for name in self.taps.wanted})
