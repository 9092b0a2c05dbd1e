"""All measures of a student and its teacher on a split, of which training only needs the main ones.

B batch, C columns, K classes of the split, L classes of its shards, N images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from pipeline.batch import Batch, Outputs
from pipeline.distributed import collectives
from pipeline.features.taps import FeatureTaps, evaluating
from pipeline.tasks._base import Details, Task
from pipeline.teachers.ensemble import TeacherEnsemble
from pipeline.teachers.frozen import Teacher
from pipeline.training import zero


class Comparison(NamedTuple):
    """All measures of a student, and of a teacher beside it; None where there is no teacher."""

    samples: int
    """Number of images."""
    student: Details
    teacher: Details | None = None
    agreement: float | None = None
    """Percentage of the task's decisions in which student and teacher agree; None if there is no decision."""
    kl: float | None = None
    """Mean of KL(teacher‖student) over the images, in nats."""


Watch = Callable[[Batch, dict[str, Outputs]], None]
"""What sees every batch, with the outputs of ``student``, and of ``teacher`` if there is one."""


class SplitClasses(NamedTuple):
    """The classes of a split among those of the network."""

    names: tuple[str, ...]
    """Names of the K classes."""
    columns_K: Tensor | None = None
    """The logit of each class. Other logits are left out. None keeps all."""
    labels_L: Tensor | None = None
    """The class of each label of the shards; None if they are the same."""
    accepted_NK: Tensor | None = None
    """bool, by the id of an image: the classes that count as right. An image without any is left out. None is the label
    alone."""

    def select_logits(self, outputs: Outputs) -> Outputs:
        """Return outputs with the logits of these classes."""
        if self.columns_K is None:
            return outputs
        return outputs._replace(logits=outputs.logits[:, self.columns_K.to(outputs.logits.device)])

    def select_images(self, batch: Batch) -> Batch:
        """Return a batch with the labels of these classes; padding, and an image that is left out, have −1."""
        labels_B, ids_B = batch.labels_B, batch.ids_B
        real_B, device = labels_B >= 0, labels_B.device
        if self.labels_L is not None:
            labels_B = self.labels_L.to(device)[labels_B.clamp(min=0)]
        if self.accepted_NK is not None:
            real_B = real_B & self.accepted_NK.any(1).to(device)[ids_B.clamp(min=0)]
        return batch._replace(labels_B=torch.where(real_B, labels_B, -1))


@torch.no_grad()
def compare_networks(
    task: Task,
    student: FeatureTaps,
    teacher: Teacher | TeacherEnsemble | None,
    batches: Iterable[Batch],
    accelerator: Accelerator,
    classes: SplitClasses,
    watch: Watch | None = None,
) -> Comparison:
    """Return all measures of ``student`` in eval mode and of ``teacher``, over the images of all ranks.

    A row for each image is gathered from all ranks and sorted by id. So every number is the same on any number of
    ranks, to the last bit, if the networks' outputs are. ``watch`` gets every batch.
    """
    rows: list[Tensor] = []
    counts: list[Tensor] = []
    with evaluating(student), collectives.average_buffers(student):
        for batch in map(classes.select_images, batches):
            with zero.deepspeed_autocast(accelerator):
                ours = classes.select_logits(student(batch.images_BCHW, batch.targets))
            outputs = {"student": ours}
            columns = [batch.ids_B[:, None], task.detail_rows(ours, batch)]
            if teacher is not None:
                outputs["teacher"] = theirs = classes.select_logits(teacher(batch))
                counts.append(task.agreement(ours, theirs, batch))
                columns += [task.detail_rows(theirs, batch), *_column(task.divergence(theirs, ours))]
            rows.append(torch.cat(columns, dim=1)[batch.labels_B >= 0])
            if watch is not None:
                watch(batch, outputs)
    return _summarize(task, _gather_sorted(torch.cat(rows)), counts, classes)


def _column(values_B: Tensor | None) -> list[Tensor]:
    return [] if values_B is None else [values_B[:, None]]


def _gather_sorted(rows_NC: Tensor) -> Tensor:
    """Return the rows of all ranks in the order of the ids, their first column."""
    rows_NC = collectives.gather_rows(rows_NC)
    return rows_NC[rows_NC[:, 0].argsort()]


def _summarize(task: Task, rows_NC: Tensor, counts: list[Tensor], classes: SplitClasses) -> Comparison:
    """Return the measures.

    A row is an id and the student's columns; with ``counts`` also the teacher's, and a divergence if there is one.
    """
    accepted_NK = classes.accepted_NK
    if accepted_NK is not None:
        accepted_NK = accepted_NK.to(rows_NC.device)[rows_NC[:, 0].long()]
    columns = rows_NC[:, 1:]
    if not counts:
        return Comparison(len(rows_NC), task.detail(columns, len(classes.names), accepted_NK))
    width = columns.shape[1] // 2
    student, teacher = (
        task.detail(part, len(classes.names), accepted_NK)
        for part in (columns[:, :width], columns[:, width : 2 * width])
    )
    same, decisions = collectives.all_reduce_sum(torch.stack(counts).sum(0)).tolist()
    kl = columns[:, 2 * width :].mean().item() if columns.shape[1] % 2 else None
    return Comparison(len(rows_NC), student, teacher, 100 * same / decisions if decisions else None, kl)
