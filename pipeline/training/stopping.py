"""The conditions on which a command ends before its run is complete."""

from __future__ import annotations

import time

from pipeline.batch import Progress
from pipeline.config.recipe import StopConfig
from pipeline.distributed import collectives, signals

SIGNAL = "a signal to stop"


class StopCondition:
    """A condition to end this command early: the recipe's ``stop``, or a signal from a scheduler to any rank."""

    def __init__(self, stop: StopConfig, poll_steps: int) -> None:
        self.stop = stop
        self.poll_steps = poll_steps
        self.started = time.monotonic()
        signals.install()

    def reason(self, progress: Progress, *, beginning: bool = False) -> str | None:
        """Return why to stop at this step, the same on every rank; None to continue.

        The ranks exchange signals and elapsed time every ``poll_steps`` steps. They also do so at the ``beginning``,
        because a signal may have arrived while the run was built.
        """
        # These two need no exchange: every rank has the same progress.
        if self.stop.epoch is not None and progress.fraction >= self.stop.epoch:
            return f"stop.epoch={self.stop.epoch}"
        if self.stop.steps is not None and progress.step >= self.stop.steps:
            return f"stop.steps={self.stop.steps}"
        if not (beginning or progress.step % self.poll_steps == 0 or collectives.world_size() == 1):
            return None
        if collectives.any_rank(signals.stop_requested()):
            return SIGNAL
        minutes = self.stop.minutes
        if minutes is not None and collectives.any_rank(time.monotonic() - self.started >= 60 * minutes):
            return f"stop.minutes={minutes}"
        return None


def last_step(stop: StopConfig, steps_per_epoch: int, total_steps: int) -> int:
    """Return the step after which a command ends at the latest: its ``stop`` or the end of the run, the earlier one."""
    ends = [total_steps]
    ends += [stop.steps] if stop.steps is not None else []
    ends += [stop.epoch * steps_per_epoch] if stop.epoch is not None else []
    return min(ends)
