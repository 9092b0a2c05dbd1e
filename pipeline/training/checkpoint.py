"""Checkpoints, whole or not there, and plain weights of the student.

A checkpoint ``checkpoints/step-<n>/`` is written as ``.tmp-step-<n>``, fsynced and renamed:

    distiller.safetensors    student, losses and auxiliary modules, of rank 0
    optimizer.pt  scaler.pt
    zero/                    instead of these three, under ZeRO: DeepSpeed's own files, one or more of each rank
    buffers-<rank>.safetensors   that rank's own buffers (BatchNorm statistics)
    ema.safetensors  teacher.safetensors (the student's moving average as its teacher)
    state.json               progress, the journal's length, world size, format, the sha256 of every other file
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from accelerate import Accelerator
from pydantic import Field, NonNegativeInt, TypeAdapter
from safetensors import safe_open
from torch import Tensor, nn

from pipeline.batch import Progress
from pipeline.config.recipe import CheckpointConfig as Config
from pipeline.distiller import Distiller
from pipeline.distributed import collectives
from pipeline.errors import RecipeError, one_line
from pipeline.losses._base import Loss
from pipeline.models.states import file_bytes, load_state, read_state, state_metadata
from pipeline.optim.ema import EMA
from pipeline.optim.optimizer import optimizer_state
from pipeline.teachers.average import EMATeacher
from pipeline.training import zero
from pipeline.training.files import (
    OF_THE_MACHINE,
    first_damaged,
    folder_bytes,
    load_pickled,
    readable,
    save_pickled,
    save_tensors,
    saving,
)
from pipeline.training.saved import STATE, SavedState, read_saved, write_saved
from pipeline.training.zero import DDP
from shards.documents import DamagedFile
from shards.manifest import UnwritableFile, free_bytes, sync_path, write_atomically, writing


@dataclass(frozen=True)
class Best:
    """The best validation accuracy so far, in percent, and its epoch (counted from 1)."""

    top1: Annotated[float, Field(ge=-1, le=100, allow_inf_nan=False)] = -1.0
    epoch: NonNegativeInt = 0


@dataclass(frozen=True)
class CheckpointState:
    """Where a run is: what a checkpoint holds besides tensors. The best accuracy stands in the best weights' file."""

    progress: Progress
    journal_bytes: int = 0


class Checkpoints:
    """Saves and restores a run, and keeps the last ``keep`` checkpoints."""

    def __init__(
        self,
        config: Config,
        folder: Path,
        accelerator: Accelerator,
        distiller: Distiller,
        optimizer: Any,
        averages: dict[str, EMA | EMATeacher],
    ) -> None:
        self.config = config
        self.folder = folder / "checkpoints"
        self.accelerator = accelerator
        self.distiller = distiller
        self.optimizer = optimizer
        self.averages = averages
        self.format = zero.checkpoint_format(accelerator)
        self.bytes = 0
        """Of a checkpoint, once there was one."""

    def due(self, progress: Progress) -> bool:
        """Whether the run is to be saved after this step."""
        every_steps, every_epochs = self.config.every_steps, self.config.every_epochs
        if every_steps and progress.step % every_steps == 0:
            return True
        return bool(every_epochs) and progress.epoch_ended and progress.epoch % every_epochs == 0

    def save(self, state: CheckpointState) -> None:
        """Write a checkpoint; every rank calls it at the same step.

        Raises UnwritableFile, and leaves those before as they are, where it cannot be written.
        """
        final = self.folder / f"step-{state.progress.step}"
        with self._written(final, state) as temporary:
            if self.accelerator.is_main_process:
                temporary.rename(final)
                sync_path(self.folder)
                self._prune()
            self.accelerator.wait_for_everyone()

    def load(self, steps_per_epoch: int, total_steps: int) -> CheckpointState:
        """Restore the newest checkpoint and return its state. A fresh state, if there is none, is saved once for proof.

        Raises RecipeError for a checkpoint of another format and, under ZeRO, of another number of ranks; DamagedFile
        and RecipeError for one that is not what was written; UnwritableFile where there is no room for the next.
        """
        if self.accelerator.is_main_process:
            for left in self.folder.glob(".tmp-*"):
                shutil.rmtree(left)
        steps = checkpoint_folders(self.folder)
        if not steps:
            state = CheckpointState(Progress(steps_per_epoch))
            self._prove(state)
        else:
            *earlier, folder = steps
            goes_on = f"goes on from {earlier[-1].name}" if earlier else "begins anew"
            mend = f"move {folder} away, and the run {goes_on}"
            saved = read_saved(folder, steps_per_epoch, total_steps, mend)
            self._check(folder, saved, mend)
            with readable(folder, mend):
                self._restore(folder, saved.world_size)
            self.bytes = folder_bytes(folder)
            state = CheckpointState(saved.progress, saved.journal_bytes)
        if self.accelerator.is_main_process:
            self._prune()  # a command that was killed before it did so may have been the last to save
            if state.progress.step < total_steps:
                self._check_room(len(checkpoint_folders(self.folder)))
        return state

    def _prune(self) -> None:
        """Remove all but the last ``keep`` checkpoints."""
        for old in checkpoint_folders(self.folder)[: -self.config.keep]:
            # Renamed first: a name without .tmp is always a whole checkpoint.
            shutil.rmtree(old.rename(old.with_name(f".tmp-{old.name}")))

    @contextmanager
    def _written(self, final: Path, state: CheckpointState) -> Iterator[Path]:
        """Give the folder in which all of a checkpoint stands, on the disk; what is left of it is taken away."""
        temporary = self.folder / f".tmp-{final.name}"
        try:
            if self.accelerator.is_main_process:
                shutil.rmtree(temporary, ignore_errors=True)
                with saving(final, self.bytes):
                    temporary.mkdir(parents=True)
            self.accelerator.wait_for_everyone()
            save_tensors(temporary / f"buffers-{collectives.rank()}.safetensors", rank_buffers(self.distiller))
            self._save_weights(temporary)
            self.accelerator.wait_for_everyone()
            if self.accelerator.is_main_process:
                self._complete(temporary, state)
            yield temporary
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise

    def _save_weights(self, folder: Path) -> None:
        """Write weights, optimizer and scaler: the main process all, under ZeRO every rank its part."""
        if self.format != DDP:
            with saving(folder / zero.TAG, self.bytes):
                zero.save_engine(self.accelerator, folder)
        elif self.accelerator.is_main_process:
            save_tensors(folder / "distiller.safetensors", self.distiller.state_dict(), self.distiller)
            save_pickled(folder / "optimizer.pt", optimizer_state(self.optimizer))
            if self.accelerator.scaler is not None:
                save_pickled(folder / "scaler.pt", self.accelerator.scaler.state_dict())

    def _complete(self, folder: Path, state: CheckpointState) -> None:
        """Add what the ranks have in common, and bring all of it to the disk."""
        for name, average in self.averages.items():
            module = average if isinstance(average, nn.Module) else None
            save_tensors(folder / f"{name}.safetensors", average.state_dict(), module)
        with saving(folder / STATE, 0):
            write_saved(folder, state.progress, state.journal_bytes, self.format, collectives.world_size())
        for path in [*folder.rglob("*"), folder]:
            with saving(path, 0):
                sync_path(path)

    def _prove(self, state: CheckpointState) -> None:
        """Save what the run begins with and load it back, so that what cannot be is known before the first step."""
        run = self.folder.parent
        try:
            with self._written(self.folder / "step-0", state) as folder:
                self.accelerator.wait_for_everyone()
                self._restore(folder, collectives.world_size())
                self.bytes = folder_bytes(folder)
                self.accelerator.wait_for_everyone()
                if self.accelerator.is_main_process:
                    shutil.rmtree(folder)
        except (UnwritableFile, *OF_THE_MACHINE):
            raise
        except Exception as error:
            told = f"{type(error).__name__}: {one_line(error, 200)}"
            raise RecipeError(f"{run}: what it would save cannot be saved and loaded back ({told})") from error

    def _restore(self, folder: Path, world_size: int) -> None:
        """Load all that a checkpoint of so many ranks holds, but its ``state.json``."""
        if self.format != DDP:
            zero.load_engine(self.accelerator, folder)
        else:
            load_state(self.distiller, read_state(folder / "distiller.safetensors"))
            self.optimizer.load_state_dict(load_pickled(folder / "optimizer.pt"))
            if self.accelerator.scaler is not None:
                self.accelerator.scaler.load_state_dict(load_pickled(folder / "scaler.pt"))
        self._load_buffers(folder, world_size)
        for name, average in self.averages.items():
            state = read_state(folder / f"{name}.safetensors")
            if isinstance(average, nn.Module):
                load_state(average, state)
            else:
                average.load_state_dict(state)

    def _check(self, folder: Path, saved: SavedState, mend: str) -> None:
        """Raise RecipeError for a checkpoint that is not this run's to restore, or not what was written."""
        if saved.format != self.format:
            raise RecipeError(
                f"{folder}: its format is {saved.format} and this run's is {self.format}; continue it as it began"
            )
        before, now = saved.world_size, collectives.world_size()
        if self.format != DDP and before != now:
            raise RecipeError(
                f"{folder}: its format is {self.format}, which {before} ranks wrote and {now} cannot read; "
                f"start {before} ranks"
            )
        damaged = first_damaged(folder, saved.sha256, self.accelerator.device)
        if damaged is not None:
            raise DamagedFile(f"{folder / damaged}: is gone, or not what was written (another sha256); {mend}")

    def _check_room(self, there: int) -> None:
        """Raise UnwritableFile where the next checkpoint has no room; say so where all that are kept have none."""
        with writing(self.folder, self.bytes):
            free = free_bytes(self.folder)
        keep = self.config.keep
        more = max(keep + 1 - there, 1)
        if free is not None and free < more * self.bytes:
            print(
                f"warning: {self.folder}: {free:,} bytes are free, and {more} more checkpoints of {self.bytes:,} are "
                f"to come (checkpoints.keep={keep}, and the next); make room there, or lower checkpoints.keep"
            )

    def _load_buffers(self, folder: Path, world_size: int) -> None:
        """Restore this rank's buffers; on another number of ranks start from the mean of those that were."""
        ranks = [collectives.rank()] if world_size == collectives.world_size() else range(world_size)
        files = [read_state(folder / f"buffers-{rank}.safetensors") for rank in ranks]
        for name, buffer in rank_buffers(self.distiller).items():
            stack = torch.stack([file[name] for file in files])
            buffer.copy_(stack.mean(0) if stack.is_floating_point() else stack[0])


def checkpoint_folders(folder: Path) -> list[Path]:
    """Return the whole checkpoints, oldest first. What was moved away to another name beside them is none."""
    found = [path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdecimal()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def rank_buffers(distiller: Distiller) -> dict[str, Tensor]:
    """Return the saved buffers that differ between the ranks: all but those that a loss itself holds, as banks are."""
    losses = [module for module in distiller.modules() if isinstance(module, Loss)]
    shared = {id(buffer) for loss in losses for buffer in loss.buffers(recurse=False)}
    saved = distiller.state_dict().keys()
    return {name: x for name, x in distiller.named_buffers() if name in saved and id(x) not in shared}


def export_student(model: nn.Module, path: Path, best: Best | None = None) -> None:
    """Write the plain weights of ``model``, which load into the same architecture with ``strict=True``.

    ``best`` goes into the file's metadata, so that weights and accuracy never part. Raises UnwritableFile where the
    file cannot be written; the one before stays.
    """
    metadata = (state_metadata(model) or {}) | ({"best": json.dumps(asdict(best))} if best else {})
    write_atomically(path, file_bytes(model.state_dict(), metadata))


def exported_best(path: Path) -> Best:
    """Return the accuracy that ``export_student`` wrote with the best weights; none yet where there is no file."""
    if not path.is_file():
        return Best()
    with readable(path, "move it away; the next best weights take its place"), safe_open(path, framework="pt") as file:
        return TypeAdapter(Best).validate_json(file.metadata()["best"], strict=True)
