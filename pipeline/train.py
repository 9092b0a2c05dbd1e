"""Train a student by a recipe: the main job.

    accelerate launch pipeline/train.py                                     the demo (configs/demo.yaml)
    accelerate launch pipeline/train.py configs/imagenet/r50_mbv1/ddkd.yaml data.path=/data/imagenet
    torchrun --nproc_per_node 2 pipeline/train.py RECIPE [key=value …]      two ranks, on CPUs too

The same command continues a run that was interrupted. Data flows one way: shards → Batch → teacher(batch) →
distiller(batch, answers) → losses["total"] → backward → step.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import math
from collections.abc import Sequence

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from pipeline import parallel
from pipeline.build import build_distiller, build_loader, build_teacher, classes_sha256
from pipeline.checkpoint import Best, Checkpoints, State, Stopping, export_student
from pipeline.data.loader import Loader
from pipeline.ema import EMA
from pipeline.evaluate import Accuracy, accuracy, evaluate
from pipeline.guard import FiniteGuard
from pipeline.journal import Journal
from pipeline.launch import create_accelerator, entry, use_all_cores
from pipeline.optimizers import create_optimizer, set_learning_rate
from pipeline.recipe import Recipe, RecipeError, load_recipe, split_words
from pipeline.report import print_table, write_result
from pipeline.runs import STUDENT, STUDENT_BEST, STUDENT_EMA, Run, check_folder, open_folder, stand
from pipeline.schedules import learning_rate
from pipeline.taps import FeatureTaps
from pipeline.teacher import Teacher


def main(words: Sequence[str]) -> None:
    """Train what the command line names, unless it is finished, and print its table."""
    run = stand(load_recipe(*split_words(words)))
    if run.result is None:
        check_folder(run)
        use_all_cores()
        train(run)
    if run.result is not None and parallel.is_main():
        print_table(run)


def train(run: Run) -> None:
    """Train the run from where it is to its end, or to where ``stop`` or a signal ends this command."""
    recipe = run.recipe
    accelerator = create_accelerator(recipe, run.folder)
    loader = build_loader(recipe, accelerator.device)
    teacher = build_teacher(recipe, loader, accelerator.device)
    check_teacher(recipe, teacher, loader)
    raw_distiller = build_distiller(recipe, loader, teacher, accelerator.device)
    student = raw_distiller.student
    ema = EMA(recipe.ema, student.model) if recipe.ema else None
    if accelerator.is_main_process:
        open_folder(run)
    accelerator.wait_for_everyone()

    distiller, optimizer = accelerator.prepare(raw_distiller, create_optimizer(recipe.optimizer, raw_distiller))
    checkpoints = Checkpoints(recipe.checkpoints, run.folder, accelerator, raw_distiller, optimizer, ema)
    state = checkpoints.load(loader.steps_per_epoch)
    progress, best, last = state.progress, state.best, None
    accelerator.init_trackers("tensorboard", init_kwargs={"tensorboard": {"purge_step": progress.step}})
    journal = Journal(run.folder, recipe, total_steps=recipe.epochs * loader.steps_per_epoch, track=accelerator.log)
    guard = FiniteGuard(accelerator.device)
    stopping = Stopping(recipe.stop, recipe.checkpoints.poll_steps)

    gradient_norm = torch.zeros((), device=accelerator.device)
    distiller.train()
    seed_draws(recipe.seed, progress.step)
    with journal.writing(progress, state.journal_bytes):
        for batch in journal.waiting(loader.stream(progress, recipe.epochs)):  # a micro-batch
            rate = learning_rate(recipe.schedule, progress, recipe.epochs)
            set_learning_rate(optimizer, rate)
            with accelerator.accumulate(distiller):
                losses = distiller(batch, teacher(batch) if teacher else None, progress)
                accelerator.backward(losses["total"])
                guard.watch(losses, progress.step + 1)
                journal.observe(losses)
                if accelerator.sync_gradients:
                    gradient_norm = clip(accelerator, distiller, recipe.clip)
                    guard.arm(optimizer, gradient_norm, progress.step + 1)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            if not accelerator.sync_gradients:
                continue  # Progress counts whole global batches.
            progress = progress.after(recipe.batch)
            seed_draws(recipe.seed, progress.step)
            if ema:
                ema.update()
            reason = stopping.due(progress) if progress.step < journal.total_steps else None
            saving = bool(reason) or checkpoints.due(progress)
            if saving or progress.epoch_ended or journal.due(progress):
                guard.check()
            journal.record(progress, rate, gradient_norm)
            if progress.epoch_ended:
                with journal.pause(progress):
                    last = evaluate(student, loader.validation(), accelerator)
                if last.top1 > best.top1:
                    best = Best(last.top1, progress.epoch)
                    export(student, run.folder / STUDENT_BEST, accelerator)
                journal.evaluated(progress, {"top1": last.top1, "top5": last.top5})
            if saving:
                checkpoints.save(State(progress, best, journal.length))
            if reason:
                accelerator.print(f"stopped after step {progress.step} ({reason}); the same command continues")
                break
    if progress.step == journal.total_steps:
        last = last or evaluate(student, loader.validation(), accelerator)
        averaged = export_all(run, student, ema, loader, accelerator)
        if accelerator.is_main_process:
            write_result(run, student, classes_sha256(loader), last, best, averaged, journal.images_per_second)
    accelerator.end_training()


def seed_draws(seed: int, step: int) -> None:
    """Seed torch's default generators for one step: the draws of a run repeat, and none of their state needs saving."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, parallel.rank()]).generate_state(1, np.uint64)[0]))


def clip(accelerator: Accelerator, distiller: nn.Module, largest: float | None) -> torch.Tensor:
    """Scale the gradients down to the ``largest`` norm, if there is one, and return the norm they had."""
    norm = accelerator.clip_grad_norm_(distiller.parameters(), math.inf if largest is None else largest)
    assert norm is not None
    return norm


def check_teacher(recipe: Recipe, teacher: Teacher | None, loader: Loader) -> None:
    """Raise RecipeError if the teacher's top-1 is below the recipe's ``expect_top1``."""
    if teacher is None or recipe.teacher is None or recipe.teacher.expect_top1 is None:
        return
    measured = accuracy(lambda batch: teacher(batch).logits_BK, loader.validation()).top1
    if measured < recipe.teacher.expect_top1:
        raise RecipeError(
            f"teacher.expect_top1: the teacher reaches {measured:.2f} of the expected {recipe.teacher.expect_top1}; "
            "are its weights, mean, std and classes the right ones?"
        )


def export(student: FeatureTaps, path: Path, accelerator: Accelerator) -> None:
    """Write the student's plain weights, with BatchNorm statistics averaged over the ranks."""
    with parallel.averaged_buffers(student):
        if accelerator.is_main_process:
            export_student(student.model, path)


def export_all(
    run: Run, student: FeatureTaps, ema: EMA | None, loader: Loader, accelerator: Accelerator
) -> Accuracy | None:
    """Write the last weights and, where there are any, the averaged ones, whose accuracy is returned."""
    export(student, run.folder / STUDENT, accelerator)
    if ema is None:
        return None
    with ema.applied():
        export(student, run.folder / STUDENT_EMA, accelerator)
        return evaluate(student, loader.validation(), accelerator)


if __name__ == "__main__":
    entry(main)
