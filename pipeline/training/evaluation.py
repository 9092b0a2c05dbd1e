"""Exact metrics of a student and of its teacher, over any number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from statistics import fmean

import torch
from accelerate import Accelerator

from pipeline.batch import Batch, Outputs
from pipeline.data.loader import Loader
from pipeline.distributed import collectives
from pipeline.errors import RecipeError, error_context
from pipeline.features.cohort import Cohort
from pipeline.features.taps import FeatureTaps, evaluating
from pipeline.tasks._base import Evaluation, Seen, Task
from pipeline.teachers.cached import AnyTeacher, CachedTeacher
from pipeline.teachers.config import Config
from pipeline.teachers.ensemble import TeacherEnsemble
from pipeline.teachers.frozen import Teacher
from pipeline.teachers.peers import AveragedPeers
from pipeline.teachers.route import RouteTeacher
from pipeline.training import zero


@torch.no_grad()
def measure_split(task: Task, answer: Callable[[Batch], Outputs], batches: Iterable[Batch]) -> Evaluation:
    """Return the task's metrics of ``answer``, which returns a network's outputs, over all ranks' ``batches``."""
    return task.summarize(task.see(answer(batch), batch) for batch in batches)


@torch.no_grad()
def measure_peers(task: Task, peers: Cohort, batches: Iterable[Batch]) -> Evaluation:
    """Return the task's metrics of the exported peer, and the main one of each, of their mean and of their ensemble.

    The ensemble's probabilities are the mean of the peers'.
    """
    seen: list[list[Seen]] = [[] for _ in range(len(peers.members) + 1)]
    for batch in batches:
        outputs = peers(batch.images_BCHW)
        log_p_MBK = torch.stack([peer.logits_BK.float().log_softmax(1) for peer in outputs.peers])
        ensemble = outputs.with_logits(log_p_MBK.logsumexp(0))
        for of_network, answers in zip(seen, (*outputs.peers, ensemble), strict=True):
            of_network.append(task.see(answers, batch))
    *singles, ensemble = [task.summarize(of_network) for of_network in seen]
    found = {f"peer{number}": single.main for number, single in enumerate(singles)}
    found |= {"mean": fmean(found.values()), "ensemble": ensemble.main}
    return singles[peers.number]._replace(peers=found)


def evaluate(
    task: Task, student: FeatureTaps | Cohort, batches: Iterable[Batch], accelerator: Accelerator
) -> Evaluation:
    """Return the metrics of ``student`` in eval mode under the recipe's autocast.

    BatchNorm uses the mean of the ranks' statistics. The student's mode and its own statistics are restored afterwards.
    """
    with evaluating(student), collectives.average_buffers(student), zero.deepspeed_autocast(accelerator):
        if isinstance(student, Cohort):
            return measure_peers(task, student, batches)
        return measure_split(task, lambda batch: student(batch.images_BCHW, batch.targets), batches)


def check_teacher(task: Task, config: Config | None, teacher: AnyTeacher | None, loader: Loader) -> None:
    """Raise RecipeError if the task's main metric of the teacher is below the recipe's ``expect``.

    A cached teacher has no answers for validation images. It was checked before its cache was written. That of a route
    has no ``expect``.
    """
    expected = config.expect if config else None
    if teacher is None or isinstance(teacher, CachedTeacher | AveragedPeers | RouteTeacher) or expected is None:
        return
    if not loader.has_validation:
        folder = loader.plan.config.path
        raise RecipeError(f"teacher.expect: {folder} has no validation images to measure the teacher on")
    measured = evaluate_teacher(task, teacher, loader).main
    if measured < expected:
        raise RecipeError(
            f"teacher.expect: the teacher reaches {task.title} {measured:.2f} of the expected {expected}; "
            "check its weights, mean, std and classes"
        )


def evaluate_teacher(task: Task, teacher: Teacher | TeacherEnsemble, loader: Loader) -> Evaluation:
    """Return the metrics of a teacher. Raises RecipeError if it cannot take the validation images, by their size."""
    check_validation_size(teacher, loader)
    return measure_split(task, teacher, loader.validation())


def check_validation_size(teacher: Teacher | TeacherEnsemble, loader: Loader) -> None:
    """Raise RecipeError if a teacher cannot take the validation images, by their size."""
    config, members = loader.plan.config, teacher.members if isinstance(teacher, TeacherEnsemble) else [teacher]
    if config.for_validation.size != config.size:  # the teacher was tried with training images when it was built
        for number, member in enumerate(members):
            with error_context(f"teacher.members.{number}.model" if len(members) > 1 else "teacher.model"):
                member.shapes(config.for_validation.size)  # type: ignore[operator]
