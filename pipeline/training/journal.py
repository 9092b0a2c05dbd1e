"""The journal of a run: JSON lines and trackers.

A line of ``journal.jsonl`` contains the values of one step. Values that depend on the machine are under ``timing``.
Those under ``validation`` contain a sum over the ranks, whose last bits depend on the number of ranks. What only a
report shows is under ``denoiser``. The loss trace of a run is all lines without these sections. It is the same however
often the run was interrupted.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, NonNegativeFloat, PositiveInt
from torch import Tensor
from tqdm import tqdm

from pipeline.batch import Progress
from pipeline.config.recipe import Recipe
from pipeline.distributed import collectives
from pipeline.runs.files import JOURNAL_FILE
from pipeline.tasks._base import Evaluation
from pipeline.training.flops import peak_flops
from pipeline.training.progress_bar import ProgressDisplay, open_display
from pipeline.training.step import StepOutput
from pipeline.training.stopping import last_step
from pipeline.training.timer import StepTimer
from shards.documents import DamagedFile, parse_document

ItemT = TypeVar("ItemT")
OBSERVED = "denoiser"
"""Key of an evaluation's line with what ``Loss.observe`` returned, by loss."""
NOT_IN_TRACE = ("timing", "validation", OBSERVED)
"""Sections of a line that may differ between two commands that train the same."""


class TrainingJournal:
    """A journal that keeps loss parts on the device and writes every ``every_steps``-th step.

    The host waits for the device only when a step is written.
    """

    def __init__(
        self,
        folder: Path,
        recipe: Recipe,
        *,
        total_steps: int,
        timer: StepTimer,
        device: torch.device,
        track: Callable[[dict[str, float], int], None],
        flops: float | None = None,
    ) -> None:
        self.path = folder / JOURNAL_FILE
        self.every_steps = recipe.journal.every_steps
        self.batch = recipe.rows_per_step
        self.total_steps = total_steps
        self.track, self.device = track, device
        self.main = collectives.is_main()
        self.flops = flops
        """Floating-point operations per image, if known."""
        peak = peak_flops(device, recipe.precision)
        self.peak = peak and collectives.world_size() * peak
        """Peak FLOP/s of all ranks together, if known. All ranks are assumed to have the same GPU."""
        self.micro_batches: list[Tensor] = []
        """The loss parts [P] of each micro-batch of the current step, on the device."""
        self.epochs, self.stop = recipe.epochs, recipe.stop
        self.display: ProgressDisplay | None = None
        self.timer = timer
        self.images = self.seconds = 0.0
        """Images trained on by this process, and the seconds that took, without evaluations."""

    @contextmanager
    def open(self, progress: Progress, length: int, *, display: bool = True) -> Iterator[None]:
        """Open the journal, cut to its ``length`` in bytes at the resumed checkpoint, and start the clock.

        ``display`` means that the user sees the steps. Raises DamagedFile, on every rank, if a line up to there is not
        valid.
        """
        length, lost = _valid_length(self.path, length)
        self._restart_clock(progress.step)
        if not self.main:
            yield
            return
        end = last_step(self.stop, progress.steps_per_epoch, self.total_steps)
        shows = open_display(progress, self.epochs, end) if display else nullcontext()
        with self.path.open("a") as self.file, shows as self.display:
            if lost:
                print(f"note: {self.path} has lost lines since the checkpoint; the journal continues without them")
            self.file.truncate(length)
            self.file.seek(length)
            yield

    @property
    def length(self) -> int:
        """Bytes written so far, all of them synced to disk."""
        if not self.main:
            return 0
        with self._on_disk():
            os.fsync(self.file.fileno())
        return self.file.tell()

    @contextmanager
    def _on_disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OSError(
                f"{self.path}: a line could not be written ({error.strerror}); make room there, and the same command "
                "continues from the last checkpoint"
            ) from error

    def timed(self, stream: Iterator[ItemT]) -> Iterator[ItemT]:
        """Yield the items of ``stream``, and count the wait for them as ``data``."""
        for item in stream:
            self.timer.lap("data")
            yield item
            self.timer.lap("rest")

    def accumulate(self, done: StepOutput) -> None:
        """Keep the loss parts of a micro-batch until its step is recorded."""
        self.names = [*done.names, "gradient_norm"]
        self.micro_batches.append(done.parts_P)

    def due(self, progress: Progress) -> bool:
        """Return whether the step that ended at ``progress`` is to be written."""
        return progress.step % self.every_steps == 0 or progress.step == 1 or progress.step == self.total_steps

    def record(self, progress: Progress, rate: float, gradient_norm: Tensor) -> None:
        """Close a step, and write it if it is due; every rank calls it."""
        micro_batches, self.micro_batches = self.micro_batches, []
        if self.due(progress):
            self._record(progress, rate, micro_batches, gradient_norm)
        if self.display is not None:
            self.display.tick(progress, rate)

    def _record(self, progress: Progress, rate: float, micro_batches: list[Tensor], gradient_norm: Tensor) -> None:
        means_P = torch.cat([torch.stack(micro_batches).mean(0), gradient_norm.reshape(1)])
        values = dict(zip(self.names, collectives.all_reduce_mean(means_P).tolist(), strict=True))
        timing = self._count(progress.step)
        # The longest wait of all ranks: the others wait for that rank, and count their wait as communication.
        waits = torch.tensor(timing["data_wait"], dtype=torch.float64, device=gradient_norm.device)
        timing["data_wait"] = collectives.all_reduce_max(waits).item()
        position = {"step": progress.step, "epoch": round(progress.fraction, 6), "samples": progress.samples_seen}
        self._write({**position, "rate": rate, **values, "timing": timing}, progress.step)
        self._track("train", {"epoch": progress.fraction, "rate": rate, **values}, progress.step)
        self._track("timing", timing, progress.step)
        if self.display is not None:
            known = self.display.values
            # The training metric follows the total.
            known.loss, known.train = values["total"], values[self.names[self.names.index("total") + 1]]
            known.images_per_second, known.data_wait = timing["images_per_second"], timing["data_wait"]

    @contextmanager
    def pause(self, progress: Progress) -> Iterator[None]:
        """Exclude an evaluation, inside the context, from the training rates."""
        self._count(progress.step)
        if self.display is not None:
            self.display.show_phase("validating")
        yield
        if self.display is not None:
            self.display.show_phase("")
        self._restart_clock(progress.step)

    def log_evaluation(
        self, progress: Progress, found: Evaluation, best: float, observed: dict[str, Any] | None = None
    ) -> None:
        """Write an evaluation, and what was ``observed`` of the losses' networks for the report.

        The display shows the main metric, the first one, and ``best``, the best so far.
        """
        values, validation = found.metrics, {"loss": found.loss, "best": best}
        more = ({"peers": found.peers} if found.peers else {}) | ({OBSERVED: observed} if observed else {})
        line = {"step": progress.step, "epoch": progress.epoch, **values, "validation": validation, **more}
        self._write(line, progress.step)
        main = next(iter(values))
        of_peers = {f"{name}_{main}": value for name, value in found.peers.items()}
        self._track("val", {**values, "loss": found.loss, f"best_{main}": best, **of_peers}, progress.step)
        if self.display is not None:
            self.display.show_evaluation(found.main, best)
            tqdm.write(f"epoch {progress.epoch}: " + "  ".join(f"{name} {value:.2f}" for name, value in values.items()))

    def _write(self, line: dict[str, Any], step: int) -> None:
        if not self.main:
            return
        # JSON has no infinity, which is the gradient norm of a step that a GradScaler skips.
        line = _finite(line)
        with self._on_disk():
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()

    def _track(self, section: str, values: dict[str, Any], step: int) -> None:
        """Send finite values to the trackers, named ``<section>/<name>``, with further names for nested ones."""
        if not self.main:
            return
        nested = {name: value for name, value in values.items() if isinstance(value, dict)}
        flat = {name: value for name, value in values.items() if name not in nested}
        flat |= {f"{name}/{key}": value for name, inner in nested.items() for key, value in inner.items()}
        self.track({f"{section}/{name}": x for name, x in flat.items() if x is not None and math.isfinite(x)}, step)

    def _restart_clock(self, step: int) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self.since, self.since_step = time.perf_counter(), step
        self.timer.begin()

    def _count(self, step: int) -> dict[str, Any]:
        """Add the time since the clock was started to the training time, restart it, and return this rank's rates.

        ``milliseconds`` are those of one step by the timer's names; on a GPU they are the device's time.
        ``memory_gib`` is the peak of this process's memory on its GPU.
        """
        self.timer.lap("rest")
        by_name, steps = self.timer.read(), step - self.since_step
        by_name["rest"] = by_name.pop("rest")  # moved to the end: after a restart of the clock it may come first
        seconds, images = time.perf_counter() - self.since, steps * self.batch
        memory = self._peak_memory()
        self._restart_clock(step)
        self.images += images
        self.seconds += seconds
        return {
            "images_per_second": round(images / seconds, 1),
            "data_wait": round(by_name.get("data", 0.0) / seconds, 4),
            **self._utilization(images / seconds),
            "milliseconds": {name: round(1000 * value / max(steps, 1), 3) for name, value in by_name.items()},
            **memory,
        }

    def _peak_memory(self) -> dict[str, dict[str, float]]:
        """Return the largest memory since the clock was started, in GiB; nothing on a CPU."""
        if self.device.type != "cuda":
            return {}
        found = {
            "allocated": torch.cuda.max_memory_allocated(self.device),
            "reserved": torch.cuda.max_memory_reserved(self.device),
        }
        return {"memory_gib": {name: round(size / 2**30, 3) for name, size in found.items()}}

    def _utilization(self, images_per_second: float) -> dict[str, float]:
        """Return the ranks' ``teraflops`` per second at that rate, and ``mfu``, their share of the GPUs' peak.

        Both count the model's operations, not those that a GPU executes for it. Unknown values are left out.
        """
        if self.flops is None:
            return {}
        reached = images_per_second * self.flops
        teraflops = {"teraflops": float(f"{reached / 1e12:.4g}")}
        return teraflops | ({"mfu": round(reached / self.peak, 4)} if self.peak else {})

    @property
    def images_per_second(self) -> float:
        """Images per second of the part of the run that this process trained."""
        return self.images / self.seconds if self.seconds else 0.0


class Line(BaseModel):
    """A line of a journal: the keys that every line has; all other keys are numbers of that step."""

    model_config = ConfigDict(extra="allow", frozen=True)

    step: PositiveInt
    epoch: NonNegativeFloat


def read_journal(path: Path, end: int | None = None) -> list[dict[str, Any]]:
    """Return the complete lines of a journal, or of its first ``end`` bytes.

    Raises DamagedFile, with file and line, if a line is not valid or its step is smaller than that of the line above.
    """
    advice = "move the journal away, and the run continues with a new one"
    content = path.read_bytes()[:end]
    *lines, _incomplete = content.split(b"\n")
    parsed_lines, last = [], 0
    for number, line in enumerate(lines, 1):
        location = f"{path}: line {number}"
        parsed = parse_document(line, location, Line, advice)
        if parsed.step < last:
            raise DamagedFile(f"{location}: step: {parsed.step} comes after {last}; {advice}")
        last = parsed.step
        parsed_lines.append(parsed.model_dump(exclude_unset=True))
    return parsed_lines


def _finite(value: Any) -> Any:
    """Return ``value`` with None for every number that is not finite, those of sections and lists included."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _valid_length(path: Path, length: int) -> tuple[int, bool]:
    """Return the length of the complete lines in a journal's first ``length`` bytes, and whether it is shorter."""
    if not length or not path.exists():
        return 0, length > 0
    read_journal(path, length)
    with path.open("rb") as file:
        content = file.read(length)
    complete = content.rfind(b"\n") + 1
    return complete, complete < length


def trace(path: Path) -> list[dict[str, Any]]:
    """Return a run's loss trace: the journal's lines without the sections that are not part of it."""
    return [{key: value for key, value in line.items() if key not in NOT_IN_TRACE} for line in read_journal(path)]
