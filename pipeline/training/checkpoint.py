"""Checkpoints of a run, written completely or not at all, and the student's plain weights.

A checkpoint ``checkpoints/step-<n>/`` is written as ``.tmp-step-<n>``, fsynced and renamed:

    distiller.safetensors    student, losses and auxiliary modules, from rank 0
    optimizer.pt  scaler.pt
    zero/                    instead of these three, under ZeRO: DeepSpeed's own files, one or more per rank
    buffers-<rank>.safetensors   that rank's own buffers (BatchNorm statistics)
    ema.safetensors  teacher.safetensors (a teacher that follows the student)
    identity.json            a copy of the run folder's
    state.json               progress, journal length, world size, format, sha256 of every other file
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from pydantic import BaseModel, ConfigDict, NonNegativeInt
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
from pipeline.runs.card import CARD, Card
from pipeline.runs.files import CHECKPOINTS, IDENTITY, Percent, checkpoint_folders
from pipeline.teachers.peers import FollowingTeacher
from pipeline.training import zero
from pipeline.training.files import (
    MACHINE_ERRORS,
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
from shards.documents import DamagedFile, parse_document
from shards.manifest import UnwritableFile, free_bytes, sync_path, write_atomically, writing


@dataclass(frozen=True)
class Best:
    """The best value so far of the task's main metric, in percent, and its epoch (counted from 1)."""

    metric: str
    """Name of the metric."""
    value: float = -1.0
    epoch: int = 0


@dataclass(frozen=True)
class CheckpointState:
    """The state of a run besides its tensors. The best accuracy is stored in the file of the best weights."""

    progress: Progress
    journal_bytes: int = 0


class Checkpoints:
    """The checkpoints of a run: they save and restore it, and only the last ``keep`` exist at any time."""

    def __init__(
        self,
        config: Config,
        folder: Path,
        accelerator: Accelerator,
        distiller: Distiller,
        optimizer: Any,
        averages: dict[str, EMA | FollowingTeacher],
    ) -> None:
        self.config = config
        self.folder = folder / CHECKPOINTS
        self.accelerator = accelerator
        self.distiller = distiller
        self.optimizer = optimizer
        self.averages = averages
        self.format = zero.checkpoint_format(accelerator)
        self.bytes = 0
        """Size of a checkpoint, 0 until one was written or read."""

    def due(self, progress: Progress) -> bool:
        """Return whether a checkpoint is due after this step."""
        every_steps, every_epochs = self.config.every_steps, self.config.every_epochs
        if every_steps and progress.step % every_steps == 0:
            return True
        return bool(every_epochs) and progress.epoch_ended and progress.epoch % every_epochs == 0

    def save(self, state: CheckpointState) -> None:
        """Write a checkpoint; every rank calls it at the same step.

        Raises UnwritableFile if it cannot be written; earlier checkpoints are not touched.
        """
        final = self.folder / f"step-{state.progress.step}"
        with self._temporary_checkpoint(final, state) as temporary:
            if self.accelerator.is_main_process:
                temporary.rename(final)
                sync_path(self.folder)
                self._prune()
            self.accelerator.wait_for_everyone()

    def load(self, steps_per_epoch: int, total_steps: int) -> CheckpointState:
        """Restore the newest checkpoint and return its state; without one, test saving and return a fresh state.

        Raises RecipeError if the checkpoint has another format or, under ZeRO, another number of ranks. Raises
        DamagedFile or RecipeError if its files are damaged, and UnwritableFile if the next one has no space.
        """
        if self.accelerator.is_main_process:
            for leftover in self.folder.glob(".tmp-*"):
                shutil.rmtree(leftover)
        steps = checkpoint_folders(self.folder)
        if not steps:
            state = CheckpointState(Progress(steps_per_epoch))
            self._test_saving(state)
        else:
            *earlier, folder = steps
            continues = f"continues from {earlier[-1].name}" if earlier else "starts from the beginning"
            advice = f"move {folder} away, and the run {continues}"
            saved = read_saved(folder, steps_per_epoch, total_steps, advice)
            self._check(folder, saved, advice)
            with readable(folder, advice):
                self._restore(folder, saved.world_size)
            self.bytes = folder_bytes(folder)
            state = CheckpointState(saved.progress, saved.journal_bytes)
        if self.accelerator.is_main_process:
            self._prune()  # the previous command may have been killed between saving and pruning
            if state.progress.step < total_steps:
                self._check_room(len(checkpoint_folders(self.folder)))
        return state

    def _prune(self) -> None:
        """Delete all but the last ``keep`` checkpoints."""
        for old in checkpoint_folders(self.folder)[: -self.config.keep]:
            # Rename first, so that a folder without .tmp in its name is always a complete checkpoint.
            shutil.rmtree(old.rename(old.with_name(f".tmp-{old.name}")))

    @contextmanager
    def _temporary_checkpoint(self, final: Path, state: CheckpointState) -> Iterator[Path]:
        """Yield a temporary folder with the complete checkpoint, synced to disk; an error deletes the folder."""
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
        """Write weights, optimizer and scaler: the main process all of them; under ZeRO every rank its part."""
        if self.format != DDP:
            with saving(folder / zero.TAG, self.bytes):
                zero.save_engine(self.accelerator, folder)
        elif self.accelerator.is_main_process:
            save_tensors(folder / "distiller.safetensors", self.distiller.state_dict(), self.distiller)
            save_pickled(folder / "optimizer.pt", optimizer_state(self.optimizer))
            if self.accelerator.scaler is not None:
                save_pickled(folder / "scaler.pt", self.accelerator.scaler.state_dict())

    def _complete(self, folder: Path, state: CheckpointState) -> None:
        """Add the files that the ranks share, and sync every file to disk."""
        for name, average in self.averages.items():
            module = average if isinstance(average, nn.Module) else None
            save_tensors(folder / f"{name}.safetensors", average.state_dict(), module)
        identity = self.folder.parent / IDENTITY
        if identity.is_file():  # a damaged one can be restored from here
            with saving(folder / IDENTITY, 0):
                shutil.copyfile(identity, folder / IDENTITY)
        # Last, because it contains the digest of every other file.
        with saving(folder / STATE, 0):
            write_saved(folder, state.progress, state.journal_bytes, self.format, collectives.world_size())
        for path in [*folder.rglob("*"), folder]:
            with saving(path, 0):
                sync_path(path)

    def _test_saving(self, state: CheckpointState) -> None:
        """Save the initial state and load it back, so that a run that cannot be saved fails before its first step."""
        run = self.folder.parent
        try:
            with self._temporary_checkpoint(self.folder / "step-0", state) as folder:
                self.accelerator.wait_for_everyone()
                self._restore(folder, collectives.world_size())
                self.bytes = folder_bytes(folder)
                self.accelerator.wait_for_everyone()
                if self.accelerator.is_main_process:
                    shutil.rmtree(folder)
        except (UnwritableFile, *MACHINE_ERRORS):
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {one_line(error, 200)}"
            raise RecipeError(f"{run}: its state cannot be saved and loaded back ({reason})") from error

    def _restore(self, folder: Path, world_size: int) -> None:
        """Load everything in a checkpoint of ``world_size`` ranks except ``state.json``."""
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

    def _check(self, folder: Path, saved: SavedState, advice: str) -> None:
        """Raise RecipeError if this run cannot restore the checkpoint, and DamagedFile if a file was changed."""
        if saved.format != self.format:
            raise RecipeError(
                f"{folder}: its format is {saved.format} and this run's is {self.format}; "
                "start with the same DeepSpeed settings as before"
            )
        before, now = saved.world_size, collectives.world_size()
        if self.format != DDP and before != now:
            raise RecipeError(
                f"{folder}: its format is {self.format}, which {before} ranks wrote and {now} ranks cannot read; "
                f"start {before} ranks"
            )
        damaged = first_damaged(folder, saved.sha256, self.accelerator.device)
        if damaged is not None:
            raise DamagedFile(f"{folder / damaged}: is missing or was changed (its sha256 differs); {advice}")

    def _check_room(self, existing: int) -> None:
        """Raise UnwritableFile if the next checkpoint does not fit on the disk; warn if not all kept ones will fit."""
        with writing(self.folder, self.bytes):
            free = free_bytes(self.folder)
        keep = self.config.keep
        # One more than are kept: an old checkpoint is deleted only after the new one is complete.
        more = max(keep + 1 - existing, 1)
        if free is not None and free < more * self.bytes:
            print(
                f"warning: {self.folder}: {free:,} bytes are free, but {more} more checkpoints of {self.bytes:,} bytes "
                f"will follow (checkpoints.keep={keep} plus the next); free space there, or lower checkpoints.keep"
            )

    def _load_buffers(self, folder: Path, world_size: int) -> None:
        """Restore this rank's buffers; if the number of ranks changed, use the mean of all stored ones."""
        ranks = [collectives.rank()] if world_size == collectives.world_size() else range(world_size)
        files = [read_state(folder / f"buffers-{rank}.safetensors") for rank in ranks]
        # Integer buffers, such as BatchNorm's num_batches_tracked, are equal on all ranks.
        for name, buffer in rank_buffers(self.distiller).items():
            stack = torch.stack([file[name] for file in files])
            buffer.copy_(stack.mean(0) if stack.is_floating_point() else stack[0])


def rank_buffers(distiller: Distiller) -> dict[str, Tensor]:
    """Return the saved buffers that differ between ranks: all except a loss's own ones, such as memory banks."""
    losses = [module for module in distiller.modules() if isinstance(module, Loss)]
    shared = {id(buffer) for loss in losses for buffer in loss.buffers(recurse=False)}
    saved = distiller.state_dict().keys()
    return {name: x for name, x in distiller.named_buffers() if name in saved and id(x) not in shared}


def export_student(model: nn.Module, path: Path, card: Card | None = None) -> None:
    """Write the plain weights of ``model``, which load into the same architecture with ``strict=True``.

    ``card`` is stored in the file's metadata, so weights and accuracy always belong together. Raises UnwritableFile if
    the file cannot be written; the previous file is kept.
    """
    metadata = (state_metadata(model) or {}) | (card.metadata() if card else {})
    write_atomically(path, file_bytes(model.state_dict(), metadata))


def exported_best(path: Path, metric: str) -> Best:
    """Return what the card of the best weights says; without a file, a best that every value exceeds."""
    if not path.is_file():
        return Best(metric)
    advice = "move it away; the next best weights take its place"
    with readable(path, advice), safe_open(path, framework="pt") as file:
        found = file.metadata()
        # Before there was a card, the text was the file's only metadata.
        text = json.dumps(json.loads(found[CARD])["best"]) if CARD in found else found["best"]
    stored = parse_document(text.encode(), f"{path}: best", _StoredBest, advice)
    if metric not in stored.values:
        raise DamagedFile(f"{path}: best: has no {metric}; {advice}")
    return Best(metric, stored.values[metric], stored.epoch)


class _StoredBest(BaseModel):
    """What is stored with the best weights: the epoch, and the metric under its own name."""

    model_config = ConfigDict(extra="allow", frozen=True)
    __pydantic_extra__: dict[str, Percent]  # pyright: ignore[reportIncompatibleVariableOverride]
    epoch: NonNegativeInt

    @property
    def values(self) -> dict[str, float]:
        """Return the metrics by name."""
        return self.__pydantic_extra__
