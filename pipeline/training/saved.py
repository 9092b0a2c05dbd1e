"""``state.json`` of a checkpoint: the run's progress, the checkpoint's format, and digests of all files."""

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
    """The content of ``state.json``."""

    progress: Progress
    journal_bytes: NonNegativeInt
    format: str
    world_size: PositiveInt
    sha256: dict[str, str] = Field(default={})
    """SHA-256 of every other file in the checkpoint, by relative path; empty if earlier code wrote it."""
    state_sha256: str | None = None
    """SHA-256 of all values above; None if earlier code wrote the file."""


def write_saved(folder: Path, progress: Progress, journal_bytes: int, form: str, world_size: int) -> None:
    """Write ``state.json`` into a folder that already contains all other files."""
    state = SavedState(
        progress=progress,
        journal_bytes=journal_bytes,
        format=form,
        world_size=world_size,
        sha256=file_digests(folder),
    )
    values = _values(state)
    (folder / STATE).write_text(json.dumps({**values, "state_sha256": _digest(values)}, indent=2) + "\n")


def read_saved(folder: Path, steps_per_epoch: int, total_steps: int, advice: str) -> SavedState:
    """Return the state in ``folder``, which is named after its step.

    Raises DamagedFile, with ``advice``, if the file was changed or its step does not fit this run.
    """
    path = folder / STATE
    state = read_document(path, SavedState, advice)
    # Earlier code wrote neither digest, so a file that has only sha256 was changed.
    if state.state_sha256 not in (None, _digest(_values(state))) or (state.sha256 and state.state_sha256 is None):
        raise DamagedFile(f"{path}: was changed (its state_sha256 differs); {advice}")
    progress = state.progress
    if folder.name != f"step-{progress.step}" or not 0 < progress.step <= total_steps:
        raise DamagedFile(
            f"{path}: progress.step: expected the step in {folder.name}, from 1 to {total_steps}, "
            f"got {progress.step}; {advice}"
        )
    if progress.steps_per_epoch != steps_per_epoch or progress.samples_seen < progress.step:
        found = f"{progress.steps_per_epoch} steps per epoch and {progress.samples_seen} samples"
        raise DamagedFile(f"{path}: progress: {found}, but the data has {steps_per_epoch} steps per epoch; {advice}")
    return state


def _values(state: SavedState) -> dict[str, Any]:
    return state.model_dump(exclude={"state_sha256"})


def _digest(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
