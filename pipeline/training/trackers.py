"""Experiment trackers of a run, which needs only its folder: a tracker that fails is dropped with a warning."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from accelerate import Accelerator
from tqdm import tqdm

from pipeline.errors import one_line


def begin_trackers(accelerator: Accelerator, project: str, options: dict[str, dict[str, Any]]) -> None:
    """Start the Accelerator's trackers, each with its own ``options``; drop one that fails, now or later."""
    _silence_threads()
    started: list[Any] = []
    # One at a time, so that an error of one tracker does not stop those after it.
    for name in list(accelerator.log_with):
        accelerator.log_with, accelerator.trackers = [name], []
        if _attempt(str(name), lambda: accelerator.init_trackers(project, init_kwargs=options)):
            started += map(_TolerantTracker, accelerator.trackers)
    accelerator.trackers = started


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
