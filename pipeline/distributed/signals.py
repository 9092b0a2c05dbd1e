"""The notice that a scheduler gives before it takes the machine away: a signal, from the first moment of a process on.

Imports nothing that takes time, so that an entry point listens before it loads the rest.
"""

from __future__ import annotations

import atexit
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

_given = False
_followers: list[Callable[[], None]] = []


def listen() -> None:
    """Note the signals from now on, instead of ending by them, to the very end of the process."""
    for number in STOP_SIGNALS:
        signal.signal(number, _note)
    atexit.register(_ignore)


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


def _note(_number: int, _frame: FrameType | None) -> None:
    global _given
    _given = True
    for tell in _followers.copy():  # other threads change it meanwhile
        tell()
