"""The word to stop: a signal of a scheduler or of the terminal, from the first moment of a process on.

A first Ctrl-C is a word like any other, a second one ends the process at once. Imports nothing that takes time, so that
an entry point listens before it loads the rest.
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
"""Seconds within which two Ctrl-C are one: a launcher passes on what the terminal has sent to everybody already."""
KILLED_MESSAGE = b"ended at once; what was saved last is whole, and the same command continues\n"

_requested = False
_forward_targets: list[Callable[[], None]] = []
_watched = False


def install() -> None:
    """Note the signals from now on, instead of ending by them, to the very end of the process."""
    for number in STOP_SIGNALS:
        # A shell lets what runs in its background ignore the terminal.
        if number != signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _handle)
    _watch()
    atexit.register(_ignore)


def exit_quietly_on_interrupt() -> None:
    """End by Ctrl-C in one line from now on: for a command that has nothing to save."""
    signal.signal(signal.SIGINT, _leave)


def stop_requested() -> bool:
    """Whether this process was told to stop."""
    return _requested


@contextmanager
def forward_to(forward: Callable[[], None]) -> Iterator[None]:
    """Call ``tell`` when a notice comes inside the context, and at once if it has come already. In any thread."""
    _forward_targets.append(forward)
    try:
        if _requested:
            forward()
        yield
    finally:
        _forward_targets.remove(forward)


def _ignore() -> None:
    # Python gives up its own handlers before what takes long at its end, and would die of a notice that is repeated.
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _handle(number: int, _frame: FrameType | None) -> None:
    global _requested
    if number == signal.SIGINT and not _requested and not _forward_targets and _is_first() and os.isatty(2):
        os.write(2, b"\nstopping at the next step, and saving; Ctrl-C once more ends at once\n")
    _requested = True
    for tell in _forward_targets.copy():  # other threads change it meanwhile
        tell()


def _leave(_number: int, _frame: FrameType | None) -> NoReturn:
    if _is_first():
        os.write(2, b"stopped by Ctrl-C\n")
    raise SystemExit(128 + signal.SIGINT)


def _is_first() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _watch() -> None:
    """Let a thread see every signal: the main one, which alone runs handlers, may be waiting within a library."""
    global _watched
    if not _watched:
        _watched = True
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        Thread(target=_end_by_the_second, args=(reading,), daemon=True).start()


def _end_by_the_second(signals: int) -> None:
    first = None
    while told := os.read(signals, 1):
        if told[0] == signal.SIGINT and signal.getsignal(signal.SIGINT) == _handle:
            now = time.monotonic()
            first = first or now
            if now - first > SAME_KEY_PRESS_SECONDS:
                if _is_first():
                    os.write(2, KILLED_MESSAGE)
                os._exit(128 + signal.SIGINT)
