"""The parameters that weight decay leaves alone."""

from __future__ import annotations

from fnmatch import fnmatchcase

from torch import nn

_TABLES = {
    *("class_token", "pos_embedding", "relative_position_bias_table", "cpb_mlp", "logit_scale"),
    "layer_scale",  # timm's ConvNeXt stores it as a vector
}
"""Tokens, tables and scales of torchvision's networks, by a part of their name; timm spares those of its own."""


def undecayed_parameters(module: nn.Module) -> set[nn.Parameter]:
    """Return the parameters that must never decay. A module lists their names in an attribute ``undecayed``."""
    return {owner.get_parameter(name) for owner in module.modules() for name in getattr(owner, "undecayed", ())}


def spared_parameters(module: nn.Module, network: nn.Module) -> set[nn.Parameter]:
    """Return norms and biases of ``module``, and tokens and position tables of the ``network`` in it.

    The latter are what the network's ``no_weight_decay()`` lists, as timm's networks do. torchvision's have no such
    method: of them, these are the parameters of the same meaning.
    """
    norms_and_biases = {parameter for parameter in module.parameters() if parameter.ndim < 2}
    patterns = ["*.bias", *getattr(network, "no_weight_decay", tuple)()]
    of_torchvision = any(type(owner).__module__.startswith("torchvision.models.") for owner in network.modules())
    listed = {
        parameter
        for name, parameter in network.named_parameters()
        if any(fnmatchcase(name, pattern) for pattern in patterns)
        or (of_torchvision and not _TABLES.isdisjoint(name.split(".")))
    }
    return norms_and_biases | listed
