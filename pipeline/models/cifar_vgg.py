"""VGG networks for 32×32 images, after Simonyan and Zisserman, ICLR 2015: five blocks with BatchNorm, one linear layer.

The maps are halved after the first three blocks, so the last two blocks have maps of 4×4 pixels for a 32-pixel image.
That is the form in the literature on knowledge distillation.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation

from pipeline.models.initialization import he_normal, small_normal

WIDTHS = (64, 128, 256, 512, 512)


class CifarVGG(nn.Module):
    """A VGG with ``depth`` convolutions in each of its blocks: 1 for VGG-8, 2 for VGG-13."""

    def __init__(self, num_classes: int, *, depth: int) -> None:
        super().__init__()
        self.stem = _block(3, WIDTHS[0], depth)
        self.stage1 = _block(WIDTHS[0], WIDTHS[1], depth)
        self.stage2 = _block(WIDTHS[1], WIDTHS[2], depth)
        self.stage3 = _block(WIDTHS[2], WIDTHS[3], depth)
        self.stage4 = _block(WIDTHS[3], WIDTHS[4], depth)
        self.maxpool = nn.MaxPool2d(2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(WIDTHS[4], num_classes)
        he_normal(self)
        small_normal(self.fc)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Return logits [B, K]."""
        x = self.maxpool(self.stem(images_BCHW))
        x = self.maxpool(self.stage1(x))
        x = self.maxpool(self.stage2(x))
        x = self.stage4(self.stage3(x))
        return self.fc(self.avgpool(x).flatten(1))


def _block(channels_in: int, channels: int, depth: int) -> nn.Sequential:
    widths = (channels_in, *[channels] * (depth - 1))
    return nn.Sequential(*(Conv2dNormActivation(width, channels, 3, bias=True) for width in widths))


MODELS: dict[str, Callable[[int], nn.Module]] = {
    "cifar_vgg8": partial(CifarVGG, depth=1),
    "cifar_vgg13": partial(CifarVGG, depth=2),
}
