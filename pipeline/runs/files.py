"""The files of a run folder: their names, schemas, readers and writers."""

from __future__ import annotations

import json
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError, model_validator

from pipeline.tasks._registry import find_task, known_tasks
from shards.documents import DamagedFile, read_document
from shards.manifest import sha256_of, write_atomically

RESULT_FILE = "result.json"
RECIPE = "recipe.yaml"
IDENTITY = "identity.json"
VERSIONS_FILE = "versions.json"
JOURNAL_FILE = "journal.jsonl"
TRACKERS_FILE = "trackers.json"
STARTS_FILE = "starts.jsonl"
"""A line for each command that trained in the folder: when it began, and at which step."""
REPORT_FILE = "report.html"
CHECKPOINTS = "checkpoints"
STUDENT = "student.safetensors"
STUDENT_BEST = "student_best.safetensors"
STUDENT_EMA = "student_ema.safetensors"
LOSS_MODULES = "auxiliary.safetensors"
"""The modules that the run's losses leave for the losses of other runs."""
ROUTE = "route"
"""Folder of the weights that the run keeps of ``checkpoints.export_epochs``."""
STUDENT_FILES = (STUDENT, STUDENT_BEST, STUDENT_EMA)
PREEMPTED = "preempted"
"""Marker that a signal ended the command after it saved all its work; removed when the run continues."""
NEW_FOLDER_HINT = "give folder=ANOTHER"

Percent = Annotated[float, Field(ge=-1, le=100, allow_inf_nan=False)]
"""A metric of the validation images, in percent; −1 for a best value that is not known."""
_BEST = "best_"
Versions = dict[str, str | bool | None]


class Result(BaseModel):
    """The results of a finished run.

    The metrics of its task are keys of their own. Of the main one there are three, such as ``top1`` and ``best_top1``,
    and with a moving average of the weights ``ema_top1``.
    """

    model_config = ConfigDict(extra="allow", frozen=True)
    __pydantic_extra__: dict[str, Percent | None]  # pyright: ignore[reportIncompatibleVariableOverride]

    identity: str
    """Digest of the run's identity."""
    model: str
    parameters: NonNegativeInt
    best_epoch: NonNegativeInt = 0
    epochs: NonNegativeInt = 0
    images_per_second: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    sha256: dict[str, str] = {}
    """Digest of each file of weights; empty in runs from before digests were written."""
    # The facts below are None in runs from before they were written.
    recipe: str | None = None
    """The recipe as a command line names it, ``configs/cifar100/proxy.yaml method=kd``; None for one elsewhere."""
    shards: str | None = None
    """Script that prepared the shards, by its name."""
    images: NonNegativeInt | None = None
    """Number of training images."""
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    """Seconds of training by the journal, all commands of a resumed run together; see ``training_seconds``."""
    device: str | None = None
    """Name of the GPU or processor that the last command trained on."""
    ranks: PositiveInt | None = None
    """Number of ranks of the last command."""
    side: PositiveInt | None = None
    """Number of runs that the last command trained side by side; None for one alone."""
    peers: dict[str, Percent] | None = None
    """The main metric of each network that trained together, of their mean and of their ensemble; None for one."""

    @model_validator(mode="before")
    @classmethod
    def _without_unknown_keys(cls, values: Any) -> Any:
        # Later code may write more, and is not a reason to evaluate the run again.
        if not isinstance(values, dict):
            return values
        titles = {name for task in known_tasks() for name in find_task(task).titles}
        metrics = {f"{prefix}{name}" for name in titles for prefix in ("", _BEST, "ema_")}
        return {key: value for key, value in values.items() if key in metrics | cls.model_fields.keys()}

    @model_validator(mode="after")
    def _has_a_main_metric(self) -> Result:
        names = [name for name in self.metrics if name.startswith(_BEST)]
        if len(names) != 1 or names[0].removeprefix(_BEST) not in self.metrics:
            raise ValueError("expected a metric and its best value, such as top1 and best_top1")
        return self

    @property
    def metrics(self) -> dict[str, float | None]:
        """Return all metrics by their keys; None if the run had no validation images."""
        return self.__pydantic_extra__

    @property
    def metric(self) -> str:
        """Return the name of the main metric."""
        return next(name.removeprefix(_BEST) for name in self.metrics if name.startswith(_BEST))

    @property
    def last(self) -> float | None:
        """Return the main metric after the last epoch."""
        return self.metrics[self.metric]

    @property
    def best(self) -> float | None:
        """Return the largest value of the main metric after any epoch; −1 if it is not known."""
        return self.metrics[_BEST + self.metric]


class _IdentitySection(BaseModel):
    # Extra keys are allowed and kept: most keys of the recipe have no field here.
    model_config = ConfigDict(extra="allow", frozen=True)


class _TeacherIdentity(_IdentitySection):
    batch: PositiveInt | None = None
    cache: str | None = None
    route: dict[str, Any] | None = None


class _UnlabelledIdentity(_IdentitySection):
    pseudo: str | None = None


class _DataIdentity(_IdentitySection):
    classes: str
    manifest: str
    unlabelled: _UnlabelledIdentity | None = None
    views: PositiveInt | None = None
    validation_batch: PositiveInt | None = None


class Identity(_IdentitySection):
    """The content of ``identity.json``, a recipe; only the keys that this program reads have a type."""

    student: dict[str, Any]
    teacher: _TeacherIdentity | None
    losses: dict[str, Any]
    data: _DataIdentity

    def values(self) -> dict[str, Any]:
        """Return all keys and values of the file."""
        return self.model_dump(exclude_unset=True)


def read_identity(folder: Path) -> Identity | None:
    """Return the identity of the run in a folder, None if no run has begun there.

    Raises DamagedFile if the file is not valid.
    """
    copy = identity_copy(folder)
    advice = f"copy {copy} over it" if copy else f"move {folder} away, or {NEW_FOLDER_HINT}"
    return _read(folder / IDENTITY, Identity, advice)


def identity_copy(folder: Path) -> Path | None:
    """Return the copy of a run's identity in its newest checkpoint, or None if there is none."""
    copies = [path / IDENTITY for path in checkpoint_folders(folder / CHECKPOINTS) if (path / IDENTITY).is_file()]
    return copies[-1] if copies else None


def checkpoint_folders(folder: Path) -> list[Path]:
    """Return the complete checkpoints, oldest first; a folder that was renamed to another name is ignored."""
    found = [path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdecimal()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def read_result(folder: Path) -> Result | None:
    """Return the results of the run in a folder, None if it is not finished.

    Raises DamagedFile if the file is not valid.
    """
    return _read(folder / RESULT_FILE, Result, "delete it, and the run is evaluated again")


def student_sha256(folder: Path) -> dict[str, str]:
    """Return the sha256 of each file of weights in a run folder, the student's and the losses', by its path there."""
    route = sorted(path.relative_to(folder).as_posix() for path in (folder / ROUTE).glob("epoch-*.safetensors"))
    files = (*STUDENT_FILES, LOSS_MODULES, *route)
    return {name: sha256_of(folder / name) for name in files if (folder / name).is_file()}


def route_file(epoch: int) -> str:
    """Return the path in a run folder of the weights after an epoch, counted from 1."""
    return f"{ROUTE}/epoch-{epoch:03d}.safetensors"


def check_student(path: Path) -> None:
    """Raise DamagedFile if a file of weights differs from the one that the finished run wrote.

    Files outside a run folder, and files of an unfinished run, are not checked: there is no digest to compare with.
    """
    folder = path.parent.parent if path.parent.name == ROUTE else path.parent
    if not (folder / IDENTITY).is_file():
        return
    result = read_result(folder)
    digest = result and result.sha256.get(path.relative_to(folder).as_posix())
    if digest and digest != sha256_of(path):
        raise DamagedFile(
            f"{path}: not the weights that this run wrote (its sha256 differs from {RESULT_FILE}). Give another file, "
            f"or delete {RESULT_FILE} and repeat the run's command, which writes its last weights again"
        )


def read_versions(folder: Path) -> Versions | None:
    """Return the versions with which the run began, None if they are not known.

    Raises DamagedFile if the file is not valid.
    """
    return _read(folder / VERSIONS_FILE, Versions, "delete it, and the current versions are written")


def read_tracker_ids(folder: Path) -> dict[str, str]:
    """Return the run's ids in experiment trackers, by the tracker's name; empty if there are none.

    Raises DamagedFile if the file is not valid.
    """
    return _read(folder / TRACKERS_FILE, dict[str, str], "delete it, and trackers begin a new run") or {}


class Start(BaseModel):
    """A line of ``starts.jsonl``: the beginning of a command that trains the run."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    time: str
    """ISO 8601, in UTC."""
    step: NonNegativeInt
    """Step of the newest checkpoint, from which the command continues."""


def add_start(folder: Path) -> None:
    """Append a line to ``starts.jsonl``. The process that has the folder's lock calls it."""
    saved = checkpoint_folders(folder / CHECKPOINTS)
    step = int(saved[-1].name.removeprefix("step-")) if saved else 0
    start = Start(time=datetime.now(UTC).isoformat(timespec="seconds"), step=step)
    with (folder / STARTS_FILE).open("a") as file:
        file.write(start.model_dump_json() + "\n")


def read_starts(folder: Path) -> list[Start]:
    """Return the starts of a run's commands; none in runs from before they were written. Damaged lines are left out."""
    path, found = folder / STARTS_FILE, []
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else ():
        with suppress(ValidationError):
            found.append(Start.model_validate_json(line))
    return found


def _read(path: Path, schema: Any, advice: str) -> Any:
    return read_document(path, schema, advice) if path.exists() else None


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` atomically: the file is always the complete old one or the complete new one."""
    write_atomically(path, (json.dumps(value, indent=2) + "\n").encode())
