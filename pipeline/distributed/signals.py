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
ONE_KEY = 1.0
"""Seconds within which two Ctrl-C are one: a launcher passes on what the terminal has sent to everybody already."""
AT_ONCE = b"ended at once; what was saved last is whole, and the same command continues\n"

_given = False
_followers: list[Callable[[], None]] = []
_watched = False


def listen() -> None:
    """Note the signals from now on, instead of ending by them, to the very end of the process."""
    for number in STOP_SIGNALS:
        # A shell lets what runs in its background ignore the terminal.
        if number != signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _note)
    _watch()
    atexit.register(_ignore)


def leave_quietly() -> None:
    """End by Ctrl-C in one line from now on: for a command that has nothing to save."""
    signal.signal(signal.SIGINT, _leave)


def given() -> bool:
    """Whether this process was told to stop."""
    return _given


@contextmanager
def passed_on(tell: Callable[[], None]) -> Iterator[None]:
    """Call ``tell`` when a notice comes inside the context, and at once if it has come already. In any thread."""
    _followers.append(tell)
    try:
        if _given:
            tell()
        yield
    finally:
        _followers.remove(tell)


def _ignore() -> None:
    # Python gives up its own handlers before what takes long at its end, and would die of a notice that is repeated.
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _note(number: int, _frame: FrameType | None) -> None:
    global _given
    if number == signal.SIGINT and not _given and not _followers and _is_first() and os.isatty(2):
        os.write(2, b"\nstopping at the next step, and saving; Ctrl-C once more ends at once\n")
    _given = True
    for tell in _followers.copy():  # other threads change it meanwhile
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
        if told[0] == signal.SIGINT and signal.getsignal(signal.SIGINT) == _note:
            now = time.monotonic()
            first = first or now
            if now - first > ONE_KEY:
                if _is_first():
                    os.write(2, AT_ONCE)
                os._exit(128 + signal.SIGINT)
