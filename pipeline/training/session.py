"""What a command trains a run with, and what it does after a step and at the end."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from accelerate import Accelerator
from torch import Tensor, nn

from pipeline.batch import Batch, Outputs, Progress
from pipeline.config.recipe import Recipe
from pipeline.data.loader import Loader
from pipeline.features.cohort import Cohort, exported_peer
from pipeline.features.taps import FeatureTaps
from pipeline.optim.ema import EMA
from pipeline.optim.guard import FiniteGuard
from pipeline.optim.optimizer import set_learning_rate
from pipeline.optim.schedule import learning_rate
from pipeline.runs.files import LOSS_MODULES, STUDENT, STUDENT_BEST, STUDENT_EMA, route_file
from pipeline.runs.folder import mark_preempted
from pipeline.runs.identity import Run
from pipeline.tasks._base import Evaluation, Task
from pipeline.tasks._registry import find_task
from pipeline.teachers.cached import AnyTeacher
from pipeline.teachers.peers import FollowingTeacher
from pipeline.training.checkpoint import Best, Checkpoints, CheckpointState
from pipeline.training.evaluation import evaluate
from pipeline.training.export import export, export_auxiliary, export_average, student_card
from pipeline.training.graph import GraphedStep
from pipeline.training.journal import TrainingJournal
from pipeline.training.observer import LossObserver
from pipeline.training.result import write_result
from pipeline.training.step import Step, seed_draws
from pipeline.training.stopping import SIGNAL, StopCondition
from pipeline.training.timer import StepTimer


@dataclass(frozen=True)
class Session:
    """The objects that a command trains with."""

    run: Run
    accelerator: Accelerator
    loader: Loader
    teacher: AnyTeacher | None
    distiller: nn.Module
    """The Distiller in its wrapper for training, DDP or DeepSpeed."""
    trained: FeatureTaps | Cohort
    """The student without a wrapper, or several that train together."""
    parameters: int
    """Number of parameters of the student."""
    optimizer: Any
    averages: dict[str, EMA | FollowingTeacher]
    """Moving averages of the student's weights, and a teacher that follows them, by name in a checkpoint."""
    checkpoints: Checkpoints
    journal: TrainingJournal
    guard: FiniteGuard
    step: Step | GraphedStep
    stopping: StopCondition
    side: int
    """Number of runs that this command trains side by side."""
    observer: LossObserver

    @property
    def recipe(self) -> Recipe:
        """Return the run's recipe."""
        return self.run.recipe

    @property
    def student(self) -> FeatureTaps:
        """Return the student without a wrapper; of several the one that is exported."""
        return exported_peer(self.trained)

    @property
    def timer(self) -> StepTimer:
        """Return the timer of a step's parts."""
        return self.journal.timer

    @property
    def task(self) -> Task:
        """Return the run's task."""
        return find_task(self.recipe.task)

    def evaluate(self) -> Evaluation | None:
        """Return the student's metrics on the validation images, or None if there are none."""
        if not self.loader.has_validation:
            return None
        return evaluate(self.task, self.trained, self.loader.validation(), self.accelerator)

    def micro_batches(self, state: State) -> Iterator[Batch]:
        """Yield this rank's micro-batches from the current progress. The wait for them is timed as ``data``."""
        batches = iter(()) if state.reason else self.loader.stream(state.progress, self.recipe.epochs)
        return self.journal.timed(batches)


@dataclass
class State:
    """The mutable state of a run in this command."""

    progress: Progress
    journal_bytes: int
    """Length of the journal at the checkpoint that was restored."""
    best: Best
    last: Evaluation | None = None
    """The last evaluation of this command."""
    reason: str | None = None
    """Reason why this command ends before the run does; None if it does not."""


def train_step(session: Session, state: State, batch: Batch, answers: Outputs | None = None) -> None:
    """Train on one micro-batch; the last one of a global batch updates the student and ends the step.

    ``answers`` are the teacher's outputs for the batch, if they are known already.
    """
    if session.teacher:
        session.teacher.at(state.progress)
    rate = learning_rate(session.recipe.schedule, state.progress, session.recipe.epochs)
    set_learning_rate(session.optimizer, rate)
    output = session.step(batch, state.progress, answers)
    session.journal.accumulate(output)
    if output.gradient_norm is not None:  # set by the last micro-batch of a global batch, after its update
        close_step(session, state, rate, output.gradient_norm)


def close_step(session: Session, state: State, rate: float, norm: Tensor) -> None:
    """Write the journal, evaluate and save, where that is due after a step."""
    journal, checkpoints = session.journal, session.checkpoints
    progress = state.progress = state.progress.after(session.recipe.batch)
    seed_draws(session.recipe.seed, progress.step)  # for the next step: a resumed run draws the same
    state.reason = session.stopping.reason(progress) if progress.step < journal.total_steps else None
    saving = bool(state.reason) or checkpoints.due(progress)
    # The order matters. The guard comes first, so that no NaN or infinity is written or saved. A step's line in the
    # journal comes before its epoch's evaluation. A checkpoint stores the journal's length with both lines.
    if saving or progress.epoch_ended or journal.due(progress):
        session.guard.check()
    journal.record(progress, rate, norm)
    if progress.epoch_ended and session.loader.has_validation:
        validate(session, state)
    if progress.epoch_ended and progress.epoch in session.recipe.checkpoints.export_epochs:
        keep_epoch(session, state)
    if saving:
        checkpoints.save(CheckpointState(progress, journal.length))


def validate(session: Session, state: State) -> None:
    """Evaluate the student, and export its weights if they are the best so far."""
    with session.journal.pause(state.progress):
        last = state.last = session.evaluate()
        observed = session.observer()
    if last is None:
        return
    if last.main > state.best.value:
        state.best = Best(session.task.metric, last.main, state.progress.epoch)
        card = student_card(session.run, last, state.best)
        export(session.student, session.run.folder / STUDENT_BEST, session.accelerator, card)
    session.journal.log_evaluation(state.progress, last, state.best.value, observed)


def keep_epoch(session: Session, state: State) -> None:
    """Keep the student's weights after an epoch of ``checkpoints.export_epochs``; every rank calls it."""
    path = session.run.folder / route_file(state.progress.epoch)
    path.parent.mkdir(exist_ok=True)
    export(session.student, path, session.accelerator, student_card(session.run, state.last))


def finish(session: Session, state: State) -> None:
    """Print why the command stops early, or export the student and write the results of the finished run."""
    accelerator, progress, run = session.accelerator, state.progress, session.run
    if state.reason and accelerator.is_main_process:
        print(f"{run.folder}: stopped after step {progress.step} ({state.reason}); the same command continues")
        if state.reason == SIGNAL:
            mark_preempted(run.folder)
    if progress.step == session.journal.total_steps:
        last = state.last or session.evaluate()  # None if an earlier command ended between the last step and the result
        # On every rank: BatchNorm statistics are averaged, and ZeRO gathers the weights.
        export(session.student, run.folder / STUDENT, accelerator, student_card(run, last))
        export_auxiliary(session.checkpoints.distiller.losses, run.folder / LOSS_MODULES, accelerator)
        averaged, ema = None, session.averages.get("ema")
        if isinstance(ema, EMA):
            path, card_of = run.folder / STUDENT_EMA, partial(student_card, run)
            averaged = export_average(ema, session.student, path, accelerator, session.evaluate, card_of)
        if accelerator.is_main_process:
            speed = session.journal.images_per_second
            write_result(run, session.task, session.parameters, last, state.best, averaged, speed, session.side)
    accelerator.wait_for_everyone()
    accelerator.end_training()
