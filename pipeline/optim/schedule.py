"""Learning rates and ramps as pure functions of Progress, without a state or a ``.step()``.

A rate depends only on the progress of the run. So a resumed run, or a run on more ranks, has the same rates.
"""

from __future__ import annotations

import math
from typing import Literal

from pydantic import ConfigDict, Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from pipeline.batch import Progress
from pipeline.frozen_model import FrozenModel


class Schedule(FrozenModel):
    """The recipe's ``schedule``: a linear warm-up, followed by steps, a cosine, a power or a constant rate."""

    kind: Literal["step", "cosine", "constant", "poly", "one_cycle"] = "constant"
    """Course of the learning rate after the warm-up."""
    rate: PositiveFloat
    """Learning rate after warm-up, for the recipe's global batch."""
    milestones: tuple[NonNegativeFloat, ...] = ()
    """``step``: epochs at which the rate is multiplied by ``factor``."""
    every: PositiveFloat | None = None
    """``step``: epochs between two multiplications by ``factor``, from the beginning of the run, instead of
    ``milestones``."""
    factor: PositiveFloat = 0.1
    """``step``: factor of the rate at each milestone."""
    final_rate: NonNegativeFloat = 0.0
    """``cosine``, ``poly`` and ``one_cycle``: the rate at the end of the run."""
    cycles: PositiveInt | None = None
    """``cosine``: number of equal cycles after the warm-up, each of which begins at ``rate`` again; null is one."""
    power: PositiveFloat | None = None
    """``poly``: power of the share of the run that is left; default: 1, a line."""
    unit: Literal["step", "epoch"] = "step"
    """``epoch``: the rate changes only between epochs, as timm's does by default."""
    warmup_epochs: NonNegativeFloat = 0.0
    """Length of the warm-up in epochs: linear, and half a cosine of ``one_cycle``."""
    warmup_rate: NonNegativeFloat = 0.0
    """Rate at the first step of the warm-up."""

    @model_validator(mode="after")
    def _milestones_belong_to_step(self) -> Schedule:
        if (bool(self.milestones) + (self.every is not None)) != (self.kind == "step"):
            raise ValueError("kind: step needs either milestones or every, and no other kind has them")
        if list(self.milestones) != sorted(set(self.milestones)):
            raise ValueError(f"milestones must be in increasing order, got {list(self.milestones)}")
        return self

    @model_validator(mode="after")
    def _keys_belong_to_their_kind(self) -> Schedule:
        if self.power is not None and self.kind != "poly":
            raise ValueError(f"power needs kind: poly, got kind: {self.kind}; remove it, or give power: null")
        if self.cycles is not None and self.kind != "cosine":
            raise ValueError(f"cycles needs kind: cosine, got kind: {self.kind}; remove it, or give cycles: null")
        if self.kind == "one_cycle" and self.warmup_epochs == 0:
            raise ValueError("kind: one_cycle needs warmup_epochs above 0; torch's default is 0.3 of the run")
        if self.unit == "epoch" and self.warmup_epochs > 0 and self.warmup_rate == 0:
            raise ValueError(
                "unit: epoch with a warm-up needs warmup_rate above 0, because it is the rate of the whole first epoch"
            )
        return self


def learning_rate(schedule: Schedule, progress: Progress, epochs: float) -> float:
    """Return the rate of the step that begins at ``progress`` in a run of ``epochs`` epochs."""
    epoch, length = progress.fraction, 1 / progress.steps_per_epoch
    if schedule.unit == "epoch":
        epoch, length = float(progress.epoch), 1.0
    if schedule.kind == "one_cycle":
        return _one_cycle_rate(schedule, epoch, epochs, length)
    if epoch < schedule.warmup_epochs:
        return schedule.warmup_rate + (schedule.rate - schedule.warmup_rate) * epoch / schedule.warmup_epochs
    if schedule.kind == "step":
        passed = sum(epoch >= milestone for milestone in schedule.milestones)
        return schedule.rate * schedule.factor ** (math.floor(epoch / schedule.every) if schedule.every else passed)
    # The 1e-12 avoids a division by zero if the warm-up is as long as the run.
    done = min((epoch - schedule.warmup_epochs) / max(epochs - schedule.warmup_epochs, 1e-12), 1.0)
    if schedule.kind == "cosine":
        return _cosine(schedule.rate, schedule.final_rate, _in_cycle(done, schedule.cycles or 1))
    if schedule.kind == "poly":
        power = 1.0 if schedule.power is None else schedule.power
        return schedule.final_rate + (schedule.rate - schedule.final_rate) * (1 - done) ** power
    return schedule.rate


def _one_cycle_rate(schedule: Schedule, epoch: float, epochs: float, length: float) -> float:
    """Return the rate of torch's OneCycleLR with two phases of a cosine.

    Its peak is the last step of the warm-up, and its end the last step of the run. ``length`` is that of a step, or of
    an epoch, in epochs. Source: Smith and Topin, arXiv:1708.07120, in the form of torch's class.
    """
    peak, end = schedule.warmup_epochs - length, epochs - length
    if epoch < peak:
        return _cosine(schedule.warmup_rate, schedule.rate, epoch / peak)
    return _cosine(schedule.rate, schedule.final_rate, min((epoch - peak) / max(end - peak, 1e-12), 1.0))


def _in_cycle(done: float, cycles: int) -> float:
    """Return the share of its cycle that is done where a share ``done`` of all cycles is; the last one ends with 1."""
    return done * cycles - min(math.floor(done * cycles), cycles - 1)


def _cosine(first: float, last: float, done: float) -> float:
    """Return the value between ``first`` and ``last``, along half a cosine, after a share ``done`` of the way."""
    return last + (first - last) * (1 + math.cos(math.pi * done)) / 2


class Ramp(FrozenModel):
    """The ramp of a loss weight, in epochs.

    It is ``{linear_epochs: 20}``, ``{gaussian: 80}``, ``{steps: [[0, 1.0], [60, 0.5]]}`` or ``{from: 0, until: 30}``.
    """

    model_config = ConfigDict(populate_by_name=True)

    linear_epochs: NonNegativeFloat = 0.0
    """Epochs of linear growth: min(epoch / linear_epochs, 1), epochs counted from 1 as in DKD's published warm-up."""
    gaussian: PositiveFloat | None = None
    """Epochs E of growth along a Gaussian: exp(−5·(1 − min(e/E, 1))²), e the whole epochs that are completed."""
    steps: tuple[tuple[NonNegativeFloat, NonNegativeFloat], ...] = ()
    """Pairs [epoch, factor]: from that epoch on, the factor is this one. The first epoch is 0."""
    start: NonNegativeFloat = Field(default=0.0, alias="from")  # ``from`` is a keyword of Python
    """First epoch of the loss; the factor is 0 before it."""
    until: PositiveFloat | None = None
    """Epoch from which the factor is 0 again; null is never."""

    @model_validator(mode="after")
    def _from_before_until(self) -> Ramp:
        if self.until is not None and self.until <= self.start:
            raise ValueError(f"from: {self.start} must be smaller than until: {self.until}")
        return self

    @model_validator(mode="after")
    def _has_one_form(self) -> Ramp:
        if (self.linear_epochs > 0) + (self.gaussian is not None) + bool(self.steps) > 1:
            raise ValueError("linear_epochs, gaussian and steps exclude each other; give one of them")
        epochs = [epoch for epoch, _ in self.steps]
        if epochs and (epochs[0] != 0 or epochs != sorted(set(epochs))):
            raise ValueError(f"steps must have rising epochs, of which the first is 0, got {epochs}")
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
    if ramp.steps:
        return _step_factor(ramp, progress.fraction)
    if ramp.gaussian is not None:
        return math.exp(-5 * (1 - min(progress.epoch / ramp.gaussian, 1.0)) ** 2)
    if ramp.linear_epochs == 0:
        return 1.0
    # By whole epochs, as published: the factor is constant within an epoch.
    return min((progress.epoch + 1 - math.floor(ramp.start)) / ramp.linear_epochs, 1.0)


def first_epoch(ramp: Ramp | None) -> float:
    """Return the first epoch, counted from 0, at which the factor of a ramp is not 0; infinity if there is none."""
    if ramp is None or not ramp.steps:
        return ramp.start if ramp else 0.0
    epochs = [ramp.start, *(epoch for epoch, _ in ramp.steps if epoch > ramp.start)]
    return next((epoch for epoch in epochs if _step_factor(ramp, epoch) > 0), math.inf)


def _step_factor(ramp: Ramp, epoch: float) -> float:
    """Return the factor of a ramp with ``steps`` at an epoch."""
    return [factor for first, factor in ramp.steps if first <= epoch][-1]
