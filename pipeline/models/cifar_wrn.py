"""Wide residual networks for 32×32 images, Zagoruyko and Komodakis, BMVC 2016: pre-activation blocks, 6n + 4 layers.

A block adds to a residual stream that is never activated. The output of a stage is activated by the next block, or
after the last stage by the network's final BatchNorm and ReLU. That activated map is the stage here.

Published code often compares the stream before activation. To do the same, set
``stages: {stage1: layer1, stage2: layer2, stage3: layer3}`` in a recipe.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn
from torchvision.models.resnet import conv1x1, conv3x3

from pipeline.models.initialization import he_normal


class CifarWideResNet(nn.Module):
    """A wide residual network whose maps are 32, 16 and 8 pixels wide on a 32-pixel image.

    ``depth`` is 6n + 4; the stages have 16, 32 and 64 times ``width`` channels.
    """

    def __init__(self, num_classes: int, *, depth: int, width: int) -> None:
        super().__init__()
        if depth % 6 != 4:
            raise ValueError(f"a wide residual network has 6n + 4 layers, got {depth}")
        blocks = (depth - 4) // 6
        self.conv1 = conv3x3(3, 16)
        self.layer1 = _stage(16, 16 * width, blocks, stride=1)
        self.layer2 = _stage(16 * width, 32 * width, blocks, stride=2)
        self.layer3 = _stage(32 * width, 64 * width, blocks, stride=2)
        self.bn1 = nn.BatchNorm2d(64 * width)
        self.relu1 = nn.ReLU(inplace=True)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(64 * width, num_classes)
        he_normal(self)
        nn.init.zeros_(self.fc.bias)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Return logits [B, K]."""
        x = self.layer3(self.layer2(self.layer1(self.conv1(images_BCHW))))
        return self.fc(self.avgpool(self.relu1(self.bn1(x))).flatten(1))


class PreActivationBlock(nn.Module):
    """A block of BatchNorm, ReLU and convolution, twice.

    If the shape changes, the shortcut is a convolution of the first ReLU's output, without a BatchNorm.
    """

    def __init__(self, channels_in: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels_in)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = conv3x3(channels_in, channels, stride)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(channels, channels)
        self.shortcut = conv1x1(channels_in, channels, stride) if channels_in != channels else None

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return the residual stream after this block, before activation."""
        active = self.relu1(self.bn1(x_BCHW))
        change = self.conv2(self.relu2(self.bn2(self.conv1(active))))
        return change + (x_BCHW if self.shortcut is None else self.shortcut(active))


def _stage(channels_in: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
    first = PreActivationBlock(channels_in, channels, stride)
    return nn.Sequential(first, *(PreActivationBlock(channels, channels) for _ in range(blocks - 1)))


MODELS: dict[str, Callable[[int], nn.Module]] = {
    f"cifar_wrn_{depth}_{width}": partial(CifarWideResNet, depth=depth, width=width)
    for depth in (16, 40)
    for width in (1, 2)
}
