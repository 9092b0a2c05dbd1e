"""The frame of every entry point: help, lost output, and a user's errors in one line with exit code 2."""

from __future__ import annotations

import faulthandler
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO, cast

from pipeline.commands import as_started
from pipeline.errors import EXIT_USER_ERROR, AlreadyReported, Interrupted, one_line


def entry(main: Callable[[Sequence[str]], None]) -> None:
    """Run an entry point with the command line's arguments; a user's error ends in one line and exit code 2."""
    with suppress(OSError, ValueError, RuntimeError):  # if standard error is closed, or not a file
        faulthandler.enable()  # a traceback for crashes in C code, and for a mapped file that was truncated
    args = sys.argv[1:]
    if "" not in sys.path:  # the current folder, last: a user's own networks and losses are found there
        sys.path.append("")
    with survive_lost_output():
        try:
            main(args)
        except Interrupted as interrupted:
            print(interrupted)
        except AlreadyReported:
            sys.exit(EXIT_USER_ERROR)
        except (ValueError, OSError, RuntimeError) as error:
            # Of a RuntimeError only a few are a user's; the others keep their traceback.
            line = user_message(error)
            if line is None or os.environ.get("PIPELINE_TRACEBACK"):
                raise
            print(f"error: {as_started(line)}", file=sys.stderr)
            sys.exit(EXIT_USER_ERROR)


def answer_help(text: str | None) -> None:
    """Print the text and end the process, if the command line asks for help.

    An entry point calls it before its slow imports, so this module has none.
    """
    if {"-h", "--help"} & {*sys.argv[1:]}:
        with survive_lost_output():
            print_answer(as_started(text or ""))
        sys.exit()


@contextmanager
def survive_lost_output() -> Iterator[None]:
    """Let the command continue if its terminal, its pipe or its log's disk is lost, with one line of warning."""
    before = sys.stdout, sys.stderr
    with Path(os.devnull).open("w") as nowhere:  # replaces a stream that was closed from the start
        out, err = (
            LossyStream("standard output", sys.stdout or nowhere),
            LossyStream("standard error", sys.stderr or nowhere),
        )
        out.other, err.other = err, out  # the other stream may still work, and can show the warning
        sys.stdout, sys.stderr = cast(TextIO, out), cast(TextIO, err)
        try:
            yield
        finally:
            out.end()
            err.end()
            sys.stdout, sys.stderr = before


def print_answer(text: object) -> None:
    """Print the text that a command was called for; a reader that leaves before its end, such as head, is no loss."""
    if isinstance(sys.stdout, LossyStream):
        sys.stdout.reader_may_leave = True
    print(text)


class LossyStream:
    """A standard stream that drops the text it cannot write, with one warning on the ``other`` stream."""

    def __init__(self, name: str, stream: TextIO) -> None:
        self.name = name
        self.stream = stream
        self.is_lost = False
        self.reader_may_leave = False
        """Whether a broken pipe is no loss, and needs no warning."""
        self.other: LossyStream | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Write or drop the text, and return its length."""
        self._attempt(lambda: self.stream.write(text))
        return len(text)

    def flush(self) -> None:
        """Write the buffer, or keep it for later."""
        self._attempt(self.stream.flush)

    def end(self) -> None:
        """Write or drop the rest of the buffer, so that Python's own flush at exit cannot fail."""
        self.flush()
        try:
            self.stream.flush()
        except (OSError, ValueError):
            self._drop()

    def _attempt(self, write: Callable[[], object]) -> None:
        try:
            write()
        except (OSError, ValueError) as error:
            if isinstance(error, BrokenPipeError):  # a pipe stays broken; a full disk may have room later
                self._drop()
                self.is_lost |= self.reader_may_leave
            if not self.is_lost and self.other:
                self.is_lost = True
                self.other.write(f"warning: {self.name} is lost ({error}); the command goes on without it\n")

    def _drop(self) -> None:
        """Redirect the stream to the null device, for this process and its child processes."""
        with suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())
            os.close(nowhere)


def user_message(error: Exception) -> str | None:
    """Return what is wrong and how to fix it; None for an error that is not the user's."""
    message = one_line(error)
    # Compared by name, because the imports of torch and of its compiler take seconds.
    kinds = [(kind.__module__, kind.__name__) for kind in type(error).__mro__]
    if ("torch", "OutOfMemoryError") in kinds:
        return f"{message.partition('. ')[0]}; lower batch, or raise accumulation, which splits it"
    if any(module in ("torch._dynamo.exc", "torch._inductor.exc") for module, _ in kinds):
        return f"torch cannot compile: {message[:300]}; fix that, or remove compile from the recipe"
    return message if isinstance(error, ValueError | OSError) else None
