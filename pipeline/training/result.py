"""A finished run's ``result.json``, and the table that a command prints at its end."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from pipeline.config.source import CONFIGS
from pipeline.data.loader_settings import processor
from pipeline.distributed import collectives
from pipeline.runs.files import JOURNAL_FILE, RESULT_FILE, Result, student_sha256, write_json
from pipeline.runs.identity import Run
from pipeline.tasks._base import Evaluation, Task
from pipeline.tasks._registry import find_task
from pipeline.training.checkpoint import Best
from pipeline.training.journal import read_journal


def write_result(
    run: Run,
    task: Task,
    parameters: int,
    last: Evaluation | None,
    best: Best,
    averaged: Evaluation | None,
    images_per_second: float,
    side: int,
) -> None:
    """Write what the finished run measured: the task's metrics, parameters, speed, and what it trained on.

    ``side`` is the number of runs that the command trained side by side.
    """
    seconds = training_seconds(read_journal(run.folder / JOURNAL_FILE), run.recipe.rows_per_step)
    metrics = {
        **(last.metrics if last else dict.fromkeys(task.titles)),
        f"best_{task.metric}": best.value if last else None,
        f"ema_{task.metric}": averaged.main if averaged else None,
    }
    result = Result(
        identity=run.fingerprint,
        model=run.recipe.student.model,
        parameters=parameters,
        best_epoch=best.epoch,
        epochs=run.recipe.epochs,
        images_per_second=round(images_per_second, 1),
        sha256=student_sha256(run.folder),
        recipe=str(run.source) if run.path.is_relative_to(CONFIGS) else None,
        shards=run.manifest.tool,
        images=run.training_images,
        seconds=round(seconds, 1),
        device=device_name(),
        ranks=collectives.world_size(),
        side=side if side > 1 else None,
        peers=(last and last.peers) or None,
        **metrics,  # pyright: ignore[reportArgumentType]
    )
    write_json(run.folder / RESULT_FILE, result.model_dump())


def device_name() -> str:
    """Return the name of the GPU that this process uses, or of the processor."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else processor()


def training_seconds(lines: Iterable[dict[str, Any]], batch: int) -> float:
    """Return about how many seconds a run trained, by the lines of its journal, all its commands together.

    The steps between two lines count at the rate of the later line. Evaluations, the start of a command, and steps that
    an interrupted command lost are not counted.
    """
    seconds, last = 0.0, 0
    for line in lines:
        if speed := line.get("timing", {}).get("images_per_second"):
            seconds += (line["step"] - last) * batch / speed
            last = line["step"]
    return seconds


def print_table(run: Run) -> None:
    """Print a table of the run and its dependencies: teacher, the student's first stage, compared students."""
    runs = [("teacher", teacher) for teacher in run.teachers]
    runs += [("start", run.start)] if run.start else []
    runs += [("student", student) for student in run.compare]
    runs += [("student" if run.recipe.teacher or run.recipe.student.start else "network", run)]
    rows = [_row(role, each) for role, each in runs]
    print(
        aligned(
            [
                [
                    "",
                    "losses",
                    "network",
                    "parameters",
                    find_task(run.recipe.task).title,
                    "best",
                    "images/s",
                    "run folder",
                ],
                *rows,
            ]
        )
    )
    for _, each in runs:
        if each.result and each.result.peers:
            values = ", ".join(f"{name} {percent(value)}" for name, value in each.result.peers.items())
            print(f"peers of {each.folder}: {values}")
    if run.teachers and run.recipe.teacher and (weights := run.recipe.teacher.weights):
        print(f"note: the teacher's weights are {weights}, and its line here is that of its run's last ones")
    holdout = run.recipe.data.holdout
    if holdout and any(teacher.recipe.data.holdout != holdout for teacher in run.teachers):
        print("note: students are measured on held-out training images, the teacher on its own validation images")


def _row(role: str, run: Run) -> list[str]:
    result, losses = run.result, " + ".join(run.recipe.losses)
    if result is None:  # a finished run no longer needs its dependencies, so one may have been deleted
        return [role, losses, run.recipe.student.model, "", "gone", "", "", str(run.folder)]
    return [
        role,
        losses,
        result.model,
        f"{result.parameters:,}",
        percent(result.last),
        percent(result.best),
        f"{result.images_per_second:,.0f}",
        str(run.folder),
    ]


def percent(value: float | None) -> str:
    """Return a metric as text for a table; None, from a run without validation images, is a dash."""
    return "–" if value is None else f"{value:.2f}"


def aligned(rows: list[list[str]]) -> str:
    """Return the rows as a text table: columns as wide as their widest cell, a rule below the first row."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(["", lines[0], "-" * max(map(len, lines)), *lines[1:]])
