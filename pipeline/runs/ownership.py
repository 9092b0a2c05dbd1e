"""Checks of a folder before a command writes to it: permissions, and files of other programs."""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from fnmatch import fnmatchcase
from pathlib import Path

from pipeline.errors import RecipeError
from pipeline.runs.files import IDENTITY, NEW_FOLDER_HINT, PREEMPTED, identity_copy
from pipeline.teachers.cache import HEADER
from shards.manifest import MANIFEST

LOCK = ".lock"
SEARCH_FILE = "search.json"
"""File of a search's folder: what it searches."""
TEMPORARY = re.compile(r".+\.(\d+|npy)\.tmp")
"""Name of a partial file, left by a process that was killed while it wrote."""
TRACKERS = ("tensorboard", "wandb", "mlruns", "dvclive", "swanlog", "trackio")
"""Folders that an experiment tracker may create in a run folder before the run begins."""
LOGS = (".log", ".out", ".err")
"""Endings of log files: a command's output may be redirected into its own folder."""
ENCODERS = ("*.encoder.safetensors",)
"""Files of a cache that are written before its header."""
_KINDS = {IDENTITY: "a run", HEADER: "a teacher's cache", MANIFEST: "shards", SEARCH_FILE: "a search"}


def check_run_folder(folder: Path, advice: str = NEW_FOLDER_HINT) -> None:
    """Raise RecipeError if ``folder`` cannot be written, or has files but no run."""
    check_writable(folder, "folder", advice)
    if not (folder / IDENTITY).exists() and (copy := identity_copy(folder)):
        raise RecipeError(f"{folder / IDENTITY} is missing; copy {copy} there, or {advice}")
    _check_contents(folder, IDENTITY, TRACKERS, advice)


def check_cache_folder(folder: Path, key: str = "teacher.cache", advice: str = "give teacher.cache=ANOTHER") -> None:
    """Raise RecipeError, which names ``key``, if ``folder`` cannot be written, or has files but no teacher's cache."""
    check_writable(folder, key, advice)
    _check_contents(folder, HEADER, ENCODERS, advice)


def check_search_folder(folder: Path) -> None:
    """Raise RecipeError if ``folder`` cannot be written, or has files but no search."""
    check_writable(folder, "folder", NEW_FOLDER_HINT)
    _check_contents(folder, SEARCH_FILE, (), NEW_FOLDER_HINT)


def check_writable(folder: Path, key: str, advice: str) -> None:
    """Raise RecipeError, which names ``key``, if ``folder`` cannot be written or created."""
    # The folder itself, or the nearest existing one above it, in which it would be created.
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not (existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)):
        reason = "permission denied" if existing.is_dir() else f"{existing} is not a folder"
        raise RecipeError(f"{key}: {folder} cannot be written ({reason}); {advice}")


def check_new_file(path: Path, key: str) -> None:
    """Raise RecipeError, which names ``key``, if no file can be written to ``path``, whose folder must exist."""
    if not path.absolute().parent.is_dir():
        raise RecipeError(f"{key}: there is no folder {path.parent} for {path}; create it first")
    if path.is_dir():
        raise RecipeError(f"{key}: {path} is a folder; name a file")
    check_writable(path.parent, key, f"give {key}=ANOTHER")


def _check_contents(folder: Path, marker: str, allowed: Collection[str], advice: str) -> None:
    """Raise RecipeError if the folder has files, but not ``marker``, the first that this program writes there."""
    if not folder.is_dir() or (folder / marker).exists():
        return
    names = sorted(path.name for path in folder.iterdir() if not _is_ignorable(path.name))
    foreign = [name for name in names if not any(fnmatchcase(name, pattern) for pattern in allowed)]
    if not foreign:
        return
    kind = next((kind for name, kind in _KINDS.items() if name in foreign), None)
    more = f" and {len(foreign) - 3} more" if len(foreign) > 3 else ""
    content = kind or ", ".join(foreign[:3]) + more
    raise RecipeError(f"{folder}: holds {content}, and not {_KINDS[marker]}: nothing is written there; {advice}")


def _is_ignorable(name: str) -> bool:
    """Return whether a folder with this file still counts as empty.

    The file is hidden, a log, a partial file or the marker of a preempted run.
    """
    return name.startswith(".") or name == PREEMPTED or name.endswith(LOGS) or bool(TEMPORARY.fullmatch(name))


def remove_temporaries(folder: Path) -> None:
    """Remove the partial files of killed processes from a folder; only the process with its lock may do so."""
    for path in folder.iterdir():
        if TEMPORARY.fullmatch(path.name) and path.is_file():
            path.unlink(missing_ok=True)
