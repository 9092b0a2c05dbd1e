"""Draw a report of runs: one HTML page with pictures, without script, that reads no other file.

    python pipeline/report.py RUN [out=report.html]          one run, such as runs/demo/seed-0, finished or not
    python pipeline/report.py RUN RUN …                      several, beside one another
    python pipeline/report.py PAIR                           all finished runs of a pair, by method and seed

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

from collections.abc import Sequence

from pipeline.cli import entry
from pipeline.config.arguments import parse_command_args, split_command_args
from pipeline.errors import RecipeError
from pipeline.frozen_model import FrozenModel
from pipeline.reports.report import report_page
from pipeline.reports.reported_run import check_same_data, find_folders, read_run
from pipeline.runs.drawing import common_folder
from pipeline.runs.files import REPORT_FILE
from pipeline.runs.ownership import check_writable
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
    folders = find_folders([Path(target) for target in targets])
    out = arguments.out or common_folder(folders) / REPORT_FILE
    if out.is_dir():
        raise RecipeError(f"out: {out} is a folder; name a file, such as out={out / REPORT_FILE}")
    check_writable(out.parent, "out", "give out=ANOTHER")
    runs = [read_run(folder) for folder in folders]
    check_same_data(runs)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, report_page(runs).encode())
    print(out)


if __name__ == "__main__":
    entry(main)
