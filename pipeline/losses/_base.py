"""The base class of all losses, the taps that a loss reads, and the facts that it is built from.

Each file of this folder without an underscore holds a method's formulas, as pure functions, and one ``Loss``. The
file's name is the name of the loss in a recipe. There is no list to register it in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.batch import Batch, Outputs, Progress, labelled_rows
from pipeline.features.names import OPTIONAL, group_of, numbered
from pipeline.features.taps import FeatureTaps, NormParameters
from pipeline.frozen_model import FrozenModel
from pipeline.optim.schedule import Ramp, ramp_factor
from pipeline.precision import autocast, autocast_call, promote_to_float32


class Taps(NamedTuple):
    """The taps that a loss reads from each network, by canonical stage name. Logits are always read and not listed.

    A name that ends in ``?`` is of a stage that a network may lack.
    """

    student: frozenset[str] = frozenset()
    teacher: frozenset[str] = frozenset()

    def union(self, other: Taps) -> Taps:
        """Return the taps that either of the two reads."""
        return Taps(self.student | other.student, self.teacher | other.teacher)


@dataclass(frozen=True)
class Facts:
    """Sizes and tables that a loss needs at construction, from one probe forward and the shards' manifest."""

    num_classes: int
    student_shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Shape of each student tap without the batch dimension, by tap name."""
    teacher_shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Shape of each teacher tap without the batch dimension, by tap name."""
    id_count: int = 0
    """Largest training sample id plus one: the number of rows of a bank that is indexed by id."""
    labels_by_id: np.ndarray | None = None
    """int64 [id_count]; −1 for an id that no sample has."""
    teacher_norms: dict[str, NormParameters] = field(default_factory=dict)
    """Scale and shift, before folding, of the BatchNorm that ends a teacher's ``stageN.preact``, by tap name."""
    autocast: torch.dtype | None = None
    """The recipe's autocast dtype, under which auxiliary networks run; None if autocast is off."""
    student_head: nn.Linear | None = None
    """The layer that computes the student's logits; None if it is not one linear layer."""
    teacher_head_KD: Tensor | None = None
    """Weights of the layer that computes the teacher's logits; None if it is not one linear layer, or not there."""
    unlabelled_ratio: int = 0
    """Images without a label in a training batch, for each one with a label."""
    extractors: Mapping[str, FeatureTaps] = field(default_factory=dict)
    """The frozen networks that losses name in their configs, by the name of the loss."""
    extractor: FeatureTaps | None = None
    """The one of them that the loss itself names; None for a loss that names none."""
    peers: tuple[Facts, ...] = ()
    """The facts of each network that trains, if several train together (``student.peers``)."""


class Loss(nn.Module):
    """The base class of a loss.

    Auxiliary modules are attributes of the loss. They are moved, trained and saved with it, and left out at export.

    ``forward(student, teacher, batch)`` returns the unweighted parts by name. A loss that wraps another one overrides
    ``parts`` instead, and calls the inner loss's ``parts``.
    """

    class Config(FrozenModel):
        """The config of every loss: a weight and a ramp.

        Constants of a paper have no defaults here; recipes set them.
        """

        weight: float = 1.0
        """Factor of the loss in the total."""
        ramp: Ramp | None = None
        """Growth of the weight over the epochs; null is a constant weight."""

        def taps(self) -> Taps:
            """Return the taps that this loss and its inner losses read."""
            return Taps()

        def reads_head(self) -> bool:
            """Return whether the loss reads what the teacher's head computes: logits or class activation maps.

            If not, it can learn from a teacher without a head, whose logits are [B, 0].
            """
            return True

        def reads_pseudo_labels(self) -> bool:
            """Return whether the loss reads the logits in the batch, ``PSEUDO``, and not what the teacher answers."""
            return False

        def reads_unlabelled_only(self) -> bool:
            """Return whether the loss learns from the images without labels alone."""
            return False

        def reads_head_weights(self) -> bool:
            """Return whether the loss reads the weights of both networks' last layers, which must be linear."""
            return False

        def has_label_loss(self) -> bool:
            """Return whether a part is the cross-entropy with the labels, which counts once in a recipe."""
            return False

        def least_rows(self) -> int:
            """Return the smallest number of rows, of all ranks together, for which the loss is defined."""
            return 1

        def needs_pairs(self) -> bool:
            """Return whether every second row must be another image of the class of the one before: ``data.pairs``."""
            return False

    scope: ClassVar[Literal["sample", "statistics", "batch"]] = "sample"
    """Data that the loss needs from other ranks.

    ``sample``: none. ``statistics``: sums, by functions of ``collectives``. ``batch``: all rows, which ``BatchLoss``
    gathers.
    """
    needs_teacher: ClassVar[bool] = True
    reads_labels: ClassVar[bool] = True
    """Whether the loss reads ``batch.labels_B``, an image's only class, which a task with several has not.

    If so, it gets no image without a label."""
    labelled_only = False
    """Whether the loss, or an inner one, reads labels: ``select_rows`` then leaves out images without one."""
    mixed_labels: ClassVar[Literal["soft", "dominant"] | None] = None
    """What a loss that reads labels takes of an image that is mixed from two. ``soft``: the shares of both classes,
    which are ``batch.targets["soft_BK"]``. ``dominant``: ``labels_B``, the class of the larger share. None refuses."""
    targets: ClassVar[frozenset[str]] = frozenset()
    """Names in ``batch.targets`` that the loss reads; only a task that has them can use it."""
    takes_pixels: ClassVar[bool] = False
    """Whether the loss of logits takes a map of them, whose pixels are its rows; the tasks of pixels need that."""
    takes_images: ClassVar[bool] = False
    """Whether the loss of logits takes the images of a task whose logits they are."""
    exported: tuple[str, ...] = ()
    """Attributes that are modules which a finished run leaves, such as for the losses of other runs."""
    capturable: ClassVar[bool] = True
    """Whether a CUDA graph can record the loss. Not if the host waits for its device, as for eigenvalues."""

    def __init__(self, config: Config, facts: Facts) -> None:
        super().__init__()
        # Typed Any: each subclass has its own Config, which a type checker cannot see from here.
        self.config: Any = config
        self.facts = facts

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Return the unweighted scalar parts by name."""
        raise NotImplementedError

    def select_rows(
        self, student: Outputs, teacher: Outputs | None, batch: Batch
    ) -> tuple[Outputs, Outputs | None, Batch]:
        """Return the rows that ``parts`` gets: the labelled ones for a loss that reads labels, all rows for another.

        Every rank has as many labelled rows in each micro-batch. So the ranks' mean of a mean over them is the mean
        over those of the global batch.
        """
        if not (self.labelled_only and self.facts.unlabelled_ratio):
            return student, teacher, batch
        rows = labelled_rows(len(batch.labels_B), self.facts.unlabelled_ratio)
        return student.at(rows), teacher and teacher.at(rows), batch.at(rows)

    def parts(self, student: Outputs, teacher: Outputs, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """Return the parts of ``forward`` × weight × ramp, computed in at least float32 with autocast off."""
        with autocast(student.logits, None):
            return self.scaled(self(*self.select_features(student, teacher), batch), progress)

    def select_features(self, student: Outputs, teacher: Outputs) -> tuple[Outputs, Outputs]:
        """Return the logits and this loss's taps of both networks, in at least float32.

        Taps of other losses are dropped first. Promoting them too would copy every map once per loss.
        """
        taps = self.config.taps()
        of_teacher = promote_to_float32(keep_taps(teacher, taps.teacher)) if self.needs_teacher else teacher
        return promote_to_float32(keep_taps(student, taps.student)), of_teacher

    def commit(self) -> None:
        """Update the loss's own state, such as a bank over the data set, from the global batch.

        Called on every rank once per optimizer step, after the step. State may change here only: ``forward`` must be
        a pure function. The loss's buffers must be the same on every rank, because a checkpoint stores them once.
        """

    def metrics(self) -> dict[str, Tensor]:
        """Return scalars of the last ``forward`` that the journal shows beside the parts, by name; no part of the loss.

        Most losses have none.
        """
        return {}

    def load_auxiliary(self, state: Mapping[str, Tensor]) -> None:
        """Load what another run left of its losses' modules, by ``loss.module.parameter``.

        Called once, for a loss whose config names a run. Raises ValueError if what it needs is not there.
        """
        raise NotImplementedError

    def observe(self, student: Outputs, teacher: Outputs | None) -> dict[str, Any]:
        """Return what a report shows of the loss's own networks for a few validation images, as plain data.

        Most losses have nothing to show. ``teacher`` is None if it cannot answer for these images. Called on the first
        rank alone, without gradient; it must draw nothing from torch's default generators.
        """
        return {}

    def autocast_call(self, network: Callable[..., Tensor], x: Tensor, *more: Tensor) -> Tensor:
        """Return an auxiliary network's output under the recipe's autocast, cast back to the dtype of ``x``."""
        return autocast_call(self.facts.autocast, network, x, *more)

    def scaled(self, parts: dict[str, Tensor], progress: Progress) -> dict[str, Tensor]:
        """Return ``parts`` × weight × ramp."""
        factor = self.config.weight * ramp_factor(self.config.ramp, progress)
        return {name: factor * value for name, value in parts.items()}


def keep_taps(outputs: Outputs, taps: frozenset[str]) -> Outputs:
    """Return ``outputs`` with only the features named in ``taps``; ``all`` selects every stage, a group its levels."""
    taps = frozenset(tap.removesuffix(OPTIONAL) for tap in taps)
    # "all" and "all.preact" differ in the ending that the stages' names must have: "" or ".preact".
    endings = {tap.removeprefix("all") for tap in taps if tap.partition(".")[0] == "all"}
    of_all = {name for ending in endings for name in numbered(outputs.features, ending)}
    of_groups = {name for name in outputs.features if group_of(name) in taps}
    return outputs._replace(
        features={name: x for name, x in outputs.features.items() if name in taps | of_all | of_groups}
    )
