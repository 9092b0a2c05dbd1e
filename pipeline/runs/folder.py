"""A run folder: checked, locked, opened, and marked for the scheduler that ended its command."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import yaml

from pipeline.config.recipe import dump_recipe
from pipeline.errors import RecipeError
from pipeline.runs.files import ANOTHER, IDENTITY, PREEMPTED, RECIPE, VERSIONS, read_json, write_json
from pipeline.runs.identity import Run, differences
from pipeline.runs.versions import versions
from shards.manifest import write_atomically


def check_folder(run: Run, mend: str = ANOTHER) -> None:
    """Raise RecipeError if the run folder holds another run, or cannot be written; ``mend`` says what to do then."""
    _check_writable(run.folder)
    saved = run.folder / IDENTITY
    differing = differences(read_json(saved, mend), run.identity) if saved.is_file() else []
    if "data.classes" in differing:
        raise RecipeError(
            f"data.path: the classes of {run.recipe.data.path} are not those that {run.folder} was trained on; "
            "prepare the shards with the same --classes, or give folder=ANOTHER"
        )
    if differing:
        keys = ", ".join(differing)
        raise RecipeError(f"{run.folder}: holds the run of another recipe (other {keys}); {mend}")


def _check_writable(folder: Path) -> None:
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        reason = "must not write there" if there.is_dir() else f"{there} is no folder"
        raise RecipeError(f"folder: {folder} cannot be written ({reason}); {ANOTHER}")


def open_folder(run: Run) -> None:
    """Write down what the run is, or compare it; the main process calls it once everything could be built.

    The folder is this process's until it ends. Raises RecipeError if another trains in it.
    """
    lock_folder(run.folder)
    (run.folder / PREEMPTED).unlink(missing_ok=True)
    now = versions()
    if (run.folder / IDENTITY).is_file():
        changed = differences(read_json(run.folder / VERSIONS, ANOTHER), now)
        if changed:
            print(f"warning: {run.folder} was begun with another {', '.join(changed)}; its numbers may differ")
        return
    write_atomically(run.folder / RECIPE, yaml.safe_dump(dump_recipe(run.recipe), sort_keys=False).encode())
    write_json(run.folder / VERSIONS, now)
    write_json(run.folder / IDENTITY, run.identity)


def lock_folder(folder: Path) -> None:
    """Make the folder, where it is not there, this process's until it ends. Raises RecipeError if it is another's."""
    folder.mkdir(parents=True, exist_ok=True)
    # The descriptor stays open, and the lock with it, as long as the process lives; no crash can leave it behind.
    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT)
    try:
        # By process, not by descriptor: a second run of one process is no other.
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise RecipeError(
            f"{folder}: another process is writing in this folder; wait for it, or name another folder"
        ) from None


def mark_preempted(folder: Path) -> None:
    """Leave word in a run folder that a signal ended the command, all that it did is saved, and it wants to go on."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / PREEMPTED, b"")
