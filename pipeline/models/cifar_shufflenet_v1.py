"""ShuffleNetV1 for 32×32 images, after Zhang et al., CVPR 2018: three groups, full resolution in the stem.

As in the literature on knowledge distillation, the stem is 1×1 and without pooling, and a ReLU follows the depthwise
convolution. In the paper none follows it. The convolutions keep torch's default initialisation.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torchvision.models.shufflenetv2 import channel_shuffle
from torchvision.ops import Conv2dNormActivation

GROUPS = 3
STEM = 24


class CifarShuffleNetV1(nn.Module):
    """A ShuffleNetV1 whose maps are 32, 16, 8 and 4 pixels wide on a 32-pixel image."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.stem = Conv2dNormActivation(3, STEM, 1)
        self.stage1 = _stage(STEM, 240, units=4)
        self.stage2 = _stage(240, 480, units=8)
        self.stage3 = _stage(480, 960, units=4)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(960, num_classes)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Return logits [B, K]."""
        x = self.stage3(self.stage2(self.stage1(self.stem(images_BCHW))))
        return self.fc(self.avgpool(x).flatten(1))


class ShuffleUnitV1(nn.Module):
    """A unit of grouped 1×1 convolution, shuffle, depthwise convolution and grouped 1×1 convolution.

    A unit of stride 2 computes ``channels - channels_in`` channels and appends the averaged input to them. Any other
    unit adds the input. Then comes a ReLU.
    """

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        computed = channels - channels_in if stride == 2 else channels
        middle = computed // 4
        # After the stem there are too few channels for groups: no grouped squeeze, and so nothing to shuffle.
        self.groups = 1 if channels_in == STEM else GROUPS
        self.squeeze = Conv2dNormActivation(channels_in, middle, 1, groups=self.groups)
        self.filter = Conv2dNormActivation(middle, middle, 3, stride=stride, groups=middle)
        self.widen = Conv2dNormActivation(middle, computed, 1, groups=GROUPS, activation_layer=None)
        self.pool = nn.AvgPool2d(3, stride=2, padding=1) if stride == 2 else None
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return the unit's map."""
        computed = self.widen(self.filter(channel_shuffle(self.squeeze(x_BCHW), self.groups)))
        return self.relu(computed + x_BCHW if self.pool is None else torch.cat([computed, self.pool(x_BCHW)], 1))


def _stage(channels_in: int, channels: int, units: int) -> nn.Sequential:
    first = ShuffleUnitV1(channels_in, channels, stride=2)
    return nn.Sequential(first, *(ShuffleUnitV1(channels, channels, stride=1) for _ in range(units - 1)))


MODELS: dict[str, Callable[[int], nn.Module]] = {"cifar_shufflenet_v1": CifarShuffleNetV1}
