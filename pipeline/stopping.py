"""When a command ends before its run is over."""

from __future__ import annotations

import signal
import time
from types import FrameType

from pipeline import parallel
from pipeline.batch import Progress
from pipeline.recipe import Stop
from pipeline.runs import STOP_SIGNALS


class Stopping:
    """Whether to end this command before the run is over: ``stop:``, or a signal that a scheduler sent to any rank."""

    def __init__(self, stop: Stop, poll_steps: int) -> None:
        self.stop = stop
        self.poll_steps = poll_steps
        self.began = time.monotonic()
        self.noticed = False
        for number in STOP_SIGNALS:
            signal.signal(number, self._notice)

    def _notice(self, _number: int, _frame: FrameType | None) -> None:
        self.noticed = True

    def due(self, progress: Progress) -> str | None:
        """Return why to stop at this step, the same on every rank; None to go on."""
        if self.stop.epoch is not None and progress.fraction >= self.stop.epoch:
            return f"stop.epoch={self.stop.epoch}"
        if self.stop.steps is not None and progress.step >= self.stop.steps:
            return f"stop.steps={self.stop.steps}"
        if progress.step % self.poll_steps == 0 or parallel.world_size() == 1:
            late = self.stop.minutes is not None and time.monotonic() - self.began >= 60 * self.stop.minutes
            if parallel.any_rank(self.noticed or late):
                return f"stop.minutes={self.stop.minutes}" if late else "a signal to stop"
        return None
