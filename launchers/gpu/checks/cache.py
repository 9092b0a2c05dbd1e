"""Check a teacher's cache: it verifies, and training from it matches the live teacher within float16's precision."""

from __future__ import annotations

import contextlib
import io
import shutil
from pathlib import Path

from options import Options
from stages import short_run

from checks import CheckAnswer, answer, journal_losses, reset_accelerator, train_short
from pipeline import cache_teacher

_LARGEST_DIFFERENCE = 1e-2
"""Relative difference of a loss, due to the cache's float16."""


def check(options: Options, folder: Path) -> CheckAnswer:
    """Write a cache of two views, verify it, and compare the losses of a few steps with the live teacher's."""
    for name in ("cache", "live", "cached"):
        shutil.rmtree(folder / name, ignore_errors=True)
    args = [*short_run(options, "kd"), "teacher.batch=16", "data.views=2"]
    cached_args, printed = [*args, f"teacher.cache={folder / 'cache'}"], io.StringIO()
    with contextlib.redirect_stdout(printed):
        for flags in ([], ["--verify"]):
            reset_accelerator()
            try:
                cache_teacher.main([*flags, *cached_args])
            except SystemExit:  # the reason has been printed
                last = printed.getvalue().splitlines()[-1:]
                return answer("Teacher's cache", ["", ""], [["verified", *last]], ["the cache does not verify", *last])
    steps = f"stop.steps={4 if options.rehearse else 20}"
    live = journal_losses(train_short(folder / "live", *args, steps))
    cached = journal_losses(train_short(folder / "cached", *cached_args, steps))
    difference = max(abs(a - b) / abs(a) for a, b in zip(live, cached, strict=True))
    problems = (
        []
        if difference <= _LARGEST_DIFFERENCE
        else [f"the loss from the cache differs from the live teacher's by {difference:.1e}"]
    )
    rows = [["verified", printed.getvalue().splitlines()[-1]], ["largest difference of the loss", f"{difference:.1e}"]]
    return answer("Teacher's cache", ["", ""], rows, problems)
