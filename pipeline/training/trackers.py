"""Experiment trackers, which may fail: what a run needs is its folder, and a lost tracker costs a line."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from accelerate import Accelerator
from tqdm import tqdm

from pipeline.errors import one_line


def begin_trackers(accelerator: Accelerator, project: str, options: dict[str, dict[str, Any]]) -> None:
    """Begin the Accelerator's trackers, each with its own ``options``; one that fails, now or later, is left out."""
    _silence_threads()
    begun: list[Any] = []
    for name in list(accelerator.log_with):
        accelerator.log_with, accelerator.trackers = [name], []
        if _attempt(str(name), lambda: accelerator.init_trackers(project, init_kwargs=options)):
            begun += map(_TolerantTracker, accelerator.trackers)
    accelerator.trackers = begun


class _TolerantTracker:
    """A tracker of Accelerate that is asked no more once it has failed."""

    def __init__(self, tracker: Any) -> None:
        self._tracker = tracker
        self._is_lost = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tracker, name)

    def log(self, values: dict[str, Any], step: int | None = None, **options: Any) -> None:
        self._ask(lambda: self._tracker.log(values, step=step, **options))

    def finish(self) -> None:
        self._ask(self._tracker.finish)

    def _ask(self, work: Callable[[], None]) -> None:
        self._is_lost = self._is_lost or not _attempt(self._tracker.name, work)


def _attempt(name: str, work: Callable[[], None]) -> bool:
    """Do the work of a tracker and return whether it could be done; say so where it could not."""
    try:
        work()
    except Exception as error:  # a service, its client, the network, the disk: nearly anything
        reason = f"{type(error).__name__}: {one_line(error, 200)}"
        tqdm.write(f"warning: journal.trackers: {name} failed ({reason}); training goes on without it")
        return False
    return True


def _silence_threads() -> None:
    """Let TensorBoard's own thread not print a traceback: what ends it is raised where the next value is given."""
    before = threading.excepthook

    def hook(args: threading.ExceptHookArgs) -> None:
        if not type(args.thread).__module__.startswith("tensorboard"):
            before(args)

    threading.excepthook = hook
