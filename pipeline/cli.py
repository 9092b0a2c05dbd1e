"""What every entry point does around its own work: help, and errors in one line with exit code 2."""

from __future__ import annotations

import faulthandler
import os
import sys
from collections.abc import Callable, Sequence

import torch

from pipeline.errors import Unfinished


def entry(main: Callable[[Sequence[str]], None]) -> None:
    """Run an entry point on the command line's words; what a user can mend ends in one line and exit code 2."""
    faulthandler.enable()  # a crash in C code, or a mapped file that somebody cut, says where it was
    words = sys.argv[1:]
    if {"-h", "--help"} & set(words):
        print(sys.modules["__main__"].__doc__)
        return
    try:
        main(words)
    except Unfinished as unfinished:
        print(unfinished)
    except (ValueError, OSError, RuntimeError) as error:
        line = _one_line(error)
        if line is None or os.environ.get("PIPELINE_TRACEBACK"):
            raise
        print(f"error: {line}", file=sys.stderr)
        sys.exit(2)


def _one_line(error: Exception) -> str | None:
    """Return what is wrong and how to mend it; None for what a user cannot mend."""
    told = " ".join(str(error).split())
    if isinstance(error, torch.OutOfMemoryError):
        return f"{told.partition('. ')[0]}; lower batch, or raise accumulation, which splits it"
    # Known by name: to import the compiler's errors takes a second.
    if any(kind.__module__ in ("torch._dynamo.exc", "torch._inductor.exc") for kind in type(error).__mro__):
        return f"torch cannot compile: {told[:300]}; mend that, or leave the recipe's compile out"
    return None if isinstance(error, RuntimeError) else told
