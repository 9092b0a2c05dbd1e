"""The networks of detection by name, which are built of torchvision's parts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn
from torchvision.models.detection.backbone_utils import BackboneWithFPN, resnet_fpn_backbone
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from pipeline.models.detector import Detector, FCOSDetector, RetinaNetDetector
from pipeline.models.faster_rcnn import FasterRCNNDetector

PYRAMID_CHANNELS = 256
"""Channels of every level of a pyramid."""
BACKBONES = ("resnet18", "resnet34", "resnet50", "resnet101", "resnext101_64x4d")


def _pyramid(name: str, p6_from: str = "p5") -> BackboneWithFPN:
    """Return a backbone with levels P3 to P7; P6 is computed from P5, or from the backbone's last map C5."""
    if p6_from not in ("p5", "c5"):
        raise ValueError(f"p6_from must be p5 or c5, got {p6_from!r}")
    deepest = 512 if name in ("resnet18", "resnet34") else 2048
    extra = LastLevelP6P7(PYRAMID_CHANNELS if p6_from == "p5" else deepest, PYRAMID_CHANNELS)
    return _with_pyramid(name, returned_layers=[2, 3, 4], extra_blocks=extra)


def _with_pyramid(name: str, **options: Any) -> BackboneWithFPN:
    """Return a backbone with a pyramid, which has P2 to P5 and a pool P6 by default."""
    # BatchNorms are those of the networks of classes: student.freeze freezes them, and a teacher's are frozen.
    return resnet_fpn_backbone(
        backbone_name=name, weights=None, norm_layer=nn.BatchNorm2d, trainable_layers=5, **options
    )


def _retinanet(name: str, num_classes: int, *, p6_from: str = "p5") -> Detector:
    """Return RetinaNet with P3 to P7."""
    return RetinaNetDetector(_pyramid(name, p6_from), num_classes)


def retinanet_resnet50_v2(num_classes: int) -> Detector:
    """Return torchvision's second RetinaNet, whose P6 is of C5 and whose towers have GroupNorms."""
    model = RetinaNetDetector(_pyramid("resnet50", "c5"), num_classes)
    anchors = model.anchor_generator.num_anchors_per_location()[0]
    model.head = RetinaNetHead(PYRAMID_CHANNELS, anchors, num_classes, norm_layer=partial(nn.GroupNorm, 32))
    return model


def _fcos(name: str, num_classes: int, *, p6_from: str = "p5") -> Detector:
    """Return FCOS with P3 to P7, whose towers have GroupNorms."""
    return FCOSDetector(_pyramid(name, p6_from), num_classes)


def _faster_rcnn(name: str, num_classes: int) -> Detector:
    """Return Faster R-CNN with P2 to P6."""
    return FasterRCNNDetector(_with_pyramid(name), num_classes)


def faster_rcnn_resnet50_v2(num_classes: int) -> Detector:
    """Return torchvision's second Faster R-CNN, with deeper heads, and BatchNorms in these and in the pyramid."""
    backbone = _with_pyramid("resnet50")
    widths = [256, 512, 1024, 2048]
    backbone.fpn = FeaturePyramidNetwork(widths, PYRAMID_CHANNELS, LastLevelMaxPool(), nn.BatchNorm2d)
    model = FasterRCNNDetector(backbone, num_classes)
    model.rpn.head = RPNHead(PYRAMID_CHANNELS, model.rpn.anchor_generator.num_anchors_per_location()[0], conv_depth=2)
    pooled = (PYRAMID_CHANNELS, *model.roi_heads.box_roi_pool.output_size)
    model.roi_heads.box_head = FastRCNNConvFCHead(pooled, [PYRAMID_CHANNELS] * 4, [1024], norm_layer=nn.BatchNorm2d)
    return model


MODELS: dict[str, Callable[..., nn.Module]] = {
    **{f"retinanet_{name}": partial(_retinanet, name) for name in BACKBONES},
    "retinanet_resnet50_v2": retinanet_resnet50_v2,
    **{f"fcos_{name}": partial(_fcos, name) for name in BACKBONES},
    **{f"fasterrcnn_{name}": partial(_faster_rcnn, name) for name in BACKBONES},
    "fasterrcnn_resnet50_v2": faster_rcnn_resnet50_v2,
}
