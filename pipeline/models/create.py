"""Creation of networks by name: torchvision's, this project's, timm's (``timm/<name>``) and a user's (by path)."""

from __future__ import annotations

import importlib
from difflib import get_close_matches
from inspect import signature

import torchvision.models
from torch import nn

from pipeline.models import (
    cifar_mobilenet_v2,
    cifar_resnet,
    cifar_shufflenet_v1,
    cifar_shufflenet_v2,
    cifar_vgg,
    cifar_wrn,
    mobilenet_v1,
)
from pipeline.models.from_timm import PREFIX, create_timm_model

PROJECT_MODELS = {
    **cifar_resnet.MODELS,
    **cifar_wrn.MODELS,
    **cifar_vgg.MODELS,
    **cifar_mobilenet_v2.MODELS,
    **cifar_shufflenet_v1.MODELS,
    **cifar_shufflenet_v2.MODELS,
    **mobilenet_v1.MODELS,
}
"""This project's networks by name, as functions of the number of classes."""

AUXILIARY = ("googlenet", "inception_v3")
"""Torchvision's networks that return several tensors in training mode, unless ``aux_logits`` is False."""


def known_models() -> list[str]:
    """Return the names that ``create_model`` knows without timm, torchvision's first."""
    return [*torchvision.models.list_models(torchvision.models), *PROJECT_MODELS]


def create_model(name: str, num_classes: int) -> nn.Module:
    """Return a freshly initialised network that maps images [B, 3, H, W] to logits [B, ``num_classes``].

    ``name`` is one of ``known_models()``, or ``timm/<name>``, or ``package.module:factory``, called as
    ``factory(num_classes=…)``. Raises ValueError if there is no such network.
    """
    if name.startswith(PREFIX):
        return create_timm_model(name, num_classes)
    if ":" in name:
        return _from_factory(name, num_classes)
    if name in PROJECT_MODELS:
        return PROJECT_MODELS[name](num_classes)
    if name in known_models():
        plain = {"aux_logits": False, "init_weights": True} if name in AUXILIARY else {}
        return torchvision.models.get_model(name, weights=None, num_classes=num_classes, **plain)
    near = get_close_matches(name, known_models(), n=3)
    hint = (
        f"did you mean {' or '.join(near)}?"
        if near
        else "give a torchvision name, timm/<name> or package.module:factory"
    )
    raise ValueError(f"there is no model {name!r}; {hint}")


def _from_factory(path: str, num_classes: int) -> nn.Module:
    module_name, _, factory_name = path.partition(":")
    try:
        factory = getattr(importlib.import_module(module_name), factory_name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"no model factory at {path!r}: {error}") from error
    # Only the arguments are checked here. A TypeError from inside the factory is a bug of the user's and stays as it
    # is.
    try:
        signature(factory).bind(num_classes=num_classes)
    except TypeError as error:
        raise ValueError(
            f"{path!r} is called as {factory_name}(num_classes={num_classes}), which fails: {error}"
        ) from error
    model = factory(num_classes=num_classes)
    if not isinstance(model, nn.Module):
        raise ValueError(f"{path!r} returned a {type(model).__name__}, expected a torch.nn.Module")
    return model
