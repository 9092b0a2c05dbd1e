"""Draw a report of runs: one HTML page with pictures, without script, that reads no other file.

    python pipeline/report.py RUN [out=report.html]          one run, such as runs/demo/seed-0, finished or not
    python pipeline/report.py RUN RUN …                      several, beside one another
    python pipeline/report.py PAIR                           all finished runs of a pair, by method and seed
    python pipeline/report.py SEARCH                         the trials of a search, a folder that search.py wrote

``PAIR`` is a recipe such as configs/cifar100/resnet56_resnet20.yaml, or a folder with runs below it. Without ``out``,
the page is ``report.html`` in the folder of the run, or in the one that has all of them. After a run it is drawn by
itself, unless the recipe says ``journal.report: false``.
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

from collections.abc import Callable, Sequence

from pipeline.cli import entry
from pipeline.commands import as_started
from pipeline.config.arguments import parse_command_args, split_command_args
from pipeline.config.recipe import load_recipe
from pipeline.errors import RecipeError
from pipeline.frozen_model import FrozenModel
from pipeline.multirun.record import SearchRecord, read_search_record
from pipeline.multirun.space import Range
from pipeline.multirun.study import Study, best_trial, check_optuna
from pipeline.plots.trials import PlottedTrial, SearchedKey
from pipeline.reports.report import report_page
from pipeline.reports.reported_run import check_same_data, find_folders, read_run
from pipeline.reports.search_page import SearchFacts, search_page
from pipeline.runs.drawing import common_folder
from pipeline.runs.files import REPORT_FILE
from pipeline.runs.ownership import check_writable
from pipeline.tasks._registry import find_task
from shards.manifest import write_atomically


class ReportArguments(FrozenModel):
    """The options of the command."""

    out: Path | None = None


def main(args: Sequence[str]) -> None:
    """Write the report of the runs that the command line names, and print where it is."""
    options, targets = split_command_args(args, tuple(ReportArguments.model_fields))
    arguments = parse_command_args(options, ReportArguments)
    if unused := [target for target in targets if "=" in target]:
        raise RecipeError(
            f"command line: {unused[0]}: a report changes no key of a run; name folders, pairs, or out=FILE"
        )
    if not targets:
        raise RecipeError("command line: name a run's folder, such as runs/demo/seed-0, or the recipe of a pair")
    if len(targets) == 1 and (record := read_search_record(Path(targets[0]))):
        folder = Path(targets[0])
        _write(arguments.out or folder / REPORT_FILE, lambda: _search_page(folder, record))
        return
    folders = find_folders([Path(target) for target in targets])
    _write(arguments.out or common_folder(folders) / REPORT_FILE, lambda: _runs_page(folders))


def _write(out: Path, draw: Callable[[], str]) -> None:
    """Write what ``draw`` returns to ``out``, and print where it is. Raises RecipeError if it cannot be written."""
    if out.is_dir():
        raise RecipeError(f"out: {out} is a folder; name a file, such as out={out / REPORT_FILE}")
    check_writable(out.parent, "out", "give out=ANOTHER")
    text = draw()
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, text.encode())
    print(out)


def _runs_page(folders: Sequence[Path]) -> str:
    runs = [read_run(folder) for folder in folders]
    check_same_data(runs)
    return report_page(runs)


def _search_page(folder: Path, record: SearchRecord) -> str:
    check_optuna()
    trials = Study(folder, record.space, record.seeds[0]).trials()
    loaded, best = load_recipe(Path(record.recipe), record.overrides), best_trial(trials)
    facts = SearchFacts(
        f"Search: {loaded.source.run_name}",
        str(folder),
        find_task(loaded.recipe.task).title,
        find_task(loaded.recipe.task).unit,
        record.seeds,
        as_started(record.command(best)) if best else None,
    )
    keys = [
        SearchedKey(key, None, values.log) if isinstance(values, Range) else SearchedKey(key, values.values, False)
        for key, values in record.space.items()
    ]
    plotted = [PlottedTrial(trial.number, trial.values, trial.metric, trial.failed) for trial in trials]
    return search_page(facts, keys, plotted)


if __name__ == "__main__":
    entry(main)
