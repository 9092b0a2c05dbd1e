"""Heads of segmentation networks, whose last layer is a convolution of 1×1."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.resnet import conv1x1, conv3x3
from torchvision.models.segmentation.deeplabv3 import ASPP

POOLED_SIZES = (1, 2, 3, 6)
"""Width and height of PSPNet's pooled maps."""


class PyramidPooling(nn.Module):
    """PSPNet's module: the input, and what pools of several sizes make of it, with their channels concatenated.

    Zhao et al., CVPR 2017, §3.2. Each pooled map has a quarter of the input's channels.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        quarter = max(channels // len(POOLED_SIZES), 1)
        self.channels = channels + len(POOLED_SIZES) * quarter
        self.pools = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(size), conv1x1(channels, quarter), nn.BatchNorm2d(quarter), nn.ReLU())
            for size in POOLED_SIZES
        )

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return the concatenation, of the input's height and width."""
        size = x_BCHW.shape[2:]
        pooled = [F.interpolate(pool(x_BCHW), size, mode="bilinear", align_corners=True) for pool in self.pools]
        return torch.cat([x_BCHW, *pooled], 1)


def deeplab_head(channels_in: int, channels: int, num_classes: int, output_stride: int) -> nn.Sequential:
    """Return DeepLabV3's head: parallel dilated convolutions (ASPP), one of 3×3 and the classifier."""
    pyramid = ASPP(channels_in, atrous_rates(output_stride), channels)
    return nn.Sequential(pyramid, *_classifier(channels, channels, num_classes))


def atrous_rates(output_stride: int) -> tuple[int, int, int]:
    """Return the dilations of DeepLabV3's head, which reach equally far in the image at any output stride."""
    return 96 // output_stride, 192 // output_stride, 288 // output_stride


def psp_head(channels_in: int, channels: int, num_classes: int) -> nn.Sequential:
    """Return PSPNet's head: the pooled maps, a convolution of 3×3 and the classifier."""
    pooling = PyramidPooling(channels_in)
    return nn.Sequential(pooling, *_classifier(pooling.channels, channels, num_classes))


def _classifier(channels_in: int, channels: int, num_classes: int) -> list[nn.Module]:
    normalized = [conv3x3(channels_in, channels), nn.BatchNorm2d(channels), nn.ReLU()]
    return [*normalized, nn.Dropout(0.1), nn.Conv2d(channels, num_classes, 1)]
