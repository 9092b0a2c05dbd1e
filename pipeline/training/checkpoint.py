"""Checkpoints, whole or not there, and plain weights of the student.

A checkpoint ``checkpoints/step-<n>/`` is written as ``.tmp-step-<n>``, fsynced and renamed:

    distiller.safetensors    student, losses and auxiliary modules, of rank 0
    optimizer.pt  scaler.pt
    zero/                    instead of these three, under ZeRO: DeepSpeed's own files, one or more of each rank
    buffers-<rank>.safetensors   that rank's own buffers (BatchNorm statistics)
    ema.safetensors  teacher.safetensors (the student's moving average as its teacher)
    state.json               progress, the journal's length, world size, format
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file
from torch import Tensor, nn

from pipeline.batch import Progress
from pipeline.config.recipe import Checkpoints as Config
from pipeline.distiller import Distiller
from pipeline.distributed import collectives
from pipeline.errors import RecipeError
from pipeline.losses._base import Loss
from pipeline.optim.ema import EMA
from pipeline.optim.optimizer import optimizer_state
from pipeline.teachers.average import EMATeacher
from pipeline.training import zero
from pipeline.training.zero import DDP
from shards.manifest import sync_path, write_atomically


@dataclass(frozen=True)
class Best:
    """The best validation accuracy so far, in percent, and its epoch (counted from 1)."""

    top1: float = -1.0
    epoch: int = 0


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

    def due(self, progress: Progress) -> bool:
        """Whether the run is to be saved after this step."""
        every_steps, every_epochs = self.config.every_steps, self.config.every_epochs
        if every_steps and progress.step % every_steps == 0:
            return True
        return bool(every_epochs) and progress.epoch_ended and progress.epoch % every_epochs == 0

    def save(self, state: CheckpointState) -> None:
        """Write a checkpoint; every rank calls it at the same step."""
        final = self.folder / f"step-{state.progress.step}"
        temporary = self.folder / f".tmp-{final.name}"
        if self.accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        save_file(_storable(rank_buffers(self.distiller)), temporary / f"buffers-{collectives.rank()}.safetensors")
        self._save_weights(temporary)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            self._complete(temporary, state)
            temporary.rename(final)
            sync_path(self.folder)
            for old in self._steps()[: -self.config.keep]:
                # Renamed first: a name without .tmp is always a whole checkpoint.
                shutil.rmtree(old.rename(old.with_name(f".tmp-{old.name}")))
        self.accelerator.wait_for_everyone()

    def _save_weights(self, folder: Path) -> None:
        """Write weights, optimizer and scaler: the main process all, under ZeRO every rank its part."""
        if self.format != DDP:
            zero.save(self.accelerator, folder)
        elif self.accelerator.is_main_process:
            save_file(_storable(self.distiller.state_dict()), folder / "distiller.safetensors")
            torch.save(optimizer_state(self.optimizer), folder / "optimizer.pt")
            if self.accelerator.scaler is not None:
                torch.save(self.accelerator.scaler.state_dict(), folder / "scaler.pt")

    def _load_weights(self, folder: Path) -> None:
        if self.format != DDP:
            zero.load(self.accelerator, folder)
            return
        self.distiller.load_state_dict(load_file(folder / "distiller.safetensors"))
        self.optimizer.load_state_dict(torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True))
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(torch.load(folder / "scaler.pt", weights_only=True))

    def _complete(self, folder: Path, state: CheckpointState) -> None:
        """Add what the ranks have in common, and bring all of it to the disk."""
        for name, average in self.averages.items():
            save_file(_storable(average.state_dict()), folder / f"{name}.safetensors")
        facts = {"format": self.format, "world_size": collectives.world_size()}
        (folder / "state.json").write_text(json.dumps({**asdict(state), **facts}, indent=2) + "\n")
        for path in [*folder.rglob("*"), folder]:
            sync_path(path)

    def load(self, steps_per_epoch: int) -> CheckpointState:
        """Restore the newest checkpoint and return its state; a fresh state if there is none.

        Raises RecipeError for a checkpoint of another format and, under ZeRO, of another number of ranks.
        """
        if self.accelerator.is_main_process:
            for left in self.folder.glob(".tmp-*"):
                shutil.rmtree(left)
        steps = self._steps()
        if not steps:
            return CheckpointState(Progress(steps_per_epoch))
        *earlier, folder = steps
        goes_on = f"goes on from {earlier[-1].name}" if earlier else "begins anew"
        with readable(folder, f"move it away, and the run {goes_on}"):
            saved = json.loads((folder / "state.json").read_text())
            self._check(folder, saved)
            self._load_weights(folder)
            self._load_buffers(folder, saved["world_size"])
            for name, average in self.averages.items():
                average.load_state_dict(load_file(folder / f"{name}.safetensors"))
            return CheckpointState(Progress(**saved["progress"]), saved["journal_bytes"])

    def _check(self, folder: Path, saved: dict[str, Any]) -> None:
        if saved["format"] != self.format:
            raise RecipeError(
                f"{folder}: its format is {saved['format']} and this run's is {self.format}; continue it as it began"
            )
        before, now = saved["world_size"], collectives.world_size()
        if self.format != DDP and before != now:
            raise RecipeError(
                f"{folder}: its format is {self.format}, which {before} ranks wrote and {now} cannot read; "
                f"start {before} ranks"
            )

    def _load_buffers(self, folder: Path, world_size: int) -> None:
        """Restore this rank's buffers; on another number of ranks start from the mean of those that were."""
        ranks = [collectives.rank()] if world_size == collectives.world_size() else range(world_size)
        files = [load_file(folder / f"buffers-{rank}.safetensors") for rank in ranks]
        for name, buffer in rank_buffers(self.distiller).items():
            stack = torch.stack([file[name] for file in files])
            buffer.copy_(stack.mean(0) if stack.is_floating_point() else stack[0])

    def _steps(self) -> list[Path]:
        """Return the whole checkpoints, oldest first."""
        return sorted(self.folder.glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))


def rank_buffers(distiller: Distiller) -> dict[str, Tensor]:
    """Return the saved buffers that differ between the ranks: all but those that a loss itself holds, as banks are."""
    losses = [module for module in distiller.modules() if isinstance(module, Loss)]
    shared = {id(buffer) for loss in losses for buffer in loss.buffers(recurse=False)}
    saved = distiller.state_dict().keys()
    return {name: x for name, x in distiller.named_buffers() if name in saved and id(x) not in shared}


def export_student(model: nn.Module, path: Path, best: Best | None = None) -> None:
    """Write the plain weights of ``model``, which load into the same architecture with ``strict=True``.

    ``best`` goes into the file's metadata, so that weights and accuracy never part.
    """
    metadata = {"best": json.dumps(asdict(best))} if best else None
    write_atomically(path, save(_storable(model.state_dict()), metadata))


def exported_best(path: Path) -> Best:
    """Return the accuracy that ``export_student`` wrote with the best weights; none yet where there is no file."""
    if not path.is_file():
        return Best()
    with readable(path, "move it away; the next best weights take its place"), safe_open(path, framework="pt") as file:
        return Best(**json.loads(file.metadata()["best"]))


@contextmanager
def readable(path: Path, mend: str) -> Iterator[None]:
    """Raise RecipeError, with what to do, for whatever a damaged file makes its reader raise inside the context."""
    try:
        yield
    except (RecipeError, torch.OutOfMemoryError, torch.distributed.DistError):  # which say nothing of the file
        raise
    except Exception as error:
        told = " ".join(str(error).split())[:200]
        raise RecipeError(f"{path}: cannot be read ({type(error).__name__}: {told}); {mend}") from error


def _storable(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors as safetensors takes them: without gradient, in rows."""
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
