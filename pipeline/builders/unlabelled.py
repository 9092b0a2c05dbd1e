"""Builds this rank's loader of the images without labels, with their pseudo-labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from pipeline.batch import PSEUDO
from pipeline.builders.teacher import check_provenance, teacher_facts
from pipeline.data.loader import Loader, create_loader
from pipeline.data.unlabelled import SEED_OFFSET, config_of_unlabelled
from pipeline.distributed import collectives
from pipeline.errors import RecipeError, error_context
from pipeline.runs.identity import Run
from pipeline.teachers.pseudo import PseudoLabels
from shards.manifest import Manifest, read_manifest


def build_unlabelled(run: Run, device: torch.device) -> Loader | None:
    """Return this rank's loader of ``data.unlabelled``, or None if a batch has no such images.

    Raises RecipeError for shards of another task, and for pseudo-labels of another teacher or of other shards.
    """
    recipe, config = run.recipe, run.recipe.data.unlabelled
    if config is None or config.ratio == 0:
        return None
    manifest = read_unlabelled(config.path, "data.unlabelled.path")
    labels = _open_pseudo_labels(run, config.pseudo, manifest, device) if config.pseudo is not None else None
    logits = labels and labels.logits()
    with error_context("data.unlabelled"):
        return create_loader(
            config_of_unlabelled(recipe.data),
            batch=config.ratio * recipe.batch,
            accumulation=recipe.accumulation,
            seed=recipe.order_seed + SEED_OFFSET,
            rank=collectives.rank(),
            world=collectives.world_size(),
            device=device,
            columns=None if logits is None else lambda view: {PSEUDO: logits},
            splits=("train",),
            manifest=manifest,
            ids=labels and labels.ids(),
        )


def read_unlabelled(folder: str, key: str) -> Manifest:
    """Return the manifest of shards whose images are used without labels; ``key`` names the folder in messages.

    Raises RecipeError if there are none, and for images with masks, boxes or several classes.
    """
    with error_context(key):
        manifest = read_manifest(Path(folder))
        if manifest.task not in ("unlabelled", "classification"):
            raise RecipeError(
                f"the images in {folder} are for task: {manifest.task}; prepare them with shards/prepare_unlabelled.py"
            )
        if "train" not in manifest.splits:
            raise RecipeError(f"{folder} has no split 'train'; prepare it with shards/prepare_unlabelled.py")
    return manifest


def _open_pseudo_labels(run: Run, folder: str, manifest: Manifest, device: torch.device) -> PseudoLabels:
    """Return the pseudo-labels, after a check that they are this teacher's for these images and classes."""
    assert run.recipe.teacher is not None
    with error_context("data.unlabelled.pseudo"):
        labels = PseudoLabels(Path(folder))
        teacher = _without_precision(teacher_facts(run, run.recipe.teacher, device))
        facts = {"teacher": teacher, "data": None, "shards": manifest.sha256}
        advice = "write them again: pipeline/pseudo_label.py RECIPE SHARDS ANOTHER_FOLDER"
        check_provenance(labels.cache, facts, advice=advice)
        if labels.classes != (classes := run.manifest.num_classes):
            raise RecipeError(f"{folder} has {labels.classes} logits, but the shards have {classes} classes; {advice}")
        return labels


def _without_precision(facts: Any) -> Any:
    """Return facts about networks in which the precision is unknown: it depends on the machine that labelled."""
    if not isinstance(facts, dict):
        return facts
    return {key: None if key == "dtype" else _without_precision(value) for key, value in facts.items()}
