"""How the project's own networks start."""

from __future__ import annotations

from torch import nn


def he_normal(model: nn.Module) -> None:
    """Draw the convolutions of ``model`` from N(0, 2 / fan-out), He et al., ICCV 2015, eq. 14.

    Torch's own start stays elsewhere: BatchNorm is the identity, a linear layer is uniform in ±1/√fan-in.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
