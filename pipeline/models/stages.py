"""The canonical stages ``stem, stage1 … stage4, map, embedding, logits`` of a network, by module path.

``layer4`` is that module's output, ``layer4.1.relu:in`` its last call's input. An ending ``:nhwc`` says that the tensor
has its channels last, ``:tokens`` that it is a row of tokens [N, C]; both are read as maps [C, H, W]. A number, as in
``layer4:512``, is how many channels the map must have.

A stage's output comes after its last activation and ``.preact`` before it; they are one tensor where it ends linearly.
``stageN.norm`` is no tap but a module: the BatchNorm whose output ``.preact`` is, or was before a shortcut was added.
``map`` is what the last linear layer takes the average of, and ``embedding`` is what it takes. In networks for ImageNet
stage n is the last tensor of 1 / 2ⁿ⁺¹ of the image's width, but for VGG, whose blocks are its stages as on CIFAR.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import nn

from pipeline.models.families import FAMILIES, head
from pipeline.models.from_timm import is_timm, timm_stages


def stages(model: nn.Module) -> dict[str, str]:
    """Return the module path of each canonical stage of ``model``.

    Of a network of no known family only the embedding and the logits are named, and only where its head is obvious.
    """
    for family, paths in FAMILIES.items():
        if isinstance(model, family):
            return paths(model)
    return timm_stages(model) if is_timm(model) else head(model)


def tap_names(paths: Mapping[str, str]) -> list[str]:
    """Return the names that can be tapped: all but the ``.norm`` ones."""
    return [name for name in paths if not name.endswith(".norm")]


def find_stage(paths: Mapping[str, str], name: str) -> str:
    """Return the module path of ``name``, or of what ``canonical`` says it stands for.

    Raises ValueError where the network has no such stage.
    """
    if (full := canonical(paths, name)) not in paths:
        known = f"it has {', '.join(tap_names(paths))}" if paths else "none is known"
        raise ValueError(f"the network has no stage {name!r}: {known}; name it by stages: {{{name}: <module path>}}")
    return paths[full]


def canonical(paths: Mapping[str, str], name: str) -> str:
    """Return the name of the stage that ``last``, ``last.preact`` or ``last.norm`` stands for; others are their own."""
    stage, dot, kind = name.partition(".")
    deep = numbered(paths)
    return f"{deep[-1]}{dot}{kind}" if stage == "last" and deep and name not in paths else name


def deep_stages(paths: Mapping[str, str], name: str) -> list[str]:
    """Return ``[name]``, or where it is ``all`` or ``all.preact`` the names of every stage, the shallowest first.

    Raises ValueError where the network's stages are not known.
    """
    stage, dot, kind = name.partition(".")
    if stage != "all":
        return [name]
    if not (deep := numbered(paths)):
        raise ValueError("no stages of this network are known; name them by stages: {stage1: <module path>, …}")
    return [f"{stage}{dot}{kind}" for stage in deep]


def numbered(names: Iterable[str], kind: str = "") -> list[str]:
    """Return those of ``names`` that are ``stageN``, followed by ``kind`` (such as ``.preact``), shallowest first."""
    found = (re.fullmatch(rf"stage(\d+){re.escape(kind)}", name) for name in names)
    return [match[0] for match in sorted(filter(None, found), key=lambda match: int(match[1]))]
