"""Builds and restores everything that the training loop of a run needs."""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator
from torch import nn

from pipeline.batch import Progress
from pipeline.builders.distiller import build_distiller
from pipeline.builders.meta import count_parameters, image_flops, student_macs
from pipeline.builders.shared import SharedParts
from pipeline.builders.student import weights_layout
from pipeline.config.recipe import Recipe
from pipeline.data.loader import Loader
from pipeline.distiller import Distiller
from pipeline.distributed import collectives
from pipeline.distributed.launcher import Launch
from pipeline.errors import display_path, error_context
from pipeline.features.cohort import Cohort, exported_peer
from pipeline.features.taps import FeatureTaps
from pipeline.models.slimmable import exported_network
from pipeline.optim.ema import EMA
from pipeline.optim.guard import FiniteGuard
from pipeline.optim.optimizer import allocate_state, create_optimizer
from pipeline.runs.files import STUDENT_BEST
from pipeline.runs.folder import open_folder
from pipeline.runs.identity import Run
from pipeline.teachers.cached import AnyTeacher
from pipeline.teachers.follower import StudentFollower
from pipeline.teachers.peers import AveragedPeers, FollowingTeacher
from pipeline.training.accelerator import create_accelerator
from pipeline.training.checkpoint import Best, Checkpoints, exported_best
from pipeline.training.graph import maybe_graph
from pipeline.training.journal import TrainingJournal
from pipeline.training.observer import LossObserver
from pipeline.training.session import Session, State
from pipeline.training.step import Step
from pipeline.training.stopping import StopCondition
from pipeline.training.timer import StepTimer
from pipeline.training.tracked_run import configuration
from pipeline.training.trackers import begin_trackers


def open_session(run: Run, launch: Launch, parts: SharedParts | None = None) -> tuple[Session, State]:
    """Build the run's modules, open its folder and restore its newest checkpoint. Every rank must call it.

    ``parts`` builds the teacher and the loader, if other runs of this process may use the same.
    """
    recipe, parts = run.recipe, parts or SharedParts([run])
    accelerator = create_accelerator(recipe, launch, run.folder)
    loader, teacher, unwrapped = _build(run, launch, accelerator, parts)
    # Counted before ``prepare``: under ZeRO-3, the parameters are empty afterwards.
    parameters = count_parameters(exported_network(exported_peer(unwrapped.student).model))
    averages = _averages(recipe, unwrapped.student, teacher)
    if accelerator.is_main_process:
        open_folder(run)
    accelerator.wait_for_everyone()  # no rank may read or write the folder before it is checked and locked

    distiller, optimizer = _prepare(recipe, accelerator, unwrapped)
    checkpoints = Checkpoints(recipe.checkpoints, run.folder, accelerator, unwrapped, optimizer, averages)
    saved = checkpoints.load(loader.steps_per_epoch, recipe.epochs * loader.steps_per_epoch)
    journal, guard = _journal(run, launch, accelerator, saved.progress, parameters), FiniteGuard(accelerator.device)
    step = Step(accelerator, distiller, teacher, optimizer, averages.values(), recipe.clip, guard, journal.timer)
    session = Session(
        run,
        accelerator,
        loader,
        teacher,
        distiller,
        unwrapped.student,
        parameters,
        optimizer,
        averages,
        checkpoints,
        journal,
        guard,
        maybe_graph(step, recipe.graph, recipe.accumulation, recipe.student.checkpoint, _varying(recipe)),
        StopCondition(recipe.stop, recipe.checkpoints.poll_steps),
        parts.runs,
        LossObserver(recipe, accelerator, loader, teacher, unwrapped),
    )
    return session, State(saved.progress, saved.journal_bytes, _best_so_far(session, saved.progress.epoch))


def _varying(recipe: Recipe) -> str | None:
    """Return what makes batches of a recipe differ in size, for a message; None if nothing does."""
    return "images with boxes, whose number differs" if recipe.data.crop == "keep_ratio" else None


def _best_so_far(session: Session, epochs: int) -> Best:
    """Return what the best weights reached in the ``epochs`` that have ended; a file that is gone is told."""
    path = session.run.folder / STUDENT_BEST
    if epochs and session.loader.has_validation and not path.exists() and session.accelerator.is_main_process:
        print(f"warning: {path} is gone; the best weights will be those of the evaluations from here on")
    return exported_best(path, session.task.metric)


def _build(
    run: Run, launch: Launch, accelerator: Accelerator, parts: SharedParts
) -> tuple[Loader, AnyTeacher | None, Distiller]:
    """Return loader, teacher and Distiller. Raises RecipeError if they do not fit together."""
    recipe, device = run.recipe, accelerator.device
    with error_context(display_path(run.path)):
        teacher = parts.teacher(run, device)
        loader = parts.loader(run, device, teacher)
        distiller = build_distiller(run, loader, teacher, device, weights_layout(recipe, launch))
        parts.check_teacher(recipe, teacher, loader)
    if not loader.has_validation:
        accelerator.print(f"note: {recipe.data.path} has no validation split: this run is not evaluated")
    return loader, teacher, distiller


def _prepare(recipe: Recipe, accelerator: Accelerator, unwrapped: Distiller) -> tuple[nn.Module, Any]:
    """Return the Distiller in its wrapper for training, and its optimizer."""
    optimizer = create_optimizer(recipe.optimizer, unwrapped, unwrapped.student.model, recipe.schedule.rate)
    distiller, optimizer = accelerator.prepare(unwrapped, optimizer)
    if recipe.compress:
        compressed = unwrapped.losses if recipe.compress == "auxiliary" else unwrapped
        collectives.compress_gradients(distiller, compressed.parameters())
    allocate_state(optimizer)
    return distiller, optimizer


def _averages(
    recipe: Recipe, student: FeatureTaps | Cohort, teacher: AnyTeacher | None
) -> dict[str, EMA | FollowingTeacher]:
    """Return the moving average of the exported weights, and the teacher that follows the student, if there are any."""
    averages: dict[str, EMA | FollowingTeacher] = {}
    if recipe.ema:
        averages["ema"] = EMA(recipe.ema, exported_peer(student).model)
    if isinstance(teacher, StudentFollower | AveragedPeers):
        teacher.follow(student.model)  # type: ignore[arg-type]
        averages["teacher"] = teacher
    return averages


def _begin_trackers(run: Run, accelerator: Accelerator, progress: Progress, parameters: int) -> None:
    """Start the trackers on the main process, with the recipe and the student's size as the run's configuration."""
    if accelerator.is_main_process and accelerator.log_with:
        sizes = {"parameters": parameters, "macs": student_macs(run.recipe, run.manifest)}
        begin_trackers(accelerator, run, progress.step, configuration(run.recipe) | sizes)


def _journal(
    run: Run, launch: Launch, accelerator: Accelerator, progress: Progress, parameters: int
) -> TrainingJournal:
    """Return the journal, with its trackers and the timer of the steps. ``parameters`` are those of the student."""
    _begin_trackers(run, accelerator, progress, parameters)
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
