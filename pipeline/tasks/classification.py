"""Classification: every image has one class.   B batch, K classes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.batch import Batch, Outputs
from pipeline.distributed.collectives import all_reduce_sum
from pipeline.tasks._base import Evaluation, Seen, Task


class Classification(Task):
    """The share of images whose class is the network's first choice, or among its first five."""

    titles: ClassVar[dict[str, str]] = {"top1": "top-1", "top5": "top-5"}
    training_metric = "top1"
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


def count_correct(logits_BK: Tensor, labels_B: Tensor) -> Tensor:
    """Return int64 [3]: top-1 hits, top-5 hits, rows. A padded row (label −1) is not counted."""
    real_B1 = (labels_B >= 0)[:, None]
    hits_B5 = (logits_BK.topk(min(5, logits_BK.shape[1]), dim=1).indices == labels_B[:, None]) & real_B1
    return torch.stack([hits_B5[:, 0].sum(), hits_B5.sum(), real_B1.sum()])
