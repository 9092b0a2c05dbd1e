"""Experiment trackers of a run, which needs only its folder: a tracker that fails is dropped with a warning."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

from accelerate import Accelerator
from tqdm import tqdm

from pipeline.errors import one_line
from pipeline.runs.identity import Run
from pipeline.training.tracked_run import NAMED, options_of, project_of, send_configuration


def begin_trackers(accelerator: Accelerator, run: Run, step: int, values: dict[str, Any]) -> None:
    """Start the Accelerator's trackers of a run that begins, or continues after ``step``; drop one that fails.

    ``values`` are the run's configuration. Only the main process calls this.
    """
    _silence_threads()
    started: list[Any] = []
    # One at a time, so that an error of one tracker does not stop those after it.
    for tracker in list(accelerator.log_with):
        accelerator.log_with, accelerator.trackers = [tracker], []
        begin = partial(_begin, accelerator, str(tracker), run, step, values)
        if _attempt(str(tracker), begin):
            started += map(_TolerantTracker, accelerator.trackers)
    accelerator.trackers = started


def _begin(accelerator: Accelerator, name: str, run: Run, step: int, values: dict[str, Any]) -> None:
    """Start the only tracker in ``accelerator.log_with``, and send it the configuration of the run."""
    journal = run.recipe.journal
    if name not in (*NAMED, "tensorboard") and (journal.name or journal.tags):
        tqdm.write(f"note: journal.name and journal.tags: not known to {name}; only {' and '.join(NAMED)} get them")
    accelerator.init_trackers(project_of(name, run), init_kwargs={name: options_of(name, run, step)})
    for tracker in accelerator.trackers:
        send_configuration(tracker, name, run, values, step)


class _TolerantTracker:
    """A tracker of Accelerate that is not called again once it has failed."""

    def __init__(self, tracker: Any) -> None:
        self._tracker = tracker
        self._failed = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tracker, name)

    def log(self, values: dict[str, Any], step: int | None = None, **options: Any) -> None:
        self._call(lambda: self._tracker.log(values, step=step, **options))

    def finish(self) -> None:
        self._call(self._tracker.finish)

    def _call(self, work: Callable[[], None]) -> None:
        self._failed = self._failed or not _attempt(self._tracker.name, work)


def _attempt(name: str, work: Callable[[], None]) -> bool:
    """Run a tracker's ``work`` and return whether it succeeded; print a warning if it did not."""
    try:
        work()
    except Exception as error:  # a service, its client, the network or the disk may raise nearly anything
        reason = f"{type(error).__name__}: {one_line(error, 200)}"
        tqdm.write(f"warning: journal.trackers: {name} failed ({reason}); training continues without it")
        return False
    return True


def _silence_threads() -> None:
    """Keep TensorBoard's own thread from printing a traceback: its error is raised again at the next logged value."""
    before = threading.excepthook

    def hook(args: threading.ExceptHookArgs) -> None:
        if not type(args.thread).__module__.startswith("tensorboard"):
            before(args)

    threading.excepthook = hook
