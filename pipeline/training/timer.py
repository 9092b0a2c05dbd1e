"""A timer for the parts of a step by the device's own clock; a lap never makes the host wait for the device."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd import Variable


class StepTimer:
    """A stopwatch: the time between laps, added up by the name of the lap that ends it.

    On a GPU a lap is an event in torch's current stream. The times are then the device's, including its waiting for the
    host. Call ``read`` where the host has waited for the device anyway.

    ``by_ddp`` means that backward ends with DDP's all-reduce over several ranks.
    """

    def __init__(self, device: torch.device, *, by_ddp: bool = False) -> None:
        self._on_gpu = device.type == "cuda"
        self._by_ddp = by_ddp
        self._spare: list[torch.cuda.Event] = []
        self._paused = False
        self.begin()

    def begin(self) -> None:
        """Start the clock again, and forget the laps that were not read."""
        self._laps = [("", self._now())]

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Count the time inside the context as ``name``."""
        yield
        self.lap(name)

    def lap(self, name: str) -> None:
        """Count the time since the last lap as ``name``."""
        if not self._paused:
            self._laps.append((name, self._now()))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Ignore laps inside the context; its time counts for the next lap after it."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    @contextmanager
    def backward(self, total: Tensor) -> Iterator[None]:
        """Count the computation of ``total.backward()`` inside the context as ``backward``.

        Its wait for other ranks counts as ``communication``: the part of DDP's all-reduces that backward did not hide.
        """
        if self._by_ddp:
            # DDP waits for its all-reduces in a callback that it queues during backward. Callbacks run in order at the
            # end of backward, so this one, queued at the start, runs just before that wait.
            total.register_hook(lambda _: Variable._execution_engine.queue_callback(lambda: self.lap("backward")))
        yield
        self.lap("communication" if self._by_ddp else "backward")

    def read(self) -> dict[str, float]:
        """Return the seconds by name since the clock was started or last read, in the order of their first laps."""
        if self._on_gpu:
            self._laps[-1][1].synchronize()  # type: ignore[union-attr]
        seconds: dict[str, float] = defaultdict(float)
        for (_, before), (name, after) in zip(self._laps, self._laps[1:], strict=False):
            seconds[name] += _seconds_between(before, after)
        # Events are used again, so a long run does not create one for every lap.
        self._spare += [moment for _, moment in self._laps[:-1] if isinstance(moment, torch.cuda.Event)]
        self._laps = self._laps[-1:]
        return dict(seconds)

    def _now(self) -> float | torch.cuda.Event:
        if not self._on_gpu:
            return time.perf_counter()
        event = self._spare.pop() if self._spare else torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _seconds_between(before: float | torch.cuda.Event, after: float | torch.cuda.Event) -> float:
    """Return the seconds between two readings of one clock."""
    if isinstance(before, torch.cuda.Event) and isinstance(after, torch.cuda.Event):
        return before.elapsed_time(after) / 1000
    assert isinstance(before, float)
    assert isinstance(after, float)
    return after - before
