"""Train a student by a recipe: the main job.

    accelerate launch pipeline/train.py                                     the demo (configs/demo.yaml)
    accelerate launch pipeline/train.py configs/imagenet/r50_mbv1/ddkd.yaml data.path=/data/imagenet
    torchrun --nproc_per_node 2 pipeline/train.py RECIPE [key=value …]      two ranks, on CPUs too
    python pipeline/train.py --check RECIPE [key=value …]                   what it is made of, without training

The same command continues a run that was interrupted. Data flows one way: shards → Batch → teacher(batch) →
distiller(batch, answers) → losses["total"] → backward → step.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from pipeline.distributed import signals

    signals.listen()  # what follows takes seconds to load, and a scheduler may end the job at any of them

import math
from collections.abc import Sequence

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from pipeline.builders.meta import image_flops
from pipeline.builders.student import build_distiller, build_loader, training_splits
from pipeline.builders.summary import check
from pipeline.builders.teacher import build_teacher
from pipeline.cli import entry
from pipeline.config.arguments import split_words
from pipeline.config.recipe import load_recipe
from pipeline.data.loader import Loader
from pipeline.distributed import collectives, signals
from pipeline.distributed.rendezvous import deepspeed_asked, is_main_asked
from pipeline.errors import about, shown
from pipeline.features.taps import FeatureTaps
from pipeline.optim.ema import EMA
from pipeline.optim.guard import FiniteGuard
from pipeline.optim.optimizer import allocate_momentum, create_optimizer, set_learning_rate
from pipeline.optim.schedule import learning_rate
from pipeline.runs.dependencies import Unfinished, stand
from pipeline.runs.files import STUDENT, STUDENT_BEST, STUDENT_EMA
from pipeline.runs.folder import check_folder, mark_preempted, open_folder
from pipeline.runs.identity import Run, run_folder
from pipeline.teachers.average import EMATeacher
from pipeline.training import zero
from pipeline.training.accelerator import create_accelerator, use_all_cores
from pipeline.training.checkpoint import Best, Checkpoints, State, export_student, exported_best
from pipeline.training.evaluation import Accuracy, check_teacher, evaluate
from pipeline.training.journal import Journal
from pipeline.training.result import print_table, write_result
from pipeline.training.stopping import SIGNAL, Stopping
from shards.manifest import read_manifest


def main(words: Sequence[str]) -> None:
    """Train what the command line names, unless it is finished, and print its table; with ``--check`` only look."""
    if "--check" in words:
        print(check(load_recipe(*split_words([word for word in words if word != "--check"]))))
        return
    loaded = load_recipe(*split_words(words))
    try:
        run = stand(loaded)
    except Unfinished:
        if signals.given():
            mark_preempted(run_folder(loaded))
        raise
    if run.result is None:
        check_folder(run)
        use_all_cores()
        train(run)
    if run.result is not None and is_main_asked():
        print_table(run)


def train(run: Run) -> None:
    """Train the run from where it is to its end, or to where ``stop`` or a signal ends this command."""
    recipe = run.recipe
    accelerator = create_accelerator(recipe, run.folder)
    device = accelerator.device
    with about(shown(run.path)):
        manifest = read_manifest(Path(recipe.data.path))
        teacher = build_teacher(recipe, manifest, device)
        loader = build_loader(recipe, device, training_splits(manifest), teacher)
        raw_distiller = build_distiller(recipe, loader, teacher, device)
        check_teacher(recipe, teacher, loader)
    student = raw_distiller.student
    parameters = sum(parameter.numel() for parameter in student.parameters())  # ZeRO-3 will leave none here
    ema = EMA(recipe.ema, student.model) if recipe.ema else None
    averages: dict[str, EMA | EMATeacher] = {"ema": ema} if ema else {}
    if isinstance(teacher, EMATeacher):
        teacher.follow(student.model)
        averages["teacher"] = teacher
    if accelerator.is_main_process:
        open_folder(run)
    accelerator.wait_for_everyone()

    distiller, optimizer = accelerator.prepare(raw_distiller, create_optimizer(recipe.optimizer, raw_distiller))
    if recipe.compress:
        compressed = raw_distiller.losses if recipe.compress == "auxiliary" else raw_distiller
        collectives.compress_gradients(distiller, compressed.parameters())
    allocate_momentum(optimizer)
    checkpoints = Checkpoints(recipe.checkpoints, run.folder, accelerator, raw_distiller, optimizer, averages)
    state = checkpoints.load(loader.steps_per_epoch)
    progress, best, last = state.progress, exported_best(run.folder / STUDENT_BEST), None
    # TensorBoard hides what was written from that step on, by an attempt that got further than its last checkpoint.
    purge = {"purge_step": progress.step + 1} if progress.step else {}
    accelerator.init_trackers("tensorboard", init_kwargs={"tensorboard": purge})
    total_steps = recipe.epochs * loader.steps_per_epoch
    flops = image_flops(recipe) if accelerator.is_main_process else None
    journal = Journal(run.folder, recipe, total_steps=total_steps, device=device, track=accelerator.log, flops=flops)
    raw_distiller.mark = mark = journal.split.mark
    guard = FiniteGuard(device)
    stopping = Stopping(recipe.stop, recipe.checkpoints.poll_steps)

    gradient_norm = torch.zeros((), device=device)
    distiller.train()
    seed_draws(recipe.seed, progress.step)
    reason = stopping.due(progress, beginning=True)
    with journal.writing(progress, state.journal_bytes):
        batches = iter(()) if reason else loader.stream(progress, recipe.epochs)  # micro-batches
        for batch in journal.waiting(batches):
            rate = learning_rate(recipe.schedule, progress, recipe.epochs)
            set_learning_rate(optimizer, rate)
            with accelerator.accumulate(distiller):
                answers = teacher(batch) if teacher else None
                mark("teacher")
                losses = distiller(batch, answers, progress)
                with journal.split.backward(losses["total"]):
                    accelerator.backward(losses["total"])
                guard.watch(losses, progress.step + 1)
                journal.observe(losses)
                if accelerator.sync_gradients:
                    gradient_norm = clip(accelerator, distiller, recipe.clip)
                    guard.arm(optimizer, gradient_norm, progress.step + 1)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                mark("optimizer")
            if not accelerator.sync_gradients:
                continue  # Progress counts whole global batches.
            progress = progress.after(recipe.batch)
            seed_draws(recipe.seed, progress.step)
            raw_distiller.commit()
            for average in averages.values():
                average.update()
            reason = stopping.due(progress) if progress.step < journal.total_steps else None
            saving = bool(reason) or checkpoints.due(progress)
            if saving or progress.epoch_ended or journal.due(progress):
                guard.check()
            journal.record(progress, rate, gradient_norm)
            if progress.epoch_ended and loader.validates:
                with journal.pause(progress):
                    last = evaluate(student, loader.validation(), accelerator)
                if last.top1 > best.top1:
                    best = Best(last.top1, progress.epoch)
                    export(student, run.folder / STUDENT_BEST, accelerator, best)
                journal.evaluated(progress, {"top1": last.top1, "top5": last.top5})
            if saving:
                checkpoints.save(State(progress, journal.length))
            if reason:
                break
    if reason and accelerator.is_main_process:
        print(f"stopped after step {progress.step} ({reason}); the same command continues")
        if reason == SIGNAL:
            mark_preempted(run.folder)
    if progress.step == journal.total_steps:
        if last is None and loader.validates:  # saved after the last step, and interrupted before its result was
            last = evaluate(student, loader.validation(), accelerator)
        averaged = export_all(run, student, ema, loader, accelerator)
        if accelerator.is_main_process:
            write_result(run, parameters, last, best, averaged, journal.images_per_second)
    accelerator.wait_for_everyone()
    accelerator.end_training()


def seed_draws(seed: int, step: int) -> None:
    """Seed torch's default generators for one step: the draws of a run repeat, and none of their state needs saving."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, collectives.rank()]).generate_state(1, np.uint64)[0]))


def clip(accelerator: Accelerator, distiller: nn.Module, largest: float | None) -> torch.Tensor:
    """Scale the gradients down to the ``largest`` norm, if there is one, and return the norm they had."""
    if largest is None and not deepspeed_asked():
        accelerator.unscale_gradients()
        gradients = [parameter.grad for parameter in distiller.parameters() if parameter.grad is not None]
        return nn.utils.get_total_norm(gradients)
    # DeepSpeed, which has clipped and stepped in backward, gives a number.
    norm = accelerator.clip_grad_norm_(distiller.parameters(), math.inf if largest is None else largest)
    return torch.as_tensor(norm, device=accelerator.device)


def export(student: FeatureTaps, path: Path, accelerator: Accelerator, best: Best | None = None) -> None:
    """Write the student's plain weights, with BatchNorm statistics averaged over the ranks."""
    with collectives.averaged_buffers(student), zero.gathered(student):
        if accelerator.is_main_process:
            export_student(student.model, path, best)


def export_all(
    run: Run, student: FeatureTaps, ema: EMA | None, loader: Loader, accelerator: Accelerator
) -> Accuracy | None:
    """Write the last weights and, where there are any, the averaged ones, whose accuracy is returned."""
    export(student, run.folder / STUDENT, accelerator)
    if ema is None:
        return None
    with ema.applied():
        export(student, run.folder / STUDENT_EMA, accelerator)
        return evaluate(student, loader.validation(), accelerator) if loader.validates else None


if __name__ == "__main__":
    entry(main)
