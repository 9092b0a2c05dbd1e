"""A teacher's cache, written here, is whole, and training from it is training from the live teacher, to float16."""

from __future__ import annotations

import contextlib
import io
import shutil
from pathlib import Path

from options import Options
from stages import short_run

from checks import CheckAnswer, answer, forget_accelerator, losses_of, train_short
from pipeline import cache_teacher

_LARGEST_DIFFERENCE = 1e-2


def check(options: Options, folder: Path) -> CheckAnswer:
    """Write two views, verify them, and compare a few steps."""
    for name in ("cache", "live", "cached"):
        shutil.rmtree(folder / name, ignore_errors=True)
    words = [*short_run(options, "kd"), "teacher.batch=16", "data.views=2"]
    cached, printed = [*words, f"teacher.cache={folder / 'cache'}"], io.StringIO()
    with contextlib.redirect_stdout(printed):
        for flags in ([], ["--verify"]):
            forget_accelerator()
            try:
                cache_teacher.main([*flags, *cached])
            except SystemExit:  # it has said what is wrong
                last = printed.getvalue().splitlines()[-1:]
                return answer("Teacher's cache", ["", ""], [["verified", *last]], ["the cache is not verified", *last])
    steps = f"stop.steps={4 if options.rehearse else 20}"
    live, ours = (losses_of(train_short(folder / name, *w, steps)) for name, w in (("live", words), ("cached", cached)))
    difference = max(abs(a - b) / abs(a) for a, b in zip(live, ours, strict=True))
    wrong = [] if difference <= _LARGEST_DIFFERENCE else [f"cached differs from live by {difference:.1e}"]
    rows = [["verified", printed.getvalue().splitlines()[-1]], ["largest difference of the loss", f"{difference:.1e}"]]
    return answer("Teacher's cache", ["", ""], rows, wrong)
