"""ShuffleNetV2 ×1 for 32×32 images, after Ma et al., ECCV 2018, with full resolution in the stem.

As in the literature on knowledge distillation, the stem is 1×1 and without pooling. The convolutions keep torch's
default initialisation.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torchvision.models.shufflenetv2 import InvertedResidual
from torchvision.ops import Conv2dNormActivation


class CifarShuffleNetV2(nn.Module):
    """A ShuffleNetV2 whose maps are 32, 16, 8 and 4 pixels wide on a 32-pixel image.

    Its stages have 116, 232 and 464 channels. A convolution to 1,024 channels follows the last stage.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.stem = Conv2dNormActivation(3, 24, 1)
        self.stage1 = _stage(24, 116, units=4)
        self.stage2 = _stage(116, 232, units=8)
        self.stage3 = _stage(232, 464, units=4)
        self.last = Conv2dNormActivation(464, 1024, 1)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(1024, num_classes)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Return logits [B, K]."""
        x = self.stage3(self.stage2(self.stage1(self.stem(images_BCHW))))
        return self.fc(self.avgpool(self.last(x)).flatten(1))


class ShuffleUnitV2(InvertedResidual):
    """Torchvision's unit with the last ReLU of its branches moved behind the shuffle.

    The output is the same: the half that a unit passes through was already activated by the unit before. But now the
    full map exists before its activation, where a loss can read it.
    """

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__(channels_in, channels, stride)
        self.branch1, self.branch2 = self.branch1[:-1], self.branch2[:-1]
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """Return the unit's map."""
        return self.relu(super().forward(x))


def _stage(channels_in: int, channels: int, units: int) -> nn.Sequential:
    first = ShuffleUnitV2(channels_in, channels, stride=2)
    return nn.Sequential(first, *(ShuffleUnitV2(channels, channels, stride=1) for _ in range(units - 1)))


MODELS: dict[str, Callable[[int], nn.Module]] = {"cifar_shufflenet_v2": CifarShuffleNetV2}
