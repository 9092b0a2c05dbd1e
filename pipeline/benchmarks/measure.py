"""What a benchmark measures: something repeated, and how long each repeat took on the device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import median
from typing import NamedTuple

import torch

from pipeline.training.timer import StepTimer

Lap = Callable[[str], None]
"""Says that what has run since the last call was of that name."""


class Measurement(NamedTuple):
    """How long one thing took, again and again."""

    name: str
    seconds: list[float]
    """Of each repeat; warm-up left out."""
    images: int = 0
    """Worked on by one repeat; 0 where it is none's business."""
    counts: Mapping[str, int | float] = {}
    """What else is known of it, by what it counts, such as ``parameters``."""
    steps: int = 1
    """Of one repeat."""

    @property
    def median(self) -> float:
        """Seconds of the middle repeat."""
        return median(self.seconds)

    @property
    def images_per_second(self) -> float:
        """Rate of the middle repeat."""
        return self.images / self.median

    @property
    def milliseconds(self) -> tuple[float, float, float]:
        """Of a step: those of the middle repeat, the least and the most."""
        middle, least, most = (1000 * x / self.steps for x in (self.median, min(self.seconds), max(self.seconds)))
        return middle, least, most


def measure(
    name: str,
    function: Callable[[], object],
    *,
    device: torch.device,
    repeats: int,
    warmup: int,
    steps: int = 1,
    images: int = 0,
) -> Measurement:
    """Return how long ``steps`` calls of ``function`` take; ``images`` are those of one call."""

    def marked(mark: Lap) -> None:
        function()
        mark(name)

    (measured,) = measure_parts(marked, device=device, repeats=repeats, warmup=warmup, steps=steps, images=images)
    return measured


def measure_parts(
    function: Callable[[Lap], object],
    *,
    device: torch.device,
    repeats: int,
    warmup: int,
    steps: int = 1,
    images: int = 0,
) -> list[Measurement]:
    """Return how long the parts of ``function`` take, by the device's clock; it marks each at its end.

    A repeat is ``steps`` calls, and within it the host does not wait for the device; ``warmup`` calls come before all.
    """
    for _ in range(warmup):
        function(lambda name: None)
    split = StepTimer(device)
    split.read()
    by_name: dict[str, list[float]] = {}
    for _ in range(repeats):
        split.begin()
        for _ in range(steps):
            function(split.lap)
        for name, seconds in split.read().items():
            by_name.setdefault(name, []).append(seconds)
    return [Measurement(name, seconds, steps * images, steps=steps) for name, seconds in by_name.items()]
