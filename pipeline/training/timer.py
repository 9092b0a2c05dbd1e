"""Where a step's time goes, by the device's own clock: no mark makes the host wait for the device."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd import Variable


class StepTimer:
    """The time between marks, added up by the name of the mark that ends it.

    On a GPU a mark is an event in torch's stream: what is measured is the device's time, its waiting for the host
    included. ``read`` is for moments at which the host has waited for the device anyway.

    ``by_ddp`` says that backward ends with DDP's average over several ranks.
    """

    def __init__(self, device: torch.device, *, by_ddp: bool = False) -> None:
        self._on_gpu = device.type == "cuda"
        self._by_ddp = by_ddp
        self._spare: list[torch.cuda.Event] = []
        self._paused = False
        self.begin()

    def begin(self) -> None:
        """Start the clock anew; what was not read is forgotten."""
        self._marks = [("", self._now())]

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Mark what runs inside the context as ``name``."""
        yield
        self.lap(name)

    def lap(self, name: str) -> None:
        """Say that what has run since the last mark was ``name``."""
        if not self._paused:
            self._marks.append((name, self._now()))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Mark nothing inside the context: what happens there takes its time later, or is someone else's to mark."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    @contextmanager
    def backward(self, total: Tensor) -> Iterator[None]:
        """Mark what ``total.backward()`` inside the context computes, and then what it waits for other ranks.

        The second, ``communication``, is as much of DDP's all-reduces as the rest of backward did not hide. DDP waits
        for them in a callback at the end of backward, which it queues on the way; one queued earlier runs earlier.
        """
        if self._by_ddp:
            total.register_hook(lambda _: Variable._execution_engine.queue_callback(lambda: self.lap("backward")))
        yield
        self.lap("communication" if self._by_ddp else "backward")

    def read(self) -> dict[str, float]:
        """Return the seconds by name since the clock was started or last read, in the order of their first marks."""
        if self._on_gpu:
            self._marks[-1][1].synchronize()  # type: ignore[union-attr]
        seconds: dict[str, float] = defaultdict(float)
        for (_, before), (name, after) in zip(self._marks, self._marks[1:], strict=False):
            seconds[name] += _between(before, after)
        self._spare += [moment for _, moment in self._marks[:-1] if isinstance(moment, torch.cuda.Event)]
        self._marks = self._marks[-1:]
        return dict(seconds)

    def _now(self) -> float | torch.cuda.Event:
        if not self._on_gpu:
            return time.perf_counter()
        event = self._spare.pop() if self._spare else torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _between(before: float | torch.cuda.Event, after: float | torch.cuda.Event) -> float:
    """Return the seconds between two moments of one clock."""
    if isinstance(before, torch.cuda.Event) and isinstance(after, torch.cuda.Event):
        return before.elapsed_time(after) / 1000
    assert isinstance(before, float)
    assert isinstance(after, float)
    return after - before
