"""What this rank was told, so that ranks which would not train the same run together say so before they begin."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from pipeline.config.recipe import Recipe, dump_recipe
from pipeline.distributed import rendezvous
from pipeline.distributed.agreement import flatten
from pipeline.distributed.launcher import Launch
from pipeline.errors import ROOT
from pipeline.runs.identity import Run
from pipeline.runs.versions import packages

_OF_A_MACHINE = ("path", "samples", "threads", "prefetch", "hw_decoder_load")
"""Keys of ``data`` that may differ from host to host: where the shards were staged to, and how they are decoded."""


def join_ranks(launch: Launch, command: str, recipe: Recipe, run: Run | None = None, **words: object) -> None:
    """Join the ranks that the launcher started. Raises RecipeError, the same on all, if they were told other things.

    ``words`` are the command's own. An entry point calls it before the long work of building; one rank needs nothing.
    """
    if launch.world_size > 1:
        rendezvous.init_process_group(
            launch, settings={**shared_settings(command, recipe, run, **words), **_deepspeed(launch)}
        )


def _deepspeed(launch: Launch) -> dict[str, Any]:
    """Return whether DeepSpeed was asked for, and its settings by key; what is no mapping of keys stands whole."""
    if not launch.use_deepspeed:
        return {"ACCELERATE_USE_DEEPSPEED": False}
    name = launch.deepspeed_file or ""
    path = next((found for found in (Path(name), ROOT / name) if found.is_file()), None)
    text = path.read_text(errors="replace") if path else f"no file {name}"
    try:
        told = json.loads(text)
    except (ValueError, RecursionError):
        told = text
    found = {"ACCELERATE_USE_DEEPSPEED": True, "ACCELERATE_DEEPSPEED_CONFIG_FILE": told}
    if isinstance(told, dict):
        found |= {"ACCELERATE_DEEPSPEED_CONFIG_FILE": "settings", "DeepSpeed": told}
    return found


def shared_settings(command: str, recipe: Recipe, run: Run | None = None, **words: object) -> dict[str, Any]:
    """Return what must be the same on all ranks, by the names that a message gives it."""
    return {"command": command, **words, **_recipe(recipe, run), **packages(), "code (sha256)": code_digest()}


def _recipe(recipe: Recipe, run: Run | None) -> dict[str, Any]:
    """Return the recipe by dotted key, and what else the run's identity holds: digests of what lies in files."""
    tree = dump_recipe(recipe)
    for key in _OF_A_MACHINE:
        del tree["data"][key]
    found: dict[str, Any] = dict(flatten(tree))
    if run is None:
        return found
    # In the recipe these are paths, which may be a host's own; what lies there is in the identity.
    found = {key: value for key, value in found.items() if not key.endswith((".weights", "teacher.cache"))}
    for key, value in flatten(_named(run.identity)):
        if found.get(key) != value:
            found[key if key not in found else f"{key} (sha256)"] = value
    return {**found, "folder": str(run.folder)}


def _named(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Return the identity with the shards' digests under names that a user knows."""
    data = dict(identity["data"])
    shards = {"manifest.json (sha256)": data.pop("manifest"), "classes (sha256)": data.pop("classes")}
    return {**identity, "data": {**data, **shards}}


@cache
def code_digest() -> str:
    """Return the sha256 of the project's own code, changes that are not committed included."""
    digest = hashlib.sha256()
    for path in sorted(path for folder in ("pipeline", "shards") for path in (ROOT / folder).rglob("*.py")):
        digest.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()
