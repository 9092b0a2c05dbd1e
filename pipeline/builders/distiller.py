"""Builds the Distiller of a run: the student with the losses, on the device."""

from __future__ import annotations

import torch

from pipeline.builders.extractors import load_extractors
from pipeline.builders.inheriting import inherit_weights
from pipeline.builders.peers import build_trained, probe_trained
from pipeline.builders.student import (
    check_optimizer_section,
    load_start,
    note_untrained_head,
    student_spec,
)
from pipeline.config.recipe import Recipe
from pipeline.data.loader import Loader
from pipeline.distiller import Distiller
from pipeline.errors import display_path, error_context
from pipeline.features.checkpointing import checkpoint_blocks
from pipeline.features.cohort import Cohort, exported_peer, trained_networks
from pipeline.features.taps import FeatureTaps
from pipeline.losses._base import Facts
from pipeline.losses._peers import facts_of_peers
from pipeline.models.states import read_state
from pipeline.precision import AUTOCAST
from pipeline.runs.dependencies import finished
from pipeline.runs.files import LOSS_MODULES, check_student
from pipeline.runs.identity import Run
from pipeline.tasks._registry import find_task
from pipeline.teachers.cached import AnyTeacher
from pipeline.teachers.peers import AveragedPeers


def build_distiller(
    run: Run, loader: Loader, teacher: AnyTeacher | None, device: torch.device, layout: torch.memory_format
) -> Distiller:
    """Return the student with the recipe's losses, on the device, with weights in the memory format ``layout``."""
    recipe = run.recipe
    trained = build_trained(recipe, loader.num_classes, layout)
    student = exported_peer(trained)
    spec = student_spec(recipe.student, recipe.taps.student)
    spec.check_task(student, recipe.task)
    spec.select_stages(student, recipe.data.size)
    load_start(run, student)
    inherit_weights(run, student.model)
    check_optimizer_section(recipe, trained.model)  # before the folder is opened
    note_untrained_head(recipe, student)
    if (validation_size := recipe.data.for_validation.size) != recipe.data.size:
        probe_trained(recipe, trained, validation_size)  # an error now, not after the first epoch
    facts = _facts(recipe, loader, teacher, trained)
    if recipe.student.checkpoint:
        with error_context("student.checkpoint"):
            checkpoint_blocks(student.model)
    distiller = Distiller(trained, recipe.losses, facts, find_task(recipe.task)).to(device)
    load_auxiliaries(run, distiller)
    if recipe.student.compile:
        # The method, not torch.compile(student): a wrapper would change the keys of the state dict.
        student.compile(dynamic=False)
    return distiller.to(memory_format=layout)  # type: ignore[call-overload]


def _facts(recipe: Recipe, loader: Loader, teacher: AnyTeacher | None, trained: FeatureTaps | Cohort) -> Facts:
    """Return the facts that the losses are built from."""
    shapes = probe_trained(recipe, trained, recipe.data.size)
    spec = student_spec(recipe.student, recipe.taps.student)
    spec.check_logits(shapes[recipe.student.export], recipe.task, recipe.data.target_size)
    networks = trained_networks(trained)
    teachers = teacher.members if isinstance(teacher, AveragedPeers) else [teacher] * len(networks)
    extractors = load_extractors(recipe)
    found = [
        Facts(
            num_classes=loader.num_classes,
            student_shapes=of_student,
            teacher_shapes=of_peer.shapes(recipe.data.size) if of_peer else {},
            id_count=loader.id_count,
            labels_by_id=loader.labels_by_id,
            teacher_norms=of_peer.norms if of_peer else {},
            student_head=network.linear_head(),
            teacher_head_KD=of_peer.head_KD if of_peer else None,
            autocast=AUTOCAST[recipe.precision],
            unlabelled_ratio=recipe.data.unlabelled_ratio,
            extractors=extractors,
        )
        for of_student, network, of_peer in zip(shapes, networks, teachers, strict=True)
    ]
    return facts_of_peers(found, trained.number) if isinstance(trained, Cohort) else found[0]


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
