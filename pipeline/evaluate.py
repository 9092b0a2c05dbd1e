"""Measure a student exactly: every validation image once, over any number of ranks.

    python pipeline/evaluate.py runs/demo/seed-0 [weights=best]      the student of a run: last, best or ema
    python pipeline/evaluate.py RECIPE weights=FILE [key=value …]    a weights file, in a recipe's network, on its data

Prints top-1 and top-5 in percent; with ``agreement=yes`` also the teacher's, and how often the two agree.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from accelerate import Accelerator
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from pipeline import parallel, zero
from pipeline.batch import Batch
from pipeline.build import build_loader, build_student
from pipeline.build_teacher import build_live_teacher
from pipeline.composition import RecipeError
from pipeline.data.loader import Loader
from pipeline.launch import create_accelerator, entry, use_all_cores
from pipeline.models.weights import load_weights
from pipeline.recipe import Recipe, load_recipe, own_words, split_words, typed_words
from pipeline.runs import RECIPE, STUDENT, STUDENT_BEST, STUDENT_EMA, find_run, prepare_shards, run_folder
from pipeline.taps import FeatureTaps, evaluating
from pipeline.teacher import Config as Teacher
from pipeline.teacher_cache import AnyTeacher, CachedTeacher

NAMED_WEIGHTS = {"last": STUDENT, "best": STUDENT_BEST, "ema": STUDENT_EMA}


class Asked(BaseModel):
    """The command's own words."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    weights: str = "last"
    agreement: bool = False


class Accuracy(NamedTuple):
    """Exact accuracies over the validation split, in percent."""

    top1: float
    top5: float
    samples: int


def count_correct(logits_BK: Tensor, labels_B: Tensor) -> Tensor:
    """Return int64 [3]: right at first, right among the first five, rows. A padded row (label −1) counts nowhere."""
    real_B1 = (labels_B >= 0)[:, None]
    hits_B5 = (logits_BK.topk(min(5, logits_BK.shape[1]), dim=1).indices == labels_B[:, None]) & real_B1
    return torch.stack([hits_B5[:, 0].sum(), hits_B5.sum(), real_B1.sum()])


@torch.no_grad()
def accuracy(answer: Callable[[Batch], Tensor], batches: Iterable[Batch]) -> Accuracy:
    """Return the accuracy of ``answer``, which gives logits [B, K], over all ranks' ``batches``."""
    counts_3 = sum_over_ranks(count_correct(answer(batch), batch.labels_B) for batch in batches)
    top1, top5, samples = counts_3.tolist()
    return Accuracy(100 * top1 / samples, 100 * top5 / samples, samples)


def sum_over_ranks(counts: Iterable[Tensor]) -> Tensor:
    """Return the sum of integer ``counts`` of one shape, over all of them and all ranks; the host waits once."""
    return parallel.all_reduce_sum(torch.stack(list(counts)).sum(0))


def evaluate(student: FeatureTaps, batches: Iterable[Batch], accelerator: Accelerator) -> Accuracy:
    """Return the accuracy of ``student`` in eval mode under the recipe's autocast.

    BatchNorm statistics are the ranks' mean; the student's mode and its own statistics are afterwards what they were.
    """
    with evaluating(student), parallel.averaged_buffers(student), zero.autocast(accelerator):
        return accuracy(lambda batch: student(batch.images_BCHW).logits_BK, batches)


def check_teacher(recipe: Recipe, teacher: AnyTeacher | None, loader: Loader) -> None:
    """Raise RecipeError if the teacher's top-1 is below the recipe's ``expect_top1``.

    A cached one, which knows no validation image, was measured before its answers were written.
    """
    expected = recipe.teacher.expect_top1 if recipe.teacher else None
    if teacher is None or isinstance(teacher, CachedTeacher) or expected is None:
        return
    if not loader.validates:
        raise RecipeError(f"teacher.expect_top1: {recipe.data.path} has no validation images to measure it with")
    measured = accuracy(lambda batch: teacher(batch).logits_BK, loader.validation()).top1
    if measured < expected:
        raise RecipeError(
            f"teacher.expect_top1: the teacher reaches {measured:.2f} of the expected {expected}; "
            "are its weights, mean, std and classes the right ones?"
        )


@torch.no_grad()
def agreement(student: FeatureTaps, teacher: AnyTeacher, batches: Iterable[Batch], accelerator: Accelerator) -> float:
    """Return on how many of the validation images, in percent, student and teacher give the same class."""

    def count(batch: Batch) -> Tensor:
        same_B = student(batch.images_BCHW).logits_BK.argmax(1) == teacher(batch).logits_BK.argmax(1)
        real_B = batch.labels_B >= 0
        return torch.stack([(same_B & real_B).sum(), real_B.sum()])

    with evaluating(student), accelerator.autocast():
        same, samples = sum_over_ranks(map(count, batches)).tolist()
    return 100 * same / samples


def main(words: Sequence[str]) -> None:
    """Evaluate what the command line names."""
    own, words = own_words(words, tuple(Asked.model_fields))
    asked = typed_words(own, Asked)
    target, overrides = split_words(words)
    folder = target if target.is_dir() else None
    loaded = load_recipe(folder / RECIPE if folder else target, overrides)
    prepare_shards(loaded)
    if asked.agreement:
        _check_agreement(loaded.recipe.teacher)
    weights = _weights_file(asked.weights, folder or run_folder(loaded))
    use_all_cores()
    accelerator = create_accelerator(loaded.recipe)
    loader = build_loader(loaded.recipe, accelerator.device, ("val",))
    student = build_student(loaded.recipe, loader.num_classes).to(accelerator.device)
    load_weights(student.model, str(weights), loaded.recipe.student.model)
    result = evaluate(student, loader.validation(), accelerator)
    accelerator.print(f"{weights}: top-1 {result.top1:.2f}  top-5 {result.top5:.2f}  ({result.samples:,} images)")
    if asked.agreement:
        _report_teacher(find_run(loaded).recipe, loader, student, accelerator)


def _check_agreement(config: Teacher | None) -> None:
    """Raise RecipeError where there is no teacher to ask."""
    if config is None:
        raise RecipeError("agreement=yes: the recipe has no teacher")
    if config.average is not None:
        raise RecipeError("agreement=yes: the teacher is the student's moving average, which no run keeps to its end")
    if config.combine == "confidence":
        raise RecipeError("agreement=yes: combine: confidence knows the labels; its accuracy would say nothing")
    if not config.is_named:
        raise RecipeError("agreement=yes: a cache answers for no validation image; give teacher.model and its weights")


def _report_teacher(recipe: Recipe, loader: Loader, student: FeatureTaps, accelerator: Accelerator) -> None:
    teacher = build_live_teacher(recipe, (), loader.manifest, accelerator.device)
    result = accuracy(lambda batch: teacher(batch).logits_BK, loader.validation())
    accelerator.print(f"teacher: top-1 {result.top1:.2f}  top-5 {result.top5:.2f}")
    accelerator.print(f"agreement: {agreement(student, teacher, loader.validation(), accelerator):.2f}")


def _weights_file(name: str, folder: Path) -> Path:
    file = folder / NAMED_WEIGHTS[name] if name in NAMED_WEIGHTS else Path(name)
    if not file.is_file():
        raise RecipeError(f"weights: there is no file {file}; train the run first, or give weights=FILE")
    return file


if __name__ == "__main__":
    entry(main)
