"""Signals to stop, from a scheduler or the terminal, handled from the start of a process to its end.

A first Ctrl-C is a signal like any other; a second one ends the process at once. This module imports nothing slow, so
that an entry point can handle signals before it loads the rest.
"""

from __future__ import annotations

import atexit
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Thread
from types import FrameType
from typing import NoReturn

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
SAME_KEY_PRESS_SECONDS = 1.0
"""Seconds within which two SIGINT count as one Ctrl-C: the terminal sends it to every process, the launcher again."""
KILLED_MESSAGE = b"ended at once; the last save is complete, and the same command continues\n"

_requested = False
_forward_targets: list[Callable[[], None]] = []
_watched = False


def install() -> None:
    """Record the signals from now on, and keep them from ending the process, until it has exited."""
    for number in STOP_SIGNALS:
        # A shell makes its background jobs ignore Ctrl-C, and they should go on doing so.
        if number != signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _handle)
    _start_watcher()
    atexit.register(_ignore_signals)


def exit_quietly_on_interrupt() -> None:
    """Exit on Ctrl-C with one line from now on, for a command that has nothing to save."""
    signal.signal(signal.SIGINT, _exit_quietly)


def stop_requested() -> bool:
    """Return whether this process has received a signal to stop."""
    return _requested


@contextmanager
def forward_to(forward: Callable[[], None]) -> Iterator[None]:
    """Call ``forward`` when a signal comes inside the context, and at once if one has come already. In any thread."""
    _forward_targets.append(forward)
    try:
        if _requested:
            forward()
        yield
    finally:
        _forward_targets.remove(forward)


def _ignore_signals() -> None:
    # Python drops its handlers before the slow part of its exit, where a repeated signal would kill it.
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _handle(number: int, _frame: FrameType | None) -> None:
    global _requested
    if number == signal.SIGINT and not _requested and not _forward_targets and _is_first_rank() and os.isatty(2):
        os.write(2, b"\nstopping at the next step, and saving; Ctrl-C once more ends at once\n")
    _requested = True
    for forward in _forward_targets.copy():  # other threads change the list meanwhile
        forward()


def _exit_quietly(_number: int, _frame: FrameType | None) -> NoReturn:
    if _is_first_rank():
        os.write(2, b"stopped by Ctrl-C\n")
    raise SystemExit(128 + signal.SIGINT)


def _is_first_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _start_watcher() -> None:
    """Start a thread that sees every signal: handlers run in the main thread only, which may wait inside a library."""
    global _watched
    if not _watched:
        _watched = True
        # Python writes each signal's number into the pipe at once, even while the main thread cannot run a handler.
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        Thread(target=_exit_on_second_interrupt, args=(reading,), daemon=True).start()


def _exit_on_second_interrupt(pipe: int) -> None:
    first = None
    while received := os.read(pipe, 1):
        if received[0] == signal.SIGINT and signal.getsignal(signal.SIGINT) == _handle:
            now = time.monotonic()
            first = first or now
            if now - first > SAME_KEY_PRESS_SECONDS:
                if _is_first_rank():
                    os.write(2, KILLED_MESSAGE)
                os._exit(128 + signal.SIGINT)
