"""Operations on a run folder: check, lock, open, load, and mark as preempted for a scheduler."""

from __future__ import annotations

import fcntl
import os
import shlex
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
    STUDENT,
    STUDENT_BEST,
    STUDENT_EMA,
    VERSIONS_FILE,
    add_start,
    check_student,
    read_identity,
    read_result,
    read_versions,
    write_json,
)
from pipeline.runs.identity import Run, differing_keys
from pipeline.runs.ownership import LOCK, check_run_folder, remove_temporaries
from pipeline.runs.versions import versions
from shards.manifest import sync_path, write_atomically

NAMED_WEIGHTS = {"last": STUDENT, "best": STUDENT_BEST, "ema": STUDENT_EMA}


def check_folder(run: Run, advice: str = NEW_FOLDER_HINT) -> None:
    """Raise RecipeError if the run folder cannot be written or belongs to another run.

    The message ends with ``advice``. Raises DamagedFile for a damaged file of the run.
    """
    check_run_folder(run.folder, advice)
    saved = read_identity(run.folder)
    differing = differing_keys(saved.values(), run.identity) if saved else []
    if "data.classes" in differing:
        raise RecipeError(
            f"data.path: the classes of {run.recipe.data.path} differ from those that {run.folder} was trained on; "
            "prepare the shards with the same --classes, or give folder=ANOTHER"
        )
    if differing:
        keys = ", ".join(differing)
        if (
            saved
            and advice == NEW_FOLDER_HINT
            and all(key == "epochs" or key.startswith("schedule.") for key in differing)
        ):
            advice = _advice_to_go_on(run, saved.values()["epochs"]) or advice
        raise RecipeError(f"{run.folder}: holds the run of another recipe (different {keys}); {advice}")
    read_versions(run.folder)  # for its error only


def _advice_to_go_on(run: Run, epochs: int) -> str | None:
    """Return how to train longer than a finished run of that many epochs; None if it is not finished or not shorter."""
    start, further = run.recipe.student.start, run.recipe.epochs - epochs
    if further <= 0 or read_result(run.folder) is None or not (run.folder / STUDENT).is_file():
        return None
    words = [f"student.start.weights={shlex.quote(str(run.folder / STUDENT))}"]
    words += ["student.start.head=keep"] if start and start.head == "new" else []
    words += ["student.start.part=all"] if start and start.part == "backbone" else []
    words += ["student.start.parts=[]"] if start and start.parts else []
    words += ["student.inherit=[]"] if run.recipe.student.inherit else []
    words += [f"student.start.{key}=null" for key in ("recipe", "method") if start and getattr(start, key)]
    words += [f"epochs={further}", "folder=ANOTHER"]
    return f"its {epochs} epochs have ended, and more are a new run that starts from its weights: {' '.join(words)}"


def open_folder(run: Run) -> None:
    """Lock the run folder, and write the run's identity, or compare it with the one that is there.

    The main process calls it once everything could be built, and has the lock until it ends. Raises RecipeError if
    another process trains in the folder, or began another run there meanwhile.
    """
    lock_folder(run.folder)
    check_folder(run)
    (run.folder / PREEMPTED).unlink(missing_ok=True)
    if not (run.folder / IDENTITY).exists():  # the first file: without it, the folder belongs to no run yet
        write_json(run.folder / IDENTITY, run.identity)
    if not (run.folder / RECIPE).exists():
        write_atomically(run.folder / RECIPE, yaml.safe_dump(dump_recipe(run.recipe), sort_keys=False).encode())
    now, begun = versions(), read_versions(run.folder)
    if begun is None:
        write_json(run.folder / VERSIONS_FILE, now)
    elif changed := differing_keys(begun, now):
        print(f"warning: {run.folder} began with a different {', '.join(changed)}; its numbers may change")
    add_start(run.folder)


def load_run(folder: Path, overrides: Sequence[str] = (), *, losses: bool = True) -> LoadedRecipe:
    """Return the recipe of the run in a folder, on request without its ``losses``, as ``load_recipe`` does.

    Raises RecipeError, with advice, if it is missing or damaged.
    """
    path = folder / RECIPE
    advice = "give the recipe's own file in place of the folder"
    if not path.is_file():
        raise RecipeError(f"{folder}: there is no run here (no {RECIPE}); {advice}")
    try:
        return load_recipe(path, overrides, losses=losses)
    except RecipeError as error:
        if not str(error).startswith(display_path(path.resolve())):  # an error of the command line
            raise
        raise RecipeError(f"{error}; {advice}") from None


def lock_folder(folder: Path) -> None:
    """Create and lock the folder for this process until it ends, and remove the partial files of killed processes.

    Raises RecipeError if another process has locked it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _lock(folder)  # open, and so locked, until the process ends; not even a crash can leave the lock behind
    remove_temporaries(folder)


def check_unlocked(folder: Path) -> None:
    """Raise RecipeError if another process has locked the folder. This process must not have locked it."""
    if (folder / LOCK).exists():
        os.close(_lock(folder))


def _lock(folder: Path) -> int:
    """Lock the folder, and return the descriptor whose closing unlocks it."""
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT)
    try:
        # lockf locks for the process, flock for the descriptor; one process may open the folder twice.
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise RecipeError(
            f"{folder}: another process is writing in this folder; wait for it, or name another folder"
        ) from None
    return descriptor


def mark_preempted(folder: Path) -> None:
    """Create the marker ``preempted`` in a run folder: a signal ended the command, all is saved, please requeue."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / PREEMPTED).touch()  # not by a temporary file: a process that has the lock by now would remove it
    sync_path(folder)


def student_file(name: str, folder: Path) -> Path:
    """Return the weights that are called ``last``, ``best`` or ``ema`` in a run folder, or the file of that name.

    Raises RecipeError if there is no such file, and DamagedFile if it is not the one that the run wrote.
    """
    file = folder / NAMED_WEIGHTS[name] if name in NAMED_WEIGHTS else Path(name)
    if not file.is_file():
        raise RecipeError(f"weights: there is no file {file}; train the run first, or give weights=FILE")
    check_student(file)
    return file
