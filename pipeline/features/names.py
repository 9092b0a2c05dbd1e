"""The names of taps in a recipe, and the network's stages that they refer to.

A network's stages are a mapping from canonical names to module paths; see ``models/stages.py``. Here it is ``paths``.
Stages named ``GROUP.pN`` are the levels of a group, such as ``fpn.p3`` of ``fpn``; a recipe may name the group alone.
A name with ``?`` behind it is of a stage or group that a network may lack: ``head.class?``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

REASONS = {
    "map": "no known linear layer takes the average of a map",
    "embedding": "no known linear layer ends it",
    "subclasses": "it was built without arguments: {subclasses: …}",
    "class_head": "it has no distillation token",
    "token_head": "it has no distillation token",
    **dict.fromkeys(("anchors", "detections"), "it is no detector"),
    **dict.fromkeys(
        ("head.class", "head.box", "regression"),
        "it is no detector of one stage; those of two have rpn.class and rpn.box",
    ),
    **dict.fromkeys(("rpn.class", "rpn.box", "roi.class"), "it is no detector of two stages"),
}
"""Why a network may lack a stage of that name."""
OPTIONAL = "?"
"""What ends the name of a stage that a network may lack."""


def tap_names(paths: Mapping[str, str]) -> list[str]:
    """Return the names that can be tapped: all except those that end in ``.norm``."""
    return [name for name in paths if not name.endswith(".norm")]


def find_stage(paths: Mapping[str, str], name: str) -> str:
    """Return the module path of the stage ``name``, which may be an alias (see ``canonical``).

    Raises ValueError if the network has no such stage.
    """
    if (full := canonical(paths, name)) not in paths:
        known = f"it has {', '.join(tap_names(paths))}" if paths else "none is known"
        reason = f", because {REASONS[name]}" if name in REASONS and paths else ""
        raise ValueError(
            f"the network has no stage {name!r}{reason}: {known}; name it under stages: {{{name}: <module path>}}"
        )
    return paths[full]


def canonical(paths: Mapping[str, str], name: str) -> str:
    """Return the stage name that the alias ``last``, ``last.preact`` or ``last.norm`` refers to.

    Any other name is returned unchanged, and so is an alias that the network itself uses as a stage name.
    """
    stage, dot, kind = name.partition(".")
    deep = numbered(paths)
    return f"{deep[-1]}{dot}{kind}" if stage == "last" and deep and name not in paths else name


def deep_stages(paths: Mapping[str, str], name: str) -> list[str]:
    """Return ``[name]``; for ``all``, ``all.preact`` or a group return the names of all its stages, shallowest first.

    Of a name with ``?`` they are those that the network has, which may be none. Raises ValueError if the network's
    stages are not known.
    """
    if name.endswith(OPTIONAL):
        name = name.removesuffix(OPTIONAL)
        return levels(paths, name) or [name] * (name in paths)
    stage, dot, kind = name.partition(".")
    if stage != "all":
        return levels(paths, name) or [name]
    if not (deep := numbered(paths)):
        raise ValueError("no stages of this network are known; name them under stages: {stage1: <module path>, …}")
    return [f"{stage}{dot}{kind}" for stage in deep]


def levels(names: Iterable[str], group: str) -> list[str]:
    """Return the names of a group's levels, of the form ``GROUP.pN``, the finest first."""
    return _by_number(names, rf"{re.escape(group)}\.p(\d+)")


def group_of(name: str) -> str:
    """Return the group of a level, ``fpn`` of ``fpn.p3``. Any other name is returned unchanged."""
    return re.sub(r"\.p\d+$", "", name)


def numbered(names: Iterable[str], kind: str = "") -> list[str]:
    """Return the names of the form ``stageN`` plus the ending ``kind`` (such as ``.preact``), shallowest first."""
    return _by_number(names, rf"stage(\d+){re.escape(kind)}")


def _by_number(names: Iterable[str], pattern: str) -> list[str]:
    """Return the names of that form in the order of their number."""
    found = (re.fullmatch(pattern, name) for name in names)
    # Sorted by number, not by text: stage10 comes after stage2.
    return [match[0] for match in sorted(filter(None, found), key=lambda match: int(match[1]))]
