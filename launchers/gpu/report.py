"""Reports of the half hour: a summary of the stages, tables for BENCHMARKS.md, and results of finished runs."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from supervise import StageResult, read_stage_result

from pipeline.benchmarks.record import BenchmarkRecord
from pipeline.errors import RecipeError, one_line
from pipeline.runs.recording import record_run
from shards.documents import DamagedFile
from shards.manifest import write_atomically


def write_reports(out: Path, is_real: bool) -> None:
    """Write ``summary.md`` and ``benchmarks.md`` in ``out``; and ``results/``, if data and weights are real."""
    folders = sorted(path for path in out.glob("[123][0-9][0-9]-*") if path.is_dir())
    results = [result for result in map(read_stage_result, folders) if result is not None]
    refused = write_results(out) if is_real else []
    _write(out / "summary.md", summary(results, refused))
    _write(out / "benchmarks.md", benchmarks(out / "records", results))


def _write(path: Path, text: str) -> None:
    write_atomically(path, text.encode())


def summary(results: Iterable[StageResult], refused: Iterable[str] = ()) -> str:
    """Return a table with a row per stage (name, status, seconds, reason of a failure), and the refused runs."""
    # A vertical bar would end the table cell.
    rows = [[r.name, r.status, f"{r.seconds:.0f}", r.reason.replace("|", "/")] for r in results]
    table = markdown_table(["stage", "", "seconds", "why"], rows)
    return "".join(["# Half an hour on this machine\n\n", table, *(f"\nNot recorded: {each}\n" for each in refused)])


def benchmarks(records: Path, results: Iterable[StageResult]) -> str:
    """Return the tables of all checks and of all benchmark records."""
    parts = [
        f"## {r.answer['title']}\n\n{markdown_table(r.answer['columns'], r.answer['rows'])}"
        for r in results
        if r.answer.get("columns")
    ]
    kept = [BenchmarkRecord.model_validate_json(path.read_bytes()) for path in sorted(records.glob("*.json"))]
    steps = [record for record in kept if record.what == "step"]
    if steps:
        parts.append(f"## A step\n\n{_machine_text(steps[0])}\n\n{steps_table(steps)}")
    others = [record for record in kept if record.what != "step"]
    parts += [f"## {record.what} of `{record.recipe}`\n\n{record_table(record)}" for record in others]
    return "\n".join(parts)


def _machine_text(record: BenchmarkRecord) -> str:
    machine, versions = record.machine, record.versions
    changed = ", uncommitted changes" if versions.get("uncommitted_changes") else ""
    hardware = f"{machine['gpu'] or machine['cpu']}, {machine['cores']} cores, torch {versions['torch']}"
    repeats = len(record.measured[0].seconds)
    return f"{hardware}, commit {str(versions.get('commit'))[:7]}{changed}; medians and ranges of {repeats} repeats."


def steps_table(records: list[BenchmarkRecord]) -> str:
    """Return a table with a row per record: time, images/s, ratio to the first of its size, and the parts' shares."""
    first: dict[tuple[int, int], float] = {}
    parts = list(dict.fromkeys(part.name for record in records for part in record.measured[1:]))
    rows = []
    for record in records:
        # The first measurement is the whole step; the others are its parts.
        step, batch = record.measured[0], record.resolved["batch"]
        key = (batch, record.resolved["data"]["size"])
        median, least, most = step.milliseconds
        first.setdefault(key, median)
        shares = record.shares()
        part_cells = [f"{shares[name]:.0%}" if name in shares else "" for name in parts]
        ratio = f"{median / first[key]:.2f}"
        rows.append(
            [
                _title(record),
                batch,
                f"{median:.2f} ({least:.2f}–{most:.2f})",
                f"{step.images_per_second:,.0f}",
                ratio,
                *part_cells,
            ]
        )
    return markdown_table(["recipe", "B", "ms a step", "images/s", "÷ the first of its size", *parts], rows)


def _title(record: BenchmarkRecord) -> str:
    options = [word.partition("=")[0] for word in record.words if word.endswith((".compile=true", "graph=true"))]
    return " ".join([f"`{record.recipe}`", record.resolved["precision"], *options])


def record_table(record: BenchmarkRecord) -> str:
    """Return a table with a row per measurement: its time, images/s and counts."""
    counted = list(dict.fromkeys(name for each in record.measured for name in each.counts))
    rows = []
    for each in record.measured:
        median, least, most = each.milliseconds
        rate = f"{each.images_per_second:,.0f}" if each.images else ""
        counts = [f"{each.counts[name]:,}" if name in each.counts else "" for name in counted]
        rows.append([each.name, f"{median:.3f} ({least:.3f}–{most:.3f})", rate, *counts])
    return markdown_table(["", "ms", "images/s", *counted], rows)


def write_results(out: Path) -> list[str]:
    """Write the finished runs of CIFAR-100's pair to ``out/results``, and return why others are no results."""
    shutil.rmtree(out / "results", ignore_errors=True)
    refused = []
    for path in sorted(out.glob("runs/cifar100/*/*/seed-*/result.json")):
        try:
            record_run(path.parent, out / "results")
        except (RecipeError, DamagedFile) as error:
            refused.append(one_line(error))
    return refused


def markdown_table(columns: Iterable[Any], rows: Iterable[Iterable[Any]]) -> str:
    """Return a Markdown table."""
    columns = list(columns)
    lines = [columns, ["---"] * len(columns), *map(list, rows)]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)
