"""``state.json`` of a checkpoint: where the run was, how the rest was written, and the digests of all of it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from pydantic import Field, NonNegativeInt, PositiveInt

from pipeline.batch import Progress
from pipeline.frozen_model import FrozenModel
from pipeline.training.files import file_digests
from shards.documents import DamagedFile, read_document

STATE = "state.json"


class SavedState(FrozenModel):
    """What the file holds."""

    progress: Progress
    journal_bytes: NonNegativeInt
    format: str
    world_size: PositiveInt
    sha256: dict[str, str] = Field(default={})
    """Of every other file of the checkpoint, by its path from there. Earlier code wrote none."""
    state_sha256: str | None = None
    """Of all the values above."""


def write_saved(folder: Path, progress: Progress, journal_bytes: int, form: str, world_size: int) -> None:
    """Write the file into a folder that holds everything else."""
    state = SavedState(
        progress=progress,
        journal_bytes=journal_bytes,
        format=form,
        world_size=world_size,
        sha256=file_digests(folder),
    )
    values = _values(state)
    (folder / STATE).write_text(json.dumps({**values, "state_sha256": _digest(values)}, indent=2) + "\n")


def read_saved(folder: Path, steps_per_epoch: int, total_steps: int, mend: str) -> SavedState:
    """Return the state in ``folder``, which is named after its step.

    Raises DamagedFile, with what to do, where the file is not what was written, or of no step of this run.
    """
    path = folder / STATE
    state = read_document(path, SavedState, mend)
    if state.state_sha256 not in (None, _digest(_values(state))) or (state.sha256 and state.state_sha256 is None):
        raise DamagedFile(f"{path}: is not what was written (another state_sha256); {mend}")
    progress = state.progress
    if folder.name != f"step-{progress.step}" or not 0 < progress.step <= total_steps:
        raise DamagedFile(f"{path}: progress.step: {progress.step} in {folder.name}, of {total_steps} steps; {mend}")
    if progress.steps_per_epoch != steps_per_epoch or progress.samples_seen < progress.step:
        told = f"{progress.steps_per_epoch} steps an epoch and {progress.samples_seen} samples"
        raise DamagedFile(f"{path}: progress: {told}, where the data gives {steps_per_epoch} steps; {mend}")
    return state


def _values(state: SavedState) -> dict[str, Any]:
    return state.model_dump(exclude={"state_sha256"})


def _digest(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
