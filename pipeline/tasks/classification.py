"""Classification: every image has one class.   B batch, K classes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.batch import Batch, Outputs
from pipeline.distributed.collectives import all_reduce_sum
from pipeline.tasks._base import Details, Evaluation, Seen, Task

BINS = 15
"""Bins of the expected calibration error (Guo et al., "On calibration of modern neural networks", ICML 2017)."""


class Classification(Task):
    """The share of images whose class is the network's first choice, or among its first five."""

    titles: ClassVar[dict[str, str]] = {"top1": "top-1", "top5": "top-5"}
    training_metric = "top1"
    images_have = "have one class each"
    one_class = True

    def measure_batch(self, outputs: Outputs, batch: Batch) -> Tensor:
        """Return the top-1 accuracy."""
        correct_B = outputs.logits_BK.argmax(1) == batch.labels_B
        return 100 * correct_B.float().mean()

    def see(self, outputs: Outputs, batch: Batch) -> Seen:
        """Return float64 [4]: the counts of ``count_correct``, and the sum of the images' cross-entropy."""
        logits_BK = outputs.logits_BK.float()
        losses_B = F.cross_entropy(logits_BK, batch.labels_B, ignore_index=-1, reduction="none")
        # In one tensor, so that one sum over the ranks is enough; float64 is exact for the counts.
        return (
            torch.cat([count_correct(logits_BK, batch.labels_B).double(), losses_B.sum(dtype=torch.float64)[None]]),
        )

    def summarize(self, seen: Iterable[Seen]) -> Evaluation:
        """Return top-1 and top-5 accuracy, and the mean cross-entropy."""
        # Summed on the device: the host waits once.
        sums_4 = all_reduce_sum(torch.stack([sums for (sums,) in seen]).sum(0))
        top1, top5, samples, loss = sums_4.tolist()
        accuracy = {"top1": 100 * top1 / samples, "top5": 100 * top5 / samples}
        return Evaluation(accuracy, int(samples), loss / samples)

    def agreement(self, a: Outputs, b: Outputs, batch: Batch) -> Tensor:
        """Return the number of images for which both predict the same class, and that of all images."""
        same_B, real_B = a.logits_BK.argmax(1) == b.logits_BK.argmax(1), batch.labels_B >= 0
        return torch.stack([(same_B & real_B).sum(), real_B.sum()])

    def detail_rows(self, outputs: Outputs, batch: Batch) -> Tensor:
        """Return the label, the first choice's probability, the label's −log probability, and the first five."""
        logits_BK, labels_B1 = outputs.logits_BK.double(), batch.labels_B.clamp(min=0)[:, None]
        confidence_B1 = logits_BK.softmax(1).amax(1, keepdim=True)
        nll_B1 = -logits_BK.log_softmax(1).gather(1, labels_B1)
        first_BC = logits_BK.topk(min(5, logits_BK.shape[1]), dim=1).indices
        return torch.cat([labels_B1, confidence_B1, nll_B1, first_BC], dim=1)

    def detail(self, rows_NC: Tensor, num_classes: int, accepted_NK: Tensor | None = None) -> Details:
        """Return accuracy, likelihood and calibration, and the counts of each class and pair of classes."""
        labels_N, (confidence_N, nll_N), first_NC = (
            rows_NC[:, 0].long(),
            rows_NC[:, 1:3].unbind(1),
            rows_NC[:, 3:].long(),
        )
        single = accepted_NK is None
        hits_NC = first_NC == labels_N[:, None] if single else accepted_NK.gather(1, first_NC)
        ece, reliability = _calibration(confidence_N, hits_NC[:, 0])
        metrics = {
            "top1": 100 * hits_NC[:, 0].double().mean().item(),
            "top5": 100 * hits_NC.any(1).double().mean().item(),
            "nll": _finite(nll_N.mean()) if single else None,
            "ece": ece,
        }
        if not single:
            return Details(metrics, reliability=reliability)
        counts_KK = _count_pairs(first_NC[:, 0], labels_N, num_classes)
        per_class = {"samples": counts_KK.sum(1).tolist(), "correct": counts_KK.diagonal().tolist()}
        pairs = counts_KK.nonzero()
        confusion = torch.cat([pairs, counts_KK[pairs[:, 0], pairs[:, 1], None]], dim=1).tolist()
        return Details(metrics, per_class, [tuple(pair) for pair in confusion], reliability)

    def divergence(self, teacher: Outputs, student: Outputs) -> Tensor | None:
        """Return the divergence of the probabilities of the classes."""
        ours_BK, theirs_BK = (outputs.logits_BK.double().log_softmax(1) for outputs in (student, teacher))
        return F.kl_div(ours_BK, theirs_BK, reduction="none", log_target=True).sum(1)


def _calibration(confidence_N: Tensor, correct_N: Tensor) -> tuple[float | None, dict[str, list[Any]] | None]:
    """Return the expected calibration error in percent and its bins; None if a network's outputs are not finite."""
    # Imported on first use: it takes seconds to load, and training does not need it.
    from torchmetrics.functional.classification import binary_calibration_error

    if not confidence_N.isfinite().all():
        return None, None
    # torchmetrics puts a probability of exactly 1 into a bin of its own.
    confidence_N = confidence_N.clamp(max=1 - 2**-53)
    ece = binary_calibration_error(confidence_N, correct_N.long(), n_bins=BINS, validate_args=False)
    bounds = torch.linspace(0, 1, BINS + 1, dtype=torch.float64, device=confidence_N.device)
    bins_N = torch.bucketize(confidence_N, bounds, right=True) - 1
    samples, confidence, correct = (
        torch.bincount(bins_N, weights, BINS) for weights in (None, confidence_N, correct_N.double())
    )
    means = {"confidence": confidence / samples.clamp(min=1), "accuracy": correct / samples.clamp(min=1)}
    return 100 * ece.item(), {"samples": samples.tolist(), **{name: mean.tolist() for name, mean in means.items()}}


def _count_pairs(predicted_N: Tensor, labels_N: Tensor, num_classes: int) -> Tensor:
    """Return the confusion matrix, int64 [K, K]: a row for each class of an image, a column for each prediction."""
    from torchmetrics.functional.classification import multiclass_confusion_matrix

    return multiclass_confusion_matrix(predicted_N, labels_N, num_classes, validate_args=False)


def _finite(value: Tensor) -> float | None:
    """Return a number, None for an infinite one or none at all, which JSON does not have."""
    return value.item() if value.isfinite() else None


def count_correct(logits_BK: Tensor, labels_B: Tensor) -> Tensor:
    """Return int64 [3]: top-1 hits, top-5 hits, rows. A padded row (label −1) is not counted."""
    real_B1 = (labels_B >= 0)[:, None]
    hits_B5 = (logits_BK.topk(min(5, logits_BK.shape[1]), dim=1).indices == labels_B[:, None]) & real_B1
    return torch.stack([hits_B5[:, 0].sum(), hits_B5.sum(), real_B1.sum()])
