"""Multi-label classification: an image has any number of the classes.   B batch, N images, K classes.

The metrics are those of Chen et al., "Multi-label image recognition with graph convolutional networks", CVPR 2019:
mean average precision, and F1 over all decisions.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.batch import Batch, Outputs
from pipeline.distributed.collectives import gather_rows
from pipeline.tasks._base import Details, Evaluation, Seen, Task

_NUMBERS_AT_ONCE = 2**22
"""Scores whose average precision is computed at once, which takes about 80 bytes each."""
LABELS = "labels_BK"
"""Name of the targets: uint8 [B, K], 1 for each class of the image, else 0."""


class MultiLabel(Task):
    """Mean average precision of the classes' scores, and F1 of the decisions at probability one half."""

    titles: ClassVar[dict[str, str]] = {"map": "mAP", "f1": "F1"}
    training_metric = "f1"
    images_have = "have any number of classes each"
    script = "shards/prepare_multilabel.py"
    targets = frozenset({LABELS})

    def blank_targets(self, rows: int, num_classes: int, size: tuple[int, int]) -> dict[str, Tensor]:
        """Return labels of images without any class."""
        return {LABELS: torch.zeros(rows, num_classes, dtype=torch.uint8)}

    def measure_batch(self, outputs: Outputs, batch: Batch) -> Tensor:
        """Return F1 over all decisions of the batch."""
        return _f1(_count_decisions(outputs.logits_BK, batch.targets[LABELS]).float())

    def see(self, outputs: Outputs, batch: Batch) -> Seen:
        """Return ids, logits and labels of the images."""
        return batch.ids_B, outputs.logits_BK.float(), batch.targets[LABELS]

    def summarize(self, seen: Iterable[Seen]) -> Evaluation:
        """Return mean average precision, F1, and the mean binary cross-entropy of all decisions."""
        ids_N, logits_NK, labels_NK = (gather_rows(torch.cat(columns)) for columns in zip(*seen, strict=True))
        # In the order of the ids, so that sums do not depend on the number of ranks. Padding has id −1.
        order = ids_N.argsort()[int((ids_N < 0).sum()) :]
        logits_NK, labels_NK = logits_NK[order], labels_NK[order]
        f1 = _f1(_count_decisions(logits_NK, labels_NK).double())
        average = mean_average_precision(logits_NK, labels_NK)
        losses_NK = F.binary_cross_entropy_with_logits(logits_NK, labels_NK.to(logits_NK.dtype), reduction="none")
        return Evaluation(
            {"map": 100 * average, "f1": f1.item()}, len(order), losses_NK.mean(dtype=torch.float64).item()
        )

    def agreement(self, a: Outputs, b: Outputs, batch: Batch) -> Tensor:
        """Return the number of decisions, one per image and class, in which both agree, and that of all decisions."""
        real_B1 = (batch.labels_B >= 0)[:, None]
        same_BK = ((a.logits_BK > 0) == (b.logits_BK > 0)) & real_B1
        return torch.stack([same_BK.sum(), real_B1.sum() * same_BK.shape[1]])

    def detail_rows(self, outputs: Outputs, batch: Batch) -> Tensor:
        """Return the logits, then the labels."""
        return torch.cat([outputs.logits_BK.double(), batch.targets[LABELS].double()], dim=1)

    def detail(self, rows_NC: Tensor, num_classes: int, accepted_NK: Tensor | None = None) -> Details:
        """Return mean average precision and F1, and the average precision of each class that has an image."""
        logits_NK, labels_NK = rows_NC[:, :num_classes].float(), rows_NC[:, num_classes:].to(torch.uint8)
        f1 = _f1(_count_decisions(logits_NK, labels_NK).double()).item()
        metrics = {"map": 100 * mean_average_precision(logits_NK, labels_NK), "f1": f1, "nll": None, "ece": None}
        samples, averages = labels_NK.sum(0).tolist(), (100 * average_precisions(logits_NK, labels_NK)).tolist()
        known = [average if images else None for average, images in zip(averages, samples, strict=True)]
        return Details(metrics, {"samples": samples, "average_precision": known})

    def divergence(self, teacher: Outputs, student: Outputs) -> Tensor | None:
        """Return None: the probabilities of an image's classes are no distribution."""
        return None


def mean_average_precision(scores_NK: Tensor, labels_NK: Tensor) -> float:
    """Return the mean of the classes' average precision, between 0 and 1; classes without an image are left out.

    Returns 0 if no class has an image.
    """
    average_K, known_K = average_precisions(scores_NK, labels_NK), (labels_NK > 0).any(0)
    return average_K[known_K].sum().item() / max(int(known_K.sum()), 1)


def average_precisions(scores_NK: Tensor, labels_NK: Tensor) -> Tensor:
    """Return the average precision of each class, float64 [K], between 0 and 1; 0 for a class without an image.

    It is Σ (Rₙ − Rₙ₋₁)·Pₙ over the distinct scores as thresholds, without interpolation. So images of equal score
    count together, in any order.
    """
    averages = []
    for first in range(0, scores_NK.shape[1], at_once := max(_NUMBERS_AT_ONCE // max(len(scores_NK), 1), 1)):
        block = slice(first, first + at_once)
        averages.append(_average_precision(scores_NK[:, block], labels_NK[:, block]))
    return torch.cat(averages)


def _average_precision(scores_NK: Tensor, labels_NK: Tensor) -> Tensor:
    """Return the average precision of each class, float64 [K]; 0 for a class without an image."""
    scores_NK, order_NK = scores_NK.sort(0, descending=True)
    hits_NK = labels_NK.gather(0, order_NK).double()
    ranks_N1 = torch.arange(1, len(scores_NK) + 1, device=scores_NK.device)[:, None]
    # The last row of each group of equal scores holds the group's precision.
    last_NK = torch.ones_like(scores_NK, dtype=torch.bool)
    last_NK[:-1] = scores_NK[1:] != scores_NK[:-1]
    ends_NK = torch.where(last_NK, ranks_N1 - 1, len(scores_NK)).flip(0).cummin(0).values.flip(0)
    precision_NK = (hits_NK.cumsum(0) / ranks_N1).gather(0, ends_NK)
    images_K = hits_NK.sum(0)
    return (hits_NK * precision_NK).sum(0) / images_K.clamp(min=1)


def _count_decisions(logits_NK: Tensor, labels_NK: Tensor) -> Tensor:
    """Return int64 [3]: classes found, classes that were predicted, classes of the images."""
    predicted_NK, real_NK = logits_NK > 0, labels_NK > 0
    return torch.stack([(predicted_NK & real_NK).sum(), predicted_NK.sum(), real_NK.sum()])


def _f1(counts_3: Tensor) -> Tensor:
    """Return F1 in percent, the harmonic mean of precision and recall; 0 if there is neither class nor decision."""
    found, predicted, real = counts_3.unbind()
    return 100 * 2 * found / (predicted + real).clamp(min=1)
