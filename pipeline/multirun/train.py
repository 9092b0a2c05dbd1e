"""Runs that are trained together in one process, a step of each in turn.

A small student leaves most of a GPU idle. Here every run has a CUDA stream and a CUDA graph of its own, so that their
kernels run at the same time. The runs share batches and the teacher's outputs where they are the same. Each has the
numbers, the folder, the checkpoints and the journal that it has alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pipeline.builders.shared import SharedParts
from pipeline.distributed import signals
from pipeline.distributed.launcher import Launch
from pipeline.errors import RecipeError
from pipeline.multirun.inputs import SharedInputs
from pipeline.multirun.run import ConcurrentRun
from pipeline.runs.identity import Run
from pipeline.training.accelerator import forget_accelerators, use_all_cores
from pipeline.training.progress_bar import ProgressDisplay, open_display
from pipeline.training.stopping import last_step


def train_side_by_side(runs: Sequence[Run], side: int, launch: Launch) -> list[str]:
    """Train the runs, at most ``side`` at a time, and return the errors of those that failed.

    A run that fails does not stop the others. A signal to stop ends all of them, which can be resumed.
    """
    if launch.world_size > 1 or launch.use_deepspeed:
        raise RecipeError("command line: side: takes one process without DeepSpeed; start compare.py with python")
    use_all_cores(launch)
    failures: list[str] = []
    for group in _groups(runs, side):
        if not signals.stop_requested():
            failures += _train_group(group, launch)
            forget_accelerators()
    return failures


def _groups(runs: Sequence[Run], side: int) -> Iterator[list[Run]]:
    """Yield groups of at most ``side`` runs. Precision and accumulation are Accelerate's for the whole process."""
    alike: dict[tuple[str, int], list[Run]] = {}
    for run in runs:
        alike.setdefault((run.recipe.precision, run.recipe.accumulation), []).append(run)
    for members in alike.values():
        yield from (members[first : first + side] for first in range(0, len(members), side))


def _train_group(runs: Sequence[Run], launch: Launch) -> list[str]:
    """Train the runs to their end, or until a signal comes, and return the errors of those that failed."""
    parts, members = SharedParts(runs), [ConcurrentRun(run) for run in runs]
    for member in members:
        member.open(launch, parts)
    if training := [member for member in members if member.is_training]:
        last = _last(training)
        with SharedInputs(training) as inputs, _display(last) as display:
            while training:
                # Runs that are behind after an interruption catch up first. Then all are at the same step.
                inputs.train_step([member for member in training if member.progress.step == last.progress.step])
                display.tick(last.progress, last.rate)
                training = [member for member in training if member.is_training]
                last = _last(training or [last])
    return [member.error for member in members if member.error is not None]


def _last(members: Sequence[ConcurrentRun]) -> ConcurrentRun:
    """Return the run with the fewest steps."""
    return min(members, key=lambda member: member.progress.step)


def _display(member: ConcurrentRun) -> ProgressDisplay:
    """Return what the user sees of all steps: those of the run that is last."""
    progress, recipe = member.progress, member.recipe
    end = last_step(recipe.stop, progress.steps_per_epoch, recipe.epochs * progress.steps_per_epoch)
    return open_display(progress, recipe.epochs, end)
