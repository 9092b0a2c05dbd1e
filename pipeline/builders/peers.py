"""Builds what a recipe trains: its student, or several students that train together."""

from __future__ import annotations

import json

import numpy as np
import torch

from pipeline.builders.model_spec import ModelSpec
from pipeline.builders.student import build_student, student_spec
from pipeline.config.recipe import Recipe, StudentConfig
from pipeline.errors import error_context
from pipeline.features.cohort import Cohort, share_modules, trained_networks
from pipeline.features.taps import FeatureTaps
from pipeline.image_size import Resolution


def peer_specs(config: StudentConfig, taps: frozenset[str]) -> list[ModelSpec]:
    """Return the specifications of the networks that train together, with those taps; none without ``peers``."""
    spec, models = student_spec(config, taps), config.peer_models
    return [spec._replace(key=f"student.peers.{number}", model=model) for number, model in enumerate(models)]


def trained_specs(config: StudentConfig, taps: frozenset[str]) -> list[ModelSpec]:
    """Return the specifications of the networks that train: those of ``peers``, or the student's alone.

    A student within another is the part of a network that answers as it does.
    """
    within = json.dumps(config.within, sort_keys=True) if config.within else ""
    return peer_specs(config, taps) or [student_spec(config, taps)._replace(within_json=within)]


def build_trained(
    recipe: Recipe, num_classes: int, layout: torch.memory_format = torch.contiguous_format
) -> FeatureTaps | Cohort:
    """Return what the recipe trains, initialised from its seed, with weights in the memory format ``layout``."""
    config = recipe.student
    specs = peer_specs(config, recipe.taps.student)
    if not specs:
        (spec,) = trained_specs(config, recipe.taps.student)
        return build_student(spec, num_classes, recipe.seed, layout)
    models = []
    # The first one comes last: what is drawn after the student is then what is drawn after it without peers.
    for number in reversed(range(len(specs))):
        torch.manual_seed(peer_seed(recipe.seed, number))
        models.insert(0, specs[number].create(num_classes))
    if config.shared is not None:
        with error_context("student.shared"):
            untapped = [
                spec._replace(taps=frozenset()).tapped(model) for spec, model in zip(specs, models, strict=True)
            ]
            share_modules(untapped, config.shared, recipe.data.size)
    peers = [spec.tapped(model) for spec, model in zip(specs, models, strict=True)]
    return Cohort(peers, config.export).to(memory_format=layout)  # type: ignore[call-overload]


def peer_seed(seed: int, number: int) -> int:
    """Return the seed of a peer's initial weights; that of peer 0 is the recipe's."""
    return int(np.random.SeedSequence([seed, number]).generate_state(1, np.uint64)[0]) if number else seed


def probe_trained(recipe: Recipe, student: FeatureTaps | Cohort, size: Resolution) -> list[dict[str, tuple[int, ...]]]:
    """Return the shapes of the taps and logits of each network that trains, on images of that size."""
    pairs = zip(trained_specs(recipe.student, recipe.taps.student), trained_networks(student), strict=True)
    return [spec.probe(network, size) for spec, network in pairs]
