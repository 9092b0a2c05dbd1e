"""Torchvision's matching of anchors with boxes, and its losses of the matched anchors.   A anchors of all levels.

They are methods of torchvision's networks. Here they are called without a network.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor
from torchvision.models.detection import FCOS, RetinaNet
from torchvision.models.detection._utils import BoxCoder, BoxLinearCoder, Matcher
from torchvision.models.detection.fcos import FCOSHead
from torchvision.models.detection.retinanet import RetinaNetClassificationHead, RetinaNetRegressionHead

# They stand in for ``self`` of those methods, with all that they read of it.
_MATCHES = SimpleNamespace(compute_loss=lambda *arguments: arguments[-1])
_RETINANET: Any = SimpleNamespace(head=_MATCHES, proposal_matcher=Matcher(0.5, 0.4, allow_low_quality_matches=True))
_FCOS: Any = SimpleNamespace(head=_MATCHES, center_sampling_radius=1.5)
_CLASS_HEAD: Any = SimpleNamespace(BETWEEN_THRESHOLDS=Matcher.BETWEEN_THRESHOLDS)
_FCOS_HEAD: Any = SimpleNamespace(box_coder=BoxLinearCoder(normalize_by_size=True))


def anchor_losses(
    outputs: dict[str, Tensor],
    anchors: list[Tensor],
    targets: list[dict[str, Tensor]],
    matches: list[Tensor],
    *,
    of_fcos: bool,
    distance: str,
) -> dict[str, Tensor]:
    """Return torchvision's losses of a group of images, divided by its matched anchors, at least one.

    ``distance`` is that of RetinaNet's boxes.
    """
    if of_fcos:
        return FCOSHead.compute_loss(_FCOS_HEAD, targets, outputs, anchors, matches)
    box_head: Any = SimpleNamespace(box_coder=BoxCoder((1.0, 1.0, 1.0, 1.0)), _loss_type=distance)
    of_classes = RetinaNetClassificationHead.compute_loss(_CLASS_HEAD, targets, outputs, matches)
    of_boxes = RetinaNetRegressionHead.compute_loss(box_head, targets, outputs, anchors, matches)
    return {"classification": of_classes, "bbox_regression": of_boxes}


def match_anchors(anchors: list[Tensor], targets: list[dict[str, Tensor]], *, of_fcos: bool) -> list[Tensor]:
    """Return the number of the box that each anchor of each image is matched with, below 0 for none, int64 [A]."""
    if not of_fcos:
        return cast(list[Tensor], RetinaNet.compute_loss(_RETINANET, targets, {}, anchors))
    # Torchvision reads the numbers of anchors of the first and of the last level. An anchor's width is its level's.
    widths_A = anchors[0][:, 2] - anchors[0][:, 0]
    ends = torch.stack([(widths_A == widths_A[end]).sum() for end in (0, -1)])
    return cast(list[Tensor], FCOS.compute_loss(_FCOS, targets, {}, anchors, ends.tolist()))
