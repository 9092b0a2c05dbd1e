"""Benchmark of a real training step: some steps of ``train``, with the parts that its journal records."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from itertools import count, islice
from pathlib import Path
from statistics import median
from typing import Any

from pipeline.benchmarks.measure import Measurement
from pipeline.config.recipe import CheckpointConfig, JournalConfig, LoadedRecipe, Recipe, StopConfig
from pipeline.data.buckets import epoch_batches
from pipeline.distributed.launcher import Launch
from pipeline.errors import Interrupted, RecipeError
from pipeline.runs.files import JOURNAL_FILE
from pipeline.runs.identity import resolve
from pipeline.runs.ownership import check_run_folder
from pipeline.train import train
from pipeline.training.graph import EAGER_STEPS
from pipeline.training.journal import read_journal
from shards.manifest import Manifest

WHOLE = "step"
"""Name of the row for the whole step; the other rows are its parts."""
RATES = ("teraflops", "mfu")
"""Rates of the whole step that the journal may contain."""


def measure_step(
    loaded: LoadedRecipe, manifest: Manifest, launch: Launch, *, repeats: int, warmup: int, steps: int
) -> list[Measurement]:
    """Return the times of the step and of its parts on the main rank; a repeat is one line of the journal.

    Warm-up is rounded up to complete lines. Epochs may end meanwhile: a line with an evaluation in it is left out.
    """
    recipe = loaded.recipe
    in_epoch = epoch_batches(recipe.data, manifest, recipe.batch)
    if steps > in_epoch:
        raise RecipeError(f"steps: {steps} are more than the {in_epoch} of an epoch; give fewer, or a smaller batch")
    # Warm-up contains the steps before the graph's capture, and the first step, which the journal writes by itself.
    settled = -(-max(warmup, EAGER_STEPS + 1) // steps) * steps
    line_ends = (step for step in count(settled + steps, steps) if not contains_evaluation(step, steps, in_epoch))
    ends = list(islice(line_ends, repeats))
    folder = scratch_folder(Path(recipe.folder or "."), launch)
    short = shortened(recipe, ends[-1], steps, in_epoch).model_copy(update={"folder": str(folder)})
    with deleted(folder, launch), contextlib.redirect_stdout(io.StringIO()) as printed:
        train(resolve(replace(loaded, recipe=short), launch), launch)
        lines = read_journal(folder / JOURNAL_FILE) if launch.is_main else []
    # The other lines say how to continue this run, which has been deleted.
    for line in printed.getvalue().splitlines():
        if line.startswith("note: "):
            print(line)
    timings = [line["timing"] for line in lines if "timing" in line and line["step"] in ends]
    if launch.is_main and len(timings) < repeats:
        raise Interrupted("stopped before the measurement was complete; nothing is written")
    return split(timings, steps, recipe.rows_per_step)


def contains_evaluation(step: int, steps: int, in_epoch: int) -> bool:
    """Return whether an epoch ends, and is evaluated, within the ``steps`` up to ``step`` but before the last one."""
    return (step - 1) // in_epoch != (step - steps) // in_epoch


def shortened(recipe: Recipe, total: int, steps: int, in_epoch: int) -> Recipe:
    """Return the recipe of a run that ends after ``total`` steps and writes a line every ``steps`` steps."""
    changed: dict[str, Any] = {
        # More epochs than are trained, because the last step of a complete run would get a journal line of its own.
        "epochs": max(recipe.epochs, total // in_epoch + 1),
        "stop": StopConfig(steps=total),
        "journal": JournalConfig(every_steps=steps, trackers=()),
        "checkpoints": CheckpointConfig(every_epochs=0, poll_steps=recipe.checkpoints.poll_steps),
    }
    return recipe.model_copy(update=changed)


def scratch_folder(folder: Path, launch: Launch) -> Path:
    """Return a run folder below ``folder`` that all ranks of this command share, and no other command uses."""
    address = (os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))
    return folder / f"step-{'-'.join(address) if launch.world_size > 1 else os.getpid()}"


@contextlib.contextmanager
def deleted(folder: Path, launch: Launch) -> Iterator[None]:
    """Delete the run folder before and after the context; a killed command may have left one."""
    if launch.is_main:
        check_run_folder(folder, "give out=ANOTHER")
        shutil.rmtree(folder, ignore_errors=True)
    try:
        yield
    finally:
        if launch.is_main:
            shutil.rmtree(folder, ignore_errors=True)


def split(timings: list[dict[str, Any]], steps: int, batch: int) -> list[Measurement]:
    """Return the step and its parts in seconds per repeat, from the journal's milliseconds per step."""
    seconds = [{name: ms * steps / 1000 for name, ms in timing["milliseconds"].items()} for timing in timings]
    if not seconds:
        return []
    rates = {name: median(each[name] for each in timings) for name in RATES if name in timings[0]}
    whole = Measurement(WHOLE, [sum(parts.values()) for parts in seconds], steps * batch, rates, steps)
    # Parts have the same number of images. Otherwise a comparison with a record of another batch would take their speed
    # in steps and that of the whole in images.
    parts_measured = [
        Measurement(name, [parts[name] for parts in seconds], steps * batch, steps=steps) for name in seconds[0]
    ]
    return [whole, *parts_measured]
