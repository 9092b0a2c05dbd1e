"""The segmentation networks by name: torchvision's, and this project's with small backbones."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torchvision.models
from torch import nn
from torchvision.models import list_models
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.segmentation.deeplabv3 import DeepLabHead
from torchvision.models.segmentation.fcn import FCNHead

from pipeline.models.dilated_backbones import (
    channels_after,
    check_output_stride,
    dilated_mobilenet_v2,
    dilated_resnet,
    scaled,
)
from pipeline.models.segmentation_heads import atrous_rates, deeplab_head, psp_head
from pipeline.models.segmenter import Segmenter

HEAD_CHANNELS = 128
"""Channels of the project's own heads before the classifier, half of torchvision's, as in the published tables."""


def _small_resnet(
    kind: str,
    blocks: tuple[int, int, int, int],
    num_classes: int,
    *,
    stem: str = "plain",
    output_stride: int = 8,
    aux: bool = True,
    width: float = 1.0,
) -> Segmenter:
    """Return DeepLabV3 or PSPNet with a ResNet of basic blocks: see ``dilated_resnet`` for the arguments."""
    backbone = dilated_resnet(blocks, stem=stem, output_stride=output_stride, width=width)
    channels = 8 * scaled(64, width), scaled(HEAD_CHANNELS, width), num_classes
    classifier = deeplab_head(*channels, output_stride) if kind == "deeplabv3" else psp_head(*channels)
    return Segmenter(backbone, classifier, FCNHead(4 * scaled(64, width), num_classes) if aux else None)


def deeplabv3_mobilenet_v2(
    num_classes: int, *, output_stride: int = 8, aux: bool = False, width: float = 1.0
) -> Segmenter:
    """Return DeepLabV3 with a MobileNetV2; the published networks have no auxiliary head."""
    channels = scaled(HEAD_CHANNELS, width)
    backbone = dilated_mobilenet_v2(output_stride=output_stride, width=width)
    aux_channels, channels_in = (channels_after(backbone[name]) for name in ("13", "17"))
    classifier = deeplab_head(channels_in, channels, num_classes, output_stride)
    return Segmenter(backbone, classifier, FCNHead(aux_channels, num_classes) if aux else None)


def _torchvision_resnet(
    kind: str, name: str, num_classes: int, *, output_stride: int = 8, aux: bool = True
) -> Segmenter:
    """Return torchvision's FCN or DeepLabV3 with a ResNet of bottlenecks; its own output stride is 8."""
    check_output_stride(output_stride)
    rates = {"atrous_rates": atrous_rates(output_stride)} if kind == "deeplabv3" else {}
    classifier = (DeepLabHead if kind == "deeplabv3" else FCNHead)(2048, num_classes, **rates)
    dilated = [False, output_stride == 8, True]
    resnet = torchvision.models.get_model(name, weights=None, replace_stride_with_dilation=dilated)
    backbone = IntermediateLayerGetter(resnet, {"layer3": "aux", "layer4": "out"})
    return Segmenter(backbone, classifier, FCNHead(1024, num_classes) if aux else None)


def _torchvision_mobilenet_v3(num_classes: int, *, aux: bool = True) -> Segmenter:
    given: dict[str, Any] = {"num_classes": num_classes, "aux_loss": aux}
    model = torchvision.models.segmentation.deeplabv3_mobilenet_v3_large(weights_backbone=None, **given)
    return Segmenter(model.backbone, model.classifier, model.aux_classifier)


def _torchvision_lraspp(num_classes: int) -> Segmenter:
    model = torchvision.models.segmentation.lraspp_mobilenet_v3_large(weights_backbone=None, num_classes=num_classes)
    return Segmenter(model.backbone, model.classifier, all_features=True)


def backbone_network(name: str) -> str:
    """Return the name of torchvision's classification network whose weights the backbone of ``name`` can have.

    It is ``name`` itself if there is none.
    """
    network = name.partition("_")[2]
    found = [each for each in (network, network.removesuffix("_v2")) if each in list_models(torchvision.models)]
    return found[0] if found else name


MODELS: dict[str, Callable[..., nn.Module]] = {
    **{
        f"{kind}_{name}": partial(_torchvision_resnet, kind, name)
        for kind in ("fcn", "deeplabv3")
        for name in ("resnet50", "resnet101")
    },
    "deeplabv3_mobilenet_v3_large": _torchvision_mobilenet_v3,
    "lraspp_mobilenet_v3_large": _torchvision_lraspp,
    **{
        f"{kind}_{name}": partial(_small_resnet, kind, blocks)
        for kind in ("deeplabv3", "pspnet")
        for name, blocks in (("resnet18", (2, 2, 2, 2)), ("resnet34", (3, 4, 6, 3)))
    },
    "deeplabv3_mobilenet_v2": deeplabv3_mobilenet_v2,
}
