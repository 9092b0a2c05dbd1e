"""A plain network of two stages for detection in demos and tests, which two cores train in minutes."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from pipeline.models.detector import Detector
from pipeline.models.faster_rcnn import FasterRCNNDetector
from pipeline.models.plain_retinanet import ANCHOR_RATIOS, ANCHOR_SIZES, plain_pyramid

POOLED = 7
"""Side of a region's features."""
LEARNT_REGIONS = 64
"""Regions of an image that the second stage learns from: an eighth of torchvision's, for small images."""


def plain_fasterrcnn(num_classes: int, *, width: int = 16, depth: int = 2, channels: int = 32) -> Detector:
    """Return Faster R-CNN on a ``plain_backbone``, with levels P3, P4 and, pooled, P5.

    ``channels`` are those of all levels; the second stage's vectors are four times as long.
    """
    sizes = (*ANCHOR_SIZES, (64, 88))
    model = FasterRCNNDetector(
        plain_pyramid(width, depth, channels, LastLevelMaxPool()),
        num_classes,
        first=3,
        rpn_anchor_generator=AnchorGenerator(sizes, (ANCHOR_RATIOS,) * len(sizes)),
        box_roi_pool=MultiScaleRoIAlign(["stage3", "stage4"], POOLED, sampling_ratio=2),
        box_batch_size_per_image=LEARNT_REGIONS,
    )
    model.roi_heads.box_head = TwoMLPHead(channels * POOLED**2, 4 * channels)
    model.roi_heads.box_predictor = FastRCNNPredictor(4 * channels, num_classes + 1)
    return model


MODELS: dict[str, Callable[..., nn.Module]] = {"plain_fasterrcnn": plain_fasterrcnn}
