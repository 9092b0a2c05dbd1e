"""The speed of a network in use: latency and images per second of its forward in eval mode."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from statistics import median

import torch

from pipeline.benchmarks.measure import measure
from pipeline.features.taps import FeatureTaps, evaluating
from pipeline.image_size import Resolution, height_width
from pipeline.runs.evaluation_file import Speed

BATCHES = (1, 128)
DENSE_BATCHES = (1, 8)
"""Of a network of pixels or boxes: its images are large, and so is what it keeps of them."""
ROUNDS = 12
"""Times that every batch size is measured, in turn. A machine's speed drifts over seconds, so one stretch of time would
show too narrow a spread."""
_SECONDS = 0.4
"""About how long a batch size is measured in a round."""
_FEWEST, _MOST = 3, 100
"""Repeats of a batch size in a round."""


@torch.inference_mode()
def measure_speed(
    network: FeatureTaps,
    size: Resolution,
    device: torch.device,
    layout: torch.memory_format,
    autocast: AbstractContextManager[object],
    batches: Sequence[int] = BATCHES,
) -> list[Speed]:
    """Return the speed of a network on random images of ``size`` pixels, for each size of ``batches``.

    It runs in eval mode under ``autocast``, after a warm-up, in ``ROUNDS`` rounds. A batch for which the GPU has no
    memory is left out, with a note.
    """
    rounds: dict[int, list[float]] = {batch: [] for batch in batches}
    with evaluating(network), autocast:
        for _ in range(ROUNDS):
            for batch in list(rounds):
                # New images in every round: where they lie in memory changes the speed, too.
                images_BCHW = torch.randn(batch, 3, *height_width(size), device=device).contiguous(memory_format=layout)
                try:
                    rounds[batch].append(_measure_round(lambda images=images_BCHW: network(images), device))
                except torch.OutOfMemoryError:  # all other figures are there already, and would be lost
                    print(f"note: speed: a batch of {batch} images does not fit into the GPU's memory, and is left out")
                    del rounds[batch]
    return [summarize_rounds(batch, seconds) for batch, seconds in rounds.items()]


def summarize_rounds(batch: int, seconds: list[float]) -> Speed:
    """Return the median and the range of the rounds' ``seconds`` for a forward of ``batch`` images."""
    middle = median(seconds)
    return Speed(
        batch=batch,
        latency_ms=1000 * middle,
        low_ms=1000 * min(seconds),
        high_ms=1000 * max(seconds),
        images_per_second=batch / middle,
    )


def _measure_round(forward: Callable[[], object], device: torch.device) -> float:
    """Return the median seconds of repeated forwards, after a warm-up that also says how many fit into the time."""
    first = measure("forward", forward, device=device, repeats=1, warmup=2)
    repeats = min(max(math.ceil(_SECONDS / first.median), _FEWEST), _MOST)
    return measure("forward", forward, device=device, repeats=repeats, warmup=0).median
