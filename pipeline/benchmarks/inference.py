"""The speed of a network in use: latency and images per second of its forward in eval mode."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from statistics import quantiles

import torch

from pipeline.benchmarks.measure import measure
from pipeline.features.taps import FeatureTaps, evaluating
from pipeline.runs.evaluation_file import Speed

BATCHES = (1, 128)
_SECONDS = 1.0
"""About how long a batch size is measured."""
_FEWEST, _MOST = 5, 200
"""Repeats of a batch size."""


@torch.inference_mode()
def measure_speed(
    network: FeatureTaps,
    size: int,
    device: torch.device,
    layout: torch.memory_format,
    autocast: AbstractContextManager[object],
) -> list[Speed]:
    """Return the speed of a network on random images of ``size`` pixels, for each batch size.

    It runs in eval mode under ``autocast``, after a warm-up. Repeats fill about a second for each batch size. A batch
    for which the GPU has no memory is left out, with a note.
    """
    found = []
    with evaluating(network), autocast:
        for batch in BATCHES:
            images_BCHW = torch.randn(batch, 3, size, size, device=device).contiguous(memory_format=layout)
            try:
                seconds = _repeat(lambda images=images_BCHW: network(images), device)
            except torch.OutOfMemoryError:  # all other figures are there already, and would be lost
                print(f"note: speed: a batch of {batch} images does not fit into the GPU's memory, and is left out")
                continue
            found.append(summarize_times(batch, seconds))
    return found


def summarize_times(batch: int, seconds: list[float]) -> Speed:
    """Return median and quartiles of the ``seconds`` of a forward of ``batch`` images."""
    low, middle, high = quantiles(seconds, n=4, method="inclusive")
    return Speed(
        batch=batch,
        latency_ms=1000 * middle,
        low_ms=1000 * low,
        high_ms=1000 * high,
        images_per_second=batch / middle,
    )


def _repeat(forward: Callable[[], object], device: torch.device) -> list[float]:
    """Return the seconds of repeated forwards, after a warm-up that also says how many fit into the time."""
    first = measure("forward", forward, device=device, repeats=1, warmup=2)
    repeats = min(max(math.ceil(_SECONDS / first.median), _FEWEST), _MOST)
    return measure("forward", forward, device=device, repeats=repeats, warmup=0).seconds
