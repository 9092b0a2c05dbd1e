"""The one trainable module: the student, the losses and the losses' auxiliary modules."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from pipeline.batch import Batch, Outputs, Progress, labelled_rows
from pipeline.features.cohort import Cohort
from pipeline.features.taps import FeatureTaps
from pipeline.losses._base import Facts, Loss
from pipeline.losses._registry import LossSpec
from pipeline.optim.guard import propagate_nonfinite
from pipeline.tasks._base import Task
from pipeline.tasks.classification import Classification

Timer = Callable[[str], AbstractContextManager[None]]
"""A function that returns a context; ``timer(name)`` adds the time inside it to ``name``."""


class Distiller(nn.Module):
    """The student with its losses. DDP and ZeRO need all trainable work inside ``forward``; the teacher is outside."""

    def __init__(
        self, student: FeatureTaps | Cohort, specs: dict[str, LossSpec], facts: Facts, task: Task | None = None
    ) -> None:
        super().__init__()
        self.student = student
        self.task = task or Classification()
        self.unlabelled_ratio = facts.unlabelled_ratio
        # A module's name may not hold a dot; a user's loss is named package.module:Class.
        self.losses = nn.ModuleDict({name.replace(".", "_"): spec.build(facts) for name, spec in specs.items()})

    def forward(
        self, batch: Batch, teacher: Outputs | None, progress: Progress, timer: Timer = nullcontext
    ) -> dict[str, Tensor]:
        """Return the weighted parts as ``loss`` or ``loss/part``, their sum as ``total``, and the training metric.

        The metrics of the losses, ``loss/metric``, come last.

        ``timer`` measures ``student`` and ``losses``.
        """
        with timer("student"):
            student = self.student(batch.images_BCHW, batch.targets)
        with timer("losses"):
            parts: dict[str, Tensor] = {}
            noted: dict[str, Tensor] = {}
            for name, loss in self.losses.items():
                rows = loss.select_rows(student, teacher, batch)  # type: ignore[operator]
                named = loss.parts(*rows, progress)  # type: ignore[operator]
                parts |= {name if part == name else f"{name}/{part}": value for part, value in named.items()}
                noted |= {f"{name}/{key}": value for key, value in loss.metrics().items()}  # type: ignore[operator]
            with torch.no_grad():
                if self.unlabelled_ratio:
                    labelled = labelled_rows(len(batch.labels_B), self.unlabelled_ratio)
                    student, batch = student.at(labelled), batch.at(labelled)
                metric = self.task.measure_batch(student, batch)
            # Makes the gradients of a NaN or infinite loss non-finite, so that every rank skips the update.
            total = propagate_nonfinite(torch.stack(list(parts.values())).sum())
        return {**parts, "total": total, self.task.training_metric: metric, **noted}

    def commit(self) -> None:
        """Update the losses' own state, such as memory banks, with the global batch of the last optimizer step."""
        for module in self.losses.modules():
            if isinstance(module, Loss):
                module.commit()
