"""Builds the frozen networks whose features losses compare images by."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from pipeline.builders.model_spec import ModelSpec
from pipeline.config.recipe import Recipe
from pipeline.errors import error_context
from pipeline.features.taps import FeatureTaps
from pipeline.losses._extractor import ExtractorConfig
from pipeline.models.weights import load_weights
from pipeline.runs.files import check_student

BUILT_CLASSES = 1
"""Number of classes with which a network is built, whose last layer is then left out."""


def extractor_specs(recipe: Recipe) -> dict[str, tuple[ModelSpec, ExtractorConfig]]:
    """Return the specification of each network, and its entry in the recipe, by the name of the loss."""
    found = {}
    for name, spec in recipe.losses.items():
        for key, config in spec.extractors.items():
            arguments = json.dumps(config.arguments or {}, sort_keys=True)
            stages, taps = frozenset(config.paths.items()), frozenset(config.taps)
            network = ModelSpec(f"losses.{name}.{key}", config.model, stages, taps, arguments, headless=True)
            found[name] = network, config
    return found


def load_extractors(recipe: Recipe) -> dict[str, FeatureTaps]:
    """Return the networks with their weights, in evaluation mode on the CPU, by the name of the loss.

    Raises RecipeError if weights do not fit a network.
    """
    found = {}
    for name, (spec, config) in extractor_specs(recipe).items():
        with torch.random.fork_rng(devices=()):  # what is drawn afterwards does not depend on this network
            network = spec.build(BUILT_CLASSES)
        with error_context(f"{spec.key}.weights"):
            check_student(Path(config.weights))
            key, arguments = config.weights_key, spec.arguments
            load_weights(network.model, config.weights, spec.model, key, arguments=arguments)
        found[name] = network.eval()
    return found
