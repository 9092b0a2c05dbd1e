"""The progress of a command for its user: a bar in a terminal, a line a minute in a log.

It moves at every step and never waits for the device: loss, accuracy and speed are those of the journal's last line.
"""

from __future__ import annotations

import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

from tqdm import tqdm

from pipeline.batch import Progress

SECONDS_PER_LINE = 60.0
"""Seconds between two lines in a log."""
BAR_SECONDS = 0.1
"""Shortest time between two drawings of the bar, in seconds."""
_BAR = "{desc} {n_fmt}/{total_fmt} |{bar}| {elapsed}<{remaining}{postfix}"


@dataclass
class Values:
    """The values that the last line of the journal has, and those of the last evaluation; None if there is none."""

    loss: float | None = None
    train: float | None = None
    """The task's metric on the training images of a step, in percent."""
    images_per_second: float | None = None
    data_wait: float | None = None
    """Share of the time in which the step waits for data."""
    validation: float | None = None
    """The task's main metric on the validation images, in percent."""
    best: float | None = None

    def describe(self, rate: float) -> str:
        """Return the known values and the learning rate as text, the most important first."""
        texts = {
            "loss {:.3f}": self.loss,
            "train {:.1f}": self.train,
            "val {:.2f}": self.validation,
            "best {:.2f}": self.best,
            "lr {:.3g}": rate,
            "{:.0f} img/s": self.images_per_second,
            "wait {:.0%}": self.data_wait,
        }
        return " ".join(text.format(value) for text, value in texts.items() if value is not None)


class ProgressDisplay(ABC):
    """What the user sees of the steps of one command, which ends after ``last_step`` at the latest."""

    def __init__(self, progress: Progress, epochs: int, last_step: int) -> None:
        self.progress = progress
        self.epochs = epochs
        self.last_step = max(last_step, progress.step)
        self.values = Values()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    @abstractmethod
    def tick(self, progress: Progress, rate: float) -> None:
        """Show that a step has ended, at ``progress`` and with the learning rate ``rate``."""

    @abstractmethod
    def show_phase(self, phase: str) -> None:
        """Show what the command does between two steps, such as validating; the empty text ends it."""

    def show_evaluation(self, value: float, best: float) -> None:
        """Show the main metric of an evaluation, and its best so far, from now on."""
        self.values.validation, self.values.best = value, best

    @property
    def epoch(self) -> str:
        """Return the epoch of the last step, counted from 1, and the number of epochs."""
        number = -(-self.progress.step // self.progress.steps_per_epoch)  # rounded up
        return f"epoch {max(number, 1)}/{self.epochs}"


class TerminalBar(ProgressDisplay):
    """A bar on standard error. It is drawn again at every step, but at most once in ``BAR_SECONDS``."""

    def __enter__(self) -> Self:
        self.rate = 0.0
        self.bar: tqdm[Any] = tqdm(
            desc=self.epoch,
            total=self.last_step,
            initial=self.progress.step,
            bar_format=_BAR,
            miniters=1,
            mininterval=BAR_SECONDS,
            smoothing=0,  # the mean rate of this command, so that the time that is left contains evaluations, too
            dynamic_ncols=True,
        )
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def tick(self, progress: Progress, rate: float) -> None:
        """Move the bar to ``progress``."""
        self.progress, self.rate = progress, rate
        self._set_texts()
        self.bar.update(progress.step - self.bar.n)

    def show_phase(self, phase: str) -> None:
        """Draw the bar with the phase after the epoch."""
        self.bar.set_description_str(f"{self.epoch} {phase}".rstrip())

    def show_evaluation(self, value: float, best: float) -> None:
        """Draw the bar with the new value."""
        super().show_evaluation(value, best)
        self._set_texts()
        self.bar.refresh()

    def _set_texts(self) -> None:
        self.bar.set_description_str(self.epoch, refresh=False)
        self.bar.set_postfix_str(self.values.describe(self.rate), refresh=False)


class LogLines(ProgressDisplay):
    """A line on standard output at the start, each minute, and at the end of each epoch and of the command."""

    def __init__(
        self, progress: Progress, epochs: int, last_step: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__(progress, epochs, last_step)
        self.clock = clock

    def __enter__(self) -> Self:
        self.first_step, self.began = self.progress.step, self.clock()
        if self.first_step < self.last_step:
            self._print("training begins", self.began)
        return self

    def tick(self, progress: Progress, rate: float) -> None:
        """Print a line, if one is due."""
        self.progress, now = progress, self.clock()
        if now - self.printed >= SECONDS_PER_LINE or progress.epoch_ended or progress.step == self.last_step:
            steps = progress.step - self.first_step
            left = (now - self.began) / steps * (self.last_step - progress.step)
            self._print(f"{self.values.describe(rate)} ETA {tqdm.format_interval(left)}", now)

    def show_phase(self, phase: str) -> None:
        """Print nothing: the line of an epoch's end is already there, and the accuracy follows."""

    def _print(self, text: str, now: float) -> None:
        self.printed = now
        print(f"step {self.progress.step}/{self.last_step}, {self.epoch}: {text}", flush=True)


def open_display(progress: Progress, epochs: int, last_step: int) -> ProgressDisplay:
    """Return a bar if standard error is a terminal, otherwise lines for a log. Enter it before the first step."""
    kind = TerminalBar if sys.stderr is not None and sys.stderr.isatty() else LogLines
    return kind(progress, epochs, last_step)
