"""The losses of RetinaNet and of FCOS, detection's own.   B batch, A anchors, K classes, N boxes of an image."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from pipeline.batch import Batch, Outputs
from pipeline.losses._base import Facts, Loss, Taps
from pipeline.losses._pixels import mean_count
from pipeline.tasks._boxes import BOXES, CLASSES, CROWD

ANCHORS_TAP = "anchors"
"""Tap of the anchors' boxes, [B, A, 4]."""
REGRESSION_TAP = "regression"
"""Tap of what the heads say of the anchors' boxes: [B, A, 4], and [B, A, 5] with the centre-ness of FCOS."""
PARTS = {"classification": "class", "bbox_regression": "box", "bbox_ctrness": "centre"}
"""Names of the parts, by torchvision's."""


class DetectionLoss(Loss):
    """The focal loss of the classes and the loss of the boxes of the anchors that are matched with a box.

    Lin et al., RetinaNet, ICCV 2017, arXiv:1708.02002, section 4.1, and Tian et al., FCOS, ICCV 2019, arXiv:1904.01355,
    eq. 2. Torchvision computes them. Crowds are no targets.
    """

    scope = "statistics"
    needs_teacher = False
    reads_labels = False
    targets = frozenset({BOXES, CLASSES, CROWD})

    class Config(Loss.Config):
        """The config of the loss, such as ``{}`` for RetinaNet or ``{normalizer: batch}`` for FCOS."""

        normalizer: Literal["image", "batch"] = "image"
        """What divides a sum over anchors. ``image``: the matched anchors of their image; then images are averaged, as
        in torchvision's RetinaNet. ``batch``: those of all images on all ranks, as in FCOS and MMDetection."""
        distance: Literal["l1", "giou"] = "l1"
        """Distance between boxes of RetinaNet: of their codes, or 1 − generalised IoU, which FCOS always has."""

        def taps(self) -> Taps:
            """Return the boxes of the anchors, and what the heads say of them."""
            return Taps(frozenset({ANCHORS_TAP, REGRESSION_TAP}))

    def __init__(self, config: Config, facts: Facts) -> None:
        super().__init__(config, facts)
        self.of_fcos = facts.student_shapes[REGRESSION_TAP][-1] == 5

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Return the loss parts ``class`` and ``box``, and ``centre`` of FCOS."""
        anchors_BA4, regression_BAC = student.features[ANCHORS_TAP], student.features[REGRESSION_TAP]
        if student.logits.is_meta:  # where no anchor can be matched; what is counted there is the network's work
            return {"class": student.logits.mean(), "box": regression_BAC.mean()}
        # Imported on first use: torchvision takes seconds to load, and recipes are read without it.
        from pipeline.losses._anchors import anchor_losses, match_anchors

        kind: dict[str, Any] = {"of_fcos": self.of_fcos, "distance": self.config.distance}
        targets = _boxes_to_find(batch, anchors_BA4.dtype)
        matches = match_anchors(list(anchors_BA4), targets, of_fcos=self.of_fcos)
        images = len(targets)
        # FCOS of a batch is added up as a whole, which keeps the last bits of torchvision's.
        size = images if self.of_fcos and self.config.normalizer == "batch" else 1
        total: dict[str, Tensor] = {}
        positives = mean_count(torch.stack(matches) >= 0) if self.config.normalizer == "batch" else None
        for group in (slice(start, start + size) for start in range(0, images, size)):
            outputs = {
                "cls_logits": student.logits[group],
                "bbox_regression": regression_BAC[group, :, :4],
                "bbox_ctrness": regression_BAC[group, :, 4:],
            }
            found = anchor_losses(outputs, list(anchors_BA4[group]), targets[group], matches[group], **kind)
            if positives is not None:  # in place of the group's own
                matched = (torch.stack(matches[group]) >= 0).sum().clamp(min=1)
                found = {name: value * (matched / positives) for name, value in found.items()}
            total = {name: total[name] + value if total else value for name, value in found.items()}
        return {PARTS[name]: value if positives is not None else value / images for name, value in total.items()}


def _boxes_to_find(batch: Batch, dtype: torch.dtype) -> list[dict[str, Tensor]]:
    """Return the boxes and classes of each image, as torchvision names them, without padding and crowds."""
    found = []
    for boxes_N4, classes_N, crowd_N in zip(*(batch.targets[name] for name in (BOXES, CLASSES, CROWD)), strict=True):
        wanted_N = (classes_N >= 0) & ~crowd_N
        found.append({"boxes": boxes_N4[wanted_N].to(dtype), "labels": classes_N[wanted_N]})
    return found
