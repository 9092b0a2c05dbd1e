"""Learning rates and ramps as pure functions of Progress, without a state or a ``.step()``.

A rate depends only on the progress of the run. So a resumed run, or a run on more ranks, has the same rates.
"""

from __future__ import annotations

import math
from typing import Literal

from pydantic import ConfigDict, Field, NonNegativeFloat, PositiveFloat, model_validator

from pipeline.batch import Progress
from pipeline.frozen_model import FrozenModel


class Schedule(FrozenModel):
    """The recipe's ``schedule``: a linear warm-up, followed by steps, a cosine or a constant rate."""

    kind: Literal["step", "cosine", "constant"] = "constant"
    """Course of the learning rate after the warm-up."""
    rate: PositiveFloat
    """Learning rate after warm-up, for the recipe's global batch."""
    milestones: tuple[NonNegativeFloat, ...] = ()
    """``step``: epochs at which the rate is multiplied by ``factor``."""
    factor: PositiveFloat = 0.1
    """``step``: factor of the rate at each milestone."""
    final_rate: NonNegativeFloat = 0.0
    """``cosine``: the rate at the end of the run."""
    warmup_epochs: NonNegativeFloat = 0.0
    """Length of the linear warm-up in epochs."""
    warmup_rate: NonNegativeFloat = 0.0
    """Rate at the first step of the warm-up."""

    @model_validator(mode="after")
    def _milestones_belong_to_step(self) -> Schedule:
        if bool(self.milestones) != (self.kind == "step"):
            raise ValueError("milestones need kind: step, and kind: step needs milestones")
        if list(self.milestones) != sorted(set(self.milestones)):
            raise ValueError(f"milestones must be in increasing order, got {list(self.milestones)}")
        return self


def learning_rate(schedule: Schedule, progress: Progress, epochs: float) -> float:
    """Return the rate of the step that begins at ``progress`` in a run of ``epochs`` epochs."""
    epoch = progress.fraction
    if epoch < schedule.warmup_epochs:
        return schedule.warmup_rate + (schedule.rate - schedule.warmup_rate) * epoch / schedule.warmup_epochs
    if schedule.kind == "step":
        return schedule.rate * schedule.factor ** sum(epoch >= milestone for milestone in schedule.milestones)
    if schedule.kind == "cosine":
        # The 1e-12 avoids a division by zero if the warm-up is as long as the run.
        done = min((epoch - schedule.warmup_epochs) / max(epochs - schedule.warmup_epochs, 1e-12), 1.0)
        return schedule.final_rate + (schedule.rate - schedule.final_rate) * (1 + math.cos(math.pi * done)) / 2
    return schedule.rate


class Ramp(FrozenModel):
    """The ramp of a loss weight, in epochs: ``{linear_epochs: 20}`` or ``{from: 0, until: 30}``."""

    model_config = ConfigDict(populate_by_name=True)

    linear_epochs: NonNegativeFloat = 0.0
    """Epochs of linear growth: min(epoch / linear_epochs, 1), epochs counted from 1 as in DKD's published warm-up."""
    start: NonNegativeFloat = Field(default=0.0, alias="from")  # ``from`` is a keyword of Python
    """First epoch of the loss; the factor is 0 before it."""
    until: PositiveFloat | None = None
    """Epoch from which the factor is 0 again; null is never."""

    @model_validator(mode="after")
    def _from_before_until(self) -> Ramp:
        if self.until is not None and self.until <= self.start:
            raise ValueError(f"from: {self.start} must be smaller than until: {self.until}")
        return self


class WatchedProgress:
    """A Progress that records every value read from it while a step is captured as a CUDA graph.

    The graph contains these values as constants. It is out of date once one of them changes. Of a ramp, the factor is
    recorded and not the epoch, because the factor seldom changes.
    """

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._read: dict[str, object] = {}
        self._ramps: dict[Ramp | None, float] = {}

    def __getattr__(self, name: str) -> object:
        # Python calls this for the attributes that the class itself does not have: all those of the Progress.
        value = getattr(self._progress, name)
        self._read[name] = value
        return value

    def ramp_factor(self, ramp: Ramp | None) -> float:
        """Return the factor of a ramp, and record it."""
        return self._ramps.setdefault(ramp, ramp_factor(ramp, self._progress))

    def changed(self, progress: Progress) -> list[str]:
        """Return the names of the recorded values that are different at ``progress``."""
        changed = [f"progress.{name}" for name, value in self._read.items() if getattr(progress, name) != value]
        ramps = any(ramp_factor(ramp, progress) != factor for ramp, factor in self._ramps.items())
        return changed + ["a ramp"] * ramps


def ramp_factor(ramp: Ramp | None, progress: Progress) -> float:
    """Return the factor of a loss weight in the step that begins at ``progress``."""
    if isinstance(progress, WatchedProgress):
        return progress.ramp_factor(ramp)
    if ramp is None:
        return 1.0
    if progress.fraction < ramp.start or (ramp.until is not None and progress.fraction >= ramp.until):
        return 0.0
    if ramp.linear_epochs == 0:
        return 1.0
    # By whole epochs, as published: the factor is constant within an epoch.
    return min((progress.epoch + 1 - math.floor(ramp.start)) / ramp.linear_epochs, 1.0)
