"""The speed of a network in use: latency and images per second of its forward in eval mode.

    python pipeline/benchmarks/inference.py JSON        what ``measure_speed`` starts; JSON is a ``TimedNetwork``

A process keeps where its code and tensors lie in memory, and the order of Python's tables. All of it changes its speed.
So several processes measure, and the range of all their rounds is stated. On a CPU each of their rounds has a process
of its own, a fork, which has read its code already. On a GPU they share one, because each process has a context.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import subprocess
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from statistics import median
from typing import Any, Literal

import torch

from pipeline.benchmarks.measure import measure
from pipeline.cli import entry
from pipeline.features.taps import FeatureTaps, evaluating
from pipeline.frozen_model import FrozenModel
from pipeline.image_size import Resolution, height_width
from pipeline.models import create_model
from pipeline.models.weights import load_weights
from pipeline.precision import AUTOCAST
from pipeline.runs.evaluation_file import Speed

BATCHES = (1, 128)
DENSE_BATCHES = (1, 8)
"""Of a network of pixels or boxes: its images are large, and so is what it keeps of them."""
PROCESSES = 3
"""Processes that measure, one after the other."""
ROUNDS = 4
"""Times that a process measures every batch size, in turn. A machine's speed drifts over seconds, so one stretch of
time would show too narrow a spread."""
_SECONDS = 0.4
"""About how long a batch size is measured in a round."""
_FEWEST, _MOST = 3, 100
"""Repeats of a batch size in a round."""
Rounds = dict[int, list[float]]
"""Seconds of a forward in each round, by batch size."""


class TimedNetwork(FrozenModel):
    """A trained network that any process can build, and how its forward is measured."""

    model: str
    arguments: dict[str, Any]
    num_classes: int
    weights: str
    """File of its weights."""
    size: Resolution
    """Pixels of the images."""
    batches: tuple[int, ...]
    device: str
    threads: int
    precision: Literal["fp32", "bf16", "fp16"]
    channels_last: bool

    @property
    def layout(self) -> torch.memory_format:
        """Return the memory format of images and weights."""
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def build(self) -> FeatureTaps:
        """Return the network with its weights, on its device."""
        model = create_model(self.model, self.num_classes, self.arguments)
        load_weights(model, self.weights, self.model, arguments=self.arguments)
        return FeatureTaps(model, {}, frozenset()).to(self.device, memory_format=self.layout)  # type: ignore[call-overload]


def measure_speed(network: TimedNetwork) -> list[Speed]:
    """Return the speed for each batch size, as ``PROCESSES`` new processes measure it on random images.

    A process that fails, and a batch for which the GPU has no memory, are left out, with a note.
    """
    if torch.device(network.device).type == "cuda":
        torch.cuda.empty_cache()  # what this process has cached is of use to the others
    found = [rounds for _ in range(PROCESSES) if (rounds := _measure_in_a_process(network)) is not None]
    speeds = []
    for batch in network.batches if found else ():
        if all(batch in rounds for rounds in found):
            speeds.append(summarize_rounds(batch, [seconds for rounds in found for seconds in rounds[batch]]))
        else:
            print(f"note: speed: a batch of {batch} images does not fit into the GPU's memory, and is left out")
    return speeds


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


def measure_forks(settings: TimedNetwork) -> Rounds:
    """Return the seconds of a forward in each round, for each batch size. Each round is that of a new fork."""
    torch.set_num_threads(1)  # a fork has none of the other threads, and would wait for them
    settings.build()  # imports what the network needs, once for all forks
    forks = []
    for _ in range(ROUNDS):
        with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
            forks.append(pool.submit(_build_and_measure, settings, 1).result())
    return {batch: [seconds for rounds in forks for seconds in rounds[batch]] for batch in settings.batches}


def _build_and_measure(settings: TimedNetwork, rounds: int) -> Rounds:
    torch.set_num_threads(settings.threads)
    return measure_rounds(settings.build(), settings, rounds)


@torch.inference_mode()
def measure_rounds(network: FeatureTaps, settings: TimedNetwork, count: int = ROUNDS) -> Rounds:
    """Return the seconds of a forward in each round of this process, for each batch size that fits into memory.

    It runs in eval mode under autocast, after a warm-up.
    """
    device, dtype, size = torch.device(settings.device), AUTOCAST[settings.precision], height_width(settings.size)
    rounds: Rounds = {batch: [] for batch in settings.batches}
    with evaluating(network), torch.autocast(device.type, dtype, enabled=dtype is not None):
        for _ in range(count):
            for batch in list(rounds):
                # New images in every round: where they lie in memory changes the speed, too.
                images_BCHW = torch.randn(batch, 3, *size, device=device).contiguous(memory_format=settings.layout)
                try:
                    rounds[batch].append(_measure_round(lambda images=images_BCHW: network(images), device))
                except torch.OutOfMemoryError:  # all other figures are there already, and would be lost
                    del rounds[batch]
    return rounds


def _measure_round(forward: Callable[[], object], device: torch.device) -> float:
    """Return the median seconds of repeated forwards, after a warm-up that also says how many fit into the time."""
    first = measure("forward", forward, device=device, repeats=1, warmup=2)
    repeats = min(max(math.ceil(_SECONDS / first.median), _FEWEST), _MOST)
    return measure("forward", forward, device=device, repeats=repeats, warmup=0).median


def _measure_in_a_process(network: TimedNetwork) -> Rounds | None:
    """Return the rounds of a new process; None, with a note, if it fails."""
    command = [sys.executable, str(Path(__file__).resolve()), network.model_dump_json()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        print(f"note: speed: a process that measures it failed, and is left out: {reason}")
        return None
    return {int(batch): seconds for batch, seconds in json.loads(done.stdout.splitlines()[-1]).items()}


def main(args: Sequence[str]) -> None:
    """Measure the network that the argument describes, and print its rounds as JSON."""
    settings = TimedNetwork.model_validate_json(args[0])
    on_cpu = torch.device(settings.device).type == "cpu"
    print(json.dumps(measure_forks(settings) if on_cpu else _build_and_measure(settings, ROUNDS)))


if __name__ == "__main__":
    entry(main)
