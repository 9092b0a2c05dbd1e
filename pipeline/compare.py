"""Train several recipes with several seeds, those that are not there yet, and print mean and spread.

    python pipeline/compare.py RECIPE [RECIPE …] [seeds=0,1,2] [jobs=1] [key=value …]

A run is an ordinary one in its own folder: the same command goes on where it was interrupted, and a finished run is not
made again. ``jobs`` runs are made side by side, each on its share of the cores; overrides hold for all.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from pipeline.distributed import signals

    signals.install()

import os
import signal
import statistics
import subprocess
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue

from pipeline.cli import entry
from pipeline.config.arguments import split_command_args
from pipeline.config.recipe import load_recipe
from pipeline.distributed import signals
from pipeline.distributed.launcher import read_launch
from pipeline.errors import ROOT, Interrupted, RecipeError, display_path
from pipeline.runs.dependencies import ensure_dependencies
from pipeline.runs.identity import Run, run_folder
from pipeline.runs.ownership import check_run_folder
from pipeline.training.result import percent

OWN_WORDS = ("seeds", "jobs")
MOST_SEEDS, MOST_JOBS = 1000, 256


def main(words: Sequence[str]) -> None:
    """Make the runs that the command line asks for, and print their table."""
    own, words = split_command_args(words, OWN_WORDS)
    if stray := [word for word in words if word.startswith("seed=")]:
        raise RecipeError(f"command line: {stray[0]}: which seeds is for seeds=0,1,2 to say")
    overrides = [word for word in words if "=" in word]
    recipes = [Path(word) for word in words if "=" not in word]
    if not recipes:
        raise RecipeError("command line: name the recipes to compare")
    seeds, (jobs, *_) = numbers(own, "seeds", "0"), numbers(own, "jobs", "1")
    # Seed by seed, so that an interrupted comparison has every recipe nearly as often as any other.
    asked = [(recipe, [*overrides, f"seed={seed}"]) for seed in seeds for recipe in recipes]
    loaded = [load_recipe(recipe, words) for recipe, words in asked]
    folder, times = Counter(map(run_folder, loaded)).most_common(1)[0]
    if times > 1:
        raise RecipeError(f"folder: two of these runs would share {folder}; leave folder out of the recipe")
    for one in loaded:
        check_run_folder(run_folder(one))
    launch = read_launch()
    runs = [ensure_dependencies(one, launch) for one in loaded]
    failures = make([(run, words) for run, (_, words) in zip(runs, asked, strict=True) if run.result is None], jobs)
    finished = [run for run in runs if run.result is not None]
    if finished:
        print(comparison(finished))
    if failures:
        more = f"; and {len(failures) - 2} more" if len(failures) > 2 else ""
        raise RecipeError(f"{len(failures)} of {len(runs)} runs failed: {'; '.join(failures[:2])}{more}")
    if len(finished) < len(runs):
        raise Interrupted("stopped before the last run; the same command continues")


def numbers(own: dict[str, str], key: str, default: str) -> list[int]:
    """Return the whole numbers of one of this command's own words. Raises RecipeError."""
    found = own.get(key, default).split(",")
    if not all(number.isdecimal() for number in found) or (key == "jobs" and found in (["0"],)):
        raise RecipeError(f"command line: {key}: expected whole numbers such as {key}={default}, got {own[key]!r}")
    if len(found) > MOST_SEEDS or (key == "jobs" and int(found[0]) > MOST_JOBS):
        raise RecipeError(f"command line: {key}: expected at most {MOST_SEEDS} seeds and {MOST_JOBS} jobs")
    return [int(number) for number in found]


def make(wanted: Sequence[tuple[Run, Sequence[str]]], jobs: int) -> list[str]:
    """Train the runs, ``jobs`` at a time, say each that is done, and return what went wrong with the others.

    A signal to stop ends those that are under way, resumably, and begins no other.
    """
    shares: SimpleQueue[list[int]] = SimpleQueue()
    cores = sorted(os.sched_getaffinity(0))
    for job in range(jobs):
        shares.put(cores[job::jobs] or cores)
    signals.install()

    def one(run: Run, words: Sequence[str]) -> str | None:
        share = shares.get()
        try:
            return None if signals.stop_requested() else train_run(run, words, share, quiet=jobs > 1)
        finally:
            shares.put(share)

    with ThreadPoolExecutor(jobs) as pool:
        return [failure for failure in pool.map(lambda pair: one(*pair), wanted) if failure]


def train_run(run: Run, words: Sequence[str], cores: list[int], *, quiet: bool) -> str | None:
    """Train one run in a process of its own on those cores; return what went wrong, if anything did."""
    command = [sys.executable, str(ROOT / "pipeline" / "train.py"), str(run.path), *words]
    output = subprocess.PIPE if quiet else None
    environment = {**os.environ, "OMP_NUM_THREADS": str(len(cores))}
    with subprocess.Popen(command, stdout=output, stderr=output, text=True, env=environment) as process:
        os.sched_setaffinity(process.pid, cores)
        with signals.forward_to(process.terminate):
            _, errors = process.communicate()
    # It had not yet begun to listen: nothing is lost.
    if signals.stop_requested() and process.returncode in (-signal.SIGTERM, -signal.SIGINT):
        return None
    if process.returncode:
        reason = errors.strip().splitlines()[-1] if errors else f"exit code {process.returncode}"
        return f"{run.command} {' '.join(words)}: {reason}"
    if run.result is not None:
        last, best = percent(run.result.top1), percent(run.result.best_top1)
        print(f"{run.folder}: top-1 {last}, best {best}", flush=True)
    return None


def comparison(runs: Sequence[Run]) -> str:
    """Return mean, spread (of a sample) and each finished run's top-1, in percent, by recipe; in Markdown."""
    lines = ["| recipe | last epoch | best epoch | last epoch of each seed |", "| --- | --- | --- | --- |"]
    for path in dict.fromkeys(run.path for run in runs):
        results = [run.result for run in runs if run.path == path]
        last, best = ([getattr(result, key) for result in results if result] for key in ("top1", "best_top1"))
        each = ", ".join(map(percent, last))
        name = display_path(path).removeprefix("configs/").removesuffix(".yaml")
        lines.append(f"| `{name}` | {spread(last)} | {spread(best)} | {each} |")
    return "\n".join(lines)


def spread(values: Sequence[float | None]) -> str:
    """Return mean ± standard deviation of a sample; of one value only itself, where nothing was measured a dash."""
    measured = [value for value in values if value is not None]
    if not measured:
        return percent(None)
    deviation = f" ± {statistics.stdev(measured):.2f}" if len(measured) > 1 else ""
    return f"{statistics.mean(measured):.2f}{deviation}"


if __name__ == "__main__":
    entry(main)
