"""The report that is drawn in a process of its own, after a run or a comparison."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline.commands import as_started
from pipeline.distributed import signals
from pipeline.errors import SOURCE

SECONDS = 120
"""Seconds after which the drawing is ended. Nothing waits for it but the end of the command."""
SWITCH = "PIPELINE_REPORT"
"""Environment variable that turns the drawing off: ``0``, as a command sets it for the runs that it starts itself. They
are in the report of that command; a picture of each would only cost time. So do the tests, which train a lot."""


def draws() -> bool:
    """Return whether this command draws a report at its end."""
    return os.environ.get(SWITCH) != "0"


def undrawn_environment() -> dict[str, str]:
    """Return the environment of a command that this one starts, and whose runs are in this one's report."""
    return {**os.environ, SWITCH: "0"}


def common_folder(folders: Sequence[Path]) -> Path:
    """Return the folder that has all of them, relative to the current one if all are."""
    alike = folders if not any(folder.is_absolute() for folder in folders) else [each.absolute() for each in folders]
    return Path(os.path.commonpath(alike))


def draw_report(folders: Sequence[Path], out: Path) -> None:
    """Write the report of the runs in ``folders`` to ``out``, and print where it is.

    A failure, and more than ``SECONDS``, is one line of warning. A signal to stop ends the drawing.
    """
    if not draws() or signals.stop_requested():
        return
    again = as_started(f"python pipeline/report.py {shlex.join(map(str, folders[:3]))}")
    command = [sys.executable, str(SOURCE / "pipeline" / "report.py"), *map(str, folders), f"out={out}"]
    # Without a GPU: the report needs none, and this process may have filled its memory.
    environment = {**undrawn_environment(), "CUDA_VISIBLE_DEVICES": ""}
    reason = _run(command, environment)
    if signals.stop_requested():
        return
    more = " …" if len(folders) > 3 else ""
    print(
        f"report: {out}" if reason is None else f"warning: no report ({reason}); to draw it: {again}{more}", flush=True
    )


def _run(command: list[str], environment: dict[str, str]) -> str | None:
    """Run the command for at most ``SECONDS``, and return why it failed; None if it did not."""
    try:
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
    except OSError as error:
        return str(error.strerror)
    with process, signals.forward_to(process.kill):
        try:
            _, errors = process.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            return f"it took more than {SECONDS} seconds"
    if process.returncode == 0:
        return None
    lines = errors.decode(errors="replace").strip().splitlines()
    return lines[-1].removeprefix("error: ")[:300] if lines else f"exit code {process.returncode}"
