"""ResNets for 32×32 images, He et al., CVPR 2016, §4.2: three stages of basic blocks, 6n + 2 layers.

A shortcut that changes shape is a 1×1 convolution with BatchNorm, the paper's option B. The literature on knowledge
distillation, and its published weights, have that form. The ×4 networks are the wide ones of that literature. Its
ResNet-50 is ImageNet's with a stem that keeps the resolution.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn
from torchvision.models import ResNet
from torchvision.models.resnet import BasicBlock, Bottleneck, conv1x1, conv3x3

from pipeline.models.initialization import he_normal

NARROW = (16, 16, 32, 64)
WIDE = (32, 64, 128, 256)


class CifarResNet(nn.Module):
    """A residual network whose maps are 32, 16 and 8 pixels wide on a 32-pixel image.

    ``depth`` is 6n + 2; ``widths`` are the channels of the stem and of the three stages.
    """

    def __init__(self, num_classes: int, *, depth: int, widths: tuple[int, int, int, int]) -> None:
        super().__init__()
        if depth % 6 != 2:
            raise ValueError(f"a CIFAR ResNet has 6n + 2 layers, got {depth}")
        blocks = (depth - 2) // 6
        self.conv1 = conv3x3(3, widths[0])
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = _stage(widths[0], widths[1], blocks, stride=1)
        self.layer2 = _stage(widths[1], widths[2], blocks, stride=2)
        self.layer3 = _stage(widths[2], widths[3], blocks, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(widths[3], num_classes)
        he_normal(self)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Return logits [B, K]."""
        x = self.relu(self.bn1(self.conv1(images_BCHW)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(self.avgpool(x).flatten(1))


def _stage(channels_in: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
    shortcut = None
    if stride != 1 or channels_in != channels:
        shortcut = nn.Sequential(conv1x1(channels_in, channels, stride), nn.BatchNorm2d(channels))
    first = BasicBlock(channels_in, channels, stride, shortcut)
    return nn.Sequential(first, *(BasicBlock(channels, channels) for _ in range(blocks - 1)))


def resnet50(num_classes: int) -> ResNet:
    """Return a ResNet-50 whose maps are 32, 16, 8 and 4 pixels wide on a 32-pixel image: no stride, no max-pooling."""
    model = ResNet(Bottleneck, [3, 4, 6, 3], num_classes)
    model.conv1 = conv3x3(3, 64)
    model.maxpool = nn.Identity()  # type: ignore[assignment]
    he_normal(model)
    return model


MODELS: dict[str, Callable[[int], nn.Module]] = {
    **{f"cifar_resnet{depth}": partial(CifarResNet, depth=depth, widths=NARROW) for depth in (8, 20, 32, 56, 110)},
    **{f"cifar_resnet{depth}x4": partial(CifarResNet, depth=depth, widths=WIDE) for depth in (8, 32)},
    "cifar_resnet50": resnet50,
}
