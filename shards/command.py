"""What every command of this package shares: one-line errors, signals, worker processes and the progress bar."""

from __future__ import annotations

import argparse
import faulthandler
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from types import FrameType
from typing import NoReturn, TypeVar

from tqdm import tqdm

_TaskT = TypeVar("_TaskT")
_ResultT = TypeVar("_ResultT")

USER_ERROR = 2
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""A terminal's, and what a scheduler sends before it takes the machine away."""
LOG_SECONDS = 60


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line like all others."""

    def error(self, message: str) -> NoReturn:
        """Raise a ValueError."""
        raise ValueError(f"{message} (--help lists the options)")


def run_main(main: Callable[[Sequence[str] | None], int]) -> NoReturn:
    """Run ``main`` and end the process with its exit code.

    What the user or the machine got wrong is one line on stderr and exit code 2; SIGINT, SIGTERM and SIGUSR1 unwind, so
    that nothing half-written stays, and exit with 128 + the signal's number.
    """
    with suppress(OSError, ValueError, RuntimeError):  # where standard error is closed, or no file
        faulthandler.enable()
    for number in _STOP_SIGNALS:
        signal.signal(number, _unwind)
    try:
        sys.exit(main(None))
    except (OSError, ValueError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(USER_ERROR)


def _unwind(number: int, frame: FrameType | None) -> NoReturn:
    for again in _STOP_SIGNALS:
        signal.signal(again, signal.SIG_IGN)
    print(f"stopped by {signal.Signals(number).name}", file=sys.stderr)
    sys.exit(128 + number)


def up_to(most: int) -> Callable[[str], int]:
    """Return a parser of integer arguments from 1 to ``most``, beyond which no machine would come to an end."""

    def positive(text: str) -> int:
        if not text.isdecimal() or not 1 <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"expected a whole number from 1 to {most:,}, got {text!r}")
        return int(text)

    return positive


positive = up_to(10**7)
"""Parses a positive integer argument."""


def seed(text: str) -> int:
    """Parse a seed: an integer of 64 bits, not negative."""
    if not 0 <= int(text) < 2**64:
        raise ValueError
    return int(text)


def share(text: str) -> float:
    """Parse a share: a number above 0 and below 1."""
    if not 0 < float(text) < 1:
        raise ValueError
    return float(text)


def add_jobs(parser: argparse.ArgumentParser) -> None:
    """Add ``--jobs``; without it every core that this process may use works."""
    parser.add_argument(
        "--jobs", type=up_to(1024), default=len(os.sched_getaffinity(0)), help="worker processes (default: %(default)s)"
    )


def progress_bar(total: int, what: str) -> tqdm[NoReturn]:
    """Return a bar over images with rate and time left; in a log file it stays silent for a minute between lines."""
    terminal = sys.stderr.isatty()
    pause = 0 if terminal else LOG_SECONDS
    return tqdm(total=total, desc=what, unit=" images", mininterval=pause or 0.1, delay=pause, dynamic_ncols=terminal)


def print_above(bar: tqdm[NoReturn], line: str) -> None:
    """Print a line to stderr without harm to the bar; in a log file the bar's own ``write`` would add a line of it."""
    if sys.stderr.isatty():
        bar.write(line, file=sys.stderr)
    else:
        print(line, file=sys.stderr, flush=True)


def for_each(
    function: Callable[[_TaskT], _ResultT], tasks: Iterable[_TaskT], jobs: int, receive: Callable[[_ResultT], None]
) -> None:
    """Call ``function`` on every task in ``jobs`` processes, and ``receive`` here on each result as it comes.

    The first exception ends it, and the workers. One job runs in this process.
    """
    if jobs == 1:
        for task in tasks:
            receive(function(task))
        return
    others = set(multiprocessing.active_children())
    # spawn: a fork copies the locks of threads (the progress bar has one) in whatever state they are.
    executor = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _start_worker)
    try:
        for future in as_completed([executor.submit(function, task) for task in tasks]):
            receive(future.result())
    except BrokenProcessPool:
        raise OSError("a worker process was killed, perhaps for want of memory: try again with fewer --jobs") from None
    except BaseException:
        for worker in set(multiprocessing.active_children()) - others:
            worker.kill()
        raise
    finally:
        executor.shutdown(cancel_futures=True)


def _start_worker() -> None:
    with suppress(OSError, ValueError, RuntimeError):  # where standard error is closed, or no file
        faulthandler.enable()
    # A terminal and Slurm signal the whole process group; how to end is for the parent to decide.
    for number in _STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    # The executor's workers wait for ever on a parent that was killed.
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
