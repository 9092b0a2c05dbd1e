"""Segmentation: every pixel has one class.   B batch, K classes, N images, H W pixels of the mask.

The metrics are those of PASCAL VOC and Cityscapes. The IoU of a class is over the pixels of all images, and mIoU is its
mean over the classes. The other metric is the share of right pixels. Logits are interpolated to the size of the mask.
Pixels without a class count nowhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.batch import Batch, Outputs
from pipeline.distributed.collectives import all_reduce_sum
from pipeline.tasks._base import Details, Evaluation, Seen, Task
from pipeline.tasks._masks import MASK, masks_at, upsampled
from shards.manifest import IGNORED_VALUE


class Segmentation(Task):
    """Mean intersection over union of the classes, and the share of pixels with the right class."""

    titles: ClassVar[dict[str, str]] = {"miou": "mIoU", "pixel_accuracy": "pixel accuracy"}
    training_metric = "pixel_accuracy"
    images_have = "have masks"
    script = "shards/prepare_masks.py"
    targets = frozenset({MASK})
    of_pixels = True

    def blank_targets(self, rows: int, num_classes: int, size: tuple[int, int]) -> dict[str, Tensor]:
        """Return masks whose every pixel has the first class."""
        return {MASK: torch.zeros(rows, *size, dtype=torch.uint8)}

    def measure_batch(self, outputs: Outputs, batch: Batch) -> Tensor:
        """Return the share of right pixels, at the size of the logits."""
        labels_BHW = masks_at(batch.targets[MASK], *outputs.logits.shape[2:])
        right = (outputs.logits.argmax(1) == labels_BHW).sum()
        return 100 * right.float() / (labels_BHW != IGNORED_VALUE).sum().clamp(min=1)

    def see(self, outputs: Outputs, batch: Batch) -> Seen:
        """Return int64 [K·K]: pixels by class and prediction; float64 [2]: cross-entropy of all, and images."""
        counts_BP, losses_B = _count_pixels(outputs, batch)
        images = (batch.labels_B >= 0).sum()
        return counts_BP.sum(0), torch.stack([losses_B.sum(), images.double()])

    def summarize(self, seen: Iterable[Seen]) -> Evaluation:
        """Return mean IoU, the share of right pixels, and the mean cross-entropy of the pixels."""
        counts, sums = (torch.stack(columns).sum(0) for columns in zip(*seen, strict=True))
        counts_KK, (loss, images) = square(all_reduce_sum(counts)), all_reduce_sum(sums).tolist()
        return Evaluation(_metrics(counts_KK), int(images), loss / max(int(counts_KK.sum()), 1))

    def agreement(self, a: Outputs, b: Outputs, batch: Batch) -> Tensor:
        """Return the number of pixels for which both predict the same class, and that of all pixels with a class."""
        mask_BHW = batch.targets[MASK]
        ours_BHW, theirs_BHW = (upsampled(outputs.logits.float(), mask_BHW).argmax(1) for outputs in (a, b))
        has_class_BHW = _has_class(batch)
        return torch.stack([((ours_BHW == theirs_BHW) & has_class_BHW).sum(), has_class_BHW.sum()])

    def detail_rows(self, outputs: Outputs, batch: Batch) -> Tensor:
        """Return the pixels of each class and prediction, then the sum of their −log probability."""
        counts_BP, losses_B = _count_pixels(outputs, batch)
        return torch.cat([counts_BP.double(), losses_B[:, None]], dim=1)

    def detail(self, rows_NC: Tensor, num_classes: int, accepted_NK: Tensor | None = None) -> Details:
        """Return the metrics, likelihood, IoU of each class, and the counts of pairs of classes, in pixels."""
        counts_KK = square(rows_NC[:, :-1].sum(0).long())
        pixels = int(counts_KK.sum())
        nll = rows_NC[:, -1].sum().item() / max(pixels, 1)
        metrics = {**_metrics(counts_KK), "nll": nll if math.isfinite(nll) else None, "ece": None}
        ious = [None if union == 0 else 100 * both / union for both, union in _overlaps(counts_KK).tolist()]
        per_class: dict[str, list[Any]] = {"samples": counts_KK.sum(1).tolist(), "iou": ious}
        pairs = counts_KK.nonzero()
        confusion = torch.cat([pairs, counts_KK[pairs[:, 0], pairs[:, 1], None]], dim=1).tolist()
        return Details(metrics, per_class, [tuple(pair) for pair in confusion])

    def divergence(self, teacher: Outputs, student: Outputs) -> Tensor | None:
        """Return the divergence of the probabilities of the classes, averaged over the pixels of the teacher's map."""
        theirs_BKHW = teacher.logits.double()
        ours_BKHW = student.logits.double()
        if ours_BKHW.shape != theirs_BKHW.shape:
            ours_BKHW = upsampled(ours_BKHW, theirs_BKHW[:, 0])
        ours_BKHW, theirs_BKHW = (logits.log_softmax(1) for logits in (ours_BKHW, theirs_BKHW))
        return F.kl_div(ours_BKHW, theirs_BKHW, reduction="none", log_target=True).sum(1).mean((1, 2))


def _count_pixels(outputs: Outputs, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return int64 [B, K·K], pixels by class and prediction, and float64 [B], the sum of their cross-entropy."""
    mask_BHW = batch.targets[MASK]
    logits_BKHW = upsampled(outputs.logits.float(), mask_BHW)
    classes = logits_BKHW.shape[1]
    has_class_BHW = _has_class(batch)
    labels_BHW = mask_BHW.long().masked_fill(~has_class_BHW, 0)
    # Pixels without a class are counted apart, in a cell of their own that is cut off.
    cells_BHW = (labels_BHW * classes + logits_BKHW.argmax(1)).masked_fill(~has_class_BHW, classes**2)
    counts = [torch.bincount(cells.flatten(), minlength=classes**2 + 1)[:-1] for cells in cells_BHW]
    nll_BHW = -logits_BKHW.log_softmax(1).gather(1, labels_BHW[:, None])[:, 0]
    return torch.stack(counts), nll_BHW.masked_fill(~has_class_BHW, 0.0).sum((1, 2), dtype=torch.float64)


def _has_class(batch: Batch) -> Tensor:
    """Return which pixels count, bool [B, H, W]: those with a class, in rows that are no padding."""
    return (batch.targets[MASK] != IGNORED_VALUE) & (batch.labels_B >= 0)[:, None, None]


def square(counts: Tensor) -> Tensor:
    """Return counts [K·K] as a matrix [K, K]: a row for each class of a pixel, a column for each prediction."""
    classes = round(len(counts) ** 0.5)
    return counts.view(classes, classes)


def _overlaps(counts_KK: Tensor) -> Tensor:
    """Return int64 [K, 2]: the pixels of intersection and union of each class."""
    both_K = counts_KK.diagonal()
    return torch.stack([both_K, counts_KK.sum(0) + counts_KK.sum(1) - both_K], dim=1)


def _metrics(counts_KK: Tensor) -> dict[str, float]:
    """Return mean IoU over the classes that a mask or a prediction has, and the share of right pixels, in percent."""
    both_K, union_K = _overlaps(counts_KK).double().unbind(1)
    known_K = union_K > 0
    miou = (both_K[known_K] / union_K[known_K]).mean().item() if known_K.any() else 0.0
    return {
        "miou": 100 * miou,
        "pixel_accuracy": 100 * both_K.sum().item() / max(int(counts_KK.sum()), 1),
    }
