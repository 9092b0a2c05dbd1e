"""Shared parts of the commands in this package: one-line errors, signals, worker processes and progress bars."""

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

from shards.cores import usable_cores

_TaskT = TypeVar("_TaskT")
_ResultT = TypeVar("_ResultT")

USER_ERROR = 2
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""Sent by a terminal, and by a scheduler before it takes the machine away."""
LOG_SECONDS = 60
"""Seconds between two lines of a progress bar in a log file."""


class Parser(argparse.ArgumentParser):
    """An argument parser that reports errors in one line, like all other errors."""

    def error(self, message: str) -> NoReturn:
        """Raise ValueError with the message."""
        # argparse would print the usage, too, and exit here.
        raise ValueError(f"{message} (--help lists the options)")


def run_main(main: Callable[[Sequence[str] | None], int]) -> NoReturn:
    """Run ``main`` and end the process with its exit code.

    OSError and ValueError are printed as one line on stderr, with exit code 2. SIGINT, SIGTERM and SIGUSR1 unwind the
    stack, so that no half-written file remains. The exit code is then 128 + the signal's number.
    """
    with suppress(OSError, ValueError, RuntimeError):  # if standard error is closed or has no descriptor
        faulthandler.enable()
    for number in _STOP_SIGNALS:
        signal.signal(number, _unwind)
    try:
        sys.exit(main(None))
    except (OSError, ValueError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(USER_ERROR)


def _unwind(number: int, frame: FrameType | None) -> NoReturn:
    # A second signal must not interrupt the clean-up.
    for other in _STOP_SIGNALS:
        signal.signal(other, signal.SIG_IGN)
    print(f"stopped by {signal.Signals(number).name}", file=sys.stderr)
    sys.exit(128 + number)


def up_to(most: int) -> Callable[[str], int]:
    """Return a parser of integer arguments from 1 to ``most``. A larger number would run practically for ever."""

    def positive(text: str) -> int:
        if not text.isdecimal() or not 1 <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"expected a whole number from 1 to {most:,}, got {text!r}")
        return int(text)

    return positive


positive = up_to(10**7)
"""Parser of a positive integer argument."""


def seed(text: str) -> int:
    """Parse a seed: an unsigned integer of 64 bits. Raises ValueError for anything else."""
    if not 0 <= int(text) < 2**64:
        raise ValueError
    return int(text)


def share(text: str) -> float:
    """Parse a share: a number above 0 and below 1. Raises ValueError for anything else."""
    if not 0 < float(text) < 1:
        raise ValueError
    return float(text)


def add_jobs(parser: argparse.ArgumentParser) -> None:
    """Add the option ``--jobs``. Its default is one worker per core that this process may use."""
    parser.add_argument(
        "--jobs", type=up_to(1024), default=len(usable_cores()), help="worker processes (default: %(default)s)"
    )


def progress_bar(total: int | None, title: str) -> tqdm[NoReturn]:
    """Return a progress bar over images with rate and time left; in a log file it prints a line per minute.

    Without a total it shows no time left.
    """
    terminal = sys.stderr.isatty()
    pause = 0 if terminal else LOG_SECONDS
    return tqdm(total=total, desc=title, unit=" images", mininterval=pause or 0.1, delay=pause, dynamic_ncols=terminal)


def print_above(bar: tqdm[NoReturn], line: str) -> None:
    """Print a line to stderr without breaking the progress bar."""
    if sys.stderr.isatty():
        bar.write(line, file=sys.stderr)
    else:  # tqdm's write would print the bar again, as another line of the log
        print(line, file=sys.stderr, flush=True)


def for_each(
    function: Callable[[_TaskT], _ResultT], tasks: Iterable[_TaskT], jobs: int, receive: Callable[[_ResultT], None]
) -> None:
    """Call ``function`` on every task in ``jobs`` processes, and ``receive`` in this process on each finished result.

    The first exception stops all workers and is raised again. With one job everything runs in this process. Raises
    OSError if a worker process was killed.
    """
    if jobs == 1:
        for task in tasks:
            receive(function(task))
        return
    others = set(multiprocessing.active_children())
    # spawn: a fork copies the locks of threads in their current state, which may be locked. tqdm has such a thread.
    executor = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _start_worker)
    try:
        for future in as_completed([executor.submit(function, task) for task in tasks]):
            receive(future.result())
    except BrokenProcessPool:
        raise OSError(
            "a worker process was killed, perhaps because memory ran out: try again with fewer --jobs"
        ) from None
    except BaseException:
        for worker in set(multiprocessing.active_children()) - others:
            worker.kill()
        raise
    finally:
        executor.shutdown(cancel_futures=True)


def _start_worker() -> None:
    with suppress(OSError, ValueError, RuntimeError):  # if standard error is closed or has no descriptor
        faulthandler.enable()
    # A terminal and Slurm send a signal to the whole process group. The parent alone decides how to stop.
    for number in _STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    # Workers of an executor would wait for ever for a parent that was killed.
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
