"""A run folder: checked, locked, opened, and marked for the scheduler that ended its command."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Sequence
from pathlib import Path

import yaml

from pipeline.config.recipe import LoadedRecipe, dump_recipe, load_recipe
from pipeline.errors import RecipeError, display_path
from pipeline.runs.files import (
    IDENTITY,
    NEW_FOLDER_HINT,
    PREEMPTED,
    RECIPE,
    VERSIONS_FILE,
    read_identity,
    read_versions,
    write_json,
)
from pipeline.runs.identity import Run, differing_keys
from pipeline.runs.ownership import LOCK, check_run_folder, remove_temporaries
from pipeline.runs.versions import versions
from shards.manifest import sync_path, write_atomically


def check_folder(run: Run, advice: str = NEW_FOLDER_HINT) -> None:
    """Raise RecipeError if the run folder cannot be written or is not this run's; ``advice`` says what to do then.

    Raises DamagedFile for a file of the run that is not what was written.
    """
    check_run_folder(run.folder, advice)
    saved = read_identity(run.folder)
    differing = differing_keys(saved.values(), run.identity) if saved else []
    if "data.classes" in differing:
        raise RecipeError(
            f"data.path: the classes of {run.recipe.data.path} are not those that {run.folder} was trained on; "
            "prepare the shards with the same --classes, or give folder=ANOTHER"
        )
    if differing:
        keys = ", ".join(differing)
        raise RecipeError(f"{run.folder}: holds the run of another recipe (other {keys}); {advice}")
    read_versions(run.folder)


def open_folder(run: Run) -> None:
    """Write down what the run is, or compare it; the main process calls it once everything could be built.

    The folder is this process's until it ends. Raises RecipeError if another trains in it, or began there meanwhile.
    """
    lock_folder(run.folder)
    check_folder(run)
    (run.folder / PREEMPTED).unlink(missing_ok=True)
    if not (run.folder / IDENTITY).exists():  # the first file: a folder without it is not yet a run's
        write_json(run.folder / IDENTITY, run.identity)
    if not (run.folder / RECIPE).exists():
        write_atomically(run.folder / RECIPE, yaml.safe_dump(dump_recipe(run.recipe), sort_keys=False).encode())
    now, begun = versions(), read_versions(run.folder)
    if begun is None:
        write_json(run.folder / VERSIONS_FILE, now)
    elif changed := differing_keys(begun, now):
        print(f"warning: {run.folder} was begun with another {', '.join(changed)}; its numbers may differ")


def load_run(folder: Path, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Return the recipe of the run in a folder. Raises RecipeError, with what to do, where it is gone or damaged."""
    path = folder / RECIPE
    advice = "give the recipe's own file in place of the folder"
    if not path.is_file():
        raise RecipeError(f"{folder}: holds no run (no {RECIPE}); {advice}")
    try:
        return load_recipe(path, overrides)
    except RecipeError as error:
        if not str(error).startswith(display_path(path.resolve())):  # what the command line got wrong
            raise
        raise RecipeError(f"{error}; {advice}") from None


def lock_folder(folder: Path) -> None:
    """Make the folder, where it is not there, this process's until it ends, without what killed ones left half-written.

    Raises RecipeError if it is another's.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # The descriptor stays open, and the lock with it, as long as the process lives; no crash can leave it behind.
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT)
    try:
        # By process, not by descriptor: a second run of one process is no other.
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise RecipeError(
            f"{folder}: another process is writing in this folder; wait for it, or name another folder"
        ) from None
    remove_temporaries(folder)


def mark_preempted(folder: Path) -> None:
    """Leave word in a run folder that a signal ended the command, all that it did is saved, and it wants to go on."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / PREEMPTED).touch()  # no temporary file, which whoever holds the lock by now would remove
    sync_path(folder)
