"""Creation of networks by name: torchvision's, this project's, timm's (``timm/<name>``) and a user's (by path)."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from functools import cache
from inspect import Parameter, signature
from typing import Any

import torch
import torchvision.models
from torch import nn

from pipeline.models import (
    cifar_mobilenet_v2,
    cifar_resnet,
    cifar_shufflenet_v1,
    cifar_shufflenet_v2,
    cifar_vgg,
    cifar_wrn,
    detection,
    mobilenet_v1,
    pisr,
    plain_faster_rcnn,
    plain_fpn,
    plain_retinanet,
    segmentation,
    super_resolution,
)
from pipeline.models.arguments import check_arguments, failed, needed_arguments
from pipeline.models.from_timm import PREFIX, create_timm_model
from pipeline.models.stages import stages
from pipeline.models.subclasses import SUBCLASSES, check_number, split_head

PROJECT_MODELS = {
    **cifar_resnet.MODELS,
    **cifar_wrn.MODELS,
    **cifar_vgg.MODELS,
    **cifar_mobilenet_v2.MODELS,
    **cifar_shufflenet_v1.MODELS,
    **cifar_shufflenet_v2.MODELS,
    **mobilenet_v1.MODELS,
    **segmentation.MODELS,
    **plain_fpn.MODELS,
    **detection.MODELS,
    **plain_retinanet.MODELS,
    **plain_faster_rcnn.MODELS,
    **super_resolution.MODELS,
    **pisr.MODELS,
}
"""This project's networks by name, as functions of the number of classes, with those of other tasks."""

AUXILIARY = ("googlenet", "inception_v3")
"""Torchvision's networks that return several tensors in training mode, unless ``aux_logits`` is False."""
UNNAMED = ("width_mult", "reduced_tail", "dilated")
"""Arguments of torchvision's MobileNetV3 that no signature of it names."""


def known_models() -> list[str]:
    """Return the names that ``create_model`` knows without timm, torchvision's first."""
    return [*torchvision.models.list_models(torchvision.models), *PROJECT_MODELS]


def create_model(name: str, num_classes: int, arguments: Mapping[str, Any] | None = None) -> nn.Module:
    """Return a freshly initialised network that maps images [B, 3, H, W] to logits [B, ``num_classes``].

    Those of a segmentation network are a map, [B, ``num_classes``, h, w]. Those of a detector are of its anchors, or of
    the regions of its second stage, [B, boxes, ``num_classes``]. Those of a network of super-resolution are a larger
    image.

    ``name`` is one of ``known_models()``, or ``timm/<name>``, or ``package.module:factory``, called as
    ``factory(num_classes=…)``. ``arguments`` are more keyword arguments of the factory; ``subclasses`` among them
    splits each class of a linear head. Raises ValueError if there is no such network, and ArgumentError if it cannot be
    built with these arguments.
    """
    given = dict(arguments or {})
    if SUBCLASSES in given:
        number = check_number(given.pop(SUBCLASSES))
        model = create_model(name, num_classes * number, given)
        return split_head(model, stages(model).get("logits"), number)
    if name.startswith(PREFIX):
        return create_timm_model(name, num_classes, given)
    if ":" in name:
        return _from_factory(name, num_classes, given)
    if name in PROJECT_MODELS:
        return _from_project(name, num_classes, given)
    if name in known_models():
        return _from_torchvision(name, num_classes, given)
    near = get_close_matches(name, known_models(), n=3)
    hint = (
        f"did you mean {' or '.join(near)}?"
        if near
        else "give a torchvision name, timm/<name> or package.module:factory"
    )
    raise ValueError(f"there is no model {name!r}; {hint}")


def _from_project(name: str, num_classes: int, arguments: dict[str, Any]) -> nn.Module:
    factory = PROJECT_MODELS[name]
    if not arguments and not needed_arguments(factory):
        return factory(num_classes)
    check_arguments(name, arguments, [factory])
    try:
        return factory(num_classes, **arguments)
    except Exception as error:  # a value of another type or out of range may raise nearly any error
        raise failed(name, arguments, error) from error


def _from_torchvision(name: str, num_classes: int, arguments: dict[str, Any]) -> nn.Module:
    plain = {"aux_logits": False, "init_weights": True} if name in AUXILIARY else {}
    if not arguments:
        return torchvision.models.get_model(name, weights=None, num_classes=num_classes, **plain)
    # A builder passes what it does not name on to the network's class.
    builder, more = torchvision.models.get_model_builder(name), UNNAMED if name.startswith("mobilenet_v3") else ()
    check_arguments(name, arguments, [builder, _torchvision_class(name)], more)
    try:
        return torchvision.models.get_model(name, weights=None, num_classes=num_classes, **{**plain, **arguments})
    except Exception as error:  # as above
        raise failed(name, arguments, error) from error


@cache
def _torchvision_class(name: str) -> type[nn.Module]:
    with torch.device("meta"), torch.random.fork_rng():
        return type(_from_torchvision(name, 2, {}))


def _from_factory(path: str, num_classes: int, arguments: dict[str, Any]) -> nn.Module:
    module_name, _, factory_name = path.partition(":")
    try:
        factory = getattr(importlib.import_module(module_name), factory_name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"no model factory at {path!r}: {error}") from error
    # Only the arguments are checked here. Without any from a recipe, a TypeError from inside the factory is a bug of
    # the user's and stays as it is.
    if arguments and callable(factory) and not _takes_any(factory):
        check_arguments(repr(path), arguments, [factory])
    try:
        signature(factory).bind(num_classes=num_classes, **arguments)
    except TypeError as error:
        raise ValueError(
            f"{path!r} is called as {factory_name}(num_classes={num_classes}), which fails: {error}"
        ) from error
    try:
        model = factory(num_classes=num_classes, **arguments)
    except Exception as error:  # a factory with **kwargs, or a value of another type
        if arguments:
            raise failed(repr(path), arguments, error) from error
        raise
    if not isinstance(model, nn.Module):
        raise ValueError(f"{path!r} returned a {type(model).__name__}, expected a torch.nn.Module")
    return model


def _takes_any(factory: Callable[..., Any]) -> bool:
    """Return whether the factory has ``**kwargs``."""
    return any(each.kind == Parameter.VAR_KEYWORD for each in signature(factory).parameters.values())
