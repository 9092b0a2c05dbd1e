"""Initialisation of the project's own networks."""

from __future__ import annotations

from torch import nn


def he_normal(model: nn.Module) -> None:
    """Draw the convolutions of ``model`` from N(0, 2 / fan-out), He et al., ICCV 2015, eq. 14, and zero their biases.

    Other modules keep torch's default: BatchNorm is the identity, a linear layer is uniform in ±1/√fan-in.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def small_normal(linear: nn.Linear) -> None:
    """Draw a linear layer from N(0, 0.01²) with zero bias, so that the first logits are nearly equal."""
    nn.init.normal_(linear.weight, std=0.01)
    nn.init.zeros_(linear.bias)
