"""The types that pass through the pipeline: a batch, a network's outputs, and the progress of training.

Shape suffixes, here and everywhere: B batch, C channels, H W space, K classes, D embedding, L levels, N samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import Tensor

PSEUDO = "pseudo"
"""Name in ``Batch.extra`` of the logits [B, K] that another network gave images without labels; zeros for others."""


class Batch(NamedTuple):
    """One rank's rows of a batch. It is a NamedTuple, because accelerate looks into tuples but not into dataclasses."""

    images_BCHW: Tensor
    """Float images, normalised with the recipe's mean and std. With ``data.views_per_step`` they are [V, B, C, H, W],
    every image in V views."""
    labels_B: Tensor
    """int64 class numbers; −1 in a padded row of a validation batch, and for an image without a label.

    In training, images without labels are behind those with one."""
    ids_B: Tensor
    """int64 stable sample numbers of the split; −1 in a padded row."""
    extra: dict[str, Tensor]
    """Tensors of a teacher's cache, or pseudo-labels, by name, with the rows of the batch."""
    targets: dict[str, Tensor] = {}  # noqa: RUF012
    """What the task asks of the network besides ``labels_B``, by name, with the rows of the batch; a classification
    has none. Never changed in place, because all batches without any share one mapping."""

    def at(self, rows: slice) -> Batch:
        """Return the batch of those rows."""
        extra, targets = ({name: x[rows] for name, x in mapping.items()} for mapping in (self.extra, self.targets))
        return Batch(self.images_BCHW[rows], self.labels_B[rows], self.ids_B[rows], extra, targets)


def labelled_rows(rows: int, ratio: int) -> slice:
    """Return which of a batch's rows have labels, if each of them has ``ratio`` others without behind it."""
    return slice(rows // (1 + ratio))


class Outputs(NamedTuple):
    """The outputs of a network, student or teacher."""

    logits: Tensor
    """What the head computes: [B, K] of a classifier, [B, 0] without a head, a map [B, K, H, W] of a segmenter."""
    features: dict[str, Tensor]
    """Features by the tap's name in the recipe, such as ``stage4`` or ``last``."""
    peers: tuple[Outputs, ...] = ()
    """Outputs of all networks that train together, of ``student.peers``; the fields above are those of one of them."""

    def at(self, rows: slice) -> Outputs:
        """Return the outputs for those rows of the batch."""
        return Outputs(self.logits[rows], {name: x[rows] for name, x in self.features.items()})

    @property
    def logits_BK(self) -> Tensor:
        """Return the logits as rows, [B, K]. A map [B, K, H, W] has a row for each pixel, [B·H·W, K]."""
        return self.logits.permute(0, 2, 3, 1).flatten(0, 2) if self.logits.ndim == 4 else self.logits

    def with_logits(self, logits_BK: Tensor) -> Outputs:
        """Return the same outputs with other logits, given as rows; those of a map become a map again."""
        if self.logits.ndim < 4:
            return self._replace(logits=logits_BK)
        batch, _, height, width = self.logits.shape
        maps_BHWK = logits_BK.view(batch, height, width, logits_BK.shape[1])
        return self._replace(logits=maps_BHWK.permute(0, 3, 1, 2))


def join_peers(outputs: Sequence[Outputs], exported: int) -> Outputs:
    """Return the outputs of several networks that train together: those of the ``exported`` one, with all ``peers``."""
    return outputs[exported]._replace(peers=tuple(outputs))


@dataclass(frozen=True)
class Progress:
    """The progress of a run in complete global batches. Learning rate, ramps and loader are functions of it."""

    steps_per_epoch: int
    step: int = 0
    """Complete global batches seen, which equals optimizer steps taken."""
    samples_seen: int = 0

    @property
    def epoch(self) -> int:
        """Return the number of completed epochs; 0 during the first epoch."""
        return self.step // self.steps_per_epoch

    @property
    def fraction(self) -> float:
        """Return the completed epochs as a real number."""
        return self.step / self.steps_per_epoch

    @property
    def step_in_epoch(self) -> int:
        """Return the number of completed global batches in the current epoch."""
        return self.step % self.steps_per_epoch

    @property
    def epoch_ended(self) -> bool:
        """Return whether the last step was the last of an epoch."""
        return self.step > 0 and self.step_in_epoch == 0

    def after(self, batch: int) -> Progress:
        """Return the progress after one more global batch of ``batch`` samples."""
        return replace(self, step=self.step + 1, samples_seen=self.samples_seen + batch)


def rows_per_rank(batch: int, world_size: int, accumulation: int) -> int:
    """Return how many rows of a global ``batch`` a rank computes at once: its share of a micro-batch, at least one."""
    return max(batch // (world_size * accumulation), 1)
