"""Torchvision's losses of a detector of two stages, from the anchors and regions that the network has chosen.

They are those of torchvision's networks, called without a network.

B batch, R regions, K classes, C numbers, N anchors or regions, T regions of all images.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.roi_heads import fastrcnn_loss
from torchvision.models.detection.rpn import RegionProposalNetwork, concat_box_prediction_layers

from pipeline.batch import Outputs
from pipeline.features.names import levels
from pipeline.losses._pixels import mean_count

RPN_WEIGHTS, ROI_WEIGHTS = (1.0, 1.0, 1.0, 1.0), (10.0, 10.0, 5.0, 5.0)
"""Factors of a box's numbers in the first and in the second stage, as in torchvision and MMDetection."""
_Pair = tuple[Tensor, Tensor]
"""The losses of classes and of boxes."""


def two_stage_losses(outputs: Outputs, *, per_image: bool) -> dict[str, Tensor]:
    """Return the losses ``rpn_class``, ``rpn_box``, ``class`` and ``box``.

    They are sums divided by the number of chosen anchors or regions of all images on all ranks. With ``per_image`` they
    are those of an image divided by its own number, averaged over the images.
    """
    if outputs.logits.is_meta:  # where nothing is chosen; what is counted there is the network's work
        rpn = [torch.stack([map_BCHW.mean() for map_BCHW in _maps(outputs, kind)]).sum() for kind in ("class", "box")]
        losses = [*rpn, outputs.features["roi.class"].mean(), outputs.features["roi.box"].mean()]
    else:
        stages = (("rpn.targets", _rpn_losses), ("roi.targets", _region_losses))
        losses = [loss for targets, of in stages for loss in _normalized(outputs, targets, of, per_image)]
    return dict(zip(("rpn_class", "rpn_box", "class", "box"), losses, strict=True))


def _normalized(
    outputs: Outputs, targets: str, losses_of: Callable[[Outputs, slice], _Pair], per_image: bool
) -> list[Tensor]:
    """Return the losses of a stage, which ``losses_of`` gives as means of some images."""
    chosen_BN = outputs.features[targets][..., 4] >= 0
    images = len(chosen_BN)
    if per_image:
        each = [losses_of(outputs, slice(image, image + 1)) for image in range(images)]
        return [torch.stack(losses).sum() / images for losses in zip(*each, strict=True)]
    # A mean over this rank's becomes one over those of all ranks.
    share = chosen_BN.sum() / mean_count(chosen_BN)
    return [loss * share for loss in losses_of(outputs, slice(0, images))]


def _rpn_losses(outputs: Outputs, images: slice) -> _Pair:
    anchors = list(outputs.features["anchors"][images])
    boxes, labels = _boxes_and_labels(outputs.features["rpn.targets"][images])
    chosen = [label >= 1 for label in labels], [(label >= 0) & (label < 1) for label in labels]
    # It stands in for ``self`` of the method, with all that it reads of it.
    rpn: Any = SimpleNamespace(fg_bg_sampler=lambda _labels: chosen)
    maps = ([map_BCHW[images] for map_BCHW in _maps(outputs, kind)] for kind in ("class", "box"))
    codes = BoxCoder(RPN_WEIGHTS).encode(boxes, anchors)
    return RegionProposalNetwork.compute_loss(rpn, *concat_box_prediction_layers(*maps), labels, list(codes))


def _region_losses(outputs: Outputs, images: slice) -> _Pair:
    chosen_BR = outputs.features["roi.targets"][images][..., 4] >= 0

    def rows(name: str) -> list[Tensor]:
        return [x_RC[chosen_R] for x_RC, chosen_R in zip(outputs.features[name][images], chosen_BR, strict=True)]

    boxes, labels = _boxes_and_labels(rows("roi.targets"))
    codes = BoxCoder(ROI_WEIGHTS).encode(boxes, rows("roi.boxes"))
    logits_TK, deltas_TC = (torch.cat(rows(name)) for name in ("roi.class", "roi.box"))
    return fastrcnn_loss(logits_TK, deltas_TC, [label.long() for label in labels], list(codes))


def _boxes_and_labels(targets: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Return the boxes and the labels of each image's targets, [N, 5]."""
    return [each[:, :4] for each in targets], [each[:, 4] for each in targets]


def _maps(outputs: Outputs, kind: str) -> list[Tensor]:
    """Return the maps of all levels of the first stage."""
    return [outputs.features[name] for name in levels(outputs.features, f"rpn.{kind}")]
