"""The losses of RetinaNet and of FCOS, detection's own.   B batch, A anchors, K classes, N boxes of an image."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torchvision.models.detection import FCOS, RetinaNet
from torchvision.models.detection._utils import BoxCoder, BoxLinearCoder, Matcher
from torchvision.models.detection.fcos import FCOSHead
from torchvision.models.detection.retinanet import RetinaNetClassificationHead, RetinaNetRegressionHead

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

# Torchvision's matching and losses are methods of networks. These stand in for ``self``, with all that they read of it.
_MATCHES = SimpleNamespace(compute_loss=lambda *arguments: arguments[-1])
_RETINANET: Any = SimpleNamespace(head=_MATCHES, proposal_matcher=Matcher(0.5, 0.4, allow_low_quality_matches=True))
_FCOS: Any = SimpleNamespace(head=_MATCHES, center_sampling_radius=1.5)
_CLASS_HEAD: Any = SimpleNamespace(BETWEEN_THRESHOLDS=Matcher.BETWEEN_THRESHOLDS)
_FCOS_HEAD: Any = SimpleNamespace(box_coder=BoxLinearCoder(normalize_by_size=True))


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
        self.box_head: Any = SimpleNamespace(box_coder=BoxCoder((1.0, 1.0, 1.0, 1.0)), _loss_type=config.distance)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Return the loss parts ``class`` and ``box``, and ``centre`` of FCOS."""
        anchors_BA4, regression_BAC = student.features[ANCHORS_TAP], student.features[REGRESSION_TAP]
        if student.logits.is_meta:  # where no anchor can be matched; what is counted there is the network's work
            return {"class": student.logits.mean(), "box": regression_BAC.mean()}
        targets = _boxes_to_find(batch, anchors_BA4.dtype)
        matches = _match(list(anchors_BA4), targets, of_fcos=self.of_fcos)
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
            found = self._losses(outputs, list(anchors_BA4[group]), targets[group], matches[group])
            if positives is not None:  # in place of the group's own
                matched = (torch.stack(matches[group]) >= 0).sum().clamp(min=1)
                found = {name: value * (matched / positives) for name, value in found.items()}
            total = {name: total[name] + value if total else value for name, value in found.items()}
        return {PARTS[name]: value if positives is not None else value / images for name, value in total.items()}

    def _losses(
        self,
        outputs: dict[str, Tensor],
        anchors: list[Tensor],
        targets: list[dict[str, Tensor]],
        matches: list[Tensor],
    ) -> dict[str, Tensor]:
        """Return torchvision's losses of a group of images, divided by its matched anchors, at least one."""
        if self.of_fcos:
            return FCOSHead.compute_loss(_FCOS_HEAD, targets, outputs, anchors, matches)
        of_classes = RetinaNetClassificationHead.compute_loss(_CLASS_HEAD, targets, outputs, matches)
        of_boxes = RetinaNetRegressionHead.compute_loss(self.box_head, targets, outputs, anchors, matches)
        return {"classification": of_classes, "bbox_regression": of_boxes}


def _boxes_to_find(batch: Batch, dtype: torch.dtype) -> list[dict[str, Tensor]]:
    """Return the boxes and classes of each image, as torchvision names them, without padding and crowds."""
    found = []
    for boxes_N4, classes_N, crowd_N in zip(*(batch.targets[name] for name in (BOXES, CLASSES, CROWD)), strict=True):
        wanted_N = (classes_N >= 0) & ~crowd_N
        found.append({"boxes": boxes_N4[wanted_N].to(dtype), "labels": classes_N[wanted_N]})
    return found


def _match(anchors: list[Tensor], targets: list[dict[str, Tensor]], *, of_fcos: bool) -> list[Tensor]:
    """Return the number of the box that each anchor of each image is matched with, below 0 for none, int64 [A]."""
    if not of_fcos:
        return cast(list[Tensor], RetinaNet.compute_loss(_RETINANET, targets, {}, anchors))
    # Torchvision reads the numbers of anchors of the first and of the last level. An anchor's width is its level's.
    widths_A = anchors[0][:, 2] - anchors[0][:, 0]
    ends = torch.stack([(widths_A == widths_A[end]).sum() for end in (0, -1)])
    return cast(list[Tensor], FCOS.compute_loss(_FCOS, targets, {}, anchors, ends.tolist()))
