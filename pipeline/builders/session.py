"""Builds and restores everything that the training loop of a run needs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator
from torch import nn

from pipeline.batch import Batch, Progress
from pipeline.builders.distiller import build_distiller
from pipeline.builders.loader import build_loader, training_splits
from pipeline.builders.meta import image_flops
from pipeline.builders.student import weights_layout
from pipeline.builders.teacher import build_teacher
from pipeline.config.recipe import Recipe
from pipeline.data.loader import Loader
from pipeline.distiller import Distiller
from pipeline.distributed import collectives
from pipeline.distributed.launcher import Launch
from pipeline.errors import display_path, error_context
from pipeline.features.taps import FeatureTaps
from pipeline.optim.ema import EMA
from pipeline.optim.guard import FiniteGuard
from pipeline.optim.optimizer import allocate_momentum, create_optimizer
from pipeline.runs.files import STUDENT_BEST
from pipeline.runs.folder import open_folder
from pipeline.runs.identity import Run
from pipeline.teachers.average import EMATeacher
from pipeline.teachers.cached import AnyTeacher
from pipeline.training.accelerator import create_accelerator
from pipeline.training.checkpoint import Best, Checkpoints, exported_best
from pipeline.training.evaluation import Accuracy, check_teacher_accuracy, evaluate
from pipeline.training.graph import GraphedStep, maybe_graph
from pipeline.training.journal import TrainingJournal
from pipeline.training.step import Step
from pipeline.training.stopping import StopCondition
from pipeline.training.timer import StepTimer
from pipeline.training.trackers import begin_trackers


@dataclass(frozen=True)
class Session:
    """The objects that a command trains with."""

    run: Run
    accelerator: Accelerator
    loader: Loader
    distiller: nn.Module
    """The Distiller in its wrapper for training, DDP or DeepSpeed."""
    student: FeatureTaps
    """The student without a wrapper."""
    parameters: int
    """Number of parameters of the student."""
    optimizer: Any
    averages: dict[str, EMA | EMATeacher]
    """Moving averages of the student's weights, by name in a checkpoint."""
    checkpoints: Checkpoints
    journal: TrainingJournal
    guard: FiniteGuard
    step: Step | GraphedStep
    stopping: StopCondition

    @property
    def recipe(self) -> Recipe:
        """Return the run's recipe."""
        return self.run.recipe

    @property
    def timer(self) -> StepTimer:
        """Return the timer of a step's parts."""
        return self.journal.timer

    def evaluate(self) -> Accuracy | None:
        """Return the student's accuracy on the validation images, or None if there are none."""
        if not self.loader.has_validation:
            return None
        return evaluate(self.student, self.loader.validation(), self.accelerator)

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
    last: Accuracy | None = None
    """The last evaluation of this command."""
    reason: str | None = None
    """Reason why this command ends before the run does; None if it does not."""


def open_session(run: Run, launch: Launch) -> tuple[Session, State]:
    """Build the run's modules, open its folder and restore its newest checkpoint. Every rank must call it."""
    recipe = run.recipe
    accelerator = create_accelerator(recipe, launch, run.folder)
    loader, teacher, unwrapped = _build(run, launch, accelerator)
    # Counted before ``prepare``: under ZeRO-3, the parameters are empty afterwards.
    parameters = sum(parameter.numel() for parameter in unwrapped.student.parameters())
    averages = _averages(recipe, unwrapped.student, teacher)
    if accelerator.is_main_process:
        open_folder(run)
    accelerator.wait_for_everyone()  # no rank may read or write the folder before it is checked and locked

    distiller, optimizer = accelerator.prepare(unwrapped, create_optimizer(recipe.optimizer, unwrapped))
    if recipe.compress:
        compressed = unwrapped.losses if recipe.compress == "auxiliary" else unwrapped
        collectives.compress_gradients(distiller, compressed.parameters())
    allocate_momentum(optimizer)
    checkpoints = Checkpoints(recipe.checkpoints, run.folder, accelerator, unwrapped, optimizer, averages)
    saved = checkpoints.load(loader.steps_per_epoch, recipe.epochs * loader.steps_per_epoch)
    journal, guard = _journal(run, launch, accelerator, saved.progress), FiniteGuard(accelerator.device)
    step = Step(accelerator, distiller, teacher, optimizer, averages.values(), recipe.clip, guard, journal.timer)
    session = Session(
        run,
        accelerator,
        loader,
        distiller,
        unwrapped.student,
        parameters,
        optimizer,
        averages,
        checkpoints,
        journal,
        guard,
        maybe_graph(step, recipe.graph, recipe.accumulation),
        StopCondition(recipe.stop, recipe.checkpoints.poll_steps),
    )
    return session, State(saved.progress, saved.journal_bytes, exported_best(run.folder / STUDENT_BEST))


def _build(run: Run, launch: Launch, accelerator: Accelerator) -> tuple[Loader, AnyTeacher | None, Distiller]:
    """Return loader, teacher and Distiller. Raises RecipeError if they do not fit together."""
    recipe, device = run.recipe, accelerator.device
    with error_context(display_path(run.path)):
        teacher = build_teacher(run, device)
        loader = build_loader(recipe, run.manifest, device, training_splits(run.manifest), teacher)
        distiller = build_distiller(run, loader, teacher, device, weights_layout(recipe, launch))
        check_teacher_accuracy(recipe.teacher, teacher, loader)
    if not loader.has_validation:
        accelerator.print(f"note: {recipe.data.path} has no validation split: this run is not evaluated")
    return loader, teacher, distiller


def _averages(recipe: Recipe, student: FeatureTaps, teacher: AnyTeacher | None) -> dict[str, EMA | EMATeacher]:
    """Return the moving averages that follow the student."""
    averages: dict[str, EMA | EMATeacher] = {"ema": EMA(recipe.ema, student.model)} if recipe.ema else {}
    if isinstance(teacher, EMATeacher):
        teacher.follow(student.model)
        averages["teacher"] = teacher
    return averages


def _journal(run: Run, launch: Launch, accelerator: Accelerator, progress: Progress) -> TrainingJournal:
    """Return the journal, with its trackers and the timer of the steps."""
    # TensorBoard hides earlier entries from that step on: an interrupted command may have logged steps after its last
    # checkpoint.
    purge = {"purge_step": progress.step + 1} if progress.step else {}
    begin_trackers(accelerator, "tensorboard", {"tensorboard": purge})
    flops = None
    if accelerator.is_main_process:
        flops = image_flops(run.recipe, [below.recipe for below in run.teachers], run.manifest)
    by_ddp = collectives.world_size() > 1 and not launch.use_deepspeed
    return TrainingJournal(
        run.folder,
        run.recipe,
        total_steps=run.recipe.epochs * progress.steps_per_epoch,
        timer=StepTimer(accelerator.device, by_ddp=by_ddp),
        device=accelerator.device,
        track=accelerator.log,
        flops=flops,
    )
