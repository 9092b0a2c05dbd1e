"""A stage as a process with a time limit, and its result as a file that is on disk before the next stage begins."""

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

PASSED, FAILED, LATE = "passed", "FAILED", "no time"
STAGE_RESULT, ANSWER, LOG = "result.json", "answer.json", "log.txt"
MERCY = 10.0
"""Seconds that a stage has to end by itself once its time is over."""


@dataclass(frozen=True)
class StageResult:
    """How a stage ended."""

    name: str
    status: str
    seconds: float = 0.0
    reason: str = ""
    command: str = ""
    answer: dict[str, Any] = field(default_factory=dict)
    """What a check found: ``passed``, ``title``, ``columns``, ``rows``, ``notes``."""

    @property
    def passed(self) -> bool:
        """Whether it need not run again."""
        return self.status == PASSED

    def __str__(self) -> str:
        return f"{self.status:<8}{self.seconds:6.1f} s  {self.name:<22}{self.reason}".rstrip()

    @classmethod
    def out_of_time(cls, stage: HalfHourStage) -> StageResult:
        """Return that the command's minutes were over before the stage could begin."""
        return cls(stage.name, LATE, reason="the same command goes on here", command=stage.command_line)


def run_stage(stage: HalfHourStage, folder: Path, seconds: float) -> StageResult:
    """Run the stage for at most that long, and write down how it ended."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ANSWER).unlink(missing_ok=True)
    began = time.monotonic()
    with (folder / LOG).open("wb") as log:
        words = [word.replace("{folder}", str(folder)) for word in stage.words]
        environment = {**os.environ, **stage.environment}
        process = subprocess.Popen(
            words,
            cwd=stage.folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
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
    """Write down how a stage ended, and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / STAGE_RESULT, (json.dumps(asdict(result), indent=1) + "\n").encode())
    return result


def read_stage_result(folder: Path) -> StageResult | None:
    """Return how a stage ended; None if it did not."""
    path = folder / STAGE_RESULT
    return StageResult(**json.loads(path.read_text())) if path.is_file() else None


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the stage with all that it has started; a run in it saves first."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(MERCY)
    with contextlib.suppress(ProcessLookupError):  # nobody is left
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _reason(status: int | None, seconds: float, answer: dict[str, Any], log: Path) -> str:
    """Return what went wrong; nothing if all is well."""
    if status is None:
        return f"not over after {seconds:.0f} s"
    if status:
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        return f"exit code {status}: {lines[-1][:200] if lines else 'it said nothing'}"
    return "" if answer.get("passed", True) else str(answer.get("notes", "see its table"))
