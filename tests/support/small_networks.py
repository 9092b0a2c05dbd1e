"""Networks of a user's, small."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Small(nn.Module):
    """One convolution and a classifier: quick to compile."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, stride=4), nn.BatchNorm2d(8), nn.ReLU())
        self.classify = nn.Linear(8, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits."""
        return self.classify(self.body(images).mean((2, 3)))


class Careful(nn.Module):
    """A user's network that looks at its numbers, while it is built and while it runs."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, num_classes, 3)
        self.rates = [rate.item() for rate in torch.linspace(0, 1, 3)]

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Return logits."""
        map_BCHW = self.conv(images_BCHW)
        return map_BCHW.mean((2, 3)) if map_BCHW.abs().max() < 1e9 else map_BCHW.amax((2, 3))
