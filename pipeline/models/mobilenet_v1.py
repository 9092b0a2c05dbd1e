"""MobileNetV1, Howard et al., arXiv 1704.04861, table 1: a stem and thirteen depthwise-separable blocks with ReLU."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation

from pipeline.models.initialization import he_normal


class MobileNetV1(nn.Module):
    """A MobileNetV1 of width 1.0: 4,231,976 parameters at 1,000 classes, 0.569 GMAC at 224 pixels.

    Stage n ends where the map is 1 / 2ⁿ⁺¹ of the image: 128, 256, 512 and 1,024 channels.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.stem = Conv2dNormActivation(3, 32, 3, stride=2)
        self.stage1 = nn.Sequential(_separable(32, 64), _separable(64, 128, stride=2), _separable(128, 128))
        self.stage2 = nn.Sequential(_separable(128, 256, stride=2), _separable(256, 256))
        self.stage3 = nn.Sequential(_separable(256, 512, stride=2), *(_separable(512, 512) for _ in range(5)))
        self.stage4 = nn.Sequential(_separable(512, 1024, stride=2), _separable(1024, 1024))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(1024, num_classes)
        he_normal(self)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Return logits [B, K]."""
        x = self.stage4(self.stage3(self.stage2(self.stage1(self.stem(images_BCHW)))))
        return self.fc(self.avgpool(x).flatten(1))


def _separable(channels_in: int, channels: int, stride: int = 1) -> nn.Sequential:
    depthwise = Conv2dNormActivation(channels_in, channels_in, 3, stride=stride, groups=channels_in)
    return nn.Sequential(depthwise, Conv2dNormActivation(channels_in, channels, 1))


MODELS: dict[str, Callable[[int], nn.Module]] = {"mobilenet_v1": MobileNetV1}
