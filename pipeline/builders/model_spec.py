"""The specification of a network in a recipe."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import torch
from torch import nn

from pipeline.distributed.sync_batchnorm import synchronize_batchnorms
from pipeline.errors import RecipeError, error_context
from pipeline.features.patterns import freeze, frozen_norms
from pipeline.features.stagewise import train_stages
from pipeline.features.taps import FeatureTaps, tap_shapes
from pipeline.image_size import Resolution
from pipeline.models import create_model
from pipeline.models.arguments import ArgumentError
from pipeline.models.detector import Detector
from pipeline.models.headless import without_head
from pipeline.models.slimmable import Slimmable
from pipeline.models.stages import stages
from pipeline.tasks._registry import find_task


class ModelSpec(NamedTuple):
    """The specification of a network: its model, stages and taps. It is hashable, as a key of caches."""

    key: str
    """Key of the network in the recipe, for error messages, such as ``student``."""
    model: str
    """Name for ``create_model``."""
    stages: frozenset[tuple[str, str]]
    """Pairs (stage name, module path) of the recipe, in addition to the known stages."""
    taps: frozenset[str]
    """Names of the taps that the losses read."""
    arguments_json: str = "{}"
    """More keyword arguments of the factory, as JSON."""
    frozen: tuple[str, ...] = ()
    """Patterns of the parameters that do not train."""
    size: int | None = None
    """Side in pixels to which its images are resized; None for those of the batch as they are."""
    headless: bool = False
    """Whether the network has no head; its logits are then [B, 0]."""
    trained: tuple[str, ...] = ()
    """Names of the stages that alone train, if there are any."""
    synced: bool = False
    """Whether its BatchNorms take the statistics of all ranks."""
    within_json: str = ""
    """Arguments of the wider network of which it is a part, as JSON; empty if it is a network of its own."""

    @property
    def arguments(self) -> dict[str, Any]:
        """Return the keyword arguments of the factory, besides the number of classes."""
        return json.loads(self.arguments_json)

    def build(self, num_classes: int) -> FeatureTaps:
        """Return the network with its taps, freshly initialised."""
        return self.tapped(self.create(num_classes))

    def create(self, num_classes: int) -> nn.Module:
        """Return the plain network, freshly initialised, its frozen parameters without gradients."""
        model = self._create_within(num_classes) if self.within_json else self._create("arguments", num_classes)
        with error_context(f"{self.key}.freeze"):
            freeze(model, self.frozen)
        return model

    def _create(self, key: str, num_classes: int, more: dict[str, Any] | None = None) -> nn.Module:
        """Return the network with its arguments and ``more``, which are the recipe's under ``key``."""
        try:
            with error_context(f"{self.key}.model"):
                return create_model(self.model, num_classes, {**self.arguments, **(more or {})})
        except RecipeError as error:
            if isinstance(error.__cause__, ArgumentError):
                raise RecipeError(f"{self.key}.{key}: {error.__cause__}") from error
            raise

    def _create_within(self, num_classes: int) -> nn.Module:
        """Return the network as a part of the wider one, whose weights are its own."""
        with torch.device("meta"):  # it needs no weights, and draws none
            part = self._create("arguments", num_classes)
        whole = self._create("within", num_classes, json.loads(self.within_json))
        with error_context(f"{self.key}.within"):
            return Slimmable(whole, part)

    def tapped(self, model: nn.Module) -> FeatureTaps:
        """Return a network of ``create`` with its taps."""
        with error_context(f"{self.key}.stages"):
            known = stages(model) | dict(self.stages)
            known = without_head(model, known) if self.headless else known
        if self.synced:
            with error_context(f"{self.key}.sync_batchnorm"):
                synchronize_batchnorms(model)
        with error_context(f"{self.key}.stages"):
            return FeatureTaps(model, known, self.taps, frozen_norms(model, self.frozen))

    def check_task(self, network: FeatureTaps, task: str) -> None:
        """Raise RecipeError for a detector in a recipe whose task is not of boxes."""
        if isinstance(network.model, Detector) and not find_task(task).of_boxes:
            raise RecipeError(
                f"{self.key}.model: {self.model} is a detector, and this is task: {task}; set task: detection, or take "
                "another network"
            )

    def select_stages(self, network: FeatureTaps, image_size: Resolution) -> None:
        """Freeze all but the stages that alone train, of a network that takes images of that size."""
        if self.trained:
            with error_context(f"{self.key}.train"):
                train_stages(network, self.trained, image_size)

    def check_logits(self, shapes: dict[str, tuple[int, ...]], task: str, target_size: tuple[int, int]) -> None:
        """Raise RecipeError if the task cannot judge logits of the shape that ``probe`` found."""
        if not self.headless and (problem := find_task(task).wrong_logits(shapes["logits"], target_size)):
            raise RecipeError(f"{self.key}.model: {self.model}: {problem}")

    def probe(self, network: FeatureTaps, image_size: Resolution) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the network's taps and logits on a batch's images of that size, without the batch."""
        with error_context(f"{self.key}.model"):
            shapes = tap_shapes(network, self.size or image_size)
            if self.headless and shapes["logits"] != (0,):
                raise ValueError(
                    f"{self.model} still returns {list(shapes['logits'])} without its head; name its last layer under "
                    "stages: {logits: <module path>}"
                )
            return shapes
