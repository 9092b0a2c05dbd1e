"""Search the hyper-parameters of a recipe on held-out training images; the test images are never looked at.

    python pipeline/search.py PAIR method=kd space='{losses.kd.temperature: [2, 4, 8]}' [trials=20] [key=value …]

Each trial is an ordinary run in a folder of its own. ``space`` has, by key of the recipe, a list of values or
``{low: …, high: …, log: true, step: …}``; ``space=FILE`` reads it from YAML. ``seeds=0,1`` trains each trial with
several seeds, whose mean counts. Without ``data.holdout`` a tenth of the training images is held out. The same command
continues an interrupted search, and with more ``trials`` a finished one. It needs Optuna: pip install '.[search]'.
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

import hashlib
import json
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.cli import entry
from pipeline.commands import as_started
from pipeline.config.arguments import parse_number, parse_numbers, parse_recipe_args, split_command_args
from pipeline.config.compose import read_source, read_value
from pipeline.config.reading import read_yaml
from pipeline.config.recipe import load_recipe
from pipeline.distributed import signals
from pipeline.distributed.launcher import Launch, read_launch
from pipeline.errors import Interrupted, RecipeError, error_context
from pipeline.multirun.processes import train_run
from pipeline.multirun.record import SearchRecord, read_search_record
from pipeline.multirun.space import Space, check_overrides, overrides_of, parse_space
from pipeline.multirun.study import Study, Trial, best_trial, check_optuna, recover
from pipeline.runs.dependencies import ensure_dependencies
from pipeline.runs.drawing import draw_report
from pipeline.runs.files import NEW_FOLDER_HINT, REPORT_FILE, write_json
from pipeline.runs.folder import check_unlocked, lock_folder
from pipeline.runs.ownership import SEARCH_FILE, check_search_folder
from pipeline.tasks._registry import find_task
from pipeline.training.result import aligned, percent
from shards.cores import usable_cores

_OPTIONS = ("space", "trials", "seeds")
MAX_TRIALS = 10_000
HOLDOUT = "data.holdout={share: 0.1}"
FAILURES = 3
"""Trials that may fail before the first success; then the fault is the recipe's and not a value's."""


@dataclass(frozen=True)
class Search:
    """What a search trains: a recipe with overrides, over a space."""

    path: Path
    overrides: tuple[str, ...]
    space: Space
    seeds: tuple[int, ...]
    folder: Path
    digest: str
    """Digest of all that stands above but the folder."""

    def run_overrides(self, trial: Trial, seed: int) -> list[str]:
        """Return the overrides of a trial's run."""
        folder = self.folder / f"trial-{trial.number:03d}" / f"seed-{seed}"
        # The students that a recipe compares with are no part of a trial.
        return ["compare=[]", *self.overrides, *overrides_of(trial.values), f"seed={seed}", f"folder={folder}"]

    @property
    def record(self) -> SearchRecord:
        """Return what the search's folder says of it."""
        return SearchRecord(
            recipe=str(self.path),
            overrides=self.overrides,
            space=dict(self.space),
            seeds=self.seeds,
            digest=self.digest,
        )


def main(args: Sequence[str]) -> None:
    """Search as the command line says, and print the trials and the command that trains with the best values."""
    options, args = split_command_args(args, _OPTIONS)
    trials = parse_number(options, "trials", MAX_TRIALS, default=20)
    search = _read_search(options, args)
    launch = read_launch()
    if launch.world_size > 1 or launch.use_deepspeed:
        raise RecipeError("a search takes one process without DeepSpeed; start search.py with python")
    _open_folder(search)
    study = Study(search.folder, search.space, search.seeds[0])
    print(f"{search.folder}: {len(study.trials())} of {trials} trials begun", flush=True)
    trained = _run_trials(search, study, trials, launch)
    found, recipe = study.trials(), load_recipe(search.path, search.overrides).recipe
    print(trials_table(found, find_task(recipe.task).title))
    if best := best_trial(found):
        command = as_started(search.record.command(best))
        print(f"\ntrain with the best values, on all training images:\n{command}", flush=True)
    if trained and recipe.journal.report:
        draw_report([search.folder], search.folder / REPORT_FILE)


def _run_trials(search: Search, study: Study, trials: int, launch: Launch) -> bool:
    """Train trials until so many are over, and return whether any was trained."""
    trained = False
    while len([trial for trial in study.trials() if trial.is_over]) < trials:
        trial, trained = study.next_trial(), True
        metric, failure = _train_trial(search, trial, launch)
        if failure is None and metric is not None:
            study.finish(trial, metric)
        else:
            study.fail(trial)
            reason = as_started(str(failure))
            print(f"warning: trial {trial.number} failed: {reason}", file=sys.stderr, flush=True)
            _check_failures(study, failure)
    return trained


def _read_search(options: dict[str, str], args: Sequence[str]) -> Search:
    """Return the search of a command line. Raises RecipeError if a value of the space does not fit the recipe."""
    check_optuna()
    if unused := [arg for arg in args if arg.startswith("seed=")]:
        raise RecipeError(f"command line: {unused[0]}: use seeds=0,1,2, the seeds of a trial, instead")
    path, overrides = parse_recipe_args(args)
    given = options.get("space", "null")
    # A long space is no name of a file, which Path.is_file would raise for.
    space = parse_space(read_yaml(Path(given)) if os.path.isfile(given) else read_value("space", given))
    named = [word.partition("=")[2] for word in overrides if word.startswith("folder=")]
    overrides = [word for word in overrides if not word.startswith("folder=")]
    check_overrides(space, overrides)
    if load_recipe(path, overrides).recipe.data.holdout is None:
        overrides.append(HOLDOUT)
    for key, values in space.items():
        for value in values.extremes:
            with error_context(f"command line: space: {key}"):
                load_recipe(path, [*overrides, *overrides_of({key: value})])
    seeds = tuple(parse_numbers(options, "seeds", "0"))
    if len({*seeds}) < len(seeds):
        raise RecipeError(f"command line: seeds: {options['seeds']} names a seed twice")
    source, _ = read_source(path, overrides)
    facts = [str(source), overrides, {key: values.model_dump(mode="json") for key, values in space.items()}, seeds]
    digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    folder = Path(named[-1]) if named else Path("runs") / source.run_name / f"search-{digest[:8]}"
    return Search(path, tuple(overrides), space, seeds, folder, digest)


def _train_trial(search: Search, trial: Trial, launch: Launch) -> tuple[float | None, str | None]:
    """Train a trial's runs, those that are not finished, and return the mean of the metric, and what failed."""
    print(f"trial {trial.number}: {' '.join(overrides_of(trial.values))}", flush=True)
    metrics = []
    for seed in search.seeds:
        try:
            loaded = load_recipe(search.path, search.run_overrides(trial, seed))
        except RecipeError as error:  # values that the recipe takes one by one, but not together
            return None, str(error)
        run = ensure_dependencies(loaded, launch)
        if run.result is None:
            check_unlocked(run.folder)  # a search that was killed leaves its run, which goes on to its end
        failure = None if run.result else train_run(run, usable_cores(), quiet=True)
        if failure:
            return None, failure
        if run.result is None:
            raise Interrupted(f"{search.folder}: stopped in trial {trial.number}; the same command continues")
        metrics.append(run.result.last)
    return statistics.mean(metrics), None


def _open_folder(search: Search) -> None:
    """Lock the search's folder. Raises RecipeError if it belongs to another search, or to a run."""
    check_search_folder(search.folder)
    lock_folder(search.folder)
    record = read_search_record(search.folder)
    if record and record.digest != search.digest:
        raise RecipeError(f"{search.folder}: holds another search; {NEW_FOLDER_HINT}")
    recover(search.folder)
    if not record:
        write_json(search.folder / SEARCH_FILE, search.record.model_dump(mode="json"))


def _check_failures(study: Study, failure: str | None) -> None:
    """Raise RecipeError once several trials failed and none succeeded."""
    trials = study.trials()
    if best_trial(trials) is None and len(trials) >= FAILURES:
        raise RecipeError(f"all of {len(trials)} trials failed; the last: {failure}")


def trials_table(trials: Sequence[Trial], title: str) -> str:
    """Return a text table of the trials, the best first."""
    ordered = sorted(trials, key=lambda trial: (trial.metric is None, -(trial.metric or 0.0), trial.number))
    rows = [
        [str(trial.number), "failed" if trial.failed else percent(trial.metric), " ".join(overrides_of(trial.values))]
        for trial in ordered
    ]
    return aligned([["trial", title, "values"], *rows])


if __name__ == "__main__":
    entry(main)
