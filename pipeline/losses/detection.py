"""The losses of RetinaNet, FCOS and Faster R-CNN, detection's own.

B batch, A anchors, R regions, K classes, N boxes of an image.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from pipeline.batch import Batch, Outputs
from pipeline.features.names import OPTIONAL
from pipeline.losses._base import Facts, Loss, Taps
from pipeline.losses._pixels import mean_count
from pipeline.tasks._boxes import BOXES, CLASSES, CROWD

ANCHORS_TAP = "anchors"
"""Tap of the anchors' boxes, [B, A, 4]."""
REGRESSION_TAP = "regression"
"""Tap of what the heads say of the anchors' boxes: [B, A, 4], and [B, A, 5] with the centre-ness of FCOS."""
PARTS = {"classification": "class", "bbox_regression": "box", "bbox_ctrness": "centre"}
"""Names of the parts, by torchvision's."""
TWO_STAGE_TAPS = ("rpn.class", "rpn.box", "rpn.targets", "roi.boxes", "roi.class", "roi.box", "roi.targets")
"""Taps of a detector of two stages: what it says of anchors and of regions, these, and what it should say."""


class DetectionLoss(Loss):
    """The losses of classes and boxes, which torchvision computes. Crowds are no targets.

    RetinaNet, Lin et al., ICCV 2017, arXiv:1708.02002, section 4.1, and FCOS, Tian et al., ICCV 2019, arXiv:1904.01355,
    eq. 2, have the focal loss of all anchors' classes, and a loss of the boxes of matched anchors. Faster R-CNN, Ren et
    al., NeurIPS 2015, arXiv:1506.01497, eq. 1, has cross-entropy of some anchors and regions, chosen by the network,
    and Smooth L1 of those of them that are on an object.
    """

    scope = "statistics"
    needs_teacher = False
    reads_labels = False
    targets = frozenset({BOXES, CLASSES, CROWD})

    class Config(Loss.Config):
        """The config of the loss, such as ``{}`` for RetinaNet or ``{normalizer: batch}`` for the others."""

        normalizer: Literal["image", "batch"] = "image"
        """What divides a sum over anchors. ``image``: the matched anchors of their image; then images are averaged, as
        in torchvision's RetinaNet. ``batch``: those of all images on all ranks, as in FCOS and MMDetection. Faster
        R-CNN divides by the chosen anchors and regions instead, in torchvision by those of a batch."""
        distance: Literal["l1", "giou"] = "l1"
        """Distance between boxes of RetinaNet: of their codes, or 1 − generalised IoU, which FCOS always has. Faster
        R-CNN has Smooth L1 in place of ``l1``, and refuses ``giou``."""

        def taps(self) -> Taps:
            """Return the boxes of the anchors and, of one stage or of two, what the heads say and should say."""
            return Taps(frozenset({ANCHORS_TAP, *(f"{tap}{OPTIONAL}" for tap in (REGRESSION_TAP, *TWO_STAGE_TAPS))}))

    def __init__(self, config: Config, facts: Facts) -> None:
        super().__init__(config, facts)
        self.of_two_stages = REGRESSION_TAP not in facts.student_shapes
        self.of_fcos = not self.of_two_stages and facts.student_shapes[REGRESSION_TAP][-1] == 5
        if self.of_two_stages and config.distance == "giou":
            raise ValueError("distance: giou is of detectors of one stage; Faster R-CNN has Smooth L1, so remove it")

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Return the loss parts ``class`` and ``box``.

        There is ``centre``, too, of FCOS, and ``rpn_class`` and ``rpn_box`` of Faster R-CNN.
        """
        if self.of_two_stages:
            # Imported on first use: torchvision takes seconds to load, and recipes are read without it.
            from pipeline.losses._regions import two_stage_losses

            return two_stage_losses(student, per_image=self.config.normalizer == "image")
        return self._of_one_stage(student, batch)

    def _of_one_stage(self, student: Outputs, batch: Batch) -> dict[str, Tensor]:
        anchors_BA4, regression_BAC = student.features[ANCHORS_TAP], student.features[REGRESSION_TAP]
        if student.logits.is_meta:  # where no anchor can be matched; what is counted there is the network's work
            return {"class": student.logits.mean(), "box": regression_BAC.mean()}
        # As above.
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
