"""Loading of weights, from a file or from torchvision's or timm's published ones, into a network.

The weights must be of exactly the network's architecture.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pipeline.models.coco_weights import fitted_classes
from pipeline.models.create import create_model
from pipeline.models.detector import Detector
from pipeline.models.file_memo import memoized_by_file
from pipeline.models.fitting import Fitted, check_finite, fit_state
from pipeline.models.headless import without_head
from pipeline.models.published import published_weights
from pipeline.models.segmentation import backbone_network
from pipeline.models.stages import stages
from pipeline.models.weights_file import is_file, read_file

FilledPart = Literal["all", "backbone"] | tuple[str, ...]
"""Part of a network that weights fill: all, its backbone, or some of its modules by name."""


def load_weights(
    model: nn.Module,
    source: str,
    name: str,
    key: str | None = None,
    *,
    arguments: Mapping[str, Any] | None = None,
    left_out: frozenset[str] = frozenset(),
    part: FilledPart = "all",
) -> str:
    """Load ``source`` into ``model``: a file (see ``is_file``), or published weights of the network ``name``.

    Torchvision's weights have names such as IMAGENET1K_V1; timm's are given by a tag or ``pretrained``. If a file holds
    several weights that fit, ``key`` selects among them. ``fit_state`` explains how weights are found in a file. The
    model was built with ``arguments``. It keeps its own tensors for the names in ``left_out``, such as those of
    ``head_tensors``. With ``part="backbone"``, only the backbone is filled, from weights of a classification network or
    of any network with such a backbone. With the names of modules, only these are filled, from weights of any network
    that has them.

    Returns a line about weights that were chosen or left out, or "". Raises ValueError or FileNotFoundError if the
    weights cannot be read, are of another architecture, or contain invalid values. The model is then unchanged.
    """
    model = _part_of(model, part)
    state, note = _read_fitted(model, source, name, key, left_out, arguments, part)
    # An update of the network's own state dict, which also has its modules' versions (``_metadata``): the tensors
    # already have the current names and shapes. It also has batch counters, which old weights lack.
    updated = model.state_dict()
    updated.update(state)
    model.load_state_dict(updated, strict=True)
    kept = ", ".join(tensor for tensor in updated if tensor in left_out)
    kept = f"{kept} are not read from {source} and keep their random initialisation" if kept else ""
    return "; ".join(filter(None, (note, kept)))


def head_tensors(name: str, num_classes: int, arguments: Mapping[str, Any] | None = None) -> frozenset[str]:
    """Return the names of the classifier's tensors, those whose shape depends on the number of classes.

    Raises ValueError for a network without such tensors.
    """
    ours, other = (meta_model(name, count, arguments).state_dict() for count in (num_classes, num_classes + 1))
    found = frozenset(key for key, value in ours.items() if key not in other or value.shape != other[key].shape)
    if not found:
        raise ValueError(f"no tensor of {name} depends on the number of classes, so it has no classifier; remove head")
    return found


def weights_sha256(
    source: str,
    name: str,
    num_classes: int,
    key: str | None = None,
    *,
    arguments: Mapping[str, Any] | None = None,
    new_head: bool = False,
    headless: Mapping[str, str] | None = None,
    part: FilledPart = "all",
) -> str:
    """Return the sha256 of the network's tensors, which does not depend on the file's format or other contents.

    With ``new_head``, the classifier's tensors are left out. ``part`` is that of ``load_weights``. ``headless`` are
    the recipe's stages of a network without its head; None is the complete network. The digest of a file is remembered
    until the file changes.
    """

    def digest() -> str:
        left_out = head_tensors(name, num_classes, arguments) if new_head else frozenset[str]()
        model = meta_model(name, num_classes, arguments)
        if headless is not None:
            without_head(model, stages(model) | dict(headless))
        return _sha256(_read_fitted(_part_of(model, part), source, name, key, left_out, arguments, part).state)

    options: list[Any] = [*(["new head"] if new_head else []), *([dict(arguments)] if arguments else [])]
    options += [] if part == "all" else [f"part: {part}" if isinstance(part, str) else ["parts", *part]]
    # Lists and not pairs, because the remembered ones are compared after JSON.
    options += [] if headless is None else [["head: none", *map(list, sorted(headless.items()))]]
    return memoized_by_file(Path(source), [name, num_classes, key, *options], digest) if is_file(source) else digest()


def _read_fitted(
    model: nn.Module,
    source: str,
    name: str,
    key: str | None,
    left_out: frozenset[str],
    arguments: Mapping[str, Any] | None,
    part: FilledPart,
) -> Fitted:
    """Return the weights of ``model``, a part of the network ``name``, from ``source``, with their values checked."""
    published = backbone_network(name) if part == "backbone" else name
    content: Any = read_file(Path(source)) if is_file(source) else published_weights(published, source, arguments)
    if isinstance(model, Detector) and not is_file(source):
        content = fitted_classes(content, model, published, source)
    named = name if part == "all" else f"{'the backbone' if part == 'backbone' else 'these parts'} of {name}"
    options = {"part": part != "all", "prefixed": isinstance(part, str)}
    fitted = fit_state(content, model, source, named, key, left_out, arguments, **options)
    check_finite(fitted.state, model, source)
    return fitted


def _part_of(model: nn.Module, part: FilledPart) -> nn.Module:
    """Return the part of the network that weights fill. Raises ValueError for a network without it."""
    if part == "all":
        return model
    if part != "backbone":
        return modules_by_name(model, part)
    # The backbone of a detector is that of its pyramid.
    backbone = model.backbone.body if isinstance(model, Detector) else getattr(model, "backbone", None)
    if not isinstance(backbone, nn.Module):
        raise ValueError(f"part: backbone: {type(model).__name__} has no module named backbone; remove part")
    return backbone


def modules_by_name(model: nn.Module, names: Sequence[str]) -> nn.ModuleDict:
    """Return modules of the network by their names. Raises ValueError if one is not there or has no tensors."""
    known = {name: module for name, module in model.named_children() if module.state_dict()}
    if unknown := next((name for name in names if name not in known), None):
        raise ValueError(
            f"parts: {type(model).__name__} has no module {unknown!r} with weights; it has {', '.join(known)}"
        )
    return nn.ModuleDict({name: known[name] for name in names})


def meta_model(name: str, num_classes: int, arguments: Mapping[str, Any] | None = None) -> nn.Module:
    """Return the network, of which only names and shapes are needed, on the meta device if it can be built there."""
    with torch.random.fork_rng():
        try:
            with torch.device("meta"):
                return create_model(name, num_classes, arguments)
        except Exception:
            # Some networks compute with numbers while they are built, which meta tensors do not have. Any other error
            # is raised again here.
            return create_model(name, num_classes, arguments)


def _sha256(state: Mapping[str, Tensor]) -> str:
    """Return the sha256 of the tensors' names, dtypes, shapes and bytes."""
    # Sorted, so that the order of the tensors in a file does not count. The bytes are viewed as uint8, because numpy
    # has no bfloat16.
    found = hashlib.sha256()
    for key, value in sorted(state.items()):
        found.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
        found.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
