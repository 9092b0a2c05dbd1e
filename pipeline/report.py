"""A finished run's ``result.json`` and the table that closes a command."""

from __future__ import annotations

from typing import Any

from torch import nn

from pipeline.checkpoint import Best
from pipeline.evaluate import Accuracy
from pipeline.recipe import load_recipe
from pipeline.runs import RESULT, Run, find_run, write_json


def write_result(
    run: Run,
    student: nn.Module,
    classes: str,
    last: Accuracy,
    best: Best,
    averaged: Accuracy | None,
    images_per_second: float,
) -> None:
    """Write what the finished run measured: accuracies in percent, parameters, training images per second, classes."""
    result = {
        "identity": run.digest,
        "classes": classes,
        "model": run.recipe.student.model,
        "parameters": sum(parameter.numel() for parameter in student.parameters()),
        "top1": last.top1,
        "top5": last.top5,
        "best_top1": best.top1,
        "best_epoch": best.epoch,
        "ema_top1": averaged.top1 if averaged else None,
        "epochs": run.recipe.epochs,
        "images_per_second": round(images_per_second, 1),
    }
    write_json(run.folder / RESULT, result)


def print_table(run: Run) -> None:
    """Print the run beside the runs it stands on: teacher, compared students, itself."""
    recipe = run.recipe
    others = [("teacher", recipe.teacher.recipe)] if recipe.teacher and recipe.teacher.recipe else []
    others += [("student", path) for path in recipe.compare]
    runs = [(role, find_run(load_recipe(path))) for role, path in others]
    rows = [_row(role, one) for role, one in [*runs, ("student" if recipe.teacher else "network", run)]]
    print(_table([["", "losses", "network", "parameters", "top-1", "best", "images/s", "run folder"], *rows]))


def _row(role: str, run: Run) -> list[str]:
    result: dict[str, Any] | None = run.result
    losses = " + ".join(run.recipe.losses)
    if result is None:
        return [role, losses, run.recipe.student.model, *["-"] * 4, str(run.folder)]
    return [
        role,
        losses,
        result["model"],
        f"{result['parameters']:,}",
        f"{result['top1']:.2f}",
        f"{result['best_top1']:.2f}",
        f"{result['images_per_second']:,.0f}",
        str(run.folder),
    ]


def _table(rows: list[list[str]]) -> str:
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(["", lines[0], "-" * max(map(len, lines)), *lines[1:]])
