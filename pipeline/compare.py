"""Train several methods with several seeds, and print the mean and standard deviation of their results.

    python pipeline/compare.py PAIR [PAIR …] methods=kd,dkd,ddkd [seeds=0,1,2] [jobs=1 | side=1] [key=value …]
    python pipeline/compare.py RECIPE [RECIPE …] …         complete recipes, or pairs with method=NAME

Each run is an ordinary run in its own folder. The same command continues after an interruption, and never repeats a
finished run. ``jobs`` runs are trained in parallel, each on its share of the cores. ``side`` runs are trained side by
side in one process, on one GPU or CPU, where they share images and teacher. Overrides apply to all runs.
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
    signals.install()
    nvjpeg.load_first()  # before the imports below: torchvision brings an older one

from collections import Counter
from collections.abc import Sequence

from pipeline.cli import entry
from pipeline.config.arguments import parse_number, parse_numbers, split_command_args
from pipeline.config.measured import mean_and_deviation
from pipeline.config.recipe import load_recipe
from pipeline.config.source import split_names
from pipeline.distributed import signals
from pipeline.distributed.launcher import read_launch
from pipeline.errors import Interrupted, RecipeError
from pipeline.multirun.processes import train_all
from pipeline.multirun.train import train_side_by_side
from pipeline.runs.dependencies import ensure_dependencies
from pipeline.runs.drawing import common_folder, draw_report
from pipeline.runs.files import REPORT_FILE
from pipeline.runs.identity import Run, run_folder
from pipeline.runs.ownership import check_run_folder
from pipeline.training.result import percent

OPTIONS = ("methods", "seeds", "jobs", "side")
MAX_RUNS = 256


def main(args: Sequence[str]) -> None:
    """Train the runs that the command line names, and print their table."""
    options, args = split_command_args(args, OPTIONS)
    if unused := [arg for arg in args if arg.startswith("seed=")]:
        raise RecipeError(f"command line: {unused[0]}: use seeds=0,1,2, the list of seeds, instead")
    overrides = [arg for arg in args if "=" in arg]
    recipes = [Path(arg) for arg in args if "=" not in arg]
    if not recipes:
        raise RecipeError("command line: name the recipes to compare")
    seeds = parse_numbers(options, "seeds", "0")
    jobs, side = (parse_number(options, key, MAX_RUNS) for key in ("jobs", "side"))
    if {"jobs", "side"} <= options.keys():
        raise RecipeError("command line: jobs trains in several processes and side in one; give one of them")
    # Seed by seed, so that an interrupted comparison has about equally many runs of every recipe.
    methods = [[f"method={name}"] for name in split_names(options.get("methods", ""))] or [[]]
    # The students that a recipe compares with are not in this table, and would not get the overrides.
    changes = [["compare=[]", *method, *overrides] for method in methods]
    requested = [(path, [*each, f"seed={seed}"]) for seed in seeds for path in recipes for each in changes]
    loaded = [load_recipe(path, each) for path, each in requested]
    folder, times = Counter(map(run_folder, loaded)).most_common(1)[0]
    if times > 1:
        raise RecipeError(f"folder: two of these runs would share {folder}; leave folder out of the recipe")
    for recipe in loaded:
        check_run_folder(run_folder(recipe))
    launch = read_launch()
    runs = [ensure_dependencies(recipe, launch) for recipe in loaded]
    missing = [run for run in runs if run.result is None]
    failures = train_side_by_side(missing, side, launch) if "side" in options else train_all(missing, jobs)
    finished = [run for run in runs if run.result is not None]
    if finished:
        print(results_table(finished))
        if missing and finished[0].recipe.journal.report:
            folders = [run.folder for run in finished]
            draw_report(folders, common_folder(folders) / REPORT_FILE)
    if failures:
        more = f"; and {len(failures) - 2} more" if len(failures) > 2 else ""
        raise RecipeError(f"{len(failures)} of {len(runs)} runs failed: {'; '.join(failures[:2])}{more}")
    if len(finished) < len(runs):
        raise Interrupted("stopped before the last run; the same command continues")


def results_table(runs: Sequence[Run]) -> str:
    """Return a Markdown table of the main metric by recipe: mean ± sample deviation, and the value of each run."""
    lines = ["| recipe | last epoch | best epoch | last epoch of each seed |", "| --- | --- | --- | --- |"]
    for source in dict.fromkeys(run.source for run in runs):
        results = [run.result for run in runs if run.source == source]
        last, best = ([getattr(result, key) for result in results if result] for key in ("last", "best"))
        values = ", ".join(map(percent, last))
        lines.append(f"| `{source.run_name}` | {mean_and_deviation(last)} | {mean_and_deviation(best)} | {values} |")
    return "\n".join(lines)


if __name__ == "__main__":
    entry(main)
