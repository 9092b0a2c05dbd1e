"""Measure where the time of a recipe goes on this machine, and keep what was measured.

    python pipeline/bench.py step RECIPE [key=value …]        real training: data, teacher, student, losses, backward, …
    python pipeline/bench.py losses RECIPE                    each loss by itself, with memory; needs no data
    python pipeline/bench.py teacher RECIPE                   the teacher by itself, on drawn images
    python pipeline/bench.py loader RECIPE [--tune]           reading and decoding; --tune looks for the best settings
    torchrun --nproc_per_node 8 pipeline/bench.py allreduce RECIPE      the gradients' sum by itself

Its own words: ``repeats=5 steps=10`` (in each of them) ``warmup=2`` (steps before them) ``out=runs/bench``, where each
command leaves a record (JSON) and its picture. ``--compare OLD.json`` shows what is faster and what is slower than in
an earlier record. What is measured is the first rank's time. ``step`` and ``teacher`` first train the recipe that a
teacher names, as training does; ``teacher.recipe=null teacher.model=NAME teacher.weights=FILE`` spares that.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from pipeline.distributed import signals

    signals.exit_quietly_on_interrupt()

import dataclasses
import difflib
from collections.abc import Sequence

from pydantic import Field

from pipeline.benchmarks.allreduce import measure_allreduce
from pipeline.benchmarks.compare import comparison_table
from pipeline.benchmarks.loader import measure_loading
from pipeline.benchmarks.losses import measure_losses
from pipeline.benchmarks.measure import Measurement
from pipeline.benchmarks.plot import draw_record
from pipeline.benchmarks.record import new_record, read_record, write_record
from pipeline.benchmarks.step import measure_step
from pipeline.benchmarks.table import benchmark_table
from pipeline.benchmarks.teacher import measure_teacher
from pipeline.benchmarks.tune import tune
from pipeline.cli import entry
from pipeline.config.arguments import parse_command_args, parse_recipe_args, split_command_args
from pipeline.config.recipe import LoadedRecipe, load_recipe
from pipeline.distributed import collectives
from pipeline.distributed.launcher import Launch, read_launch
from pipeline.errors import RecipeError
from pipeline.frozen_model import FrozenModel
from pipeline.runs.dependencies import ensure_dependencies, prepare_shards
from pipeline.runs.identity import resolve
from pipeline.runs.ownership import check_writable
from pipeline.runs.rank_settings import join_ranks
from pipeline.training.accelerator import create_accelerator, use_all_cores

WHAT = ("loader", "teacher", "losses", "allreduce", "step")
TUNING = "tuning"
"""What a record of ``loader --tune`` is of: other rows than those of ``loader``."""


class BenchArguments(FrozenModel):
    """The command's own words."""

    repeats: int = Field(default=5, gt=0, le=10**4)
    warmup: int = Field(default=2, ge=0, le=10**6)
    steps: int = Field(default=10, gt=0, le=10**6)
    out: Path = Path("runs/bench")


def main(words: Sequence[str]) -> None:
    """Measure what the command line names, print it, and leave a record of it."""
    what, rest = parse_what(words)
    tunes, (earlier, rest) = "--tune" in rest, compare_records([word for word in rest if word != "--tune"])
    if tunes and what != "loader":
        raise RecipeError(f"command line: --tune is of the loader, not of {what}")
    kind = TUNING if tunes else what
    old = read_record(earlier, kind) if earlier else None
    own, rest = split_command_args(rest, tuple(BenchArguments.model_fields))
    if tunes and (stray := own.keys() - {"out"}):
        raise RecipeError(f"command line: --tune chooses {', '.join(sorted(stray))} itself; leave them out")
    asked = parse_command_args(own, BenchArguments)
    loaded, launch = load_recipe(*parse_recipe_args(rest)), read_launch()
    check_writable(asked.out, "out", "give out=ANOTHER")
    asked.out.mkdir(parents=True, exist_ok=True)
    use_all_cores(launch)
    measured = run_benchmark(what, loaded, asked, launch, tunes=tunes)
    collectives.destroy_process_group()
    if not (measured and launch.is_main):
        return
    record = new_record(kind, loaded, words, measured, launch.world_size)
    path = write_record(record, asked.out)
    print(benchmark_table(record))
    if old:
        print(f"\ncompared with {earlier}\n{comparison_table(old, record)}")
    draw_record(record, path.with_suffix(".png"))
    print(f"\n{path}")


def parse_what(words: Sequence[str]) -> tuple[str, list[str]]:
    """Return what is to be measured and the other words. Raises RecipeError."""
    what, *rest = words or [""]
    if what not in WHAT:
        near = difflib.get_close_matches(what, WHAT, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "such as: bench.py step RECIPE"
        raise RecipeError(f"command line: expected {', '.join(WHAT[:-1])} or {WHAT[-1]} first, got {what!r}; {hint}")
    return what, rest


def compare_records(words: list[str]) -> tuple[Path | None, list[str]]:
    """Return the record that ``--compare`` names, if it is there, and the other words. Raises RecipeError."""
    words = [part for word in words for part in (word.split("=", 1) if word.startswith("--compare=") else [word])]
    if "--compare" not in words:
        return None, words
    place = words.index("--compare")
    if place + 1 == len(words):
        raise RecipeError("command line: --compare: name an earlier record, such as runs/bench/step-….json")
    return Path(words[place + 1]), [*words[:place], *words[place + 2 :]]


def run_benchmark(
    what: str, loaded: LoadedRecipe, asked: BenchArguments, launch: Launch, *, tunes: bool
) -> list[Measurement]:
    """Make what the measurement stands on, where it is not there, and measure."""
    loaded, how = bare(loaded, asked.out), asked.model_dump(include={"repeats", "warmup", "steps"})
    command = f"bench {what}{' --tune' * tunes}"
    if what in ("losses", "allreduce"):
        join_ranks(launch, command, loaded.recipe, **how)
        device = create_accelerator(loaded.recipe, launch).device
        return (measure_losses if what == "losses" else measure_allreduce)(loaded, launch, device, **how)
    if what == "loader":
        prepare_shards(loaded, launch)
        run = resolve(loaded, launch)
    else:
        run = ensure_dependencies(loaded, launch)
    join_ranks(launch, command, run.recipe, run, **how)
    if what == "step":  # training makes its own Accelerator
        return measure_step(dataclasses.replace(loaded, recipe=run.recipe), run.manifest, launch, **how)
    device = create_accelerator(run.recipe, launch).device
    if tunes:
        return tune(run, device)
    return (measure_loading if what == "loader" else measure_teacher)(run, device, **how)


def bare(loaded: LoadedRecipe, out: Path) -> LoadedRecipe:
    """Return the recipe without what takes time and is no part of a step, beginning anew in a folder below ``out``."""
    recipe = loaded.recipe
    teacher = recipe.teacher.model_copy(update={"expect_top1": None}) if recipe.teacher else None
    student = recipe.student.model_copy(update={"start": None})
    changed = {"teacher": teacher, "student": student, "compare": (), "folder": str(out)}
    return dataclasses.replace(loaded, recipe=recipe.model_copy(update=changed))


if __name__ == "__main__":
    entry(main)
