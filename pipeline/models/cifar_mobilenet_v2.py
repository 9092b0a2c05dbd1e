"""MobileNetV2 for 32×32 images, after Sandler et al., CVPR 2018, table 2: half width, expansion 6.

It has the form of the literature on knowledge distillation. Activations are plain ReLUs. The first block, too, has an
expanding convolution, which expands by 1. The image is halved by the stem and by three blocks.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation

from pipeline.models.initialization import he_normal, small_normal


class CifarMobileNetV2(nn.Module):
    """A MobileNetV2 whose maps are 16, 16, 8, 4 and 2 pixels wide on a 32-pixel image.

    Its stages end linearly, with 12, 16, 48 and 160 channels. A convolution to 1,280 channels follows the last stage.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.stem = Conv2dNormActivation(3, 16, 3, stride=2)
        self.stage1 = nn.Sequential(*_blocks(16, 8, 1, expansion=1), *_blocks(8, 12, 2))
        self.stage2 = nn.Sequential(*_blocks(12, 16, 3, stride=2))
        self.stage3 = nn.Sequential(*_blocks(16, 32, 4, stride=2), *_blocks(32, 48, 3))
        self.stage4 = nn.Sequential(*_blocks(48, 80, 3, stride=2), *_blocks(80, 160, 1))
        self.last = Conv2dNormActivation(160, 1280, 1)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(1280, num_classes)
        he_normal(self)
        small_normal(self.fc)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Return logits [B, K]."""
        x = self.stage4(self.stage3(self.stage2(self.stage1(self.stem(images_BCHW)))))
        return self.fc(self.avgpool(self.last(x)).flatten(1))


class LinearBottleneck(nn.Module):
    """A block that expands, filters each channel and projects without activation.

    The input is added if it has the shape of the output.
    """

    def __init__(self, channels_in: int, channels: int, *, stride: int, expansion: int) -> None:
        super().__init__()
        wide = channels_in * expansion
        self.layers = nn.Sequential(
            Conv2dNormActivation(channels_in, wide, 1),
            Conv2dNormActivation(wide, wide, 3, stride=stride, groups=wide),
            Conv2dNormActivation(wide, channels, 1, activation_layer=None),
        )
        self.residual = stride == 1 and channels_in == channels

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return the block's map."""
        return x_BCHW + self.layers(x_BCHW) if self.residual else self.layers(x_BCHW)


def _blocks(
    channels_in: int, channels: int, count: int, *, stride: int = 1, expansion: int = 6
) -> list[LinearBottleneck]:
    first = LinearBottleneck(channels_in, channels, stride=stride, expansion=expansion)
    others = [LinearBottleneck(channels, channels, stride=1, expansion=expansion) for _ in range(count - 1)]
    return [first, *others]


MODELS: dict[str, Callable[[int], nn.Module]] = {"cifar_mobilenet_v2": CifarMobileNetV2}
