"""Whose a folder is: what a command finds where it is to write, before it writes."""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from fnmatch import fnmatchcase
from pathlib import Path

from pipeline.errors import RecipeError
from pipeline.runs.files import IDENTITY, NEW_FOLDER_HINT, PREEMPTED
from pipeline.teachers.cache import HEADER
from shards.manifest import MANIFEST

LOCK = ".lock"
TEMPORARY = re.compile(r".+\.(\d+|npy)\.tmp")
"""A file that was being written when its process was killed."""
TRACKERS = ("tensorboard", "wandb", "mlruns", "dvclive", "swanlog", "trackio")
"""Folders that an experiment tracker may have begun in a run folder."""
LOGS = (".log", ".out", ".err")
"""What a command prints may go into the folder that it is to make."""
ENCODERS = ("*.encoder.safetensors",)
"""Files that are written before a cache's header."""
_KINDS = {IDENTITY: "a run", HEADER: "a teacher's cache", MANIFEST: "shards"}


def check_run_folder(folder: Path, advice: str = NEW_FOLDER_HINT) -> None:
    """Raise RecipeError if ``folder`` cannot be written, or holds anything but a run and no run was begun there."""
    check_writable(folder, "folder", advice)
    _check_contents(folder, IDENTITY, TRACKERS, advice)


def check_cache_folder(folder: Path) -> None:
    """Raise RecipeError if ``folder`` cannot be written, or holds anything and no teacher's cache was begun there."""
    advice = "give teacher.cache=ANOTHER"
    check_writable(folder, "teacher.cache", advice)
    _check_contents(folder, HEADER, ENCODERS, advice)


def check_writable(folder: Path, key: str, advice: str) -> None:
    """Raise RecipeError, which names ``key``, if nothing can be written in ``folder``, or it cannot be made."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        reason = "must not write there" if there.is_dir() else f"{there} is no folder"
        raise RecipeError(f"{key}: {folder} cannot be written ({reason}); {advice}")


def _check_contents(folder: Path, marker: str, also: Collection[str], advice: str) -> None:
    """Raise RecipeError if the folder has files but not ``mark``, which is the first that is written in one's own."""
    if not folder.is_dir() or (folder / marker).exists():
        return
    names = sorted(path.name for path in folder.iterdir() if not _is_ignorable(path.name))
    strange = [name for name in names if not any(fnmatchcase(name, pattern) for pattern in also)]
    if not strange:
        return
    named = next((kind for name, kind in _KINDS.items() if name in strange), None)
    more = f" and {len(strange) - 3} more" if len(strange) > 3 else ""
    told = f"holds {named or ', '.join(strange[:3]) + more}, and not {_KINDS[marker]}"
    raise RecipeError(f"{folder}: {told}: nothing is written there; {advice}")


def _is_ignorable(name: str) -> bool:
    """Whether a folder with that in it may still be an empty one: a hidden file, word of a signal, a log, a torso."""
    return name.startswith(".") or name == PREEMPTED or name.endswith(LOGS) or bool(TEMPORARY.fullmatch(name))


def remove_temporaries(folder: Path) -> None:
    """Remove what killed commands had begun to write in a folder; for whoever holds its lock."""
    for path in folder.iterdir():
        if TEMPORARY.fullmatch(path.name) and path.is_file():
            path.unlink(missing_ok=True)
