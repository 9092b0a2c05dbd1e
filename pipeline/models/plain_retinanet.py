"""A plain network for detection in demos and tests, which two cores train in minutes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from torch import nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock

from pipeline.models.detector import Detector, RetinaNetDetector
from pipeline.models.initialization import he_normal
from pipeline.models.plain_fpn import check_plain, plain_backbone

ANCHOR_SIZES = ((16, 22), (32, 44))
"""Sides of the anchors of each level, in pixels."""
ANCHOR_RATIOS = (0.7, 1.0, 1.43)
"""Height divided by width of the anchors of every size."""


def plain_pyramid(width: int, depth: int, channels: int, extra: ExtraFPNBlock | None = None) -> nn.Sequential:
    """Return a ``plain_backbone`` with levels P3 and P4 of ``channels``, and those of ``extra``."""
    check_plain(width, depth)
    body = plain_backbone(width, depth, ("stage3", "stage4"))
    he_normal(body)
    pyramid = FeaturePyramidNetwork([4 * width, 8 * width], channels, extra)
    backbone = nn.Sequential(OrderedDict(body=body, fpn=pyramid))
    backbone.out_channels = channels  # type: ignore[assignment]  # an attribute that torchvision's networks ask for
    return backbone


def plain_retinanet(num_classes: int, *, width: int = 16, depth: int = 2, channels: int = 32) -> Detector:
    """Return RetinaNet on a ``plain_backbone``, with levels P3 and P4 and towers of one convolution.

    ``channels`` are those of both levels.
    """
    backbone = plain_pyramid(width, depth, channels)
    anchors = AnchorGenerator(ANCHOR_SIZES, (ANCHOR_RATIOS,) * len(ANCHOR_SIZES))
    head = RetinaNetHead(channels, anchors.num_anchors_per_location()[0], num_classes)
    for tower in (head.classification_head, head.regression_head):
        tower.conv = tower.conv[:1]
    return RetinaNetDetector(backbone, num_classes, anchor_generator=anchors, head=head)


MODELS: dict[str, Callable[..., nn.Module]] = {"plain_retinanet": plain_retinanet}
