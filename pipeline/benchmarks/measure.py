"""Repeated measurement of a function, by the clock of its device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import median
from typing import NamedTuple

import torch

from pipeline.training.timer import StepTimer

Lap = Callable[[str], None]
"""A function that counts the time since its last call under a name."""


class Measurement(NamedTuple):
    """The times of one measured thing over several repeats."""

    name: str
    seconds: list[float]
    """Seconds per repeat, without warm-up."""
    images: int = 0
    """Images per repeat, 0 if images do not apply."""
    counts: Mapping[str, int | float] = {}
    """Other figures by name, such as ``parameters``."""
    steps: int = 1
    """Steps per repeat."""

    @property
    def median(self) -> float:
        """Seconds of the median repeat."""
        return median(self.seconds)

    @property
    def images_per_second(self) -> float:
        """Images per second of the median repeat."""
        return self.images / self.median

    @property
    def milliseconds(self) -> tuple[float, float, float]:
        """Return the milliseconds per step: median, minimum and maximum of the repeats."""
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
    """Return how long ``steps`` calls of ``function`` take; ``images`` is the number of images per call."""

    def timed(lap: Lap) -> None:
        function()
        lap(name)

    (measured,) = measure_parts(timed, device=device, repeats=repeats, warmup=warmup, steps=steps, images=images)
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
    """Return how long the parts of ``function`` take by the device's clock; it calls its argument after each part.

    A repeat is ``steps`` calls, in which the host does not wait for the device. ``warmup`` calls come before all.
    """
    for _ in range(warmup):
        function(lambda name: None)
    timer = StepTimer(device)
    timer.read()  # on a GPU it waits for the warm-up, which would count for the first repeat
    by_name: dict[str, list[float]] = {}
    for _ in range(repeats):
        timer.begin()
        for _ in range(steps):
            function(timer.lap)
        for name, seconds in timer.read().items():
            by_name.setdefault(name, []).append(seconds)
    return [Measurement(name, seconds, steps * images, steps=steps) for name, seconds in by_name.items()]
