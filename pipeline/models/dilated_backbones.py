"""Backbones whose last stages dilate their convolutions where the classification network halves the map.

Chen et al., arXiv 1706.05587, §3.1. Tensors have the names and shapes of torchvision's classification network. In place
of a stride, the first convolution keeps the dilation of the stage before, as torchvision's ResNet-50 does.
"""

from __future__ import annotations

from collections import OrderedDict

from torch import nn
from torchvision.models import MobileNetV2
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.resnet import BasicBlock, conv1x1, conv3x3

from pipeline.models.initialization import he_normal

OUTPUT_STRIDES = (8, 16)
"""Possible ratios of the image's width to that of the last map."""


def dilated_resnet(
    blocks: tuple[int, int, int, int], *, stem: str, output_stride: int, width: float
) -> IntermediateLayerGetter:
    """Return a ResNet of basic blocks without its head; its features are ``aux``, of stage 3, and ``out``, of stage 4.

    The four stages have that many ``blocks``, and 64, 128, 256 and 512 channels times ``width``. A ``plain`` stem is
    a convolution of 7×7, a ``deep`` one three of 3×3 with 64, 64 and 128 channels. Raises ValueError for other values.
    """
    check_output_stride(output_stride)
    channels = scaled(64, width)
    conv1, channels_in = _stem(stem, channels)
    bn1, relu, maxpool = nn.BatchNorm2d(channels_in), nn.ReLU(inplace=True), nn.MaxPool2d(3, stride=2, padding=1)
    layers: OrderedDict[str, nn.Module] = OrderedDict(conv1=conv1, bn1=bn1, relu=relu, maxpool=maxpool)
    reached, dilation = 4, 1
    for number, count in enumerate(blocks, start=1):
        stride, before = 1, dilation
        if number > 1 and reached < output_stride:
            stride, reached = 2, 2 * reached
        elif number > 1:
            dilation *= 2
        layers[f"layer{number}"] = _stage(channels_in, channels, count, stride, (before, dilation))
        channels_in, channels = channels, 2 * channels
    resnet = nn.Sequential(layers)
    he_normal(resnet)
    return IntermediateLayerGetter(resnet, {"layer3": "aux", "layer4": "out"})


def _stem(kind: str, channels: int) -> tuple[nn.Module, int]:
    """Return the first convolution or convolutions of a ResNet, and their channels."""
    if kind == "plain":
        return nn.Conv2d(3, channels, 7, stride=2, padding=3, bias=False), channels
    if kind != "deep":
        raise ValueError(f"stem must be plain or deep, got {kind!r}")
    first = [conv3x3(3, channels, stride=2), nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]
    second = [conv3x3(channels, channels), nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]
    return nn.Sequential(*first, *second, conv3x3(channels, 2 * channels)), 2 * channels


def _stage(channels_in: int, channels: int, count: int, stride: int, dilations: tuple[int, int]) -> nn.Sequential:
    """Return a stage of basic blocks: its first convolution has the first dilation, all others have the second."""
    shortcut = None
    if stride != 1 or channels_in != channels:
        shortcut = nn.Sequential(conv1x1(channels_in, channels, stride), nn.BatchNorm2d(channels))
    blocks = [BasicBlock(channels_in, channels, stride, shortcut)]
    blocks += [BasicBlock(channels, channels) for _ in range(count - 1)]
    for block in blocks:
        _dilate(block.conv1, dilations[1])
        _dilate(block.conv2, dilations[1])
    _dilate(blocks[0].conv1, dilations[0])
    return nn.Sequential(*blocks)


def dilated_mobilenet_v2(*, output_stride: int, width: float) -> IntermediateLayerGetter:
    """Return a MobileNetV2 without its last convolution and its head; ``aux`` has 96 channels, ``out`` has 320.

    All channels are multiplied by ``width``, as by torchvision's ``width_mult``. Raises ValueError for another stride.
    """
    check_output_stride(output_stride)
    blocks = list(MobileNetV2(num_classes=1, width_mult=width).features)[:-1]
    reached, dilation = 2, 1
    for block in blocks[1:]:
        depthwise = next(each for each in block.modules() if isinstance(each, nn.Conv2d) and each.groups > 1)
        before = dilation
        if depthwise.stride == (2, 2) and reached < output_stride:
            reached *= 2
        elif depthwise.stride == (2, 2):
            depthwise.stride, dilation = (1, 1), 2 * dilation
        _dilate(depthwise, before)
    return IntermediateLayerGetter(nn.Sequential(*blocks), {"13": "aux", "17": "out"})


def _dilate(convolution: nn.Conv2d, dilation: int) -> None:
    """Give a convolution of 3×3 a dilation, and the padding that keeps the size of the map."""
    # Set afterwards, because torchvision's blocks refuse a dilation.
    convolution.dilation = convolution.padding = (dilation, dilation)


def channels_after(block: nn.Module) -> int:
    """Return the channels of the map that a block, which ends in a BatchNorm or an activation after one, returns."""
    return [module.num_features for module in block.modules() if isinstance(module, nn.BatchNorm2d)][-1]


def check_output_stride(output_stride: int) -> None:
    """Raise ValueError for an output stride that these networks do not have."""
    if output_stride not in OUTPUT_STRIDES:
        raise ValueError(f"output_stride must be 8 or 16, got {output_stride!r}")


def scaled(channels: int, width: float) -> int:
    """Return a number of channels times ``width``, at least 1. Raises ValueError unless ``width`` is positive."""
    if not width > 0:
        raise ValueError(f"width must be positive, got {width!r}")
    return max(round(channels * width), 1)
