"""A network as a recipe names it."""

from __future__ import annotations

from typing import NamedTuple

from pipeline.errors import error_context
from pipeline.features.taps import FeatureTaps, tap_shapes
from pipeline.models import create_model
from pipeline.models.stages import stages


class ModelSpec(NamedTuple):
    """A network as a recipe names it."""

    key: str
    """The key where it does."""
    model: str
    stages: frozenset[tuple[str, str]]
    """What the recipe says of its stages."""
    taps: frozenset[str]
    """Those that the losses read."""

    def build(self, num_classes: int) -> FeatureTaps:
        """Return the network, freshly initialised."""
        with error_context(f"{self.key}.model"):
            model = create_model(self.model, num_classes)
        with error_context(f"{self.key}.stages"):
            return FeatureTaps(model, stages(model) | dict(self.stages), self.taps)

    def probe(self, network: FeatureTaps, image_size: int) -> dict[str, tuple[int, ...]]:
        """Return ``tap_shapes`` of the network on images of that size."""
        with error_context(f"{self.key}.model"):
            return tap_shapes(network, image_size)
