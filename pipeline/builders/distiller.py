"""Builds the Distiller of a run: the student with the losses, on the device."""

from __future__ import annotations

import torch

from pipeline.builders.inheriting import inherit_weights
from pipeline.builders.student import (
    build_student,
    check_optimizer_section,
    load_start,
    note_untrained_head,
    student_spec,
)
from pipeline.data.loader import Loader
from pipeline.distiller import Distiller
from pipeline.errors import display_path, error_context
from pipeline.features.checkpointing import checkpoint_blocks
from pipeline.losses._base import Facts
from pipeline.models.states import read_state
from pipeline.precision import AUTOCAST
from pipeline.runs.dependencies import finished
from pipeline.runs.files import LOSS_MODULES, check_student
from pipeline.runs.identity import Run
from pipeline.tasks._registry import find_task
from pipeline.teachers.cached import AnyTeacher


def build_distiller(
    run: Run, loader: Loader, teacher: AnyTeacher | None, device: torch.device, layout: torch.memory_format
) -> Distiller:
    """Return the student with the recipe's losses, on the device, with weights in the memory format ``layout``."""
    recipe = run.recipe
    spec = student_spec(recipe.student, recipe.taps.student)
    student = build_student(spec, loader.num_classes, recipe.seed, layout)
    spec.check_task(student, recipe.task)
    load_start(run, student)
    inherit_weights(run, student.model)
    check_optimizer_section(recipe, student.model)  # before the folder is opened
    note_untrained_head(recipe, student)
    if (validation_size := recipe.data.for_validation.size) != recipe.data.size:
        spec.probe(student, validation_size)  # an error now, not after the first epoch
    shapes = spec.probe(student, recipe.data.size)
    spec.check_logits(shapes, recipe.task, recipe.data.target_size)
    facts = Facts(
        num_classes=loader.num_classes,
        student_shapes=shapes,
        teacher_shapes=teacher.shapes(recipe.data.size) if teacher else {},
        id_count=loader.id_count,
        labels_by_id=loader.labels_by_id,
        teacher_norms=teacher.norms if teacher else {},
        student_head=student.linear_head(),
        teacher_head_KD=teacher.head_KD if teacher else None,
        autocast=AUTOCAST[recipe.precision],
    )
    if recipe.student.checkpoint:
        with error_context("student.checkpoint"):
            checkpoint_blocks(student.model)
    distiller = Distiller(student, recipe.losses, facts, find_task(recipe.task)).to(device)
    load_auxiliaries(run, distiller)
    if recipe.student.compile:
        # The method, not torch.compile(student): a wrapper would change the keys of the state dict.
        student.compile(dynamic=False)
    return distiller.to(memory_format=layout)  # type: ignore[call-overload]


def load_auxiliaries(run: Run, distiller: Distiller) -> None:
    """Load the modules with which the losses start that name another run. Raises RecipeError if they do not fit."""
    remaining = iter(run.of_losses)
    for (name, spec), loss in zip(run.recipe.losses.items(), distiller.losses.values(), strict=True):
        for key in spec.runs:
            path = finished(next(remaining)).folder / LOSS_MODULES
            with error_context(f"losses.{name}.{key}: {display_path(path)}"):
                if not path.is_file():
                    raise ValueError("there is no such file; name a run whose losses leave modules")
                check_student(path)
                loss.load_auxiliary(read_state(path))  # type: ignore[operator]
