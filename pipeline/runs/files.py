"""The files of a run folder: their names, what each holds, and how they are written and read."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt

from shards.documents import DamagedFile, read_document
from shards.manifest import sha256_of, write_atomically

RESULT_FILE = "result.json"
RECIPE = "recipe.yaml"
IDENTITY = "identity.json"
VERSIONS_FILE = "versions.json"
JOURNAL_FILE = "journal.jsonl"
STUDENT = "student.safetensors"
STUDENT_BEST = "student_best.safetensors"
STUDENT_EMA = "student_ema.safetensors"
STUDENT_FILES = (STUDENT, STUDENT_BEST, STUDENT_EMA)
PREEMPTED = "preempted"
"""Left by a command that a signal ended, with all that it did saved; gone when the run goes on."""
NEW_FOLDER_HINT = "give folder=ANOTHER"

Percent = Annotated[float, Field(ge=-1, le=100)]
"""Of the validation images; −1 where a best one is not known."""
Versions = dict[str, str | bool | None]


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a finished run measured."""

    identity: str
    """The digest of the run that it is of."""
    model: str
    parameters: NonNegativeInt
    top1: Percent | None
    top5: Percent | None = None
    best_top1: Percent | None
    best_epoch: NonNegativeInt = 0
    ema_top1: Percent | None = None
    epochs: NonNegativeInt = 0
    images_per_second: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    sha256: dict[str, str] = field(default_factory=dict)
    """Of each file of the student's weights; a run of before there were any has none."""


class _IdentitySection(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True)


class _TeacherIdentity(_IdentitySection):
    batch: PositiveInt | None = None
    cache: str | None = None


class _DataIdentity(_IdentitySection):
    classes: str
    manifest: str
    views: PositiveInt | None = None


class Identity(_IdentitySection):
    """What ``identity.json`` says: the recipe, of which only what is read here has a type."""

    student: dict[str, Any]
    teacher: _TeacherIdentity | None
    losses: dict[str, Any]
    data: _DataIdentity

    def values(self) -> dict[str, Any]:
        """Return all that the file says."""
        return self.model_dump(exclude_unset=True)


def read_identity(folder: Path) -> Identity | None:
    """Return the identity of the run in a folder, None where none was begun. Raises DamagedFile."""
    return _read(folder / IDENTITY, Identity, f"move {folder} away, or {NEW_FOLDER_HINT}")


def read_result(folder: Path) -> Result | None:
    """Return what the finished run in a folder measured, None where it is not finished. Raises DamagedFile."""
    return _read(folder / RESULT_FILE, Result, "delete it, and the run is measured again")


def student_sha256(folder: Path) -> dict[str, str]:
    """Return the sha256 of each file of the student's weights in a run folder."""
    return {name: sha256_of(folder / name) for name in STUDENT_FILES if (folder / name).is_file()}


def check_student(path: Path) -> None:
    """Raise DamagedFile if a file of the student's weights is not what the finished run in its folder wrote.

    Of a file anywhere else, and of a run that is not finished, nothing is known.
    """
    if not (path.parent / IDENTITY).is_file():
        return
    result = read_result(path.parent)
    digest = result and result.sha256.get(path.name)
    if digest and digest != sha256_of(path):
        raise DamagedFile(
            f"{path}: not the weights that this run wrote ({RESULT_FILE} has another sha256); give another file, or "
            f"delete {RESULT_FILE} and make the run once more, which writes its last weights again"
        )


def read_versions(folder: Path) -> Versions | None:
    """Return the versions that the run was begun with, None where they are not known. Raises DamagedFile."""
    return _read(folder / VERSIONS_FILE, Versions, "delete it, and the versions of today take its place")


def _read(path: Path, schema: Any, advice: str) -> Any:
    return read_document(path, schema, advice) if path.exists() else None


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` so that the file is either the old one or the new one, whole."""
    write_atomically(path, (json.dumps(value, indent=2) + "\n").encode())
