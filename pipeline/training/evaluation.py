"""Exact accuracy of a student and of its teacher, over any number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from pipeline.batch import Batch
from pipeline.data.loader import Loader
from pipeline.distributed import collectives
from pipeline.errors import RecipeError, error_context
from pipeline.features.taps import FeatureTaps, evaluating
from pipeline.teachers.cached import AnyTeacher, CachedTeacher
from pipeline.teachers.config import Config
from pipeline.teachers.ensemble import TeacherEnsemble
from pipeline.teachers.frozen import Teacher
from pipeline.training import zero


class Accuracy(NamedTuple):
    """Exact accuracies over the validation split, in percent."""

    top1: float
    top5: float
    samples: int


def count_correct(logits_BK: Tensor, labels_B: Tensor) -> Tensor:
    """Return int64 [3]: top-1 hits, top-5 hits, rows. A padded row (label −1) is not counted."""
    real_B1 = (labels_B >= 0)[:, None]
    hits_B5 = (logits_BK.topk(min(5, logits_BK.shape[1]), dim=1).indices == labels_B[:, None]) & real_B1
    return torch.stack([hits_B5[:, 0].sum(), hits_B5.sum(), real_B1.sum()])


@torch.no_grad()
def accuracy(answer: Callable[[Batch], Tensor], batches: Iterable[Batch]) -> Accuracy:
    """Return the accuracy of ``answer``, which returns logits [B, K], over all ranks' ``batches``."""
    counts_3 = sum_over_ranks(count_correct(answer(batch), batch.labels_B) for batch in batches)
    top1, top5, samples = counts_3.tolist()
    return Accuracy(100 * top1 / samples, 100 * top5 / samples, samples)


def sum_over_ranks(counts: Iterable[Tensor]) -> Tensor:
    """Return the sum of integer ``counts`` of one shape, over all batches and all ranks; the host waits once."""
    return collectives.all_reduce_sum(torch.stack(list(counts)).sum(0))


def evaluate(student: FeatureTaps, batches: Iterable[Batch], accelerator: Accelerator) -> Accuracy:
    """Return the accuracy of ``student`` in eval mode under the recipe's autocast.

    BatchNorm uses the mean of the ranks' statistics. The student's mode and its own statistics are restored afterwards.
    """
    with evaluating(student), collectives.average_buffers(student), zero.deepspeed_autocast(accelerator):
        return accuracy(lambda batch: student(batch.images_BCHW).logits_BK, batches)


def check_teacher_accuracy(config: Config | None, teacher: AnyTeacher | None, loader: Loader) -> None:
    """Raise RecipeError if the teacher's top-1 is below the recipe's ``expect_top1``.

    A cached teacher has no answers for validation images. It was checked before its cache was written.
    """
    expected = config.expect_top1 if config else None
    if teacher is None or isinstance(teacher, CachedTeacher) or expected is None:
        return
    if not loader.has_validation:
        folder = loader.plan.config.path
        raise RecipeError(f"teacher.expect_top1: {folder} has no validation images to measure the teacher on")
    measured = teacher_accuracy(teacher, loader).top1
    if measured < expected:
        raise RecipeError(
            f"teacher.expect_top1: the teacher reaches {measured:.2f} of the expected {expected}; "
            "check its weights, mean, std and classes"
        )


def teacher_accuracy(teacher: Teacher | TeacherEnsemble, loader: Loader) -> Accuracy:
    """Return the accuracy of a teacher. Raises RecipeError if it cannot take the validation images, by their size."""
    config, members = loader.plan.config, teacher.members if isinstance(teacher, TeacherEnsemble) else [teacher]
    if config.for_validation.size != config.size:  # the teacher was tried with training images when it was built
        for number, member in enumerate(members):
            with error_context(f"teacher.members.{number}.model" if len(members) > 1 else "teacher.model"):
                member.shapes(config.for_validation.size)  # type: ignore[operator]
    return accuracy(lambda batch: teacher(batch).logits_BK, loader.validation())


@torch.no_grad()
def agreement(student: FeatureTaps, teacher: AnyTeacher, batches: Iterable[Batch], accelerator: Accelerator) -> float:
    """Return the percentage of validation images for which student and teacher predict the same class."""

    def count(batch: Batch) -> Tensor:
        same_B = student(batch.images_BCHW).logits_BK.argmax(1) == teacher(batch).logits_BK.argmax(1)
        real_B = batch.labels_B >= 0
        return torch.stack([(same_B & real_B).sum(), real_B.sum()])

    with evaluating(student), accelerator.autocast():
        same, samples = sum_over_ranks(map(count, batches)).tolist()
    return 100 * same / samples
