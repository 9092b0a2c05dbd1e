"""Where a step of real training goes: ``train`` itself for some steps, as its journal splits them."""

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
"""The row whose parts the others are."""
RATES = ("teraflops", "mfu")
"""What the journal knows of the whole, where it does."""


def measure_step(
    loaded: LoadedRecipe, manifest: Manifest, launch: Launch, *, repeats: int, warmup: int, steps: int
) -> list[Measurement]:
    """Return the time of the steps and that of their parts, a line of the journal a repeat; on the main rank.

    Warm-up fills whole lines. Epochs may end meanwhile: lines that an evaluation cuts are passed over.
    """
    recipe = loaded.recipe
    in_epoch = manifest.splits["train"].samples // recipe.batch
    if steps > in_epoch:
        raise RecipeError(f"steps: {steps} are more than the {in_epoch} of an epoch; give fewer, or a smaller batch")
    # The first step has a line of its own, which is none of the repeats; and a graph is captured after a few.
    settled = -(-max(warmup, EAGER_STEPS + 1) // steps) * steps
    whole = (step for step in count(settled + steps, steps) if not cut(step, steps, in_epoch))
    ends = list(islice(whole, repeats))
    folder = scratch(Path(recipe.folder or "."), launch)
    short = shortened(recipe, ends[-1], steps, in_epoch).model_copy(update={"folder": str(folder)})
    with removed(folder, launch), contextlib.redirect_stdout(io.StringIO()) as told:
        train(resolve(replace(loaded, recipe=short), launch), launch)
        lines = read_journal(folder / JOURNAL_FILE) if launch.is_main else []
    # What else it printed is how to go on with this run, which is nobody's question.
    for line in told.getvalue().splitlines():
        if line.startswith("note: "):
            print(line)
    timings = [line["timing"] for line in lines if "timing" in line and line["step"] in ends]
    if launch.is_main and len(timings) < repeats:
        raise Interrupted("stopped before all was measured; nothing is written")
    return split(timings, steps, recipe.batch)


def cut(step: int, steps: int, in_epoch: int) -> bool:
    """Whether an epoch ends, and is evaluated, within the ``steps`` up to ``step`` but before the last of them."""
    return (step - 1) // in_epoch != (step - steps) // in_epoch


def shortened(recipe: Recipe, total: int, steps: int, in_epoch: int) -> Recipe:
    """Return the recipe of a run that ends after ``total`` steps and writes down the time of every ``steps``."""
    changed: dict[str, Any] = {
        "epochs": max(recipe.epochs, total // in_epoch + 1),  # its very last step would be written down, too
        "stop": StopConfig(steps=total),
        "journal": JournalConfig(every_steps=steps, trackers=()),
        "checkpoints": CheckpointConfig(every_epochs=0, poll_steps=recipe.checkpoints.poll_steps),
    }
    return recipe.model_copy(update=changed)


def scratch(folder: Path, launch: Launch) -> Path:
    """Return a run folder below ``folder`` that is the same for all ranks of this command, and no other's."""
    place = (os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))
    return folder / f"step-{'-'.join(place) if launch.world_size > 1 else os.getpid()}"


@contextlib.contextmanager
def removed(folder: Path, launch: Launch) -> Iterator[None]:
    """Begin without the folder, a run's that a killed command may have left, and leave none."""
    if launch.is_main:
        check_run_folder(folder, "give out=ANOTHER")
        shutil.rmtree(folder, ignore_errors=True)
    try:
        yield
    finally:
        if launch.is_main:
            shutil.rmtree(folder, ignore_errors=True)


def split(timings: list[dict[str, Any]], steps: int, batch: int) -> list[Measurement]:
    """Return the whole and its parts in seconds of a repeat, from the milliseconds of a step."""
    seconds = [{name: ms * steps / 1000 for name, ms in timing["milliseconds"].items()} for timing in timings]
    if not seconds:
        return []
    rates = {name: median(each[name] for each in timings) for name in RATES if name in timings[0]}
    whole = Measurement(WHOLE, [sum(parts.values()) for parts in seconds], steps * batch, rates, steps)
    # Parts are of as many images, or a record of another batch would compare them by steps and the whole by images.
    of_parts = [
        Measurement(name, [parts[name] for parts in seconds], steps * batch, steps=steps) for name in seconds[0]
    ]
    return [whole, *of_parts]
