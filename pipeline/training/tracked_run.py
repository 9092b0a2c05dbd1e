"""A run as an experiment tracker names it: its project, name, tags, configuration, and the same run after a requeue."""

from __future__ import annotations

import json
import re
import secrets
from pathlib import Path
from typing import Any

from pipeline.config.paths import default_folder
from pipeline.config.recipe import Recipe, dump_recipe
from pipeline.runs.files import TRACKERS_FILE, read_tracker_ids, write_json
from pipeline.runs.identity import Run

NAMED = ("wandb", "mlflow")
"""Trackers that get the recipe's name and tags, and continue the same run."""


def configuration(recipe: Recipe) -> dict[str, Any]:
    """Return the resolved recipe with dotted keys. A list is JSON text, because trackers take plain values only."""
    return _flatten(dump_recipe(recipe), "")


def _flatten(tree: dict[str, Any], prefix: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in tree.items():
        # A key of the user's, such as a pattern of parameters, may have characters that MLflow refuses.
        if isinstance(value, dict) and value and all(re.fullmatch(r"[\w.:/ -]+", key) for key in value):
            found |= _flatten(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = json.dumps(value) if isinstance(value, dict | list) else value
    return found


def project_of(tracker: str, run: Run) -> str:
    """Return the project under which a tracker files the run. For TensorBoard it is a folder in the run folder."""
    return "tensorboard" if tracker == "tensorboard" else run.recipe.journal.project


def options_of(tracker: str, run: Run, step: int) -> dict[str, Any]:
    """Return the tracker's own options for a run that begins, or continues after ``step``."""
    journal = run.recipe.journal
    if tracker == "tensorboard":
        # It hides earlier entries from that step on: an interrupted command may have logged steps after its last
        # checkpoint.
        return {"purge_step": step + 1} if step else {}
    if tracker == "wandb":
        named = {"id": _wandb_id(run), "name": run_name(run), "tags": list(journal.tags), "dir": str(run.folder)}
        # By default a second run of this process, trained side by side, would be the first one again.
        return {**named, "resume": "allow", "reinit": "create_new"}
    if tracker == "mlflow":
        tags = {"tags": {"tags": ", ".join(journal.tags)}} if journal.tags else {}
        return {"run_name": run_name(run), "run_id": read_tracker_ids(run.folder).get("mlflow"), **tags}
    return {}


def run_name(run: Run) -> str:
    """Return ``journal.name``, or the path of the run's default folder below ``runs/``."""
    recipe = run.recipe
    default = default_folder(run.source, recipe.seed, recipe.data.holdout is not None)
    return recipe.journal.name or default.relative_to("runs").as_posix()


def _wandb_id(run: Run) -> str:
    """Return the id of the run in W&B, from its identity; the same recipe in another folder is another run there."""
    known = read_tracker_ids(run.folder).get("wandb")
    if known is None:
        known = f"{run.fingerprint[:16]}-{secrets.token_hex(4)}"
        keep_id("wandb", known, run.folder)
    return known


def keep_id(tracker: str, value: str, folder: Path) -> None:
    """Keep a tracker's id of the run in its folder, for the commands that continue it."""
    write_json(folder / TRACKERS_FILE, read_tracker_ids(folder) | {tracker: value})


def send_configuration(tracker: Any, name: str, run: Run, values: dict[str, Any], step: int) -> None:
    """Send the run's configuration to a tracker of Accelerate that has been started."""
    if name == "tensorboard":
        if step == 0:  # its form for hyper-parameters would be a new folder for each command
            tracker.log({"recipe": "\n".join(f"    {key}: {value}" for key, value in values.items())})
    elif name == "wandb":
        tracker.tracker.config.update(values, allow_val_change=True)
    elif name == "mlflow":
        active = tracker.tracker
        keep_id("mlflow", active.info.run_id, run.folder)
        # MLflow refuses another value of a parameter that is there, such as that of stop.steps.
        known = active.data.params
        tracker.store_init_configuration({key: value for key, value in values.items() if key not in known})
    else:
        tracker.store_init_configuration(values)
