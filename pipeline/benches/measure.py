"""What a benchmark measures: something repeated, and how long each repeat took on the device."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import NamedTuple

import torch

from pipeline.timing import Split


class Measured(NamedTuple):
    """How long one thing took, again and again."""

    name: str
    seconds: list[float]
    """Of each repeat; warm-up left out."""
    images: int = 0
    """Worked on by one repeat; 0 where it is none's business."""

    @property
    def median(self) -> float:
        """Seconds of the middle repeat."""
        return median(self.seconds)

    @property
    def images_per_second(self) -> float:
        """Rate of the middle repeat."""
        return self.images / self.median


def measure(
    name: str, function: Callable[[], object], *, device: torch.device, repeats: int, warmup: int, images: int = 0
) -> Measured:
    """Return how long ``function`` takes, by the device's clock."""
    for _ in range(warmup):
        function()
    split, seconds = Split(device), []
    split.read()
    for _ in range(repeats):
        split.begin()
        function()
        split.mark(name)
        seconds.append(split.read()[name])
    return Measured(name, seconds, images)
