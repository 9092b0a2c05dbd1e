"""Losses of a user's that have the host wait for the device, each in its own way."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.batch import Batch, Outputs
from pipeline.losses import Loss


class Item(Loss):
    """Asks for a number."""

    needs_teacher = False

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Return a part of a size that the host looks at."""
        return {"": student.logits_BK.mean() * (1.0 if student.logits_BK.sum().item() > 0 else 2.0)}


class Mask(Loss):
    """Looks for the rows that a mask says: how many they are the host must know."""

    needs_teacher = False

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Return the mean as often as there are rows of class 0."""
        return {"": student.logits_BK.mean() * len((batch.labels_B == 0).nonzero())}


class FromHost(Loss):
    """Makes a tensor of the device from numbers of the host."""

    needs_teacher = False

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Return the mean, weighed by a tensor that is copied in every step."""
        return {"": student.logits_BK.mean() * torch.tensor([2.0], device=student.logits_BK.device).sum()}
