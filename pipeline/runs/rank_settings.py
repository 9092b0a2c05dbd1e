"""The settings that all ranks must share, compared before training so that all ranks train the same run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import cache
from typing import Any

from pipeline.config.recipe import Recipe, dump_recipe
from pipeline.distributed import rendezvous
from pipeline.distributed.agreement import flatten
from pipeline.distributed.launcher import Launch
from pipeline.errors import SOURCE
from pipeline.runs.identity import Run
from pipeline.runs.versions import packages

_HOST_KEYS = ("path", "samples", "threads", "prefetch")
"""Keys of ``data`` that may differ between hosts: the folder of the staged shards, and the settings of decoding."""


def join_ranks(launch: Launch, command: str, recipe: Recipe, run: Run | None = None, **options: object) -> None:
    """Join the ranks of the launcher. Raises RecipeError, the same on all ranks, if their settings differ.

    ``options`` are those of the command. An entry point calls it before it builds anything, which takes long. A single
    rank joins nothing.
    """
    if launch.world_size > 1:
        rendezvous.init_process_group(
            launch, settings={**shared_settings(command, recipe, run, **options), **_deepspeed(launch)}
        )


def _deepspeed(launch: Launch) -> dict[str, Any]:
    """Return whether DeepSpeed is used, and its settings by key; a file that is not a mapping is a single value."""
    if not launch.use_deepspeed:
        return {"ACCELERATE_USE_DEEPSPEED": False}
    path = launch.deepspeed_path
    text = path.read_text(errors="replace") if path else f"no file {launch.deepspeed_file or ''}"
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):  # DeepSpeed reports a file that is no JSON; here it only must be the same
        content = text
    settings = {"ACCELERATE_USE_DEEPSPEED": True, "ACCELERATE_DEEPSPEED_CONFIG_FILE": content}
    if isinstance(content, dict):
        settings |= {"ACCELERATE_DEEPSPEED_CONFIG_FILE": "settings", "DeepSpeed": content}
    return settings


def shared_settings(command: str, recipe: Recipe, run: Run | None = None, **options: object) -> dict[str, Any]:
    """Return the settings that must be the same on all ranks, by their names in an error message."""
    of_recipe = _recipe_settings(recipe, run)
    return {"command": command, **options, **of_recipe, **packages(), "code (sha256)": code_digest()}


def _recipe_settings(recipe: Recipe, run: Run | None) -> dict[str, Any]:
    """Return the recipe by dotted key, with the digests of files that are in the run's identity."""
    tree = dump_recipe(recipe)
    for key in _HOST_KEYS:
        del tree["data"][key]
    found: dict[str, Any] = dict(flatten(tree))
    if run is None:
        return found
    # These are paths, which may differ between hosts; the identity has the digests of their files.
    paths = (".weights", "teacher.cache", "unlabelled.path", "unlabelled.pseudo")
    found = {key: value for key, value in found.items() if not key.endswith(paths)}
    for key, value in flatten(_rename_digests(run.identity)):
        if found.get(key) != value:
            found[key if key not in found else f"{key} (sha256)"] = value
    return {**found, "folder": str(run.folder)}


def _rename_digests(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Return the identity with the shards' digests under names that a user understands."""
    data = dict(identity["data"])
    shards = {"manifest.json (sha256)": data.pop("manifest"), "classes (sha256)": data.pop("classes")}
    return {**identity, "data": {**data, **shards}}


@cache
def code_digest() -> str:
    """Return the sha256 of the project's own code, uncommitted changes included."""
    digest = hashlib.sha256()
    for path in sorted(path for folder in ("pipeline", "shards") for path in (SOURCE / folder).rglob("*.py")):
        digest.update(f"{path.relative_to(SOURCE)}\n".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()
