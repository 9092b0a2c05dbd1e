"""timm's networks, weights and stages, by the name ``timm/<name>``.

The package is imported only when such a network is used.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from torch import Tensor, nn

from pipeline.models.arguments import failed
from pipeline.models.families import Paths, quarters, stage_entry

PREFIX = "timm/"
POOL_NAMES = ("global_pool", "head.global_pool")
LINEAR = ("ConvNeXt", "SwinTransformer", "SwinTransformerV2")
"""timm's networks whose stages end linearly, by class."""
NORMED = ("EfficientNet", "MobileNetV3", "DenseNet")
"""timm's networks whose stages end in a BatchNorm with an activation of its own, or linearly."""


def create_timm_model(name: str, num_classes: int, arguments: Mapping[str, Any] | None = None) -> nn.Module:
    """Return timm's network of this name, which may include a tag, freshly initialised.

    Raises ValueError if timm has no such network or is not installed, and ArgumentError if it refuses ``arguments``.
    """
    timm = _timm(name)
    short = name.removeprefix(PREFIX)
    try:
        return timm.create_model(short, num_classes=num_classes, **(arguments or {}))
    except Exception as error:
        if arguments and timm.is_model(short):  # the arguments of a network may raise nearly any error
            raise failed(name, arguments, error) from error
        if not isinstance(error, RuntimeError):
            raise
        near = get_close_matches(short, timm.list_models(), n=3)
        hint = f"; did you mean {' or '.join(PREFIX + other for other in near)}?" if near else ""
        raise ValueError(f"there is no model {name!r}: {error}{hint}") from error


def timm_weights(name: str, tag: str, arguments: Mapping[str, Any] | None = None) -> Mapping[str, Tensor]:
    """Return timm's published weights of a network; the tag ``pretrained`` selects its default ones.

    Raises ValueError if there are no such weights or they cannot be loaded.
    """
    timm = _timm(name)
    try:
        # Without ``num_classes``: if it differed from the weights', timm would replace their head by a random one.
        return timm.create_model(_tagged(name, tag), pretrained=True, **(arguments or {})).state_dict()
    except Exception as error:  # the network, its hub and its file formats raise nearly anything
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{tag} of {name}: no weights ({reason}); give a file") from error


def converted_by_timm(
    name: str, num_classes: int, state: Mapping[str, Tensor], arguments: Mapping[str, Any] | None = None
) -> Mapping[str, Tensor]:
    """Return a state dict, converted by timm from an older one of its own or from the authors' code.

    Raises RuntimeError if a tensor is missing, unexpected or of another shape. For a state dict that timm does not know
    its conversion may raise any error.
    """
    # Passed as if it were published with timm: only then does timm apply the network's own conversion. With its number
    # of classes in the configuration, timm leaves the head unchanged.
    overlay = {"state_dict": dict(state), "num_classes": num_classes, "label_offset": 0, "custom_load": False}
    short = name.removeprefix(PREFIX)
    keys = {"num_classes": num_classes, "pretrained": True, "pretrained_cfg_overlay": overlay, **(arguments or {})}
    return _timm(name).create_model(short, **keys).state_dict()


def timm_normalization(name: str, tag: str) -> Any:
    """Return timm's configuration of published weights, which has ``mean`` and ``std`` of the images they expect.

    ``tag`` is as for ``timm_weights``. Raises ValueError if timm has no such weights.
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
    """Return whether ``model`` has the attributes that describe timm's networks."""
    return hasattr(model, "feature_info") and hasattr(model, "pretrained_cfg")


def timm_stages(model: nn.Module) -> Paths:
    """Return the paths of the stages according to the network's ``feature_info``.

    Stage n has 1 / 2ⁿ⁺¹ of the image's width, and the deepest stage is the map that the head averages. If all stages
    have the same width, only vision transformers are known. Their stages are the tokens after each quarter of the
    blocks. Of networks like torchvision's, the tensor before a stage's activation is known (``_ending``). For others, a
    recipe must name ``stageN.preact`` itself.
    """
    info: Any = model.feature_info
    if len({int(entry["reduction"]) for entry in info}) == 1:
        return _transformer_stages(model, [entry["module"] for entry in info]) | _head(model)
    layout = _layout(model)
    # A path includes the channels that timm gives. Some networks compute tokens, or channels-last maps, without saying
    # so; the number lets the tap raise an error instead of reading another dimension as channels. Of several entries
    # with one reduction, the last one counts.
    paths = {int(entry["reduction"]): f"{entry['module']}{layout}:{entry['num_chs']}" for entry in info}
    # Before the deepest stage becomes the pool's input, whose module may end otherwise.
    modules = {width: path.partition(":")[0] for width, path in paths.items()}
    if pool := _pool(model):
        paths[max(paths)] = f"{pool}:in{layout}"
    found = {}
    for width, path in paths.items():
        name = f"stage{width.bit_length() - 2}" if width > 2 else "stem"
        ending = _ending(model, modules[width], path, deepest=width == max(paths)) if width > 2 else None
        found |= stage_entry(width.bit_length() - 2, path, *ending) if ending else {name: path}
    return found | _head(model)


def _ending(model: nn.Module, module: str, path: str, *, deepest: bool) -> tuple[str | None, str | None] | None:
    """Return the paths of the tensor before a stage's last activation and of the BatchNorm that ends it.

    The first is None for a stage that ends linearly, the second if there is no such BatchNorm. The result is None for a
    network of another family. ``module`` is the stage's module, ``path`` that of its tensor.
    """
    family = type(model).__name__
    if family in LINEAR:
        return None, None
    if family in ("ResNet", "RegNet"):
        return _residual_ending(model, module)
    if family not in NORMED or (family == "DenseNet" and not deepest):
        return (None, None) if family in NORMED else None
    # The deepest stage may end after the blocks, in a convolution for the head.
    after = "bn2" if deepest and isinstance(getattr(model, "bn2", None), nn.BatchNorm2d) else module
    norms = [name for name, norm in model.named_modules() if isinstance(norm, nn.BatchNorm2d) and _inside(name, after)]
    if not norms:
        return None
    activation = getattr(model.get_submodule(norms[-1]), "act", nn.Identity())
    return None if isinstance(activation, nn.Identity) else f"{norms[-1]}.act:in", norms[-1]


def _residual_ending(model: nn.Module, module: str) -> tuple[str | None, str | None] | None:
    """Return the input of the last block's last activation, and the BatchNorm before the shortcut is added to it."""
    last = [f"{module}.{name}" for name, _ in model.get_submodule(module).named_children()][-1]
    block = model.get_submodule(last)
    number = max((n for n in (2, 3) if hasattr(block, f"act{n}")), default=None)
    if number is None:
        return None
    norm = f"{last}.conv3.bn" if type(model).__name__ == "RegNet" else f"{last}.bn{number}"
    # A ResNet's squeeze and excitation lies between the BatchNorm and the sum; a RegNet's lies before its last
    # convolution.
    ends = isinstance(dict(model.named_modules()).get(norm), nn.BatchNorm2d)
    ends = ends and (type(model).__name__ == "RegNet" or getattr(block, "se", None) is None)
    return f"{last}.act{number}:in", norm if ends else None


def _inside(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


def _transformer_stages(model: nn.Module, blocks: list[str]) -> Paths:
    """Return the paths of the tokens after each quarter of the blocks; the last stage ends after the LayerNorm."""
    prefix: Any = getattr(model, "num_prefix_tokens", None)
    if prefix is None:
        return {}
    rows, columns = getattr(getattr(model, "patch_embed", None), "grid_size", None) or (1, 1)
    form = "tokens" if rows == columns else f"tokens+{prefix}@{rows}x{columns}"
    found: Paths = {}
    for number, path in enumerate([*quarters(blocks)[:-1], "norm"], start=1):
        found |= stage_entry(number, f"{path}:{form}")
    return found


def _head(model: nn.Module) -> Paths:
    """Return the paths of the classifier's input and output, and of the map that is averaged for it."""
    # A network with a second head for distillation names two classifiers, so this is not always a text.
    classifier: Any = getattr(model, "pretrained_cfg", {}).get("classifier")
    if isinstance(classifier, tuple) and len(classifier) == 2:  # of the class token and of the distillation token
        return {"class_head": classifier[0], "token_head": classifier[1]}
    if not isinstance(classifier, str) or not isinstance(model.get_submodule(classifier), nn.Linear):
        return {}
    pool = _pool(model)
    found = {"map": f"{pool}:in{_layout(model)}"} if pool and not _normed(model) else {}
    return found | {"embedding": f"{classifier}:in", "logits": classifier}


def _pool(model: nn.Module) -> str | None:
    return next((path for path in POOL_NAMES if path in dict(model.named_modules())), None)


def _normed(model: nn.Module) -> bool:
    """Return whether the head normalises between the average and the linear layer, so that it has no ``map``."""
    norms = [module for path, module in model.named_modules() if path.startswith("head.norm")]
    return any(not isinstance(module, nn.Identity) for module in norms)


def _layout(model: nn.Module) -> str:
    return ":nhwc" if getattr(model, "output_fmt", None) == "NHWC" else ""


def _timm(name: str) -> Any:
    try:
        return importlib.import_module("timm")
    except ImportError as error:
        raise ValueError(f"{name}: timm is not installed; pip install timm (or this project's extra 'timm')") from error
