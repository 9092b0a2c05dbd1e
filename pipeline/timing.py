"""Where a step's time goes, by the device's own clock: no mark makes the host wait for the device."""

from __future__ import annotations

import time
from collections import defaultdict

import torch


class Split:
    """The time between marks, added up by the name of the mark that ends it.

    On a GPU a mark is an event in torch's stream: what is measured is the device's time, its waiting for the host
    included. ``read`` is for moments at which the host has waited for the device anyway.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._spare: list[torch.cuda.Event] = []
        self.begin()

    def begin(self) -> None:
        """Start the clock anew; what was not read is forgotten."""
        self._marks = [("", self._now())]

    def mark(self, name: str) -> None:
        """Say that what has run since the last mark was ``name``."""
        self._marks.append((name, self._now()))

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
