"""What every entry point does around its own work: help, lost output, and errors in one line with exit code 2."""

from __future__ import annotations

import faulthandler
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO, cast

import torch

from pipeline.errors import AlreadyReported, Interrupted, one_line


def entry(main: Callable[[Sequence[str]], None]) -> None:
    """Run an entry point on the command line's words; what a user can mend ends in one line and exit code 2."""
    with suppress(OSError, ValueError, RuntimeError):  # where standard error is closed, or no file
        faulthandler.enable()  # a crash in C code, or a mapped file that somebody cut, says where it was
    words = sys.argv[1:]
    if {"-h", "--help"} & set(words):
        print(sys.modules["__main__"].__doc__)
        return
    with survive_lost_output():
        try:
            main(words)
        except Interrupted as unfinished:
            print(unfinished)
        except AlreadyReported:
            sys.exit(2)
        except (ValueError, OSError, RuntimeError) as error:
            line = _user_message(error)
            if line is None or os.environ.get("PIPELINE_TRACEBACK"):
                raise
            print(f"error: {line}", file=sys.stderr)
            sys.exit(2)


@contextmanager
def survive_lost_output() -> Iterator[None]:
    """Let the command go on where its terminal, its pipe or the disk of its log is lost: that costs a line."""
    before = sys.stdout, sys.stderr
    with Path(os.devnull).open("w") as nowhere:  # in place of one that was closed when the command began
        out, err = (
            LossyStream("standard output", sys.stdout or nowhere),
            LossyStream("standard error", sys.stderr or nowhere),
        )
        out.other, err.other = err, out
        sys.stdout, sys.stderr = cast(TextIO, out), cast(TextIO, err)
        try:
            yield
        finally:
            out.end()
            err.end()
            sys.stdout, sys.stderr = before


class LossyStream:
    """A standard stream; what it cannot write is dropped, after one line on the ``other``."""

    def __init__(self, name: str, stream: TextIO) -> None:
        self.name = name
        self.stream = stream
        self.is_lost = False
        self.other: LossyStream | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Write, or drop, the text."""
        self._attempt(lambda: self.stream.write(text))
        return len(text)

    def flush(self) -> None:
        """Write what is still in the buffer, or keep it for later."""
        self._attempt(self.stream.flush)

    def end(self) -> None:
        """Write or drop what is left, so that Python's own end has no complaint."""
        self.flush()
        try:
            self.stream.flush()
        except (OSError, ValueError):
            self._drop()

    def _attempt(self, work: Callable[[], object]) -> None:
        try:
            work()
        except (OSError, ValueError) as error:
            if isinstance(error, BrokenPipeError):  # for ever; a full disk may have room later
                self._drop()
            if not self.is_lost and self.other:
                self.is_lost = True
                self.other.write(f"warning: {self.name} is lost ({error}); the command goes on without it\n")

    def _drop(self) -> None:
        """Let all that is still to come, also from processes begun here, go nowhere."""
        with suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())
            os.close(nowhere)


def _user_message(error: Exception) -> str | None:
    """Return what is wrong and how to mend it; None for what a user cannot mend."""
    told = one_line(error)
    if isinstance(error, torch.OutOfMemoryError):
        return f"{told.partition('. ')[0]}; lower batch, or raise accumulation, which splits it"
    # Known by name: to import the compiler's errors takes a second.
    if any(kind.__module__ in ("torch._dynamo.exc", "torch._inductor.exc") for kind in type(error).__mro__):
        return f"torch cannot compile: {told[:300]}; mend that, or leave the recipe's compile out"
    return None if isinstance(error, RuntimeError) else told
