"""What every loss is: a frozen config, the facts it is built from, and named parts.

A file of this folder holds a method's formulas, as pure functions, and one ``Loss``; its name is the loss's in a
recipe. There is no list.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.batch import Batch, Outputs, Progress
from pipeline.features.names import numbered
from pipeline.features.taps import NormParameters
from pipeline.frozen_model import FrozenModel
from pipeline.optim.schedule import Ramp, ramp_factor
from pipeline.precision import autocast, autocast_call, promote_to_float32


class Taps(NamedTuple):
    """The taps a loss reads, by canonical stage name, of each network. Logits always come and are not named here."""

    student: frozenset[str] = frozenset()
    teacher: frozenset[str] = frozenset()

    def union(self, other: Taps) -> Taps:
        """Return the taps that either asks for."""
        return Taps(self.student | other.student, self.teacher | other.teacher)


@dataclass(frozen=True)
class Facts:
    """What one probe forward and the shards' manifest tell a loss at construction."""

    num_classes: int
    student_shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Shape of each student tap without the batch dimension, by tap name."""
    teacher_shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    id_count: int = 0
    """One more than the largest training sample id: the rows of a bank indexed by id."""
    labels_by_id: np.ndarray | None = None
    """int64 [id_count]; −1 where no sample has that id."""
    teacher_norms: dict[str, NormParameters] = field(default_factory=dict)
    """Scale and shift of the BatchNorm that ends a teacher's ``stageN.preact``, by tap name, as before folding."""
    autocast: torch.dtype | None = None
    """The recipe's autocast type, under which the convolutions of auxiliary modules run; None is none."""


class Loss(nn.Module):
    """A loss. Its auxiliary modules are its attributes, so they are moved, trained, saved and left out at export.

    ``forward(student, teacher, batch)`` returns the unweighted parts by name. A loss that wraps another overrides
    ``parts`` instead and calls the other's ``parts``.
    """

    class Config(FrozenModel):
        """Every loss's config has a weight and a ramp; a paper's constants have no defaults and stand in recipes."""

        weight: float = 1.0
        ramp: Ramp | None = None

        def taps(self) -> Taps:
            """Return the taps this loss and those inside it read."""
            return Taps()

    scope: ClassVar[Literal["sample", "statistics", "batch"]] = "sample"
    """What it needs of other ranks: nothing; sums, by ``collectives``; or all rows, which ``BatchLoss`` gathers."""
    needs_teacher: ClassVar[bool] = True

    def __init__(self, config: Config, facts: Facts) -> None:
        super().__init__()
        self.config: Any = config
        self.facts = facts

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Return the unweighted scalar parts by name."""
        raise NotImplementedError

    def parts(self, student: Outputs, teacher: Outputs, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """Return ``forward``'s parts × weight × ramp, computed in at least float32 with autocast off."""
        with autocast(student.logits_BK, None):
            return self.scaled(self(*self.select_features(student, teacher), batch), progress)

    def select_features(self, student: Outputs, teacher: Outputs) -> tuple[Outputs, Outputs]:
        """Return what the loss sees of both networks: logits and the taps that its config names, at least in float32.

        Another loss's maps are left alone: to promote them would be a copy of each, for every loss.
        """
        taps = self.config.taps()
        of_teacher = promote_to_float32(keep_taps(teacher, taps.teacher)) if self.needs_teacher else teacher
        return promote_to_float32(keep_taps(student, taps.student)), of_teacher

    def commit(self) -> None:
        """Take in what ``forward`` saw of this global batch; called after its update, once, on every rank.

        Only here may a loss change state of its own, such as a bank over the data set: ``forward`` is a function. A
        loss's own buffers are the same on every rank, and a checkpoint holds them once.
        """

    def autocast_call(self, network: Callable[..., Tensor], x: Tensor, *more: Tensor) -> Tensor:
        """Return an auxiliary network's answer under the recipe's autocast, in the dtype of ``x``."""
        return autocast_call(self.facts.autocast, network, x, *more)

    def scaled(self, parts: dict[str, Tensor], progress: Progress) -> dict[str, Tensor]:
        """Return ``parts`` × weight × ramp."""
        factor = self.config.weight * ramp_factor(self.config.ramp, progress)
        return {name: factor * value for name, value in parts.items()}


def keep_taps(outputs: Outputs, taps: frozenset[str]) -> Outputs:
    """Return ``outputs`` with only the features that ``taps`` name, ``all`` meaning every stage."""
    kinds = {tap.removeprefix("all") for tap in taps if tap.partition(".")[0] == "all"}
    of_all = {name for kind in kinds for name in numbered(outputs.features, kind)}
    return outputs._replace(features={name: x for name, x in outputs.features.items() if name in taps | of_all})
