"""A look at the losses' own networks after each epoch, for the report: a few validation images on the first rank.

It changes nothing of the run: no gradient, no default generator, no buffer, no communication. It costs the forward of
``OBSERVED_ROWS`` images; the images and a frozen teacher's answers are kept from its first call.
"""

from __future__ import annotations

from contextlib import closing
from typing import Any, cast

import torch
from accelerate import Accelerator

from pipeline.batch import Batch, Outputs
from pipeline.config.recipe import Recipe
from pipeline.data.loader import Loader
from pipeline.distiller import Distiller
from pipeline.distributed import collectives
from pipeline.errors import one_line
from pipeline.features.taps import evaluating
from pipeline.losses._base import Loss
from pipeline.teachers.cached import AnyTeacher, CachedTeacher
from pipeline.training.zero import DDP, checkpoint_format

OBSERVED_ROWS = 16
"""Validation images that are looked at. The denoisers' BatchNorms need several."""


class LossObserver:
    """Calls ``observe`` of the losses that have something to show, on the first rank.

    Under DeepSpeed it is off, because a rank may have a part of the weights only.
    """

    def __init__(
        self, recipe: Recipe, accelerator: Accelerator, loader: Loader, teacher: AnyTeacher | None, distiller: Distiller
    ) -> None:
        self.accelerator, self.loader, self.teacher, self.distiller = accelerator, loader, teacher, distiller
        losses = {name: cast(Loss, loss) for name, loss in distiller.losses.items()}
        self.losses = {name: loss for name, loss in losses.items() if type(loss).observe is not Loss.observe}
        """The losses that have something to show, by name."""
        self.on = bool(
            recipe.journal.report
            and self.losses
            and collectives.is_main()
            and loader.has_validation
            and checkpoint_format(accelerator) == DDP
        )
        self.batch: Batch | None = None
        self.answers: Outputs | None = None

    def __call__(self) -> dict[str, Any] | None:
        """Return what the losses show, by loss; None where the observer is off.

        An error turns it off with a note: a picture is no reason to end a run.
        """
        if not self.on:
            return None
        try:
            # Its images have another number of rows than training's, for which torch.compile would compile again.
            with torch.no_grad(), collectives.single_process(), torch.compiler.set_stance("force_eager"):
                return self._observe()
        except Exception as error:
            self.on = False
            print(f"note: the report will not show the losses' own networks: {one_line(error, 200)}")
            return None

    def _observe(self) -> dict[str, Any]:
        if self.batch is None:
            with closing(self.loader.validation()) as batches:  # pyright: ignore[reportArgumentType]
                batch = next(iter(batches))
            images_BCHW, labels_B, ids_B = (x[:OBSERVED_ROWS].clone() for x in batch[:3])
            targets = {name: x[:OBSERVED_ROWS].clone() for name, x in batch.targets.items()}
            self.batch = Batch(images_BCHW, labels_B, ids_B, {}, targets)
        if self.answers is None or (self.teacher and self.teacher.moves):
            cached = self.teacher is None or isinstance(self.teacher, CachedTeacher)
            self.answers = None if cached or self.teacher is None else self.teacher(self.batch)
        student = self.distiller.student
        with evaluating(student), self.accelerator.autocast():
            outputs = student(self.batch.images_BCHW, self.batch.targets)
        return {name: loss.observe(outputs, self.answers) for name, loss in self.losses.items()}
