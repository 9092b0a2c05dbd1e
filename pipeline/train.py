"""Train a student by a recipe: the main job.

    accelerate launch pipeline/train.py                                     the demo (configs/demo.yaml)
    accelerate launch pipeline/train.py configs/imagenet/r50_mbv1.yaml method=ddkd data.path=/data/imagenet
    torchrun --nproc_per_node 2 pipeline/train.py PAIR method=NAME [key=value …]    two ranks, on CPUs too
    python pipeline/train.py --check PAIR method=NAME [key=value …]         its parts and sizes, without training
    python pipeline/train.py --list                                         methods, pairs and networks
    python pipeline/train.py --keys [SECTION]                               the keys of a recipe, with their meaning

The same command continues an interrupted run. Data flows one way: shards → Batch → teacher(batch) →
distiller(batch, outputs) → losses["total"] → backward → step.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from pipeline import nvjpeg
    from pipeline.cli import answer_help
    from pipeline.distributed import signals

    answer_help(__doc__)
    signals.install()  # before the imports below: they take seconds, and a scheduler may send a signal meanwhile
    nvjpeg.load_first()  # before the imports below: torchvision brings an older one
    if os.environ.get("RANK", "") in ("", "0") and not {"--check", "--list", "--keys"} & {*sys.argv}:
        with suppress(OSError):  # the terminal or log may be lost; cli.py deals with that
            print("loading PyTorch and the other libraries, which takes some seconds", flush=True)

from collections.abc import Sequence
from functools import partial

from pipeline.builders.session import open_session
from pipeline.builders.summary import summarize
from pipeline.cli import entry, print_answer
from pipeline.config.arguments import parse_recipe_args
from pipeline.config.keys import keys_text
from pipeline.config.listing import listing
from pipeline.config.recipe import load_recipe
from pipeline.distributed import collectives, signals
from pipeline.distributed.launcher import Launch, read_launch
from pipeline.errors import Interrupted
from pipeline.runs.dependencies import ensure_dependencies
from pipeline.runs.drawing import draw_report
from pipeline.runs.files import REPORT_FILE
from pipeline.runs.folder import check_folder, mark_preempted
from pipeline.runs.identity import Run, run_folder
from pipeline.runs.ownership import check_run_folder
from pipeline.runs.rank_settings import join_ranks
from pipeline.training.accelerator import use_all_cores
from pipeline.training.result import print_table
from pipeline.training.session import finish, train_step
from pipeline.training.start_report import print_start
from pipeline.training.step import seed_draws


def main(args: Sequence[str]) -> None:
    """Train the run that the command line names, unless it is finished, and print its table; or ``--check`` it."""
    if "--list" in args:
        print_answer(listing())
        return
    if "--keys" in args:
        print_answer(keys_text([arg for arg in args if arg != "--keys"]))
        return
    if "--check" in args:
        print_answer(summarize(load_recipe(*parse_recipe_args([arg for arg in args if arg != "--check"]))))
        return
    launch, loaded = read_launch(), load_recipe(*parse_recipe_args(args))
    check_run_folder(run_folder(loaded))  # now, before its dependencies train for hours
    try:
        run = ensure_dependencies(loaded, launch, partial(print_start, launch=launch))
        join_ranks(launch, "train", run.recipe, run)
    except Interrupted:
        if signals.stop_requested():  # for the scheduler, which requeues this run and not the one it depends on
            mark_preempted(run_folder(loaded))
        raise
    if begins_here := run.result is None:
        check_folder(run)
        use_all_cores(launch)
        train(run, launch)
    else:
        collectives.destroy_process_group()
    if run.result is not None and launch.is_main:
        print_table(run)
        if begins_here and run.recipe.journal.report:
            draw_report([run.folder], run.folder / REPORT_FILE)


def train(run: Run, launch: Launch) -> None:
    """Train the run from its last checkpoint to its end, or until ``stop`` or a signal ends this command."""
    session, state = open_session(run, launch)
    journal = session.journal
    session.distiller.train()
    seed_draws(run.recipe.seed, state.progress.step)
    # A signal may have come while the session was built.
    state.reason = session.stopping.reason(state.progress, beginning=True)
    with journal.open(state.progress, state.journal_bytes):
        for batch in session.micro_batches(state):
            train_step(session, state, batch)
            if state.reason:
                break
    finish(session, state)


if __name__ == "__main__":
    entry(main)
