"""What a recipe may call a tap, and which of a network's stages it stands for.

A network's stages are a mapping of canonical names to module paths, as ``models/stages.py`` describes them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping


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
