"""Measure where the time of a recipe goes on this machine, and keep the results.

    python pipeline/bench.py step RECIPE [key=value …]        real training: data, teacher, student, losses, backward, …
    python pipeline/bench.py losses RECIPE                    each loss alone, with its memory; needs no data
    python pipeline/bench.py teacher RECIPE                   the teacher alone, on random images
    python pipeline/bench.py loader RECIPE [--tune]           reading and decoding; --tune finds the best settings
    torchrun --nproc_per_node 8 pipeline/bench.py allreduce RECIPE      the gradients' all-reduce alone

Options: ``repeats=5 steps=10`` (steps of each repeat) ``warmup=2`` (steps before the first) ``out=runs/bench``. Each
command writes a record (JSON) and a plot to the folder ``out``. ``--compare OLD.json`` shows what became faster or
slower since an earlier record. The times are those of rank 0. ``step`` and ``teacher`` first train the recipe that the
teacher names, as training does. ``teacher.recipe=null teacher.model=NAME teacher.weights=FILE`` avoids that.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from pipeline import nvjpeg
    from pipeline.cli import answer_help
    from pipeline.distributed import signals

    answer_help(__doc__)
    signals.exit_quietly_on_interrupt()
    nvjpeg.load_first()  # before the imports below: torchvision brings an older one

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

BENCHMARKS = ("loader", "teacher", "losses", "allreduce", "step")
TUNING = "tuning"
"""Kind of a record of ``loader --tune``, which has other rows than one of ``loader``."""


class BenchArguments(FrozenModel):
    """The options of the command."""

    repeats: int = Field(default=5, gt=0, le=10**4)
    warmup: int = Field(default=2, ge=0, le=10**6)
    steps: int = Field(default=10, gt=0, le=10**6)
    out: Path = Path("runs/bench")


def main(args: Sequence[str]) -> None:
    """Run the benchmark that the command line names, print the results and write a record of them."""
    benchmark, rest = parse_benchmark(args)
    tunes, (earlier, rest) = "--tune" in rest, parse_compare([arg for arg in rest if arg != "--tune"])
    if tunes and benchmark != "loader":
        raise RecipeError(f"command line: --tune works with loader only, not with {benchmark}")
    kind = TUNING if tunes else benchmark
    old = read_record(earlier, kind) if earlier else None
    options, rest = split_command_args(rest, tuple(BenchArguments.model_fields))
    if tunes and (unused := options.keys() - {"out"}):
        raise RecipeError(f"command line: --tune chooses {', '.join(sorted(unused))} itself; leave them out")
    arguments = parse_command_args(options, BenchArguments)
    loaded, launch = load_recipe(*parse_recipe_args(rest)), read_launch()
    check_writable(arguments.out, "out", "give out=ANOTHER")
    arguments.out.mkdir(parents=True, exist_ok=True)
    use_all_cores(launch)
    measured = run_benchmark(benchmark, loaded, arguments, launch, tunes=tunes)
    collectives.destroy_process_group()
    if not (measured and launch.is_main):
        return
    record = new_record(kind, loaded, args, measured, launch.world_size)
    path = write_record(record, arguments.out)
    print(benchmark_table(record))
    if old:
        print(f"\ncompared with {earlier}\n{comparison_table(old, record)}")
    draw_record(record, path.with_suffix(".png"))
    print(f"\n{path}")


def parse_benchmark(args: Sequence[str]) -> tuple[str, list[str]]:
    """Return the name of the benchmark and the other arguments. Raises RecipeError for a missing or unknown name."""
    name, *rest = args or [""]
    if name not in BENCHMARKS:
        near = difflib.get_close_matches(name, BENCHMARKS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "such as: bench.py step RECIPE"
        expected = f"{', '.join(BENCHMARKS[:-1])} or {BENCHMARKS[-1]}"
        raise RecipeError(f"command line: expected {expected} first, got {name!r}; {hint}")
    return name, rest


def parse_compare(args: list[str]) -> tuple[Path | None, list[str]]:
    """Return the record that ``--compare`` names, None without it, and the other arguments.

    Raises RecipeError if the option has no value.
    """
    args = [part for arg in args for part in (arg.split("=", 1) if arg.startswith("--compare=") else [arg])]
    if "--compare" not in args:
        return None, args
    index = args.index("--compare")
    if index + 1 == len(args):
        raise RecipeError("command line: --compare: name an earlier record, such as runs/bench/step-….json")
    return Path(args[index + 1]), [*args[:index], *args[index + 2 :]]


def run_benchmark(
    name: str, loaded: LoadedRecipe, arguments: BenchArguments, launch: Launch, *, tunes: bool
) -> list[Measurement]:
    """Make the missing shards and runs that the benchmark needs, and measure."""
    loaded, counts = reduce_recipe(loaded, arguments.out), arguments.model_dump(include={"repeats", "warmup", "steps"})
    command = f"bench {name}{' --tune' * tunes}"
    if name in ("losses", "allreduce"):
        join_ranks(launch, command, loaded.recipe, **counts)
        device = create_accelerator(loaded.recipe, launch).device
        return (measure_losses if name == "losses" else measure_allreduce)(loaded, launch, device, **counts)
    if name == "loader":  # reads shards, and needs no teacher
        prepare_shards(loaded, launch)
        run = resolve(loaded, launch)
    else:
        run = ensure_dependencies(loaded, launch)
    join_ranks(launch, command, run.recipe, run, **counts)
    if name == "step":  # before create_accelerator, because training makes its own Accelerator
        return measure_step(dataclasses.replace(loaded, recipe=run.recipe), run.manifest, launch, **counts)
    device = create_accelerator(run.recipe, launch).device
    if tunes:
        return tune(run, device)
    return (measure_loading if name == "loader" else measure_teacher)(run, device, **counts)


def reduce_recipe(loaded: LoadedRecipe, out: Path) -> LoadedRecipe:
    """Return the recipe without the work that is no part of a step, with ``out`` as its run folder."""
    recipe = loaded.recipe
    teacher = recipe.teacher.model_copy(update={"expect": None}) if recipe.teacher else None
    student = recipe.student.model_copy(update={"start": None})
    changed = {"teacher": teacher, "student": student, "compare": (), "folder": str(out)}
    return dataclasses.replace(loaded, recipe=recipe.model_copy(update=changed))


if __name__ == "__main__":
    entry(main)
