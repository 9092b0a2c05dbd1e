"""What travels through the pipeline: a batch, a network's outputs, and how far training has come.

Shape suffixes, here and everywhere: B batch, C channels, H W space, K classes, D embedding, L levels, N samples.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import Tensor


class Batch(NamedTuple):
    """One rank's rows of a batch. A NamedTuple, because accelerate sees through it and not through a dataclass."""

    images_BCHW: Tensor
    """Float images, normalised with the recipe's mean and std."""
    labels_B: Tensor
    """int64 class numbers; −1 in a padded row of a validation batch."""
    ids_B: Tensor
    """int64 stable sample numbers of the split; −1 in a padded row."""
    extra: dict[str, Tensor]
    """What a teacher's cache sends along, by name; rows as in the batch."""


class Outputs(NamedTuple):
    """What a network answers; the same type for student and teacher."""

    logits_BK: Tensor
    features: dict[str, Tensor]
    """Taps by the name the recipe asked for, such as ``stage4`` or ``last``."""


@dataclass(frozen=True)
class Progress:
    """How far a run has come, in whole global batches. Learning rate, ramps and loader are functions of it."""

    steps_per_epoch: int
    step: int = 0
    """Whole global batches seen, which is optimizer steps taken."""
    samples_seen: int = 0

    @property
    def epoch(self) -> int:
        """Whole epochs behind us; 0 during the first epoch."""
        return self.step // self.steps_per_epoch

    @property
    def fraction(self) -> float:
        """Epochs behind us as a real number."""
        return self.step / self.steps_per_epoch

    @property
    def step_in_epoch(self) -> int:
        """Global batches of the current epoch behind us."""
        return self.step % self.steps_per_epoch

    @property
    def epoch_ended(self) -> bool:
        """Whether the last step closed an epoch."""
        return self.step > 0 and self.step_in_epoch == 0

    def after(self, batch: int) -> Progress:
        """Return the progress after one more global batch of ``batch`` samples."""
        return replace(self, step=self.step + 1, samples_seen=self.samples_seen + batch)


def rows_per_rank(batch: int, world_size: int, accumulation: int) -> int:
    """Return the rows that a rank computes at once of a global ``batch``: its share of a micro-batch, at least one."""
    return max(batch // (world_size * accumulation), 1)
