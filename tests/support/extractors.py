"""A network of two convolutions whose features images are compared by, for images of a few pixels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipeline.features.taps import FeatureTaps
from pipeline.models.headless import NoHead

WEIGHTS = {
    "one": [[0.9, -0.4, 0.2], [-0.5, 0.3, 0.7], [0.1, 0.8, -0.6], [0.4, 0.5, 0.3]],
    "two": [[0.7, -0.2, 0.5, -0.3], [-0.6, 0.9, 0.1, 0.4]],
}
"""Weights of the 1×1 convolutions, by output and input."""
BIASES = {"one": [0.1, -0.2, 0.05, 0.3], "two": [-0.1, 0.2]}


class Tiny(nn.Module):
    """ReLUs of two 1×1 convolutions with the same weights always, and a classifier of their mean."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.one, self.two = (
            nn.Sequential(nn.Conv2d(len(rows[0]), len(rows), 1), nn.ReLU()) for rows in WEIGHTS.values()
        )
        self.head = nn.Linear(2, num_classes)
        with torch.no_grad():
            for name, rows in WEIGHTS.items():
                conv = self.get_submodule(f"{name}.0")
                conv.weight.copy_(torch.tensor(rows)[..., None, None])
                conv.bias.copy_(torch.tensor(BIASES[name]))

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Return logits."""
        return self.head(self.two(self.one(images_BCHW)).mean((2, 3)))


def tiny_extractor() -> FeatureTaps:
    """Return the network without its head, in float64, with its two taps."""
    network = Tiny(1).double()
    network.head = NoHead()  # type: ignore[assignment]
    for name, rows in WEIGHTS.items():  # not the float32 roundings of its constants
        conv = network.get_submodule(f"{name}.0")
        assert isinstance(conv, nn.Conv2d)
        conv.weight.data = torch.tensor(rows, dtype=torch.float64)[..., None, None]
        conv.bias = nn.Parameter(torch.tensor(BIASES[name], dtype=torch.float64))
    return FeatureTaps(network, {"one": "one", "two": "two"}, ["one", "two"])
