"""The specification of a network in a recipe."""

from __future__ import annotations

from typing import NamedTuple

from pipeline.errors import error_context
from pipeline.features.taps import FeatureTaps, tap_shapes
from pipeline.models import create_model
from pipeline.models.headless import without_head
from pipeline.models.stages import stages


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
    size: int | None = None
    """Side in pixels to which its images are resized; None for those of the batch as they are."""
    headless: bool = False
    """Whether the network has no head; its logits are then [B, 0]."""

    def build(self, num_classes: int) -> FeatureTaps:
        """Return the network with its taps, freshly initialised."""
        with error_context(f"{self.key}.model"):
            model = create_model(self.model, num_classes)
        with error_context(f"{self.key}.stages"):
            known = stages(model) | dict(self.stages)
            return FeatureTaps(model, without_head(model, known) if self.headless else known, self.taps)

    def probe(self, network: FeatureTaps, image_size: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the network's taps and logits on a batch's images of that size, without the batch."""
        with error_context(f"{self.key}.model"):
            shapes = tap_shapes(network, self.size or image_size)
            if self.headless and shapes["logits"] != (0,):
                raise ValueError(
                    f"{self.model} still returns {list(shapes['logits'])} without its head; name its last layer under "
                    "stages: {logits: <module path>}"
                )
            return shapes
