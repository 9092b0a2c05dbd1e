"""Networks of timm, as ``timm/<name>``. The package is imported only when one is asked for."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from torch import Tensor, nn

from pipeline.models.families import Paths, quarters

PREFIX = "timm/"
POOL_NAMES = ("global_pool", "head.global_pool")


def create_timm_model(name: str, num_classes: int) -> nn.Module:
    """Return timm's network of that name, which may carry a tag, freshly initialised.

    Raises ValueError where there is none.
    """
    timm = _timm(name)
    short = name.removeprefix(PREFIX)
    try:
        return timm.create_model(short, num_classes=num_classes)
    except RuntimeError as error:
        near = get_close_matches(short, timm.list_models(), n=3)
        hint = f"; did you mean {' or '.join(PREFIX + other for other in near)}?" if near else ""
        raise ValueError(f"there is no model {name!r}: {error}{hint}") from error


def timm_weights(name: str, tag: str) -> Mapping[str, Tensor]:
    """Return timm's published weights of a network: its default ones where ``tag`` is ``pretrained``.

    The number of classes is the weights' own: timm would replace a head of another size by a random one. Raises
    ValueError where there are no such weights or they cannot be had.
    """
    timm = _timm(name)
    try:
        return timm.create_model(_tagged(name, tag), pretrained=True).state_dict()
    except Exception as error:  # the network, its hub and its file formats raise nearly anything
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{tag} of {name}: no weights ({reason}); give a file") from error


def timms_own(name: str, num_classes: int, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return what timm makes of a state dict that it knows: an older one of its own, or the authors' of a network.

    Raises whatever timm does where it knows none such, and RuntimeError where a tensor is missing, left over or of
    another shape.
    """
    # The state as one of its published: that alone asks the network's own filter. Told their number of classes, timm
    # leaves the head as it is.
    told = {"state_dict": dict(state), "num_classes": num_classes, "label_offset": 0, "custom_load": False}
    short = name.removeprefix(PREFIX)
    model = _timm(name).create_model(short, num_classes=num_classes, pretrained=True, pretrained_cfg_overlay=told)
    return model.state_dict()


def timm_normalization(name: str, tag: str) -> Any:
    """Return what has ``mean`` and ``std`` of the images that timm's published weights expect.

    ``tag`` is as ``timm_weights`` takes it. Raises ValueError where timm knows no such weights.
    """
    try:
        found = _timm(name).models.get_pretrained_cfg(_tagged(name, tag))
    except RuntimeError as error:
        raise ValueError(f"{tag} of {name}: {error}; give a file") from error
    if found is None:
        raise ValueError(f"{tag} of {name}: timm has no such weights; give a file")
    return found


def _tagged(name: str, tag: str) -> str:
    short = name.removeprefix(PREFIX)
    return short if tag == "pretrained" else f"{short.partition('.')[0]}.{tag}"


def is_timm(model: nn.Module) -> bool:
    """Return whether ``model`` tells of itself what timm's networks do."""
    return hasattr(model, "feature_info") and hasattr(model, "pretrained_cfg")


def timm_stages(model: nn.Module) -> Paths:
    """Name the stages by the network's ``feature_info``.

    Stage n has 1 / 2ⁿ⁺¹ of the image's width; the deepest is what the head averages. Of networks that keep one width,
    only vision transformers are known: their stages are the tokens after each quarter of the blocks. What stands before
    a stage's activation is not known: a recipe names ``stageN.preact`` itself.

    A place carries the channels it is said to have: some networks compute there rows of tokens, or have their channels
    last, and say neither.
    """
    info: Any = model.feature_info
    if len({int(entry["reduction"]) for entry in info}) == 1:
        return _transformer_stages(model, [entry["module"] for entry in info]) | _head(model)
    layout = _layout(model)
    places = {int(entry["reduction"]): f"{entry['module']}{layout}:{entry['num_chs']}" for entry in info}  # the last
    if pool := _pool(model):
        places[max(places)] = f"{pool}:in{layout}"
    found = {f"stage{width.bit_length() - 2}" if width > 2 else "stem": place for width, place in places.items()}
    return found | _head(model)


def _transformer_stages(model: nn.Module, blocks: list[str]) -> Paths:
    """Name the tokens after each quarter of the blocks; the last stage ends after the network's LayerNorm."""
    prefix: Any = getattr(model, "num_prefix_tokens", None)
    if prefix is None:
        return {}
    rows, columns = getattr(getattr(model, "patch_embed", None), "grid_size", None) or (1, 1)
    form = "tokens" if rows == columns else f"tokens+{prefix}@{rows}x{columns}"
    places = [*quarters(blocks)[:-1], "norm"]
    return {f"stage{number}": f"{place}:{form}" for number, place in enumerate(places, start=1)}


def _head(model: nn.Module) -> Paths:
    """Name the classifier's input and output, and the map it takes the average of; a distilled network has two."""
    classifier: Any = getattr(model, "pretrained_cfg", {}).get("classifier")
    if not isinstance(classifier, str) or not isinstance(model.get_submodule(classifier), nn.Linear):
        return {}
    pool = _pool(model)
    found = {"map": f"{pool}:in{_layout(model)}"} if pool and not _normed(model) else {}
    return found | {"embedding": f"{classifier}:in", "logits": classifier}


def _pool(model: nn.Module) -> str | None:
    return next((path for path in POOL_NAMES if path in dict(model.named_modules())), None)


def _normed(model: nn.Module) -> bool:
    """Return whether the head normalises between the average and the linear layer."""
    norms = [module for path, module in model.named_modules() if path.startswith("head.norm")]
    return any(not isinstance(module, nn.Identity) for module in norms)


def _layout(model: nn.Module) -> str:
    return ":nhwc" if getattr(model, "output_fmt", None) == "NHWC" else ""


def _timm(name: str) -> Any:
    try:
        return importlib.import_module("timm")
    except ImportError as error:
        raise ValueError(f"{name}: timm is not installed; pip install timm (or this project's extra 'timm')") from error
