"""Execution of a stage as a process with a time limit, and the file of its result."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from stages import HalfHourStage

from shards.manifest import write_atomically

PASSED, FAILED, OUT_OF_TIME = "passed", "FAILED", "no time"
STAGE_RESULT, ANSWER, LOG = "result.json", "answer.json", "log.txt"
GRACE_SECONDS = 10.0
"""Seconds between SIGTERM and SIGKILL for a stage that exceeds its time limit."""


@dataclass(frozen=True)
class StageResult:
    """The result of a stage."""

    name: str
    status: str
    seconds: float = 0.0
    reason: str = ""
    command: str = ""
    answer: dict[str, Any] = field(default_factory=dict)
    """Answer of a check: ``passed``, ``title``, ``columns``, ``rows``, ``notes``."""

    @property
    def passed(self) -> bool:
        """Return whether the stage succeeded, and need not run again."""
        return self.status == PASSED

    def __str__(self) -> str:
        return f"{self.status:<8}{self.seconds:6.1f} s  {self.name:<22}{self.reason}".rstrip()

    @classmethod
    def out_of_time(cls, stage: HalfHourStage) -> StageResult:
        """Return the result of a stage that could not begin within the command's minutes."""
        return cls(
            stage.name, OUT_OF_TIME, reason="run the same command again to continue here", command=stage.command_line
        )


def run_stage(stage: HalfHourStage, folder: Path, seconds: float) -> StageResult:
    """Run a stage for at most ``seconds``, and write and return its result."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ANSWER).unlink(missing_ok=True)
    began = time.monotonic()
    with (folder / LOG).open("wb") as log:
        args = [arg.replace("{folder}", str(folder)) for arg in stage.args]
        environment = {**os.environ, **stage.environment}
        process = subprocess.Popen(
            args,
            cwd=stage.folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a process group of its own, to end the stage with all its children
        )
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            _end(process)
    answer = json.loads((folder / ANSWER).read_text()) if (folder / ANSWER).is_file() else {}
    spent = round(time.monotonic() - began, 1)
    reason = _reason(status, seconds, answer, folder / LOG)
    return write_stage_result(
        folder, StageResult(stage.name, FAILED if reason else PASSED, spent, reason, stage.command_line, answer)
    )


def write_stage_result(folder: Path, result: StageResult) -> StageResult:
    """Write the result of a stage, and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / STAGE_RESULT, (json.dumps(asdict(result), indent=1) + "\n").encode())
    return result


def read_stage_result(folder: Path) -> StageResult | None:
    """Return the result of a stage, None if it has not ended."""
    path = folder / STAGE_RESULT
    return StageResult(**json.loads(path.read_text())) if path.is_file() else None


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a stage and all processes that it has started. SIGTERM comes first, so that a run can save."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_SECONDS)
    with contextlib.suppress(ProcessLookupError):  # no process of the group is left
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _reason(status: int | None, seconds: float, answer: dict[str, Any], log: Path) -> str:
    """Return why a stage failed, an empty string if it passed; ``status`` is None after the time limit."""
    if status is None:
        return f"not finished after {seconds:.0f} s"
    if status:
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        return f"exit code {status}: {lines[-1][:200] if lines else 'without output'}"
    return "" if answer.get("passed", True) else str(answer.get("notes", "see its table"))
